"""Pure PyTorch (and SciPy) twins of every operator: the definition of truth, exact in fp64."""

from fastris.reference.assignment import assignment
from fastris.reference.convlstm import conv2d_same, convlstm
from fastris.reference.dense_crf import dense_crf
from fastris.reference.dynamic_mask import dynamic_mask
from fastris.reference.group_norm_relu import group_norm_relu
from fastris.reference.image_masks import image_masks
from fastris.reference.look import look
from fastris.reference.lstm_gates import lstm_gates
from fastris.reference.permutohedral import gaussian_sum, permutohedral_filter, permutohedral_lattice
from fastris.reference.place_logits import place_logits
from fastris.reference.soft_iou import soft_iou

__all__ = [
    "assignment",
    "conv2d_same",
    "convlstm",
    "dense_crf",
    "dynamic_mask",
    "gaussian_sum",
    "group_norm_relu",
    "image_masks",
    "look",
    "lstm_gates",
    "permutohedral_filter",
    "permutohedral_lattice",
    "place_logits",
    "soft_iou",
]
