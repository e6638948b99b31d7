// Strips of tensors in every storage, as floats and back.
#include "cpu/staging.h"

#include <cstdint>
#include <cstring>

#include "cpu/moments.h"
#include "cpu/quantized_block.h"
#include "math/quantized.h"
#include "math/random.h"

namespace superfine::cpu::SF_ISA {
namespace {

// Calls f(x) with the address of the i-th element of a tensor of numbers that is not float64.
template <class F>
void with_elements(void* data, DType dtype, std::int64_t i, const F& f) {
  switch (dtype) {
    case DType::bf16: return f(static_cast<bf16*>(data) + i);
    case DType::f16: return f(static_cast<f16*>(data) + i);
    default: return f(static_cast<float*>(data) + i);
  }
}

void load_numbers(const void* data, DType dtype, std::int64_t begin, std::int64_t n, float* __restrict out) {
  with_elements(const_cast<void*>(data), dtype, begin, [=](const auto* x) {
    prefetch_next_page(x);
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] = load(x[i]);
  });
}

void store_numbers(void* data, DType dtype, std::int64_t begin, std::int64_t n, const float* __restrict values) {
  with_elements(data, dtype, begin, [=](auto* x) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) store(&x[i], values[i]);
  });
}

}  // namespace

void load_param(const MomentTensor& t, std::int64_t begin, std::int64_t n, Stage& stage) {
  float* __restrict out = stage.param;
  if (t.master == Master::split) {
    const Split param(t);
    param.prefetch_next_page(begin);
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] = param.get(begin + i);
    return;
  }
  load_numbers(t.param, t.param_dtype, begin, n, out);
  if (t.master != Master::kahan) return;
  with_elements(t.remainder, t.param_dtype, begin, [=](const auto* low) {
    prefetch_next_page(low);
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] += load(low[i]);
  });
}

void store_param(const MomentTensor& t, std::int64_t begin, std::int64_t n, Stage& stage) {
  const float* __restrict x = stage.param;
  if (t.master == Master::split) {
    const Split param(t);
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) param.set(begin + i, x[i]);
  } else if (t.master == Master::kahan) {
    with_elements(t.param, t.param_dtype, begin, [&](auto* high) {
      auto* low = static_cast<decltype(high)>(t.remainder) + begin;
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) store_compensated(x[i], &high[i], &low[i]);
    });
  } else if (t.master == Master::stochastic) {
    bf16* __restrict param = static_cast<bf16*>(t.param) + begin;
    const std::uint32_t key = random_key_at(~t.random_key, begin);  // the moments have the other half of the keys
    const std::int32_t count = static_cast<std::int32_t>(n);
#pragma omp simd
    for (std::int32_t i = 0; i < count; ++i) store_stochastic(&param[i], x[i], random_bits(key, i, x[i]));
  } else {
    store_numbers(t.param, t.param_dtype, begin, n, x);
  }
}

void load_moments(const MomentTensor& t, std::int64_t begin, std::int64_t n, Stage& stage) {
  if (t.state_dtype != DType::u8) {
    load_numbers(t.exp_avg, t.state_dtype, begin, n, stage.exp_avg);
    load_numbers(t.exp_avg_sq, t.state_dtype, begin, n, stage.exp_avg_sq);
    if (t.max_exp_avg_sq != nullptr) load_numbers(t.max_exp_avg_sq, t.state_dtype, begin, n, stage.max_exp_avg_sq);
    return;
  }
  const std::int64_t blocks = quant_blocks(t.numel);
  const std::uint8_t* const all_m = static_cast<const std::uint8_t*>(t.exp_avg) + begin;
  const std::uint8_t* const all_v = static_cast<const std::uint8_t*>(t.exp_avg_sq) + begin;
  prefetch_next_page(all_m);
  prefetch_next_page(all_v);
  for_each_block(t.scales, begin, n, [&](std::int64_t first, std::int32_t count, const float* scale) {
    const std::uint8_t* __restrict m = all_m + first, * __restrict v = all_v + first;
    float* __restrict m_out = stage.exp_avg + first, * __restrict v_out = stage.exp_avg_sq + first;
    const float m_scale = scale[0], v_scale = scale[blocks];
    alignas(64) std::int32_t codes[kQuantBlock];
    widen(m, count, codes);
#pragma omp simd
    for (std::int32_t i = 0; i < count; ++i) m_out[i] = dequantize_first(codes[i], m_scale);
    widen(v, count, codes);
#pragma omp simd
    for (std::int32_t i = 0; i < count; ++i) v_out[i] = dequantize_second(codes[i], v_scale);
  });
}

void store_moments(const MomentTensor& t, std::int64_t begin, std::int64_t n, Stage& stage) {
  if (t.state_dtype != DType::u8) {
    store_numbers(t.exp_avg, t.state_dtype, begin, n, stage.exp_avg);
    store_numbers(t.exp_avg_sq, t.state_dtype, begin, n, stage.exp_avg_sq);
    if (t.max_exp_avg_sq != nullptr) store_numbers(t.max_exp_avg_sq, t.state_dtype, begin, n, stage.max_exp_avg_sq);
    return;
  }
  const std::int64_t blocks = quant_blocks(t.numel);
  std::uint8_t* const m = static_cast<std::uint8_t*>(t.exp_avg) + begin;
  std::uint8_t* const v = static_cast<std::uint8_t*>(t.exp_avg_sq) + begin;
  for_each_block(t.scales, begin, n, [&](std::int64_t first, std::int32_t count, float* scale) {
    const float *x = stage.exp_avg + first, *x_sq = stage.exp_avg_sq + first;
    scale[0] = quantize_first_moments(x, count, largest_magnitude(x, count), m + first);
    scale[blocks] = quantize_second_moments(x_sq, count, largest_magnitude(x_sq, count), v + first,
                                            random_key_at(t.random_key, begin + first));
  });
}

void load_stage(const MomentTensor& t, std::int64_t begin, std::int64_t n, Stage& stage) {
  load_param(t, begin, n, stage);
  load_moments(t, begin, n, stage);
  load_numbers(t.grad, t.param_dtype, begin, n, stage.grad);
  if (t.anchor != nullptr) load_numbers(t.anchor, t.param_dtype, begin, n, stage.anchor);
}

void zero_grad(const MomentTensor& t, std::int64_t begin, std::int64_t n) {
  const std::int64_t size = t.param_dtype == DType::f32 ? 4 : 2;
  std::memset(static_cast<char*>(t.grad) + begin * size, 0, static_cast<std::size_t>(n * size));
}

}  // namespace superfine::cpu::SF_ISA
