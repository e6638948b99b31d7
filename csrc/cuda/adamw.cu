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

#include "core/cuda_check.h"
#include "cuda/moment_table.h"
#include "cuda/pack.h"

namespace superfine::cuda {
namespace {

constexpr int kThreads = 256;
// Elements per block: a model of 1M parameters still gives 256 blocks, and finding the tensor (a
// binary search in constant memory) stays small against moving 115 KB.
constexpr int kChunk = 4096;

template <class P, class S, bool kAmsgrad_>
struct Tensor : MomentPointers<P, S> {
  static constexpr bool kAmsgrad = kAmsgrad_;

  S* max_exp_avg_sq;

  static Tensor of(const MomentTensor& t) { return {MomentPointers<P, S>::of(t), static_cast<S*>(t.max_exp_avg_sq)}; }
  __device__ void skip(std::int64_t n) {
    MomentPointers<P, S>::skip(n);
    if (kAmsgrad) max_exp_avg_sq += n;
  }
};

template <class P, class S, bool kAmsgrad>
using SmallTable = MomentTable<Tensor<P, S, kAmsgrad>, AdamWScalars<Opmath<P>>, 40, 16>;
template <class P, class S, bool kAmsgrad>
using LargeTable = MomentTable<Tensor<P, S, kAmsgrad>, AdamWScalars<Opmath<P>>, 400, 64>;
static_assert(sizeof(SmallTable<double, double, true>) <= 4096);
static_assert(sizeof(LargeTable<double, double, true>) <= 32764);

// Whether accesses of that many bytes may start at each of these addresses; they may at null.
template <class... E>
__device__ __forceinline__ bool is_aligned(int bytes, const E*... p) {
  return ((reinterpret_cast<std::uintptr_t>(p) | ...) & (bytes - 1)) == 0;
}

// Updates N elements from the i-th on. What is absent is so for all threads of a block.
template <int N, class Tensor, class T>
__device__ __forceinline__ void update(const AdamWScalars<T>& s, const Tensor& t, bool zero_grad, int i) {
  using P = typename Tensor::P;
  using S = typename Tensor::S;
  constexpr bool kAmsgrad = Tensor::kAmsgrad;
  const bool splits = t.splits(), anchored = t.anchored();
  auto p = load_pack<N>(t.param + i);
  const auto g = load_pack<N>(t.grad + i);
  auto m = load_pack<N>(t.exp_avg + i);
  auto v = load_pack<N>(t.exp_avg_sq + i);
  auto v_max = v;
  if (kAmsgrad) v_max = load_pack<N>(t.max_exp_avg_sq + i);
  Pack<P, N> anchor = {};
  if (anchored) anchor = load_pack<N>(t.anchor + i);
  Pack<std::uint16_t, N> low = {};
  if (splits) low = load_pack<N>(t.remainders + i);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    T pk = widen(p.at[k], low.at[k]), mk = widen(m.at[k]), vk = widen(v.at[k]), v_max_k = widen(v_max.at[k]);
    pk = anchored ? adamw_decay(s, pk, T(widen(anchor.at[k]))) : adamw_decay(s, pk);
    adamw_update<kAmsgrad>(s, pk, T(widen(g.at[k])), mk, vk, v_max_k);
    narrow(pk, splits, p.at[k], low.at[k]);
    m.at[k] = narrow<S>(mk);
    v.at[k] = narrow<S>(vk);
    if (kAmsgrad) v_max.at[k] = narrow<S>(v_max_k);
  }
  store_pack(t.param + i, p);
  store_pack(t.exp_avg + i, m);
  store_pack(t.exp_avg_sq + i, v);
  if (kAmsgrad) store_pack(t.max_exp_avg_sq + i, v_max);
  if (splits) store_pack(t.remainders + i, low);
  if (zero_grad) store_pack(t.grad + i, Pack<P, N>{});
}

// One block updates one chunk of one tensor.
template <class Table>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Table table) {
  using P = typename Table::Tensor::P;
  using S = typename Table::Tensor::S;
  constexpr int kPack = 16 / (sizeof(P) > sizeof(S) ? sizeof(P) : sizeof(S));

  const int chunk = blockIdx.x;
  const int index = table.find(chunk);
  const auto s = table.scalars[table.scalars_of[index]];
  const bool zero_grad = table.zero_grad[index];
  auto t = table.tensors[index];
  t.skip(static_cast<std::int64_t>(chunk - table.first_chunk[index]) * kChunk);
  const int n = static_cast<int>(min(t.numel, static_cast<std::int64_t>(kChunk)));

  int packed = 0;  // views into larger buffers may be aligned to an element only
  if (is_aligned(sizeof(Pack<P, kPack>), t.param, t.grad, t.anchor) &&
      is_aligned(sizeof(Pack<S, kPack>), t.exp_avg, t.exp_avg_sq, t.max_exp_avg_sq) &&
      is_aligned(sizeof(Pack<std::uint16_t, kPack>), t.remainders)) {
    packed = n / kPack * kPack;
  }
  for (int i = threadIdx.x * kPack; i < packed; i += kThreads * kPack) update<kPack>(s, t, zero_grad, i);
#pragma unroll 1  // copies of the body would not overlap, as its stores may alias the next loads
  for (int i = packed + threadIdx.x; i < n; i += kThreads) update<1>(s, t, zero_grad, i);
}

template <class P, class S, bool kAmsgrad, class Select>
void step(const AdamWTensor* tensors, std::int64_t count, const Select& has_dtypes, cudaStream_t stream) {
  const auto select = [=](const AdamWTensor& t) {
    return has_dtypes(t) && t.numel > 0 && (t.max_exp_avg_sq != nullptr) == kAmsgrad;
  };
  fill_small_or_large_tables<SmallTable<P, S, kAmsgrad>, LargeTable<P, S, kAmsgrad>>(
      tensors, count, select, kChunk, std::numeric_limits<std::int64_t>::max(),
      [=](const auto& table, unsigned chunks) {
        adamw_kernel<<<chunks, kThreads, 0, stream>>>(table);
        cuda_check(cudaGetLastError(), "adamw");
      });
}

}  // namespace

void adamw(const AdamWTensor* tensors, std::int64_t count, cudaStream_t stream) {
  for_each_dtypes([=](auto p, auto s, const auto& has_dtypes) {
    step<decltype(p), decltype(s), false>(tensors, count, has_dtypes, stream);
    step<decltype(p), decltype(s), true>(tensors, count, has_dtypes, stream);
  });
}

}  // namespace superfine::cuda
