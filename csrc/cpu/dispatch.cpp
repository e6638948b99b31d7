#include "cpu/dispatch.h"

#include <initializer_list>

namespace superfine::cpu {
namespace {

#define SF_ROW(isa)              \
  {#isa,                         \
   &isa::activation,             \
   &isa::adamw,                  \
   &isa::add_to_split,           \
   &isa::cross_entropy_forward,  \
   &isa::cross_entropy_backward, \
   &isa::cross_entropy_part,     \
   &isa::elementwise_loss,       \
   &isa::lamb,                   \
   &isa::layer_norm,             \
   &isa::layer_norm_gradient,    \
   &isa::round_split,            \
   &isa::sums_of_squares},
#ifdef SF_X86
constexpr Kernels kTable[] = {SF_FOR_EACH_ISA(SF_ROW)};
#else
constexpr Kernels kTable[] = {SF_ROW(baseline)};
#endif
#undef SF_ROW

}  // namespace

bool has_isa(Isa isa) {
#ifdef SF_X86
  switch (isa) {
    case Isa::baseline: return true;
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

Isa best_isa() {
  for (const Isa isa : {Isa::avx512, Isa::avx2}) {
    if (has_isa(isa)) return isa;
  }
  return Isa::baseline;
}

const Kernels& kernels(Isa isa) { return kTable[static_cast<int>(isa)]; }

}  // namespace superfine::cpu
