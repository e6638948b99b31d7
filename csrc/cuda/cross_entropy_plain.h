// The kernel for one label a row, with no smoothing, softcap or scale: what most training has.
#pragma once

#include <type_traits>

#include "cuda/cluster.h"
#include "cuda/cross_entropy_row.h"

namespace superfine::cuda {
namespace {  // of cross_entropy.cu, by which tools know whose kernel it is

// Traffic per logit: forward reads it once, and writes the gradient once where that is wanted; backward reads and
// writes once. kHold: the row waits in dynamic shared memory for its gradient, spread over the blocks of a cluster
// where there is one. Otherwise it is read again, mostly from the L2 cache. Every element of a row is read and
// written by one thread, so the gradient may overwrite the logits.
template <class E, bool kHold>
__global__ void __launch_bounds__(kMaxThreads, 1)
    plain_kernel(const CrossEntropy args, const Work<float> work, const Settings<float> k, std::int64_t first_row) {
  static_assert(sizeof(Opmath<E>) == sizeof(float));
  constexpr int kPack = PackedRow<E>::kPack;
  constexpr int kBatch = 2;  // two blocks of 512 threads have 32 KB on the way to their multiprocessor
  extern __shared__ float4 shared[];
  RowPack<E>* held = reinterpret_cast<RowPack<E>*>(shared);
  const std::conditional_t<kHold, Cluster, LoneBlock> group;

  const std::int64_t i = first_row + blockIdx.x / group.blocks;
  const std::int64_t label = class_at(args, i * args.target_stride);
  if (label == args.ignore_index || !is_class(args, label)) {
    return answer_without_logits<E>(args, work, i, label == args.ignore_index, group.rank, group.blocks);
  }
  const PackedRow<E> row(logits_of<E>(args, i), static_cast<int>(args.vocab));
  // The label's column, or -1 where it is in another part.
  const std::int64_t distance = label - args.first_class;
  const int column = 0 <= distance && distance < args.vocab ? static_cast<int>(distance) : -1;
  const float mass = args.weight ? static_cast<const float*>(args.weight)[label] : 1.0f;

  const int share = (row.packs + group.blocks - 1) / group.blocks;
  const int begin = min(row.packs, group.rank * share), end = min(row.packs, begin + share);
  float shift, factor = 1, lse;
  if (kHold || work.sums == nullptr) {
    const float at_label = column < 0 ? 0.0f : widen(row.x[column]);
    Softmax<float> all;
    const auto add = [&](int, const RowPack<E>& pack) {
      float x[kPack];
#pragma unroll
      for (int j = 0; j < kPack; ++j) x[j] = widen(pack[j]);
      all.add(x);
    };
    if constexpr (kHold) {
      hold_packs<E>(row, begin, end, held, add);
    } else {
      stream_packs<kBatch>(row, row.begin(), row.whole, add);
    }
    all = group.reduce(block_reduce(all));
    lse = all.maximum + log(all.sum);
    if (group.rank == 0 && threadIdx.x == 0) {
      const float dot = mass * (at_label - shift_of(all.maximum));
      const bool here = column >= 0;
      write_results(args, work, k, i, all.maximum, all.sum, here ? mass : 0.0f, here ? dot : 0.0f);
    }
    shift = all.maximum;
    factor = 1 / all.sum;
  } else {
    shift = lse = work.sums[i];
  }
  if (work.dlogits == nullptr) return;
  __syncwarp();  // a block of one warp has met no barrier yet, and the label's logit may now be overwritten

  const float scale = work.scale[i * work.scale_stride];
  const float at_target = scale * mass;
  factor *= probability_scale(k, scale, mass, lse);
  E* const dx = gradient_of<E>(args, work, i);
  const auto write = [&](int p, const RowPack<E>& pack) {
    const int at = column < 0 ? -1 : column - row.first(p);
    RowPack<E> out;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const float value = factor * exponential(widen(pack[j]) - shift);
      out.set(j, narrow<E>(j == at ? value - at_target : value));
    }
    row.store(p, out, dx);
  };
  if constexpr (kHold) {
#pragma unroll 1
    for (int p = begin + threadIdx.x; p < end; p += blockDim.x) write(p, held[p - begin]);
    group.finish();
  } else {
    stream_packs<kBatch>(row, row.begin(), row.whole, write);
  }
}

}  // namespace
}  // namespace superfine::cuda
