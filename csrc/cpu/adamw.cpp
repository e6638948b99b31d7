// Multi-tensor AdamW on the CPU: one parallel region over the concatenation of all tensors.
//
// Traffic per fp32 parameter: read p, g, m, v and write p, m, v = 28 bytes; about 15 flops. So the
// floor is memory bandwidth, and the loop below is plain scalar code that the compiler vectorises.
#include "cpu/adamw.h"

#include <algorithm>

#include "core/parallel_for.h"
#include "cpu/moments.h"
#include "cpu/quantized_block.h"
#include "cpu/staging.h"
#include "math/quantized.h"
#include "math/random.h"

namespace superfine::cpu::SF_ISA {
namespace {

// What is done at a time: zeroed gradients are still in the L1 cache then.
constexpr std::int64_t kStrip = kPageElements;

template <bool kAmsgrad, bool kAnchor, class Param, class S>
void update_range(const AdamWTensor& t, const Param param, S, std::int64_t begin, std::int64_t end) {
  using T = typename Param::Math;
  using E = typename Param::Element;
  const AdamWScalars<T> s = round_scalars<T>(t.scalars);
  E* __restrict g = static_cast<E*>(t.grad);
  S* __restrict m = static_cast<S*>(t.exp_avg);
  S* __restrict v = static_cast<S*>(t.exp_avg_sq);
  S* __restrict v_max = static_cast<S*>(t.max_exp_avg_sq);
  const E* __restrict anchor = static_cast<const E*>(t.anchor);
  for (std::int64_t strip = begin; strip < end; strip += kStrip) {
    const std::int64_t stop = strip + kStrip < end ? strip + kStrip : end;
    param.prefetch_next_page(strip);
    prefetch_next_page(g + strip);
    prefetch_next_page(m + strip);
    prefetch_next_page(v + strip);
    if (kAnchor) prefetch_next_page(anchor + strip);
#pragma omp simd
    for (std::int64_t i = strip; i < stop; ++i) {
      T pi = param.get(i), mi = load(m[i]), vi = load(v[i]), v_max_i = kAmsgrad ? load(v_max[i]) : vi;
      pi = kAnchor ? adamw_decay(s, pi, T(load(anchor[i]))) : adamw_decay(s, pi);
      adamw_update<kAmsgrad>(s, pi, T(load(g[i])), mi, vi, v_max_i);
      param.set(i, pi);
      store(&m[i], mi);
      store(&v[i], vi);
      if (kAmsgrad) store(&v_max[i], v_max_i);
    }
    if (t.zero_grad) zero(g, strip, stop);
  }
}

void update_directly(const AdamWTensor& t, std::int64_t begin, std::int64_t end) {
  with_types(t, [&](const auto& param, auto s) {
    if (t.max_exp_avg_sq != nullptr) {
      t.anchor != nullptr ? update_range<true, true>(t, param, s, begin, end)
                          : update_range<true, false>(t, param, s, begin, end);
    } else {
      t.anchor != nullptr ? update_range<false, true>(t, param, s, begin, end)
                          : update_range<false, false>(t, param, s, begin, end);
    }
  });
}

// Strips of a tensor with 8-bit moments and neither anchor nor coupled decay. All but the codes is done in one loop, as
// roots and divisions leave the processor's other units idle.
template <class Param>
void update_quantized(const AdamWTensor& t, const Param param, std::int64_t begin, std::int64_t end) {
  const AdamWScalars<float> s = round_scalars<float>(t.scalars);
  const std::int64_t blocks = quant_blocks(t.numel);
  auto* const grad = static_cast<typename Param::Element*>(t.grad);
  auto* const exp_avg = static_cast<std::uint8_t*>(t.exp_avg);
  auto* const exp_avg_sq = static_cast<std::uint8_t*>(t.exp_avg_sq);
  alignas(64) float m[kQuantBlock], v[kQuantBlock];
  alignas(64) std::int32_t m_codes[kQuantBlock], v_codes[kQuantBlock];
  for_each_block(t.scales, begin, end - begin, [&](std::int64_t i, std::int32_t n, float* scale) {
    const Param block = param.from(begin + i);
    auto* __restrict g = grad + begin + i;
    std::uint8_t *const m_bytes = exp_avg + begin + i, *const v_bytes = exp_avg_sq + begin + i;
    widen(m_bytes, n, m_codes);
    widen(v_bytes, n, v_codes);
    block.prefetch(kStage, n);
    prefetch_elements(g + kStage, n);
    prefetch_elements(m_bytes + kStage, n);
    prefetch_elements(v_bytes + kStage, n);
    const float m_scale = scale[0], v_scale = scale[blocks];
    std::uint32_t m_largest = 0, v_largest = 0;
#pragma omp simd reduction(max : m_largest, v_largest)
    for (std::int32_t k = 0; k < n; ++k) {
      float p = adamw_decay(s, block.get(k)), unused = 0;
      float mk = dequantize_first(m_codes[k], m_scale), vk = dequantize_second(v_codes[k], v_scale);
      adamw_update<false>(s, p, float(load(g[k])), mk, vk, unused);
      block.set(k, p);
      m[k] = mk;
      v[k] = vk;
      m_largest = std::max(m_largest, magnitude_bits(mk));
      v_largest = std::max(v_largest, magnitude_bits(vk));
    }
    scale[0] = quantize_first_moments(m, n, m_largest, m_bytes);
    scale[blocks] = quantize_second_moments(v, n, v_largest, v_bytes, random_key_at(t.random_key, begin + i));
    if (t.zero_grad) zero(g, 0, n);
  });
}

void update_quantized(const AdamWTensor& t, std::int64_t begin, std::int64_t end) {
  if (t.master == Master::split) return update_quantized(t, Split(t), begin, end);
  switch (t.param_dtype) {
    case DType::bf16: return update_quantized(t, Whole<bf16>(t), begin, end);
    case DType::f16: return update_quantized(t, Whole<f16>(t), begin, end);
    default: return update_quantized(t, Whole<float>(t), begin, end);
  }
}

// Adam's decay is part of the gradient; what remains of the step is that of AdamW without decay.
template <class T>
void add_decay(AdamWTensor& t, T* __restrict g, const T* __restrict p, const T* __restrict anchor, std::int64_t n) {
  const AdamWScalars<T> s = round_scalars<T>(t.scalars);
  for (std::int64_t i = 0; i < n; ++i) g[i] = adam_gradient(s, g[i], anchor != nullptr ? p[i] - anchor[i] : p[i]);
  t.scalars.gradient_scale = 1;
  t.grad = g;
  t.anchor = nullptr;
}

void update_staged(const AdamWTensor& t, std::int64_t begin, std::int64_t end) {
  Stage stage;
  for (std::int64_t strip = begin; strip < end; strip += kStage) {
    const std::int64_t n = strip + kStage < end ? kStage : end - strip;
    load_stage(t, strip, n, stage);
    AdamWTensor whole = staged(t, n, stage);
    if (t.scalars.coupled_decay != 0) {
      add_decay(whole, stage.grad, stage.param, t.anchor != nullptr ? stage.anchor : nullptr, n);
    }
    update_directly(whole, 0, n);
    store_param(t, strip, n, stage);
    store_moments(t, strip, n, stage);
    if (t.zero_grad) zero_grad(t, strip, n);
  }
}

// Adam in double.
void update_coupled(const AdamWTensor& t, std::int64_t begin, std::int64_t end) {
  double grad[kStage];
  const double* anchor = static_cast<const double*>(t.anchor);
  for (std::int64_t strip = begin; strip < end; strip += kStage) {
    const std::int64_t n = strip + kStage < end ? kStage : end - strip;
    std::copy_n(static_cast<const double*>(t.grad) + strip, n, grad);
    AdamWTensor part = t;
    part.param = static_cast<double*>(t.param) + strip;
    part.exp_avg = static_cast<double*>(t.exp_avg) + strip;
    part.exp_avg_sq = static_cast<double*>(t.exp_avg_sq) + strip;
    if (t.max_exp_avg_sq != nullptr) part.max_exp_avg_sq = static_cast<double*>(t.max_exp_avg_sq) + strip;
    part.zero_grad = false;
    add_decay(part, grad, static_cast<const double*>(part.param), anchor != nullptr ? anchor + strip : nullptr, n);
    update_directly(part, 0, n);
    if (t.zero_grad) zero(static_cast<double*>(t.grad), strip, strip + n);
  }
}

// What lies between `begin` and `end`. Strips are not divided: the one that `end` lies in belongs to this range, the
// one that `begin` lies in to the range before.
void update_strips(const AdamWTensor& t, std::int64_t begin, std::int64_t end,
                   void (*update)(const AdamWTensor&, std::int64_t, std::int64_t)) {
  const auto next_strip = [&](std::int64_t i) { return std::min((i + kStage - 1) / kStage * kStage, t.numel); };
  update(t, next_strip(begin), next_strip(end));
}

void update(const AdamWTensor& t, std::int64_t begin, std::int64_t end) {
  const bool coupled = t.scalars.coupled_decay != 0;
  const bool plain = t.anchor == nullptr && (t.master == Master::none || t.master == Master::split);
  if (coupled && t.param_dtype == DType::f64) {
    update_strips(t, begin, end, update_coupled);
  } else if (t.state_dtype == DType::u8 && !coupled && plain) {
    update_strips(t, begin, end, update_quantized);
  } else if (coupled || is_staged(t)) {
    update_strips(t, begin, end, update_staged);
  } else {
    update_directly(t, begin, end);
  }
}

}  // namespace

void adamw(const AdamWTensor* tensors, std::int64_t count, int threads) {
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < count; ++i) total += tensors[i].numel;
  // A thread takes 4,096 elements of small steps at a time, 3 us of work, and up to 64 times as many of
  // large ones, where streams begun anew should not show.
  constexpr std::int64_t kSmall = 4096, kLarge = 64 * kSmall;
  const std::int64_t share = total / (32 * (threads > 0 ? threads : 1));
  const std::int64_t grain = share < kSmall ? kSmall : share > kLarge ? kLarge : share;
  parallel_for(total, grain, threads, [&](Ranges& ranges) {
    std::int64_t begin, end;
    std::int64_t i = 0, start = 0;  // the first tensor of the range
    while (ranges.next(begin, end)) {
      if (begin < start) i = start = 0;
      for (; start + tensors[i].numel <= begin; ++i) start += tensors[i].numel;
      for (std::int64_t j = i, at = start; at < end; at += tensors[j++].numel) {
        const std::int64_t first = begin > at ? begin - at : 0;
        const std::int64_t last = end - at < tensors[j].numel ? end - at : tensors[j].numel;
        if (first < last) update(tensors[j], first, last);
      }
    }
  });
}

}  // namespace superfine::cpu::SF_ISA
