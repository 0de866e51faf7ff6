// The rectangular linear assignment problem by shortest augmenting paths, one source for CPU and CUDA.
//
// D. F. Crouse, "On implementing 2D rectangular assignment algorithms", IEEE TAES 52(4), 2016, with the row order, scan
// order, tie rule and fp64 arithmetic of scipy.optimize.linear_sum_assignment, so that the indices agree with SciPy's
// one for one. It is compiled without floating point contraction, which would round, and so break ties, differently.
//
// SciPy scans a list of open columns; here all columns are looked at side by side (lanes.h), and the list decides only
// between equal distances. Among those SciPy takes the last free column of its list, or the first one if none is free.
// So each open column has a key, m + position if it is free and -position if it is taken, and the largest key wins.
//
// Legend: P rows (predictions), G columns (targets) as the caller has them; n <= m the two sides as solved, where a
// matrix with more rows than columns is solved transposed. An open column is not yet in the tree of shortest paths; a
// free one is not yet matched.
#pragma once

#include "lanes.h"

namespace fastris {
namespace {

// Status bits of one matrix.
constexpr int32_t kAssignmentInfeasible = 1;  // fewer than min(P, G) pairs: forbidden edges left somebody out
constexpr int32_t kAssignmentInvalid = 2;     // NaN or -inf among the costs, replaced by the worst finite cost

// One matrix inside a batch, as the caller has it. Offsets are 64-bit, and strides may be anything.
template <typename T>
struct CostView {
  const T* data;
  int64_t row_stride;
  int64_t col_stride;
  bool maximize;

  FASTRIS_HOST_DEVICE T operator()(int64_t row, int64_t col) const {
    const T value = data[row * row_stride + col * col_stride];
    return maximize ? -value : value;
  }
  FASTRIS_HOST_DEVICE CostView transposed() const { return {data, col_stride, row_stride, maximize}; }
};

FASTRIS_HOST_DEVICE inline int64_t round_up(int64_t count, int64_t width) {
  return (count + width - 1) / width * width;
}

// A matrix as it is solved: rows of a padded length, the padding +inf, nothing NaN or -inf.
template <typename T>
struct PackedCost {
  const T* data;
  int64_t row_length;

  template <typename Lanes>
  FASTRIS_INLINE typename Lanes::Reals load(int64_t row, int64_t base) const {
    return Lanes::load(data + row * row_length, base);
  }
};

// Scratch of one matrix. All arrays are padded to a multiple of the lanes.
template <typename Index>
struct AssignmentWorkspace {
  double* dual_col;       // [m] -inf while the column is in the tree, which keeps it from being reached again
  double* distance;       // [m] of open columns from the tree; +inf in the tree
  double* dual_row;       // [n]
  double* tree_distance;  // [n] the columns of the tree in the order they joined: their distance,
  double* tree_dual;      // [n] their dual,
  Index* tree_col;        // [n] themselves,
  Index* tree_pos;        // [n] their place in SciPy's list,
  Index* tree_moved;      // [n] and the column that took this place
  Index* col_of_row;      // [n]
  Index* row_of_col;      // [m]
  Index* row_before;      // [m] row before the column on its shortest path
  Index* key;             // [m] which of several nearest columns goes first
  Index* open;            // [m] SciPy's list

  static FASTRIS_HOST_DEVICE int64_t bytes(int64_t padded_n, int64_t padded_m) {
    return padded_m * (2 * sizeof(double) + 4 * sizeof(Index)) + padded_n * (3 * sizeof(double) + 4 * sizeof(Index));
  }

  FASTRIS_HOST_DEVICE AssignmentWorkspace(void* memory, int64_t padded_n, int64_t padded_m) {
    dual_col = static_cast<double*>(memory);
    distance = dual_col + padded_m;
    dual_row = distance + padded_m;
    tree_distance = dual_row + padded_n;
    tree_dual = tree_distance + padded_n;
    tree_col = reinterpret_cast<Index*>(tree_dual + padded_n);
    tree_pos = tree_col + padded_n;
    tree_moved = tree_pos + padded_n;
    col_of_row = tree_moved + padded_n;
    row_of_col = col_of_row + padded_n;
    row_before = row_of_col + padded_m;
    key = row_before + padded_m;
    open = key + padded_m;
  }
};

template <typename Lanes, typename Cost>
class AssignmentSolver {
  using Index = typename Lanes::Index;
  using Reals = typename Lanes::Reals;
  using Indices = typename Lanes::Indices;

 public:
  FASTRIS_INLINE AssignmentSolver(Cost cost, AssignmentWorkspace<Index> work, int32_t n, int32_t m)
      : cost_(cost), work_(work), n_(n), m_(m), padded_m_(static_cast<int32_t>(round_up(m, Lanes::width))) {}

  // Matches the rows in order. A row without an augmenting path is left at -1; duals and matching stay as they were,
  // and by the exchange property no later row could have helped it. Returns whether there was none. The first `settled`
  // rows have their nearest columns, all different, in `col_of_row`, and those distances in `dual_row`.
  FASTRIS_INLINE bool solve(int32_t settled = 0) {
    begin(settled);
    bool complete = true;
    for (int32_t row = settled; row < n_; ++row) complete &= match(row);
    return complete;
  }

 protected:
  FASTRIS_INLINE void begin(int32_t settled) {
    const Indices unmatched = Lanes::all(static_cast<Index>(-1));
    for (int32_t base = 0; base < padded_m_; base += Lanes::width) {
      const Indices home = Lanes::all(static_cast<Index>(m_ - 1)) - Lanes::numbers(base);
      Lanes::store(work_.dual_col, base, Lanes::all(0.0));
      Lanes::store(work_.row_of_col, base, unmatched);
      Lanes::store(work_.open, base, home);  // its own inverse: column m - 1 - k is at place k
      Lanes::store(work_.key, base, home + Lanes::all(static_cast<Index>(m_)));
    }
    for (int32_t row = settled + Lanes::lane(); row < n_; row += Lanes::stride()) work_.col_of_row[row] = -1;
    Lanes::sync();
    for (int32_t row = 0; row < settled; ++row) {
      const Index col = work_.col_of_row[row];
      if (Lanes::leader()) work_.row_of_col[col] = row;
      take(col, work_.dual_row[row]);
    }
    Lanes::sync();
  }

  // Matches one more row; false where forbidden edges leave it no way to a free column.
  FASTRIS_INLINE bool match(int32_t start) {
    double reached = reach_from(start);
    if (reached == INFINITY) return false;
    Index key = best_key(reached);
    if (key >= m_) {  // most rows end here: their nearest column is free
      match_at_once(start, key, reached);
      return true;
    }

    // Grow the tree of shortest paths over taken columns until the nearest open column is a free one. Each matched row
    // joins once, which bounds the loop.
    plant(start);
    int32_t size = 0;
    while (key < m_ && size < start) {
      const Index row = join(size, -key, reached);
      ++size;
      reached = relax(row, reached, work_.dual_row[row]);
      if (reached == INFINITY) break;
      key = best_key(reached);
    }
    joins_ += size;
    finish(start, size, key, reached);
    return key >= m_;
  }

  // With its nearest column, which is free.
  FASTRIS_INLINE void match_at_once(int32_t start, Index key, double reached) {
    const Index col = work_.open[key - m_];
    if (Lanes::leader()) {
      work_.dual_row[start] = reached;
      work_.col_of_row[start] = col;
      work_.row_of_col[col] = start;
    }
    take(col, reached);
    Lanes::sync();
  }

  // The tree is its root.
  FASTRIS_INLINE void plant(int32_t start) {
    for (int32_t base = 0; base < padded_m_; base += Lanes::width) {
      Lanes::store(work_.row_before, base, Lanes::all(static_cast<Index>(start)));
    }
  }

  // Takes a tree of this size down; if its nearest column has the key of a free one, the root's row is matched.
  FASTRIS_INLINE void finish(int32_t start, int32_t size, Index key, double reached) {
    const bool found = key >= m_;
    const Index sink = found ? work_.open[key - m_] : -1;
    Lanes::sync();  // before the list is put in order again
    for (int32_t k = Lanes::lane(); k < size; k += Lanes::stride()) leave(k, reached, found);
    Lanes::sync();
    if (found && Lanes::leader()) {
      work_.dual_row[start] = reached;
      augment(start, sink);
    }
    Lanes::sync();
    if (found) take(sink, reached);
  }

  // Distances from a row that is not matched yet; returns the least.
  FASTRIS_INLINE double reach_from(int32_t row) const {
    Reals least = Lanes::all(static_cast<double>(INFINITY));
    for (int32_t base = 0; base < padded_m_; base += Lanes::width) {
      const Reals through = cost_.template load<Lanes>(row, base) - Lanes::load(work_.dual_col, base);
      const Reals distance = Lanes::smaller(through, Lanes::all(static_cast<double>(INFINITY)));  // NaN is no distance
      Lanes::store(work_.distance, base, distance);
      least = Lanes::smaller(distance, least);
    }
    return Lanes::least(least);
  }

  // Distances by way of a row that has just joined; returns the least distance of an open column.
  FASTRIS_INLINE double relax(Index row, double reached, double dual) const {
    const Reals before = Lanes::all(reached), own = Lanes::all(dual);
    Reals least = Lanes::all(static_cast<double>(INFINITY));
    for (int32_t base = 0; base < padded_m_; base += Lanes::width) {
      const Reals through =
          before + cost_.template load<Lanes>(row, base) - own - Lanes::load(work_.dual_col, base);  // SciPy's order
      const Reals known = Lanes::load(work_.distance, base);
      const auto shorter = Lanes::less(through, known);
      const Reals distance = Lanes::select(shorter, through, known);
      Lanes::store(work_.distance, base, distance);
      const Indices by = Lanes::all(row);
      Lanes::store(work_.row_before, base, Lanes::select(shorter, by, Lanes::load(work_.row_before, base)));
      least = Lanes::smaller(distance, least);
    }
    return Lanes::least(least);
  }

  // The largest key among the open columns at this distance.
  FASTRIS_INLINE Index best_key(double nearest) const {
    return Lanes::greatest_key(work_.distance, nearest, work_.key, static_cast<Index>(-m_), padded_m_);
  }

  // Moves the taken column at a place of the list into the tree, and the list's last column to its place. Returns the
  // column's row.
  FASTRIS_INLINE Index join(int32_t size, Index pos, double reached) {
    return join(size, pos, work_.open[pos], reached);
  }
  FASTRIS_INLINE Index join(int32_t size, Index pos, Index col, double reached) {
    const Index moved = work_.open[m_ - 1 - size];
    const Index row = work_.row_of_col[col];
    Lanes::sync();  // all lanes have read what the leader now changes
    if (Lanes::leader()) {
      work_.tree_distance[size] = reached;
      work_.tree_dual[size] = work_.dual_col[col];
      work_.tree_col[size] = col;
      work_.tree_pos[size] = pos;
      work_.tree_moved[size] = moved;
      work_.open[pos] = moved;
    }
    Lanes::sync();
    Lanes::put(work_.dual_col, col, -static_cast<double>(INFINITY));
    Lanes::put(work_.distance, col, static_cast<double>(INFINITY));
    Lanes::put(work_.key, moved, static_cast<Index>(work_.row_of_col[moved] < 0 ? m_ + pos : -pos));
    return row;
  }

  // Takes the k-th column back out of the tree, updates its dual and its row's where the tree found a free column, and
  // puts the list in order again. A place or column that changed twice is written twice, with the same value.
  FASTRIS_INLINE void leave(int32_t k, double reached, bool found) {
    const Index col = work_.tree_col[k], pos = work_.tree_pos[k], moved = work_.tree_moved[k];
    const double change = found ? reached - work_.tree_distance[k] : 0.0;
    work_.dual_col[col] = work_.tree_dual[k] - change;
    work_.dual_row[work_.row_of_col[col]] += change;
    work_.open[pos] = m_ - 1 - pos;
    const Index home = m_ - 1 - moved;
    work_.key[moved] = work_.row_of_col[moved] < 0 ? m_ + home : -home;
  }

  // Along the shortest path, gives each row the column after it.
  FASTRIS_INLINE void augment(int32_t start, Index sink) {
    Index col = sink;
    for (int32_t step = 0; step < n_; ++step) {
      const Index row = work_.row_before[col];
      const Index next = work_.col_of_row[row];
      work_.col_of_row[row] = col;
      work_.row_of_col[col] = row;
      if (row == start) break;
      col = next;
    }
  }

  FASTRIS_INLINE void take(Index col, double reached) {
    Lanes::put(work_.key, col, static_cast<Index>(col - (m_ - 1)));
    // SciPy's update of the dual by reached - reached, which is nothing unless costs have overflowed
    if (reached == -INFINITY) Lanes::put(work_.dual_col, col, static_cast<double>(NAN));
  }

  Cost cost_;
  AssignmentWorkspace<Index> work_;
  int32_t n_, m_, padded_m_;
  int64_t joins_ = 0;  // in all searches
};

}  // namespace
}  // namespace fastris
