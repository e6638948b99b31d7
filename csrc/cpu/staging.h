#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "math/moments.h"
#include "math/quantized.h"

namespace superfine::cpu {

// Elements of a strip: whole blocks of 8-bit moments, few enough for all of a strip to stay in the L1 cache.
constexpr std::int64_t kStage = 1024;
static_assert(kStage % kQuantBlock == 0);

// A strip of a tensor as floats. Kernels read these where the tensor itself is stored as none of them reads it.
struct Stage {
  alignas(64) float param[kStage], grad[kStage], exp_avg[kStage], exp_avg_sq[kStage],
      max_exp_avg_sq[kStage], anchor[kStage];
};

// Whether it takes one: 8-bit moments, and parameters with a remainder of rounding or rounded at random.
inline bool is_staged(const MomentTensor& t) {
  return t.state_dtype == DType::u8 || t.master == Master::kahan || t.master == Master::stochastic;
}

// Elements [begin, begin + n) of a tensor that is not float64, n <= kStage; begin is a multiple of kStage.
#define SF_DECLARE(isa)                                                                        \
  namespace isa {                                                                              \
  void load_stage(const MomentTensor& t, std::int64_t begin, std::int64_t n, Stage& stage);    \
  void load_moments(const MomentTensor& t, std::int64_t begin, std::int64_t n, Stage& stage);  \
  void store_moments(const MomentTensor& t, std::int64_t begin, std::int64_t n, Stage& stage); \
  void load_param(const MomentTensor& t, std::int64_t begin, std::int64_t n, Stage& stage);    \
  void store_param(const MomentTensor& t, std::int64_t begin, std::int64_t n, Stage& stage);   \
  void zero_grad(const MomentTensor& t, std::int64_t begin, std::int64_t n);                   \
  }
SF_FOR_EACH_ISA(SF_DECLARE)
#undef SF_DECLARE

// The strip as a tensor of its own.
template <class Tensor>
Tensor staged(const Tensor& t, std::int64_t n, Stage& stage) {
  Tensor whole = t;
  whole.param = stage.param;
  whole.grad = stage.grad;
  whole.exp_avg = stage.exp_avg;
  whole.exp_avg_sq = stage.exp_avg_sq;
  if (t.max_exp_avg_sq != nullptr) whole.max_exp_avg_sq = stage.max_exp_avg_sq;
  if (t.anchor != nullptr) whole.anchor = stage.anchor;
  whole.remainder = nullptr;
  whole.scales = nullptr;
  whole.numel = n;
  whole.param_dtype = whole.state_dtype = DType::f32;
  whole.master = Master::none;
  whole.zero_grad = false;
  return whole;
}

}  // namespace superfine::cpu
