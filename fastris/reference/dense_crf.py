"""Mean field in a fully connected CRF, with every pair of pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastris.reference.permutohedral import gaussian_sum


def dense_crf(
    unary: Tensor,
    image: Tensor,
    *,
    gaussian_sxy: float = 3.0,
    gaussian_compat: float = 3.0,
    bilateral_sxy: float = 80.0,
    bilateral_srgb: float = 13.0,
    bilateral_compat: float = 10.0,
    iterations: int = 5,
) -> Tensor:
    """Marginals of one image in O(H²W²) time: for small images, what :class:`fastris.crf.DenseCRF` approximates.

    With ``K`` the Gaussian of two pixels' distance and ``D`` the diagonal of its row sums, each kernel sends the
    message ``D^−½ K D^−½ Q``, a pixel's own share included.

    Args:
        unary: (L, H, W) logits, floating.
        image: (C, H, W) from 0 to 255, in the same dtype.

    Source: Krähenbühl & Koltun, *Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials*, 2011,
    alg. 1, and *Parameter Learning and Convergent Inference for Dense Random Fields*, 2013, for the normalisation.
    """
    labels, height, width = unary.shape
    rows = torch.arange(height, dtype=unary.dtype, device=unary.device).view(-1, 1).expand(height, width)
    columns = torch.arange(width, dtype=unary.dtype, device=unary.device).expand(height, width)
    places = torch.stack([columns, rows]).flatten(1).T  # [HW, 2]
    bilateral = torch.cat([places / bilateral_sxy, image.flatten(1).T / bilateral_srgb], dim=1)
    pairwise = torch.zeros(height * width, height * width, dtype=unary.dtype, device=unary.device)
    identity = torch.eye(height * width, dtype=unary.dtype, device=unary.device)
    for compat, features in ((gaussian_compat, places / gaussian_sxy), (bilateral_compat, bilateral)):
        kernel = gaussian_sum(features, identity)
        norm = kernel.sum(1).rsqrt()
        pairwise += compat * norm.unsqueeze(1) * kernel * norm
    potentials = unary.flatten(1).T  # [HW, L]
    marginals = potentials.softmax(1)
    for _ in range(iterations):
        marginals = (potentials + pairwise @ marginals).softmax(1)
    return marginals.T.reshape(labels, height, width)
