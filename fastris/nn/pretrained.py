"""Trained weights of other projects for :class:`~fastris.nn.FCN8s`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastris.errors import InputError
from fastris.nn.fcn8s import CONVOLUTIONS, FCN8s

Weights = Mapping[str, Tensor] | str | os.PathLike[str]

_LAYERS = [f"{stage}_{number}" for stage, widths in CONVOLUTIONS.items() for number in range(1, len(widths) + 1)]
_SCORES = ["score_fr", "score_pool4", "score_pool3"]
_TORCHVISION_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def load_vgg16(model: FCN8s, weights: Weights) -> list[str]:
    """Start an FCN-8s from torchvision's VGG16: conv1_1 … conv5_3, and fc6 and fc7 from the first two linear layers.

    The model then expects torchvision's preprocessing: RGB, mean (0.485, 0.456, 0.406), deviation (0.229, 0.224,
    0.225). The classifier's last layer (1000 classes) is left out.

    Args:
        weights: the state_dict of ``torchvision.models.vgg16``, or a ``.pth`` or ``.safetensors`` file of it. Nothing
            but tensors is unpickled.

    Returns:
        The parameters that VGG16 does not have, which stay as they were: those of the score layers.

    Raises:
        InputError: an unreadable file, a missing or unexpected key, or another shape; the model stays as it was.
    """
    return _from_vgg16(model, *_read(weights))


def load_fcn8s(model: FCN8s, weights: Weights) -> list[str]:
    """Start an FCN-8s from a trained one, with the layer names of Caffe's FCN-8s (as in wkentaro/pytorch-fcn).

    Such networks take BGR less the mean (104.00699, 116.66877, 122.67891) of images in 0 … 255; the input channels of
    conv1_1 are turned around here, so that the model goes on taking RGB. The score layers are loaded where their
    number of channels is the model's. Otherwise (21 classes, 100 channels) they stay as they were, fresh in a new
    model, as in the released RIS code. The ``upscore`` layers are bilinear in both, and are left out.

    Args:
        weights: a state_dict, or a ``.pth`` or ``.safetensors`` file of it, or of a training checkpoint that has it as
            ``model_state_dict``. Nothing but tensors is unpickled.

    Returns:
        The parameters that stay as they were.

    Raises:
        InputError: an unreadable file, a missing or unexpected key, or another shape; the model stays as it was.
    """
    return _from_fcn8s(model, *_read(weights))


def load_pretrained(model: FCN8s, weights: Weights) -> list[str]:
    """:func:`load_vgg16` or :func:`load_fcn8s`, whichever the weights are for."""
    tensors, name = _read(weights)
    is_vgg16 = any(key.startswith("features.") for key in tensors)
    return (_from_vgg16 if is_vgg16 else _from_fcn8s)(model, tensors, name)


def _from_vgg16(model: FCN8s, tensors: Mapping[str, Tensor], name: str) -> list[str]:
    sources = {f"features.{k}": layer for k, layer in zip(_TORCHVISION_CONVOLUTIONS, _LAYERS, strict=True)}
    sources |= {"classifier.0": "fc6", "classifier.3": "fc7"}
    loaded = _renamed(tensors, sources, {"classifier.6"}, name)
    for layer in (model.fc6, model.fc7):  # a linear layer over a flattened 7×7 map is a 7×7 convolution
        key = "fc6.weight" if layer is model.fc6 else "fc7.weight"
        if loaded[key].shape == (layer.out_channels, layer.weight[0].numel()):
            loaded[key] = loaded[key].reshape(layer.weight.shape)
    loaded["mean"] = torch.tensor([0.485, 0.456, 0.406])
    loaded["std"] = torch.tensor([0.229, 0.224, 0.225])
    return _load(model, loaded, name)


def _from_fcn8s(model: FCN8s, tensors: Mapping[str, Tensor], name: str) -> list[str]:
    layers = {layer: layer for layer in (*_LAYERS, "fc6", "fc7", *_SCORES)}
    loaded = _renamed(tensors, layers, {"upscore2", "upscore_pool4", "upscore8"}, name)
    if loaded["conv1_1.weight"].dim() == 4:
        loaded["conv1_1.weight"] = loaded["conv1_1.weight"].flip(1)
    loaded["mean"] = torch.tensor([122.67891434, 116.66876762, 104.00698793]) / 255
    loaded["std"] = torch.full((3,), 1 / 255)
    if loaded["score_fr.bias"].shape != (model.channels,):
        loaded = {key: tensor for key, tensor in loaded.items() if key.split(".")[0] not in _SCORES}
    return _load(model, loaded, name)


def _read(weights: Weights) -> tuple[Mapping[str, Tensor], str]:
    """The tensors, and what to call them in an error."""
    if isinstance(weights, Mapping):
        return weights, "state_dict"
    path = Path(weights)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path), str(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # torch.load and safetensors raise many kinds for a damaged file
        raise InputError(f"{path}: cannot read these weights: {' '.join(str(error).split())}") from None
    if isinstance(content, dict):
        content = content.get("model_state_dict", content)
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise InputError(f"{path}: not a state_dict, a mapping of names to tensors")
    return content, str(path)


def _renamed(tensors: Mapping[str, Tensor], layers: dict[str, str], ignored: set[str], name: str) -> dict[str, Tensor]:
    """Weight and bias of every layer under its name here, or an InputError for what lacks or is unknown."""
    keys = {f"{source}.{kind}": f"{layer}.{kind}" for source, layer in layers.items() for kind in ("weight", "bias")}
    missing = [key for key in keys if key not in tensors]
    unexpected = [key for key in tensors if key not in keys and key.rpartition(".")[0] not in ignored]
    for what, wrong in (("lacks", missing), ("has unexpected", unexpected)):
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise InputError(f"{name}: {what} {', '.join(wrong[:3])}{more}")
    return {here: tensors[key] for key, here in keys.items()}


def _load(model: FCN8s, loaded: dict[str, Tensor], name: str) -> list[str]:
    own = model.state_dict()
    for key, tensor in loaded.items():
        if tensor.shape != own[key].shape:
            expected, got = (" x ".join(map(str, shape)) for shape in (own[key].shape, tensor.shape))
            raise InputError(f"{name}: {key} must be {expected}, got {got}")
    return list(model.load_state_dict(loaded, strict=False).missing_keys)
