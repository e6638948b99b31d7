// Multi-tensor AdamW on the GPU.
//
// Traffic per parameter (read p, g, m, v; write p, m, v): 28 bytes in fp32, 56 in fp64, 14 in bf16 or
// f16, 22 in bf16 or f16 with fp32 moments; amsgrad adds a read and a write of one moment. The floor
// is those bytes over the device's memory bandwidth: about 15 flops a parameter leave the arithmetic
// units idle.
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

template <class P_, class S_, bool kAmsgrad_>
struct Tensor {
  using P = P_;
  using S = S_;
  static constexpr bool kAmsgrad = kAmsgrad_;

  P* param;
  const P* grad;
  S* exp_avg;
  S* exp_avg_sq;
  S* max_exp_avg_sq;
  std::int64_t numel;

  static Tensor of(const MomentTensor& t) {
    return {static_cast<P*>(t.param),      static_cast<const P*>(t.grad),     static_cast<S*>(t.exp_avg),
            static_cast<S*>(t.exp_avg_sq), static_cast<S*>(t.max_exp_avg_sq), t.numel};
  }
};

template <class P, class S, bool kAmsgrad>
using SmallTable = MomentTable<Tensor<P, S, kAmsgrad>, AdamWScalars<Opmath<P>>, 48, 16>;
template <class P, class S, bool kAmsgrad>
using LargeTable = MomentTable<Tensor<P, S, kAmsgrad>, AdamWScalars<Opmath<P>>, 512, 64>;
static_assert(sizeof(SmallTable<double, double, true>) <= 4096);
static_assert(sizeof(LargeTable<double, double, true>) <= 32764);

template <class T>
__device__ __forceinline__ bool is_aligned(const T* a, const T* b, const T* c, int bytes) {
  const auto address = [](const T* p) { return reinterpret_cast<std::uintptr_t>(p); };
  return (address(a) | address(b) | address(c)) % bytes == 0;
}

template <bool kAmsgrad, int N, class P, class S>
__device__ __forceinline__ void update(const AdamWScalars<Opmath<P>>& s, P* param, const P* grad, S* exp_avg,
                                       S* exp_avg_sq, S* max_exp_avg_sq) {
  using T = Opmath<P>;
  auto p = *reinterpret_cast<const Pack<P, N>*>(param);
  const auto g = *reinterpret_cast<const Pack<P, N>*>(grad);
  auto m = *reinterpret_cast<const Pack<S, N>*>(exp_avg);
  auto v = *reinterpret_cast<const Pack<S, N>*>(exp_avg_sq);
  auto v_max = v;
  if (kAmsgrad) v_max = *reinterpret_cast<const Pack<S, N>*>(max_exp_avg_sq);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    T pi = widen(p.at[i]), mi = widen(m.at[i]), vi = widen(v.at[i]), v_max_i = widen(v_max.at[i]);
    adamw_update<kAmsgrad>(s, pi, T(widen(g.at[i])), mi, vi, v_max_i);
    p.at[i] = narrow<P>(pi);
    m.at[i] = narrow<S>(mi);
    v.at[i] = narrow<S>(vi);
    if (kAmsgrad) v_max.at[i] = narrow<S>(v_max_i);
  }
  *reinterpret_cast<Pack<P, N>*>(param) = p;
  *reinterpret_cast<Pack<S, N>*>(exp_avg) = m;
  *reinterpret_cast<Pack<S, N>*>(exp_avg_sq) = v;
  if (kAmsgrad) *reinterpret_cast<Pack<S, N>*>(max_exp_avg_sq) = v_max;
}

// One block updates one chunk of one tensor.
template <class Table>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Table table) {
  using P = typename Table::Tensor::P;
  using S = typename Table::Tensor::S;
  constexpr bool kAmsgrad = Table::Tensor::kAmsgrad;
  constexpr int kPack = 16 / (sizeof(P) > sizeof(S) ? sizeof(P) : sizeof(S));

  const int chunk = blockIdx.x;
  const int index = table.find(chunk);
  const auto& tensor = table.tensors[index];
  const auto s = table.scalars[table.scalars_of[index]];
  const std::int64_t begin = static_cast<std::int64_t>(chunk - table.first_chunk[index]) * kChunk;
  const int n = static_cast<int>(min(tensor.numel - begin, static_cast<std::int64_t>(kChunk)));
  P* p = tensor.param + begin;
  const P* g = tensor.grad + begin;
  S* m = tensor.exp_avg + begin;
  S* v = tensor.exp_avg_sq + begin;
  S* v_max = kAmsgrad ? tensor.max_exp_avg_sq + begin : v;

  int packed = 0;  // views into larger buffers may be aligned to an element only
  if (is_aligned<P>(p, g, g, sizeof(Pack<P, kPack>)) && is_aligned<S>(m, v, v_max, sizeof(Pack<S, kPack>))) {
    packed = n / kPack * kPack;
  }
  for (int i = threadIdx.x * kPack; i < packed; i += kThreads * kPack) {
    update<kAmsgrad, kPack>(s, p + i, g + i, m + i, v + i, v_max + i);
  }
  for (int i = packed + threadIdx.x; i < n; i += kThreads) {
    update<kAmsgrad, 1>(s, p + i, g + i, m + i, v + i, v_max + i);
  }
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
