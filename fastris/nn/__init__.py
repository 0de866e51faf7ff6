"""Modules: ConvLSTM, heads, backbones, the segmenter and its loss, and other models' matchers."""

from fastris.nn.backbone import PlantsFCN, SmallFCN
from fastris.nn.config import ModelConfig
from fastris.nn.convlstm import ConvLSTM, ConvLSTMCell
from fastris.nn.fcn8s import FCN8s
from fastris.nn.heads import ConfidenceHead, DynamicMaskHead, SpatialInhibition
from fastris.nn.loss import LossTerms, Matches, RISLoss, match
from fastris.nn.matcher import HungarianMatcher, MaskHungarianMatcher, QueryMatches
from fastris.nn.model import RecurrentInstanceSegmenter, RISOutput, Trace
from fastris.nn.pretrained import load_fcn8s, load_pretrained, load_vgg16

__all__ = [
    "ConfidenceHead",
    "ConvLSTM",
    "ConvLSTMCell",
    "DynamicMaskHead",
    "FCN8s",
    "HungarianMatcher",
    "LossTerms",
    "MaskHungarianMatcher",
    "Matches",
    "ModelConfig",
    "PlantsFCN",
    "QueryMatches",
    "RISLoss",
    "RISOutput",
    "RecurrentInstanceSegmenter",
    "SmallFCN",
    "SpatialInhibition",
    "Trace",
    "load_fcn8s",
    "load_pretrained",
    "load_vgg16",
    "match",
]
