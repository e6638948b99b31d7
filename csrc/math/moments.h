// A parameter, its gradient and its moments, as every optimizer here keeps them.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace superfine {

// What keeps the part of a 16-bit parameter that rounding would lose.
enum class Master : std::uint8_t {
  none,
  split,      // the lower half of an fp32 number whose upper half is `param`, in bf16
  kahan,      // what rounding took away, in the parameter's type
  stochastic  // nothing: a bf16 parameter is rounded at random, right on average
};

// All pointers address `numel` dense elements in one order; param, grad and anchor are of one type, the moments
// of another or the same.
struct MomentTensor {
  void* param;
  void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  const void* anchor;    // what weight decay pulls toward; null for zero
  void* remainder;       // of the parameter: see Master; or null
  float* scales;         // of 8-bit moments: those of exp_avg's blocks, then those of exp_avg_sq's; or null
  std::int64_t numel;
  DType param_dtype;
  DType state_dtype;
  Master master;
  bool zero_grad;            // leave zeros behind in grad
  std::uint32_t random_key;  // of this step: see math/random.h
};

// The hyperparameters of every optimizer here.
struct RuleOptions {
  double lr, beta1, beta2, eps, weight_decay;
  double gradient_scale;  // for clipping and loss scaling; its sign is -1 to maximise
};

}  // namespace superfine
