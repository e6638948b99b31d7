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

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/cuda_check.h"
#include "cuda/pack.h"

namespace superfine::cuda {
namespace {

constexpr int kThreads = 256;
// Elements per block: a model of 1M parameters still gives 256 blocks, and finding the tensor (a
// binary search in constant memory) stays small against moving 115 KB.
constexpr int kChunk = 4096;

// A launch's tensors, passed by value. Kernel arguments end at 4 KiB, or at 32,764 bytes from CUDA
// 12.1 on (nvcc and driver); a table is as large as fits and still holds any mix of scalars.
template <class P_, class S_, bool kAmsgrad_, int kTensors_, int kScalars_>
struct Table {
  using P = P_;
  using S = S_;
  static constexpr bool kAmsgrad = kAmsgrad_;
  static constexpr int kTensors = kTensors_, kScalars = kScalars_;

  struct Tensor {
    P* param;
    const P* grad;
    S* exp_avg;
    S* exp_avg_sq;
    S* max_exp_avg_sq;
    std::int64_t numel;
  };

  Tensor tensors[kTensors];
  AdamWScalars<Opmath<P>> scalars[kScalars];  // distinct ones: usually one per parameter group
  std::int32_t first_chunk[kTensors];
  std::uint16_t scalars_of[kTensors];
  std::int32_t count;
};

template <class P, class S, bool kAmsgrad>
using SmallTable = Table<P, S, kAmsgrad, 48, 16>;
template <class P, class S, bool kAmsgrad>
using LargeTable = Table<P, S, kAmsgrad, 512, 64>;
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
  using P = typename Table::P;
  using S = typename Table::S;
  constexpr bool kAmsgrad = Table::kAmsgrad;
  constexpr int kPack = 16 / (sizeof(P) > sizeof(S) ? sizeof(P) : sizeof(S));

  const int chunk = blockIdx.x;
  int index = 0;  // the last tensor whose first chunk is not after ours
  for (int end = table.count; end - index > 1;) {
    const int middle = (index + end) / 2;
    (table.first_chunk[middle] <= chunk ? index : end) = middle;
  }
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

template <class Table>
class Launcher {
 public:
  explicit Launcher(cudaStream_t stream) : stream_(stream) { table_.count = 0; }

  void add(const AdamWTensor& t) {
    const std::int64_t chunks = (t.numel + kChunk - 1) / kChunk;
    if (table_.count == Table::kTensors || chunks_ + chunks > std::numeric_limits<std::int32_t>::max()) flush();
    int scalars = find(t.scalars);
    if (scalars == Table::kScalars) {
      flush();
      scalars = 0;
    }
    if (scalars == scalars_) {
      distinct_[scalars_] = t.scalars;
      table_.scalars[scalars_++] = round_scalars<Opmath<P>>(t.scalars);
    }
    const int i = table_.count++;
    table_.tensors[i] = {static_cast<P*>(t.param),      static_cast<const P*>(t.grad),     static_cast<S*>(t.exp_avg),
                         static_cast<S*>(t.exp_avg_sq), static_cast<S*>(t.max_exp_avg_sq), t.numel};
    table_.first_chunk[i] = static_cast<std::int32_t>(chunks_);
    table_.scalars_of[i] = static_cast<std::uint16_t>(scalars);
    chunks_ += chunks;
  }

  void flush() {
    if (table_.count == 0) return;
    adamw_kernel<Table><<<static_cast<unsigned>(chunks_), kThreads, 0, stream_>>>(table_);
    cuda_check(cudaGetLastError(), "adamw");
    table_.count = 0;
    chunks_ = 0;
    scalars_ = 0;
  }

 private:
  using P = typename Table::P;
  using S = typename Table::S;

  // The newest first: parameters of one group follow each other.
  int find(const AdamWScalars<double>& scalars) const {
    for (int i = scalars_ - 1; i >= 0; --i) {
      if (std::memcmp(&distinct_[i], &scalars, sizeof scalars) == 0) return i;
    }
    return scalars_;
  }

  cudaStream_t stream_;
  Table table_;
  AdamWScalars<double> distinct_[Table::kScalars];
  std::int64_t chunks_ = 0;
  int scalars_ = 0;
};

bool large_arguments() {
#if CUDART_VERSION >= 12010
  static const bool supported = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010;
  }();
  return supported;
#else
  return false;
#endif
}

template <class Table, class Select>
void launch(const AdamWTensor* tensors, std::int64_t count, const Select& select, cudaStream_t stream) {
  Launcher<Table> launcher(stream);
  for (std::int64_t i = 0; i < count; ++i) {
    if (select(tensors[i])) launcher.add(tensors[i]);
  }
  launcher.flush();
}

template <class P, class S, bool kAmsgrad>
void step(const AdamWTensor* tensors, std::int64_t count, DType param, DType state, cudaStream_t stream) {
  const auto select = [=](const AdamWTensor& t) {
    return t.numel > 0 && t.param_dtype == param && t.state_dtype == state && (t.max_exp_avg_sq != nullptr) == kAmsgrad;
  };
  const std::int64_t selected = std::count_if(tensors, tensors + count, select);
  if (selected == 0) return;
  if (selected > SmallTable<P, S, kAmsgrad>::kTensors && large_arguments()) {
    launch<LargeTable<P, S, kAmsgrad>>(tensors, count, select, stream);
  } else {
    launch<SmallTable<P, S, kAmsgrad>>(tensors, count, select, stream);
  }
}

}  // namespace

void adamw(const AdamWTensor* tensors, std::int64_t count, cudaStream_t stream) {
  const auto both = [=](auto p, auto s, DType param, DType state) {
    step<decltype(p), decltype(s), false>(tensors, count, param, state, stream);
    step<decltype(p), decltype(s), true>(tensors, count, param, state, stream);
  };
  both(float{}, float{}, DType::f32, DType::f32);
  both(bf16{}, bf16{}, DType::bf16, DType::bf16);
  both(bf16{}, float{}, DType::bf16, DType::f32);
  both(f16{}, f16{}, DType::f16, DType::f16);
  both(f16{}, float{}, DType::f16, DType::f32);
  both(double{}, double{}, DType::f64, DType::f64);
}

}  // namespace superfine::cuda
