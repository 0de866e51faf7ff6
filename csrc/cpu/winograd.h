// Winograd's minimal filtering F(m×m, 3×3) of tiles of m×m results, m = 2 or 4, in the direction of rows or of columns.
//
// A. Lavin & S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016: a tile of results is
// y = Aᵀ (G w Gᵀ ∘ Bᵀ x B) A of the (m+2)×(m+2) inputs x around it. The gradient of the input is a convolution with the
// weight turned around, and that of the weight is Gᵀ (Σ Bᵀ x B ∘ A dy Aᵀ) G. The matrices interpolate polynomials, whose
// points are
//
//     m = 2: 0, ±1, ∞: 4 products for a result where the direct way takes 9;
//     m = 4: 0, ±a, ±b, ∞: 2¼. The usual ±1, ±2 lose twice as many digits as ±⅝, ±1½, for which all of Bᵀ and A are exact
//            in fp32 (B. Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep
//            Neural Networks", TOMS 2020, search such points).
#pragma once

#include "simd.h"

namespace fastris {

template <int Side>
struct Filter;

template <>
struct Filter<2> {
  static constexpr int side = 2, span = 4;

  // e = Bᵀ d
  template <typename Real>
  FASTRIS_INLINE static void inputs(const Real* d, Real* e) {
    e[0] = d[0] - d[2];
    e[1] = d[1] + d[2];
    e[2] = d[2] - d[1];
    e[3] = d[1] - d[3];
  }

  // y = Aᵀ m
  template <typename Real>
  FASTRIS_INLINE static void outputs(const Real* m, Real* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }

  // e = A y
  template <typename Real>
  FASTRIS_INLINE static void gradients(const Real* y, Real* e) {
    e[0] = y[0];
    e[1] = y[0] + y[1];
    e[2] = y[0] - y[1];
    e[3] = -y[1];
  }

  // e = G w
  template <typename Real>
  FASTRIS_INLINE static void weights(const Real* w, Real* e) {
    e[0] = w[0];
    e[1] = 0.5f * (w[0] + w[1] + w[2]);
    e[2] = 0.5f * (w[0] - w[1] + w[2]);
    e[3] = w[2];
  }

  // w = Gᵀ e
  template <typename Real>
  FASTRIS_INLINE static void weight_gradients(const Real* e, Real* w) {
    w[0] = e[0] + 0.5f * (e[1] + e[2]);
    w[1] = 0.5f * (e[1] - e[2]);
    w[2] = 0.5f * (e[1] + e[2]) + e[3];
  }
};

template <>
struct Filter<4> {
  static constexpr int side = 4, span = 6;

  template <typename Real>
  FASTRIS_INLINE static void inputs(const Real* d, Real* e) {
    const Real s = d[4] - b2 * d[2], t = d[3] - b2 * d[1], u = d[4] - a2 * d[2], v = d[3] - a2 * d[1];
    e[0] = u - b2 * d[2] + a2 * b2 * d[0];
    e[1] = s + a * t;
    e[2] = s - a * t;
    e[3] = u + b * v;
    e[4] = u - b * v;
    e[5] = d[5] - (a2 + b2) * d[3] + a2 * b2 * d[1];
  }

  template <typename Real>
  FASTRIS_INLINE static void outputs(const Real* m, Real* y) {
    const Real s = m[1] + m[2], t = m[1] - m[2], u = m[3] + m[4], v = m[3] - m[4];
    y[0] = m[0] + s + u;
    y[1] = a * t + b * v;
    y[2] = a2 * s + b2 * u;
    y[3] = a * a2 * t + (b * b2 * v + m[5]);
  }

  template <typename Real>
  FASTRIS_INLINE static void gradients(const Real* y, Real* e) {
    const Real s = y[0] + a2 * y[2], t = y[1] + a2 * y[3], u = y[0] + b2 * y[2], v = y[1] + b2 * y[3];
    e[0] = y[0];
    e[1] = s + a * t;
    e[2] = s - a * t;
    e[3] = u + b * v;
    e[4] = u - b * v;
    e[5] = y[3];
  }

  template <typename Real>
  FASTRIS_INLINE static void weights(const Real* w, Real* e) {
    const Real s = w[0] + a2 * w[2], t = w[0] + b2 * w[2];
    e[0] = at_zero * w[0];
    e[1] = at_a * (s + a * w[1]);
    e[2] = at_a * (s - a * w[1]);
    e[3] = at_b * (t + b * w[1]);
    e[4] = at_b * (t - b * w[1]);
    e[5] = w[2];
  }

  template <typename Real>
  FASTRIS_INLINE static void weight_gradients(const Real* e, Real* w) {
    const Real s = at_a * (e[1] + e[2]), t = at_a * (e[1] - e[2]), u = at_b * (e[3] + e[4]), v = at_b * (e[3] - e[4]);
    w[0] = at_zero * e[0] + s + u;
    w[1] = a * t + b * v;
    w[2] = a2 * s + (b2 * u + e[5]);
  }

 private:
  static constexpr float a = 0.625f, b = 1.5f, a2 = a * a, b2 = b * b;
  static constexpr float at_zero = 1 / (a2 * b2), at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));
};

// The square M x Mᵀ of a square x of From × From, where step is the product with M of a column of From numbers, which
// makes To of them.
template <int From, int To, typename Real, typename Load, typename Step, typename Store>
FASTRIS_INLINE void both_ways(const Load& load, const Step& step, const Store& store) {
  Real half[To][From];
#pragma GCC unroll 6
  for (int j = 0; j < From; ++j) {
    Real column[From], made[To];
#pragma GCC unroll 6
    for (int i = 0; i < From; ++i) load(i * From + j, column[i]);
    step(column, made);
#pragma GCC unroll 6
    for (int i = 0; i < To; ++i) half[i][j] = made[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < To; ++i) {
    Real made[To];
    step(half[i], made);
#pragma GCC unroll 6
    for (int j = 0; j < To; ++j) store(i * To + j, made[j]);
  }
}

}  // namespace fastris
