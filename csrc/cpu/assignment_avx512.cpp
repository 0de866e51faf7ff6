// assignment in the lanes of AVX-512; the build gives this file the flags for it, on x86-64 alone.
#include "assignment_solve.h"

#if defined(__x86_64__)

namespace fastris {

template <typename T>
void solve_images_avx512(const AssignmentBatch<T>& batch, int64_t begin, int64_t end, char* scratch) {
  solve_images<8>(batch, begin, end, scratch);
}
template void solve_images_avx512(const AssignmentBatch<float>&, int64_t, int64_t, char*);
template void solve_images_avx512(const AssignmentBatch<double>&, int64_t, int64_t, char*);

}  // namespace fastris

#endif
