// One row of a matrix, walked by a thread block in 16-byte packs: thread k has packs k, k + threads, ...
#pragma once

#include <cuda_pipeline_primitives.h>

#include <cstdint>
#include <limits>

#include "cuda/tile.h"

namespace superfine::cuda {

// A held row is requested at once and used in this many parts, as they arrive.
constexpr int kStages = 4;

// A row as 16-byte packs from its first aligned address on. The few elements before and after them, as rows of an odd
// vocabulary start anywhere, come last, as packs of one element each; what those lack reads as -inf, a class without
// a part in anything.
template <class E>
struct PackedRow {
  static constexpr int kPack = sizeof(E) == 8 ? 1 : 16 / sizeof(E);  // doubles are slow for other reasons
  using Packed = Elements<E, kPack, 1>;

  const E* x;
  int head, whole, packs;  // elements before the first pack; packs of kPack; all

  __device__ PackedRow(const E* row, int size) : x(row) {
    const int past = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) / sizeof(E)) % kPack;
    head = min(size, (kPack - past) % kPack);
    whole = (size - head) / kPack;
    packs = whole + size - whole * kPack;
  }

  // The column where pack p begins, and the pack that has a column.
  __device__ int first(int p) const {
    if (p < whole) return head + p * kPack;
    const int edge = p - whole;
    return edge < head ? edge : whole * kPack + edge;
  }
  __device__ int pack_of(int column) const {
    const int p = (column - head) / kPack;
    return column >= head && p < whole ? p : column < head ? whole + column : whole + column - whole * kPack;
  }
  __device__ bool has(int p, int j) const { return j == 0 || p < whole; }  // whether pack p has a j-th element

  __device__ const Packed* begin() const { return reinterpret_cast<const Packed*>(x + head); }
  __device__ __forceinline__ Packed edge(int p) const {
    Packed pack;
    pack.set(0, x[first(p)]);
#pragma unroll
    for (int j = 1; j < kPack; ++j) pack.set(j, narrow<E>(-std::numeric_limits<Opmath<E>>::infinity()));
    return pack;
  }

  // Pack p to the same columns of another row, whose packs may begin elsewhere.
  __device__ __forceinline__ void store(int p, const Packed& pack, E* to) const {
    E* const out = to + first(p);
    if (p < whole && reinterpret_cast<std::uintptr_t>(out) % sizeof(Packed) == 0) {
      *reinterpret_cast<Packed*>(out) = pack;
      return;
    }
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      if (has(p, j)) out[j] = pack[j];
    }
  }
};

template <class E>
using RowPack = typename PackedRow<E>::Packed;

// Sets a row to one value, together with other blocks: this one is the `rank`-th of `blocks`.
template <class E>
__device__ void fill_row(E* x, int size, Opmath<E> value, int rank, int blocks) {
  const PackedRow<E> row(x, size);
  RowPack<E> pack;
#pragma unroll
  for (int j = 0; j < row.kPack; ++j) pack.set(j, narrow<E>(value));
#pragma unroll 1
  for (int p = rank * blockDim.x + threadIdx.x; p < row.packs; p += blocks * blockDim.x) row.store(p, pack, x);
}

// Calls use(p, pack) for every pack of this thread. The first `count` lie at `from`: those of the row's `whole` in
// global memory, or all of them where they are held. The next kBatch packs are on their way while these are used.
template <int kBatch, class E, class Use>
__device__ __forceinline__ void stream_packs(const PackedRow<E>& row, const RowPack<E>* from, int count,
                                             const Use& use) {
  const int stride = blockDim.x;
  RowPack<E> next[kBatch];
  const auto request = [&](int first) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * stride < count) next[b] = from[first + b * stride];
    }
  };
  request(threadIdx.x);
#pragma unroll 1
  for (int first = threadIdx.x; first < row.packs; first += kBatch * stride) {
    RowPack<E> now[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) now[b] = next[b];
    request(first + kBatch * stride);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int p = first + b * stride;
      if (p < row.packs) use(p, p < count ? now[b] : row.edge(p));
    }
  }
}

// Calls use(p, pack) for packs [begin, end) of a row, and leaves them in shared memory at held[p - begin]. Every
// thread copies and reads its own: no barrier.
template <class E, class Use>
__device__ __forceinline__ void hold_packs(const PackedRow<E>& row, int begin, int end, RowPack<E>* held,
                                           const Use& use) {
  const int threads = blockDim.x;
  const int part = (end - begin + kStages * threads - 1) / (kStages * threads) * threads;
  const auto for_each = [&](int stage, const auto& f) {
    const int stop = min(end, begin + (stage + 1) * part);
#pragma unroll 1
    for (int p = begin + stage * part + static_cast<int>(threadIdx.x); p < stop; p += threads) f(p);
  };
#pragma unroll 1
  for (int stage = 0; stage < kStages; ++stage) {
    for_each(stage, [&](int p) {
      if (p < row.whole) {
        __pipeline_memcpy_async(&held[p - begin], row.begin() + p, sizeof(held[0]));
      } else {
        held[p - begin] = row.edge(p);
      }
    });
    __pipeline_commit();
  }
#pragma unroll 1
  for (int stage = 0; stage < kStages; ++stage) {
    if (stage == 0) __pipeline_wait_prior(kStages - 1);
    if (stage == 1) __pipeline_wait_prior(kStages - 2);
    if (stage == 2) __pipeline_wait_prior(kStages - 3);
    if (stage == 3) __pipeline_wait_prior(kStages - 4);
    for_each(stage, [&](int p) { use(p, held[p - begin]); });
  }
}

}  // namespace superfine::cuda
