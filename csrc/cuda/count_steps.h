// The first launch of an optimizer's step. It counts the step of every tensor and computes, from the count and the
// hyperparameters as they are on the device then, what the kernels of the step take. So nothing that a step depends on
// is known to the host only, and a captured one goes on counting whenever it is replayed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/step.h"

namespace superfine::cuda {

// What the kernels take of a tensor's step; `Rule` is AdamWScalars or LambScalars of float or double.
template <class Rule>
struct alignas(16) StepScalars {
  Rule rule;
  std::uint32_t random_key;
  std::uint32_t is_taken;  // else gradients are zeroed where that is asked for, and nothing more is written
  std::uint32_t finished;  // chunks, where kernels count them; begins at 0
};

// In device memory: of a tensor of any type.
struct alignas(16) StepSlot {
  unsigned char bytes[sizeof(StepScalars<LambScalars<double>>)];

  template <class Rule>
  SF_HD StepScalars<Rule>& as() {
    static_assert(sizeof(StepScalars<Rule>) <= sizeof bytes);
    return *reinterpret_cast<StepScalars<Rule>*>(bytes);
  }
};

// Fills a slot for each tensor, in their order.
void count_steps(const Step& step, StepSlot* slots, cudaStream_t stream, const char* op);

#ifdef __CUDACC__
// A tensor's slot in shared memory. Called by all threads, once in a kernel.
template <class Rule>
__device__ const StepScalars<Rule>& share(StepSlot& slot) {
  using Scalars = StepScalars<Rule>;
  constexpr int kPacks = sizeof(Scalars) / sizeof(uint4);
  static_assert(sizeof(Scalars) % sizeof(uint4) == 0 && kPacks <= 32);
  alignas(Scalars) __shared__ unsigned char storage[sizeof(Scalars)];
  const int i = threadIdx.x;
  if (i < kPacks) reinterpret_cast<uint4*>(storage)[i] = reinterpret_cast<const uint4*>(slot.bytes)[i];
  __syncthreads();
  return *reinterpret_cast<const Scalars*>(storage);
}

// Has the compiler read shared memory again from here on. A kernel's loop begins with it: it has no registers in which
// to keep all scalars beside its elements.
__device__ __forceinline__ void read_again() { asm volatile("" ::: "memory"); }
#endif

}  // namespace superfine::cuda
