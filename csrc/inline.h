// Functions that must be compiled into their caller: with its instruction set on the CPU, on the device in CUDA.
#pragma once

#if defined(__CUDACC__)
#define FASTRIS_HOST_DEVICE __host__ __device__
#define FASTRIS_INLINE __device__ __forceinline__
#else
#define FASTRIS_HOST_DEVICE
#define FASTRIS_INLINE inline __attribute__((always_inline))
#define FASTRIS_INLINE_LAMBDA __attribute__((always_inline))
#endif
