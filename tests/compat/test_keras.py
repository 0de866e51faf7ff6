"""ConvLSTM2D's weights against its equations, channels last as in Keras."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastris.compat.keras import convlstm_from_keras

SAME = {"padding": "same", "recurrent_activation": "sigmoid"}
CONFIG = {  # the part of a Keras 3 layer's get_config() that decides
    "name": "conv_lstm2d",
    "filters": 4,
    "kernel_size": (3, 3),
    "strides": (1, 1),
    "padding": "same",
    "data_format": "channels_last",
    "dilation_rate": (1, 1),
    "activation": "tanh",
    "recurrent_activation": "sigmoid",
    "use_bias": True,
    "dropout": 0.0,
    "return_sequences": True,
    "go_backwards": False,
}


def random_weights(height, width, inputs, channels, bias=True):
    shapes = [(height, width, inputs, 4 * channels), (height, width, channels, 4 * channels), (4 * channels,)]
    return [np.random.standard_normal(shape) for shape in shapes[: 2 + bias]]


def keras_layer(x, weights):
    """x (B, T, H, W, Cin) → every h and the last c, (B, T, H, W, C) and (B, H, W, C)."""
    kernel, recurrent = (torch.from_numpy(weight).permute(3, 2, 0, 1) for weight in weights[:2])
    bias = torch.from_numpy(weights[2]) if len(weights) == 3 else 0.0

    def conv(image, weight):  # [B, H, W, channels], padded by one more at the end where the kernel is even
        kh, kw = weight.shape[2:]
        padded = F.pad(image.permute(0, 3, 1, 2), ((kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2))
        return F.conv2d(padded, weight).permute(0, 2, 3, 1)

    h = c = x.new_zeros(*x[:, 0].shape[:3], recurrent.shape[1])
    outputs = []
    for t in range(x.shape[1]):
        i, f, g, o = (conv(x[:, t], kernel) + conv(h, recurrent) + bias).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs, dim=1), c


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel_size", [(3, 3), (2, 5)])
def test_the_imported_layer_gives_keras_results(kernel_size, bias):
    weights = random_weights(*kernel_size, 3, 4, bias)
    x = torch.randn(2, 4, 6, 5, 3, dtype=torch.float64)
    expected, expected_cell = keras_layer(x, weights)
    (outputs,), ((h, c),) = convlstm_from_keras(weights, CONFIG)(x.permute(0, 1, 4, 2, 3))
    torch.testing.assert_close(outputs.permute(0, 1, 3, 4, 2), expected)
    torch.testing.assert_close(h.permute(0, 2, 3, 1), expected[:, -1])
    torch.testing.assert_close(c.permute(0, 2, 3, 1), expected_cell)


def test_the_layer_has_the_weights_dtype_and_trains():
    weights = [weight.astype(np.float32) for weight in random_weights(3, 3, 2, 4)]
    layer = convlstm_from_keras(weights, SAME)
    assert layer.batch_first and layer.hidden_dim == [4] and layer.kernel_size == [(3, 3)]
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in layer.parameters())


def test_the_layer_does_not_share_memory_with_the_arrays():
    weights = random_weights(3, 3, 2, 4)
    layer = convlstm_from_keras(weights, SAME)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert all(weight.any() for weight in weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding": "valid"}, "padding='same', got 'valid'"),
        ({"recurrent_activation": "hard_sigmoid"}, "recurrent_activation='sigmoid', got 'hard_sigmoid'"),
        ({"activation": "relu"}, "activation='tanh', got 'relu'"),
        ({"strides": (2, 2)}, r"strides=1, got \(2, 2\)"),
        ({"dilation_rate": [2, 2]}, r"dilation_rate=1, got \[2, 2\]"),
        ({"go_backwards": True}, "go_backwards=False, got True"),
    ],
)
def test_a_layer_that_cannot_be_expressed_is_refused(change, message):
    with pytest.raises(ValueError, match=f"convlstm_from_keras: config must have {message}"):
        convlstm_from_keras(random_weights(3, 3, 2, 4), {**CONFIG, **change})


def test_a_config_must_say_what_keras_versions_differ_in():
    with pytest.raises(ValueError, match="padding='same', got 'valid'"):
        convlstm_from_keras(random_weights(3, 3, 2, 4), {})
    with pytest.raises(ValueError, match="recurrent_activation='sigmoid', got None"):
        convlstm_from_keras(random_weights(3, 3, 2, 4), {"padding": "same"})


def test_weights_that_do_not_fit_are_named():
    kernel, recurrent, bias = random_weights(3, 3, 2, 4)
    with pytest.raises(ValueError, match="weights must be kernel, recurrent kernel and bias, got 1"):
        convlstm_from_keras([kernel], SAME)
    with pytest.raises(ValueError, match=r"kernel must be \(kh, kw, Cin, 4C\), got \(3, 3, 2, 15\)"):
        convlstm_from_keras([kernel[..., :-1], recurrent], SAME)
    with pytest.raises(ValueError, match=r"recurrent kernel must be \(3, 3, 4, 16\), got \(3, 3, 2, 16\)"):
        convlstm_from_keras([kernel, kernel, bias], SAME)
    with pytest.raises(ValueError, match=r"bias must be \(16,\), got \(8,\)"):
        convlstm_from_keras([kernel, recurrent, bias[:8]], SAME)
