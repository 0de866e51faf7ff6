"""Import of the weights of Keras' ConvLSTM2D; Keras itself is not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastris.nn.convlstm import ConvLSTM

__all__ = ["convlstm_from_keras"]

# What a layer must have been built with, and what its configuration means by not saying so.
_NEEDED = {
    "padding": ("same", "valid"),
    "recurrent_activation": ("sigmoid", None),  # hard_sigmoid was the default before Keras 3
    "activation": ("tanh", "tanh"),
    "strides": (1, 1),
    "dilation_rate": (1, 1),  # Keras dilates the input's convolution, not the recurrent one
    "go_backwards": (False, False),
}


def convlstm_from_keras(weights: Sequence[npt.ArrayLike], config: Mapping[str, Any]) -> ConvLSTM:
    """A one-layer, batch-first ConvLSTM with the weights of a Keras ConvLSTM2D.

    ``convlstm_from_keras(layer.get_weights(), layer.get_config())`` gives the layer's outputs to fp32 rounding, for its
    input and outputs permuted from (B, T, H, W, channels) to (B, T, channels, H, W). Dropout is left behind.

    Args:
        weights: kernel (kh, kw, Cin, 4C), recurrent kernel (kh, kw, C, 4C) and, if there is one, bias (4C,); gate order
            i, f, c, o.
        config: how the layer was built; ``{"padding": "same", "recurrent_activation": "sigmoid"}`` where there is no
            ``get_config()``.

    Raises:
        ValueError: shapes that do not fit, or a layer that fastris cannot express: padding="valid",
            recurrent_activation="hard_sigmoid" (Keras' default before 3.0), another activation, strides, dilation,
            go_backwards.

    Source: github.com/keras-team/keras, ``keras/src/layers/rnn/conv_lstm.py``.
    """
    for name, (needed, default) in _NEEDED.items():
        value = config.get(name, default)
        if value not in (needed, (needed, needed), [needed, needed]):
            raise ValueError(f"convlstm_from_keras: config must have {name}={needed!r}, got {value!r}")
    arrays = [torch.from_numpy(np.array(array)) for array in weights]
    if len(arrays) not in (2, 3):
        raise ValueError(f"convlstm_from_keras: weights must be kernel, recurrent kernel and bias, got {len(arrays)}")
    kernel, recurrent = arrays[:2]
    if kernel.dim() != 4 or kernel.shape[3] % 4:
        raise ValueError(f"convlstm_from_keras: kernel must be (kh, kw, Cin, 4C), got {tuple(kernel.shape)}")
    height, width, inputs, gates = kernel.shape
    expected = {"recurrent kernel": (height, width, gates // 4, gates), "bias": (gates,)}
    for array, (name, shape) in zip(arrays[1:], expected.items(), strict=False):  # there may be no bias
        if tuple(array.shape) != shape:
            raise ValueError(f"convlstm_from_keras: {name} must be {shape}, got {tuple(array.shape)}")

    layer = ConvLSTM(inputs, gates // 4, (height, width), 1, batch_first=True, bias=len(arrays) == 3).to(kernel.dtype)
    state = {"weight": _reordered(torch.cat([kernel, recurrent], dim=2)).permute(3, 2, 0, 1)}
    if len(arrays) == 3:
        state["bias"] = _reordered(arrays[2])
    layer.cell_list[0].conv.load_state_dict(state)
    return layer


def _reordered(array: torch.Tensor) -> torch.Tensor:
    """i, f, c, o → i, f, o, g along the last dimension."""
    i, f, c, o = array.chunk(4, dim=-1)
    return torch.cat([i, f, o, c], dim=-1)
