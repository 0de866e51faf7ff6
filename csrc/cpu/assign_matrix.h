// `assignment` of one matrix in plain memory, for fastris.linear_sum_assignment: making a tensor takes longer than solving.
#pragma once

#include <cstdint>

namespace fastris {

// P x G costs in row-major order, fewer than 2^30 to a side, in this thread; writes P columns and returns the
// status bits. Throws std::bad_alloc.
int32_t assign_matrix(const double* cost, int64_t P, int64_t G, bool maximize, int64_t* col_of_row);

}  // namespace fastris
