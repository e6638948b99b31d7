// The arguments of `cross_entropy` from Python's integers, for every backend.
#pragma once

#include <cstdint>

#include "math/cross_entropy.h"

namespace superfine {

template <class T = void>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline CrossEntropy cross_entropy_args(std::uintptr_t input, std::int64_t rows, std::int64_t vocab,
                                       std::int64_t row_stride, int dtype, std::uintptr_t target, bool target_is_int64,
                                       std::int64_t target_stride, std::uintptr_t weight, std::int64_t ignore_index,
                                       double label_smoothing) {
  return {pointer(input),
          rows,
          vocab,
          row_stride,
          static_cast<DType>(dtype),
          pointer(target),
          target_is_int64,
          target_stride,
          pointer(weight),
          ignore_index,
          label_smoothing};
}

}  // namespace superfine
