#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "math/elementwise_loss.h"

namespace superfine::cpu {

// Elements behind one of `ElementwiseLoss::sums`; the last one may have fewer.
constexpr std::int64_t kElementsPerSum = 16384;

#define SF_DECLARE(isa)                                            \
  namespace isa {                                                  \
  void elementwise_loss(const ElementwiseLoss& args, int threads); \
  }
SF_FOR_EACH_ISA(SF_DECLARE)
#undef SF_DECLARE

}  // namespace superfine::cpu
