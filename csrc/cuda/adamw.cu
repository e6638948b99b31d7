// Multi-tensor AdamW on the GPU.
//
// Traffic per parameter (read p, g, m, v; write p, m, v): 28 bytes in fp32, 56 in fp64, 14 in bf16 or
// f16, 22 in bf16 or f16 with fp32 moments. Amsgrad adds a read and a write of one moment, hidden bits
// those of 2 bytes, an anchor a read, and zeros for g a write. The floor is those bytes over the device's
// memory bandwidth: about 15 flops a parameter leave the arithmetic units idle.
//
// Every element is computed by `adamw_update` (math/adamw.h), compiled with -fmad=false: the bits are
// those of the CPU kernel.
#include "cuda/adamw.h"

#include <cmath>
#include <limits>

#include "core/cuda_check.h"
#include "cuda/moment_piece.h"
#include "cuda/moment_table.h"
#include "cuda/pack.h"
#include "cuda/tile.h"

namespace superfine::cuda {
namespace {

constexpr int kThreads = 256;
// Elements per block: a model of 1M parameters still gives 256 blocks, and finding the tensor (a
// binary search in constant memory) stays small against moving 115 KB.
constexpr int kChunk = 4096;

// Whether accesses of that many bytes may start at each of these addresses; they may at null.
template <class... E>
__device__ __forceinline__ bool is_aligned(int bytes, const E*... p) {
  return ((reinterpret_cast<std::uintptr_t>(p) | ...) & (bytes - 1)) == 0;
}

// What is absent (maxima, anchors, remainders) is so for all threads of a block.
template <class P, class S, class Tile, class T>
__device__ __forceinline__ void update(const AdamWScalars<T>& s, const MomentPiece<P, S>& t, const Tile& tile) {
  constexpr int kElements = Tile::kElements;
  const bool amsgrad = !t.kQuantized && t.max_exp_avg_sq() != nullptr;
  StoredParams<Tile, P> params;
  StoredMoments<Tile, S> moments;
  typename Tile::template Elements<P> grad, anchor;
  typename Tile::template Elements<S> v_max;
  tile.access([&](const auto& tile) {
    t.read(tile, params);
    t.read(tile, moments);
    grad = tile.read(t.grad);
    v_max = tile.read(t.max_exp_avg_sq(), amsgrad);
    anchor = tile.read(t.anchor, t.anchored());
  });

  AdamWScalars<T> scaled = s;
  scaled.gradient_scale = 1;  // of gradients that are scaled already
  T p[kElements];
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    p[k] = params.at(k, t.master);
    T m = moments.exp_avg(k), v = moments.exp_avg_sq(k);
    T g = widen(grad[k]);
    const T a = widen(anchor[k]);
    if (s.coupled_decay != 0) {
      g = adam_gradient(s, g, t.anchored() ? p[k] - a : p[k]);
    } else {
      g *= s.gradient_scale;
      p[k] = t.anchored() ? adamw_decay(s, p[k], a) : adamw_decay(s, p[k]);
    }
    T largest = -INFINITY;  // gives way to any second moment
    if constexpr (!t.kQuantized) {
      if (amsgrad) largest = widen(v_max[k]);
    }
    adamw_update<true>(scaled, p[k], g, m, v, largest);
    moments.set(k, m, v);
    if constexpr (!t.kQuantized) v_max.set(k, narrow<S>(largest));
  }
  params.round(tile, p, t.master, t.random_key, t.begin);
  moments.round(tile, t.random_key, t.begin);

  tile.access([&](const auto& tile) {
    t.write(tile, params);
    t.write(tile, moments);
    if (amsgrad) tile.write(t.max_exp_avg_sq(), v_max);
    if (t.zero_grad) tile.write(t.grad, {});
  });
}

// One block updates one chunk of one tensor.
template <class Table>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Table table) {
  using P = typename Table::P;
  using S = typename Table::S;

  const int chunk = blockIdx.x;
  const int index = table.find(chunk);
  const auto& tensor = table.tensors[index];
  const auto s = table.scalars[tensor.scalars];
  const MomentPiece<P, S> t(tensor, static_cast<std::int64_t>(chunk - table.first_chunk[index]) * kChunk);
  const int n = static_cast<int>(min(t.numel, static_cast<std::int64_t>(kChunk)));

  constexpr int kPack = 16 / (sizeof(P) > sizeof(S) ? sizeof(P) : sizeof(S));
  // Views into larger buffers may be aligned to an element only.
  const bool aligned = is_aligned(sizeof(Pack<P, kPack>), t.param, t.grad, t.anchor) &&
                       is_aligned(sizeof(Pack<S, kPack>), t.exp_avg, t.exp_avg_sq) &&
                       (t.kQuantized || is_aligned(sizeof(Pack<S, kPack>), t.max_exp_avg_sq())) &&
                       is_aligned(sizeof(Pack<std::uint16_t, kPack>), t.remainder);
  if constexpr (t.kQuantized) {  // one warp updates one block of moments
    constexpr int kBlock = kQuantBlock;
    for (int block = threadIdx.x / kWarp * kBlock; block < n; block += kThreads / kWarp * kBlock) {
      const int first = block + threadIdx.x % kWarp * kPack;
      update(s, t, Tile<kPack, kBlock / kWarp / kPack, kWarp * kPack>{first, n, aligned && block + kBlock <= n});
    }
  } else {
    for (int i = threadIdx.x * kPack; i < n; i += kThreads * kPack) {
      update(s, t, Tile<kPack, 1, 0>{i, n, aligned && i + kPack <= n});
    }
  }
}

}  // namespace

void adamw(const AdamWTensor* tensors, std::int64_t count, cudaStream_t stream) {
  for_each_dtypes([=](auto p, auto s, const auto& has_dtypes) {
    using P = decltype(p);
    using Table = MomentTable<P, decltype(s), AdamWScalars<Opmath<P>>>;
    fill_tables<Table>(tensors, count, has_dtypes, kChunk, std::numeric_limits<std::int64_t>::max(),
                       [=](const Table& table, unsigned chunks) {
                         adamw_kernel<<<chunks, kThreads, 0, stream>>>(table);
                         cuda_check(cudaGetLastError(), "adamw");
                       });
  });
}

}  // namespace superfine::cuda
