"""The dense CRF against a mean field with every pair of pixels, its gradients, and instances refined jointly."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastris
from fastris import backend, reference
from fastris.cli import main
from fastris.crf import NUCLEI, DenseCRF
from fastris.imageio import read_image
from fastris.nn import ModelConfig, RecurrentInstanceSegmenter

SAMPLES = sorted(Path(str(resources.files("fastris"))).glob("samples/*_rgb.png"))
TINY = {"feature_channels": 8, "backbone_channels": (8, 8, 8, 8), "hidden_channels": 8}


def sample_crop(path: Path) -> Tensor:
    """uint8 (3, 40, 40)."""
    return torch.from_numpy(read_image(path)[40:80, 60:100].copy()).permute(2, 0, 1)


def smooth_logits(labels: int, side: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.interpolate(3 * torch.randn(1, labels, 5, 5, dtype=dtype), size=(side, side), mode="bilinear")


@pytest.mark.parametrize("sxy", [1.0, 3.0, 20.0])
def test_the_gaussian_kernel_is_exact(sxy: float) -> None:
    unary, image = smooth_logits(4, dtype=torch.float64), sample_crop(SAMPLES[0])
    settings = {"gaussian_sxy": sxy, "gaussian_compat": 5.0, "bilateral_compat": 0.0}
    found = DenseCRF(**settings)(unary, image.unsqueeze(0))[0]
    exact = reference.dense_crf(unary[0], image.double(), **settings)
    assert (exact - unary[0].softmax(0)).abs().mean() > 0.05
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
    single = DenseCRF(**settings)(unary.float(), image.unsqueeze(0))[0]
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_the_error_is_the_one_stated(path: Path) -> None:
    unary, image = smooth_logits(4), sample_crop(path)
    exact = reference.dense_crf(unary[0].double(), image.double())
    found = DenseCRF()(unary, image.unsqueeze(0))[0]
    without = DenseCRF(bilateral_compat=0)(unary, image.unsqueeze(0))[0]
    assert (found - exact).abs().mean() < 0.025
    assert (found.argmax(0) != exact.argmax(0)).float().mean() < 0.05
    assert (without - exact).abs().mean() > 0.05  # so that the bilateral kernel matters
    once = DenseCRF(iterations=1)(unary, image.unsqueeze(0))[0]
    assert (once - reference.dense_crf(unary[0].double(), image.double(), iterations=1)).abs().mean() < 0.01


@pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")
def test_native_marginals_and_gradients_are_those_of_the_reference() -> None:
    unary, image = smooth_logits(3, 30).requires_grad_(), torch.rand(1, 3, 30, 30)
    grad = torch.randn(1, 3, 30, 30)
    results = []
    for name in ("native", "reference"):
        with fastris.use_backend(name):
            marginals = DenseCRF(bilateral_srgb=60.0)(unary, image)
            results.append((marginals, *torch.autograd.grad(marginals, unary, grad)))
    assert results[0][1].abs().max() > 0.1
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_unary_are_right() -> None:
    image = torch.rand(1, 3, 3, 4)
    unary = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    crf = DenseCRF(bilateral_srgb=100.0, iterations=2)
    assert torch.autograd.gradcheck(lambda unary: crf(unary, image), unary)


def test_marginals_sum_to_one_and_do_not_depend_on_the_batch() -> None:
    unary, image = torch.randn(3, 4, 20, 31), torch.rand(3, 3, 20, 31)
    marginals = DenseCRF()(unary, image)
    torch.testing.assert_close(marginals.sum(1), torch.ones(3, 20, 31))
    for k in range(3):
        torch.testing.assert_close(DenseCRF()(unary[k : k + 1], image[k : k + 1])[0], marginals[k])


@pytest.mark.parametrize("settings", [{"iterations": 0}, {"gaussian_compat": 0, "bilateral_compat": 0}])
def test_without_iterations_or_kernels_only_the_unary_counts(settings: dict[str, float]) -> None:
    unary = torch.randn(1, 3, 6, 7)
    torch.testing.assert_close(DenseCRF(**settings)(unary, torch.rand(1, 3, 6, 7)), unary.softmax(1))


def test_images_may_be_bytes_or_fractions() -> None:
    unary, image = torch.randn(1, 3, 16, 16), torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(DenseCRF()(unary, image), DenseCRF()(unary, image / 255))


def test_images_may_be_gray() -> None:
    unary, image = smooth_logits(4), sample_crop(SAMPLES[0])[:1]
    exact = reference.dense_crf(unary[0].double(), image.double())
    assert (DenseCRF()(unary, image.unsqueeze(0))[0] - exact).abs().mean() < 0.025


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_unary(dtype: torch.dtype) -> None:
    unary, image = torch.randn(1, 3, 12, 12).to(dtype), torch.rand(1, 3, 12, 12)
    found = DenseCRF()(unary, image)
    assert found.dtype == dtype
    expected = DenseCRF()(unary.float(), image)
    torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=1e-3 if dtype == torch.float64 else 0)


def test_autocast_changes_nothing() -> None:
    unary, image = torch.randn(1, 3, 12, 12), torch.rand(1, 3, 12, 12)
    with torch.autocast("cpu"):
        found = DenseCRF()(unary, image)
    assert torch.equal(found, DenseCRF()(unary, image))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (1, 3, 0, 4), (2, 1, 1, 1)])
def test_no_images_no_pixels_and_one(shape: tuple[int, int, int, int]) -> None:
    batch, _, height, width = shape
    assert DenseCRF()(torch.zeros(shape), torch.zeros(batch, 3, height, width)).shape == shape


@pytest.mark.parametrize(
    ("unary", "image", "error", "message"),
    [
        (None, torch.zeros(1, 3, 4, 4), TypeError, "unary must be a tensor"),
        (torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4), ValueError, r"unary must be floating \(B,L,H,W\)"),
        (torch.zeros(1, 2, 4, 4).long(), torch.zeros(1, 3, 4, 4), ValueError, "unary must be floating"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 7, 4, 4), ValueError, "image must be .* with C from 1 to 6"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4).int(), ValueError, "image must be uint8 or floating"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 5), ValueError, "image must match unary"),
    ],
)
def test_arguments_are_checked(unary: object, image: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"DenseCRF: {message}"):
        DenseCRF()(unary, image)


@pytest.mark.parametrize(
    "setting",
    [
        {"gaussian_sxy": 0},
        {"bilateral_sxy": -1},
        {"bilateral_srgb": float("nan")},
        {"gaussian_compat": -1},
        {"bilateral_compat": float("inf")},
        {"iterations": -1},
    ],
)
def test_parameters_are_checked(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        DenseCRF(**setting)  # type: ignore[arg-type]


# Instances


def two_squares() -> tuple[Tensor, Tensor, Tensor]:
    """An image of two bright squares that touch, masks (2, 24, 40), and their logits, ragged and noisy."""
    masks = torch.zeros(2, 24, 40, dtype=torch.bool)
    masks[0, 6:18, 6:20] = True
    masks[1, 6:18, 20:34] = True
    image = torch.full((3, 24, 40), 0.1)
    image[0, masks[0]] = 0.9
    image[1, masks[1]] = 0.9
    return image, masks, torch.where(masks, 2.0, -2.0) + 2.5 * torch.randn(masks.shape)


def test_refinement_finds_the_edges_of_the_image() -> None:
    image, masks, logits = two_squares()
    refined = DenseCRF(gaussian_compat=3, bilateral_compat=10, bilateral_sxy=20)(
        torch.cat([torch.zeros(1, 24, 40), logits]).unsqueeze(0), image.unsqueeze(0)
    )
    found = DenseCRF(gaussian_compat=3, bilateral_compat=10, bilateral_sxy=20).refine(logits, image)
    assert torch.equal(found, refined[0].argmax(0) == torch.tensor([1, 2]).view(2, 1, 1))
    before, after = ((one != masks).float().mean() for one in (logits > 0, found))
    assert before > 0.1
    assert after < 0.01
    assert found.sum(0).max() == 1


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_the_threshold_is_that_of_a_mask(threshold: float) -> None:
    logits, image = 3 * torch.randn(1, 16, 16), torch.rand(3, 16, 16)
    unary_only = DenseCRF(iterations=0)
    assert torch.equal(unary_only.refine(logits, image, threshold), logits.sigmoid() > threshold)


def test_where_masks_overlap_the_surer_one_has_the_pixel() -> None:
    logits = torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 4, 4)
    found = DenseCRF(iterations=0).refine(logits, torch.zeros(3, 4, 4))
    assert not found[0].any()
    assert found[1].all()


def test_no_instances_are_refined_to_none() -> None:
    assert DenseCRF().refine(torch.zeros(0, 5, 6), torch.zeros(3, 5, 6)).shape == (0, 5, 6)


def test_what_is_refined_is_checked() -> None:
    with pytest.raises(ValueError, match=r"mask_logits must be floating \(N,H,W\)"):
        DenseCRF().refine(torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="threshold must be inside"):
        DenseCRF().refine(torch.zeros(2, 4, 4), torch.zeros(3, 4, 4), 1.0)


class GivenMasks(RecurrentInstanceSegmenter):
    """A model that finds what it is told to."""

    def __init__(self, logits: Tensor, scores: Tensor) -> None:
        super().__init__(ModelConfig(**TINY))
        self.given = logits, scores

    def _find(self, images: Tensor, limit: int, threshold: float, mask_threshold: float | None, *_: object) -> object:
        logits, scores = self.given
        return [(logits if mask_threshold is None else logits.sigmoid() > mask_threshold, scores)]


@pytest.mark.parametrize("min_area", [0, 4])
def test_a_prediction_is_refined_and_what_vanishes_is_dropped_with_its_score(min_area: int) -> None:
    image, masks, logits = two_squares()
    speck = torch.full((1, 24, 40), -4.0)
    speck[0, 2, 2:5] = speck[0, 3, 2:4] = 1.0
    model = GivenMasks(torch.cat([logits[:1], speck, logits[1:]]), torch.tensor([0.9, 0.8, 0.7]))
    assert len(model.predict(image)) == 3
    refined = model.predict(image, min_area=min_area, crf=DenseCRF(bilateral_sxy=20))
    assert isinstance(refined, fastris.Instances)
    np.testing.assert_allclose(refined.scores, [0.9, 0.7])
    assert (torch.from_numpy(refined.masks) != masks).float().mean() < 0.01


def test_the_model_hands_over_the_logits_of_its_masks() -> None:
    model = RecurrentInstanceSegmenter(ModelConfig(max_side=32, **TINY)).eval()
    model.confidence_head.linear.bias.data.fill_(5.0)
    for size in ((30, 21), (50, 60)):  # the larger one is looked at smaller
        pixels = torch.rand(1, 3, *size)
        looked_at = F.interpolate(pixels, size=(26, 32)) if size[0] > 32 else pixels
        hard, _ = model._find(looked_at, 3, 0.0, 0.4, size)[0]
        logits, scores = model._find(looked_at, 3, 0.0, None, size)[0]
        assert logits.shape == (3, *size)
        assert len(scores) == 3
        assert torch.equal(logits.sigmoid() > 0.4, hard)
    assert model._find(looked_at, 3, 1.1, None, size)[0][0].dtype == torch.float32


def test_the_fitted_parameters_are_parameters() -> None:
    assert set(NUCLEI) <= set(reference.dense_crf.__kwdefaults__)
    DenseCRF(**NUCLEI)


# The command line


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_crf_on_the_command_line(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def no_objects(self: object, image: Tensor, crf: DenseCRF | None = None, **_: object) -> fastris.Instances:
        given.append(crf)
        size = tuple(image.shape[:2] if isinstance(image, np.ndarray) else image.shape[-2:])
        return fastris.Instances(np.zeros((0, *size)), np.zeros(0), size)

    monkeypatch.setattr(RecurrentInstanceSegmenter, "predict", no_objects)
    data = [str(SAMPLES[0])] if command == "predict" else ["--data", str(SAMPLES[0].parent), "--split", "all"]
    assert main([command, *data, "--out", str(tmp_path)]) == 0
    assert set(given) == {None}
    given.clear()
    assert main([command, *data, "--crf", "--out", str(tmp_path)]) == 0
    assert given
    assert all(repr(crf) == repr(DenseCRF(**NUCLEI)) for crf in given)
    if command == "evaluate":
        assert json.loads((tmp_path / "evaluate.json").read_text())["settings"]["crf"] is True


def test_predict_with_a_crf_from_end_to_end(tmp_path: Path) -> None:
    assert main(["predict", str(SAMPLES[0]), "--crf", "--out", str(tmp_path)]) == 0
    (line,) = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["count"] > 3
