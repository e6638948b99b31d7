#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace superfine::cpu {

#define SF_DECLARE(isa)                                                                              \
  namespace isa {                                                                                    \
  void add_to_split(bf16* high, std::uint16_t* low, const bf16* x, std::int64_t count, int threads); \
  void round_split(bf16* high, const std::uint16_t* low, std::int64_t count, int threads);           \
  }
SF_FOR_EACH_ISA(SF_DECLARE)
#undef SF_DECLARE

}  // namespace superfine::cpu
