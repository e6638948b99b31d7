// One row of a matrix, walked by a thread block in 16-byte packs: thread k has packs k, k + threads, ...
#pragma once

#include <cuda_pipeline_primitives.h>

#include <cstdint>
#include <limits>

#include "cuda/pack.h"

namespace superfine::cuda {

// A held row is requested at once and used in this many parts, as they arrive.
constexpr int kStages = 4;

// A row cut where addresses are multiples of a pack: rows of an odd vocabulary start anywhere. What the first and the
// last pack have beside the row reads as -inf, a class without a part in anything, and is not written.
template <class E>
struct PackedRow {
  static constexpr int kPack = sizeof(E) == 8 ? 1 : 16 / sizeof(E);  // doubles are slow for other reasons
  using Packed = Pack<E, kPack>;

  const E* x;
  int size, before, packs;  // `before`: elements of the first pack before the row

  __device__ PackedRow(const E* row, int elements)
      : x(row),
        size(elements),
        before(static_cast<int>(reinterpret_cast<std::uintptr_t>(row) / sizeof(E)) & (kPack - 1)),
        packs((before + elements + kPack - 1) / kPack) {}

  __device__ int first(int p) const { return p * kPack - before; }  // column where pack p begins
  __device__ bool has(int column) const { return 0 <= column && column < size; }
  __device__ bool whole(int p) const { return 0 <= first(p) && first(p) + kPack <= size; }

  __device__ const Packed* address(int p) const { return reinterpret_cast<const Packed*>(x + first(p)); }

  __device__ __forceinline__ Packed load(int p) const {
    if (whole(p)) return *address(p);
    Packed pack;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      pack.at[j] = has(first(p) + j) ? x[first(p) + j] : narrow<E>(-std::numeric_limits<Opmath<E>>::infinity());
    }
    return pack;
  }

  // Pack p of this row to the same columns of another one, which may be cut elsewhere.
  __device__ __forceinline__ void store(int p, const Packed& pack, E* to) const {
    E* out = to + first(p);
    if (whole(p) && reinterpret_cast<std::uintptr_t>(out) % sizeof(Packed) == 0) {
      *reinterpret_cast<Packed*>(out) = pack;
      return;
    }
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      if (has(first(p) + j)) out[j] = pack.at[j];
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
  for (int j = 0; j < row.kPack; ++j) pack.at[j] = narrow<E>(value);
#pragma unroll 1
  for (int p = rank * blockDim.x + threadIdx.x; p < row.packs; p += blocks * blockDim.x) row.store(p, pack, x);
}

// Calls use(p, load(p)) for every pack of this thread in [0, packs). Two packs are on their way while a third is
// used: two blocks of 512 threads then have 32 KB on the way to their multiprocessor. One copy of `load` and `use`.
template <class Packed, class Load, class Use>
__device__ __forceinline__ void stream_packs(int packs, const Load& load, const Use& use) {
  const int stride = blockDim.x;
  Packed next = {}, after = {};
#pragma unroll 1
  for (int p = static_cast<int>(threadIdx.x) - 2 * stride; p < packs; p += stride) {
    const Packed pack = next;
    next = after;
    if (p + 2 * stride < packs) after = load(p + 2 * stride);
    if (p >= 0) use(p, pack);
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
      if (row.whole(p)) {
        __pipeline_memcpy_async(&held[p - begin], row.address(p), sizeof(held[0]));
      } else {
        held[p - begin] = row.load(p);
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
