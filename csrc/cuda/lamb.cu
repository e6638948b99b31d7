// Multi-tensor LAMB on the GPU: two passes over a batch of tensors at a time.
//
// Traffic per fp32 parameter: the first pass reads p, g, m, v and writes m, v (24 bytes), the second reads
// p, m, v and writes p (16 bytes). Over everything at once that would be 40 bytes from and to memory. A
// batch is therefore as small as half of the L2 cache, less what the gradients pass through, and its second
// pass begins with what the first one touched last: 28 bytes then come from memory, as in AdamW. An anchor
// adds a read, hidden bits a read and a write of 2 bytes, and zeros for g a write.
//
// What that is worth, computed and not yet measured. On an H100 (50 MB of L2, 3 TB/s) a batch has 2.1 million
// fp32 elements: 17 us of memory traffic in the first pass, 5 us of reads from L2 in the second, and about 3
// us for two launches to drain and fill; 28 us if everything came from memory. The gain grows with the cache
// and falls with the bandwidth: 1.1x there, 1.3x on an A100 (40 MB, 1.5 TB/s), 1.4x on an RTX 4090 (72 MB, 1
// TB/s). A tensor larger than a batch is swept twice, less the end that is still in the cache.
//
// Norms are summed in the order that math/lamb.h fixes. A warp sums a block of 2048 elements, its lanes those
// of the rule, which is why every lane reads single elements: 128 bytes a warp in fp32, several rows in
// flight. The warps' sums make the chunk's; the block that finishes a tensor's last chunk adds them up, in an
// order that does not depend on which block that is. With -fmad=false all bits are those of the CPU kernel.
#include "cuda/lamb.h"

#include <algorithm>

#include "core/cuda_check.h"
#include "cuda/block_reduce.h"
#include "cuda/moment_table.h"
#include "cuda/pack.h"

namespace superfine::cuda {
namespace {

constexpr int kThreads = kLambWarps * kLambLanes;
// Loads of each tensor in flight a thread. The registers that 4 take leave room for 1024 threads, so 64 KB in
// flight in fp32 and 32 KB in bf16; latency times bandwidth is about 20 KB a multiprocessor on an H100.
constexpr int kRows = 4;
static_assert(kLambLanes == kWarp);

template <class P, class S>
using SmallTable = MomentTable<MomentPointers<P, S>, LambScalars<Opmath<P>>, 40, 16>;
template <class P, class S>
using LargeTable = MomentTable<MomentPointers<P, S>, LambScalars<Opmath<P>>, 400, 48>;
static_assert(sizeof(SmallTable<double, double>) + 3 * sizeof(void*) <= 4096);
static_assert(sizeof(LargeTable<double, double>) + 3 * sizeof(void*) <= 32764);
constexpr int kMostTensors = LargeTable<float, float>::kTensors;

// Between the passes of a batch, in device memory.
struct Workspace {
  LambNorms* chunks;            // of the batch
  double* negative_step_sizes;  // of its tensors
  unsigned* finished;           // chunks of each tensor; 0 before and after a batch
};

template <class AnyTensor>
std::int64_t chunks_of(const AnyTensor* tensors, std::int64_t count) {
  std::int64_t chunks = 0;
  for (std::int64_t i = 0; i < count; ++i) chunks += (tensors[i].numel + kLambChunk - 1) / kLambChunk;
  return chunks;
}

struct Norms : LambNorms {
  Norms() = default;
  __device__ Norms(double param, double direction) : LambNorms{param, direction} {}
  __device__ Norms shuffled(int mask) const { return {shuffle(param, mask), shuffle(direction, mask)}; }
  __device__ void merge(const Norms& other) { *this += other; }
};

// A load of what nobody reads again: it leaves the L2 cache first.
__device__ __forceinline__ float load_once(const float* p) { return __ldcs(p); }
__device__ __forceinline__ double load_once(const double* p) { return __ldcs(p); }
template <class E>
__device__ __forceinline__ E load_once(const E* p) {
  return {__ldcs(&p->bits)};
}

// Zeros that nobody reads soon.
__device__ __forceinline__ void store_zero(float* p) { __stcs(p, 0.0f); }
__device__ __forceinline__ void store_zero(double* p) { __stcs(p, 0.0); }
template <class E>
__device__ __forceinline__ void store_zero(E* p) {
  __stcs(&p->bits, static_cast<unsigned short>(0));
}

// Sums up a tensor's chunks, in the order of the rule, and so finds its step size; called by all threads.
template <class T>
__device__ void finish_tensor(const LambScalars<T>& s, const Workspace& workspace, int index, int first, int chunks) {
  Norms sum;
  for (int i = threadIdx.x; i < chunks; i += kThreads) {
    const double2 chunk = __ldcg(reinterpret_cast<const double2*>(&workspace.chunks[first + i]));
    sum.merge({chunk.x, chunk.y});
  }
  sum = block_reduce(sum);
  if (threadIdx.x == 0) {
    workspace.negative_step_sizes[index] = lamb_negative_step_size(s, sum);
    workspace.finished[index] = 0;
  }
}

// First pass: one block updates the moments of one chunk of one tensor and adds up its squares.
template <class Table>
__global__ void __launch_bounds__(kThreads)
    lamb_moments_kernel(const __grid_constant__ Table table, const Workspace workspace) {
  using P = typename Table::Tensor::P;
  using S = typename Table::Tensor::S;
  using T = Opmath<P>;

  const int index = table.find(blockIdx.x);
  const int first = table.first_chunk[index];
  const auto& s = table.scalars[table.scalars_of[index]];
  auto t = table.tensors[index];
  const int chunks = static_cast<int>((t.numel + kLambChunk - 1) / kLambChunk);
  t.skip((blockIdx.x - first) * kLambChunk + threadIdx.x / kWarp * kLambBlock);
  const int n = static_cast<int>(min(t.numel, kLambBlock));  // not above 0: nothing for this warp
  const bool splits = t.splits(), anchored = t.anchored();
  const bool zero_grad = table.zero_grad[index];

  T param_sum = 0, direction_sum = 0;
  for (int row = threadIdx.x % kWarp; row < n; row += kRows * kWarp) {
    P p[kRows], g[kRows], a[kRows];
    S m[kRows], v[kRows];
    std::uint16_t low[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = row + r * kWarp;
      a[r] = {};
      low[r] = 0;
      if (i < n) {
        p[r] = t.param[i];
        g[r] = load_once(&t.grad[i]);
        m[r] = t.exp_avg[i];
        v[r] = t.exp_avg_sq[i];
        if (anchored) a[r] = t.anchor[i];
        if (splits) low[r] = t.remainders[i];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = row + r * kWarp;
      if (i < n) {
        T mi = widen(m[r]), vi = widen(v[r]);
        const T pi = widen(p[r], low[r]);
        lamb_moments(s, T(widen(g[r])), mi, vi);
        t.exp_avg[i] = m[r] = narrow<S>(mi);
        t.exp_avg_sq[i] = v[r] = narrow<S>(vi);
        if (zero_grad) store_zero(&t.grad[i]);
        // Of the moments as stored. Without an anchor, p - 0 is p in every bit.
        const T u = lamb_direction(s, pi - T(widen(a[r])), T(widen(m[r])), T(widen(v[r])));
        param_sum = std::fma(pi, pi, param_sum);
        direction_sum = std::fma(u, u, direction_sum);
      }
    }
  }

  const Norms sum = block_reduce(Norms(param_sum, direction_sum));
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    workspace.chunks[blockIdx.x] = sum;
    __threadfence();
    is_last = atomicAdd(&workspace.finished[index], 1) + 1 == static_cast<unsigned>(chunks);
  }
  __syncthreads();
  if (is_last) {
    __threadfence();
    finish_tensor(s, workspace, index, first, chunks);
  }
}

// Second pass: one block updates one chunk of one parameter. The last chunks come first.
template <class Table>
__global__ void __launch_bounds__(kThreads)
    lamb_param_kernel(const __grid_constant__ Table table, const Workspace workspace) {
  using P = typename Table::Tensor::P;
  using S = typename Table::Tensor::S;
  using T = Opmath<P>;

  const int chunk = gridDim.x - 1 - blockIdx.x;
  const int index = table.find(chunk);
  const auto& s = table.scalars[table.scalars_of[index]];
  const T step_size = static_cast<T>(workspace.negative_step_sizes[index]);
  auto t = table.tensors[index];
  t.skip((chunk - table.first_chunk[index]) * kLambChunk);
  const int n = static_cast<int>(min(t.numel, kLambChunk));
  const bool splits = t.splits(), anchored = t.anchored();

  for (int row = threadIdx.x; row < n; row += kRows * kThreads) {
    P p[kRows], a[kRows];
    S m[kRows], v[kRows];
    std::uint16_t low[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = row + r * kThreads;
      a[r] = {};
      low[r] = 0;
      if (i < n) {
        p[r] = t.param[i];
        m[r] = load_once(&t.exp_avg[i]);
        v[r] = load_once(&t.exp_avg_sq[i]);
        if (anchored) a[r] = load_once(&t.anchor[i]);
        if (splits) low[r] = t.remainders[i];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = row + r * kThreads;
      if (i < n) {
        const T pi = widen(p[r], low[r]);
        const T u = lamb_direction(s, pi - T(widen(a[r])), T(widen(m[r])), T(widen(v[r])));
        narrow(std::fma(step_size, u, pi), splits, p[r], low[r]);
        t.param[i] = p[r];
        if (splits) t.remainders[i] = low[r];
      }
    }
  }
}

// What the second pass reads of an element: p, m and v, and what else some tensor of the call has.
template <class P, class S>
std::int64_t bytes_of_element(const LambTensor* tensors, std::int64_t count) {
  const auto some = [=](const auto& has) { return std::any_of(tensors, tensors + count, has); };
  std::int64_t bytes = sizeof(P) + 2 * sizeof(S);
  if (some([](const LambTensor& t) { return t.anchor != nullptr; })) bytes += sizeof(P);
  if (kMaySplit<P> && some([](const LambTensor& t) { return t.remainders != nullptr; })) bytes += sizeof(std::uint16_t);
  return bytes;
}

// The elements that fill half of the device's L2 cache.
std::int64_t batch_elements(std::int64_t bytes_of_element) {
  int device = 0, bytes = 0;
  cuda_check(cudaGetDevice(&device), "lamb");
  cuda_check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device), "lamb");
  return std::max<std::int64_t>(bytes / 2 / bytes_of_element, kLambChunk);
}

}  // namespace

std::size_t lamb_workspace_bytes(const MomentTensor* tensors, std::int64_t count) {
  return sizeof(LambNorms) * chunks_of(tensors, count) + (sizeof(double) + sizeof(unsigned)) * kMostTensors;
}

void lamb(const LambTensor* tensors, std::int64_t count, void* memory, cudaStream_t stream) {
  Workspace workspace;
  workspace.chunks = static_cast<LambNorms*>(memory);
  workspace.negative_step_sizes = reinterpret_cast<double*>(workspace.chunks + chunks_of(tensors, count));
  workspace.finished = reinterpret_cast<unsigned*>(workspace.negative_step_sizes + kMostTensors);
  cuda_check(cudaMemsetAsync(workspace.finished, 0, sizeof(unsigned) * kMostTensors, stream), "lamb");

  for_each_dtypes([=](auto p, auto s, const auto& has_dtypes) {
    using P = decltype(p);
    using S = decltype(s);
    fill_small_or_large_tables<SmallTable<P, S>, LargeTable<P, S>>(
        tensors, count, has_dtypes, kLambChunk, batch_elements(bytes_of_element<P, S>(tensors, count)),
        [=](const auto& table, unsigned chunks) {
          lamb_moments_kernel<<<chunks, kThreads, 0, stream>>>(table, workspace);
          cuda_check(cudaGetLastError(), "lamb");
          lamb_param_kernel<<<chunks, kThreads, 0, stream>>>(table, workspace);
          cuda_check(cudaGetLastError(), "lamb");
        });
  });
}

}  // namespace superfine::cuda
