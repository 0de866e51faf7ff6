// The rows at the start of a matrix whose nearest columns are all different, read in the caller's memory, before anything
// is copied. Where predictions are good these are all of them; the solver goes on after them.
#pragma once

#include "assignment_pack.h"

namespace fastris {
namespace {

#if defined(__AVX__)

// Of some rows side by side: the nearest column, whether another is as near, and a sum, which is finite where all is.
template <typename T>
struct NearestColumns {
  using Row = typename Square<T>::Row;
  Row least = Square<T>::all(static_cast<T>(INFINITY)), column = Square<T>::all(0), sum = Square<T>::all(0);
  decltype(least == least) tied{};

  FASTRIS_INLINE void look_at(Row cost, Row col) {
    const auto nearer = cost < least, as_near = cost == least;
    tied = (tied & ~nearer) | as_near;
    column = nearer ? col : column;
    least = nearer ? cost : least;
    sum += cost;
  }
};

// Gives the first rows their nearest column, as long as that is one, and free; returns how many rows that are. Where the
// caller's columns are contiguous: as many rows at a time as fit a register.
template <typename T>
FASTRIS_INLINE int64_t settle_greedily(
    const CostView<T>& cost, int64_t n, int64_t m, const AssignmentWorkspace<int64_t>& work) {
  using S = Square<T>;
  constexpr int64_t most = int64_t{1} << 24;  // whole numbers up to here are floats
  if (cost.row_stride != 1 || m > most) return 0;
  const typename S::Row sign = S::all(cost.maximize ? T(-0.0) : T(0.0)), one = S::all(1);
  std::fill_n(work.row_of_col, m, -1);
  for (int64_t start = 0; start < n; start += S::side) {
    const int64_t rows = std::min(S::side, n - start);
    NearestColumns<T> found;
    typename S::Row number = S::all(0);
    const T* column = cost.data + start;
    for (int64_t col = 0; col < m; ++col, column += cost.col_stride) {
      found.look_at(S::flip(S::load(column, rows), sign), number);
      number += one;
    }
    for (int64_t k = 0; k < rows; ++k) {
      const int64_t row = start + k, col = static_cast<int64_t>(found.column[k]);
      const bool finite = found.sum[k] - found.sum[k] == 0;
      if (!finite || found.tied[k] || work.row_of_col[col] >= 0) return row;
      work.row_of_col[col] = row;
      work.col_of_row[row] = col;
      work.dual_row[row] = found.least[k];
    }
  }
  return n;
}

#else

template <typename T>
int64_t settle_greedily(const CostView<T>&, int64_t, int64_t, const AssignmentWorkspace<int64_t>&) {
  return 0;
}

#endif

}  // namespace
}  // namespace fastris
