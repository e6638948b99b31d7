// Multi-tensor AdamW on the CPU: one parallel region over the concatenation of all tensors.
//
// Traffic per fp32 parameter: read p, g, m, v and write p, m, v = 28 bytes; about 15 flops. So the
// floor is memory bandwidth, and the loop below is plain scalar code that the compiler vectorises.
#include "cpu/adamw.h"

#include "core/parallel_for.h"

namespace superfine::cpu::SF_ISA {
namespace {

template <class P, class S, bool kAmsgrad>
void update_range(const AdamWTensor& t, std::int64_t begin, std::int64_t end) {
  using T = Opmath<P>;
  const AdamWScalars<T> s = round_scalars<T>(t.scalars);
  P* __restrict p = static_cast<P*>(t.param);
  const P* __restrict g = static_cast<const P*>(t.grad);
  S* __restrict m = static_cast<S*>(t.exp_avg);
  S* __restrict v = static_cast<S*>(t.exp_avg_sq);
  S* __restrict v_max = static_cast<S*>(t.max_exp_avg_sq);
#pragma omp simd
  for (std::int64_t i = begin; i < end; ++i) {
    T pi = load(p[i]), mi = load(m[i]), vi = load(v[i]), v_max_i = kAmsgrad ? load(v_max[i]) : vi;
    adamw_update<kAmsgrad>(s, pi, T(load(g[i])), mi, vi, v_max_i);
    store(&p[i], pi);
    store(&m[i], mi);
    store(&v[i], vi);
    if (kAmsgrad) store(&v_max[i], v_max_i);
  }
}

template <class P, class S>
void update(const AdamWTensor& t, std::int64_t begin, std::int64_t end) {
  if (t.max_exp_avg_sq != nullptr) {
    update_range<P, S, true>(t, begin, end);
  } else {
    update_range<P, S, false>(t, begin, end);
  }
}

// The combinations that `moment_lists.h` lets through.
void update(const AdamWTensor& t, std::int64_t begin, std::int64_t end) {
  const bool wide_state = t.state_dtype == DType::f32;
  switch (t.param_dtype) {
    case DType::f32: return update<float, float>(t, begin, end);
    case DType::f64: return update<double, double>(t, begin, end);
    case DType::bf16: return wide_state ? update<bf16, float>(t, begin, end) : update<bf16, bf16>(t, begin, end);
    case DType::f16: return wide_state ? update<f16, float>(t, begin, end) : update<f16, f16>(t, begin, end);
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
