#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "math/cross_entropy.h"

namespace superfine::cpu {

#define SF_DECLARE(isa)                                                                                                \
  namespace isa {                                                                                                      \
  /* Writes losses and lse; with dlogits also scale * dloss/dinput, where dlogits may be the input. */                 \
  void cross_entropy_forward(const CrossEntropy& args, void* losses, void* lse, void* dlogits, double scale,           \
                             int threads);                                                                             \
  /* dlogits[i] = scale[i * scale_stride] * dloss_i/dinput_i, from the lse of the forward pass. */                     \
  void cross_entropy_backward(const CrossEntropy& args, const void* lse, const void* scale, std::int64_t scale_stride, \
                              void* dlogits, int threads);                                                             \
  /* Writes four times `rows` Reals, of what a part of the classes adds to the losses: the maximum of its logits, the  \
     sum of the exponentials relative to that, the logit of the target (0 where it is another part's), and with        \
     smoothing sum_c w_c x_c. */                                                                                       \
  void cross_entropy_part(const CrossEntropy& args, void* out, int threads);                                           \
  }
SF_FOR_EACH_ISA(SF_DECLARE)
#undef SF_DECLARE

}  // namespace superfine::cpu
