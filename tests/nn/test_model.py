"""The segmenter: shapes, stopping, batching, and the heads' equations."""

from __future__ import annotations

import dataclasses
import itertools
import warnings

import numpy as np
import pytest
import torch

import fastris
from fastris import InputError, RecurrentInstanceSegmenter, RISLoss
from fastris.nn import ConfidenceHead, DynamicMaskHead, ModelConfig, SpatialInhibition
from fastris.nn.config import PLAIN
from fastris.ops.conv2d_same import SameConvolution

TINY = {"feature_channels": 8, "backbone_channels": (8, 8, 8, 8), "hidden_channels": 8}


MODELS = {
    "default": {},
    "inhibition": {"mask_head": "inhibition", "layers": 2},
    "plain": {**PLAIN, "layers": 2},
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return RecurrentInstanceSegmenter(ModelConfig(**TINY, **MODELS[request.param])).eval()


@pytest.mark.parametrize("size", [(32, 48), (33, 31), (1, 1), (16, 100)])
def test_maps_cover_images_of_any_size(model, size):
    output = model(torch.rand(2, 3, *size), 3)
    assert output.masks.shape == (2, 3, -(-size[0] // output.stride), -(-size[1] // output.stride))
    assert output.scores.shape == (2, 3)
    assert output.masks.min() >= 0 and output.masks.max() <= 1


@pytest.mark.skipif(not fastris.backend.has_native("conv2d_same", "cpu"), reason="fastris._C is not built")
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("feedback", [False, True])
def test_weights_that_steps_have_in_common_train_as_on_the_reference_back_end(layers, feedback):
    images = torch.rand(4, 3, 64, 80)  # enough cells for the convolutions that transform their weights

    def trained(backend):
        torch.manual_seed(1)
        model = RecurrentInstanceSegmenter(ModelConfig(**TINY, layers=layers, feedback=feedback))
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        outputs = []
        with fastris.use_backend(backend):
            for _ in range(2):
                output = model(images, 4)
                outputs.append(output)
                optimizer.zero_grad()
                (output.masks.mean() + output.scores.mean()).backward()
                optimizer.step()
        return outputs, [cell.conv.weight.grad for cell in model.cells]

    assert SameConvolution(torch.zeros(32, 8, 3, 3)).by_winograd(torch.zeros(4, 8, 16, 20))
    (found, found_grads), (truth, true_grads) = trained("native"), trained("reference")
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.masks, theirs.masks, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(found_grads, true_grads, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def test_spatial_inhibition_is_log_softmax_over_the_map_plus_a_scalar():
    head = SpatialInhibition(4, init=1.5)
    hidden = torch.randn(2, 4, 5, 6)
    logits, log_place = head(hidden)
    scores = torch.einsum("bchw,c->bhw", hidden, head.project.weight.view(-1)) + head.project.bias
    expected = scores - torch.logsumexp(scores.flatten(1), 1).view(2, 1, 1)
    torch.testing.assert_close(log_place, expected)
    torch.testing.assert_close(logits, expected + 1.5)
    uniform, _ = head(torch.zeros(1, 4, 10, 10))
    torch.testing.assert_close(uniform, torch.full((1, 10, 10), 1.5 - np.log(100), dtype=torch.float32))


def test_the_dynamic_filter_moves_with_the_place_it_attends_to():
    torch.manual_seed(0)
    head = DynamicMaskHead(4, 3, 5)
    hidden, features, detail = torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 16, 16)
    masks = []
    for x in (2, 4):
        marked = hidden.clone()
        marked[0, :, 3, x] = 50 * head.place[0].weight[:, :4, 0, 0].sum(0).sign()
        with torch.no_grad():
            head.place[2].weight.fill_(1.0)
        logits, log_place, *_ = head(marked, features, detail)
        assert log_place.exp()[0, 3, x] > 0.99
        masks.append(logits)
    torch.testing.assert_close(masks[0][:, :, :12], masks[1][:, :, 4:], rtol=1e-4, atol=1e-4)


def test_a_place_far_from_the_corner_is_exact_in_mixed_precision():
    """The filter draws minus the squared distance to the place, largest there; bf16 has steps of 1 from 128."""
    head = DynamicMaskHead(4, 3, 5)
    hidden, features, detail = torch.zeros(1, 4, 8, 200), torch.zeros(1, 3, 8, 200), torch.zeros(1, 8, 16, 400)
    with torch.no_grad():
        head.place[0].weight.fill_(1.0)
        head.place[2].weight.fill_(1.0)
        head.describe[2].weight.zero_()
        filters = head.describe[2].bias.zero_()
        filters[head.width + 2] = 1.0  # what the first of the inner channels takes: the squared distance
        filters[(head.width + 3) * head.width + head.width] = -1.0  # and what the second layer makes of it
    for x in (75, 150, 199):
        hidden.zero_()[0, :, 3, x] = 50.0
        with torch.autocast("cpu", torch.bfloat16):
            logits, log_place, *_ = head(hidden, features, detail)
        assert log_place.dtype == torch.float32 and log_place.exp()[0, 3, x] > 0.99
        best = logits.float() == logits.max()
        assert best.sum() == 4 and best[0, 6:8, 2 * x : 2 * x + 2].all()


def test_a_model_of_bf16_weights_finds_about_the_same(model):
    images = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        expected = model(images, 3)
        output = model.bfloat16()(images.bfloat16(), 3)
    assert output.masks.dtype in (torch.bfloat16, torch.float32)
    torch.testing.assert_close(output.scores.float(), expected.scores, rtol=0, atol=3 * 2**-7)


def test_confidence_pooled_and_unpooled():
    hidden = torch.randn(2, 4, 6, 8)
    pooled, unpooled = ConfidenceHead(4, 2), ConfidenceHead(4, 0, (6, 8))
    grid = hidden.unflatten(2, (2, 3)).unflatten(4, (2, 4)).amax((3, 5))
    torch.testing.assert_close(pooled(hidden), pooled.linear(grid.flatten(1)).squeeze(1))
    torch.testing.assert_close(unpooled(hidden), unpooled.linear(hidden.flatten(1)).squeeze(1))


def test_confidence_reads_what_the_step_looked_at():
    torch.manual_seed(0)
    head = ConfidenceHead(4, 2, attended_channels=3)
    hidden, attended = torch.randn(2, 4, 6, 8), torch.randn(2, 3)
    expected = head.linear(hidden.unflatten(2, (2, 3)).unflatten(4, (2, 4)).amax((3, 5)).flatten(1))
    torch.testing.assert_close(head(hidden, attended), (expected + head.attend(attended)).squeeze(1))
    assert not torch.allclose(head(hidden, attended), head(hidden, -attended))


def test_the_dynamic_head_tells_what_is_at_the_place():
    torch.manual_seed(0)
    head = DynamicMaskHead(4, 3, 5)
    hidden, features, detail = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 16, 16)
    with torch.no_grad():
        head.place[2].weight.mul_(1e4)  # all attention at one place
    _, log_place, _, attended = head(hidden, features, detail)
    peak = head.place(torch.cat([hidden, features], 1)).flatten(1).amax(1)
    for b in range(2):
        there = log_place[b].flatten().argmax()
        state = torch.cat([hidden[b], features[b]]).flatten(1)[:, there]
        torch.testing.assert_close(attended[b], torch.cat([state, peak[b : b + 1]]))


def test_the_filter_sees_how_far_the_middle_of_a_cell_is_from_the_middle_at_the_place():
    """It draws minus that distance squared: 0 at the place, and where the cells tell of a middle 3 cells to the right
    and 2 up, at the cells for which that is the middle which the place tells."""
    head = DynamicMaskHead(4, 3, 5, dense=True)
    hidden, features = torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        filters = head.describe[2].bias
        filters[head.width + 5] = 1.0
        filters[head.inputs * head.width + head.width] = -1.0
        head.place[0].weight[:, 0] = 50.0
        head.place[2].weight.fill_(1.0)
    hidden[0, 0, 3, 5] = 1.0  # the place, which covers the cells 6 and 7 by 10 and 11 of the detail
    peaks = []
    for dx, dy in ((0.0, 0.0), (3.0, -2.0)):
        with torch.no_grad():
            head.dense_detail.read.bias[2:] = torch.tensor([dx, dy]) / head.radius
            logits = head(hidden, features, head.prepare(torch.zeros(1, 5, 16, 16))).mask_logits[0]
        peaks.append((logits == logits.max()).nonzero().double().mean(0).tolist())
        assert logits.max() == pytest.approx(-0.5 / head.radius**2)
    assert peaks == [[6.5, 10.5], [8.5, 7.5]]
    with torch.no_grad():  # the features tell the same of the place: all agree again
        head.dense_features.read.bias[2:] = head.dense_detail.read.bias[2:]
        logits = head(hidden, features, head.prepare(torch.zeros(1, 5, 16, 16))).mask_logits[0]
    assert (logits == logits.max()).nonzero().double().mean(0).tolist() == [6.5, 10.5]


def test_of_two_places_as_likely_the_hard_one_is_one_of_them():
    torch.manual_seed(0)
    hard, soft = (DynamicMaskHead(4, 3, 5, hard_place=hard) for hard in (True, False))
    soft.load_state_dict(hard.state_dict())
    with torch.no_grad():
        for head in (hard, soft):
            head.place[0].weight.fill_(1.0)
            head.place[2].weight.fill_(9.0)
    hidden, features, detail = torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 16, 16)
    hidden[0, 0, 2, 2], hidden[0, 1, 6, 7] = 5.0, 5.0
    hidden[1, 2, 4, 1] = 5.0
    drawn = hard(hidden, features, detail)
    assert drawn.log_place[0].exp()[[2, 6], [2, 7]].tolist() == pytest.approx([0.5, 0.5], abs=1e-4)
    assert drawn.place.flatten(1).sum(1).tolist() == [1, 1] and drawn.place[1, 4, 1] == 1
    assert drawn.attended[:, :4].tolist() in ([[5.0, 0, 0, 0], [0, 0, 5.0, 0]], [[0, 5.0, 0, 0], [0, 0, 5.0, 0]])
    assert soft(hidden, features, detail).attended[0, :2].tolist() == pytest.approx([2.5, 2.5], abs=1e-3)
    torch.testing.assert_close(drawn.mask_logits[1], soft(hidden, features, detail).mask_logits[1])


def test_what_was_found_can_keep_the_next_place_away():
    torch.manual_seed(0)
    head = DynamicMaskHead(4, 3, 5, found_channels=2)
    hidden, features, detail = torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 16, 16)
    found = torch.zeros(1, 2, 8, 8)
    unseen = head(hidden, features, detail)
    torch.testing.assert_close(head(hidden, features, detail, found), unseen)  # None is zeros
    with torch.no_grad():
        head.place[0].weight[:, 7] = -9.0
        head.place[0].bias.fill_(1.0)
        head.place[2].weight.fill_(1.0)
    found[0, 0, 2:4, 2:4] = 1.0
    place = head(hidden, features, detail, found)[1].exp()[0]
    assert place[2:4, 2:4].max() < 0.01 * place[0, 0]


def test_every_parameter_learns(model):
    labels = torch.zeros(2, 32, 32, dtype=torch.int64)
    labels[:, 4:12, 4:12], labels[0, 20:28, 20:28] = 1, 2
    RISLoss(place_weight=1.0)(model(torch.rand(2, 3, 32, 32), 4), labels, torch.tensor([2, 1])).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        unseen = name.endswith(("conv.bias", "place.2.bias"))  # by the normalisation and the softmax behind them
        assert parameter.grad.abs().sum() > 0 or unseen, name


def set_confidence(model, per_step):
    """Make the confidence head answer the given logits, one a step."""
    answers = iter(per_step)
    model.confidence_head.judge = lambda evidence: torch.as_tensor(next(answers), dtype=evidence.pooled.dtype)


def test_each_image_of_a_batch_stops_at_its_own_first_doubt(model):
    set_confidence(model, [[3.0, 3.0, -3.0], [3.0, -3.0], [-3.0]])  # image 2 stops at once, 1 after one, 0 after two
    found = model._find(torch.rand(3, 3, 32, 32), limit=9, threshold=0.5, mask_threshold=0.0)
    assert [len(masks) for masks, _ in found] == [2, 1, 0]


def test_stopped_images_do_not_change_the_others(model):
    images = torch.rand(3, 3, 32, 32)
    alone = model._find(images[:1], 3, 0.0, 0.5)[0]
    set_confidence(model, [[3.0, -3.0, -3.0], [3.0], [3.0]])
    together = model._find(images, 3, 0.5, 0.5)[0]
    torch.testing.assert_close(alone[0], together[0])


def test_the_free_running_steps_equal_the_training_forward(model):
    images = torch.rand(1, 3, 32, 32)
    masks, scores = model._find(images, 3, 0.0, 0.5)[0]
    torch.testing.assert_close(scores, model(images, 3).scores[0])


def test_predict_takes_what_users_call_an_image(model, tmp_path):
    from PIL import Image

    array = (np.random.default_rng(0).random((24, 20, 3)) * 255).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    results = [
        model.predict(one, max_steps=3, threshold=0.0)
        for one in (
            array,
            tensor,
            tensor.float() / 255,
            Image.fromarray(array),
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
        )
    ]
    for result in results:
        np.testing.assert_array_equal(result.masks, results[0].masks)
    batch = model.predict(torch.stack([tensor, tensor]), max_steps=2)
    assert isinstance(batch, list) and len(batch) == 2
    assert results[-1].name.endswith("a.png")


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 2), np.uint8), torch.zeros(2, 4, 4), 3, np.zeros((0, 4, 3), np.uint8)]
)
def test_predict_names_what_it_cannot_take(model, image):
    with pytest.raises(InputError, match="image: expected"):
        model.predict(image)


@pytest.mark.parametrize(("max_side", "looked_at"), [(1024, (40, 50)), (32, (25, 32))])
def test_a_trace_is_what_predict_did_and_the_step_that_stopped_it(model, max_side, looked_at):
    model.config = dataclasses.replace(model.config, max_side=max_side)
    image = torch.rand(3, 40, 50)
    draw_nothing_at_first(model, steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the image is shrunk
        set_confidence(model, [[3.0], [2.0], [1.0], [-1.0]] * 2)
        trace = model.trace(image)
        predicted = model.predict(image)
    assert trace.stopped and trace.found.tolist() == [False, True, True, False]
    np.testing.assert_array_equal(trace.masks[trace.found], predicted.masks)
    np.testing.assert_array_equal(trace.scores[trace.found], predicted.scores)
    assert trace.scores[3] == pytest.approx(1 / (1 + np.e))
    assert trace.cell == pytest.approx((4 * 40 / looked_at[0], 4 * 50 / looked_at[1]))
    assert trace.log_place.shape == (4, -(-looked_at[0] // 4), -(-looked_at[1] // 4))
    if looked_at == (40, 50):
        set_confidence(model, [[0.0] * 4])  # of all steps together
        np.testing.assert_allclose(trace.log_place, model(image[None], 4).log_place[0].detach(), rtol=1e-5)


def draw_nothing_at_first(model, steps):
    """Make the mask head draw nothing at the first of every so many steps, and about half the map at the others."""
    shifts, forward = itertools.cycle([-100.0] + [0.0] * (steps - 1)), model.mask_head.forward

    def shifted(*inputs):
        logits, *others = forward(*inputs)
        return (logits - logits.mean()) / logits.std() + next(shifts), *others

    model.mask_head.forward = shifted


def test_a_trace_ends_at_the_limit_without_a_stop(model):
    trace = model.trace(torch.rand(3, 20, 30), max_steps=2, threshold=0.0, min_area=0)
    assert not trace.stopped and trace.masks.shape == (2, 20, 30) and trace.found.all()
    with pytest.raises(InputError, match="image: expected one"):
        model.trace(torch.rand(1, 3, 20, 30))


@pytest.mark.parametrize(
    "bad",
    [{"mask_head": "x"}, {"kernel_size": 2}, {"recurrent_stride": 3}, {"confidence_pool": 0}, {"layers": 0}],
)
def test_a_configuration_that_cannot_be_is_named(bad):
    with pytest.raises(InputError, match=next(iter(bad)) if "pool" not in next(iter(bad)) else "confidence_map"):
        ModelConfig(**bad)


def test_configuration_round_trip():
    config = ModelConfig(confidence_pool=0, confidence_map=(4, 6), layers=1)
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match="unknown colour"):
        ModelConfig.from_dict({"colour": 1})


def test_a_large_image_is_looked_at_smaller_and_its_masks_scaled_back():
    model = RecurrentInstanceSegmenter(ModelConfig(max_side=32, **TINY)).eval()
    with pytest.warns(UserWarning, match="100x60 pixels are looked at as 32x19"):
        found = model.predict(torch.rand(3, 60, 100), max_steps=2, threshold=0.0, mask_threshold=0.0)
    assert found.masks.shape == (2, 60, 100)
