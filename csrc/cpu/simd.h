// Vectors of any width in portable C++ (GCC and Clang), and the choice of instruction set at run time.
//
// A kernel is a struct with an always-inlined `template <int Bytes> void run() const`, as is everything it calls.
// run_simd() has it compiled once for every instruction set and runs the widest that the processor has.
#pragma once

#include "../inline.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace fastris {

// Passed by reference only: by value their calling convention depends on the instruction set.
template <typename T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes), may_alias));
  static constexpr int lanes = Bytes / static_cast<int>(sizeof(T));
};

template <typename T, int Bytes>
using Vector = typename VectorOf<T, Bytes>::type;

template <int Bytes, typename T>
FASTRIS_INLINE Vector<T, Bytes>& vector_at(T* lanes) {
  return *reinterpret_cast<Vector<T, Bytes>*>(lanes);
}

template <int Bytes, typename T>
FASTRIS_INLINE const Vector<T, Bytes>& vector_at(const T* lanes) {
  return *reinterpret_cast<const Vector<T, Bytes>*>(lanes);
}

// The same at addresses of any alignment.
template <typename T, int Bytes>
struct UnalignedVectorOf {
  typedef T type __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
};

template <int Bytes, typename T>
FASTRIS_INLINE typename UnalignedVectorOf<T, Bytes>::type& unaligned_at(T* lanes) {
  return *reinterpret_cast<typename UnalignedVectorOf<T, Bytes>::type*>(lanes);
}

template <int Bytes, typename T>
FASTRIS_INLINE const typename UnalignedVectorOf<T, Bytes>::type& unaligned_at(const T* lanes) {
  return *reinterpret_cast<const typename UnalignedVectorOf<T, Bytes>::type*>(lanes);
}

// min(x, limit); NaN stays. GCC takes more instructions for a comparison that would keep NaN, so it is told the one.
template <int Bytes>
FASTRIS_INLINE Vector<float, Bytes> at_most(const Vector<float, Bytes>& x, float limit) {
  const Vector<float, Bytes> most = Vector<float, Bytes>{} + limit;
#if defined(__x86_64__)
  if constexpr (Bytes >= 32) {  // where one operand is NaN the result is the first one of AT&T's order
    Vector<float, Bytes> y;
    asm("vminps %1, %2, %0" : "=v"(y) : "v"(x), "v"(most));
    return y;
  }
#endif
  return x > most ? most : x;
}

// max(x, limit); NaN stays.
template <int Bytes>
FASTRIS_INLINE Vector<float, Bytes> at_least(const Vector<float, Bytes>& x, float limit) {
  const Vector<float, Bytes> least = Vector<float, Bytes>{} + limit;
#if defined(__x86_64__)
  if constexpr (Bytes >= 32) {
    Vector<float, Bytes> y;
    asm("vmaxps %1, %2, %0" : "=v"(y) : "v"(x), "v"(least));
    return y;
  }
#endif
  return x < least ? least : x;
}

// x within ± limit; NaN stays.
template <int Bytes>
FASTRIS_INLINE Vector<float, Bytes> clamp(const Vector<float, Bytes>& x, float limit) {
  return at_most<Bytes>(at_least<Bytes>(x, -limit), limit);
}

// max(x, 0); NaN stays.
template <int Bytes>
FASTRIS_INLINE Vector<float, Bytes> rectified(const Vector<float, Bytes>& x) {
  return at_least<Bytes>(x, 0.0f);
}

// The product as a number of its own. In a sum of two products the compiler may choose which one it fuses with the sum, and
// differently in every function: this one it does not.
template <typename Real>
FASTRIS_INLINE Real rounded_product(const Real& x, const Real& y) {
  Real z = x * y;
#if defined(__x86_64__)
#define FASTRIS_IN_VECTOR "+v"
#elif defined(__aarch64__)
#define FASTRIS_IN_VECTOR "+w"
#endif
#if defined(FASTRIS_IN_VECTOR)
  if constexpr (sizeof(Real) < 16) {
    auto lane = z[0];  // the only one
    asm("" : FASTRIS_IN_VECTOR(lane));
    z[0] = lane;
  } else {
    asm("" : FASTRIS_IN_VECTOR(z));
  }
#undef FASTRIS_IN_VECTOR
#endif
  return z;
}

// Steps over n channels of fp32 by whole vectors, the last ending at n, where some come twice; by single ones if there are
// too few. step(bytes, c) is given the width as a type.
template <int Bytes, typename Step>
FASTRIS_INLINE void for_channels(int64_t n, const Step& step) {
  constexpr int64_t lanes = VectorOf<float, Bytes>::lanes;
  if (n < lanes) {
    for (int64_t c = 0; c < n; ++c) step(std::integral_constant<int, 4>(), c);
    return;
  }
  for (int64_t c = 0; c + lanes <= n; c += lanes) step(std::integral_constant<int, Bytes>(), c);
  if (n % lanes != 0) step(std::integral_constant<int, Bytes>(), n - lanes);
}

// Likewise, the last by single ones, so that none comes twice.
template <int Bytes, typename Step>
FASTRIS_INLINE void for_each_once(int64_t n, const Step& step) {
  constexpr int64_t lanes = VectorOf<float, Bytes>::lanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) step(std::integral_constant<int, Bytes>(), i);
  for (; i < n; ++i) step(std::integral_constant<int, 4>(), i);
}

#if defined(__x86_64__)

enum class SimdLevel { baseline, avx2, avx512 };

// ATEN_CPU_CAPABILITY (default, avx2) lowers it, as it does for torch's own kernels.
inline SimdLevel simd_level() {
  static const SimdLevel level = [] {
    const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!avx2 || (wanted != nullptr && std::strcmp(wanted, "default") == 0)) return SimdLevel::baseline;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx512 || (wanted != nullptr && std::strcmp(wanted, "avx2") == 0)) return SimdLevel::avx2;
    return SimdLevel::avx512;
  }();
  return level;
}

template <typename Kernel>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void run_avx512(const Kernel& kernel) {
  kernel.template run<64>();
}

template <typename Kernel>
__attribute__((target("avx2,fma"))) void run_avx2(const Kernel& kernel) {
  kernel.template run<32>();
}

// Runs a part of a kernel as a function of its own, with the instruction set that the kernel is compiled for.
template <int Bytes, typename Kernel>
void run_part(const Kernel& part) {
  if constexpr (Bytes == 64) {
    run_avx512(part);
  } else if constexpr (Bytes == 32) {
    run_avx2(part);
  } else {
    part.template run<Bytes>();
  }
}

template <typename Kernel>
void run_simd(const Kernel& kernel) {
  switch (simd_level()) {
    case SimdLevel::avx512:
      return run_avx512(kernel);
    case SimdLevel::avx2:
      return run_avx2(kernel);
    case SimdLevel::baseline:
      return kernel.template run<16>();
  }
}

#else

template <int Bytes, typename Kernel>
void run_part(const Kernel& part) {
  part.template run<Bytes>();
}

template <typename Kernel>
void run_simd(const Kernel& kernel) {
  kernel.template run<16>();
}

#endif

}  // namespace fastris
