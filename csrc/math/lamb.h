// LAMB for one element (You et al. 2020, "Large Batch Optimization for Deep Learning", Algorithm 2):
//
//   m <- beta1 * m + beta3 * g                      beta3 = 1 - beta1, or 1 without grad_averaging
//   v <- beta2 * v + (1 - beta2) * g * g
//   u <- (m / bias1) / (sqrt(v) / sqrt(bias2) + eps) + weight_decay * p            or p - a, toward an anchor a
//   p <- p - lr * trust_ratio * u                   trust_ratio = |p| / |u| over the tensor
//
// Two passes: the moments and both norms first, then the parameter. u follows from the moments as they
// are stored, so whether it is kept or computed again, the norm is that of the update which is made.
// Every rounding is spelled out, as in adamw.h.
//
// A norm adds its squares in an order of its own, which is that of a GPU's warps and which vectors follow
// as well: 32 lanes over each block of 2048 elements, in the type of computation; then, in double, trees
// over the lanes of a block, over the blocks of a chunk, and over the chunks of the tensor. So CPU and CUDA
// agree in every bit, however the work is shared out.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"
#include "math/moments.h"
#include "math/power.h"

namespace superfine {

// What one tensor needs at one step; computed in double by `scalars`, then rounded once to T.
template <class T>
struct LambScalars {
  T gradient_scale;
  T beta1;
  T beta3;
  T beta2;
  T one_minus_beta2;
  T inverse_bias1;       // 1 / (1 - beta1^t), or 1
  T inverse_sqrt_bias2;  // 1 / sqrt(1 - beta2^t), or 1
  T eps;
  T weight_decay;
  double lr;
  std::int32_t adapt;       // with trust ratio
  std::int32_t trust_clip;  // trust ratio at most 1
};

// What the scalars of every step follow from.
struct LambOptions : RuleOptions {
  bool bias_correction, grad_averaging, adapt, trust_clip;
};

// `inverse_bias1` is 1 / (1 - beta1^t), `inverse_sqrt_bias2` is 1 / sqrt(1 - beta2^t).
SF_HD LambScalars<double> scalars(const LambOptions& o, double inverse_bias1, double inverse_sqrt_bias2) {
  LambScalars<double> s;
  s.gradient_scale = o.gradient_scale;
  s.beta1 = o.beta1;
  s.beta3 = o.grad_averaging ? 1.0 - o.beta1 : 1.0;
  s.beta2 = o.beta2;
  s.one_minus_beta2 = 1.0 - o.beta2;
  s.inverse_bias1 = o.bias_correction ? inverse_bias1 : 1.0;
  s.inverse_sqrt_bias2 = o.bias_correction ? inverse_sqrt_bias2 : 1.0;
  s.eps = o.eps;
  s.weight_decay = o.weight_decay;
  s.lr = o.lr;
  s.adapt = o.adapt;
  s.trust_clip = o.trust_clip;
  return s;
}
inline LambScalars<double> scalars(const LambOptions& o, double step) {
  return scalars(o, 1.0 / (1.0 - power(o.beta1, step)), 1.0 / std::sqrt(1.0 - power(o.beta2, step)));
}

template <class T>
SF_HD LambScalars<T> round_scalars(const LambScalars<double>& s) {
  return {static_cast<T>(s.gradient_scale),
          static_cast<T>(s.beta1),
          static_cast<T>(s.beta3),
          static_cast<T>(s.beta2),
          static_cast<T>(s.one_minus_beta2),
          static_cast<T>(s.inverse_bias1),
          static_cast<T>(s.inverse_sqrt_bias2),
          static_cast<T>(s.eps),
          static_cast<T>(s.weight_decay),
          s.lr,
          s.adapt,
          s.trust_clip};
}

template <class T>
SF_HD void lamb_moments(const LambScalars<T>& s, T g, T& m, T& v) {
  g *= s.gradient_scale;
  m = std::fma(s.beta1, m, s.beta3 * g);
  v = std::fma(s.one_minus_beta2 * g, g, v * s.beta2);
}

// `distance` is p, or p - a.
template <class T>
SF_HD T lamb_direction(const LambScalars<T>& s, T distance, T m, T v) {
  const T denominator = std::fma(std::sqrt(v), s.inverse_sqrt_bias2, s.eps);
  return std::fma(s.weight_decay, distance, (m * s.inverse_bias1) / denominator);
}

constexpr int kLambLanes = 32;             // a warp; two AVX-512 vectors, so that an addition's latency shows less
constexpr std::int64_t kLambBlock = 2048;  // elements that one set of lanes sums up
constexpr int kLambWarps = 4;              // blocks of a chunk; the chunks of a tensor go around 4 x 32 lanes
constexpr std::int64_t kLambChunk = kLambWarps * kLambBlock;

// Sums of squares.
struct LambNorms {
  double param = 0, direction = 0;

  SF_HD LambNorms& operator+=(const LambNorms& other) {
    param += other.param;
    direction += other.direction;
    return *this;
  }
};

// -lr times the trust ratio |p| / |u|. That is 1 where either vanishes (or is NaN) and where the tensor is not
// adapted, and at most 1 with `trust_clip`.
template <class T>
SF_HD double lamb_negative_step_size(const LambScalars<T>& s, const LambNorms& norms) {
  const double param = std::sqrt(norms.param), direction = std::sqrt(norms.direction);
  double trust_ratio = 1.0;
  if (s.adapt && param > 0 && direction > 0) trust_ratio = param / direction;
  if (s.trust_clip && trust_ratio > 1.0) trust_ratio = 1.0;
  return -s.lr * trust_ratio;
}

// One tensor of a step.
struct LambTensor : MomentTensor {
  LambScalars<double> scalars;
};

}  // namespace superfine
