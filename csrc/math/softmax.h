// The functions behind softmax and cross-entropy on the CPU.
//
// Branch-free, so that loops over them vectorise; every rounding is written out, so that every instruction set gives
// the same bits.
#pragma once

#include <cmath>

#include "core/dtype.h"
#include "core/macros.h"

namespace superfine {

// exp(x) for x <= 0, NaN in, NaN out: Cody-Waite reduction x = n ln2 + r, |r| <= ln2/2, then the polynomial of degree 6
// whose relative error there is the smallest (3e-9) of those with exp(r) = 1 + r + ...; at most 1.1 ulp from the true
// value. Below -87.7 it is zero.
SF_HD float exp_nonpositive(float x) {
  const float lowest = -88.0f;  // its power of two is 2^-127, of whose exponent no bit is set: scale is 0
  const float clamped = lowest > x ? lowest : x;
  const float magic = 12583039.0f;  // 1.5 * 2^23 + 127: a sum with it is rounded to an integer, in its low bits
  const float shifted = std::fma(clamped, 1.44269504f, magic);
  const float n = shifted - magic;
  float r = std::fma(n, -0.693359375f, clamped);
  r = std::fma(n, 2.12194440e-4f, r);
  float p = 1.3814540e-3f;
  p = std::fma(p, r, 8.3687451e-3f);
  p = std::fma(p, r, 4.1668391e-2f);
  p = std::fma(p, r, 1.66665204e-1f);
  p = std::fma(p, r, 4.99999934e-1f);
  p = std::fma(p, r * r, r);
  const float scale = bits_float(float_bits(shifted) << 23);
  return std::fma(p, scale, scale);
}

inline double exp_nonpositive(double x) { return std::exp(x); }

// tanh(x): near 0 the polynomial of Cephes' tanhf, else by e = exp(-2|x|); at most 2 ulp from the true value.
SF_HD float hyperbolic_tangent(float x) {
  const float size = std::fabs(x), e = exp_nonpositive(-2.0f * size);
  const float far = std::copysign((1.0f - e) / (1.0f + e), x);
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = std::fma(p, z, 2.06390887954e-2f);
  p = std::fma(p, z, -5.37397155531e-2f);
  p = std::fma(p, z, 1.33314422036e-1f);
  p = std::fma(p, z, -3.33332819422e-1f);
  return size < 0.625f ? std::fma(p * z, x, x) : far;
}

inline double hyperbolic_tangent(double x) { return std::tanh(x); }

// 1 - tanh(x)^2 = 4 e / (1 + e)^2 with e = exp(-2|x|), which loses no digits where tanh is near 1.
template <class T>
SF_HD T tangent_slope(T x) {
  const T e = exp_nonpositive(T(-2) * std::fabs(x)), d = T(1) + e;
  return T(4) * e / (d * d);
}

}  // namespace superfine
