// What the CPU and the CUDA kernel of `assignment` share: the checks that keep memory safe, and the outputs.
// Python's door (fastris/ops/assignment.py) has checked before and words its errors better.
#pragma once

#include "assignment.h"
#include "stable_abi.h"

namespace fastris {

struct AssignmentCall {
  Tensor cost;                     // (B, P, G) fp32 or fp64, any strides
  std::optional<Tensor> num_rows;  // (B,) int64, contiguous
  std::optional<Tensor> num_cols;  // (B,) int64, contiguous
  int64_t B, P, G;
  Tensor col_of_row;  // (B, P) int64
  Tensor status;      // (B,) int32

  AssignmentCall(Tensor cost_, std::optional<Tensor> num_rows_, std::optional<Tensor> num_cols_)
      : cost(check_cost(cost_)),
        num_rows(check_counts(num_rows_, cost, "num_rows")),
        num_cols(check_counts(num_cols_, cost, "num_cols")),
        B(cost.size(0)),
        P(cost.size(1)),
        G(cost.size(2)),
        col_of_row(empty_on(cost, {B, P}, ScalarType::Long)),
        status(empty_on(cost, {B}, ScalarType::Int)) {
    FASTRIS_CHECK(
        B < 1 << 30 && P < 1 << 30 && G < 1 << 30, "assignment: cost must be smaller than 2^30 in every dimension");
  }

  bool is_double() const { return cost.scalar_type() == ScalarType::Double; }
  // The sides of the largest matrix as it is solved, n <= m; none where one of them is 0.
  int64_t n() const { return P < G ? P : G; }
  int64_t m() const { return n() == 0 ? 0 : P < G ? G : P; }
  const int64_t* rows() const { return num_rows ? num_rows->const_data_ptr<int64_t>() : nullptr; }
  const int64_t* cols() const { return num_cols ? num_cols->const_data_ptr<int64_t>() : nullptr; }

 private:
  static Tensor check_cost(const Tensor& cost) {
    FASTRIS_CHECK(cost.dim() == 3, "assignment: cost must be (B, P, G), got ", cost.dim(), " dimensions");
    const ScalarType type = cost.scalar_type();
    FASTRIS_CHECK(
        type == ScalarType::Float || type == ScalarType::Double, "assignment: the operator takes float32 or float64");
    return cost;
  }

  static std::optional<Tensor>
  check_counts(const std::optional<Tensor>& counts, const Tensor& cost, const char* name) {
    if (!counts) return std::nullopt;
    FASTRIS_CHECK(
        counts->scalar_type() == ScalarType::Long && counts->dim() == 1 && counts->size(0) == cost.size(0) &&
            counts->device() == cost.device(),
        "assignment: ", name, " must be int64 (B,) on the device of cost");
    return torch::stable::contiguous(*counts);
  }
};

}  // namespace fastris
