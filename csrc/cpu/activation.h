#pragma once

#include "cpu/isa.h"
#include "math/activation.h"

namespace superfine::cpu {

#define SF_DECLARE(isa)                                 \
  namespace isa {                                       \
  void activation(const Activation& args, int threads); \
  }
SF_FOR_EACH_ISA(SF_DECLARE)
#undef SF_DECLARE

}  // namespace superfine::cpu
