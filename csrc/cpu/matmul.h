// Products of small fp32 matrices whose columns are whole vectors.
#pragma once

#include "simd.h"

#include <algorithm>

namespace fastris {

constexpr int64_t kRows = 6;  // of a matrix product that are computed together
constexpr int64_t kLongestSum = 24;

inline int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }  // whole vectors of any width
inline int64_t whole_rows(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }

// c[kRows][Vectors] (+)= Σ_k a[row·a_row + k·a_step] · b[k·n], kept in registers meanwhile.
template <int Bytes, int Vectors, bool Add>
FASTRIS_INLINE void multiply_block(
    int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t n, float* c) {
  using Real = Vector<float, Bytes>;
  constexpr int lanes = VectorOf<float, Bytes>::lanes;
  Real sum[kRows][Vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Real right[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) right[v] = vector_at<Bytes>(b + k * n + v * lanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const float left = a[r * a_row + k * a_step];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      Real& to = vector_at<Bytes>(c + r * n + v * lanes);
      if constexpr (Add) {
        to += sum[r][v];
      } else {
        to = sum[r][v];
      }
    }
  }
}

// Two vectors of columns. Their number is padded(), so that only AVX-512 can have a single one left.
template <int Bytes, bool Add>
FASTRIS_INLINE void multiply_columns(
    int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t n, float* c) {
  if constexpr (Bytes == 64) {
    if (columns == 16) return multiply_block<Bytes, 1, Add>(depth, a, a_row, a_step, b, n, c);
  }
  multiply_block<Bytes, 2, Add>(depth, a, a_row, a_step, b, n, c);
}

// c[rows × n] (+)= a · b with n padded(), rows whole blocks; b is [depth × n]. Long sums are made of several of like
// length, which lose fewer digits.
template <int Bytes, bool Add>
FASTRIS_INLINE void multiply(
    int64_t rows, int64_t n, int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, float* c) {
  constexpr int64_t pair = 2 * VectorOf<float, Bytes>::lanes;
  const int64_t sums = std::max<int64_t>(1, (depth + kLongestSum - 1) / kLongestSum), longest = (depth + sums - 1) / sums;
  for (int64_t k = 0; k < depth; k += longest) {
    const int64_t some = std::min(longest, depth - k);
    const float* right = b + k * n;
    for (int64_t j = 0; j < n; j += pair) {
      for (int64_t i = 0; i < rows; i += kRows) {
        const float* left = a + i * a_row + k * a_step;
        float* to = c + i * n + j;
        if (Add || k > 0) {
          multiply_columns<Bytes, true>(n - j, some, left, a_row, a_step, right + j, n, to);
        } else {
          multiply_columns<Bytes, false>(n - j, some, left, a_row, a_step, right + j, n, to);
        }
      }
    }
  }
}

}  // namespace fastris
