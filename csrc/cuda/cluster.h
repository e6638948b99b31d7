// Blocks that share a row: a thread-block cluster of sm_90 and later, whose blocks read each other's shared memory.
#pragma once

#include <cooperative_groups.h>

namespace superfine::cuda {

struct LoneBlock {
  static constexpr int rank = 0, blocks = 1;

  template <class State>
  __device__ State reduce(State state) const {
    return state;
  }
  __device__ void finish() const {}
};

// One of one where the kernel was launched without clusters, or runs on an older GPU.
struct Cluster {
  int rank = 0, blocks = 1;

  __device__ Cluster() {
#if __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    rank = static_cast<int>(cluster.block_rank());
    blocks = static_cast<int>(cluster.num_blocks());
#endif
  }

  // Merges what the threads of each block agree on, in the order of the blocks: the same bits in every block.
  template <class State>
  __device__ State reduce(State state) const {
#if __CUDA_ARCH__ >= 900
    if (blocks == 1) return state;
    const auto cluster = cooperative_groups::this_cluster();
    alignas(State) __shared__ unsigned char storage[sizeof(State)];
    State* mine = reinterpret_cast<State*>(storage);
    if (threadIdx.x == 0) *mine = state;
    cluster.sync();
    state = *cluster.map_shared_rank(mine, 0);
#pragma unroll 1
    for (int other = 1; other < blocks; ++other) state.merge(*cluster.map_shared_rank(mine, other));
#endif
    return state;
  }

  // After `reduce`, before a block ends: others may still read its memory.
  __device__ void finish() const {
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) cooperative_groups::this_cluster().sync();
#endif
  }
};

}  // namespace superfine::cuda
