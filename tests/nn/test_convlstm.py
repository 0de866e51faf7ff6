"""The ConvLSTM modules: ndrplz's contract, and what its users asked for beyond it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastris import ConvLSTM, ConvLSTMCell


def naive_stack(x, state_dict, layers, states):
    """x (T, B, C, H, W) through every layer, from the equations and the parameters' published names."""
    all_outputs, last = [], []
    for k in range(layers):
        weight, bias = state_dict[f"cell_list.{k}.conv.weight"], state_dict[f"cell_list.{k}.conv.bias"]
        hidden, cell = states[k]
        outputs = []
        for x_t in x:
            i, f, o, g = F.conv2d(torch.cat([x_t, hidden], 1), weight, bias, padding="same").chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            outputs.append(hidden)
        x = torch.stack(outputs)
        all_outputs.append(x)
        last.append((hidden, cell))
    return all_outputs, last


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("carried", [False, True])
def test_equals_the_equations_with_and_without_a_state(batch_first, carried):
    layer = ConvLSTM(3, [4, 5], (3, 3), 2, batch_first=batch_first, return_all_layers=True).double()
    x = torch.randn(6, 2, 3, 8, 7, dtype=torch.float64)
    make = torch.randn if carried else torch.zeros
    states = [tuple(make(2, c, 8, 7, dtype=torch.float64) for _ in range(2)) for c in (4, 5)]
    outputs, last = layer(x.transpose(0, 1) if batch_first else x, states if carried else None)
    expected_outputs, expected_last = naive_stack(x, layer.state_dict(), 2, states)
    for k in range(2):
        torch.testing.assert_close(outputs[k], expected_outputs[k].transpose(0, 1))
        torch.testing.assert_close(tuple(last[k]), expected_last[k])


def test_one_image_for_all_steps_equals_the_repeated_image():
    layer = ConvLSTM(2, 3, 3, 2)
    x = torch.randn(2, 2, 5, 5)
    (constant,), _ = layer(x, steps=4)
    (repeated,), _ = layer(x.expand(4, -1, -1, -1, -1))
    torch.testing.assert_close(constant, repeated)


def test_a_sequence_in_two_halves_equals_the_whole():
    layer = ConvLSTM(2, 3, 3, 1)
    x = torch.randn(6, 1, 2, 4, 4)
    (whole,), _ = layer(x)
    (first,), state = layer(x[:2])
    (second,), _ = layer(x[2:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


def test_the_cell_is_the_layer_of_one_step():
    cell = ConvLSTMCell(2, 3, 3, bias=True)
    x, state = torch.randn(1, 2, 4, 4), cell.init_hidden(1, (4, 4))
    layer = ConvLSTM(2, 3, 3, 1)
    layer.cell_list[0].load_state_dict(cell.state_dict())
    torch.testing.assert_close(cell(x, state)[0], layer(x, steps=1)[0][0][:, 0])


def test_wrong_lists_and_states_are_named():
    with pytest.raises(ValueError, match="one entry per layer"):
        ConvLSTM(2, [3, 4], 3, 3)
    with pytest.raises(ValueError, match="hidden_state"):
        ConvLSTM(2, 3, 3, 2)(torch.zeros(1, 1, 2, 4, 4), hidden_state=[(torch.zeros(1), torch.zeros(1))])
