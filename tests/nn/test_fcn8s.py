"""FCN-8s: against torchvision's VGG16, against the layout of its authors, and with weights of the true shapes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from fastris import InputError
from fastris.nn import FCN8s, load_fcn8s, load_pretrained, load_vgg16


@pytest.fixture(scope="module")
def vgg16():
    """torchvision's VGG16, also where its compiled operators are of another torch: it needs none of them."""
    try:
        from torchvision.models import vgg16
    except RuntimeError:  # operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision.models import vgg16
    return vgg16


@pytest.fixture(scope="module")
def narrow_vgg16(vgg16):
    """VGG16 with 16 channels in its linear layers, and weights that keep the signal's size."""
    with torch.device("meta"):
        model = vgg16()
    model.classifier[0], model.classifier[3], model.classifier[6] = (
        nn.Linear(*shape, device="meta") for shape in ((512 * 49, 16), (16, 16), (16, 10))
    )
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    """A model whose weights stand for trained ones; tests only read it."""
    model = FCN8s(channels=5, fc_channels=16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


def true_weights(model):
    """Random values in the shapes of a model on the meta device, one a row, so that they take no memory."""
    return {
        name: torch.randn(tensor.shape[0], *[1] * (tensor.dim() - 1)).expand(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in ("mean", "std")
    }


def in_the_names_of_pytorch_fcn(model, classes):
    """A state_dict of an FCN-8s with these classes."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in ("mean", "std")}
    for name, size in (("upscore2", 4), ("upscore_pool4", 4), ("upscore8", 16)):
        weights[f"{name}.weight"] = torch.zeros(classes, classes, size, size)
    return weights


def test_pool5_and_fc7_are_those_of_torchvision(narrow_vgg16):
    model = FCN8s(channels=3, padding="same", fc_channels=16).eval()
    fresh = load_vgg16(model, narrow_vgg16.state_dict())
    assert fresh == [f"score_{name}.{kind}" for name in ("fr", "pool4", "pool3") for kind in ("weight", "bias")]
    images = torch.rand(1, 3, 224, 224)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    seen = (images - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.normalize(images), seen)
        pool5 = narrow_vgg16.features(seen)
        torch.testing.assert_close(model.pools(model.normalize(images))[4], pool5)
        fc7 = narrow_vgg16.classifier[:6](pool5.flatten(1))
        assert (fc7 > 0).any()
        torch.testing.assert_close(model.fully_connected(pool5)[:, :, 3, 3], fc7, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["vgg16", "fcn8s"])
def test_weights_of_the_true_shapes_arrive_where_they_belong(source, vgg16):
    with torch.device("meta"):
        model, other = FCN8s(), vgg16() if source == "vgg16" else FCN8s(channels=21)
    model.to_empty(device="cpu")
    weights = true_weights(other)
    fresh = (load_vgg16 if source == "vgg16" else load_fcn8s)(model, weights)
    assert {name.split(".")[0] for name in fresh} == {"score_fr", "score_pool4", "score_pool3"}
    first, fc6, last = {
        "vgg16": ("features.0", "classifier.0", "features.28"),
        "fcn8s": ("conv1_1", "fc6", "conv5_3"),
    }[source]
    for name, here, shape in (
        (first, model.conv1_1, (64, 3, 3, 3)),
        (last, model.conv5_3, (512, 512, 3, 3)),
        (fc6, model.fc6, (4096, 512, 7, 7)),
    ):
        assert here.weight.shape == shape
        assert torch.equal(here.weight[:, 1, 2, 2], weights[f"{name}.weight"].flatten(1)[:, 0])
        assert torch.equal(here.bias, weights[f"{name}.bias"])


@pytest.mark.parametrize(
    ("padding", "size", "expected"),
    [
        ("100", (500, 500), (64, 64)),
        ("100", (333, 500), (44, 64)),
        ("100", (1, 1), (4, 4)),
        ("same", (96, 64), (12, 8)),
    ],
)
def test_shapes(padding, size, expected):
    with torch.device("meta"):
        features, detail = FCN8s(padding=padding)(torch.empty(2, 3, *size))
    assert features.shape == (2, 100, *expected) and detail is features
    assert 8 * expected[0] >= size[0] + (3 if padding == "100" else 0)


def test_padding_100_is_the_layout_of_the_authors(model):
    """Theirs: unpadded transposed convolutions, crops of 5 and 9 cells, then ×8 and a crop of 31 pixels."""
    height, width = 100, 130
    sizes = [(-(-(height + 198) // stride), -(-(width + 198) // stride)) for stride in (8, 16, 32)]
    pools = [torch.randn(1, channels, *size) for channels, size in zip((256, 512, 512), sizes, strict=True)]
    model.pools = lambda images: [images, images, *pools]

    def grown(maps, factor):
        place = torch.arange(2 * factor) - (factor - 0.5)
        weights = 1 - place.abs() / factor
        kernel = torch.zeros(5, 5, 2 * factor, 2 * factor)
        kernel[range(5), range(5)] = weights.outer(weights)
        return F.conv_transpose2d(maps, kernel, stride=factor)

    def crop(maps, start, like):
        return maps[..., start : start + like.shape[2], start : start + like.shape[3]]

    with torch.no_grad():
        score = grown(model.score_fr(F.relu(model.fc7(F.relu(model.fc6(pools[2]))))), 2)
        score = grown(score + crop(model.score_pool4(pools[1]), 5, score), 2)
        score = score + crop(model.score_pool3(pools[0]), 9, score)
        images = torch.empty(1, 3, height, width)
        expected = crop(grown(score, 8), 31, images)
        features, _ = model(images)
        got = crop(grown(features, 8), 4 + model.offset, images)
    inside = (..., slice(16, -16), slice(16, -16))  # at the rim theirs sees cells that are cropped here
    assert expected[inside].std() > 0.1
    torch.testing.assert_close(got[inside], expected[inside], rtol=1e-4, atol=1e-4)


def test_padding_same_adds_skips_to_bilinear_doublings():
    model = FCN8s(channels=5, padding="same", fc_channels=16).eval()
    pools = [torch.randn(1, c, s, s) for c, s in ((256, 24), (512, 12), (512, 6))]
    model.pools = lambda images: [images, images, *pools]

    def grown(maps):
        return F.interpolate(maps, scale_factor=2, mode="bilinear")

    with torch.no_grad():
        fc7 = model.fully_connected(pools[2])
        expected = grown(grown(model.score_fr(fc7)) + model.score_pool4(pools[1])) + model.score_pool3(pools[0])
        got, _ = model(torch.empty(1, 3, 192, 192))
    torch.testing.assert_close(got[..., 4:-4, 4:-4], expected[..., 4:-4, 4:-4], rtol=1e-4, atol=1e-5)


def test_dropout_follows_both_fully_connected_layers_while_training(model):
    pool5 = torch.rand(1, 512, 7, 7)
    kept = model.fully_connected(pool5)
    assert torch.equal(kept, model.fully_connected(pool5))
    model.train()
    model.dropout = 0.9
    for layer in (model.fc6, model.fc7):  # every unit on
        nn.init.constant_(layer.weight, 0.01)
        nn.init.constant_(layer.bias, 1.0)
    values = torch.stack([model.fully_connected(pool5).flatten() for _ in range(40)])
    assert 0.8 < (values == 0).float().mean() < 0.97
    assert values[values > 0].unique().numel() > 2  # what fc6 drops changes what fc7 sees


def test_frozen_stages_get_no_gradient(model):
    with torch.device("meta"):
        frozen = FCN8s(frozen=("conv1", "conv2", "fc6"), fc_channels=16)
    stages = {name.split("_")[0].split(".")[0] for name, p in frozen.named_parameters() if not p.requires_grad}
    assert stages == {"conv1", "conv2", "fc6"}
    model.freeze(("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7"))
    model(torch.rand(1, 3, 8, 8))[0].sum().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {f"score_{name}.{kind}" for name in ("fr", "pool4", "pool3") for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"padding": "50"}, "padding must be '100' or 'same', got '50'"), ({"frozen": ("conv6",)}, "got 'conv6'")],
)
def test_a_bad_argument_is_named(options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        FCN8s(**options)


def test_same_padding_needs_multiples_of_32():
    with torch.device("meta"), pytest.raises(ValueError, match=r"multiples of 32, got \(1, 3, 32, 33\)"):
        FCN8s(padding="same")(torch.empty(1, 3, 32, 33))


def test_an_fcn8s_checkpoint_takes_bgr_and_its_model_here_rgb(trained, model):
    weights, here = in_the_names_of_pytorch_fcn(trained, 5), model
    for parameter in here.parameters():
        nn.init.zeros_(parameter)
    assert load_fcn8s(here, weights) == []
    images = torch.rand(1, 3, 8, 8)
    mean_bgr = torch.tensor([104.00698793, 116.66876762, 122.67891434]).view(3, 1, 1)
    theirs = F.conv2d(images.flip(1) * 255 - mean_bgr, weights["conv1_1.weight"], weights["conv1_1.bias"], padding=100)
    torch.testing.assert_close(here.conv1_1(here.normalize(images)), theirs, rtol=1e-4, atol=1e-3)
    assert torch.equal(here.score_pool3.weight, weights["score_pool3.weight"])


def test_files_of_every_kind_load_the_same(trained, model, narrow_vgg16, tmp_path):
    weights, here = in_the_names_of_pytorch_fcn(trained, 5), model
    torch.save(weights, tmp_path / "plain.pth")
    torch.save({"epoch": 1, "model_state_dict": weights}, tmp_path / "checkpoint.pth")
    save_file(weights, tmp_path / "plain.safetensors")
    torch.save(narrow_vgg16.state_dict(), tmp_path / "vgg16.pth")
    for name in ("plain.pth", "checkpoint.pth", "plain.safetensors"):
        nn.init.zeros_(here.fc7.weight)
        load_pretrained(here, tmp_path / name)
        assert torch.equal(here.fc7.weight, trained.fc7.weight), name
    load_pretrained(here, tmp_path / "vgg16.pth")
    assert torch.equal(here.fc7.weight.flatten(1), narrow_vgg16.classifier[3].weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("conv3_2.bias"), "weights.pth: lacks conv3_2.bias"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "weights.pth: has unexpected extra"),
        (
            lambda weights: weights.update({"fc6.weight": torch.zeros(16, 512, 6, 7)}),
            "weights.pth: fc6.weight must be 16 x 512 x 7 x 7, got 16 x 512 x 6 x 7",
        ),
        (
            lambda weights: weights.update({"conv1_1.weight": torch.zeros(64)}),
            "weights.pth: conv1_1.weight must be 64 x 3 x 3 x 3, got 64",
        ),
        (lambda weights: weights.update(epoch=3), "weights.pth: not a state_dict"),
        (
            lambda weights: weights.update(loss=nn.Linear(1, 1)),
            "weights.pth: cannot read these weights: .*Weights only",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(trained, model, tmp_path, change, message):
    weights = {name: torch.zeros_like(tensor) for name, tensor in in_the_names_of_pytorch_fcn(trained, 5).items()}
    change(weights)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=message):
        load_pretrained(model, tmp_path / "weights.pth")
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_missing_or_damaged_file_is_named(trained, tmp_path):
    with pytest.raises(InputError, match="absent.pth: no such file"):
        load_vgg16(trained, tmp_path / "absent.pth")
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(InputError, match=f"{name}: cannot read these weights"):
            load_fcn8s(trained, tmp_path / name)
