// A parameter, its gradient and its moments, as every optimizer here keeps them.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace superfine {

// All pointers address `numel` dense elements in one order; param and grad are of one type, the moments
// of another or the same.
struct MomentTensor {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  std::int64_t numel;
  DType param_dtype;
  DType state_dtype;
};

}  // namespace superfine
