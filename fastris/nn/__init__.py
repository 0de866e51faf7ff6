"""Modules: ConvLSTM, heads, backbones, the segmenter and its loss, and other models' matchers."""

from fastris.nn.backbone import SmallFCN
from fastris.nn.config import ModelConfig
from fastris.nn.convlstm import ConvLSTM, ConvLSTMCell
from fastris.nn.heads import ConfidenceHead, DynamicMaskHead, SpatialInhibition
from fastris.nn.loss import LossTerms, Matches, RISLoss, match
from fastris.nn.matcher import HungarianMatcher, MaskHungarianMatcher, QueryMatches
from fastris.nn.model import RecurrentInstanceSegmenter, RISOutput, Trace

__all__ = [
    "ConfidenceHead",
    "ConvLSTM",
    "ConvLSTMCell",
    "DynamicMaskHead",
    "HungarianMatcher",
    "LossTerms",
    "MaskHungarianMatcher",
    "Matches",
    "ModelConfig",
    "QueryMatches",
    "RISLoss",
    "RISOutput",
    "RecurrentInstanceSegmenter",
    "SmallFCN",
    "SpatialInhibition",
    "Trace",
    "match",
]
