// Strips of tensors in every storage, as floats and back.
#include "cpu/staging.h"

#include <cstdint>
#include <cstring>

#include "cpu/moments.h"
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

// Calls f(begin, end, scale) for the blocks of a strip; `scale` is the first one's place.
template <class F>
void for_each_block(float* scales, std::int64_t begin, std::int64_t n, const F& f) {
  for (std::int64_t i = 0; i < n; i += kQuantBlock) {
    f(i, i + kQuantBlock < n ? i + kQuantBlock : n, scales + (begin + i) / kQuantBlock);
  }
}

template <class Kind>
QuantScale scale_of(const float* __restrict x, std::int64_t begin, std::int64_t end) {
  std::uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (std::int64_t i = begin; i < end; ++i) {
    const std::uint32_t magnitude = float_bits(x[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return quant_scale<Kind>(largest);
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
  const std::uint8_t* __restrict m = static_cast<const std::uint8_t*>(t.exp_avg) + begin;
  const std::uint8_t* __restrict v = static_cast<const std::uint8_t*>(t.exp_avg_sq) + begin;
  prefetch_next_page(m);
  prefetch_next_page(v);
  for_each_block(t.scales, begin, n, [&](std::int64_t first, std::int64_t last, const float* scale) {
    const float m_scale = scale[0], v_scale = scale[blocks];
#pragma omp simd
    for (std::int64_t i = first; i < last; ++i) {
      stage.exp_avg[i] = dequantize_first(m[i], m_scale);
      stage.exp_avg_sq[i] = dequantize_second(v[i], v_scale);
    }
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
  std::uint8_t* __restrict m = static_cast<std::uint8_t*>(t.exp_avg) + begin;
  std::uint8_t* __restrict v = static_cast<std::uint8_t*>(t.exp_avg_sq) + begin;
  for_each_block(t.scales, begin, n,
                 [&, key = random_key_at(t.random_key, begin)](std::int64_t first, std::int64_t last, float* scale) {
                   const QuantScale m_scale = scale_of<FirstMoment>(stage.exp_avg, first, last);
                   const QuantScale v_scale = scale_of<SecondMoment>(stage.exp_avg_sq, first, last);
                   scale[0] = m_scale.scale;
                   scale[blocks] = v_scale.scale;
#pragma omp simd
                   for (std::int64_t i = first; i < last; ++i) {
                     const float vi = stage.exp_avg_sq[i];
                     m[i] = quantize_first(stage.exp_avg[i], m_scale);
                     v[i] = quantize_second(vi, v_scale, random_bits(key, static_cast<std::int32_t>(i), vi));
                   }
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
