// The arguments of `elementwise_loss` from Python's integers, for every backend.
#pragma once

#include <cstdint>

#include "bind/cross_entropy_args.h"
#include "math/elementwise_loss.h"

namespace superfine {

inline ElementwiseLoss elementwise_loss_args(int loss, std::int64_t count, std::uintptr_t input, int dtype,
                                             std::uintptr_t target, int target_dtype, std::uintptr_t weight,
                                             std::int64_t weight_length, std::int64_t weight_repeat,
                                             std::uintptr_t pos_weight, std::int64_t pos_weight_length,
                                             std::int64_t pos_weight_repeat, std::uintptr_t scale,
                                             std::int64_t scale_stride, double denominator, std::uintptr_t losses,
                                             std::uintptr_t gradient) {
  return {static_cast<Loss>(loss),
          count,
          pointer(input),
          static_cast<DType>(dtype),
          pointer(target),
          static_cast<DType>(target_dtype),
          {pointer(weight), weight_length, weight_repeat},
          {pointer(pos_weight), pos_weight_length, pos_weight_repeat},
          pointer(scale),
          scale_stride,
          denominator,
          pointer(losses),
          nullptr,
          pointer(gradient)};
}

}  // namespace superfine
