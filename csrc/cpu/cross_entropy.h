#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "math/cross_entropy.h"

namespace superfine::cpu {

#define SF_DECLARE(isa)                                                                                          \
  namespace isa {                                                                                                \
  /* Writes kRowResults, or kRowStatistics, of every row to `out`; with dlogits also scale * dloss/dinput, where \
     dlogits may be the input. */                                                                                \
  void cross_entropy_forward(const CrossEntropy& args, void* out, bool statistics, void* dlogits, double scale,  \
                             int threads);                                                                       \
  /* dlogits[i] = scale[i * scale_stride] * dloss_i/dinput_i; `sums` holds lse, then mass, of all classes. */    \
  void cross_entropy_backward(const CrossEntropy& args, const void* sums, const void* scale,                     \
                              std::int64_t scale_stride, void* dlogits, int threads);                            \
  /* Writes kPartResults, or kPartStatistics, of every row to `out`. */                                          \
  void cross_entropy_part(const CrossEntropy& args, void* out, bool statistics, int threads);                    \
  }
SF_FOR_EACH_ISA(SF_DECLARE)
#undef SF_DECLARE

}  // namespace superfine::cpu
