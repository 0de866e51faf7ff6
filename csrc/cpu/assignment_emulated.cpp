// assignment in 32 and 128 lanes, in lock step: what a CUDA warp and a block compute, for tests.
#include "assignment_solve.h"

namespace fastris {

template <int N, typename T>
void solve_images_emulated(const AssignmentBatch<T>& batch, int64_t begin, int64_t end, char* scratch) {
  solve_images<N>(batch, begin, end, scratch);
}
template void solve_images_emulated<32>(const AssignmentBatch<float>&, int64_t, int64_t, char*);
template void solve_images_emulated<32>(const AssignmentBatch<double>&, int64_t, int64_t, char*);
template void solve_images_emulated<128>(const AssignmentBatch<float>&, int64_t, int64_t, char*);
template void solve_images_emulated<128>(const AssignmentBatch<double>&, int64_t, int64_t, char*);

}  // namespace fastris
