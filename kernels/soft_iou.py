"""Soft IoU on the GPU: sums over splits of the pixels, then a kernel that adds them in a fixed order and divides.

B = batch, P = predictions, G = targets, N = pixels, S = splits of N. No atomics: the same bits every time.
"""

import triton
import triton.language as tl

# By the bytes of what is multiplied. In fp32 more than two warps would repeat each other's products.
SUMS = {
    2: {"BLOCK_X": 64, "num_warps": 4, "num_stages": 4},
    4: {"BLOCK_X": 32, "num_warps": 2, "num_stages": 4, "maxnreg": 168},
    8: {"BLOCK_X": 32, "num_warps": 4, "num_stages": 2},
}
FINISH = {"num_warps": 4}
BACKWARD = {"BLOCK_X": 1024, "num_warps": 4}

PIXELS_OF_SPLIT = 1024
MULTIPLE_OF_SPLIT = 64  # whole tiles that begin where 128-bit loads can
MOST_SPLITS = 64


def block_of(rows: int) -> int:
    """Predictions or targets of a program: 16, the least that ``tl.dot`` takes, or 32."""
    return 16 if rows <= 16 else 32


def sums_options(factor_bytes: int, aligned: bool, rows: int) -> dict[str, int]:
    """For ``rows`` = BLOCK_P + BLOCK_G: tiles are half as wide where each pixel's address would be in a register.

    ``aligned``: pixels are side by side, and rows of them begin at multiples of 16.
    """
    options = SUMS[factor_bytes]
    return options if aligned or rows == 32 else {**options, "BLOCK_X": options["BLOCK_X"] // 2}


def splits_of(pixels: int) -> tuple[int, int]:
    """S and the pixels of a split, which depend on the size alone so that sums never depend on the device."""
    splits = min(MOST_SPLITS, max(1, triton.cdiv(pixels, PIXELS_OF_SPLIT)))
    size = max(1, triton.cdiv(pixels, splits * MULTIPLE_OF_SPLIT)) * MULTIPLE_OF_SPLIT
    return max(1, triton.cdiv(pixels, size)), size


@triton.jit
def high_and_low(value):
    """fp32 as a sum of two that tensor cores take as TF32, with 11 bits: ``high`` as it is, ``low`` to 2⁻²³ of the sum.

    ``high`` is rounded to nearest, so that ``low`` has either sign.
    """
    bits = value.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, value - high


@triton.jit
def soft_iou_sums_kernel(
    pred,  # [B, P, N]
    target,  # masks [B, G, N] or labels [B, N]
    num_pred,  # [B] or None
    num_target,  # [B] or None
    sums,  # [B, S, P * (G + 1) + G]: Σqy and Σq of every prediction, then Σy; the dtype computed in
    P,
    G,
    N,
    splits,
    split_size,
    pred_stride_b,
    pred_stride_p,
    pred_stride_x,
    target_stride_b,
    target_stride_g,
    target_stride_x,
    LABELS: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Σqy, Σq and Σy of one image, block of pairs and split.

    NARROW: pixels of 16 bits are multiplied as they are, with targets that they hold; products are exact in fp32.
    """
    compute = sums.dtype.element_ty
    factor = pred.dtype.element_ty if NARROW else compute
    program = tl.program_id(0)  # b * S + s
    b = (program // splits).to(tl.int64)
    begin = (program % splits).to(tl.int64) * split_size
    end = tl.minimum(begin + split_size, N)
    g_blocks = tl.cdiv(G, BLOCK_G)
    p_block = tl.program_id(1) // g_blocks
    g_block = tl.program_id(1) % g_blocks
    p = p_block.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    first_target = g_block.to(tl.int64) * BLOCK_G
    g = first_target + tl.arange(0, BLOCK_G)
    preds = P
    if num_pred is not None:
        preds = tl.minimum(P, tl.load(num_pred + b))
    targets = G
    if num_target is not None:
        targets = tl.minimum(G, tl.load(num_target + b))
    p_used = p < preds
    g_used = g < targets

    pred_rows = pred + b * pred_stride_b + p[:, None] * pred_stride_p
    target_image = target + b * target_stride_b
    both = tl.zeros((BLOCK_P, BLOCK_G), compute)
    of_pred = tl.zeros((BLOCK_P, BLOCK_X), compute)
    of_target = tl.zeros((BLOCK_G, BLOCK_X), compute)
    for start in range(begin, end, BLOCK_X):
        x = start + tl.arange(0, BLOCK_X)
        inside = x < end
        q = tl.load(pred_rows + x[None, :] * pred_stride_x, mask=p_used[:, None] & inside[None, :], other=0.0)
        if LABELS:
            label = tl.load(target_image + x * target_stride_x, mask=inside, other=0)
            row = tl.where((label >= 1) & (label <= targets), label - 1 - first_target, -1).to(tl.int32)
            y = (row[None, :] == tl.arange(0, BLOCK_G)[:, None]).to(factor)
        else:
            y = tl.load(
                target_image + g[:, None] * target_stride_g + x[None, :] * target_stride_x,
                mask=g_used[:, None] & inside[None, :],
                other=0.0,
            ).to(factor)
        of_pred += q.to(compute)
        of_target += y.to(compute)
        if factor == tl.float32:
            q_high, q_low = high_and_low(q.to(factor))
            if LABELS:
                of_tile = tl.dot(q_low, tl.trans(y), input_precision="tf32")
            else:
                y, y_low = high_and_low(y)
                of_tile = tl.dot(q_low, tl.trans(y), input_precision="tf32")
                of_tile = tl.dot(q_high, tl.trans(y_low), of_tile, input_precision="tf32")
            of_tile = tl.dot(q_high, tl.trans(y), of_tile, input_precision="tf32")
            both += of_tile  # rounded to nearest; tensor cores add to what they have and cut
        else:
            both = tl.dot(q.to(factor), tl.trans(y), both, input_precision="ieee", out_dtype=compute)

    here = sums + program.to(tl.int64) * (P * (G + 1) + G)
    p_there = p < P
    g_there = g < G
    tl.store(here + p[:, None] * (G + 1) + g[None, :], both, mask=p_there[:, None] & g_there[None, :])
    tl.store(here + p * (G + 1) + G, tl.sum(of_pred, 1), mask=p_there & (g_block == 0))
    tl.store(here + P * (G + 1) + g, tl.sum(of_target, 1), mask=g_there & (p_block == 0))


@triton.jit
def soft_iou_finish_kernel(
    sums,  # [B, S, P * (G + 1) + G]
    num_pred,  # [B] or None
    num_target,  # [B] or None
    iou,  # [B, P, G]
    union,  # [B, P, G]
    P,
    G,
    splits,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """``iou = Σqy / union`` with ``union = Σq + Σy − Σqy``, in fp64; both 0 where the union or the counts say so."""
    row = tl.program_id(0)  # b * P + p
    b = (row // P).to(tl.int64)
    p = row % P
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    split = tl.arange(0, BLOCK_S)
    there = g < G
    each = (split < splits)[:, None] & there[None, :]
    here = sums + (b * splits + split) * (P * (G + 1) + G)
    both = tl.sum(tl.load(here[:, None] + p * (G + 1) + g[None, :], mask=each, other=0.0).to(tl.float64), 0)
    of_pred = tl.sum(tl.load(here + p * (G + 1) + G, mask=split < splits, other=0.0).to(tl.float64), 0)
    of_target = tl.sum(tl.load(here[:, None] + P * (G + 1) + g[None, :], mask=each, other=0.0).to(tl.float64), 0)
    either = of_pred + of_target - both
    counts = either > 0
    if num_pred is not None:
        counts &= p < tl.load(num_pred + b)
    if num_target is not None:
        counts &= g < tl.load(num_target + b)
    at = row.to(tl.int64) * G + g
    dtype = iou.dtype.element_ty
    tl.store(iou + at, tl.where(counts, both / tl.where(counts, either, 1.0), 0.0).to(dtype), mask=there)
    tl.store(union + at, tl.where(counts, either, 0.0).to(dtype), mask=there)


@triton.jit
def soft_iou_backward_kernel(
    weight,  # [B, P, G]
    offset,  # [B, P]
    target,  # masks [B, G, N] or labels [B, N]
    out,  # [B, P, N]
    P,
    G,
    N,
    target_stride_b,
    target_stride_g,
    target_stride_x,
    LABELS: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """``out[p] = offset[p] + Σ_g weight[p, g] · y_g`` for one row and tile; targets of weight 0 are not read."""
    tiles = tl.cdiv(N, BLOCK_X)
    row = tl.program_id(0) // tiles  # b * P + p
    b = (row // P).to(tl.int64)
    row = row.to(tl.int64)
    x = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    inside = x < N
    compute = weight.dtype.element_ty
    value = tl.zeros((BLOCK_X,), compute) + tl.load(offset + row)
    target_pixels = target + b * target_stride_b + x * target_stride_x
    if LABELS:
        label = tl.load(target_pixels, mask=inside, other=0).to(tl.int64)
        known = (label >= 1) & (label <= G)
        value += tl.load(weight + row * G + label - 1, mask=known, other=0.0)
    else:
        for g in range(G):
            factor = tl.load(weight + row * G + g)
            if factor != 0:
                value += factor * tl.load(target_pixels, mask=inside, other=0.0).to(compute)
            target_pixels += target_stride_g
    tl.store(out + row * N + x, value.to(out.dtype.element_ty), mask=inside)
