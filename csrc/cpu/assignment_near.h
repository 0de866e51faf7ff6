// Shortest augmenting paths over the near columns of each row, with the very results of looking at all columns.
//
// Late rows of a large matrix let hundreds of matched rows join their tree, while of each of these few columns are near
// enough to matter. So each row keeps its near columns: those whose distance, cost less dual, is below a bound. Duals
// fall, but for rounding, so that the others stay beyond it. Until what is reached gets as far as the bound of a row in
// the tree, no other column of that row can be reached next. Once it does, the row is widened: it is looked at as a
// whole, and gets new near columns after the search. Bounds are compared with a margin for rounding; all that decides
// is in SciPy's arithmetic.
#pragma once

#include "../assignment.h"

#include <algorithm>

namespace fastris {
namespace {

// Near columns of a row, the nearest first as far as the lower bound goes.
struct NearColumns {
  static constexpr int32_t most = 64;  // a bit each
  static constexpr int32_t unknown = -1;

  int32_t count;  // or unknown
  int32_t few;  // of them are below the lower bound
  double lower_bound, bound;
  double cost[most];
  int32_t col[most];

  // Asks for what a search reads first.
  FASTRIS_INLINE void fetch() const {
    __builtin_prefetch(this);
    __builtin_prefetch(cost + 5);
    __builtin_prefetch(col);
  }
};

// The nearest open column; of several the one with the largest key.
struct Nearest {
  double distance;
  int64_t key, col;

  FASTRIS_INLINE void consider(double other, int64_t other_key, int64_t other_col) {
    const bool better = other < distance || (other == distance && other_key > key);
    distance = better ? other : distance;
    key = better ? other_key : key;
    col = better ? other_col : col;
  }
};

// Scratch of a search among near columns beside that of the solver.
struct NearWorkspace {
  static constexpr int64_t block = 32;  // columns
  static constexpr int64_t blocks_together = 8;

  NearColumns* near;  // [n]
  double* least;  // [blocks] distance of the columns of a block
  double* limit;  // [n] rows of the tree in the order in which they joined: from where on they have to be widened
  int64_t* place;  // [n] of a row in the tree: where it is in that order
  int64_t* widened;  // [n] rows that were looked at as a whole in this search

  // Smaller ones are looked at as a whole as quickly.
  static bool serves(int64_t n, int64_t m) { return n >= 128 && m >= 256; }

  static int64_t blocks(int64_t padded_m) { return round_up(padded_m, blocks_together * block) / block; }

  static int64_t bytes(int64_t n, int64_t padded_m) {
    return n * static_cast<int64_t>(sizeof(NearColumns) + sizeof(double) + 2 * sizeof(int64_t)) +
        blocks(padded_m) * static_cast<int64_t>(sizeof(double));
  }

  NearWorkspace(void* memory, int64_t n, int64_t padded_m) {
    near = static_cast<NearColumns*>(memory);
    least = reinterpret_cast<double*>(near + n);
    limit = least + blocks(padded_m);
    place = reinterpret_cast<int64_t*>(limit + n);
    widened = place + n;
  }
};

template <typename Lanes>
class NearSolver : AssignmentSolver<Lanes, PackedCost<double>> {
  using Solver = AssignmentSolver<Lanes, PackedCost<double>>;
  using Reals = typename Lanes::Reals;
  using Solver::cost_, Solver::work_, Solver::n_, Solver::m_, Solver::padded_m_;

  static constexpr int32_t kBlock = NearWorkspace::block;
  static constexpr int32_t kGroups = 32;
  static constexpr double kRounding = 4e-15;  // more than a distance and its limit are rounded by, of what is added up
  static constexpr double kLarge = 1e280;

 public:
  FASTRIS_INLINE
  NearSolver(PackedCost<double> cost, AssignmentWorkspace<int64_t> work, NearWorkspace near, int32_t n, int32_t m)
      : Solver(cost, work, n, m),
        near_(near),
        blocks_(static_cast<int32_t>(NearWorkspace::blocks(padded_m_))) {}

  // As AssignmentSolver::solve().
  FASTRIS_INLINE bool solve(int32_t settled) {
    this->begin(settled);
    int32_t row = settled;
    for (; row < n_ && !worthwhile(row); ++row) complete_ &= Solver::match(row);
    if (row < n_) know_rows(row);
    for (; row < n_ && !futile_; ++row) *this = after(*this, row);
    for (; row < n_; ++row) complete_ &= Solver::match(row);
    return complete_;
  }

 private:
  // Whether it pays to find the near columns of all rows before this one: at four times the average so far, for rows
  // are the harder to match the later they come, what is left lets each of them join once.
  FASTRIS_INLINE bool worthwhile(int64_t row) const {
    return this->joins_ > n_ / 4 && 4 * this->joins_ * (n_ - row) > n_ * row;
  }

  FASTRIS_INLINE void know_rows(int32_t matched) {
    for (int32_t col = 0; col < m_; ++col) lowest_dual_ = std::min(lowest_dual_, work_.dual_col[col]);
    futile_ = !(lowest_dual_ > -kLarge);
    if (futile_) return;
    for (int32_t k = 0; k < blocks_; ++k) near_.least[k] = INFINITY;
    for (int32_t row = 0; row < matched; ++row) know(row);
  }

  // Finds the near columns of a row, while nothing is in the tree.
  FASTRIS_INLINE void know(int32_t row) const {
    static_cast<void>(this->reach_from(row));
    choose(row);
  }

  // Those of a row whose distances have just been computed: of the nearest ones of 32 groups of columns, about half are
  // below their mean, and so are some 30 columns. Where costs are so uneven that they are too many, of a lower bound.
  // Without any where numbers might overflow.
  FASTRIS_INLINE void choose(int32_t row) const {
    constexpr int32_t vectors = kGroups / Lanes::width;
    Reals group[vectors];
    for (Reals& least : group) least = Lanes::all(static_cast<double>(INFINITY));
    int32_t base = 0;
    for (; base + kGroups <= padded_m_; base += kGroups) {
#pragma GCC unroll 16
      for (int32_t k = 0; k < vectors; ++k) {
        group[k] = Lanes::smaller(Lanes::load(work_.distance, base + k * Lanes::width), group[k]);
      }
    }
    for (int32_t k = 0; base < padded_m_; base += Lanes::width, ++k) {
      group[k] = Lanes::smaller(Lanes::load(work_.distance, base), group[k]);
    }
    Reals sum = Lanes::all(0.0), least = group[0];
    for (const Reals& of_group : group) {
      sum += of_group;
      least = Lanes::smaller(of_group, least);
    }
    const double nearest = Lanes::least(least);
    double sums[Lanes::width], bound = 0;
    std::memcpy(sums, &sum, sizeof sums);
    for (const double of_lane : sums) bound += of_lane / kGroups;
    NearColumns& near = near_.near[row];
    near.count = NearColumns::unknown;
    if (!(nearest > -kLarge)) return;
    for (int32_t tries = 0; tries < 3 && bound < kLarge; ++tries) {
      near.bound = bound;
      near.lower_bound = nearest + (bound - nearest) / 4;
      if (take(row, near)) return;
      bound = near.lower_bound;
    }
  }

  // Takes the columns below the bound; false if they are too many.
  FASTRIS_INLINE bool take(int32_t row, NearColumns& near) const {
    const Reals lower_bound = Lanes::all(near.lower_bound), bound = Lanes::all(near.bound);
    int32_t other[NearColumns::most];
    int32_t few = 0, others = 0;
    for (int32_t start = 0; start < padded_m_; start += 64) {
      const int32_t columns = std::min(64, padded_m_ - start);
      uint64_t below_lower = 0, below = 0;
#pragma GCC unroll 16
      for (int32_t k = 0; k < columns; k += Lanes::width) {
        const Reals distance = Lanes::load(work_.distance, start + k);
        below_lower |= Lanes::bits(Lanes::less(distance, lower_bound)) << k;
        below |= Lanes::bits(Lanes::less(distance, bound)) << k;
      }
      if (few + others + __builtin_popcountll(below | below_lower) > NearColumns::most) return false;
      for (below &= ~below_lower; below; below &= below - 1) other[others++] = start + __builtin_ctzll(below);
      for (; below_lower; below_lower &= below_lower - 1) near.col[few++] = start + __builtin_ctzll(below_lower);
    }
    near.few = few;
    near.count = few + others;
    for (int32_t k = 0; k < others; ++k) near.col[few + k] = other[k];
    for (int32_t k = 0; k < near.count; ++k) near.cost[k] = cost_.data[row * cost_.row_length + near.col[k]];
    return true;
  }

  // Matches one more row. A function of its own, which takes all registers there are, and of values, so that the
  // solver's pointers stay in the caller's.
  __attribute__((noinline)) static NearSolver after(NearSolver solver, int32_t row) {
    solver.complete_ &= solver.match(row);
    return solver;
  }

  // As AssignmentSolver::match().
  FASTRIS_INLINE bool match(int32_t start) {
    double reached = this->reach_from(start);
    if (reached == INFINITY) return false;
    choose(start);
    int64_t key = this->best_key(reached);
    if (key >= m_) {
      this->match_at_once(start, key, reached);
      return true;
    }
    this->plant(start);
    summarize();
    double end = nearest_free(), limit = INFINITY;
    int64_t col = work_.open[-key];
    int32_t size = 0, num_widened = 0;
    while (key < m_ && size < start) {
      near_.near[work_.row_of_col[col]].fetch();
      const int64_t row = this->join(size, -key, col, reached);
      summarize_block(static_cast<int32_t>(col / kBlock));
      Nearest next = nearest();
      const NearColumns& near = near_.near[row];
      const double dual = work_.dual_row[row];
      near_.place[row] = size;
      near_.limit[size] = INFINITY;
      if (near.count == NearColumns::unknown) {
        static_cast<void>(this->relax(row, reached, dual));
        summarize();
        next = nearest();
        near_.widened[num_widened++] = row;
      } else {
        const double terms = std::abs(reached) + std::abs(dual) + std::abs(near.lower_bound) + std::abs(near.bound);
        const double margin = kRounding * (terms - lowest_dual_ + raised_) + raised_;
        const bool few = reached + (near.lower_bound - dual) - margin > end;
        relax_near(row, near, few ? near.few : near.count, reached, dual, end, next);
        const double from = reached + (near.bound - dual) - margin;
        near_.limit[size] = from > -INFINITY ? from : -INFINITY;  // NaN: now
        limit = std::min(limit, near_.limit[size]);
      }
      ++size;
      while (limit < INFINITY && next.distance >= limit) {
        int32_t place = 0;
        while (near_.limit[place] != limit) ++place;
        near_.widened[num_widened++] = widen(place);
        near_.limit[place] = limit = INFINITY;
        for (int32_t k = 0; k < size; ++k) limit = std::min(limit, near_.limit[k]);
        next = nearest();
      }
      reached = next.distance;
      if (reached == INFINITY) break;
      key = next.key;
      col = next.col;
    }
    this->finish(start, size, key, reached);
    if (key >= m_) note_duals(size, reached);
    for (int32_t k = 0; k < num_widened; ++k) know(static_cast<int32_t>(near_.widened[k]));
    near_joins_ += size;
    widenings_ += num_widened;
    futile_ |= widenings_ > 64 + near_joins_ / 2 || !(lowest_dual_ > -kLarge && raised_ < kLarge);
    return key >= m_;
  }

  // After a search: the dual of each column of the tree has fallen by what was reached less its distance, a difference
  // that rounding may have made negative.
  FASTRIS_INLINE void note_duals(int32_t size, double reached) {
    double first = reached, last = reached;
    for (int32_t k = 0; k < size; ++k) {
      first = std::min(first, work_.tree_distance[k]);
      last = std::max(last, work_.tree_distance[k]);
    }
    lowest_dual_ -= reached - first;
    raised_ += last - reached;
  }

  // Distances by way of the first `count` near columns of a row. `end` is the least distance known of a free column,
  // where the search ends at the latest, and `next` the nearest open column; both are kept up.
  FASTRIS_INLINE void relax_near(
      int64_t row, const NearColumns& near, int32_t count, double reached, double dual, double& end,
      Nearest& next) const {
    double through[NearColumns::most];
    uint64_t shorter = 0;
    for (int32_t k = 0; k < count; ++k) {
      const int32_t col = near.col[k];
      through[k] = reached + near.cost[k] - dual - work_.dual_col[col];  // SciPy's order
      shorter |= static_cast<uint64_t>((through[k] < work_.distance[col]) & (through[k] <= end)) << k;
    }
    for (; shorter; shorter &= shorter - 1) {
      const int32_t k = __builtin_ctzll(shorter), col = near.col[k];
      const int64_t key = work_.key[col];
      set_distance(col, through[k], row);
      next.consider(through[k], key, col);
      if (key >= m_) end = std::min(end, through[k]);
    }
  }

  FASTRIS_INLINE void set_distance(int32_t col, double distance, int64_t row) const {
    work_.distance[col] = distance;
    work_.row_before[col] = row;
    double& least = near_.least[col / kBlock];
    least = std::min(least, distance);
  }

  // Distances by way of all columns of the row that joined at this place. It may come after rows that joined later: of
  // several that a column is as near to, the first one stays its row before. Returns the row.
  FASTRIS_INLINE int64_t widen(int32_t place) const {
    const int64_t row = work_.row_of_col[work_.tree_col[place]];
    const Reals infinity = Lanes::all(static_cast<double>(INFINITY));
    const Reals before = Lanes::all(work_.tree_distance[place]), own = Lanes::all(work_.dual_row[row]);
    for (int32_t base = 0; base < padded_m_; base += Lanes::width) {
      const Reals through = before + cost_.template load<Lanes>(row, base) - own - Lanes::load(work_.dual_col, base);
      const Reals known = Lanes::load(work_.distance, base);
      const auto shorter = Lanes::less(through, known);
      const auto as_short = Lanes::equal(through, known) & Lanes::less(known, infinity);
      Lanes::store(work_.distance, base, Lanes::select(shorter, through, known));
      const auto by = Lanes::all(row);
      Lanes::store(work_.row_before, base, Lanes::select(shorter, by, Lanes::load(work_.row_before, base)));
      for (uint64_t tied = Lanes::bits(as_short); tied; tied &= tied - 1) {
        int64_t& other = work_.row_before[base + __builtin_ctzll(tied)];
        const bool is_root = work_.col_of_row[other] < 0;
        if (!is_root && near_.place[other] > place) other = row;
      }
    }
    summarize();
    return row;
  }

  FASTRIS_INLINE void summarize_block(int32_t block) const {
    const int32_t begin = block * kBlock, end = std::min(begin + kBlock, padded_m_);
    Reals least = Lanes::all(static_cast<double>(INFINITY));
    for (int32_t base = begin; base < end; base += Lanes::width) {
      least = Lanes::smaller(Lanes::load(work_.distance, base), least);
    }
    near_.least[block] = Lanes::least(least);
  }

  FASTRIS_INLINE void summarize() const {
    for (int32_t block = 0; block * kBlock < padded_m_; ++block) summarize_block(block);
  }

  // One block after the other: the least of some has just been stored, for which a load of lanes would wait.
  FASTRIS_INLINE Nearest nearest() const {
    double least[4] = {INFINITY, INFINITY, INFINITY, INFINITY};
    for (int32_t first = 0; first < blocks_; first += 4) {
      for (int32_t k = 0; k < 4; ++k) least[k] = std::min(near_.least[first + k], least[k]);
    }
    Nearest result{std::min(std::min(least[0], least[1]), std::min(least[2], least[3])), -m_, 0};
    for (int32_t first = 0; first < blocks_; first += NearWorkspace::blocks_together) {
      uint64_t blocks = Lanes::equal_bits(near_.least + first, result.distance, NearWorkspace::blocks_together);
      for (; blocks; blocks &= blocks - 1) {
        const int32_t begin = (first + __builtin_ctzll(blocks)) * kBlock;
        const int32_t columns = std::min(kBlock, padded_m_ - begin);
        uint64_t found = Lanes::equal_bits(work_.distance + begin, result.distance, columns);
        for (; found; found &= found - 1) {
          const int32_t col = begin + __builtin_ctzll(found);
          result.consider(result.distance, work_.key[col], col);
        }
      }
    }
    return result;
  }

  FASTRIS_INLINE double nearest_free() const {
    const auto taken_below = Lanes::all(static_cast<int64_t>(m_));
    Reals least = Lanes::all(static_cast<double>(INFINITY));
    for (int32_t base = 0; base < padded_m_; base += Lanes::width) {
      const auto is_taken = Lanes::load(work_.key, base) < taken_below;
      least = Lanes::select(is_taken, least, Lanes::smaller(Lanes::load(work_.distance, base), least));
    }
    return Lanes::least(least);
  }

  NearWorkspace near_;
  int32_t blocks_;
  bool complete_ = true, futile_ = false;
  double lowest_dual_ = 0;  // of a column, or less
  double raised_ = 0;  // by how much rounding has raised one, or more
  int64_t near_joins_ = 0, widenings_ = 0;  // since near columns are known
};

}  // namespace
}  // namespace fastris
