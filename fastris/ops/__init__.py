"""The operators: one file each with its schema, fake kernel, autograd and choice of back end.

Importing this package registers all of them as ``torch.ops.fastris.*``.
"""

from fastris.ops import (
    assignment,
    conv2d_same,
    convlstm,
    dynamic_mask,
    group_norm_relu,
    image_masks,
    look,
    lstm_gates,
    permutohedral,
    place_logits,
    soft_iou,
)

__all__ = [
    "assignment",
    "conv2d_same",
    "convlstm",
    "dynamic_mask",
    "group_norm_relu",
    "image_masks",
    "look",
    "lstm_gates",
    "permutohedral",
    "place_logits",
    "soft_iou",
]
