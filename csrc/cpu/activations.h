// Sigmoids and hyperbolic tangents. Vectors of doubles serve gradient checks, and take the library's functions.
#pragma once

#include "simd.h"

#include <cmath>

namespace fastris {

// Bounds of exponents, whose exponentials are powers of two: ln 2 in fp32, times a number so short that this is exact.
constexpr float kMost = 112 * 0.69314718f;  // where what is made of the exponential is still a normal number
constexpr float kMostOfTangent = 28 * 0.69314718f;  // twice what tanh is 1 from in fp32

// Exponentials of x within ±kMost, as e^x = power · (even + odd) / (even − odd): x·log₂e is rounded to an integer n, power
// is 2ⁿ, odd is what is left of x, and even = 2 + excess is odd · coth(odd / 2), of whose square excess is a polynomial, by
// which e^x is right to 2⁻³⁰.
//
// Several at once, one step of all before the next, so that a processor has something to do while it waits for each.
template <int Bytes, int Count>
struct Exponentials {
  using Real = Vector<float, Bytes>;
  using Int = Vector<int32_t, Bytes>;

  Real power[Count], excess[Count], odd[Count];

  FASTRIS_INLINE void find(const Real (&x)[Count]) {
    const float magic = 12583039.0f;  // 1.5 · 2²³ + 127: adding it rounds, and leaves n + 127 in the low bits
    Real sum[Count];
    for (int k = 0; k < Count; ++k) sum[k] = x[k] * 1.44269504f + magic;
    for (int k = 0; k < Count; ++k) odd[k] = rest(x[k], sum[k] - magic);
    // 2ⁿ stays a factor: added to the exponent it would make a number of some NaNs.
    for (int k = 0; k < Count; ++k) power[k] = (Real)((Int)sum[k] << 23);
    for (int k = 0; k < Count; ++k) {
      const Real square = odd[k] * odd[k];
      excess[k] = rounded_product(square * -2.765987e-3f + 0.16666618f, square);
    }
  }

 private:
  // x − n · ln 2, and −0 for −0, rounded once: in one instruction, or with ln 2 in two parts whose products are exact.
  FASTRIS_INLINE static Real rest(const Real& x, const Real& n) {
    if constexpr (Bytes > 16) return x - n * 0.69314718f;
    return (x - n * 0.693145752f) - n * 1.430511474609375e-6f;
  }
};

// e^−x, with x clamped.
template <int Bytes>
FASTRIS_INLINE Vector<float, Bytes> exponential_of_minus(const Vector<float, Bytes>& x) {
  const Vector<float, Bytes> minus[] = {-clamp<Bytes>(x, kMost)};
  Exponentials<Bytes, 1> e;
  e.find(minus);
  const Vector<float, Bytes> even = 2.0f + e.excess[0];
  return e.power[0] * ((even + e.odd[0]) / (even - e.odd[0]));
}

// An activation and its slope. In fp32 that has its digits also where the activation is near 1, and one less that none.
template <typename T, int Bytes>
struct Activated {
  Vector<T, Bytes> value, slope;
};

enum class Curve { sigmoid, tangent, tangent_with_slope };

// Activations of some vectors of each argument, one curve for an argument: set() them, then find() all.
template <typename T, int Bytes, int Vectors, Curve... curves>
class Activations;

template <int Bytes, int Vectors, Curve... curves>
class Activations<float, Bytes, Vectors, curves...> {
 public:
  using Real = Vector<float, Bytes>;

  template <typename... Reals>
  FASTRIS_INLINE void set(int v, const Reals&... of) {
    const Real arguments[] = {argument<curves>(of)...};
    for (int k = 0; k < kCurves; ++k) x[v * kCurves + k] = arguments[k];
  }

  FASTRIS_INLINE void find() { e.find(x); }

  template <int k>
  FASTRIS_INLINE Real value(int v) const {
    return numerator<k>(v) / denominator<k>(v);
  }

  // σ · tanh with one division, as exact as with two where one of them is 1. It may be 0 where the sigmoid is below e^−67.
  template <int j, int k>
  FASTRIS_INLINE Real product(int v) const {
    static_assert(kCurve[j] == Curve::sigmoid && kCurve[k] == Curve::tangent);
    return (numerator<j>(v) * numerator<k>(v)) / (denominator<j>(v) * denominator<k>(v));
  }

  template <int k>
  FASTRIS_INLINE Activated<float, Bytes> value_and_slope(int v) const {
    static_assert(kCurve[k] != Curve::tangent);
    const Real inverse = 1.0f / (one<k>(v) + exponential<k>(v)), value = numerator<k>(v) * inverse;
    if constexpr (kCurve[k] == Curve::sigmoid) return {value, value * (exponential<k>(v) * inverse)};
    const Real twice = inverse + inverse;
    return {value, (one<k>(v) * twice) * (exponential<k>(v) * twice)};
  }

 private:
  static constexpr Curve kCurve[] = {curves...};
  static constexpr int kCurves = sizeof...(curves);
  Real x[Vectors * kCurves];
  Exponentials<Bytes, Vectors * kCurves> e;

  // σ(x) = 1 / (1 + e^−x) and tanh x = (e^2x − 1) / (e^2x + 1)
  template <Curve curve>
  FASTRIS_INLINE static Real argument(const Real& of) {
    if constexpr (curve == Curve::sigmoid) return -clamp<Bytes>(of, kMost);
    return clamp<Bytes>(of + of, curve == Curve::tangent ? kMostOfTangent : kMost);
  }

  // One, the exponential, and what the curves are made of, all times even − odd. What tanh is made of is so put together
  // that it has all digits near 0, also the sign, and is no larger in the numerator than in the denominator.
  template <int k>
  FASTRIS_INLINE Real one(int v) const {
    return (2.0f + e.excess[v * kCurves + k]) - e.odd[v * kCurves + k];
  }

  template <int k>
  FASTRIS_INLINE Real exponential(int v) const {
    return e.power[v * kCurves + k] * ((2.0f + e.excess[v * kCurves + k]) + e.odd[v * kCurves + k]);
  }

  template <int k>
  FASTRIS_INLINE Real numerator(int v) const {
    if constexpr (kCurve[k] == Curve::sigmoid) return one<k>(v);
    const Real power = e.power[v * kCurves + k], odd = e.odd[v * kCurves + k], less = 1.0f - power;
    return (odd * (power + 1.0f) - rounded_product(e.excess[v * kCurves + k], less)) - 2.0f * less;
  }

  template <int k>
  FASTRIS_INLINE Real denominator(int v) const {
    if constexpr (kCurve[k] == Curve::sigmoid) return one<k>(v) + exponential<k>(v);
    const Real power = e.power[v * kCurves + k], odd = e.odd[v * kCurves + k], more = power + 1.0f;
    return (rounded_product(e.excess[v * kCurves + k], more) - odd * (1.0f - power)) + 2.0f * more;
  }
};

template <int Bytes, int Vectors, Curve... curves>
class Activations<double, Bytes, Vectors, curves...> {
 public:
  using Real = Vector<double, Bytes>;

  template <typename... Reals>
  FASTRIS_INLINE void set(int v, const Reals&... x) {
    const Real arguments[] = {x...};
    for (int k = 0; k < kCurves; ++k) {
      Real of_k = arguments[k];
      for (int i = 0; i < VectorOf<double, Bytes>::lanes; ++i) {
        of_k[i] = kCurve[k] == Curve::sigmoid ? 1.0 / (1.0 + std::exp(-of_k[i])) : std::tanh(of_k[i]);
      }
      y[v * kCurves + k] = of_k;
    }
  }

  FASTRIS_INLINE void find() {}

  template <int k>
  FASTRIS_INLINE Real value(int v) const {
    return y[v * kCurves + k];
  }

  template <int j, int k>
  FASTRIS_INLINE Real product(int v) const {
    return value<j>(v) * value<k>(v);
  }

  template <int k>
  FASTRIS_INLINE Activated<double, Bytes> value_and_slope(int v) const {
    const Real of = value<k>(v);
    return {of, kCurve[k] == Curve::sigmoid ? of * (1.0 - of) : 1.0 - of * of};
  }

 private:
  static constexpr Curve kCurve[] = {curves...};
  static constexpr int kCurves = sizeof...(curves);
  Real y[Vectors * kCurves];
};

}  // namespace fastris
