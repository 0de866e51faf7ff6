"""A dense CRF: every pixel is a neighbour of every other, the more so the closer they are in place and colour.

B = batch, L = labels, C = colours, N = H·W pixels. docs/crf.md says how far from exact it is and how pydensecrf's calls
map to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.ops.arguments import describe, wrong
from fastris.ops.permutohedral import permutohedral_filter, permutohedral_lattice

REACH = 6.0
"""Standard deviations after which a Gaussian over places ends; what is left out is below 2e-8 of its height."""

NUCLEI: dict[str, Any] = {
    "gaussian_sxy": 3.0,
    "gaussian_compat": 4.0,
    "bilateral_sxy": 16.0,
    "bilateral_srgb": 13.0,
    "bilateral_compat": 16.0,
    "iterations": 5,
}
"""What ``--crf`` uses: fitted to the masks of the shipped nuclei model by benchmarks/fit_crf.py. docs/crf.md says what
they gain and lose."""

Kernel = Callable[[Tensor], Tensor]
"""Marginals (N, L) → messages (N, L)."""


class DenseCRF(nn.Module):
    """Mean field in a fully connected CRF with a Gaussian and a bilateral kernel and the Potts model.

    A label is likelier where pixels near in place (``gaussian``), or near in place and colour (``bilateral``), have it.
    An iteration adds to each pixel's logits ``compat · D^−½ K D^−½ Q`` for each kernel K, with the marginals Q and the
    diagonal D of the kernel's row sums (symmetric normalisation; a pixel's own share is included), then the softmax.
    The Gaussian kernel is computed exactly, the bilateral one on the permutohedral lattice, natively for fp32 on the
    CPU. Deterministic. Differentiable in its unary, any number of times; no gradient flows to the image.

    Args:
        gaussian_sxy: standard deviation over places, in pixels.
        gaussian_compat: weight of the Gaussian kernel.
        bilateral_sxy: standard deviation of the bilateral kernel over places, in pixels.
        bilateral_srgb: and over colours, which go from 0 to 255.
        bilateral_compat: weight of the bilateral kernel.
        iterations: of mean field.

    Raises:
        ValueError: a deviation that is not positive and finite, a negative weight or number of iterations.

    Source: Krähenbühl & Koltun, *Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials*, NIPS 2011,
    and *Parameter Learning and Convergent Inference for Dense Random Fields*, ICML 2013.

    Example:
        >>> crf = DenseCRF(iterations=5)
        >>> marginals = crf(torch.randn(1, 2, 32, 32), torch.rand(1, 3, 32, 32))  # (1, 2, 32, 32)
    """

    def __init__(
        self,
        gaussian_sxy: float = 3.0,
        gaussian_compat: float = 3.0,
        bilateral_sxy: float = 80.0,
        bilateral_srgb: float = 13.0,
        bilateral_compat: float = 10.0,
        iterations: int = 5,
    ) -> None:
        super().__init__()
        for name, value in (
            ("gaussian_sxy", gaussian_sxy),
            ("bilateral_sxy", bilateral_sxy),
            ("bilateral_srgb", bilateral_srgb),
        ):
            if not 0 < value < math.inf:
                raise ValueError(f"DenseCRF: {name} must be positive and finite, got {value}")
        for name, value in (
            ("gaussian_compat", gaussian_compat),
            ("bilateral_compat", bilateral_compat),
            ("iterations", iterations),
        ):
            if not 0 <= value < math.inf:
                raise ValueError(f"DenseCRF: {name} must be at least 0 and finite, got {value}")
        self.gaussian_sxy, self.gaussian_compat = gaussian_sxy, gaussian_compat
        self.bilateral_sxy, self.bilateral_srgb = bilateral_sxy, bilateral_srgb
        self.bilateral_compat, self.iterations = bilateral_compat, iterations

    def forward(self, unary: Tensor, image: Tensor) -> Tensor:
        """Marginals of the labels.

        Args:
            unary: (B, L, H, W) logits, floating: the negative of unary energies. Of probabilities take the logarithm.
            image: (B, C, H, W) on the same device, uint8, or floating in [0, 1]; C from 1 to 6, usually RGB.

        Returns:
            (B, L, H, W) in the dtype of ``unary``, summing to 1 over L; computed in fp64 for fp64, in fp32 otherwise.

        Raises:
            TypeError, ValueError: arguments that are no such tensors or do not fit each other.
        """
        if not isinstance(unary, Tensor) or unary.dim() != 4 or not unary.is_floating_point():
            raise wrong("DenseCRF", "unary", "floating (B,L,H,W)", unary)
        if not isinstance(image, Tensor) or image.dim() != 4 or not 1 <= image.shape[1] <= 6:
            raise wrong("DenseCRF", "image", "(B,C,H,W) with C from 1 to 6", image)
        if not (image.dtype == torch.uint8 or image.is_floating_point()):
            raise wrong("DenseCRF", "image", "uint8 or floating in [0, 1]", image)
        if (image.shape[0], *image.shape[2:]) != (unary.shape[0], *unary.shape[2:]) or image.device != unary.device:
            raise ValueError(
                f"DenseCRF: image must match unary {describe(unary)} on {unary.device} in B, H and W, "
                f"got {describe(image)} on {image.device}"
            )
        if unary.numel() == 0:
            return unary.softmax(1)
        compute = torch.float64 if unary.dtype == torch.float64 else torch.float32
        colours = image.detach().to(compute) * (1 if image.dtype == torch.uint8 else 255)
        with torch.autocast(unary.device.type, enabled=False):
            pairs = zip(unary.to(compute), colours, strict=True)
            return torch.stack([self._marginals(*pair) for pair in pairs]).to(unary.dtype)

    def refine(self, mask_logits: Tensor, image: Tensor, threshold: float = 0.5) -> Tensor:
        """Masks of all instances of an image and its background, refined jointly: every pixel gets to one of them.

        Independent probabilities p of instances make the odds of "this instance and no other" to "none of them"
        ``p / (1 − p)``: the logits of the masks are the unary, and that of the background is 0 (for another threshold
        than ½, its logit).

        Args:
            mask_logits: (N, H, W), floating; the sigmoid is the mask.
            image: (3, H, W), uint8, or floating in [0, 1].
            threshold: the probability above which an instance wins over the background, inside (0, 1).

        Returns:
            bool (N, H, W), of which no two share a pixel and some may be empty.
        """
        if not isinstance(mask_logits, Tensor) or mask_logits.dim() != 3 or not mask_logits.is_floating_point():
            raise wrong("DenseCRF.refine", "mask_logits", "floating (N,H,W)", mask_logits)
        if not 0 < threshold < 1:
            raise ValueError(f"DenseCRF.refine: threshold must be inside (0, 1), got {threshold}")
        if len(mask_logits) == 0:
            return mask_logits > 0
        background = torch.full_like(mask_logits[:1], math.log(threshold / (1 - threshold)))
        marginals = self(torch.cat([background, mask_logits]).unsqueeze(0), image.unsqueeze(0))[0]
        winner = marginals.argmax(0)
        return winner == torch.arange(1, len(marginals), device=winner.device).view(-1, 1, 1)

    def extra_repr(self) -> str:
        names = ("gaussian_sxy", "gaussian_compat", "bilateral_sxy", "bilateral_srgb", "bilateral_compat", "iterations")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _marginals(self, unary: Tensor, colours: Tensor) -> Tensor:
        """(L, H, W) logits and (C, H, W) colours from 0 to 255 → (L, H, W)."""
        kernels = []
        if self.gaussian_compat:
            kernels.append(_gaussian(colours, self.gaussian_sxy, self.gaussian_compat))
        if self.bilateral_compat:
            kernels.append(_bilateral(colours, self.bilateral_sxy, self.bilateral_srgb, self.bilateral_compat))
        potentials = unary.flatten(1)  # [L, N], in which torch's softmax is quickest
        marginals = potentials.softmax(0)
        for _ in range(self.iterations):
            by_pixel = marginals.T.contiguous()  # [N, L], in which filters are
            logits = potentials
            for kernel in kernels:
                logits = logits + kernel(by_pixel).T
            marginals = logits.softmax(0)
        return marginals.view_as(unary)


def _gaussian(colours: Tensor, sxy: float, compat: float) -> Kernel:
    """``compat · D^−½ K D^−½`` over places: two convolutions, by a column and by a row."""
    height, width = colours.shape[1:]

    def blur(maps: Tensor) -> Tensor:  # [1, L, H, W], channels_last
        labels = maps.shape[1]
        for dim, size in ((2, height), (3, width)):
            radius = min(math.ceil(REACH * sxy), size - 1)
            taps = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device).div(sxy).square().mul(-0.5)
            weight = taps.exp().view((1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1)).expand(labels, -1, -1, -1)
            maps = F.conv2d(maps, weight, padding=(radius, 0) if dim == 2 else (0, radius), groups=labels)
        return maps

    norm = (compat / blur(torch.ones_like(colours[:1]).unsqueeze(0))).sqrt()  # half of it on either side

    def message(marginals: Tensor) -> Tensor:
        maps = marginals.view(1, height, width, -1).permute(0, 3, 1, 2)
        return (norm * blur(norm * maps)).permute(0, 2, 3, 1).reshape(marginals.shape)

    return message


def _bilateral(colours: Tensor, sxy: float, srgb: float, compat: float) -> Kernel:
    """``compat · D^−½ K D^−½`` over places and colours: a filter on the permutohedral lattice."""
    height, width = colours.shape[1:]
    rows = torch.arange(height, dtype=colours.dtype, device=colours.device).view(-1, 1).expand(height, width)
    columns = torch.arange(width, dtype=colours.dtype, device=colours.device).expand(height, width)
    features = torch.cat([torch.stack([columns, rows]) / sxy, colours / srgb]).flatten(1).T.contiguous()
    lattice = permutohedral_lattice(features)
    norm = (compat / permutohedral_filter(torch.ones_like(features[:, :1]), lattice)).sqrt()
    normalised = lattice._replace(weights=lattice.weights * norm)
    return lambda marginals: permutohedral_filter(marginals, normalised)
