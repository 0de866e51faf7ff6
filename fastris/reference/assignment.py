"""Reference ``assignment``: SciPy, one matrix after another."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

INFEASIBLE = 1
"""Status bit: forbidden edges left fewer than min(rows, columns) pairs."""

INVALID = 2
"""Status bit: NaN or -inf among the costs, replaced by the worst finite cost."""


class Assignment(NamedTuple):
    """Result of :func:`assignment`.

    Attributes:
        col_of_row: int64 (B, P), the column matched to each row, -1 where there is none.
        status: int32 (B,), 0 or a sum of :data:`INFEASIBLE` and :data:`INVALID`.
    """

    col_of_row: Tensor
    status: Tensor


def assignment(
    cost: Tensor,
    num_rows: Tensor | None = None,
    num_cols: Tensor | None = None,
    maximize: bool = False,
) -> Assignment:
    """Cheapest one-to-one assignment of every matrix in a batch, by :func:`scipy.optimize.linear_sum_assignment`.

    Args:
        cost: (B, P, G), any real dtype; widened to fp64. +inf (-inf when maximising) forbids an edge; NaN and the
            other infinity count as the worst finite cost among the rows and columns in use (0 if there is none).
        num_rows: (B,) integers, how many leading rows of each matrix are in use; by default P. Clamped to [0, P].
        num_cols: (B,) integers, the same for columns and G.
        maximize: look for the most expensive assignment.

    Returns:
        ``(col_of_row, status)`` on the device of ``cost``. Among min(rows, columns) pairs the sum is optimal. Where
        forbidden edges make that many impossible, rows (columns, if there are fewer of those) that cannot be added
        to the ones before them are skipped, and the status says so.

    Source:
        D. F. Crouse, "On implementing 2D rectangular assignment algorithms", IEEE TAES 52(4), 2016.
    """
    import numpy as np

    batch, rows, cols = cost.shape
    matrices = cost.detach().to("cpu", torch.float64).numpy()
    used_rows = _counts(num_rows, batch, rows)
    used_cols = _counts(num_cols, batch, cols)
    col_of_row = np.full((batch, rows), -1, dtype=np.int64)
    status = np.zeros(batch, dtype=np.int32)
    for index in range(batch):
        matrix = matrices[index, : used_rows[index], : used_cols[index]]
        pairs, status[index] = _solve(-matrix if maximize else matrix)
        col_of_row[index, pairs[0]] = pairs[1]
    device = cost.device
    return Assignment(torch.from_numpy(col_of_row).to(device), torch.from_numpy(status).to(device))


def _counts(counts: Tensor | None, batch: int, most: int) -> list[int]:
    return [most] * batch if counts is None else counts.clamp(0, most).tolist()


def _solve(matrix: Any) -> tuple[tuple[Any, Any], int]:
    """Row and column indices of the pairs, and the status, of one fp64 matrix to minimise."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    status = 0
    invalid = ~(matrix > -np.inf)  # NaN too
    if invalid.any():
        status |= INVALID
        finite = matrix[np.isfinite(matrix)]
        matrix = np.where(invalid, finite.max() if finite.size else 0.0, matrix)
    try:
        return linear_sum_assignment(matrix), status
    except ValueError:
        status |= INFEASIBLE
    transposed = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if transposed else matrix
    kept: list[int] = []
    for row in range(wide.shape[0]):
        try:
            linear_sum_assignment(wide[[*kept, row]])
        except ValueError:
            continue
        kept.append(row)
    positions, columns = linear_sum_assignment(wide[kept])
    pairs = (np.asarray(kept, dtype=np.int64)[positions], columns)
    return (pairs[::-1] if transposed else pairs), status
