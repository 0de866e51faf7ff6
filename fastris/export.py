"""A model as two graphs, torch.export's or ONNX's: its features, once an image, and a step, once an object.

B = batch, L = recurrent layers, C = hidden channels, H × W = image, H' × W' = the same with what the model pads it by,
h × w = recurrent map.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.onnx import ONNXProgram

from fastris import __version__
from fastris.backend import use_backend
from fastris.errors import InputError
from fastris.imageio import PathLike, atomic_write, make_output_directory
from fastris.nn.fcn8s import FCN8s
from fastris.nn.heads import DynamicMaskHead
from fastris.nn.model import RecurrentInstanceSegmenter, _Context, _Memory

CONTEXT = _Context._fields
STATE = ("hidden", "cell", "found")
OUTPUTS = ("score", "mask", *(f"next_{name}" for name in STATE))


class Features(nn.Module):
    """``forward(images)``: (B, 3, H, W) in [0, 1] → features, hoisted, detail and, of a model with a dynamic mask head,
    place_base: what every step needs of them."""

    def __init__(self, model: RecurrentInstanceSegmenter) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self.model._encode(images) if tensor is not None)


class Step(nn.Module):
    """``forward(*context, hidden, cell, found)`` → score, mask and the next hidden, cell and found.

    The context is what :class:`Features` returns. The state, zero at first, is hidden and cell (L, B, C, h, w) and
    found (B, 2, h, w). Score (B,) is the confidence that this step has found an object, and mask (B, H', W') the
    probability of each pixel, both in [0, 1].
    """

    def __init__(self, model: RecurrentInstanceSegmenter) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *context, hidden, cell, found = inputs
        states = list(zip(hidden.unbind(), cell.unbind(), strict=True))
        memory = _Memory(states, found if self.model.config.feedback else None)
        step, memory = self.model._step(_Context(*context), memory, self.model._repeated_weights())
        assert memory.states is not None
        hidden, cell = (torch.stack(parts) for parts in zip(*memory.states, strict=True))
        mask = F.interpolate(step.mask_logits.unsqueeze(1), scale_factor=float(self.model.stride), mode="bilinear")
        mask = mask[..., self.model.backbone.offset :, self.model.backbone.offset :]
        next_found = found.clone() if memory.found is None else memory.found
        score = self.model.confidence_head.judge(step.evidence).sigmoid()
        return score, mask.squeeze(1).sigmoid(), hidden, cell, next_found


def export_features(model: RecurrentInstanceSegmenter, size: tuple[int, int] | None = None) -> ExportedProgram:
    """:class:`Features` of a model as a program for any B, and for one (H, W) or any.

    Any is from one over the backbone's ``multiple``, as a smaller image has a map of a single cell, a case of its own,
    to the model's ``input_size`` where it has one.

    The active back end is what the program holds: operators ``torch.ops.fastris.*``, for which a process that runs it
    must ``import fastris.ops``, or with ``use_backend("reference")`` torch's own alone.

    Raises:
        InputError: an FCN-8s without ``size``.
    """
    least = model.backbone.multiple + 1
    height, width = (
        Dim(name, min=least, max=most)
        for name, most in zip(("height", "width"), model.input_size or (None, None), strict=True)
    )
    free = {0: Dim("batch", min=1)} if size else {0: Dim("batch", min=1), 2: height, 3: width}
    with torch.no_grad():
        return torch.export.export(Features(model), (_example(model, size),), dynamic_shapes=(free,))


def export_step(model: RecurrentInstanceSegmenter, size: tuple[int, int] | None = None) -> ExportedProgram:
    """:class:`Step` of a model as a program for the results of :func:`export_features`; see there.

    A model whose confidence head is unpooled knows one size of map only, and so does its step.
    """
    with torch.no_grad():
        context = _Context(*Features(model)(_example(model, size)))
        batch, _, height, width = context.features.shape
        state = context.features.new_zeros(model.config.layers, batch, model.config.hidden_channels, height, width)
        moving = (state, state.clone(), state.new_zeros(batch, 2, height, width))
        example = (*(one for one in context if one is not None), *moving)
        scale = context.detail.shape[2] // height
        b, h, w = Dim("batch", min=1), Dim("h", min=2), Dim("w", min=2)
        maps: dict[int, Any] = {0: b, 2: h, 3: w}
        detail = {0: b, 2: scale * h, 3: scale * w} if scale > 1 else maps
        states = {1: b, 3: h, 4: w}
        if size or not model.config.confidence_pool:
            maps, detail, states = {0: b}, {0: b}, {1: b}
        shapes = (maps, maps, detail, *[maps] * (context.place_base is not None), states, states, maps)
        return torch.export.export(Step(model), example, dynamic_shapes=(shapes,))


def export_onnx(model: RecurrentInstanceSegmenter, folder: PathLike, size: tuple[int, int] | None = None) -> list[Path]:
    """Write ``features.onnx``, ``step.onnx`` and ``model.json``, which says how to run them; returns the paths.

    For images of one (H, W) or any, as :func:`export_features`.

    Nothing is written before both graphs are made, and each file is whole or not there.

    Raises:
        InputError: onnx or onnxscript is not installed, the folder cannot be written, or an FCN-8s without ``size``.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("ONNX export needs onnx and onnxscript: pip install 'fastris[onnx]'") from None
    folder = make_output_directory(folder)
    context = CONTEXT if isinstance(model.mask_head, DynamicMaskHead) else CONTEXT[:-1]
    with use_backend("reference"):
        graphs = {
            "features.onnx": _onnx(export_features(model, size), ("images",), context, ("batch", "height", "width")),
            "step.onnx": _onnx(export_step(model, size), (*context, *STATE), OUTPUTS, ("batch", "rows", "columns")),
        }
    contents = {name: graph.model_proto.SerializeToString() for name, graph in graphs.items()}
    contents["model.json"] = (json.dumps(_description(model, graphs), indent=1) + "\n").encode()
    for name, content in contents.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(content)
    return [folder / name for name in contents]


def _example(model: RecurrentInstanceSegmenter, size: tuple[int, int] | None) -> Tensor:
    """Images of a size, or of one in which no number is like another, to stand for any."""
    if size is None and isinstance(model.backbone, FCN8s):
        raise InputError("size: an FCN-8s exports for images of one size, which must be given (--size HxW)")
    most = model.input_size
    height, width = size or ((75, 93) if most is None else (most[0] - 5, most[1] - 7))
    return torch.zeros(2, 3, height, width, device=next(model.parameters()).device)


def _onnx(
    program: ExportedProgram, inputs: tuple[str, ...], outputs: tuple[str, ...], axes: tuple[str, str, str]
) -> ONNXProgram:
    """The graph of a program; `axes` names batch, rows and columns of its first input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own trees
        graph = torch.onnx.export(program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False)
    assert graph is not None
    shape = graph.model.graph.inputs[0].shape
    assert shape is not None
    names: dict[Any, str] = dict(zip((shape[0], *shape[2:]), axes, strict=True))
    graph.rename_axes({size: name for size, name in names.items() if not isinstance(size, int)})
    return graph


def _shapes(values: Any) -> dict[str, list[int | str]]:
    return {one.name: [size if isinstance(size, int) else str(size.value) for size in one.shape] for one in values}


def _description(model: RecurrentInstanceSegmenter, graphs: dict[str, ONNXProgram]) -> dict[str, Any]:
    """What a program that runs the graphs needs to know."""
    return {
        "fastris": __version__,
        "graphs": {
            name: {"inputs": _shapes(one.model.graph.inputs), "outputs": _shapes(one.model.graph.outputs)}
            for name, one in graphs.items()
        },
        "type": "float32",
        "loop": {
            "images": "RGB in [0, 1], (B, 3, H, W), scaled to fit input_size where there is one, else into max_side",
            "first": "run features.onnx once; hidden, cell and found are zeros of the shapes that step.onnx takes",
            "repeat": "run step.onnx; its outputs next_* are the inputs of that name in the next step",
            "stop": "at the first score below threshold, whose mask is dropped, or after max_steps",
            "object": "the pixels mask[:H, :W] > mask_threshold, if at least min_area; the earlier wins an overlap",
            "threshold": 0.5,
            "mask_threshold": model.config.mask_threshold,
            "min_area": 4,
            "max_steps": model.config.max_steps,
            "max_side": model.config.max_side,
            "input_size": model.input_size,
        },
        "model": model.config.to_dict(),
    }
