// What the kernels of cross-entropy share: the work of a launch, and one row of it.
#pragma once

#include <cstdint>
#include <limits>

#include "cuda/cross_entropy.h"
#include "cuda/online_softmax.h"
#include "cuda/row.h"

namespace superfine::cuda {

// What a launch makes of every row. T is double for f64 logits and float for all others.
template <class T>
struct Work {
  T* out;       // results x rows: RowResult, or PartResult; null where `sums` are given
  int results;  // how many, statistics included
  bool part;
  const T* sums;  // lse and mass of the rows with all their classes; null: to be found
  void* dlogits;  // null, or where the gradient goes: dense, or the input itself
  const T* scale;
  std::int64_t scale_stride;
  bool hold;  // the row waits in dynamic shared memory for its gradient

  __device__ bool statistics() const { return results > (part ? int{kPartResults} : int{kRowResults}); }
};

// Numbers of CrossEntropy as kernels use them.
template <class T>
struct Settings {
  T hard, smooth;           // v_c = w_c (hard q_c + smooth)
  T z_loss;                 // z
  T scale, softcap, inner;  // y = softcap tanh(inner x), or scale x where softcap is 0
};

__device__ inline std::int64_t class_at(const CrossEntropy& args, std::int64_t at) {
  return args.target_is_int64 ? static_cast<const std::int64_t*>(args.target)[at]
                              : static_cast<const std::int32_t*>(args.target)[at];
}

__device__ inline bool is_class(const CrossEntropy& args, std::int64_t c) { return 0 <= c && c < args.classes; }

template <class E>
__device__ const E* logits_of(const CrossEntropy& args, std::int64_t i) {
  return static_cast<const E*>(args.input) + i * args.row_stride;
}

template <class E>
__device__ E* gradient_of(const CrossEntropy& args, const Work<Opmath<E>>& work, std::int64_t i) {
  return static_cast<E*>(work.dlogits) + i * (work.dlogits == args.input ? args.row_stride : args.vocab);
}

// A row whose logits do not matter, as they may be anything: zeros where no label counts, NaN where one is no class.
template <class E>
__device__ void answer_without_logits(const CrossEntropy& args, const Work<Opmath<E>>& work, std::int64_t i,
                                      bool ignored, int rank, int blocks) {
  using T = Opmath<E>;
  const T value = ignored ? T(0) : std::numeric_limits<T>::quiet_NaN();
  const int r = threadIdx.x;
  if (work.out != nullptr && rank == 0 && r < work.results) {
    const bool one = ignored && work.part && r == kSum;  // of an empty sum, which adds nothing to others
    work.out[r * args.rows + i] = one ? T(1) : value;
  }
  if (work.dlogits != nullptr) {
    fill_row(gradient_of<E>(args, work, i), static_cast<int>(args.vocab), value, rank, blocks);
  }
}

// scale_i [mass + 2 z lse], what the gradient has of every probability.
template <class T>
__device__ T probability_scale(const Settings<T>& k, T scale, T mass, T lse) {
  return scale * (k.z_loss > 0 ? mass + 2 * k.z_loss * lse : mass);
}

// What thread 0 writes of a row's first results.
template <class T>
__device__ void write_results(const CrossEntropy& args, const Work<T>& work, const Settings<T>& k, std::int64_t i,
                              T maximum, T sum, T mass, T dot) {
  T* const out = work.out + i;
  if (work.part) {
    out[kMaximum * args.rows] = maximum;
    out[kSum * args.rows] = sum;
    out[kPartMass * args.rows] = mass;
    out[kDot * args.rows] = dot;
    return;
  }
  // From differences to the maximum, not from lse: an offset common to a row costs no digits.
  const T log_sum = log(sum), lse = maximum + log_sum;
  T loss = mass * log_sum - dot;
  if (k.z_loss > 0) loss += k.z_loss * lse * lse;
  out[kLoss * args.rows] = loss;
  out[kLse * args.rows] = lse;
  out[kMass * args.rows] = mass;
}

}  // namespace superfine::cuda
