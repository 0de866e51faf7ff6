// assignment on CUDA: one thread per matrix, scratch in global memory from torch's allocator. Nothing synchronises, so
// the call can be captured in a graph.
#include "assignment_call.h"

namespace fastris {
namespace {

constexpr int kThreads = 32;

template <typename T>
__global__ void assignment_kernel(
    const T* cost,
    int64_t batch_stride,
    int64_t row_stride,
    int64_t col_stride,
    const int64_t* num_rows,
    const int64_t* num_cols,
    int64_t B,
    int64_t P,
    int64_t G,
    bool maximize,
    char* workspace,
    int64_t workspace_bytes,
    int64_t* col_of_row,
    int32_t* status) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= B) return;
  const CostView<T> view{cost + b * batch_stride, row_stride, col_stride, maximize};
  status[b] = solve_assignment(
      view,
      P,
      G,
      num_rows ? num_rows[b] : P,
      num_cols ? num_cols[b] : G,
      workspace + b * workspace_bytes,
      col_of_row + b * P);
}

template <typename T>
void launch(const AssignmentCall& call, bool maximize, cudaStream_t stream) {
  const int64_t bytes = call.workspace_bytes();
  const Tensor workspace = empty_on(call.cost, {call.B * bytes}, ScalarType::Byte);
  const unsigned blocks = static_cast<unsigned>((call.B + kThreads - 1) / kThreads);
  assignment_kernel<T><<<blocks, kThreads, 0, stream>>>(
      static_cast<const T*>(call.cost.data_ptr()),
      call.cost.stride(0),
      call.cost.stride(1),
      call.cost.stride(2),
      call.rows(),
      call.cols(),
      call.B,
      call.P,
      call.G,
      maximize,
      static_cast<char*>(workspace.data_ptr()),
      bytes,
      static_cast<int64_t*>(call.col_of_row.data_ptr()),
      static_cast<int32_t*>(call.status.data_ptr()));
  FASTRIS_CUDA_CHECK(cudaGetLastError());
}

std::tuple<Tensor, Tensor> assignment(
    Tensor cost, std::optional<Tensor> num_rows, std::optional<Tensor> num_cols, bool maximize) {
  const CudaScope scope(cost);
  const AssignmentCall call(cost, num_rows, num_cols);
  if (call.B > 0) {
    call.is_double() ? launch<double>(call, maximize, scope.stream()) : launch<float>(call, maximize, scope.stream());
  }
  return {call.col_of_row, call.status};
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CUDA, m) { m.impl("assignment", TORCH_BOX(&fastris::assignment)); }
