// Multi-tensor AdamW on the CPU: one parallel region over the concatenation of all tensors.
//
// Traffic per fp32 parameter: read p, g, m, v and write p, m, v = 28 bytes; about 15 flops. So the
// floor is memory bandwidth, and the loop below is plain scalar code that the compiler vectorises.
#include "cpu/adamw.h"

#include "core/parallel_for.h"
#include "cpu/moments.h"

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

void update(const AdamWTensor& t, std::int64_t begin, std::int64_t end) {
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
    std::int64_t i = 0, start = 0;  // the first tensor of the range; ranges come in order
    while (ranges.next(begin, end)) {
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
