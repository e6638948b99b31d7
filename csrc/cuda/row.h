// One row of a matrix, walked by a thread block in 16-byte packs: thread k has packs k, k + threads, ...
// and, of the few elements outside the packs, edges k, k + threads, ...
#pragma once

#include <cuda_pipeline_primitives.h>

#include <cstdint>

#include "cuda/pack.h"

namespace superfine::cuda {

// Packs that a thread loads before it uses the first, where they do not go to shared memory: two
// blocks of 1024 threads then have 64 KB on the way to their multiprocessor.
constexpr int kBatch = 2;
// A held row is requested at once and used in this many parts, as they arrive.
constexpr int kStages = 4;

// A row as 16-byte packs from its first aligned address on, and up to two times (pack - 1) edge
// elements before and after them. Rows of an odd vocabulary start anywhere.
template <class E>
struct Layout {
  static constexpr int kPack = 16 / sizeof(E);
  int head, packs, edges;

  __device__ Layout(const E* row, int vocab) {
    const int past = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) / sizeof(E)) % kPack;
    head = min(vocab, (kPack - past) % kPack);
    packs = (vocab - head) / kPack;
    edges = vocab - packs * kPack;
  }
  __device__ int edge(int e) const { return e < head ? e : packs * kPack + e; }  // class of edge e
};

template <class E>
using RowPack = Pack<E, Layout<E>::kPack>;

template <class E>
__device__ __forceinline__ const RowPack<E>* packs_of(const E* row, const Layout<E>& layout) {
  return reinterpret_cast<const RowPack<E>*>(row + layout.head);
}

// Calls use(index, pack) for every pack of this thread, straight from global memory.
template <class E, class Use>
__device__ __forceinline__ void stream_packs(const RowPack<E>* row, int packs, const Use& use) {
  const int stride = blockDim.x;
  for (int first = threadIdx.x; first < packs; first += kBatch * stride) {
    RowPack<E> batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * stride < packs) batch[b] = row[first + b * stride];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * stride < packs) use(first + b * stride, batch[b]);
    }
  }
}

// The same in the same order, and leaves the packs in shared memory at `held`. Every thread copies
// and reads its own: no barrier.
template <class E, class Use>
__device__ __forceinline__ void hold_packs(const RowPack<E>* row, int packs, RowPack<E>* held, const Use& use) {
  const int threads = blockDim.x;
  const int part = (packs + kStages * threads - 1) / (kStages * threads) * threads;
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    const int end = min(packs, (stage + 1) * part);
    for (int p = stage * part + threadIdx.x; p < end; p += threads) {
      __pipeline_memcpy_async(&held[p], &row[p], sizeof(RowPack<E>));
    }
    __pipeline_commit();
  }
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    __pipeline_wait_prior(kStages - 1 - stage);
    const int end = min(packs, (stage + 1) * part);
    for (int p = stage * part + threadIdx.x; p < end; p += threads) use(p, held[p]);
  }
}

}  // namespace superfine::cuda
