"""Modules: ConvLSTM, heads, backbones, the segmenter and its loss."""

from fastris.nn.backbone import SmallFCN
from fastris.nn.config import ModelConfig
from fastris.nn.convlstm import ConvLSTM, ConvLSTMCell
from fastris.nn.heads import ConfidenceHead, DynamicMaskHead, SpatialInhibition
from fastris.nn.loss import LossTerms, Matches, RISLoss, match
from fastris.nn.model import RecurrentInstanceSegmenter, RISOutput

__all__ = [
    "ConfidenceHead",
    "ConvLSTM",
    "ConvLSTMCell",
    "DynamicMaskHead",
    "LossTerms",
    "Matches",
    "ModelConfig",
    "RISLoss",
    "RISOutput",
    "RecurrentInstanceSegmenter",
    "SmallFCN",
    "SpatialInhibition",
    "match",
]
