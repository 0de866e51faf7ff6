"""Symmetric best Dice, and the Dice of foreground against background."""

from __future__ import annotations

import numpy as np

from fastris.metrics.overlap import LabelMap, Overlap, overlap


def best_dice(a: LabelMap, b: LabelMap) -> float:
    """Mean over the instances of `a` of the best Dice with any instance of `b`.

    1 if both are empty, 0 if only one is. Minervini et al., "Finely-grained annotated datasets for
    image-based plant phenotyping", 2016.

    Args:
        a, b: integer label maps (H, W), 0 = background.
    """
    return _best_dice(overlap(a, b).dice)


def symmetric_best_dice(pred: LabelMap, target: LabelMap) -> float:
    """SBD: the smaller of `best_dice(pred, target)` and `best_dice(target, pred)`, in [0, 1].

    Args:
        pred, target: integer label maps (H, W), 0 = background.
    """
    return symmetric_best_dice_from(overlap(pred, target))


def foreground_background_dice(pred: LabelMap, target: LabelMap) -> float:
    """Dice of everything labelled against everything labelled; 1 if both are empty."""
    return foreground_background_dice_from(overlap(pred, target))


def symmetric_best_dice_from(counts: Overlap) -> float:
    """:func:`symmetric_best_dice` from an overlap at hand."""
    return min(_best_dice(counts.dice), _best_dice(counts.dice.T))


def foreground_background_dice_from(counts: Overlap) -> float:
    """:func:`foreground_background_dice` from an overlap at hand."""
    total = int(counts.pred_areas.sum() + counts.target_areas.sum())
    return 2 * int(counts.intersection.sum()) / total if total else 1.0


def _best_dice(dice: np.ndarray) -> float:
    if 0 in dice.shape:
        return float(dice.shape == (0, 0))
    return float(dice.max(axis=1).mean())
