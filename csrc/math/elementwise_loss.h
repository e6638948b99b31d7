// Losses of one output x and its target t, element by element, with the derivative to x:
//
//   binary cross-entropy of a logit, with p = pos_weight:
//     loss  = (1 - t) x + (1 - t + p t) log(1 + exp(-x))  =  a x + (1 - t + p t) log(1 + e)
//     slope = a -+ (1 - t + p t) e / (1 + e)                 - where x > 0, else +
//     e = exp(-|x|),  a = 1 - t where x > 0, else -p t
//   mean squared error:
//     loss  = (x - t)^2,  slope = 2 (x - t)
//
// The right-hand sides overflow nowhere, and with t in [0, 1] all terms of the loss have one sign.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"
#include "math/softmax.h"

namespace superfine {

enum class Loss : int { bce_with_logits = 0, mse = 1 };

// Element i has values[i / repeat % length]: a tensor that was broadcast, without its copies. Ones where values is
// null.
struct Pattern {
  const void* values;  // Reals
  std::int64_t length, repeat;
};

// What a kernel reads and writes, dense and flat, in memory of the device it runs on. "Real" is double for f64 inputs
// and float for all others.
struct ElementwiseLoss {
  Loss loss;
  std::int64_t count;
  const void* input;
  DType dtype;  // of input and gradient
  const void* target;
  DType target_dtype;          // that of the input, or f32 beside bf16 and f16
  Pattern weight, pos_weight;  // of the loss; of the positive part of a binary cross-entropy
  const void* scale;           // null for ones, or Reals that the gradient is multiplied by: element i's is at
  std::int64_t scale_stride;   // i * scale_stride
  double denominator;          // what the gradient is divided by, and on a GPU the sums
  void* losses;                // null, or a Real for each element: weight * loss
  void* sums;                  // null, or partial sums of these: doubles on the CPU, floats on a GPU
  void* gradient;              // null, or where weight * slope * scale / denominator goes; may be the input
};

template <class T>
struct LossAndSlope {
  T loss, slope;
};

template <class T>
struct LogAndRatio {
  T log1p, ratio;  // log(1 + e) and e / (1 + e)
};

// a / b; on a GPU within 2 units in the last place, in a fifth of the instructions of the rounded quotient.
SF_HD float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// For e in [0, 1]: log(1 + e) = 2 atanh(s) with s = e / (2 + e) <= 1/3, whose series in s^2 a polynomial replaces
// (minimax, 5e-9 of the result); one division serves both. Within 3 units in the last place.
SF_HD LogAndRatio<float> log_and_ratio(float e) {
  const float one = 1.0f + e, two = 2.0f + e;
  const float r = quotient(e, one * two);
  const float s = r * one, z = s * s;
  float p = 2.795074e-1f;
  p = std::fma(p, z, 2.801597e-1f);
  p = std::fma(p, z, 4.00205e-1f);
  p = std::fma(p, z, 6.6666436e-1f);
  return {std::fma(p * z, s, s + s), r * two};
}
SF_HD LogAndRatio<double> log_and_ratio(double e) { return {std::log1p(e), e / (1 + e)}; }

// exp(-|x|); NaN stays NaN.
SF_HD float exp_minus_abs(float x) { return exp_nonpositive(x > 0 ? -x : x); }
SF_HD double exp_minus_abs(double x) { return std::exp(x > 0 ? -x : x); }

template <class T>
SF_HD LossAndSlope<T> bce_with_logits(T x, T t, T pos_weight) {
  const T negative = T(1) - t, positive = pos_weight * t, both = negative + positive;
  const LogAndRatio<T> of = log_and_ratio(exp_minus_abs(x));
  const T a = x > 0 ? negative : -positive;
  const T b = both * of.ratio;
  const T ax = a == 0 ? T(0) : a * x;  // where the logit is infinite, too
  return {std::fma(both, of.log1p, ax), a + (x > 0 ? -b : b)};
}

template <class T>
SF_HD LossAndSlope<T> mse(T x, T t) {
  const T difference = x - t;
  return {difference * difference, T(2) * difference};
}

}  // namespace superfine
