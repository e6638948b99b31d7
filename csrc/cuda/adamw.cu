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
#include <type_traits>

#include "core/cuda_check.h"
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

template <class T>
using Table = MomentTable<AdamWScalars<T>>;
template <class S>
constexpr bool kIsQuantized = std::is_same<S, std::uint8_t>::value;

// Whether accesses of that many bytes may start at each of these addresses; they may at null.
template <class... E>
__device__ __forceinline__ bool is_aligned(int bytes, const E*... p) {
  return ((reinterpret_cast<std::uintptr_t>(p) | ...) & (bytes - 1)) == 0;
}

// What a chunk's threads share beside the scalars.
template <class P, class S>
struct Chunk {
  P* grad;
  const P* anchor;    // or null
  S* max_exp_avg_sq;  // or null
  bool zero_grad;
};

// What is absent is so for all threads of a block.
template <class Tile, class T, class P, class S>
__device__ __forceinline__ void update(const AdamWScalars<T>& s, const Chunk<P, S>& c, Params<Tile, P>& params,
                                       Moments<Tile, S>& moments, const Tile& tile) {
  constexpr int kElements = Tile::kElements;
  typename Tile::template Elements<P> grad, anchor;
  typename Tile::template Elements<S> v_max;
  tile.access([&](const auto& tile) {
    params.read(tile);
    moments.read(tile);
    grad = tile.read(c.grad);
    anchor = tile.read(c.anchor, c.anchor != nullptr);
    v_max = tile.read(c.max_exp_avg_sq, c.max_exp_avg_sq != nullptr);
  });

  AdamWScalars<T> scaled = s;
  scaled.gradient_scale = 1;  // of gradients that are scaled already
  T p[kElements];
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    T g = widen(grad[k]), m = moments.m(k), v = moments.v(k);
    const T a = widen(anchor[k]);
    p[k] = params.get(k);
    if (s.coupled_decay != 0) {
      g = adam_gradient(s, g, c.anchor != nullptr ? p[k] - a : p[k]);
    } else {
      g *= s.gradient_scale;
      p[k] = c.anchor != nullptr ? adamw_decay(s, p[k], a) : adamw_decay(s, p[k]);
    }
    T largest = -INFINITY;  // gives way to any second moment
    if constexpr (!kIsQuantized<S>) {
      if (c.max_exp_avg_sq != nullptr) largest = widen(v_max[k]);
    }
    adamw_update<true>(scaled, p[k], g, m, v, largest);
    moments.set(k, m, v);
    if constexpr (!kIsQuantized<S>) v_max.set(k, narrow<S>(largest));
  }
  moments.finish(tile);
  params.set(tile, p);

  tile.access([&](const auto& tile) {
    params.write(tile);
    moments.write(tile);
    if (c.max_exp_avg_sq != nullptr) tile.write(c.max_exp_avg_sq, v_max);
    if (c.zero_grad) tile.write(c.grad, {});
  });
}

// One block updates one chunk of one tensor.
template <class P, class S>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Table<Opmath<P>> table) {
  constexpr int kPack = 16 / (sizeof(P) > sizeof(S) ? sizeof(P) : sizeof(S));
  constexpr int kBlock = kQuantBlock;
  // One warp updates one block of 8-bit moments at a time.
  using Tile =
      std::conditional_t<kIsQuantized<S>, Tile<kPack, kBlock / kWarp / kPack, kWarp * kPack>, Tile<kPack, 1, 0>>;

  const int index = table.find(blockIdx.x);
  const MomentEntry& t = table.tensors[index];
  const auto s = table.scalars[t.scalars];
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x - table.first_chunk[index]) * kChunk;
  const int n = static_cast<int>(min(t.numel - begin, static_cast<std::int64_t>(kChunk)));
  Params<Tile, P> params(t, begin);
  Moments<Tile, S> moments(t, begin);
  const auto from_begin = [=](auto* x) { return x != nullptr ? x + begin : x; };
  const Chunk<P, S> c = {from_begin(static_cast<P*>(t.grad)), from_begin(static_cast<const P*>(t.anchor)),
                         kIsQuantized<S> ? nullptr : from_begin(static_cast<S*>(t.max_or_scales)), t.zero_grad};

  // Views into larger buffers may be aligned to an element only.
  const bool aligned = is_aligned(sizeof(Pack<P, kPack>), params.param(), c.grad, c.anchor) &&
                       is_aligned(sizeof(Pack<S, kPack>), moments.exp_avg(), moments.exp_avg_sq(), c.max_exp_avg_sq) &&
                       is_aligned(sizeof(Pack<std::uint16_t, kPack>), params.remainder());
  if constexpr (kIsQuantized<S>) {
    for (int block = threadIdx.x / kWarp * kBlock; block < n; block += kThreads / kWarp * kBlock) {
      const int first = block + threadIdx.x % kWarp * kPack;
      update(s, c, params, moments, Tile{first, n, aligned && block + kBlock <= n});
    }
  } else {
    for (int i = threadIdx.x * kPack; i < n; i += kThreads * kPack) {
      update(s, c, params, moments, Tile{i, n, aligned && i + kPack <= n});
    }
  }
}

template <class P, class S>
void step(const AdamWTensor* tensors, std::int64_t count, DType param, DType state, cudaStream_t stream) {
  using T = Opmath<P>;
  fill_tables<T, Table<T>>(
      tensors, count, [=](const AdamWTensor& t) { return t.param_dtype == param && t.state_dtype == state; }, kChunk,
      std::numeric_limits<std::int64_t>::max(),
      [=](const Table<T>& table, unsigned chunks) {
        adamw_kernel<P, S><<<chunks, kThreads, 0, stream>>>(table);
        cuda_check(cudaGetLastError(), "adamw");
      });
}

// 16 and 32 bits.
template <class P>
void step(const AdamWTensor* tensors, std::int64_t count, DType param, cudaStream_t stream) {
  step<P, float>(tensors, count, param, DType::f32, stream);
  step<P, std::uint8_t>(tensors, count, param, DType::u8, stream);
}

}  // namespace

void adamw(const AdamWTensor* tensors, std::int64_t count, cudaStream_t stream) {
  step<float>(tensors, count, DType::f32, stream);
  step<bf16>(tensors, count, DType::bf16, stream);
  step<f16>(tensors, count, DType::f16, stream);
  step<float, bf16>(tensors, count, DType::f32, DType::bf16, stream);
  step<bf16, bf16>(tensors, count, DType::bf16, DType::bf16, stream);
  step<f16, f16>(tensors, count, DType::f16, DType::f16, stream);
  step<double, double>(tensors, count, DType::f64, DType::f64, stream);
}

}  // namespace superfine::cuda
