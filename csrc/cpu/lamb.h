#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "math/lamb.h"

namespace superfine::cpu {

// Steps all tensors in one parallel region. The bits do not depend on `threads` or the ISA.
#define SF_DECLARE(isa)                                                  \
  namespace isa {                                                        \
  void lamb(const LambTensor* tensors, std::int64_t count, int threads); \
  }
SF_FOR_EACH_ISA(SF_DECLARE)
#undef SF_DECLARE

}  // namespace superfine::cpu
