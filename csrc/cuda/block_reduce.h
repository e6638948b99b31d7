// Reductions over a thread block in a fixed order: every thread gets the same result, and every run
// the same bits.
#pragma once

namespace superfine::cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

template <class T>
__device__ __forceinline__ T shuffle(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// State has a default constructor for its neutral element, `shuffled(mask)`, which fetches the state
// of the lane `mask` away, and a commutative `merge`. blockDim.x is a multiple of 32. Every State type
// has one piece of shared memory: a second reduction of that type in one kernel needs a barrier first.
template <class State>
__device__ State block_reduce(State state) {
  alignas(State) __shared__ unsigned char storage[kMaxThreads / kWarp * sizeof(State)];
  State* scratch = reinterpret_cast<State*>(storage);
  const auto reduce_warp = [](State s) {
#pragma unroll 1  // it waits for each shuffle anyway, and a tenth of the module would be copies of this
    for (int mask = kWarp / 2; mask > 0; mask /= 2) s.merge(s.shuffled(mask));
    return s;
  };
  state = reduce_warp(state);
  if (blockDim.x == kWarp) return state;
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) scratch[threadIdx.x / kWarp] = state;
  __syncthreads();
  return reduce_warp(lane < blockDim.x / kWarp ? scratch[lane] : State());
}

template <class T>
struct Sum {
  T value = 0;
  __device__ Sum shuffled(int mask) const { return Sum{shuffle(value, mask)}; }
  __device__ void merge(const Sum& other) { value += other.value; }
};

}  // namespace superfine::cuda
