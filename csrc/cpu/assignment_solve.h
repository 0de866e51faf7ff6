// Solving the images of a batch one after the other, in the instruction set of the file that includes this: everything
// but the entry points has internal linkage, so that no such code runs on a machine without those instructions.
#pragma once

#include "assignment_greedy.h"
#include "assignment_near.h"

#include <type_traits>

namespace fastris {

// A batch of P x G matrices as plain pointers: asking a tensor costs a call through the ABI.
template <typename T>
struct AssignmentBatch {
  const T* cost;
  int64_t batch_stride, row_stride, col_stride;
  bool maximize;
  int64_t P, G;
  const int64_t* num_rows;  // or null
  const int64_t* num_cols;  // or null
  int64_t* col_of_row;
  int32_t* status;
};

// Solve images begin .. end - 1 with scratch at a 64-byte boundary.
template <typename T>
using SolveImages = void (*)(const AssignmentBatch<T>& batch, int64_t begin, int64_t end, char* scratch);

template <typename T>
void solve_images_avx2(const AssignmentBatch<T>& batch, int64_t begin, int64_t end, char* scratch);
template <typename T>
void solve_images_avx512(const AssignmentBatch<T>& batch, int64_t begin, int64_t end, char* scratch);
template <int N, typename T>
void solve_images_emulated(const AssignmentBatch<T>& batch, int64_t begin, int64_t end, char* scratch);

namespace {

constexpr int64_t kCacheLine = 64;  // bytes; lanes that straddle two lines cost twice
constexpr int64_t kFirstLevel = int64_t{1} << 15, kSecondLevel = int64_t{1} << 18;  // bytes of cache
constexpr int64_t kMostLanes = 128;

// What costs are solved in: fp32 widened once, not whenever a row is looked at; emulated lanes leave it as a GPU does.
template <int N, typename T>
using Solved = std::conditional_t<(N < 32), double, T>;

// Scratch for any matrix of a batch with any number of lanes: of the solver, the packed costs, and near columns.
inline int64_t solver_bytes(int64_t n, int64_t m) {
  return round_up(AssignmentWorkspace<int64_t>::bytes(round_up(n, kMostLanes), round_up(m, kMostLanes)), kCacheLine);
}
inline int64_t packed_bytes(int64_t n, int64_t m) {
  return n * round_up(m, kMostLanes) * static_cast<int64_t>(sizeof(double));
}
inline int64_t scratch_bytes(int64_t n, int64_t m) {
  const int64_t near = NearWorkspace::serves(n, m) ? NearWorkspace::bytes(n, round_up(m, kMostLanes)) : 0;
  return solver_bytes(n, m) + packed_bytes(n, m) + near;
}

// Asks for a whole matrix in the order in which it lies in memory: what reads its columns side by side jumps, which the
// processor's own prefetcher follows badly. That runs ahead of loads, though not of prefetch instructions, which do not
// wait: loads are quicker where most of the matrix comes from memory, as a large one does.
template <typename T>
FASTRIS_INLINE void fetch(const CostView<T>& cost, int64_t n, int64_t m) {
  constexpr int64_t size = sizeof(T), line = kCacheLine / size;
  const int64_t length = (m - 1) * cost.col_stride + n;
  if (cost.row_stride != 1 || cost.col_stride > 2 * n || length * size > kSecondLevel) return;
  if (length * size > kFirstLevel) {
    for (int64_t i = 0; i < length; i += line) static_cast<void>(*static_cast<const volatile T*>(cost.data + i));
  } else {
    for (int64_t i = 0; i < length; i += line) __builtin_prefetch(cost.data + i, 0, 2);
  }
}

// A function of its own, so that the compiler makes small matrices no slower.
template <int N>
__attribute__((noinline)) bool solve_large(
    PackedCost<double> cost, AssignmentWorkspace<int64_t> work, int32_t n, int32_t m, int32_t settled, char* scratch) {
  return NearSolver<VectorLanes<N>>(cost, work, NearWorkspace(scratch, n, cost.row_length), n, m).solve(settled);
}

template <int N, typename T>
FASTRIS_INLINE bool solve_packed(
    const Packed<T>& packed, const AssignmentWorkspace<int64_t>& work, int32_t settled, char* scratch) {
  const PackedCost<T> cost{packed.data, packed.row_length};
  const int32_t n = static_cast<int32_t>(packed.n), m = static_cast<int32_t>(packed.m);
  if constexpr (N < 32) {
    if (NearWorkspace::serves(n, m)) return solve_large<N>(cost, work, n, m, settled, scratch);
  }
  return AssignmentSolver<VectorLanes<N>, PackedCost<T>>(cost, work, n, m).solve(settled);
}

template <int N, typename T>
FASTRIS_INLINE int32_t solve_image(const AssignmentBatch<T>& batch, int64_t b, char* scratch) {
  int64_t* col_of_row = batch.col_of_row + b * batch.P;
  std::fill_n(col_of_row, batch.P, -1);
  const int64_t rows = batch.num_rows ? std::clamp<int64_t>(batch.num_rows[b], 0, batch.P) : batch.P;
  const int64_t cols = batch.num_cols ? std::clamp<int64_t>(batch.num_cols[b], 0, batch.G) : batch.G;
  if (rows == 0 || cols == 0) return 0;

  const CostView<T> cost{batch.cost + b * batch.batch_stride, batch.row_stride, batch.col_stride, batch.maximize};
  const bool transposed = cols < rows;
  const int64_t n = transposed ? cols : rows, m = transposed ? rows : cols;
  const CostView<T> as_solved = transposed ? cost.transposed() : cost;
  char* costs = scratch + solver_bytes(std::min(batch.P, batch.G), std::max(batch.P, batch.G));
  const Packed<Solved<N, T>> packed{reinterpret_cast<Solved<N, T>*>(costs), round_up(m, N < 8 ? 8 : N), n, m};
  using Lanes = VectorLanes<N>;
  const AssignmentWorkspace<typename Lanes::Index> work(scratch, round_up(n, N), packed.row_length);
  fetch(as_solved, n, m);
  const int64_t settled = settle_greedily(as_solved, n, m, work);
  int32_t status = 0;
  if (settled < n) {
    if (pack(as_solved, packed)) {
      replace_invalid(packed);
      status |= kAssignmentInvalid;
    }
    const bool complete = solve_packed<N>(packed, work, static_cast<int32_t>(settled), costs + packed_bytes(n, m));
    if (!complete) status |= kAssignmentInfeasible;
  }
  for (int64_t row = 0; row < n; ++row) {
    const int64_t col = work.col_of_row[row];
    if (col >= 0) col_of_row[transposed ? col : row] = transposed ? row : col;
  }
  return status;
}

template <int N, typename T>
FASTRIS_INLINE void solve_images(const AssignmentBatch<T>& batch, int64_t begin, int64_t end, char* scratch) {
  for (int64_t b = begin; b < end; ++b) batch.status[b] = solve_image<N>(batch, b, scratch);
}

}  // namespace
}  // namespace fastris
