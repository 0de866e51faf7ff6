// Vectors of fp32 that lie in memory as fp32 or as bfloat16.
#pragma once

#include "../stable_abi.h"
#include "simd.h"

#include <cstdint>

namespace fastris {

template <int Bytes>
struct BFloat16Lanes {
  typedef uint16_t narrow __attribute__((vector_size(Bytes / 2), aligned(2), may_alias));
  typedef uint32_t wide __attribute__((vector_size(Bytes)));
};

template <int Bytes>
FASTRIS_INLINE Vector<float, Bytes> load_lanes(const float* from) {
  return unaligned_at<Bytes>(from);
}

template <int Bytes>
FASTRIS_INLINE Vector<float, Bytes> load_lanes(const BFloat16* from) {
  using Lanes = BFloat16Lanes<Bytes>;
  const typename Lanes::narrow& narrow = *reinterpret_cast<const typename Lanes::narrow*>(from);  // auto would be aligned
  return (Vector<float, Bytes>)(__builtin_convertvector(narrow, typename Lanes::wide) << 16);
}

template <int Bytes>
FASTRIS_INLINE void store_lanes(const Vector<float, Bytes>& lanes, float* to) {
  unaligned_at<Bytes>(to) = lanes;
}

// Rounds to the nearest, ties to even.
template <int Bytes>
FASTRIS_INLINE void store_lanes(const Vector<float, Bytes>& lanes, BFloat16* to) {
  using Lanes = BFloat16Lanes<Bytes>;
  using Wide = typename Lanes::wide;
  const Wide bits = (Wide)lanes;
  const Wide rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Wide finite_or_nan = lanes != lanes ? Wide{} + 0x7FC0 : rounded;
  *reinterpret_cast<typename Lanes::narrow*>(to) = __builtin_convertvector(finite_or_nan, typename Lanes::narrow);
}

}  // namespace fastris
