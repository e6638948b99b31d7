// AdamW for one element (Loshchilov & Hutter 2019, Algorithm 2), in torch's order of operations:
//
//   p <- p * (1 - lr * weight_decay)                 or a + (p - a) * (1 - lr * weight_decay), a: anchor
//   m <- m + (1 - beta1) * (g - m)
//   v <- beta2 * v + (1 - beta2) * g * g
//   p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// Adam (Kingma & Ba 2015) instead begins with g <- g + weight_decay * p, or * (p - a), and does not decay p.
//
// Every rounding is spelled out (two fmas, the rest separate), so that all instruction sets and CUDA
// (-fmad=false) give the same bits; on fp32 they are also those of torch's fused CPU step, except for
// its scalar tail of a few elements.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"
#include "math/moments.h"
#include "math/power.h"

namespace superfine {

// What one tensor needs at one step; computed in double by `scalars`, then rounded once to T.
template <class T>
struct AdamWScalars {
  T decay;  // 1 - lr * weight_decay
  T one_minus_beta1;
  T beta2;
  T one_minus_beta2;
  T eps;
  T negative_step_size;     // -lr / (1 - beta1^t)
  T sqrt_bias_correction2;  // sqrt(1 - beta2^t)
  T gradient_scale;
  T coupled_decay;  // weight decay of Adam's kind; then `decay` is 1
};

// What the scalars of every step follow from.
struct AdamWOptions : RuleOptions {
  bool decoupled;  // AdamW; else Adam
};

// `step_size` is lr / (1 - beta1^t), `sqrt_bias2` is sqrt(1 - beta2^t).
SF_HD AdamWScalars<double> scalars(const AdamWOptions& o, double step_size, double sqrt_bias2) {
  AdamWScalars<double> s;
  s.decay = o.decoupled ? 1.0 - o.lr * o.weight_decay : 1.0;
  s.one_minus_beta1 = 1.0 - o.beta1;
  s.beta2 = o.beta2;
  s.one_minus_beta2 = 1.0 - o.beta2;
  s.eps = o.eps;
  s.negative_step_size = -step_size;
  s.sqrt_bias_correction2 = sqrt_bias2;
  s.gradient_scale = o.gradient_scale;
  s.coupled_decay = o.decoupled ? 0.0 : o.weight_decay;
  return s;
}
inline AdamWScalars<double> scalars(const AdamWOptions& o, double step) {
  return scalars(o, o.lr / (1.0 - power(o.beta1, step)), std::sqrt(1.0 - power(o.beta2, step)));
}

template <class T>
SF_HD AdamWScalars<T> round_scalars(const AdamWScalars<double>& s) {
  return {static_cast<T>(s.decay),
          static_cast<T>(s.one_minus_beta1),
          static_cast<T>(s.beta2),
          static_cast<T>(s.one_minus_beta2),
          static_cast<T>(s.eps),
          static_cast<T>(s.negative_step_size),
          static_cast<T>(s.sqrt_bias_correction2),
          static_cast<T>(s.gradient_scale),
          static_cast<T>(s.coupled_decay)};
}

// x / c for x >= 0 and the same c in every element of a loop. Where there is an fma it costs half a division: the
// product with 1 / c is off by little, its remainder is exact, and the quotient corrected twice is the correctly
// rounded one (Markstein 1990, "Computation of elementary functions on the IBM RISC System/6000 processor").
SF_HD float divide_by(float x, float c) {
#if defined(__FMA__) && !defined(__CUDA_ARCH__)
  const float reciprocal = 1.0f / c;
  float q = x * reciprocal;
  q = std::fma(std::fma(-c, q, x), reciprocal, q);
  q = std::fma(std::fma(-c, q, x), reciprocal, q);
  return x <= 3.40282347e38f ? q : x;  // infinity has no remainder
#else
  return x / c;
#endif
}
SF_HD double divide_by(double x, double c) { return x / c; }

template <class T>
SF_HD T adamw_decay(const AdamWScalars<T>& s, T p) {
  return p * s.decay;
}
template <class T>
SF_HD T adamw_decay(const AdamWScalars<T>& s, T p, T anchor) {
  return std::fma(s.decay, p - anchor, anchor);
}

// Adam's gradient, scaled already; `distance` is p, or p - a.
template <class T>
SF_HD T adam_gradient(const AdamWScalars<T>& s, T g, T distance) {
  return std::fma(s.coupled_decay, distance, g * s.gradient_scale);
}

// p: decayed parameter, g: gradient, m: exp_avg, v: exp_avg_sq, v_max: max_exp_avg_sq (kAmsgrad only).
template <bool kAmsgrad, class T>
SF_HD void adamw_update(const AdamWScalars<T>& s, T& p, T g, T& m, T& v, T& v_max) {
  g *= s.gradient_scale;
  m = std::fma(s.one_minus_beta1, g - m, m);
  v = std::fma(s.one_minus_beta2 * g, g, v * s.beta2);
  T second_moment = v;
  if (kAmsgrad) {
    v_max = v_max < v || v != v ? v : v_max;  // torch.maximum: NaN wins
    second_moment = v_max;
  }
  const T denominator = divide_by(std::sqrt(second_moment), s.sqrt_bias_correction2) + s.eps;
  p += (s.negative_step_size * m) / denominator;
}

// One tensor of a step.
struct AdamWTensor : MomentTensor {
  AdamWScalars<double> scalars;
};

}  // namespace superfine
