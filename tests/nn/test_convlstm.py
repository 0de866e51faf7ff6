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
            kh, kw = weight.shape[2:]
            padded = F.pad(torch.cat([x_t, hidden], 1), ((kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2))
            i, f, o, g = F.conv2d(padded, weight, bias).chunk(4, 1)
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


@pytest.mark.parametrize("kernel_size", [2, (3, 5), (1, 4), [(3, 3), (1, 1)], [5, 2]])
def test_any_kernel_keeps_the_size_and_equals_the_equations(kernel_size):
    layer = ConvLSTM(2, 3, kernel_size, 2, return_all_layers=True).double()
    x = torch.randn(3, 2, 2, 6, 5, dtype=torch.float64)
    zeros = [tuple(torch.zeros(2, 3, 6, 5, dtype=torch.float64) for _ in range(2))] * 2
    expected, _ = naive_stack(x, layer.state_dict(), 2, zeros)
    for k, output in enumerate(layer(x)[0]):
        torch.testing.assert_close(output, expected[k].transpose(0, 1))


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("peephole", [False, True])
def test_dilation_and_peepholes_follow_the_equations_with_their_gradients(dilation, peephole):
    cell = ConvLSTMCell(2, 3, 3, dilation=dilation, peephole=peephole).double()
    if peephole:
        torch.nn.init.normal_(cell.peephole_weight)
    x, h, c = (torch.randn(2, n, 7, 6, dtype=torch.float64) for n in (2, 3, 3))
    w_i, w_f, w_o = cell.peephole_weight.view(3, 1, 3, 1, 1) if peephole else (0, 0, 0)
    gates = F.conv2d(torch.cat([x, h], 1), cell.conv.weight, cell.conv.bias, padding=dilation, dilation=dilation)
    i, f, o, g = gates.chunk(4, 1)
    c_next = (f + w_f * c).sigmoid() * c + (i + w_i * c).sigmoid() * g.tanh()
    h_next = (o + w_o * c_next).sigmoid() * c_next.tanh()
    result = cell(x, (h, c))
    torch.testing.assert_close(result, (h_next, c_next))
    parameters = list(cell.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(sum(map(torch.sum, result)), parameters),
        torch.autograd.grad(h_next.sum() + c_next.sum(), parameters),
    )


def test_the_options_leave_ndrplz_state_dict_alone_unless_asked():
    keys = ["cell_list.0.conv.weight", "cell_list.0.conv.bias"]
    assert list(ConvLSTM(2, 3, 3, 1, dilation=2, forget_bias=1.0).state_dict()) == keys
    state = ConvLSTM(2, 3, 3, 1, peephole=True).state_dict()
    assert sorted(state) == sorted([*keys, "cell_list.0.peephole_weight"])
    assert state["cell_list.0.peephole_weight"].shape == (9,) and not state["cell_list.0.peephole_weight"].any()


def test_forget_bias_raises_the_forget_gate_only():
    torch.manual_seed(1)
    plain = ConvLSTM(2, 3, 3, 2).state_dict()
    torch.manual_seed(1)
    raised = ConvLSTM(2, 3, 3, 2, forget_bias=1.5).state_dict()
    for name, value in plain.items():
        added = torch.zeros_like(value)
        if name.endswith("bias"):
            added[3:6] = 1.5
        torch.testing.assert_close(raised[name], value + added)


def test_a_state_moves_with_the_module_and_the_layers():
    layer = ConvLSTM(2, [3, 4], 3, 2, return_all_layers=True).double()
    h, c = layer.cell_list[1].init_hidden(2, (5, 6))
    assert (
        h.shape == c.shape == (2, 4, 5, 6)
        and h.dtype == torch.float64
        and h.device == layer.cell_list[1].conv.weight.device
    )
    _, states = layer(torch.randn(1, 2, 2, 5, 6, dtype=torch.float64))
    outputs, _ = layer(torch.randn(2, 2, 5, 6, dtype=torch.float64), states, steps=2)
    assert [tuple(output.shape) for output in outputs] == [(2, 2, 3, 5, 6), (2, 2, 4, 5, 6)]


def test_half_precision_may_keep_an_fp32_cell():
    layer = ConvLSTM(2, 3, 3, 1).to(torch.bfloat16)
    state = (torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16), torch.zeros(1, 3, 4, 4))
    (output,), ((h, c),) = layer(torch.randn(2, 1, 2, 4, 4, dtype=torch.bfloat16), [state])
    assert output.dtype == h.dtype == torch.bfloat16 and c.dtype == torch.float32


def test_a_state_is_carried_through_autocast():
    layer = ConvLSTM(2, 3, 3, 1)
    x = torch.randn(2, 1, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = layer(x)
        (output,), _ = layer(x, state)
    assert output.isfinite().all()


def test_the_modules_compile_to_one_graph():
    layer = ConvLSTM(2, [3, 4], 3, 2, return_all_layers=True, peephole=True)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 1, 2, 4, 4)
    with torch.no_grad():
        _, states = layer(x)
    torch.testing.assert_close(compiled(x, states), layer(x, states))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(input_dim=0), "input_dim must be a positive integer, got 0"),
        (dict(hidden_dim=-1), "hidden_dim must be a positive integer, got -1"),
        (dict(hidden_dim=[3, 4]), "hidden_dim must have one entry per layer: expected 1, got 2"),
        (dict(kernel_size=0), "kernel_size must be a positive integer, got 0"),
        (dict(kernel_size=(3, 3, 3)), r"kernel_size must be k or \(kh, kw\), got \(3, 3, 3\)"),
        (dict(kernel_size=2.5), "kernel_size must be a positive integer, got 2.5"),
        (dict(kernel_size=[3, 3]), "kernel_size must have one entry per layer: expected 1, got 2"),
        (dict(num_layers=0), "num_layers must be a positive integer, got 0"),
        (dict(dilation=0), "dilation must be a positive integer, got 0"),
        (dict(bias=False, forget_bias=1.0), "forget_bias must be 0 without a bias, got 1.0"),
    ],
)
def test_a_wrong_constructor_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvLSTM(**{"input_dim": 2, "hidden_dim": 3, "kernel_size": 3, "num_layers": 1, **arguments})


SEQUENCE = torch.zeros(4, 1, 2, 5, 6)
STATE = (torch.zeros(1, 3, 5, 6), torch.zeros(1, 3, 5, 6))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            dict(input_tensor=SEQUENCE[:, :, :1]),
            ValueError,
            r"input_tensor must be \(T, B, 2, H, W\) or \(B, 2, H, W\), got",
        ),
        (dict(input_tensor=SEQUENCE[0, 0]), ValueError, r"input_tensor must be .* got float32 \(2,5,6\)"),
        (dict(input_tensor=[SEQUENCE]), TypeError, "input_tensor must be a tensor, got list"),
        (
            dict(input_tensor=SEQUENCE.double()),
            ValueError,
            "input_tensor must be float32 like the parameters, got float64",
        ),
        (
            dict(input_tensor=SEQUENCE.to("meta")),
            ValueError,
            "input_tensor must be on cpu like the parameters, got meta",
        ),
        (dict(steps=3), ValueError, r"steps goes with one \(B, 2, H, W\) input, not with a sequence, got 3"),
        (dict(input_tensor=SEQUENCE[0]), ValueError, "steps must be a positive integer, got None"),
        (dict(input_tensor=SEQUENCE[0], steps=0), ValueError, "steps must be a positive integer, got 0"),
        (
            dict(hidden_state=[STATE] * 2),
            ValueError,
            r"hidden_state must have one \(h, c\) per layer: expected 1, got 2",
        ),
        (dict(hidden_state=[STATE[0]]), TypeError, r"hidden_state\[0\] must be a pair of tensors \(h, c\), got Tensor"),
        (
            dict(hidden_state=[(STATE[0], STATE[1][..., :-1])]),
            ValueError,
            r"c of hidden_state\[0\] must be \(1, 3, 5, 6\), got float32 \(1,3,5,5\)",
        ),
        (
            dict(hidden_state=[(STATE[0].double(), STATE[1])]),
            ValueError,
            r"h of hidden_state\[0\] must be float32 like the input, got float64",
        ),
        (
            dict(hidden_state=[(STATE[0], STATE[1].to("meta"))]),
            ValueError,
            r"c of hidden_state\[0\] must be on cpu like the input, got meta",
        ),
    ],
)
def test_a_wrong_call_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ConvLSTM(2, 3, 3, 1)(**{"input_tensor": SEQUENCE, **arguments})


def test_a_wrong_dtype_is_named_on_a_device_without_autocast():
    with pytest.raises(ValueError, match="input_tensor must be float32 like the parameters, got float64"):
        ConvLSTM(2, 3, 3, 1).to("meta")(SEQUENCE.double().to("meta"))


def test_the_error_of_batch_first_and_of_the_cell_name_their_shapes():
    with pytest.raises(ValueError, match=r"ConvLSTM: input_tensor must be \(B, T, 2, H, W\)"):
        ConvLSTM(2, 3, 3, 1, batch_first=True)(SEQUENCE[:, :, :1])
    cell = ConvLSTMCell(2, 3, 3)
    with pytest.raises(ValueError, match=r"ConvLSTMCell: input_tensor must be \(B, 2, H, W\), got float32"):
        cell(SEQUENCE, STATE)
    with pytest.raises(ValueError, match=r"ConvLSTMCell: h of cur_state must be \(4, 3, 5, 6\), got float32"):
        cell(SEQUENCE[:, 0], STATE)
