#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace superfine::cpu {

// Row-wise cross-entropy over `rows` x `vocab` logits; see math in cross_entropy.cpp.
struct CrossEntropy {
  const void* input;  // rows x vocab, unit stride within a row
  std::int64_t rows, vocab, row_stride;
  DType dtype;         // of input and dlogits; losses and lse are float, or double for f64
  const void* target;  // class indices, checked by the caller
  bool target_is_int64;
  std::int64_t target_stride;
  const void* weight;  // null, or one value a class, of the type of losses
  std::int64_t ignore_index;
  double label_smoothing;
};

#define SF_DECLARE(isa)                                                                                                \
  namespace isa {                                                                                                      \
  /* Writes losses and lse; with dlogits also scale * dloss/dinput, where dlogits may be the input. */                 \
  void cross_entropy_forward(const CrossEntropy& args, void* losses, void* lse, void* dlogits, double scale,           \
                             int threads);                                                                             \
  /* dlogits[i] = scale[i * scale_stride] * dloss_i/dinput_i, from the lse of the forward pass. */                     \
  void cross_entropy_backward(const CrossEntropy& args, const void* lse, const void* scale, std::int64_t scale_stride, \
                              void* dlogits, int threads);                                                             \
  }
SF_FOR_EACH_ISA(SF_DECLARE)
#undef SF_DECLARE

}  // namespace superfine::cpu
