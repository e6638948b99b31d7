// Multi-tensor LAMB on the GPU: two passes over a batch of tensors at a time.
//
// Traffic per fp32 parameter: the first pass reads p, g, m, v and writes m, v (24 bytes), the second reads
// p, m, v and writes p (16 bytes). Over everything at once that would be 40 bytes from and to memory. A
// batch is therefore as small as half of the L2 cache, less what the gradients pass through, and its second
// pass begins with what the first one touched last: 28 bytes then come from memory, as in AdamW; 20 in fp32 with
// bf16 moments, 14 in bf16 or f16, 22 there with fp32 moments, 56 in fp64. With 8-bit moments 16 bytes in fp32 and 10
// in bf16 or f16, and 16 for the scales of each 256. An anchor adds a read, a remainder (split or Kahan) a read and a
// write of 2 bytes, and zeros for g a write; rounding at random adds nothing.
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

constexpr int kThreads = kLambWarps * kLambLanes;
// Loads of each tensor in flight a thread. The registers that 4 take leave room for 768 threads, so 48 KB in
// flight in fp32 and 24 KB in bf16; latency times bandwidth is about 20 KB a multiprocessor on an H100.
// 8-bit moments come by their blocks, which leaves room for 512 threads: 40 KB and 24 KB.
template <class S>
constexpr int kRows = std::is_same<S, std::uint8_t>::value ? kQuantBlock / kWarp : 4;
static_assert(kLambLanes == kWarp);

// Blocks of the second pass that a multiprocessor holds at least: the compiler takes a third more registers where it
// may, for nothing. 0 leaves it alone.
template <class S>
constexpr int kBlocks = std::is_same<S, AnyFloat>::value ? 10 : 0;

template <class S>
using LambTile = Tile<1, kRows<S>, kWarp>;

// Device memory of a step.
struct Workspace {
  LambNorms* chunks;            // of a batch, between its passes
  StepSlot* slots;              // of all tensors
  double* negative_step_sizes;  // as well
};

std::int64_t chunks_of(const Step& step) {
  std::int64_t chunks = 0;
  for (std::int64_t i = 0; i < step.count; ++i) chunks += (step.tensors[i].numel + kLambChunk - 1) / kLambChunk;
  return chunks;
}

struct Norms : LambNorms {
  Norms() = default;
  __device__ Norms(double param, double direction) : LambNorms{param, direction} {}
  __device__ Norms shuffled(int mask) const { return {shuffle(param, mask), shuffle(direction, mask)}; }
  __device__ void merge(const Norms& other) { *this += other; }
};

// Sums up a tensor's chunks, in the order of the rule, and so finds its step size; called by all threads.
template <class T>
__device__ void finish_tensor(const LambScalars<T>& s, const Workspace& workspace, std::uint32_t slot, int first,
                              int chunks) {
  Norms sum;
#pragma unroll 4
  for (int i = threadIdx.x; i < chunks; i += kThreads) {
    const double2 chunk = __ldcg(reinterpret_cast<const double2*>(&workspace.chunks[first + i]));
    sum.merge({chunk.x, chunk.y});
  }
  sum = block_reduce(sum);
  if (threadIdx.x == 0) workspace.negative_step_sizes[slot] = lamb_negative_step_size(s, sum);
}

// Where a warp works: `size` elements from the tensor's `begin`-th on; not above 0 where there is nothing for it.
struct WarpBlock {
  std::int64_t begin;
  int size;

  __device__ WarpBlock(const MomentEntry& t, int chunk)
      : begin(chunk * kLambChunk + threadIdx.x / kWarp * kLambBlock),
        size(static_cast<int>(min(t.numel - begin, kLambBlock))) {}
  template <class S>
  __device__ LambTile<S> tile(int row) const {
    return {row + static_cast<int>(threadIdx.x % kWarp), size, false};
  }
};

// First pass: one block updates the moments of one chunk of one tensor and adds up its squares.
template <class P, class S>
__global__ void __launch_bounds__(kThreads)
    lamb_moments_kernel(const __grid_constant__ MomentTable table, const Workspace workspace) {
  using T = Math<P>;
  using Tile = LambTile<S>;
  constexpr int kElements = Tile::kElements;

  const int index = table.find(blockIdx.x);
  const int first = table.first_chunk[index];
  const MomentEntry& t = table.tensors[index];
  const auto& step = share<LambScalars<T>>(workspace.slots[t.slot]);
  const auto& s = step.rule;
  const std::uint32_t key = step.random_key;
  const WarpBlock block(t, blockIdx.x - first);
  Moments<Tile, S> moments(t, key, block.begin);

  T param_sum = 0, direction_sum = 0;
#pragma unroll 1
  for (int row = 0; row < block.size; row += kElements * kWarp) {
    read_again();
    const Tile tile = block.tile<S>(row);
    T p[kElements], g[kElements], distance[kElements];
    moments.read(tile);  // before the parameters, which are waited for
    with_type<P>(t.param_dtype(), [&](auto type) {
      using E = decltype(type);
      Params<Tile, E> params(t, key, block.begin);
      E* grad = static_cast<E*>(t.grad) + block.begin;
      const E* anchor = static_cast<const E*>(t.anchor) + block.begin;
      params.read(tile);
      const auto grads = tile.read(grad, true, true), anchors = tile.read(anchor, t.anchor != nullptr);
#pragma unroll
      for (int k = 0; k < kElements; ++k) {
        p[k] = params.get(k);
        g[k] = widen(grads[k]);
        distance[k] = p[k] - T(widen(anchors[k]));  // without an anchor, p - 0 is p in every bit
        if (t.zero_grad && tile.has(k)) store_zero(&grad[tile.place(k)]);
      }
    });
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      T m = moments.m(k), v = moments.v(k);
      lamb_moments(s, g[k], m, v);
      moments.set(k, m, v);
    }
    moments.finish(tile);
    if (step.is_taken) moments.write(tile);
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      const T u = lamb_direction(s, distance[k], T(moments.m(k)), T(moments.v(k)));  // of the moments as stored
      if (!tile.has(k)) continue;
      param_sum = std::fma(p[k], p[k], param_sum);
      direction_sum = std::fma(u, u, direction_sum);
    }
  }

  const Norms sum = block_reduce(Norms(param_sum, direction_sum));
  const int chunks = static_cast<int>((t.numel + kLambChunk - 1) / kLambChunk);
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    workspace.chunks[blockIdx.x] = sum;
    __threadfence();
    is_last = atomicAdd(&workspace.slots[t.slot].as<LambScalars<T>>().finished, 1) + 1 == static_cast<unsigned>(chunks);
  }
  __syncthreads();
  if (is_last) {
    __threadfence();
    finish_tensor(s, workspace, t.slot, first, chunks);
  }
}

// Second pass: one block updates one chunk of one parameter. The last chunks come first.
template <class P, class S>
__global__ void __launch_bounds__(kThreads, kBlocks<S>)
    lamb_param_kernel(const __grid_constant__ MomentTable table, const Workspace workspace) {
  using T = Math<P>;
  using Tile = LambTile<S>;
  constexpr int kElements = Tile::kElements;

  const int chunk = gridDim.x - 1 - blockIdx.x;
  const int index = table.find(chunk);
  const MomentEntry& t = table.tensors[index];
  const auto& step = share<LambScalars<T>>(workspace.slots[t.slot]);
  if (!step.is_taken) return;
  const auto& s = step.rule;
  const std::uint32_t key = step.random_key;
  const T step_size = static_cast<T>(workspace.negative_step_sizes[t.slot]);
  const WarpBlock block(t, chunk - table.first_chunk[index]);
  Moments<Tile, S> moments(t, key, block.begin);

#pragma unroll 1
  for (int row = 0; row < block.size; row += kElements * kWarp) {
    read_again();
    const Tile tile = block.tile<S>(row);
    moments.read(tile, true);  // before the parameters, which are waited for
    T p[kElements], distance[kElements];
    with_type<P>(t.param_dtype(), [&](auto type) {
      using E = decltype(type);
      Params<Tile, E> params(t, key, block.begin);
      params.read(tile);
      const auto anchors = tile.read(static_cast<const E*>(t.anchor) + block.begin, t.anchor != nullptr, true);
#pragma unroll
      for (int k = 0; k < kElements; ++k) {
        p[k] = params.get(k);
        distance[k] = p[k] - T(widen(anchors[k]));
      }
    });
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      p[k] = std::fma(step_size, lamb_direction(s, distance[k], T(moments.m(k)), T(moments.v(k))), p[k]);
    }
    with_type<P>(t.param_dtype(), [&](auto type) {
      Params<Tile, decltype(type)> params(t, key, block.begin);
      params.set(tile, p);
      params.write(tile);
    });
  }
}

// The most that the second pass reads of an element: p, m and v, and what else there is of it.
std::int64_t bytes_of_element(const Step& step) {
  std::int64_t most = 1;
  for (std::int64_t i = 0; i < step.count; ++i) {
    const MomentTensor& t = step.tensors[i];
    const std::int64_t params = size_of(t.param_dtype) * (t.anchor != nullptr ? 2 : 1);
    most = std::max<std::int64_t>(most, params + 2 * size_of(t.state_dtype) + (t.remainder != nullptr ? 2 : 0));
  }
  return most;
}

// The elements that fill half of the device's L2 cache.
std::int64_t batch_elements(std::int64_t bytes) {
  int device = 0, cache = 0;
  cuda_check(cudaGetDevice(&device), "lamb");
  cuda_check(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device), "lamb");
  return std::max<std::int64_t>(cache / 2 / bytes, kLambChunk);
}

template <class P, class S, class Select>
void launch(const Step& step, std::int64_t batch, const Workspace& workspace, cudaStream_t stream,
            const Select& select) {
  fill_tables(step.tensors, step.count, select, kLambChunk, batch, [&](const MomentTable& table, unsigned chunks) {
    lamb_moments_kernel<P, S><<<chunks, kThreads, 0, stream>>>(table, workspace);
    cuda_check(cudaGetLastError(), "lamb");
    lamb_param_kernel<P, S><<<chunks, kThreads, 0, stream>>>(table, workspace);
    cuda_check(cudaGetLastError(), "lamb");
  });
}

}  // namespace

std::size_t lamb_workspace_bytes(const Step& step) {
  return sizeof(LambNorms) * chunks_of(step) + (sizeof(StepSlot) + sizeof(double)) * step.count;
}

void lamb(const Step& step, void* memory, cudaStream_t stream) {
  Workspace workspace;
  workspace.chunks = static_cast<LambNorms*>(memory);
  workspace.slots = reinterpret_cast<StepSlot*>(workspace.chunks + chunks_of(step));
  workspace.negative_step_sizes = reinterpret_cast<double*>(workspace.slots + step.count);
  const std::int64_t batch = batch_elements(bytes_of_element(step));

  count_steps(step, workspace.slots, stream, "lamb");
  launch<AnyFloat, AnyFloat>(step, batch, workspace, stream, [](const MomentTensor& t) {
    return t.param_dtype != DType::f64 && t.state_dtype != DType::u8;
  });
  launch<AnyFloat, std::uint8_t>(step, batch, workspace, stream,
                                 [](const MomentTensor& t) { return t.state_dtype == DType::u8; });
  launch<double, double>(step, batch, workspace, stream,
                         [](const MomentTensor& t) { return t.param_dtype == DType::f64; });
}

}  // namespace superfine::cuda
