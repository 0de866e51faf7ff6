// Sigmoid and hyperbolic tangent. Vectors of doubles serve gradient checks, and take the library's functions.
#pragma once

#include "simd.h"

#include <cmath>

namespace fastris {

// e^x = power + power · rest for x within ±87: x·log₂e is rounded to an integer n, power is 2ⁿ, and rest, which is e^r − 1
// of what is left, a polynomial. 2ⁿ is a factor, not added to the exponent, for that would make a number of some NaNs.
template <int Bytes>
struct Exponential {
  using Real = Vector<float, Bytes>;

  Real power, rest;

  FASTRIS_INLINE explicit Exponential(const Real& x) {
    const float magic = 12583039.0f;  // 1.5 · 2²³ + 127: adding it rounds, and leaves n + 127 in the low bits
    const Real rounded = x * 1.44269504f + magic;
    const Real n = rounded - magic;
    const Real r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the product with the first exact
    Real p = Real{} + 1.388251814e-3f;  // (e^r − 1 − r) / r² on [−½ ln 2, ½ ln 2]; e^r is then right to 2⁻²⁶
    p = p * r + 8.366538151e-3f;
    p = p * r + 4.166720042e-2f;
    p = p * r + 1.666654349e-1f;
    p = p * r + 0.5f;
    rest = p * (r * r) + r;
    power = (Real)((Vector<int32_t, Bytes>)rounded << 23);
  }
};

constexpr float kMost = 87.0f;  // its exponential is finite, and that of −87 normal

// e^−x, with x clamped.
template <int Bytes>
FASTRIS_INLINE Vector<float, Bytes> exponential_of_minus(const Vector<float, Bytes>& x) {
  const Exponential<Bytes> e(-clamp<Bytes>(x, kMost));
  return e.power * e.rest + e.power;
}

// tanh |y| = t / (t + 2) with t = e^2|y| − 1, which keeps all digits near 0; |y| no larger than `most`.
template <int Bytes>
struct Tangent {
  using Real = Vector<float, Bytes>;
  using Int = Vector<int32_t, Bytes>;

  Real t, signed_t;  // the latter with the sign of y

  FASTRIS_INLINE Tangent(const Real& y, float most) {
    const Int sign = (Int)y & INT32_MIN;
    const Real size = at_most<Bytes>((Real)((Int)y ^ sign), most);
    const Exponential<Bytes> e(size + size);
    t = e.power * e.rest + (e.power - 1.0f);
    signed_t = (Real)((Int)t | sign);
  }
};

// σ(x) · tanh(y) with one division; 0 where it would be below e^−69.
template <int Bytes>
FASTRIS_INLINE Vector<float, Bytes> sigmoid_tanh(const Vector<float, Bytes>& x, const Vector<float, Bytes>& y) {
  const Tangent<Bytes> tangent(y, 9.5f);  // from there on tanh is 1; the denominators' product may be infinite
  return tangent.signed_t / ((1.0f + exponential_of_minus<Bytes>(x)) * (tangent.t + 2.0f));
}

// c · σ(x)
template <int Bytes>
FASTRIS_INLINE Vector<float, Bytes> times_sigmoid(const Vector<float, Bytes>& c, const Vector<float, Bytes>& x) {
  return c / (1.0f + exponential_of_minus<Bytes>(x));
}

// An activation and its slope. In fp32 that has its digits also where the activation is near 1, and one less that none.
template <typename T, int Bytes>
struct Activated {
  Vector<T, Bytes> value, slope;
};

template <int Bytes>
FASTRIS_INLINE Activated<float, Bytes> sigmoid(const Vector<float, Bytes>& x) {
  const Vector<float, Bytes> e = exponential_of_minus<Bytes>(x), value = 1.0f / (1.0f + e);
  return {value, e * value * value};
}

template <int Bytes>
FASTRIS_INLINE Activated<float, Bytes> hyperbolic_tangent(const Vector<float, Bytes>& y) {
  const Tangent<Bytes> tangent(y, kMost / 2);
  const Vector<float, Bytes> inverse = 1.0f / (tangent.t + 2.0f), twice = 2.0f * inverse;
  return {tangent.signed_t * inverse, (tangent.t + 1.0f) * twice * twice};
}

template <int Bytes>
FASTRIS_INLINE Activated<double, Bytes> sigmoid(const Vector<double, Bytes>& x) {
  Vector<double, Bytes> y;
  for (int i = 0; i < VectorOf<double, Bytes>::lanes; ++i) y[i] = 1.0 / (1.0 + std::exp(-x[i]));
  return {y, y * (1.0 - y)};
}

template <int Bytes>
FASTRIS_INLINE Activated<double, Bytes> hyperbolic_tangent(const Vector<double, Bytes>& x) {
  Vector<double, Bytes> y;
  for (int i = 0; i < VectorOf<double, Bytes>::lanes; ++i) y[i] = std::tanh(x[i]);
  return {y, 1.0 - y * y};
}

template <int Bytes>
FASTRIS_INLINE Vector<double, Bytes> sigmoid_tanh(const Vector<double, Bytes>& x, const Vector<double, Bytes>& y) {
  return sigmoid<Bytes>(x).value * hyperbolic_tangent<Bytes>(y).value;
}

template <int Bytes>
FASTRIS_INLINE Vector<double, Bytes> times_sigmoid(const Vector<double, Bytes>& c, const Vector<double, Bytes>& x) {
  return c * sigmoid<Bytes>(x).value;
}

}  // namespace fastris
