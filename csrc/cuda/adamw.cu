// Multi-tensor AdamW on the GPU.
//
// Traffic per parameter (read p, g, m, v; write p, m, v): 28 bytes in fp32, 56 in fp64, 14 in bf16 or
// f16, 22 in bf16 or f16 with fp32 moments, 20 in fp32 with bf16 moments. With 8-bit moments 16 bytes in fp32 and
// 10 in bf16 or f16, and 16 for the scales of each 256. Amsgrad adds a read and a write of one moment, a remainder
// (split or Kahan) those of 2 bytes, an anchor a read, and zeros for g a write; rounding at random and Adam add
// nothing. The floor is those bytes over the device's memory bandwidth: about 15 flops a parameter leave the
// arithmetic units idle.
//
// Every element is computed by `adamw_update` (math/adamw.h), compiled with -fmad=false: the bits are
// those of the CPU kernel.
#include "cuda/adamw.h"

#include <cmath>
#include <limits>
#include <type_traits>

#include "core/cuda_check.h"
#include "cuda/block_reduce.h"
#include "cuda/count_steps.h"
#include "cuda/moment_storage.h"
#include "cuda/moment_table.h"
#include "cuda/pack.h"
#include "cuda/tile.h"

namespace superfine::cuda {
namespace {

constexpr int kThreads = 256;
// Elements per block: a model of 1M parameters still gives 256 blocks, and finding the tensor (a
// binary search in constant memory) stays small against moving 115 KB.
constexpr int kChunk = 4096;

// Blocks that a multiprocessor holds at least, for they hide each other's latency; 0 where the compiler keeps to 4
// alone, with fewer registers than it would take when told.
template <class P, class S>
constexpr int kBlocks = sizeof(P) == 8 || sizeof(S) == 1 ? 4 : 0;

// Whether packs of a tensor may move at once: views into larger buffers may be aligned to an element only.
__device__ __forceinline__ bool is_aligned(const MomentEntry& t, int pack) {
  const auto fits = [](int bytes, auto... address) {
    return ((reinterpret_cast<std::uintptr_t>(address) | ...) & (min(bytes, 16) - 1)) == 0;
  };
  const bool quantized = t.state_dtype() == DType::u8;
  return fits(pack * size_of(t.param_dtype()), t.param, t.grad, t.anchor) && fits(pack * 2, t.remainder) &&
         fits(pack * size_of(t.state_dtype()), t.exp_avg, t.exp_avg_sq, quantized ? nullptr : t.max_or_scales);
}

// One block updates one chunk of one tensor.
template <class P, class S>
__global__ void __launch_bounds__(kThreads, kBlocks<P, S>)
    adamw_kernel(const __grid_constant__ MomentTable table, StepSlot* slots) {
  using T = Math<P>;
  constexpr bool kQuantized = std::is_same<S, std::uint8_t>::value;
  constexpr int kPack = kQuantized ? kQuantBlock / kWarp : 16 / (sizeof(P) > sizeof(S) ? sizeof(P) : sizeof(S));
  using Tile = Tile<kPack, 1, 0>;

  const int index = table.find(blockIdx.x);
  const MomentEntry& t = table.tensors[index];
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x - table.first_chunk[index]) * kChunk;
  const int n = static_cast<int>(min(t.numel - begin, static_cast<std::int64_t>(kChunk)));
  const auto& step = share<AdamWScalars<T>>(slots[t.slot]);
  const bool aligned = is_aligned(t, kPack), anchored = t.anchor != nullptr;
  const bool amsgrad = !kQuantized && t.max_or_scales != nullptr;
  S* const max_exp_avg_sq = static_cast<S*>(t.max_or_scales) + begin;
  const std::uint32_t key = step.random_key;
  Moments<Tile, S> moments(t, key, begin);

  const AdamWScalars<T>& s = step.rule;
  AdamWScalars<T> scaled = s;
  scaled.gradient_scale = 1;  // of gradients that are scaled already

  // All lanes of a warp stay to the end, as they share the scales of 8-bit moments.
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int start = (threadIdx.x - lane) * kPack; start < n; start += kThreads * kPack) {
    read_again();
    const int first = start + lane * kPack;
    const Tile tile{first, n, aligned && first + kPack <= n};
    T p[kPack], g[kPack];
    typename Tile::template Elements<S> v_max;
    tile.access([&](const auto& tile) {  // before the parameters, which are waited for
      moments.read(tile);
      v_max = tile.read(max_exp_avg_sq, amsgrad);
    });
    with_type<P>(t.param_dtype(), [&](auto type) {
      using E = decltype(type);
      Params<Tile, E> params(t, key, begin);
      typename Tile::template Elements<E> grad, anchor;
      tile.access([&](const auto& tile) {
        params.read(tile);
        grad = tile.read(static_cast<const E*>(t.grad) + begin);
        anchor = tile.read(static_cast<const E*>(t.anchor) + begin, anchored);
      });
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const T a = widen(anchor[k]);
        p[k] = params.get(k);
        g[k] = widen(grad[k]);
        if (s.coupled_decay != 0) {
          g[k] = adam_gradient(s, g[k], anchored ? p[k] - a : p[k]);
        } else {
          g[k] *= s.gradient_scale;
          p[k] = anchored ? adamw_decay(s, p[k], a) : adamw_decay(s, p[k]);
        }
      }
    });
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      T m = moments.m(k), v = moments.v(k), largest = -INFINITY;  // which gives way to any second moment
      if constexpr (!kQuantized) {
        if (amsgrad) largest = widen(v_max[k]);
      }
      adamw_update<true>(scaled, p[k], g[k], m, v, largest);
      moments.set(k, m, v);
      if constexpr (!kQuantized) v_max.set(k, narrow<S>(largest));
    }
    moments.finish(tile);
    if (step.is_taken) {
      tile.access([&](const auto& tile) {
        moments.write(tile);
        if (amsgrad) tile.write(max_exp_avg_sq, v_max);
      });
    }
    with_type<P>(t.param_dtype(), [&](auto type) {
      using E = decltype(type);
      Params<Tile, E> params(t, key, begin);
      params.set(tile, p);
      tile.access([&](const auto& tile) {
        if (step.is_taken) params.write(tile);
        if (t.zero_grad) tile.write(static_cast<E*>(t.grad) + begin, {});
      });
    });
  }
}

template <class P, class S, class Select>
void launch(const Step& step, StepSlot* slots, cudaStream_t stream, const Select& select) {
  fill_tables(step.tensors, step.count, select, kChunk, std::numeric_limits<std::int64_t>::max(),
              [=](const MomentTable& table, unsigned chunks) {
                adamw_kernel<P, S><<<chunks, kThreads, 0, stream>>>(table, slots);
                cuda_check(cudaGetLastError(), "adamw");
              });
}

}  // namespace

std::size_t adamw_workspace_bytes(const Step& step) { return sizeof(StepSlot) * step.count; }

void adamw(const Step& step, void* workspace, cudaStream_t stream) {
  StepSlot* const slots = static_cast<StepSlot*>(workspace);
  count_steps(step, slots, stream, "adamw");
  const auto pair = [&](auto p, auto s, DType param, DType state) {
    launch<decltype(p), decltype(s)>(
        step, slots, stream, [=](const MomentTensor& t) { return t.param_dtype == param && t.state_dtype == state; });
  };
  pair(float{}, float{}, DType::f32, DType::f32);
  pair(float{}, bf16{}, DType::f32, DType::bf16);
  pair(bf16{}, bf16{}, DType::bf16, DType::bf16);
  pair(bf16{}, float{}, DType::bf16, DType::f32);
  pair(f16{}, f16{}, DType::f16, DType::f16);
  pair(f16{}, float{}, DType::f16, DType::f32);
  pair(double{}, double{}, DType::f64, DType::f64);
  launch<AnyFloat, std::uint8_t>(step, slots, stream, [](const MomentTensor& t) { return t.state_dtype == DType::u8; });
}

}  // namespace superfine::cuda
