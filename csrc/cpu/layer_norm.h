#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "math/layer_norm.h"

namespace superfine::cpu {

#define SF_DECLARE(isa)                                                 \
  namespace isa {                                                       \
  void layer_norm(const LayerNorm& args, int threads);                  \
  void layer_norm_gradient(const LayerNormGradient& args, int threads); \
  }
SF_FOR_EACH_ISA(SF_DECLARE)
#undef SF_DECLARE

}  // namespace superfine::cpu
