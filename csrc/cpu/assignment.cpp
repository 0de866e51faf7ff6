// assignment on the CPU: the images of a batch on torch's own threads, each matrix in SIMD lanes of the machine.
#include "../assignment_call.h"
#include "assign_matrix.h"
#include "assignment_solve.h"
#include "simd.h"

#include <algorithm>
#include <atomic>

namespace fastris {
namespace {

// Costs, in 5 ns.
constexpr int64_t kLeastOfThread = 3072;  // to wake and join one takes 1 to 2 µs, and far more where it sleeps
constexpr int64_t kLeastAtATime = 512;

// A rough one, of a matrix of n × m with n ≤ m.
inline int64_t cost_of(int64_t n, int64_t m) { return 64 + n * n + n * m / 16; }

template <typename T>
void solve_images_baseline(const AssignmentBatch<T>& batch, int64_t begin, int64_t end, char* scratch) {
  solve_images<2>(batch, begin, end, scratch);
}

// The best of this machine.
template <typename T>
SolveImages<T> choose() {
#if defined(__x86_64__)
  switch (simd_level()) {
    case SimdLevel::avx512: return solve_images_avx512<T>;
    case SimdLevel::avx2: return solve_images_avx2<T>;
    case SimdLevel::baseline: break;
  }
#endif
  return solve_images_baseline<T>;
}

// By number of lanes.
template <typename T>
SolveImages<T> choose(int64_t lanes) {
  switch (lanes) {
    case 2: return solve_images_baseline<T>;
#if defined(__x86_64__)
    case 4: return simd_level() >= SimdLevel::avx2 ? solve_images_avx2<T> : nullptr;
    case 8: return simd_level() >= SimdLevel::avx512 ? solve_images_avx512<T> : nullptr;
#endif
    case 32: return solve_images_emulated<32, T>;
    case 128: return solve_images_emulated<128, T>;
    default: return nullptr;
  }
}

// Of B matrices.
template <typename T>
void solve_batch(const AssignmentBatch<T>& batch, int64_t B, SolveImages<T> solve) {
  const int64_t n = std::min(batch.P, batch.G), m = n == 0 ? 0 : std::max(batch.P, batch.G);
  const size_t bytes = static_cast<size_t>(scratch_bytes(n, m) + kCacheLine);
  // A thread takes its own share, in parts, and then what is left of the others': one that wakes late has less to do.
  const int64_t cost = cost_of(n, m), least = std::max<int64_t>(1, kLeastAtATime / cost);
  const int64_t most = std::min(B, B * cost / kLeastOfThread);
  const int64_t threads = std::clamp<int64_t>(most, 1, torch::stable::get_num_threads());
  struct Share {
    std::atomic<int64_t> next;
    int64_t end;
    char apart[kCacheLine - 2 * sizeof(int64_t)];  // from the next; aligned memory takes longer to get
  };
  std::vector<Share> shares(static_cast<size_t>(threads));
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next = B * i / threads;
    shares[i].end = B * (i + 1) / threads;
  }
  const auto take_shares = [&](int64_t first, int64_t) {
    thread_local std::vector<char> memory;  // grows to the largest matrix that a thread has seen
    const AssignmentBatch<T> mine = batch;  // not on a cache line of another thread's stack
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares[(first + i) % threads];
      const int64_t end = share.end;
      for (int64_t begin; (begin = share.next.fetch_add(least)) < end;) {
        if (memory.size() < bytes) memory = std::vector<char>(bytes);
        char* aligned = memory.data() + (kCacheLine - reinterpret_cast<uintptr_t>(memory.data()) % kCacheLine);
        solve(mine, begin, std::min(end, begin + least), aligned);
      }
    }
  };
  if (threads == 1) return take_shares(0, 1);  // which can be done after a fork
  torch::stable::parallel_for(0, threads, 1, take_shares);
}

template <typename T>
void solve_batch(const AssignmentCall& call, bool maximize, SolveImages<T> solve) {
  solve_batch(
      AssignmentBatch<T>{
          call.cost.const_data_ptr<T>(),
          call.cost.stride(0),
          call.cost.stride(1),
          call.cost.stride(2),
          maximize,
          call.P,
          call.G,
          call.rows(),
          call.cols(),
          static_cast<int64_t*>(call.col_of_row.data_ptr()),
          static_cast<int32_t*>(call.status.data_ptr())},
      call.B, solve);
}

std::tuple<Tensor, Tensor> assignment(
    Tensor cost, std::optional<Tensor> num_rows, std::optional<Tensor> num_cols, bool maximize) {
  const AssignmentCall call(cost, num_rows, num_cols);
  call.is_double() ? solve_batch(call, maximize, choose<double>()) : solve_batch(call, maximize, choose<float>());
  return {call.col_of_row, call.status};
}

std::tuple<Tensor, Tensor> assignment_lanes(
    Tensor cost, std::optional<Tensor> num_rows, std::optional<Tensor> num_cols, bool maximize, int64_t lanes) {
  FASTRIS_CHECK(choose<float>(lanes) != nullptr, "assignment: this machine does not have ", lanes, " lanes");
  const AssignmentCall call(cost, num_rows, num_cols);
  call.is_double() ? solve_batch(call, maximize, choose<double>(lanes))
                   : solve_batch(call, maximize, choose<float>(lanes));
  return {call.col_of_row, call.status};
}

}  // namespace

int32_t assign_matrix(const double* cost, int64_t P, int64_t G, bool maximize, int64_t* col_of_row) {
  int32_t status = 0;
  const AssignmentBatch<double> one{cost, P * G, G, 1, maximize, P, G, nullptr, nullptr, col_of_row, &status};
  solve_batch(one, 1, choose<double>());
  return status;
}

}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) {
  m.impl("assignment", TORCH_BOX(&fastris::assignment));
  m.impl("assignment_lanes", TORCH_BOX(&fastris::assignment_lanes));
}
