#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "math/adamw.h"

namespace superfine::cpu {

// Steps all tensors in one parallel region. The bits do not depend on `threads` or the ISA.
#define SF_DECLARE(isa)                                                    \
  namespace isa {                                                          \
  void adamw(const AdamWTensor* tensors, std::int64_t count, int threads); \
  }
SF_FOR_EACH_ISA(SF_DECLARE)
#undef SF_DECLARE

}  // namespace superfine::cpu
