"""soft_iou: the native operator against its reference twin in fp64, forward and backward, both forms of target."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastris
from fastris import backend, reference, soft_iou

NEEDS_EXTENSION = pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")
BACKENDS = ["reference", pytest.param("native", marks=NEEDS_EXTENSION)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALVES = [torch.bfloat16, torch.float16]
SHAPES = [  # B, P, G, H, W
    (2, 3, 4, 5, 7),
    (1, 1, 1, 1, 1),
    (3, 30, 18, 33, 47),
    (1, 25, 5, 200, 171),  # two panels of predictions, two chunks of pixels
    (2, 7, 33, 1, 300),
]


@pytest.fixture(params=BACKENDS)
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastris.use_backend(request.param):
        yield request.param


def blobs(batch: int, labels: int, height: int, width: int) -> Tensor:
    """A label map of long runs of background, known labels and a few that are negative or too large."""
    coarse = torch.randint(-2, labels + 3, (batch, -(-height // 3), -(-width // 9)))
    coarse[torch.rand(coarse.shape) < 0.4] = 0
    return coarse.repeat_interleave(3, 1).repeat_interleave(9, 2)[:, :height, :width].contiguous()


def masks_of(labels: Tensor, num_labels: int) -> Tensor:
    return labels.unsqueeze(1) == torch.arange(1, num_labels + 1).view(1, -1, 1, 1)


def with_gradients(iou: Tensor, grad: Tensor, pred: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    inputs = [tensor for tensor in (pred, target) if tensor.requires_grad]
    return (iou, *torch.autograd.grad(iou, inputs, grad.to(iou.dtype)))


def wide(tensor: Tensor) -> Tensor:
    """A leaf of its own, fp64 where it is floating."""
    copy = tensor.detach().clone()
    return copy.double().requires_grad_(tensor.requires_grad) if copy.is_floating_point() else copy


def check_against_fp64(
    pred: Tensor, target: Tensor, counts: tuple[Tensor | None, Tensor | None] = (None, None), num_labels: int = 0
) -> None:
    """IoU and gradients have at most twice eager PyTorch's own error in the same dtype, plus a floor.

    The floor is what rounding the result once costs, one unit in the last place of the largest value (twice the bound,
    because eager may by chance be exact), and 4 units for gradients: they are rounded four times on the way.
    """
    grad = torch.randn(*pred.shape[:2], num_labels if target.dim() == 3 else target.shape[1])
    exact_inputs = wide(pred), wide(target)
    exact = with_gradients(reference.soft_iou(*exact_inputs, *counts, num_labels=num_labels), grad, *exact_inputs)
    eager = with_gradients(reference.soft_iou(pred, target, *counts, num_labels=num_labels), grad, pred, target)
    found = with_gradients(soft_iou(pred, target, *counts, num_labels=num_labels), grad, pred, target)
    for units, ours, theirs, truth in zip((1, 4, 4), found, eager, exact, strict=False):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if truth.numel() == 0:
            continue
        floor = units * torch.finfo(ours.dtype).eps * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor


@NEEDS_EXTENSION
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("with_counts", [False, True])
def test_label_maps_match_the_reference(shape: tuple[int, ...], dtype: torch.dtype, with_counts: bool) -> None:
    batch, preds, targets, height, width = shape
    pred = torch.rand(batch, preds, height, width).to(dtype).requires_grad_()
    counts = (torch.randint(-1, preds + 2, (batch,)), torch.randint(-1, targets + 2, (batch,)))
    for labels in (blobs(batch, targets, height, width), torch.randint(-3, targets + 3, (batch, height, width))):
        for integers in (torch.int64, torch.int32):
            check_against_fp64(pred, labels.to(integers), counts if with_counts else (None, None), targets)


@NEEDS_EXTENSION
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("with_counts", [False, True])
def test_masks_match_the_reference(shape: tuple[int, ...], dtype: torch.dtype, with_counts: bool) -> None:
    batch, preds, targets, height, width = shape
    pred = torch.rand(batch, preds, height, width).to(dtype).requires_grad_()
    soft = torch.rand(batch, targets, height, width).to(dtype).requires_grad_()
    counts = (torch.randint(-1, preds + 2, (batch,)), torch.randint(-1, targets + 2, (batch,)))
    for target in (soft, soft.detach() > 0.7, (soft.detach() > 0.7).to(torch.uint8)):
        check_against_fp64(pred, target, counts if with_counts else (None, None))


@NEEDS_EXTENSION
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pred_and_masks_of_different_dtypes(dtype: torch.dtype) -> None:
    pred = torch.rand(2, 5, 9, 11, dtype=torch.float32, requires_grad=True)
    check_against_fp64(pred, torch.rand(2, 4, 9, 11).to(dtype).requires_grad_())
    check_against_fp64(pred.detach().to(dtype).requires_grad_(), torch.rand(2, 4, 9, 11, requires_grad=True))
    check_against_fp64(pred, torch.randint(0, 2, (2, 4, 9, 11)))


@NEEDS_EXTENSION
@pytest.mark.parametrize("shape", SHAPES)
def test_in_fp64_only_rounding_differs(shape: tuple[int, ...]) -> None:
    batch, preds, targets, height, width = shape
    pred = torch.rand(batch, preds, height, width, dtype=torch.float64, requires_grad=True)
    soft = torch.rand(batch, targets, height, width, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(batch, preds, targets)
    for target in (soft, blobs(batch, targets, height, width)):
        found, expected = (
            with_gradients(function(pred, target, num_labels=targets), grad, pred, target)
            for function in (soft_iou, reference.soft_iou)
        )
        for ours, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=200)
@given(
    st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 40)),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_the_backends_agree_on_any_shape(shape: tuple[int, ...], use_labels: bool, seed: int) -> None:
    batch, preds, targets, height, width = shape
    torch.manual_seed(seed)
    pred = torch.rand(batch, preds, height, width, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-2, targets + 3, (batch, height, width))
    target = labels if use_labels else masks_of(labels, targets)
    counts = (torch.randint(-1, preds + 2, (batch,)), torch.randint(-1, targets + 2, (batch,)))
    found = soft_iou(pred, target, *counts, num_labels=targets)
    expected = reference.soft_iou(pred, target, *counts, num_labels=targets)
    assert found.shape == (batch, preds, targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    grad = torch.rand_like(found)
    torch.testing.assert_close(
        *(torch.autograd.grad(iou, pred, grad)[0] for iou in (found, expected)), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("integers", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_outside_their_range_are_background(integers: torch.dtype, each_backend: str) -> None:
    pred = torch.rand(1, 2, 1, 6)
    labels = torch.tensor([[[1, 5, 0, 2, 127, 1]]])
    low = -128 if integers.is_signed else 0
    strange = torch.tensor([[[1, low, low, 2, 127, 1]]]).to(integers)
    clean = torch.where(labels <= 2, labels, 0)
    assert torch.equal(soft_iou(pred, strange, num_labels=2), soft_iou(pred, clean, num_labels=2))
    for huge in (2**40 + 1, -(2**40) + 1, 2**63 - 1, -(2**63)):
        labels = torch.where(clean == 0, huge, clean)
        assert torch.equal(soft_iou(pred, labels, num_labels=2), soft_iou(pred, clean, num_labels=2))


def test_the_number_of_labels_is_the_largest_where_not_given(each_backend: str) -> None:
    pred = torch.rand(2, 3, 4, 5)
    labels = torch.randint(0, 4, (2, 4, 5))
    labels[0, 0, 0] = 6
    assert torch.equal(soft_iou(pred, labels), soft_iou(pred, labels, num_labels=6))
    assert soft_iou(pred, -labels - 1).shape == (2, 3, 0)
    assert soft_iou(pred[:0], labels[:0]).shape == (0, 3, 0)


@NEEDS_EXTENSION
def test_any_strides() -> None:
    pred, soft = torch.rand(4, 6, 10, 12), torch.rand(4, 5, 10, 12)
    labels = torch.randint(0, 6, (4, 10, 12))
    views = [
        lambda t: t[::2],
        lambda t: t[..., ::2, 1:-1],
        lambda t: t.mT,
        lambda t: t.flip(-1),
        lambda t: t[..., :1, :1].expand(t.shape),
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
        lambda t: t[:, 1:4] if t.dim() == 4 else t,
    ]
    for view in views:
        for target in (soft, labels):
            leaf = view(pred).detach().requires_grad_()
            dense = view(pred).clone(memory_format=torch.contiguous_format).requires_grad_()
            dense_target = view(target).clone(memory_format=torch.contiguous_format)
            found = soft_iou(leaf, view(target), num_labels=5)
            expected = soft_iou(dense, dense_target, num_labels=5)
            assert torch.equal(found, expected)
            grad = torch.randn_like(found)
            gradients = [torch.autograd.grad(iou, q, grad)[0] for iou, q in ((found, leaf), (expected, dense))]
            assert torch.equal(*gradients)


@NEEDS_EXTENSION
def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    pred = torch.rand(1, 30, 220, 200, requires_grad=True)
    labels = blobs(1, 9, 220, 200)
    threads = torch.get_num_threads()
    for target in (labels, torch.rand(1, 9, 220, 200)):
        results = []
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                iou = soft_iou(pred, target, num_labels=9)
                results.append((iou.detach(), torch.autograd.grad(iou.sum(), pred)[0]))
        finally:
            torch.set_num_threads(threads)
        for iou, grad in results[1:]:
            assert torch.equal(iou, results[0][0]) and torch.equal(grad, results[0][1])


@NEEDS_EXTENSION
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_matches_the_reference(capability: str) -> None:
    code = """
        import torch
        from fastris import reference, soft_iou
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
            for preds in (1, 2, 3, 4, 5, 7, 25):
                pred = torch.rand(2, preds, 19, 23, dtype=dtype, requires_grad=True)
                for target in (torch.randint(-1, 9, (2, 19, 23)), torch.rand(2, 7, 19, 23)):
                    pairs = [f(pred, target, num_labels=7) for f in (soft_iou, reference.soft_iou)]
                    pairs += [torch.autograd.grad(iou.square().sum(), pred)[0] for iou in pairs]
                    torch.testing.assert_close(pairs[0], pairs[1], rtol=tolerance, atol=tolerance)
                    torch.testing.assert_close(pairs[2], pairs[3], rtol=10 * tolerance, atol=tolerance)
    """
    run_python(code, ATEN_CPU_CAPABILITY=capability)


@NEEDS_EXTENSION
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps freed memory")
@pytest.mark.parametrize("target", ["torch.randint(0, 65, (1, 512, 512))", "torch.rand(1, 64, 512, 512) > 0.5"])
def test_memory_is_that_of_the_result_and_the_gradient(target: str) -> None:
    """32 MiB for the gradient; the masks alone would take 64 MiB in fp32, the products of the pairs 2 GiB."""
    code = f"""
        import resource, torch
        from fastris import soft_iou
        torch.set_num_threads(2)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
        small = torch.rand(1, 32, 8, 8, requires_grad=True)
        soft_iou(small, torch.ones(1, 8, 8, dtype=torch.int64), num_labels=64).sum().backward()
        pred, target = torch.rand(1, 32, 512, 512, requires_grad=True), {target}
        before = peak()
        iou = soft_iou(pred, target, num_labels=64)
        forward = peak()
        iou.sum().backward()
        print(forward - before, peak() - forward)
    """
    forward, gradient = map(float, run_python(code).split())
    assert forward < 8
    assert gradient < 32 + 8


@NEEDS_EXTENSION
def test_masks_of_pairs_without_gradient_are_not_read() -> None:
    target = torch.rand(1, 3, 6, 6)
    target[:, 1] = float("nan")
    pred = torch.rand(1, 2, 6, 6, requires_grad=True)
    soft_iou(pred, target)[0, 1, 2].backward()
    assert pred.grad is not None and pred.grad.isfinite().all()
    assert pred.grad[0, 0].eq(0).all() and pred.grad[0, 1].ne(0).any()


def test_nothing_past_the_counts_counts(each_backend: str) -> None:
    pred, target = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    pred[0, 2] = target[1, 1:] = float("nan")
    pred.requires_grad_()
    iou = soft_iou(pred, target, torch.tensor([2, 3]), torch.tensor([3, 1]))
    assert iou[0, 2].eq(0).all() and iou[1, :, 1:].eq(0).all() and iou[0, :2].gt(0).all() and iou[1, :, 0].gt(0).all()
    if each_backend == "native":
        iou.sum().backward()
        assert pred.grad is not None and pred.grad.isfinite().all() and pred.grad[0, 2].eq(0).all()


@pytest.mark.parametrize("target", ["masks", "labels"])
def test_gradients_in_fp64(target: str, each_backend: str) -> None:
    pred = torch.rand(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([3, 2]), torch.tensor([1, 2])
    if target == "labels":
        labels = torch.randint(-1, 4, (2, 3, 4))
        assert torch.autograd.gradcheck(lambda q: soft_iou(q, labels, *counts, num_labels=2), (pred,))
    else:
        masks = torch.rand(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda q, y: soft_iou(q, y, *counts), (pred, masks))
        assert torch.autograd.gradcheck(lambda y: soft_iou(pred.detach(), y), (masks,))


def test_second_derivatives_are_refused_or_right() -> None:
    pred = torch.rand(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (1, 3, 3))

    def both() -> Tensor:
        (grad,) = torch.autograd.grad(soft_iou(pred, labels, num_labels=2).sum(), pred, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), pred)[0]

    with fastris.use_backend("reference"):
        assert both().isfinite().all()
    if backend.native_error() is None:
        with pytest.raises(RuntimeError, match="soft_iou: the native operator has no second derivatives"):
            both()


def test_the_reference_backend_runs_no_native_kernel() -> None:
    pred, labels = torch.rand(1, 2, 3, 3, requires_grad=True), torch.randint(0, 3, (1, 3, 3))
    with fastris.use_backend("reference"), torch.profiler.profile(acc_events=True) as profile:
        soft_iou(pred, labels, num_labels=2).sum().backward()
    assert not any("fastris" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(device: str, dtype: torch.dtype) -> None:
    pred = torch.rand(2, 3, 5, 4, dtype=dtype, device=device, requires_grad=True)
    masks = torch.rand(2, 4, 5, 4, dtype=dtype, device=device, requires_grad=True)
    labels = torch.randint(0, 5, (2, 5, 4), device=device)
    counts = torch.tensor([3, 1], device=device)
    for arguments in (
        (pred, masks, None, None, 0),
        (pred, masks.detach() > 0.5, counts, counts, 0),
        (pred, labels, counts, None, 4),
        (pred.detach()[:0], labels[:0], None, None, 4),
    ):
        torch.library.opcheck(torch.ops.fastris.soft_iou.default, arguments)
    weight, offset = torch.rand(2, 3, 4, dtype=dtype, device=device), torch.rand(2, 3, dtype=dtype, device=device)
    for target in (masks.detach(), labels):
        arguments = weight, offset, target, torch.bfloat16
        torch.library.opcheck(torch.ops.fastris.soft_iou_backward.default, arguments)


def test_compiles_to_one_graph_on_each_backend(each_backend: str) -> None:
    def loss(pred: Tensor, target: Tensor, counts: Tensor, num_labels: int) -> Tensor:
        return soft_iou(pred.sigmoid(), target, counts, num_labels=num_labels).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for batch, num_labels in ((2, 3), (4, 5)):
        pred = torch.randn(batch, 4, 6, 7, requires_grad=True)
        labels = torch.randint(0, num_labels + 1, (batch, 6, 7))
        counts = torch.randint(0, 5, (batch,))
        for target in (labels, masks_of(labels, num_labels)):
            found, expected = (f(pred, target, counts, num_labels) for f in (compiled, loss))
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(*(torch.autograd.grad(value, pred)[0] for value in (found, expected)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.0], torch.zeros(1, 1, 2, 2)), TypeError, "pred must be a tensor, got list"),
        ((torch.zeros(1, 1, 2, 2), None), TypeError, "target must be a tensor, got NoneType"),
        ((torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2).bool()), ValueError, "target labels must be integer"),
        (
            (torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.zeros(2).long()),
            ValueError,
            r"num_pred must be integer \(1,\), got int64 \(2\)",
        ),
        (
            (torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), None, torch.zeros(1)),
            ValueError,
            "num_target must be integer",
        ),
        ((torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), 1), TypeError, "num_pred must be a tensor, got int"),
        (
            (torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2).long(), None, None, -1),
            ValueError,
            "num_labels must not be negative, got -1",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="soft_iou: " + message):
        soft_iou(*arguments)


@NEEDS_EXTENSION
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 2, 2), torch.zeros(2, 2, 2, 2), None, None, 0), "pred must be masks"),
        ((torch.zeros(1, 2, 2, 2).int(), torch.zeros(1, 2, 2, 2), None, None, 0), "pred must be floating"),
        ((torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2), None, None, 0), "int32 or int64"),
        ((torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 3), None, None, 0), "target must match pred"),
        ((torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2).int(), None, None, -1), "num_labels must not be negative"),
        ((torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), torch.zeros(2).long(), None, 0), "must be int64"),
    ],
)
def test_the_kernel_itself_refuses_what_would_be_unsafe(arguments: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastris.soft_iou(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_cuda_matches_the_cpu_without_a_host_sync(
    shape: tuple[int, ...], dtype: torch.dtype, no_sync: Callable[[], AbstractContextManager[None]]
) -> None:
    batch, preds, targets, height, width = shape
    pred = torch.rand(batch, preds, height, width).to(dtype)
    labels = blobs(batch, targets, height, width)
    counts = torch.randint(0, preds + 1, (batch,)), torch.randint(0, targets + 1, (batch,))
    for target in (labels, torch.rand(batch, targets, height, width).to(dtype), masks_of(labels, targets)):
        on_cpu = pred.clone().requires_grad_()
        expected = soft_iou(on_cpu, target, *counts, num_labels=targets)
        grad = torch.randn_like(expected)
        on_gpu = pred.cuda().requires_grad_()
        arguments = target.cuda(), *(count.cuda() for count in counts), targets
        grad_on_gpu = grad.cuda()
        results = []
        for _ in range(2):
            with no_sync():
                found = soft_iou(on_gpu, *arguments)
                (gradient,) = torch.autograd.grad(found, on_gpu, grad_on_gpu)
            results.append((found.detach(), gradient))
        assert all(map(torch.equal, *results))  # the same bits every time
        torch.testing.assert_close(results[0][0].cpu(), expected.detach(), check_device=False)
        (expected_gradient,) = torch.autograd.grad(expected, on_cpu, grad)
        scale = float(expected_gradient.abs().max())
        torch.testing.assert_close(
            results[0][1].cpu(), expected_gradient, rtol=1e-2, atol=scale * 4 * torch.finfo(dtype).eps
        )


@pytest.mark.gpu
def test_cuda_graph_capture() -> None:
    pred, labels = torch.rand(2, 3, 40, 40, device="cuda"), torch.randint(0, 5, (2, 40, 40), device="cuda")
    soft_iou(pred, labels, num_labels=4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = soft_iou(pred, labels, num_labels=4)
    pred.copy_(torch.rand_like(pred))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(found.cpu(), soft_iou(pred.cpu(), labels.cpu(), num_labels=4))


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
