// assignment on the CPU: the images of a batch on torch's own threads, each matrix in SIMD lanes of the machine.
#include "../assignment_call.h"
#include "assignment_solve.h"

namespace fastris {
namespace {

template <int N, typename T>
void solve_images_baseline(const AssignmentBatch<T>& batch, int64_t begin, int64_t end, char* scratch) {
  solve_images<N>(batch, begin, end, scratch);
}

template <typename T>
SolveImages<T> for_this_machine() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw")) {
    return solve_images_avx512<T>;
  }
  if (__builtin_cpu_supports("avx2")) return solve_images_avx2<T>;
#endif
  return solve_images_baseline<2, T>;
}

// By number of lanes; 0 for the best of this machine. 32 and 128 emulate in lock step what a warp and a block compute.
template <typename T>
SolveImages<T> choose(int64_t lanes) {
  static const SolveImages<T> best = for_this_machine<T>();
  switch (lanes) {
    case 0: return best;
    case 2: return solve_images_baseline<2, T>;
#if defined(__x86_64__)
    case 4: return __builtin_cpu_supports("avx2") ? solve_images_avx2<T> : nullptr;
    case 8: return best == solve_images_avx512<T> ? best : nullptr;
#endif
    case 32: return solve_images_baseline<32, T>;
    case 128: return solve_images_baseline<128, T>;
    default: return nullptr;
  }
}

template <typename T>
void solve_batch(const AssignmentCall& call, bool maximize, int64_t lanes) {
  const SolveImages<T> solve = choose<T>(lanes);
  FASTRIS_CHECK(solve != nullptr, "assignment: this machine does not have ", lanes, " lanes");
  const AssignmentBatch<T> batch{
      static_cast<const T*>(call.cost.data_ptr()),
      call.cost.stride(0),
      call.cost.stride(1),
      call.cost.stride(2),
      maximize,
      call.P,
      call.G,
      call.rows(),
      call.cols(),
      static_cast<int64_t*>(call.col_of_row.data_ptr()),
      static_cast<int32_t*>(call.status.data_ptr())};
  const size_t bytes = static_cast<size_t>(scratch_bytes<T>(call.P, call.G) + kCacheLine);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, call.P * call.G));  // some 10 µs a task
  torch::stable::parallel_for(0, call.B, grain, [&](int64_t begin, int64_t end) {
    thread_local std::vector<char> memory;  // grows to the largest matrix that a thread has seen
    if (memory.size() < bytes) memory.resize(bytes);
    char* aligned = memory.data() + (kCacheLine - reinterpret_cast<uintptr_t>(memory.data()) % kCacheLine);
    solve(batch, begin, end, aligned);
  });
}

std::tuple<Tensor, Tensor> assignment_lanes(
    Tensor cost, std::optional<Tensor> num_rows, std::optional<Tensor> num_cols, bool maximize, int64_t lanes) {
  const AssignmentCall call(cost, num_rows, num_cols);
  call.is_double() ? solve_batch<double>(call, maximize, lanes) : solve_batch<float>(call, maximize, lanes);
  return {call.col_of_row, call.status};
}

std::tuple<Tensor, Tensor> assignment(
    Tensor cost, std::optional<Tensor> num_rows, std::optional<Tensor> num_cols, bool maximize) {
  return assignment_lanes(cost, num_rows, num_cols, maximize, 0);
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) {
  m.impl("assignment", TORCH_BOX(&fastris::assignment));
  m.impl("assignment_lanes", TORCH_BOX(&fastris::assignment_lanes));
}
