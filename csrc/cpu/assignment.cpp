// assignment on the CPU: the images of a batch in parallel on torch's own threads, one matrix per task.
#include "assignment_call.h"

namespace fastris {
namespace {

template <typename T>
void solve_batch(const AssignmentCall& call, bool maximize) {
  const T* cost = static_cast<const T*>(call.cost.data_ptr());
  const int64_t batch_stride = call.cost.stride(0);
  const int64_t row_stride = call.cost.stride(1);
  const int64_t col_stride = call.cost.stride(2);
  const int64_t* num_rows = call.rows();
  const int64_t* num_cols = call.cols();
  int64_t* col_of_row = static_cast<int64_t*>(call.col_of_row.data_ptr());
  int32_t* status = static_cast<int32_t*>(call.status.data_ptr());
  const size_t words = static_cast<size_t>(call.workspace_bytes()) / sizeof(double);

  torch::stable::parallel_for(0, call.B, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> workspace(words);
    for (int64_t b = begin; b < end; ++b) {
      const CostView<T> view{cost + b * batch_stride, row_stride, col_stride, maximize};
      status[b] = solve_assignment(
          view,
          call.P,
          call.G,
          num_rows ? num_rows[b] : call.P,
          num_cols ? num_cols[b] : call.G,
          workspace.data(),
          col_of_row + b * call.P);
    }
  });
}

std::tuple<Tensor, Tensor> assignment(
    Tensor cost, std::optional<Tensor> num_rows, std::optional<Tensor> num_cols, bool maximize) {
  const AssignmentCall call(cost, num_rows, num_cols);
  call.is_double() ? solve_batch<double>(call, maximize) : solve_batch<float>(call, maximize);
  return {call.col_of_row, call.status};
}

}  // namespace
}  // namespace fastris

STABLE_TORCH_LIBRARY_IMPL(fastris, CPU, m) { m.impl("assignment", TORCH_BOX(&fastris::assignment)); }
