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

#include <limits>
#include <type_traits>

#include "core/cuda_check.h"
#include "cuda/moment_piece.h"
#include "cuda/moment_table.h"
#include "cuda/pack.h"

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

// What is absent (anchors, remainders) is so for all threads of a block.
template <bool kAmsgrad, class Piece, class Tile, class T>
__device__ __forceinline__ void update(const AdamWScalars<T>& s, const Piece& t, const Tile& tile) {
  using S = typename Piece::S;
  constexpr int kElements = Tile::kElements;
  const bool anchored = t.anchor != nullptr;
  const auto param = tile.read(t.param), grad = tile.read(t.grad);
  auto moments = t.read_moments(tile, [&](const S* x) { return tile.read(x); });
  [[maybe_unused]] typename Tile::template Elements<S> v_max;
  if constexpr (kAmsgrad) v_max = tile.read(t.max_exp_avg_sq());
  const auto anchor = tile.read(t.anchor, anchored);
  const auto low = tile.read(t.remainder, t.has_remainder());

  const bool coupled = s.coupled_decay != 0;
  AdamWScalars<T> scaled = s;
  scaled.gradient_scale = 1;  // of gradients that are scaled already
  T p[kElements], m[kElements], v[kElements];
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    p[k] = t.widen_param(param[k], low[k]);
    m[k] = moments.exp_avg(k);
    v[k] = moments.exp_avg_sq(k);
    const T a = widen(anchor[k]);
    T g = widen(grad[k]);
    if (coupled) {
      g = adam_gradient(s, g, anchored ? p[k] - a : p[k]);
    } else {
      g *= s.gradient_scale;
      p[k] = anchored ? adamw_decay(s, p[k], a) : adamw_decay(s, p[k]);
    }
    T largest = v[k];
    if constexpr (kAmsgrad) largest = widen(v_max[k]);
    adamw_update<kAmsgrad>(scaled, p[k], g, m[k], v[k], largest);
    if constexpr (kAmsgrad) v_max[k] = narrow<S>(largest);
  }
  moments.round(tile, m, v, t.random_key, t.begin);
  t.write_moments(tile, moments);
  if constexpr (kAmsgrad) tile.write(t.max_exp_avg_sq(), v_max);
  t.write_params(tile, p);
  if (t.zero_grad) tile.write(t.grad, {});
}

// One block updates one chunk of one tensor.
template <bool kAmsgrad, class Table>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Table table) {
  using P = typename Table::P;
  using S = typename Table::S;
  using Piece = MomentPiece<P, S>;

  const int chunk = blockIdx.x;
  const int index = table.find(chunk);
  const auto& tensor = table.tensors[index];
  const auto s = table.scalars[tensor.scalars];
  const Piece t(tensor, static_cast<std::int64_t>(chunk - table.first_chunk[index]) * kChunk);
  const int n = static_cast<int>(min(t.numel, static_cast<std::int64_t>(kChunk)));

  constexpr int kPack = 16 / (sizeof(P) > sizeof(S) ? sizeof(P) : sizeof(S));
  // Views into larger buffers may be aligned to an element only.
  const bool aligned =
      is_aligned(sizeof(Pack<P, kPack>), t.param, t.grad, t.anchor) &&
      is_aligned(sizeof(Pack<S, kPack>), t.exp_avg, t.exp_avg_sq, kAmsgrad ? t.max_exp_avg_sq() : nullptr) &&
      is_aligned(sizeof(Pack<std::uint16_t, kPack>), t.remainder);
  if constexpr (Piece::kQuantized) {
    constexpr int kBlock = kQuantBlock, kRows = kBlock / kWarp;  // of single elements
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int block = threadIdx.x / kWarp * kBlock; block < n; block += kThreads / kWarp * kBlock) {
      const int end = min(block + kBlock, n);
      if (aligned && end == block + kBlock) {
        update<kAmsgrad>(s, t, Tile<kPack, kRows / kPack, kWarp * kPack>{block + lane * kPack, block + kBlock});
      } else {
        update<kAmsgrad>(s, t, Tile<1, kRows, kWarp>{block + lane, end});
      }
    }
  } else {
    const int packed = aligned ? n / kPack * kPack : 0;
    for (int i = threadIdx.x * kPack; i < packed; i += kThreads * kPack) {
      update<kAmsgrad>(s, t, Tile<kPack, 1, 0>{i, packed});
    }
#pragma unroll 1  // copies of the body would not overlap, as its stores may alias the next loads
    for (int i = packed + threadIdx.x; i < n; i += kThreads) update<kAmsgrad>(s, t, Tile<1, 1, 0>{i, n});
  }
}

template <class P, class S, bool kAmsgrad, class Select>
void step(const AdamWTensor* tensors, std::int64_t count, const Select& has_dtypes, cudaStream_t stream) {
  const auto select = [=](const AdamWTensor& t) { return has_dtypes(t) && (t.max_exp_avg_sq != nullptr) == kAmsgrad; };
  fill_tables<MomentTable<P, S, AdamWScalars<Opmath<P>>>>(
      tensors, count, select, kChunk, std::numeric_limits<std::int64_t>::max(),
      [=](const auto& table, unsigned chunks) {
        adamw_kernel<kAmsgrad><<<chunks, kThreads, 0, stream>>>(table);
        cuda_check(cudaGetLastError(), "adamw");
      });
}

}  // namespace

void adamw(const AdamWTensor* tensors, std::int64_t count, cudaStream_t stream) {
  for_each_dtypes([=](auto p, auto s, const auto& has_dtypes) {
    step<decltype(p), decltype(s), false>(tensors, count, has_dtypes, stream);
    if constexpr (!std::is_same<decltype(s), std::uint8_t>::value) {
      step<decltype(p), decltype(s), true>(tensors, count, has_dtypes, stream);
    }
  });
}

}  // namespace superfine::cuda
