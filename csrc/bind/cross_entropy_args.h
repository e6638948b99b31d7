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
          label_smoothing,
          0,
          vocab};
}

// The same, as the classes from `first_class` on of a wider matrix.
inline CrossEntropy part_of(CrossEntropy args, std::int64_t first_class, std::int64_t classes) {
  args.first_class = first_class;
  args.classes = classes;
  return args;
}

}  // namespace superfine
