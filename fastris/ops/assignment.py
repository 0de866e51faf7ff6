"""``assignment``: the batched Hungarian problem, ``torch.ops.fastris.assignment``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastris import backend, reference
from fastris.ops.arguments import check_counts, describe
from fastris.ops.autograd import plain, untransformed
from fastris.reference.assignment import INFEASIBLE, INVALID, Assignment

__all__ = ["INFEASIBLE", "INVALID", "Assignment", "assignment", "linear_sum_assignment"]

Array = NDArray[Any]

# Schema

_SIGNATURE = "(Tensor cost, Tensor? num_rows=None, Tensor? num_cols=None, bool maximize=False) -> (Tensor, Tensor)"
_library = torch.library.Library("fastris", "FRAGMENT")
for _name in ("assignment", "assignment_reference"):
    _library.define(_name + _SIGNATURE)
# The native CPU kernel in a given number of SIMD lanes; 32 and 128 are what a CUDA warp and block compute, for tests.
_library.define(
    "assignment_lanes(Tensor cost, Tensor? num_rows, Tensor? num_cols, bool maximize, int lanes) -> (Tensor, Tensor)"
)

# Kernels: csrc/ registers the native ones; where it has none, and on demand, the reference runs


def _reference(
    cost: Tensor, num_rows: Tensor | None = None, num_cols: Tensor | None = None, maximize: bool = False
) -> tuple[Tensor, Tensor]:
    col_of_row, status = reference.assignment(cost, num_rows, num_cols, maximize)
    return col_of_row, status


for _name in ("assignment", "assignment_reference"):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")

# Fake kernel


def _fake(
    cost: Tensor, num_rows: Tensor | None = None, num_cols: Tensor | None = None, maximize: bool = False
) -> tuple[Tensor, Tensor]:
    batch, rows, _ = cost.shape
    return cost.new_empty((batch, rows), dtype=torch.int64), cost.new_empty((batch,), dtype=torch.int32)


for _name in ("assignment", "assignment_reference"):
    torch.library.register_fake(f"fastris::{_name}", _fake, lib=_library)

# The door

_assignment = torch.ops.fastris.assignment.default
_assignment_reference = torch.ops.fastris.assignment_reference.default


def assignment(
    cost: Tensor,
    num_rows: Tensor | None = None,
    num_cols: Tensor | None = None,
    maximize: bool = False,
) -> Assignment:
    """Cheapest one-to-one assignment of every matrix in a batch, on the device of the costs, without a host sync.

    Optimal and deterministic, with :func:`scipy.optimize.linear_sum_assignment`'s own choice among ties. Bad costs
    never raise: +inf (-inf when maximising) forbids an edge; NaN and the other infinity count as the worst finite
    cost among the rows and columns in use (0 if there is none); a row that cannot be matched gets -1. Not
    differentiable.

    Args:
        cost: (B, P, G), floating, integer or bool; solved in fp64.
        num_rows: (B,) integers on the same device, how many leading rows of each matrix are in use; by default P.
            Clamped to [0, P].
        num_cols: (B,) integers on the same device, the same for columns and G.
        maximize: look for the most expensive assignment.

    Returns:
        Assignment: ``col_of_row`` int64 (B, P), -1 for unmatched rows, and ``status`` int32 (B,): 0, or a sum of
        ``INFEASIBLE`` (1: forbidden edges left fewer than min(rows, columns) pairs; the rows, or the columns where
        there are fewer of those, that could not be added to the ones before them were skipped) and ``INVALID``
        (2: NaN or the wrong infinity was replaced).

    Raises:
        TypeError: ``cost`` is no tensor.
        ValueError: shapes, dtypes or devices that do not fit; the message names the argument.

    Source:
        D. F. Crouse, "On implementing 2D rectangular assignment algorithms", IEEE TAES 52(4), 2016.

    Example:
        >>> cost = torch.tensor([[[4.0, 1.0, 3.0], [2.0, 0.0, 5.0]]])
        >>> fastris.assignment(cost).col_of_row
        tensor([[1, 0]])
    """
    if not isinstance(cost, Tensor):
        raise TypeError(f"assignment: cost must be a tensor, got {type(cost).__name__}")
    as_it_is = cost.dtype in (torch.float32, torch.float64)
    if cost.dim() != 3 or not as_it_is and cost.is_complex():
        raise ValueError(f"assignment: cost must be real (B,P,G), got {describe(cost)}")
    if cost.requires_grad:
        cost = cost.detach()
    if not as_it_is:  # without rounding: halves fit fp32, integers up to 53 bits fit fp64
        cost = cost.to(torch.float32 if cost.is_floating_point() else torch.float64)
    # "auto" is what the dispatcher does anyway, sooner than Python can ask for the device.
    native = backend.active_backend() == "auto" or backend.runs_native("assignment", cost.device.type)
    operator = _assignment if native else _assignment_reference
    if num_rows is None and num_cols is None and not maximize:
        return Assignment(*operator(cost))  # 1.5 µs less than with arguments that say nothing
    rows = check_counts("assignment", "num_rows", num_rows, cost, "cost")
    cols = check_counts("assignment", "num_cols", num_cols, cost, "cost")
    return Assignment(*operator(cost, rows, cols, maximize))


def linear_sum_assignment(cost: Any, maximize: bool = False) -> tuple[Any, Any]:
    """:func:`scipy.optimize.linear_sum_assignment` for one matrix: same indices, same errors.

    Args:
        cost: (P, G) tensor on any device, or whatever NumPy makes an array of.
        maximize: look for the most expensive assignment.

    Returns:
        ``(row_ind, col_ind)``, int64 (min(P, G),) each, rows ascending: tensors on the device of a tensor, NumPy
        arrays otherwise. Reading the errors back from a GPU is a host sync; :func:`assignment` has none.

    Raises:
        ValueError: not a matrix; NaN or -inf (+inf when maximising) in it; no complete assignment.
        TypeError: complex costs.
    """
    if isinstance(cost, Tensor):
        _check_matrix(cost.is_complex(), cost.dim())
        if cost.device.type == "cpu" and untransformed() and plain((cost,)):
            pairs = _solve_matrix(cost.to(torch.float64).numpy(force=True), maximize)
            return torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1])
        return _solve_by_operator(cost, maximize)
    is_complex = np.iscomplexobj(cost)
    matrix = np.asarray(cost, dtype=None if is_complex else np.float64)
    _check_matrix(is_complex, matrix.ndim)
    return _solve_matrix(matrix, maximize)


def _check_matrix(is_complex: bool, dimensions: int) -> None:
    if is_complex:
        raise TypeError("linear_sum_assignment: cost must be real, got complex numbers")
    if dimensions != 2:
        raise ValueError(f"expected a matrix (2-D array), got a {dimensions} array")


def _check_status(status: int) -> None:
    if status & INVALID:
        raise ValueError("matrix contains invalid numeric entries")
    if status & INFEASIBLE:
        raise ValueError("cost matrix is infeasible")


def _solve_matrix(matrix: Array, maximize: bool) -> tuple[Array, Array]:
    """One fp64 matrix; natively without a tensor, since making one takes longer than solving a small matrix."""
    if backend.runs_native("assignment", "cpu"):
        status, *pairs = backend.extension().assign_matrix(matrix.tobytes(), *matrix.shape, maximize)
        _check_status(status)
        return np.frombuffer(pairs[0], np.int64), np.frombuffer(pairs[1], np.int64)
    row_ind, col_ind = _solve_by_operator(torch.from_numpy(matrix.copy()), maximize)
    return row_ind.numpy(), col_ind.numpy()


def _solve_by_operator(cost: Tensor, maximize: bool) -> tuple[Tensor, Tensor]:
    solution = assignment(cost[None], maximize=maximize)
    _check_status(int(solution.status))
    col_of_row = solution.col_of_row[0]
    row_ind = (col_of_row >= 0).nonzero()[:, 0]
    return row_ind, col_of_row[row_ind]
