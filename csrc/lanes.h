// What runs the columns of a matrix side by side: SIMD lanes, the threads of a warp, or those of a block.
//
// A solver is written once over this interface. Column c belongs to lane c mod width; `load(p, base)` gives each lane
// its own of p[base .. base + width). Arrays are padded to a multiple of the width, so there are no tails. Values that
// are no vectors are the same in all lanes. Code under `leader()` runs in one lane; `sync()` makes what it wrote, and
// what other lanes wrote, visible to all. `lane()` and `stride()` share out a loop of independent iterations.
#pragma once

#include "inline.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

namespace fastris {
namespace {  // each file has its own, in its own instruction set

#if !defined(__CUDACC__)

template <typename T, int N>
struct LaneVector {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};

// N lanes in lock step on the CPU, as GCC and Clang vectors. With the N of the machine these are its SIMD registers;
// with the N of a warp or a block it is the emulation of what those compute.
template <int N>
struct VectorLanes {
  static constexpr int width = N;
  using Index = int64_t;  // as wide as a double, so that a comparison of doubles selects between indices
  using Reals = typename LaneVector<double, N>::type;
  using Indices = typename LaneVector<int64_t, N>::type;
  using Floats = typename LaneVector<float, N>::type;

  static FASTRIS_INLINE Reals all(double value) { return value - Reals{}; }
  static FASTRIS_INLINE Indices all(int64_t value) { return value - Indices{}; }
  static FASTRIS_INLINE Indices numbers(int64_t base) {
    Indices lane = {};
    for (int k = 0; k < N; ++k) lane[k] = k;  // a constant
    return lane + base;
  }

  static FASTRIS_INLINE Reals load(const double* p, int64_t base) { return read<Reals>(p + base); }
  static FASTRIS_INLINE Indices load(const int64_t* p, int64_t base) { return read<Indices>(p + base); }
  static FASTRIS_INLINE Reals load(const float* p, int64_t base) {
#if defined(__AVX512F__)
    if constexpr (N == 8) return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p + base));
#endif
    return __builtin_convertvector(read<Floats>(p + base), Reals);
  }
  static FASTRIS_INLINE void store(double* p, int64_t base, Reals values) {
    std::memcpy(p + base, &values, sizeof values);
  }
  static FASTRIS_INLINE void store(int64_t* p, int64_t base, Indices values) {
    std::memcpy(p + base, &values, sizeof values);
  }

  // By way of its lanes: a load of lanes, one of which has just been stored alone, would wait for memory.
  static FASTRIS_INLINE void put(double* p, int64_t index, double value) {
    const int64_t base = index & -N;
    store(p, base, select(numbers(base) == all(index), all(value), load(p, base)));
  }
  // Keys are seldom loaded as lanes.
  static FASTRIS_INLINE void put(int64_t* p, int64_t index, int64_t value) { p[index] = value; }

  static FASTRIS_INLINE Indices less(Reals a, Reals b) { return a < b; }
  static FASTRIS_INLINE Indices equal(Reals a, Reals b) { return a == b; }
  template <typename Values>
  static FASTRIS_INLINE Values select(Indices mask, Values yes, Values no) {
    return mask ? yes : no;
  }
  template <typename Values>
  static FASTRIS_INLINE Values smaller(Values a, Values b) {
    return a < b ? a : b;
  }
  template <typename Values>
  static FASTRIS_INLINE Values larger(Values a, Values b) {
    return a > b ? a : b;
  }

  static FASTRIS_INLINE double least(Reals values) {
    if constexpr (N == 1) {
      return values[0];
    } else {
      using Half = VectorLanes<N / 2>;
      return Half::least(Half::smaller(half<typename Half::Reals>(values, 0), half<typename Half::Reals>(values, 1)));
    }
  }
  static FASTRIS_INLINE int64_t greatest(Indices values) {
    if constexpr (N == 1) {
      return values[0];
    } else {
      using Half = VectorLanes<N / 2>;
      using Values = typename Half::Indices;
      return Half::greatest(Half::larger(half<Values>(values, 0), half<Values>(values, 1)));
    }
  }

  // The largest of keys[k] with values[k] == wanted, k < count; `none` where there is no such k.
  static FASTRIS_INLINE int64_t
  greatest_key(const double* values, double wanted, const int64_t* keys, int64_t none, int64_t count) {
    if constexpr (has_bits) {
      // A bit a lane: unlike a reduction over lanes, it does not wait for keys that have just been written. One column
      // alone is the rule, and which one it is takes no branch. Of several, a loop over bits would mispredict its end.
      int64_t ties = 0, column = 0;
      for (int64_t start = 0; start < count; start += 64) {
        const uint64_t found = equal_bits(values + start, wanted, count - start);
        ties += __builtin_popcountll(found);
        column = found ? start + __builtin_ctzll(found) : column;
      }
      if (ties == 1) return keys[column];
    }
    Indices best = all(none);
    for (int64_t base = 0; base < count; base += N) {
      best = select(equal(load(values, base), all(wanted)), larger(load(keys, base), best), best);
    }
    return greatest(best);
  }

  // The lanes of a mask, a bit each.
  static FASTRIS_INLINE uint64_t bits(Indices mask) {
#if defined(__AVX512DQ__)
    if constexpr (N == 8) return _mm512_movepi64_mask(reinterpret_cast<__m512i>(mask));
#endif
#if defined(__AVX__)
    if constexpr (N == 4) return static_cast<uint64_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(mask)));
#endif
    uint64_t result = 0;
    for (int k = 0; k < N; ++k) result |= static_cast<uint64_t>(mask[k] & 1) << k;
    return result;
  }

  // Which of the first `count` values, 64 at most, are the wanted one, a bit each.
  static FASTRIS_INLINE uint64_t equal_bits(const double* values, double wanted, int64_t count) {
    uint64_t result = 0;
    const int64_t chunks = (count < 64 ? count : 64) / N;
#pragma GCC unroll 8
    for (int64_t k = 0; k < chunks; ++k) result |= bits(equal(load(values, k * N), all(wanted))) << (k * N);
    return result;
  }

  static FASTRIS_INLINE void sync() {}
  static FASTRIS_INLINE bool leader() { return true; }
  static FASTRIS_INLINE int32_t lane() { return 0; }
  static FASTRIS_INLINE int32_t stride() { return 1; }

 private:
  template <typename Values>
  static FASTRIS_INLINE Values read(const void* p) {
    Values values;
    std::memcpy(&values, p, sizeof values);
    return values;
  }

  // The first or the second half of the lanes.
  template <typename Half, typename Values>
  static FASTRIS_INLINE Half half(Values values, int which) {
    Half result;
    for (int k = 0; k < N / 2; ++k) result[k] = values[which * N / 2 + k];
    return result;
  }

  // Whether the instruction set has bits().
#if defined(__AVX512F__)
  static constexpr bool has_bits = N == 8;
#elif defined(__AVX__)
  static constexpr bool has_bits = N == 4;
#else
  static constexpr bool has_bits = false;
#endif
};

#else

// The threads of a warp (32) or of a block (more), one column each; threadIdx.x is the lane.
template <int Threads>
struct ThreadLanes {
  static constexpr int width = Threads;
  using Index = int32_t;
  using Reals = double;
  using Indices = int32_t;

  static FASTRIS_INLINE double all(double value) { return value; }
  static FASTRIS_INLINE int32_t all(int32_t value) { return value; }
  static FASTRIS_INLINE int32_t numbers(int32_t base) { return base + lane(); }

  static FASTRIS_INLINE double load(const double* p, int64_t base) { return p[base + lane()]; }
  static FASTRIS_INLINE double load(const float* p, int64_t base) { return p[base + lane()]; }
  static FASTRIS_INLINE int32_t load(const int32_t* p, int64_t base) { return p[base + lane()]; }
  template <typename Value>
  static FASTRIS_INLINE void store(Value* p, int64_t base, Value value) {
    p[base + lane()] = value;
  }

  template <typename Value>
  static FASTRIS_INLINE void put(Value* p, int32_t index, Value value) {
    if (lane() == index % Threads) p[index] = value;
  }

  static FASTRIS_INLINE bool less(double a, double b) { return a < b; }
  static FASTRIS_INLINE bool equal(double a, double b) { return a == b; }
  template <typename Value>
  static FASTRIS_INLINE Value select(bool mask, Value yes, Value no) {
    return mask ? yes : no;
  }
  template <typename Value>
  static FASTRIS_INLINE Value smaller(Value a, Value b) {
    return a < b ? a : b;
  }
  template <typename Value>
  static FASTRIS_INLINE Value larger(Value a, Value b) {
    return a > b ? a : b;
  }

  static FASTRIS_INLINE double least(double value) {
    for (int offset = 16; offset > 0; offset /= 2) value = smaller(value, __shfl_xor_sync(~0u, value, offset));
    if constexpr (Threads > 32) {
      __shared__ double of_warp[Threads / 32];
      gather(of_warp, value);
      for (int warp = 0; warp < Threads / 32; ++warp) value = smaller(value, of_warp[warp]);
    }
    return value;
  }
  static FASTRIS_INLINE int32_t greatest(int32_t value) {
#if __CUDA_ARCH__ >= 800
    value = __reduce_max_sync(~0u, value);
#else
    for (int offset = 16; offset > 0; offset /= 2) value = larger(value, __shfl_xor_sync(~0u, value, offset));
#endif
    if constexpr (Threads > 32) {
      __shared__ int32_t of_warp[Threads / 32];
      gather(of_warp, value);
      for (int warp = 0; warp < Threads / 32; ++warp) value = larger(value, of_warp[warp]);
    }
    return value;
  }

  static FASTRIS_INLINE int32_t
  greatest_key(const double* values, double wanted, const int32_t* keys, int32_t none, int32_t count) {
    int32_t best = none;
    for (int32_t k = lane(); k < count; k += Threads) {
      if (values[k] == wanted) best = larger(keys[k], best);
    }
    return greatest(best);
  }

  static FASTRIS_INLINE void sync() {
    if constexpr (Threads == 32) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
  static FASTRIS_INLINE bool leader() { return lane() == 0; }
  static FASTRIS_INLINE int32_t lane() { return static_cast<int32_t>(threadIdx.x); }
  static FASTRIS_INLINE int32_t stride() { return Threads; }

 private:
  // One value a warp, to all threads; the first barrier waits for readers of the last time.
  template <typename Value>
  static FASTRIS_INLINE void gather(Value* of_warp, Value value) {
    __syncthreads();
    if (lane() % 32 == 0) of_warp[lane() / 32] = value;
    __syncthreads();
  }
};

#endif

}  // namespace
}  // namespace fastris
