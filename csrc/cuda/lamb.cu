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
#include <type_traits>

#include "core/cuda_check.h"
#include "cuda/block_reduce.h"
#include "cuda/moment_piece.h"
#include "cuda/moment_table.h"
#include "cuda/pack.h"
#include "cuda/tile.h"

namespace superfine::cuda {
namespace {

constexpr int kThreads = kLambWarps * kLambLanes;
// Loads of each tensor in flight a thread. The registers that 4 take leave room for 1024 threads, so 64 KB in
// flight in fp32 and 32 KB in bf16; latency times bandwidth is about 20 KB a multiprocessor on an H100.
// 8-bit moments come by their blocks.
template <class S>
constexpr int kRows = std::is_same<S, std::uint8_t>::value ? kQuantBlock / kWarp : 4;
static_assert(kLambLanes == kWarp);

template <class S>
using LambTile = Tile<1, kRows<S>, kWarp>;

// Between the passes of a batch, in device memory.
struct Workspace {
  LambNorms* chunks;            // of the batch
  double* negative_step_sizes;  // of its tensors
  unsigned* finished;           // chunks of each tensor; 0 before and after a batch
};

template <class P, class S>
using Table = MomentTable<P, S, LambScalars<Opmath<P>>, sizeof(Workspace)>;
constexpr int kMostTensors = Table<float, float>::kTensors;

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

// Sums up a tensor's chunks, in the order of the rule, and so finds its step size; called by all threads.
template <class T>
__device__ void finish_tensor(const LambScalars<T>& s, const Workspace& workspace, int index, int first, int chunks) {
  Norms sum;
#pragma unroll 4
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

// A warp's block of a tensor, and the number of its elements: not above 0 where there is nothing for this warp.
template <class P, class S>
struct WarpBlock : MomentPiece<P, S> {
  __device__ WarpBlock(const MomentPointers<P, S>& tensor, int chunk)
      : MomentPiece<P, S>(tensor, chunk * kLambChunk + threadIdx.x / kWarp * kLambBlock),
        size(static_cast<int>(min(this->numel, kLambBlock))) {}

  __device__ LambTile<S> tile(int row) const { return {row + static_cast<int>(threadIdx.x % kWarp), size, false}; }

  int size;
};

// First pass: one block updates the moments of one chunk of one tensor and adds up its squares.
template <class Table>
__global__ void __launch_bounds__(kThreads)
    lamb_moments_kernel(const __grid_constant__ Table table, const Workspace workspace) {
  using P = typename Table::P;
  using S = typename Table::S;
  using T = Opmath<P>;

  const int index = table.find(blockIdx.x);
  const int first = table.first_chunk[index];
  const auto& tensor = table.tensors[index];
  const auto& s = table.scalars[tensor.scalars];
  const WarpBlock<P, S> t(tensor, blockIdx.x - first);

  T param_sum = 0, direction_sum = 0;
#pragma unroll 1
  for (int row = 0; row < t.size; row += kRows<S> * kWarp) {
    const LambTile<S> tile = t.tile(row);
    StoredParams<LambTile<S>, P> params;
    StoredMoments<LambTile<S>, S> moments;
    t.read(tile, params);
    t.read(tile, moments);
    const auto grad = tile.read_once(t.grad), anchor = tile.read(t.anchor, t.anchored());
#pragma unroll
    for (int r = 0; r < kRows<S>; ++r) {
      T m = moments.exp_avg(r), v = moments.exp_avg_sq(r);
      lamb_moments(s, T(widen(grad[r])), m, v);
      moments.set(r, m, v);
    }
    moments.round(tile, t.random_key, t.begin);
    t.write(tile, moments);
#pragma unroll
    for (int r = 0; r < kRows<S>; ++r) {
      if (tile.has(r)) {
        if (t.zero_grad) store_zero(&t.grad[tile.place(r)]);
        // Of the moments as stored. Without an anchor, p - 0 is p in every bit.
        const T p = params.at(r, t.master);
        const T u = lamb_direction(s, p - T(widen(anchor[r])), T(moments.exp_avg(r)), T(moments.exp_avg_sq(r)));
        param_sum = std::fma(p, p, param_sum);
        direction_sum = std::fma(u, u, direction_sum);
      }
    }
  }

  const Norms sum = block_reduce(Norms(param_sum, direction_sum));
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    workspace.chunks[blockIdx.x] = sum;
    __threadfence();
    const int chunks = static_cast<int>((tensor.numel + kLambChunk - 1) / kLambChunk);
    is_last = atomicAdd(&workspace.finished[index], 1) + 1 == static_cast<unsigned>(chunks);
  }
  __syncthreads();
  if (is_last) {
    __threadfence();
    finish_tensor(s, workspace, index, first, static_cast<int>((tensor.numel + kLambChunk - 1) / kLambChunk));
  }
}

// Second pass: one block updates one chunk of one parameter. The last chunks come first.
template <class Table>
__global__ void __launch_bounds__(kThreads)
    lamb_param_kernel(const __grid_constant__ Table table, const Workspace workspace) {
  using P = typename Table::P;
  using S = typename Table::S;
  using T = Opmath<P>;

  const int chunk = gridDim.x - 1 - blockIdx.x;
  const int index = table.find(chunk);
  const auto& tensor = table.tensors[index];
  const auto& s = table.scalars[tensor.scalars];
  const T step_size = static_cast<T>(workspace.negative_step_sizes[index]);
  const WarpBlock<P, S> t(tensor, chunk - table.first_chunk[index]);

#pragma unroll 1
  for (int row = 0; row < t.size; row += kRows<S> * kWarp) {
    const LambTile<S> tile = t.tile(row);
    StoredParams<LambTile<S>, P> params;
    StoredMoments<LambTile<S>, S> moments;
    t.read(tile, params);
    t.read_once(tile, moments);
    const auto anchor = tile.read_once(t.anchor, t.anchored());
    T p[kRows<S>];
#pragma unroll
    for (int r = 0; r < kRows<S>; ++r) {
      p[r] = params.at(r, t.master);
      const T u = lamb_direction(s, p[r] - T(widen(anchor[r])), T(moments.exp_avg(r)), T(moments.exp_avg_sq(r)));
      p[r] = std::fma(step_size, u, p[r]);
    }
    params.round(tile, p, t.master, t.random_key, t.begin);
    t.write(tile, params);
  }
}

// What the second pass reads of an element: p, m and v, and what else some tensor of the call has.
template <class P, class S>
std::int64_t bytes_of_element(const LambTensor* tensors, std::int64_t count) {
  const auto some = [=](const auto& has) { return std::any_of(tensors, tensors + count, has); };
  std::int64_t bytes = sizeof(P) + 2 * sizeof(S);
  if (some([](const LambTensor& t) { return t.anchor != nullptr; })) bytes += sizeof(P);
  if (some([](const LambTensor& t) { return t.remainder != nullptr; })) bytes += sizeof(std::uint16_t);
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
    fill_tables<Table<P, S>>(tensors, count, has_dtypes, kLambChunk,
                             batch_elements(bytes_of_element<P, S>(tensors, count)),
                             [=](const auto& table, unsigned chunks) {
                               lamb_moments_kernel<<<chunks, kThreads, 0, stream>>>(table, workspace);
                               cuda_check(cudaGetLastError(), "lamb");
                               lamb_param_kernel<<<chunks, kThreads, 0, stream>>>(table, workspace);
                               cuda_check(cudaGetLastError(), "lamb");
                             });
  });
}

}  // namespace superfine::cuda
