// The rectangular linear assignment problem by shortest augmenting paths, one source for CPU and CUDA.
//
// D. F. Crouse, "On implementing 2D rectangular assignment algorithms", IEEE TAES 52(4), 2016, with the row order, scan
// order, tie rule and fp64 arithmetic of scipy.optimize.linear_sum_assignment, so that the indices agree with SciPy's
// one for one. Compile without floating point contraction: a fused multiply-add would break ties differently.
//
// Legend: P rows (predictions), G columns (targets) as the caller has them; n <= m the two sides as solved, where a
// matrix with more rows than columns is solved transposed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTRIS_HOST_DEVICE __host__ __device__
#else
#define FASTRIS_HOST_DEVICE
#endif

namespace fastris {

// Status bits of one matrix.
constexpr int32_t kAssignmentInfeasible = 1;  // fewer than min(P, G) pairs: forbidden edges left somebody out
constexpr int32_t kAssignmentInvalid = 2;     // NaN or -inf among the costs, replaced by the worst finite cost

// One matrix inside a batch. Offsets are 64-bit, and strides may be anything, so no copy and no transpose is needed.
template <typename T>
struct CostView {
  const T* data;
  int64_t row_stride;
  int64_t col_stride;
  bool maximize;
  double worst = 0;  // stands in for NaN and -inf

  FASTRIS_HOST_DEVICE double raw(int64_t row, int64_t col) const {
    const double value = static_cast<double>(data[row * row_stride + col * col_stride]);
    return maximize ? -value : value;
  }

  FASTRIS_HOST_DEVICE double operator()(int64_t row, int64_t col) const {
    const double value = raw(row, col);
    return value > -INFINITY ? value : worst;  // false for NaN too
  }
};

// Scratch of one matrix: 2m + n doubles, 3m + n int32 and m + n bytes, in that order.
struct AssignmentWorkspace {
  double* shortest;      // [m]
  double* dual_col;      // [m]
  double* dual_row;      // [n]
  int32_t* row_of_col;   // [m]
  int32_t* path;         // [m] row before the column on the shortest path
  int32_t* remaining;    // [m] columns not yet in the tree, in scan order
  int32_t* col_of_row;   // [n]
  uint8_t* col_in_tree;  // [m]
  uint8_t* row_in_tree;  // [n]

  static FASTRIS_HOST_DEVICE int64_t bytes(int64_t n, int64_t m) {
    const int64_t total = (2 * m + n) * static_cast<int64_t>(sizeof(double)) +
        (3 * m + n) * static_cast<int64_t>(sizeof(int32_t)) + m + n;
    return (total + 15) / 16 * 16;
  }

  FASTRIS_HOST_DEVICE AssignmentWorkspace(void* memory, int64_t n, int64_t m) {
    shortest = static_cast<double*>(memory);
    dual_col = shortest + m;
    dual_row = dual_col + m;
    row_of_col = reinterpret_cast<int32_t*>(dual_row + n);
    path = row_of_col + m;
    remaining = path + m;
    col_of_row = remaining + m;
    col_in_tree = reinterpret_cast<uint8_t*>(col_of_row + n);
    row_in_tree = col_in_tree + m;
  }
};

// Grows the shortest path tree from `start` until it meets a free column. Returns that column and its distance, or -1
// where every reachable column is taken. At most m rounds, since each moves one column into the tree.
template <typename Cost>
FASTRIS_HOST_DEVICE int32_t shortest_augmenting_path(
    const Cost& cost, const AssignmentWorkspace& work, int32_t n, int32_t m, int32_t start, double* distance) {
  for (int32_t row = 0; row < n; ++row) work.row_in_tree[row] = 0;
  for (int32_t col = 0; col < m; ++col) {
    work.col_in_tree[col] = 0;
    work.shortest[col] = INFINITY;
    work.remaining[col] = m - 1 - col;  // so that a constant matrix gives the identity
  }
  double reached = 0;
  int32_t row = start;
  for (int32_t num_remaining = m; num_remaining > 0; --num_remaining) {
    work.row_in_tree[row] = 1;
    double lowest = INFINITY;
    int32_t best = -1;
    for (int32_t k = 0; k < num_remaining; ++k) {
      const int32_t col = work.remaining[k];
      const double through = reached + cost(row, col) - work.dual_row[row] - work.dual_col[col];
      if (through < work.shortest[col]) {
        work.path[col] = row;
        work.shortest[col] = through;
      }
      const double candidate = work.shortest[col];
      if (candidate < lowest || (candidate == lowest && work.row_of_col[col] == -1)) {
        lowest = candidate;
        best = k;
      }
    }
    if (best < 0 || lowest == INFINITY) return -1;
    reached = lowest;
    const int32_t col = work.remaining[best];
    work.col_in_tree[col] = 1;
    if (work.row_of_col[col] == -1) {
      *distance = reached;
      return col;
    }
    row = work.row_of_col[col];
    work.remaining[best] = work.remaining[num_remaining - 1];
  }
  return -1;
}

// Solves n <= m. Rows without an augmenting path are left at -1; duals and matching stay as they were, and by the
// exchange property no later row could have helped them. Returns the number of such rows.
template <typename Cost>
FASTRIS_HOST_DEVICE int32_t
solve_wide(const Cost& cost, const AssignmentWorkspace& work, int32_t n, int32_t m) {
  for (int32_t row = 0; row < n; ++row) {
    work.dual_row[row] = 0;
    work.col_of_row[row] = -1;
  }
  for (int32_t col = 0; col < m; ++col) {
    work.dual_col[col] = 0;
    work.row_of_col[col] = -1;
    work.path[col] = -1;
  }
  int32_t skipped = 0;
  for (int32_t start = 0; start < n; ++start) {
    double distance = 0;
    const int32_t sink = shortest_augmenting_path(cost, work, n, m, start, &distance);
    if (sink < 0) {
      ++skipped;
      continue;
    }
    work.dual_row[start] += distance;
    for (int32_t row = 0; row < n; ++row) {
      if (work.row_in_tree[row] && row != start) {
        work.dual_row[row] += distance - work.shortest[work.col_of_row[row]];
      }
    }
    for (int32_t col = 0; col < m; ++col) {
      if (work.col_in_tree[col]) work.dual_col[col] -= distance - work.shortest[col];
    }
    int32_t col = sink;
    for (int32_t step = 0; step < n; ++step) {
      const int32_t row = work.path[col];
      const int32_t next = work.col_of_row[row];
      work.row_of_col[col] = row;
      work.col_of_row[row] = col;
      if (row == start) break;
      col = next;
    }
  }
  return skipped;
}

// Solves the leading num_rows x num_cols block of one P x G matrix; counts outside [0, P] and [0, G] are clamped.
// Writes col_of_row[P] (-1: unmatched) and returns the status bits.
template <typename T>
FASTRIS_HOST_DEVICE int32_t solve_assignment(
    CostView<T> cost, int64_t P, int64_t G, int64_t num_rows, int64_t num_cols, void* memory, int64_t* col_of_row) {
  for (int64_t row = 0; row < P; ++row) col_of_row[row] = -1;
  num_rows = num_rows < 0 ? 0 : (num_rows > P ? P : num_rows);
  num_cols = num_cols < 0 ? 0 : (num_cols > G ? G : num_cols);
  if (num_rows == 0 || num_cols == 0) return 0;

  int32_t status = 0;
  bool any_finite = false;
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t col = 0; col < num_cols; ++col) {
      const double value = cost.raw(row, col);
      if (!(value > -INFINITY)) {
        status |= kAssignmentInvalid;
      } else if (value < INFINITY && (!any_finite || value > cost.worst)) {
        any_finite = true;
        cost.worst = value;
      }
    }
  }

  const bool transposed = num_cols < num_rows;
  const int32_t n = static_cast<int32_t>(transposed ? num_cols : num_rows);
  const int32_t m = static_cast<int32_t>(transposed ? num_rows : num_cols);
  const AssignmentWorkspace work(memory, n, m);
  if (transposed) {
    const int64_t swapped = cost.row_stride;
    cost.row_stride = cost.col_stride;
    cost.col_stride = swapped;
  }
  if (solve_wide(cost, work, n, m) > 0) status |= kAssignmentInfeasible;
  for (int32_t row = 0; row < n; ++row) {
    const int32_t col = work.col_of_row[row];
    if (col < 0) continue;
    if (transposed) {
      col_of_row[col] = row;
    } else {
      col_of_row[row] = col;
    }
  }
  return status;
}

}  // namespace fastris
