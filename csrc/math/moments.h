// A parameter, its gradient and its moments, as every optimizer here keeps them.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace superfine {

// All pointers address `numel` dense elements in one order; param, grad and anchor are of one type, the moments
// of another or the same.
struct MomentTensor {
  void* param;
  void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;     // null without amsgrad
  const void* anchor;       // what weight decay pulls toward; null for zero
  std::uint16_t* low_bits;  // the lower half of an fp32 parameter whose upper half is `param`, in bf16; or null
  std::int64_t numel;
  DType param_dtype;
  DType state_dtype;
  bool zero_grad;  // leave zeros behind in grad
};

}  // namespace superfine
