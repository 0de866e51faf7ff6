// Kernels of simd.h over torch's threads.
#pragma once

#include "../stable_abi.h"
#include "simd.h"

namespace fastris {

// Spreads `count` tasks over the threads, at least `grain` to one; the kernel's begin and end say which are its own.
template <typename Kernel>
void run_parallel(const Kernel& kernel, int64_t count, int64_t grain) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    Kernel part = kernel;
    part.begin = begin;
    part.end = end;
    run_simd(part);
  });
}

}  // namespace fastris
