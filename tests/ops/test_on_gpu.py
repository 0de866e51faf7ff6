"""What every operator promises on a GPU: right results without a host sync, in graphs, on streams, in any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastris
from fastris import backend
from fastris.nn.loss import RISLoss, match
from fastris.nn.matcher import HungarianMatcher, MaskHungarianMatcher
from fastris.nn.model import RISOutput
from fastris.ops.conv2d_same import conv2d_same
from fastris.ops.dynamic_mask import dynamic_mask
from fastris.ops.group_norm_relu import group_norm_relu
from fastris.ops.image_masks import image_masks
from fastris.ops.look import look
from fastris.ops.place_logits import place_logits

pytestmark = pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALVES = (torch.bfloat16, torch.float16)
Inputs = dict[str, Tensor]
Results = tuple[Tensor, ...]


class Operator(NamedTuple):
    """A call, and inputs for it by name; those in ``constant`` have no gradient."""

    call: Callable[..., Any]
    make: Callable[[int], Inputs]  # of a batch, fp64 or integer, on the CPU
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALVES)
    constant: frozenset[str] = frozenset()


def uniform(*names: str, **shapes: tuple[int, ...]) -> Callable[[int], Inputs]:
    """Tensors (B, *shape), those named uniform in [0, 1) and the others normal."""

    def make(batch: int) -> Inputs:
        return {
            name: (torch.rand if name in names else torch.randn)(batch, *shape, dtype=torch.float64)
            for name, shape in shapes.items()
        }

    return make


def gates_inputs(batch: int) -> Inputs:
    return {
        **uniform(gates=(48, 9, 7), cell_prev=(12, 9, 7), addend=(48, 9, 7))(batch),
        "bias": torch.randn(48, dtype=torch.float64),
        "peephole": torch.randn(36, dtype=torch.float64),
    }


def layer_inputs(batch: int, channels: int, inputs: int, varying: bool = False) -> Inputs:
    lead = (3,) if varying else ()
    return {
        "x": torch.randn(*lead, batch, inputs, 9, 11, dtype=torch.float64),
        "weight": torch.randn(4 * channels, inputs + channels, 3, 3, dtype=torch.float64) / (3 * channels**0.5),
        "bias": torch.randn(4 * channels, dtype=torch.float64),
        "hidden": torch.randn(batch, channels, 9, 11, dtype=torch.float64),
    }


def convolution_inputs(batch: int) -> Inputs:
    return {
        "x": torch.randn(batch, 6, 9, 11, dtype=torch.float64),
        "weight": torch.randn(10, 6, 3, 3, dtype=torch.float64) / 7,
        "bias": torch.randn(10, dtype=torch.float64),
    }


def norm_inputs(batch: int) -> Inputs:
    return {
        "x": torch.randn(batch, 6, 9, 11, dtype=torch.float64),
        "weight": torch.randn(6, dtype=torch.float64),
        "bias": torch.randn(6, dtype=torch.float64),
    }


def place_inputs(batch: int) -> Inputs:
    return {
        "hidden": torch.randn(batch, 6, 9, 11, dtype=torch.float64),
        "base": torch.randn(batch, 10, 9, 11, dtype=torch.float64),
        "found": torch.rand(batch, 2, 9, 11, dtype=torch.float64),
        "weight": torch.randn(10, 8, dtype=torch.float64) / 3,
        "last": torch.randn(10, dtype=torch.float64) / 3,
        "last_bias": torch.randn(1, dtype=torch.float64),
    }


def look_inputs(batch: int) -> Inputs:
    names = {"logits": (), "hidden": (6,), "features": (10,)}
    return {name: torch.randn(batch, *more, 9, 11, dtype=torch.float64) for name, more in names.items()}


def looked(**inputs: Tensor) -> Results:
    found = look(**inputs)
    return found.log_place, found.seen, found.attended


def mask_inputs(batch: int) -> Inputs:
    return {"logits": torch.randn(batch, 3, 7, 9, dtype=torch.float64)}


def drawing_inputs(batch: int) -> Inputs:
    return {
        "detail": torch.randn(batch, 10, 9, 11, dtype=torch.float64),
        "filter": torch.randn(batch, 129, dtype=torch.float64) / 4,
        "centre": torch.rand(batch, 2, dtype=torch.float64) * 9,
        "middle": torch.randn(batch, 2, dtype=torch.float64),
    }


def labelled(batch: int, preds: int, targets: int) -> Inputs:
    """Predictions (B, P, H, W), blocks of labels (B, H, W), and how many of both count."""
    side = 24
    block = torch.arange(side) // 4
    labels = (block.view(-1, 1) * 6 + block + torch.randint(0, 36, (batch, 1, 1))) % 36 + 1
    return {
        "pred": torch.rand(batch, preds, side, side, dtype=torch.float64),
        "target": torch.where(labels <= targets, labels, 0),
        "num_pred": torch.randint(0, preds + 1, (batch,)),
        "num_target": torch.randint(0, targets + 1, (batch,)),
    }


def masked(batch: int) -> Inputs:
    inputs = labelled(batch, 7, 6)
    return {**inputs, "target": torch.rand(batch, 6, 24, 24, dtype=torch.float64)}


def loss_inputs(batch: int) -> Inputs:
    inputs = labelled(batch, 1, 6)
    return {
        "mask_logits": torch.randn(batch, 8, 24, 24, dtype=torch.float64),
        "score_logits": torch.randn(batch, 8, dtype=torch.float64),
        "log_place": torch.randn(batch, 8, 36, dtype=torch.float64).log_softmax(2).view(batch, 8, 6, 6),
        "target": inputs["target"],
        "counts": inputs["num_target"],
    }


def ris_loss(
    variant: str, mask_logits: Tensor, score_logits: Tensor, log_place: Tensor, target: Tensor, counts: Tensor
) -> Any:
    output = RISOutput(mask_logits, score_logits, log_place, 1, 4)
    return RISLoss(variant, place_weight=0.5)(output, target, counts, 6)


def detr_inputs(batch: int) -> Inputs:
    boxes = torch.rand(batch, 9, 4, dtype=torch.float64) / 2 + 0.25
    return {
        "logits": torch.randn(batch, 9, 5, dtype=torch.float64),
        "boxes": boxes,
        "labels": torch.randint(0, 5, (batch, 4)),
        "target_boxes": boxes[:, torch.randperm(9)[:4]] + 0.01,
    }


def detr(logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor) -> Any:
    targets = [{"labels": one, "boxes": box} for one, box in zip(labels, target_boxes, strict=True)]
    return HungarianMatcher(1, 5, 2, batched=True)({"pred_logits": logits, "pred_boxes": boxes}, targets)


def mask2former_inputs(batch: int) -> Inputs:
    """One query fits each target far better than all others, whatever the random points."""
    masks = torch.zeros(batch, 4, 24, 24, dtype=torch.float64)
    for k in range(4):
        masks[:, k, 6 * k : 6 * k + 6] = 1
    logits = torch.full((batch, 9, 24, 24), -8.0, dtype=torch.float64)
    logits[:, torch.randperm(9)[:4]] += 16 * masks
    return {
        "logits": torch.zeros(batch, 9, 5, dtype=torch.float64),
        "mask_logits": logits,
        "labels": torch.randint(0, 5, (batch, 4)),
        "masks": masks,
    }


def mask2former(logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor) -> Any:
    targets = [{"labels": one, "masks": mask} for one, mask in zip(labels, masks, strict=True)]
    matcher = MaskHungarianMatcher(2, 5, 5, num_points=2048, batched=True)
    return matcher({"pred_logits": logits, "pred_masks": mask_logits}, targets)


COSTS = frozenset({"cost"})
TARGET = frozenset({"target"})
OPERATORS = {
    "assignment": Operator(fastris.assignment, uniform("cost", cost=(22, 20)), constant=COSTS),
    "assignment of a block": Operator(
        fastris.assignment, uniform("cost", cost=(140, 150)), (torch.float32,), constant=COSTS
    ),
    "soft_iou of masks": Operator(fastris.soft_iou, masked),
    "soft_iou of labels": Operator(partial(fastris.soft_iou, num_labels=6), partial(labelled, preds=20, targets=6)),
    "lstm_gates": Operator(fastris.lstm_gates, gates_inputs),
    "convlstm": Operator(partial(fastris.convlstm, steps=4), partial(layer_inputs, channels=16, inputs=5)),
    "convlstm, recomputed": Operator(
        partial(fastris.convlstm, steps=3, memory="recompute"), partial(layer_inputs, channels=30, inputs=3)
    ),
    "convlstm, wide": Operator(partial(fastris.convlstm, steps=2), partial(layer_inputs, channels=72, inputs=3)),
    "convlstm of a sequence": Operator(fastris.convlstm, partial(layer_inputs, channels=12, inputs=5, varying=True)),
    "conv2d_same": Operator(conv2d_same, convolution_inputs),
    "group_norm_relu": Operator(partial(group_norm_relu, groups=3), norm_inputs, (torch.float32,)),
    "place_logits": Operator(place_logits, place_inputs, (torch.float32,), frozenset({"found"})),
    "dynamic_mask": Operator(partial(dynamic_mask, radius=16.0), drawing_inputs, (torch.float32,)),
    "look": Operator(looked, look_inputs, (torch.float32,)),
    "image_masks": Operator(partial(image_masks, stride=2, offset=1, size=(12, 17)), mask_inputs, (torch.float32,)),
    "match": Operator(partial(match, num_labels=6), partial(labelled, preds=8, targets=6), (torch.float32,)),
    "RISLoss, all": Operator(partial(ris_loss, "all"), loss_inputs, (torch.float32,)),
    "RISLoss, first_n": Operator(partial(ris_loss, "first_n"), loss_inputs, (torch.float32,)),
    "HungarianMatcher": Operator(detr, detr_inputs, (torch.float32,), frozenset({"logits", "boxes", "target_boxes"})),
    "MaskHungarianMatcher": Operator(
        mask2former, mask2former_inputs, (torch.float32,), frozenset({"logits", "mask_logits", "masks"})
    ),
}
EACH = pytest.mark.parametrize("name", OPERATORS)
EACH_DTYPE = pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, one in OPERATORS.items() for dtype in one.dtypes]
)


def placed(inputs: Inputs, operator: Operator, device: str, dtype: torch.dtype) -> Inputs:
    """Inputs as leaves on a device."""
    found = {}
    for name, value in inputs.items():
        one = value.to(device, dtype if value.is_floating_point() else value.dtype)
        found[name] = one.clone().requires_grad_(one.is_floating_point() and name not in operator.constant)
    return found


def run(operator: Operator, inputs: Inputs) -> Results:
    """The results and the gradients of the inputs, the gradient of each result being itself."""
    results = operator.call(**inputs)
    results = (results,) if isinstance(results, Tensor) else tuple(results)
    moving = [one for one in results if one.requires_grad]
    leaves = [one for one in inputs.values() if one.requires_grad]
    if not moving:
        return results
    gradients = torch.autograd.grad(moving, leaves, [one.detach() for one in moving], allow_unused=True)
    return (*results, *(one for one in gradients if one is not None))


def assert_same(found: Results, expected: Results) -> None:
    """But for the order of the sums: torch's bilinear backward adds with atomics."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, msg=lambda text, number=number: f"result {number}: {text}")


def channels_last(inputs: Inputs) -> Inputs:
    return {
        name: value.detach().contiguous(memory_format=torch.channels_last).requires_grad_(value.requires_grad)
        if value.dim() == 4
        else value
        for name, value in inputs.items()
    }


def farther(one: Tensor, other: Tensor, exact: Tensor) -> Tensor:
    return max(one, other, key=lambda found: float((found.detach().double() - exact.detach()).norm()))


@pytest.fixture
def no_tf32() -> Iterator[None]:
    """cuDNN takes TF32 in one layout and not in another."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    yield
    convolutions.fp32_precision = before


@pytest.mark.gpu
@EACH_DTYPE
def test_it_is_right_and_never_waits(
    name: str, dtype: torch.dtype, no_worse_than_eager: Any, no_tf32: None, no_sync: Any
) -> None:
    """Indices are those of fp64; other errors are at most twice eager's, in the layout in which that has more."""
    operator = OPERATORS[name]
    inputs = placed(operator.make(3), operator, "cuda", dtype)
    run(operator, inputs)  # compiles
    with no_sync():
        found = run(operator, inputs)
    with fastris.use_backend("reference"):
        eager = run(operator, inputs), run(operator, channels_last(inputs))
        rounded = {name: value.detach().cpu() for name, value in inputs.items()}
        exact = run(operator, placed(rounded, operator, "cpu", torch.float64))
    ours, theirs, others = ([one.cpu() for one in results] for results in (found, *eager))
    theirs = list(map(farther, theirs, others, exact))
    indices = [k for k, one in enumerate(exact) if not one.is_floating_point()]
    for k in indices:
        assert torch.equal(ours[k], exact[k])
    values = ([one for one in results if one.is_floating_point()] for results in (ours, theirs, exact))
    no_worse_than_eager(*values, recurrence="convlstm" in name)


@pytest.mark.gpu
@EACH
def test_a_graph_replays_it_with_other_inputs(name: str) -> None:
    operator = OPERATORS[name]
    dtype = torch.bfloat16 if torch.bfloat16 in operator.dtypes else torch.float32
    inputs = placed(operator.make(3), operator, "cuda", dtype)
    run(operator, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(operator, inputs)
    for _ in range(2):
        others = placed(operator.make(3), operator, "cuda", dtype)
        with torch.no_grad():
            for one, other in zip(inputs.values(), others.values(), strict=True):
                one.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(found, run(operator, others))


@pytest.mark.gpu
@EACH
def test_it_runs_on_the_current_stream(name: str) -> None:
    """Behind a kernel that sleeps: on any other stream it would read what was there before."""
    operator = OPERATORS[name]
    before, after = (placed(operator.make(3), operator, "cuda", torch.float32) for _ in range(2))
    expected = run(operator, after)
    run(operator, before)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for one, other in zip(before.values(), after.values(), strict=True):
                one.copy_(other)
        found = run(operator, before)
    stream.synchronize()
    assert_same(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@EACH
def test_it_runs_on_the_device_of_its_inputs(name: str) -> None:
    operator = OPERATORS[name]
    inputs = placed(operator.make(3), operator, "cuda:1", torch.float32)
    found = run(operator, inputs)
    assert all(one.device == torch.device("cuda:1") for one in found)
    with torch.cuda.device(1):
        assert_same(found, run(operator, inputs))


@pytest.mark.parametrize("device", DEVICES)
@EACH
def test_layouts_make_no_difference(name: str, device: str) -> None:
    operator = OPERATORS[name]
    inputs = placed(operator.make(3), operator, device, torch.float32)
    strided = {
        key: value.detach().mT.contiguous().mT.requires_grad_(value.requires_grad) if value.dim() > 1 else value
        for key, value in inputs.items()
    }
    assert any(not value.is_contiguous() for value in strided.values())
    assert_same(run(operator, strided), run(operator, inputs))


@pytest.mark.parametrize("device", DEVICES)
@EACH
def test_no_images_are_no_error(name: str, device: str) -> None:
    operator = OPERATORS[name]
    if "RISLoss" in name:
        pytest.skip("a mean over no images is NaN")
    inputs = placed(operator.make(0), operator, device, torch.float32)
    results = operator.call(**inputs)
    for one in (results,) if isinstance(results, Tensor) else results:
        assert one.numel() == 0
