// Copying one matrix into the form in which it is solved, in the instruction set of the file that includes this.
#pragma once

#include "../assignment.h"

#include <algorithm>

namespace fastris {
namespace {

// n <= m rows of a contiguous length of at least m, the rest of each row +inf. Their type may be wider than the caller's.
template <typename T>
struct Packed {
  T* data;
  int64_t row_length;  // a multiple of 8
  int64_t n, m;
};

#if defined(__AVX__)

// A square of values in registers, 8 x 8 floats or 4 x 4 doubles, to turn columns into rows.
template <typename T>
struct Square;

template <>
struct Square<float> {
  static constexpr int64_t side = 8;
  using Row = __m256;
  static FASTRIS_INLINE Row all(float value) { return _mm256_set1_ps(value); }
  static FASTRIS_INLINE Row load(const float* p, int64_t count) {
    alignas(32) static constexpr int32_t masks[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return count >= side
        ? _mm256_loadu_ps(p)
        : _mm256_maskload_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(masks + side - count)));
  }
  static FASTRIS_INLINE void store(float* p, Row row) { _mm256_storeu_ps(p, row); }
  static FASTRIS_INLINE void store(double* p, Row row) {
    _mm256_storeu_pd(p, _mm256_cvtps_pd(_mm256_castps256_ps128(row)));
    _mm256_storeu_pd(p + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(row, 1)));
  }
  static FASTRIS_INLINE Row flip(Row row, Row sign) { return _mm256_xor_ps(row, sign); }
  static FASTRIS_INLINE Row not_above(Row row, Row bound) { return _mm256_cmp_ps(row, bound, _CMP_NGT_UQ); }
  static FASTRIS_INLINE Row either(Row a, Row b) { return _mm256_or_ps(a, b); }
  static FASTRIS_INLINE bool any(Row mask) { return _mm256_movemask_ps(mask) != 0; }
  static FASTRIS_INLINE void transpose(Row (&r)[8]) {
    Row pairs[8], fours[8];
    for (int k = 0; k < 8; k += 2) {
      pairs[k] = _mm256_unpacklo_ps(r[k], r[k + 1]);
      pairs[k + 1] = _mm256_unpackhi_ps(r[k], r[k + 1]);
    }
    for (int k = 0; k < 8; k += 4) {
      for (int half = 0; half < 2; ++half) {
        fours[k + 2 * half] = _mm256_shuffle_ps(pairs[k + half], pairs[k + 2 + half], 0x44);
        fours[k + 2 * half + 1] = _mm256_shuffle_ps(pairs[k + half], pairs[k + 2 + half], 0xee);
      }
    }
    for (int k = 0; k < 4; ++k) {
      r[k] = _mm256_permute2f128_ps(fours[k], fours[k + 4], 0x20);
      r[k + 4] = _mm256_permute2f128_ps(fours[k], fours[k + 4], 0x31);
    }
  }
};

template <>
struct Square<double> {
  static constexpr int64_t side = 4;
  using Row = __m256d;
  static FASTRIS_INLINE Row all(double value) { return _mm256_set1_pd(value); }
  static FASTRIS_INLINE Row load(const double* p, int64_t count) {
    alignas(32) static constexpr int64_t masks[8] = {-1, -1, -1, -1};
    return count >= side
        ? _mm256_loadu_pd(p)
        : _mm256_maskload_pd(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(masks + side - count)));
  }
  static FASTRIS_INLINE void store(double* p, Row row) { _mm256_storeu_pd(p, row); }
  static FASTRIS_INLINE Row flip(Row row, Row sign) { return _mm256_xor_pd(row, sign); }
  static FASTRIS_INLINE Row not_above(Row row, Row bound) { return _mm256_cmp_pd(row, bound, _CMP_NGT_UQ); }
  static FASTRIS_INLINE Row either(Row a, Row b) { return _mm256_or_pd(a, b); }
  static FASTRIS_INLINE bool any(Row mask) { return _mm256_movemask_pd(mask) != 0; }
  static FASTRIS_INLINE void transpose(Row (&r)[4]) {
    const Row a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
    const Row c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
    r[0] = _mm256_permute2f128_pd(a, c, 0x20);
    r[1] = _mm256_permute2f128_pd(b, d, 0x20);
    r[2] = _mm256_permute2f128_pd(a, c, 0x31);
    r[3] = _mm256_permute2f128_pd(b, d, 0x31);
  }
};

// Where the caller's columns are contiguous: in squares, each read and written in whole registers.
template <typename T, typename To>
FASTRIS_INLINE bool pack_columns(const CostView<T>& cost, const Packed<To>& packed) {
  using S = Square<T>;
  const typename S::Row infinity = S::all(static_cast<T>(INFINITY)), lowest = S::all(static_cast<T>(-INFINITY));
  const typename S::Row sign = S::all(cost.maximize ? T(-0.0) : T(0.0));
  typename S::Row invalid = S::all(0);
  for (int64_t col = 0; col < packed.row_length; col += S::side) {
    for (int64_t row = 0; row < packed.n; row += S::side) {
      typename S::Row square[S::side];
      for (int64_t k = 0; k < S::side; ++k) {
        square[k] = infinity;
        if (col + k >= packed.m) continue;
        square[k] = S::flip(S::load(cost.data + row + (col + k) * cost.col_stride, packed.n - row), sign);
        invalid = S::either(invalid, S::not_above(square[k], lowest));
      }
      S::transpose(square);
      const int64_t rows = std::min(S::side, packed.n - row);
      for (int64_t k = 0; k < rows; ++k) S::store(packed.data + (row + k) * packed.row_length + col, square[k]);
    }
  }
  return S::any(invalid);
}

#endif

template <typename T, typename To>
FASTRIS_INLINE bool pack_elements(const CostView<T>& cost, const Packed<To>& packed, int64_t col_stride) {
  bool invalid = false;
  for (int64_t row = 0; row < packed.n; ++row) {
    const T* from = cost.data + row * cost.row_stride;
    To* to = packed.data + row * packed.row_length;
    int bad = 0;  // an int for the vectoriser
    for (int64_t col = 0; col < packed.m; ++col) {
      to[col] = cost.maximize ? -from[col * col_stride] : from[col * col_stride];
      bad |= !(to[col] > static_cast<To>(-INFINITY));
    }
    for (int64_t col = packed.m; col < packed.row_length; ++col) to[col] = static_cast<To>(INFINITY);
    invalid |= bad != 0;
  }
  return invalid;
}

// Copies; true if NaN or -inf is among the costs.
template <typename T, typename To>
FASTRIS_INLINE bool pack(const CostView<T>& cost, const Packed<To>& packed) {
  if (cost.col_stride == 1) return pack_elements(cost, packed, 1);
#if defined(__AVX__)
  if (cost.row_stride == 1) return pack_columns(cost, packed);
#endif
  return pack_elements(cost, packed, cost.col_stride);
}

// Puts the worst finite cost, or 0 where there is none, in place of NaN and -inf.
template <typename T>
void replace_invalid(const Packed<T>& packed) {
  T worst = -INFINITY;
  for (int64_t row = 0; row < packed.n; ++row) {
    for (int64_t col = 0; col < packed.m; ++col) {
      const T value = packed.data[row * packed.row_length + col];
      if (value < INFINITY && value > worst) worst = value;
    }
  }
  if (!(worst > -INFINITY)) worst = 0;
  for (int64_t row = 0; row < packed.n; ++row) {
    for (int64_t col = 0; col < packed.m; ++col) {
      T& value = packed.data[row * packed.row_length + col];
      if (!(value > -INFINITY)) value = worst;
    }
  }
}

}  // namespace
}  // namespace fastris
