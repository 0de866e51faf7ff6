"""The feature networks but FCN-8s (see test_fcn8s.py), and how the segmenter builds and aligns all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastris import InputError, ModelConfig, RecurrentInstanceSegmenter
from fastris.nn import FCN8s, PlantsFCN, SmallFCN

PLANTS = {
    "backbone": "plants", "feature_channels": 30, "hidden_channels": 30, "mask_head": "inhibition",
    "confidence_pool": 0, "confidence_map": (106, 100), "feedback": False,
}  # fmt: skip
PERSON = {
    "backbone": "fcn8s", "feature_channels": 100, "hidden_channels": 100, "mask_head": "inhibition", "feedback": False,
}  # fmt: skip


def on_meta(**changes):
    with torch.device("meta"):
        return RecurrentInstanceSegmenter(ModelConfig(**changes))


def small(**changes):
    """A model that a test can run: few cells or few channels, all of its parts."""
    tiny = {
        "small": {"feature_channels": 8, "backbone_channels": (8, 8, 8, 8)},
        "plants": {"feature_channels": 4},
        "fcn8s": {"feature_channels": 4, "fc_channels": 8},
    }[changes["backbone"]]
    return RecurrentInstanceSegmenter(ModelConfig(**{"hidden_channels": 4, "layers": 1, **tiny, **changes})).eval()


def test_the_plants_network_shrinks_bilinearly_by_5():
    network = PlantsFCN()
    images = torch.rand(2, 3, 60, 50)
    shrunk = F.conv2d(images, network.shrink, stride=5, padding=2, groups=3)
    expected = F.interpolate(images, size=(12, 10), mode="bilinear", antialias=True)
    torch.testing.assert_close(shrunk[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])
    assert not any(name.startswith("shrink") for name in [*network.state_dict(), *dict(network.named_parameters())])
    assert [parameter.shape for parameter in network.parameters()][::2] == [(30, 3, 3, 3)] + 3 * [(30, 30, 3, 3)]
    features, _ = network(images)
    torch.testing.assert_close(features, network.layers(shrunk))


def test_plants_maps_are_106_by_100_and_the_parameters_those_of_the_released_code():
    model = on_meta(**PLANTS)
    assert model.input_size == (530, 500)
    assert sum(parameter.numel() for parameter in model.confidence_head.parameters()) == 318_001
    output = model(torch.empty(1, 3, 530, 500, device="meta"), 2)
    assert output.mask_logits.shape == output.log_place.shape == (1, 2, 106, 100)
    assert (output.stride, output.place_stride, output.offset) == (5, 5, 0)


def test_person_maps_are_64_by_64_inside_and_show_the_image():
    model = on_meta(**PERSON)
    images = torch.empty(1, 3, 500, 500, device="meta")
    assert model._encode(images).features.shape == (1, 100, 64, 64)
    output = model(images, 2)
    assert output.mask_logits.shape == (1, 2, 63, 63)  # the last row and column show nothing of it
    assert (output.stride, output.place_stride, output.offset) == (8, 8, 3)


@pytest.mark.parametrize(
    ("backbone", "network", "place_stride"), [("small", SmallFCN, 4), ("plants", PlantsFCN, 5), ("fcn8s", FCN8s, 8)]
)
@pytest.mark.parametrize("mask_head", ["dynamic", "inhibition"])
def test_every_backbone_predicts_at_the_size_of_the_image(backbone, network, place_stride, mask_head):
    model = small(backbone=backbone, mask_head=mask_head, padding="same")
    assert isinstance(model.backbone, network)
    found = model.predict(torch.rand(3, 37, 50), max_steps=2, threshold=0.0, mask_threshold=0.0)
    assert found.masks.shape == (2, 37, 50)
    output = model(torch.rand(2, 3, 37, 50), 2)
    assert output.mask_logits.shape[2:] == (-(-37 // output.stride), -(-50 // output.stride))
    assert output.place_stride == place_stride


def test_a_mask_lies_where_its_cells_look():
    """With padding 100 the maps begin 3 pixels outside the image: cell (2, 3) is of rows 13 … 20, columns 21 … 28."""
    model = small(backbone="fcn8s", mask_head="inhibition", feedback=False)
    place = torch.full((1, 8, 8), -30.0)  # more cells than the image of 32 x 40 pixels shows
    place[0, 2, 3] = 30.0
    model.mask_head.forward = lambda hidden: (place, place)
    found = model.predict(torch.rand(3, 32, 40), max_steps=1, threshold=0.0)
    rows, columns = found.masks[0].any(1).nonzero()[0], found.masks[0].any(0).nonzero()[0]
    assert (rows.tolist(), columns.tolist()) == (list(range(13, 21)), list(range(21, 29)))
    output = model(torch.rand(1, 3, 32, 40), 1)
    assert output.mask_logits.shape[2:] == (5, 6)
    trace = model.trace(torch.rand(3, 32, 40), max_steps=1, threshold=0.0)
    assert trace.cell == (1, 1) and (trace.masks[0] == found.masks[0]).all()
    rows, columns = (trace.log_place[0] == 30).nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (13, 20, 21, 28)
    assert trace.log_place.shape == (1, 32, 40)


@pytest.mark.parametrize(("size", "seen"), [((30, 60), (25, 50)), ((120, 60), (60, 30)), ((60, 50), (60, 50))])
def test_an_unpooled_head_has_one_size_to_which_images_are_scaled(size, seen):
    model = small(**{**PLANTS, "backbone": "plants", "feature_channels": 4, "confidence_map": (12, 10)})
    assert model._fit(torch.rand(1, 3, *size), "").shape[2:] == seen
    found = model.predict(torch.rand(3, *size), max_steps=1, threshold=0.0, mask_threshold=0.0)
    assert found.masks.shape == (1, *size)
    with pytest.raises(ValueError, match="images: this model takes at most 60×50 pixels, got 61×50"):
        model(torch.rand(1, 3, 61, 50), 1)


def test_each_backbone_sees_the_image_in_its_own_way():
    images = torch.rand(1, 3, 32, 32)
    seen = {name: small(backbone=name).backbone.normalize(images) for name in ("small", "plants", "fcn8s")}
    assert seen["plants"] is images
    mean = torch.tensor([123.68, 116.779, 103.939]).view(3, 1, 1)
    torch.testing.assert_close(seen["fcn8s"], images * 255 - mean, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(seen["small"].std(correction=0), torch.tensor(1.0))


def test_the_released_initialization():
    model = small(
        backbone="plants",
        hidden_channels=8,
        layers=2,
        mask_head="inhibition",
        inhibition_init=1.0,
        initialization="released",
    )
    for layer in model.cells:
        assert 0.07 < layer.conv.weight.abs().max() <= 0.08
        gates, candidate = layer.conv.bias[:24], layer.conv.bias[24:]
        assert (gates - 1).abs().max() <= 0.08 < 0.9 <= gates.min()
        assert 0 < candidate.abs().max() <= 0.16
    assert model.mask_head.project.weight.abs().max() <= 0.08
    assert 0.05 < model.confidence_head.linear.weight.abs().max() <= 0.08
    assert model.confidence_head.linear.bias.item() == 10.0
    assert model.mask_head.scalar.item() == 1.0


def test_the_configuration_says_what_a_mask_is():
    model = small(backbone="small", mask_head="inhibition", mask_threshold=0.9)
    logits = torch.tensor([[[0.0, 1.0], [3.0, 3.0]]])  # 0.5, 0.73, 0.95
    model.mask_head.forward = lambda hidden: (logits.repeat_interleave(8, 2), torch.zeros(1, 2, 16))
    image = torch.rand(3, 8, 64)
    areas = [model.predict(image, 1, 0.0, threshold).masks.sum() for threshold in (None, 0.9, 0.5)]
    assert areas[0] == areas[1] < areas[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vgg"}, "backbone: expected 'small' or 'plants' or 'fcn8s', got 'vgg'"),
        ({"padding": "7"}, "padding: expected '100' or 'same'"),
        ({"initialization": "zero"}, "initialization: expected"),
        ({"dropout": 1.0}, "dropout: expected a number from 0, below 1"),
        ({"backbone": "fcn8s", "confidence_pool": 0, "confidence_map": (64, 64)}, "confidence_map: .* padding 'same'"),
        ({"confidence_pool": 0, "confidence_map": (5, 4)}, "confidence_map: .* multiples of 16"),
    ],
)
def test_an_architecture_that_cannot_be_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        on_meta(**changes)
