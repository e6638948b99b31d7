// Activations f(x) and their derivatives:
//
//   gelu        x Phi(x), Phi the normal distribution          slope  Phi(x) + x exp(-x^2/2) / sqrt(2 pi)
//   gelu_tanh   x sigmoid(z), z = x (c + d x^2)                slope  s + x s (1 - s) (c + 3 d x^2)
//   silu        x sigmoid(x)                                   slope  s + x s (1 - s)
//
// c = 2 sqrt(2 / pi), d = 0.044715 c: (1 + tanh(z / 2)) / 2 is sigmoid(z) (Hendrycks & Gimpel 2016, "Gaussian Error
// Linear Units"; silu: Elfwing et al. 2017). Infinities have the limits of their side, inf and -0.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"
#include "math/softmax.h"

namespace superfine {

enum class Function : int { gelu = 0, gelu_tanh = 1, silu = 2 };

// Rows of adjacent elements, `stride` elements apart.
struct RowsOf {
  const void* data;
  std::int64_t stride;
};

// What a kernel reads and writes. Without `grad`: out = f(gate) * up. With it, and unless they are null:
// out = grad * up * f'(gate) and dup = grad * f(gate). Results are dense.
struct Activation {
  Function function;
  std::int64_t rows, columns;
  DType dtype;  // of everything
  RowsOf gate;  // x
  RowsOf up;    // null for ones
  RowsOf grad;  // null in the forward pass
  void *out, *dup;
};

template <class T>
struct ValueAndSlope {
  T value, slope;
};

// x from -limit to limit; NaN stays NaN.
template <class T>
SF_HD T clamped(T x, T limit) {
  const T below = x > limit ? limit : x;
  return below < -limit ? -limit : below;
}

template <class T>
SF_HD T at_least(T x, T limit) {
  return x < limit ? limit : x;
}

// Phi(x) - 1/2 = x P(x^2) / Q(x^2) for |x| <= 5.4, where float cannot tell Phi from 0 or 1 any more: erf's form in
// Eigen (Guennebaud et al., MathFunctionsImpl.h), with a minimax fit of our own, within 1.3e-8 of itself. Its last
// coefficient is moved by 5 parts in a million, so that at 5.4 the quotient rounds to 1/2. With all rounding, gelu is
// within 4 * 2^-24 |x|; it needs no exponential, which only the slope does.
SF_HD ValueAndSlope<float> gelu(float x) {
  const float t = clamped(x, 5.4f), z = t * t;
  float p = 2.3591124e-8f;
  p = std::fma(p, z, 6.323683e-6f);
  p = std::fma(p, z, 1.606931e-4f);
  p = std::fma(p, z, 4.628952e-3f);
  p = std::fma(p, z, 3.3029214e-2f);
  p = std::fma(p, z, 3.9894226e-1f);
  float q = 1.2198215e-6f;
  q = std::fma(q, z, 7.1172166e-5f);
  q = std::fma(q, z, 1.8386443e-3f);
  q = std::fma(q, z, 2.8180001e-2f);
  q = std::fma(q, z, 2.4945842e-1f);
  q = std::fma(q, z, 1.0f);
  const float phi = at_least(0.5f + t * p / q, 0.0f);
  const float density = 0.398942280f * exp_nonpositive(-0.5f * (x * x));
  return {at_least(x, -14.0f) * phi, std::fma(clamped(x, 14.0f), density, phi)};
}

SF_HD ValueAndSlope<double> gelu(double x) {
  const double near = clamped(x, 40.0), phi = 0.5 * std::erfc(-0.70710678118654752440 * near);
  return {at_least(x, -40.0) * phi, phi + near * 0.39894228040143267794 * std::exp(-0.5 * near * near)};
}

// Beyond these the exponential of either sign is 0.
SF_HD float far_out(float) { return 100.0f; }
SF_HD double far_out(double) { return 1000.0; }

// x sigmoid(z), where z has the sign of x and the derivative dz; `near` is x, clamped.
template <class T>
SF_HD ValueAndSlope<T> times_sigmoid(T x, T near, T z, T dz) {
  const T e = exp_nonpositive(-std::fabs(z)), r = T(1) / (T(1) + e);
  const T sigmoid = z > 0 ? r : e * r;
  return {at_least(x, -far_out(x)) * sigmoid, std::fma(near * dz, e * r * r, sigmoid)};
}

template <class T>
SF_HD ValueAndSlope<T> gelu_tanh(T x) {
  const T c = T(1.59576912160573071176), d = T(0.07135481627260025);
  const T near = clamped(x, far_out(x)), square = near * near;
  return times_sigmoid(x, near, near * std::fma(d, square, c), std::fma(3 * d, square, c));
}

template <class T>
SF_HD ValueAndSlope<T> silu(T x) {
  const T near = clamped(x, far_out(x));
  return times_sigmoid(x, near, near, T(1));
}

}  // namespace superfine
