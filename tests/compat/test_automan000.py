"""automan000's modules against their equations and parameter names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastris.compat.automan000 import ConvLSTM, ConvLSTMCell


class NaiveCell(nn.Module):
    """Peepholes that are part of the state_dict only where they are trained."""

    def __init__(self, input_channels, hidden_channels, kernel_size, peephole=False):
        super().__init__()
        padding = (kernel_size - 1) // 2
        for gate in "ifco":
            x_conv = nn.Conv2d(input_channels, hidden_channels, kernel_size, padding=padding)
            h_conv = nn.Conv2d(hidden_channels, hidden_channels, kernel_size, padding=padding, bias=False)
            setattr(self, f"Wx{gate}", x_conv)
            setattr(self, f"Wh{gate}", h_conv)
        for gate in "ifo":
            weight = nn.Parameter(torch.randn(1, hidden_channels, 1, 1)) if peephole else 0.0
            setattr(self, f"Wc{gate}", weight)

    def forward(self, x, h, c):
        i = (self.Wxi(x) + self.Whi(h) + c * self.Wci).sigmoid()
        f = (self.Wxf(x) + self.Whf(h) + c * self.Wcf).sigmoid()
        c = f * c + i * (self.Wxc(x) + self.Whc(h)).tanh()
        o = (self.Wxo(x) + self.Who(h) + c * self.Wco).sigmoid()
        return o * c.tanh(), c


class NaiveStack(nn.Module):
    def __init__(self, input_channels, hidden_channels, kernel_size, step, effective_step, peephole=False):
        super().__init__()
        self.hidden_channels, self.step, self.effective_step = hidden_channels, step, effective_step
        for k, channels in enumerate(hidden_channels):
            inputs = hidden_channels[k - 1] if k else input_channels
            setattr(self, f"cell{k}", NaiveCell(inputs, channels, kernel_size, peephole))

    def forward(self, image):
        size = (image.shape[0], *image.shape[2:])
        states = [(image.new_zeros(size[0], c, *size[1:]),) * 2 for c in self.hidden_channels]
        outputs = []
        for step in range(self.step):
            x = image
            for k in range(len(states)):
                states[k] = getattr(self, f"cell{k}")(x, *states[k])
                x = states[k][0]
            if step in self.effective_step:
                outputs.append(x)
        return outputs, states[-1]


@pytest.mark.parametrize("peephole", [False, True])
@pytest.mark.parametrize(("step", "effective_step"), [(4, [1, 3]), (1, [0]), (3, [2, 0, 7])])
def test_a_stack_is_the_original(assert_same_module, step, effective_step, peephole):
    original = NaiveStack(3, [4, 2], 3, step, effective_step, peephole)
    module = ConvLSTM(3, [4, 2], 3, step, effective_step, peephole=peephole)
    assert_same_module(original, module, torch.randn(2, 3, 6, 5))


@pytest.mark.parametrize("peephole", [False, True])
def test_a_cell_is_the_original(assert_same_module, peephole):
    original, cell = NaiveCell(3, 4, 5, peephole), ConvLSTMCell(3, 4, 5, peephole=peephole)
    assert_same_module(original, cell, torch.randn(2, 3, 6, 5), torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5))


def test_the_keys_are_the_originals_and_peepholes_add_theirs():
    keys = [f"cell0.W{conv}.weight" for conv in ("xi", "hi", "xf", "hf", "xc", "hc", "xo", "ho")]
    keys += [f"cell0.W{conv}.bias" for conv in ("xi", "xf", "xc", "xo")]
    assert sorted(ConvLSTM(3, [4], 3).state_dict()) == sorted(keys)
    state = ConvLSTM(3, [4], 3, peephole=True).state_dict()
    assert sorted(state) == sorted([*keys, "cell0.Wci", "cell0.Wcf", "cell0.Wco"])
    assert not any(state[f"cell0.Wc{gate}"].any() for gate in "ifo")


def test_peepholes_start_as_none_and_then_learn():
    module = ConvLSTM(3, [4], 3, step=2, peephole=True)
    plain = ConvLSTM(3, [4], 3, step=2)
    module.load_state_dict(plain.state_dict(), strict=False)
    image = torch.randn(1, 3, 5, 5)
    (output,), _ = module(image)
    torch.testing.assert_close([output], plain(image)[0])
    output.sum().backward()
    assert all(getattr(module.cell0, f"Wc{gate}").grad.any() for gate in "ifo")


def test_the_default_effective_step_returns_the_second_output_as_the_original_does():
    image = torch.randn(1, 3, 5, 5)
    assert ConvLSTM(3, [4], 3)(image)[0] == []
    assert len(ConvLSTM(3, [4], 3, step=5)(image)[0]) == 1


def test_a_second_image_may_have_another_size():
    module = ConvLSTM(3, [4], 3, step=2)
    for size in ((5, 5), (8, 3)):
        assert module(torch.randn(1, 3, *size))[1][0].shape[-2:] == size


def test_the_zero_state_is_in_the_modules_dtype():
    h, c = ConvLSTMCell(3, 4, 3).double().init_hidden(2, 4, (5, 6))
    assert h.shape == c.shape == (2, 4, 5, 6) and h.dtype == torch.float64 and not h.any()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="hidden_channels must be a list with one per layer, got 4"):
        ConvLSTM(3, 4, 3)
    with pytest.raises(ValueError, match="step must be a positive integer, got 0"):
        ConvLSTM(3, [4], 3, step=0)
    with pytest.raises(ValueError, match="kernel_size must be a positive integer, got -3"):
        ConvLSTM(3, [4], -3)
    with pytest.raises(ValueError, match=r"input must be \(B, 3, H, W\), got float32 \(1,2,5,5\)"):
        ConvLSTM(3, [4], 3)(torch.zeros(1, 2, 5, 5))
    x, state = torch.zeros(1, 3, 5, 5), torch.zeros(1, 4, 5, 5)
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\), got float32 \(1,4,5,5\)"):
        ConvLSTMCell(3, 4, 3)(state, state, state)
    with pytest.raises(ValueError, match=r"h of the state must be \(1, 4, 5, 5\), got float32 \(1,3,5,5\)"):
        ConvLSTMCell(3, 4, 3)(x, x, state)
