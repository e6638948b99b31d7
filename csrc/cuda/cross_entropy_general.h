// The kernel for everything: targets by index or of all classes, smoothing, softcap, scale, statistics.
#pragma once

#include "cuda/cross_entropy_row.h"

namespace superfine::cuda {
namespace {  // of cross_entropy.cu, by which tools know whose kernel it is

// Doubles take twice the registers.
template <class E>
constexpr int kThreadLimit = sizeof(E) == 8 ? kMaxThreads / 2 : kMaxThreads;

// tanh(u), and its derivative 4e / (1 + e)^2, e = exp(-2|u|), which stays accurate where tanh is almost 1. Near zero
// the polynomial of Cephes' tanhf (Moshier) instead of (1 - e) / (1 + e), which cancels; within a few units in the last
// place.
__device__ __forceinline__ float tanh_with_slope(float u, float& slope) {
  const float e = exponential(-2 * fabsf(u)), r = __fdividef(1.0f, 1 + e), s = u * u;
  float p = -5.70498872745e-3f;
  p = fmaf(p, s, 2.06390887954e-2f);
  p = fmaf(p, s, -5.37397155531e-2f);
  p = fmaf(p, s, 1.33314422036e-1f);
  p = fmaf(p, s, -3.33332819422e-1f);
  slope = 4 * e * r * r;
  return fabsf(u) < 0.625f ? fmaf(p * s, u, u) : copysignf((1 - e) * r, u);
}
__device__ __forceinline__ double tanh_with_slope(double u, double& slope) {
  const double e = exp(-2 * fabs(u)), r = 1 / (1 + e);
  slope = 4 * e * r * r;
  return tanh(u);
}

// From logits to y, and dy/dx.
template <class T, int N>
__device__ __forceinline__ void transform(const Settings<T>& k, T (&x)[N], T (&slope)[N]) {
  if (k.softcap == 0) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      x[j] *= k.scale;
      slope[j] = k.scale;
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    x[j] = k.softcap * tanh_with_slope(k.inner * x[j], slope[j]);
    slope[j] *= k.scale;
  }
}

// What is known of some classes of a row: the maximum M of their y_c, and sums relative to it; v_c and the results
// are those of math/cross_entropy.h. y_c - M is y_c where M is -inf.
template <class T>
struct RowSums {
  static constexpr int kNone = std::numeric_limits<int>::max();
  T maximum = minus_infinity<T>();
  T sum = 0;            // exp(y_c - M)
  T weighted = 0;       // exp(y_c - M) (y_c - M)
  T mass = 0, dot = 0;  // v_c, v_c (y_c - M)
  int best = kNone;     // the first column with y_c = M

  __device__ RowSums shuffled(int mask) const {
    return {shuffle(maximum, mask), shuffle(sum, mask), shuffle(weighted, mask),
            shuffle(mass, mask),    shuffle(dot, mask), shuffle(best, mask)};
  }

  // Where exp(y) is zero, so that 0 * -inf never arises.
  static __device__ __forceinline__ T bounded(T y) { return max(y, T(-1000)); }

  // Takes `joint`, no less than the maximum, for it.
  __device__ __forceinline__ void raise(T joint) {
    const T shift = shift_of(joint), change = shift_of(maximum) - shift;
    const T factor = exponential(maximum - shift);
    weighted = factor * (weighted + sum * bounded(change));
    sum *= factor;
    if (mass != 0) dot += mass * change;
    maximum = joint;
  }

  __device__ void merge(RowSums other) {
    best = other.maximum > maximum ? other.best : other.maximum < maximum ? best : min(best, other.best);
    const T joint = max(maximum, other.maximum);
    raise(joint);
    other.raise(joint);
    sum += other.sum;
    weighted += other.weighted;
    mass += other.mass;
    dot += other.dot;
  }

  // A class that is wanted by index; as one of the row's logits it is added elsewhere.
  __device__ void add_target(T y, T v) {
    if (y > maximum) best = kNone;
    raise(max(maximum, y));
    mass += v;
    dot += v * (y - shift_of(maximum));
  }
};

// The classes that a row is to have, v_c, by column of the input.
template <class T>
class Targets {
 public:
  __device__ Targets(const CrossEntropy& args, const Settings<T>& k, std::int64_t i)
      : args_(args),
        k_(k),
        index_(i * args.target_stride),
        probabilities_(args.probabilities == nullptr
                           ? nullptr
                           : static_cast<const T*>(args.probabilities) + i * args.probabilities_stride) {}

  __device__ bool dense() const { return args_.target == nullptr; }
  // Whether each class has a v_c of its own beside those of targets by index.
  __device__ bool every_class() const { return dense() || k_.smooth > 0; }

  __device__ std::int64_t slots() const { return dense() ? 0 : args_.targets; }
  __device__ std::int64_t slot_class(std::int64_t slot) const { return class_at(args_, index_ + slot); }
  __device__ T slot_value(std::int64_t slot, std::int64_t c) const {
    return k_.hard * weight(c) * (probabilities_ ? probabilities_[slot] : T(1));
  }
  // The v_c of pack p: all loads at once, none outside the row.
  template <class E, int N>
  __device__ __forceinline__ void class_values(const PackedRow<E>& row, int p, T (&v)[N]) const {
    const std::int64_t first = args_.first_class + row.first(p);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = k_.smooth;
    if (dense()) {
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] += k_.hard * probabilities_[first + (row.has(p, j) ? j : 0)];
    }
    if (args_.weight != nullptr) {
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] *= weight(first + (row.has(p, j) ? j : 0));
    }
  }

 private:
  __device__ T weight(std::int64_t c) const { return args_.weight ? static_cast<const T*>(args_.weight)[c] : T(1); }

  const CrossEntropy& args_;
  const Settings<T>& k_;
  std::int64_t index_;
  const T* probabilities_;
};

// Which packs hold targets by index, as bits; packs that lie kBits apart share one.
class Marks {
 public:
  static constexpr int kBits = 4096;

  __device__ explicit Marks(unsigned* words) : words_(words) {}
  __device__ void clear() const {
    for (int w = threadIdx.x; w < kBits / 32; w += blockDim.x) words_[w] = 0;
  }
  __device__ void set(int p) const { atomicOr(&words_[p % kBits / 32], 1u << p % 32); }
  __device__ bool has(int p) const { return words_[p % kBits / 32] >> p % 32 & 1; }

 private:
  unsigned* words_;
};

template <class E>
__global__ void __launch_bounds__(kThreadLimit<E>, 1)
    general_kernel(const CrossEntropy args, const Work<Opmath<E>> work, const Settings<Opmath<E>> k,
                   std::int64_t first_row) {
  using T = Opmath<E>;
  constexpr int kPack = PackedRow<E>::kPack;
  extern __shared__ float4 shared[];
  RowPack<E>* held = reinterpret_cast<RowPack<E>*>(shared);
  __shared__ unsigned mark_words[Marks::kBits / 32];

  const std::int64_t i = first_row + blockIdx.x;
  const PackedRow<E> row(logits_of<E>(args, i), static_cast<int>(args.vocab));
  const Targets<T> targets(args, k, i);
  const Marks marks(mark_words);
  const bool linear = k.softcap == 0 && k.scale == 1;

  // The column of a slot's class, or -1 where that is another part's.
  const auto column_of = [&](std::int64_t c) {
    const std::int64_t column = c - args.first_class;
    return 0 <= column && column < args.vocab ? static_cast<int>(column) : -1;
  };
  if (!targets.dense()) {
    bool counts = false, bad = false;
    marks.clear();
    __syncthreads();
    for (std::int64_t slot = threadIdx.x; slot < targets.slots(); slot += blockDim.x) {
      const std::int64_t c = targets.slot_class(slot);
      if (c == args.ignore_index) continue;
      counts = true;
      bad = bad || !is_class(args, c);
      const int column = column_of(c);
      if (column >= 0) marks.set(row.pack_of(column));
    }
    bad = __syncthreads_or(bad);
    counts = __syncthreads_or(counts);
    if (bad || !counts) return answer_without_logits<E>(args, work, i, !counts, 0, 1);
  }

  T shift, lse, mass, factor = 1;
  if (work.sums == nullptr) {
    RowSums<T> all;
    T at_label = 0;  // of thread 0, which has the first slot
    const bool statistics = work.statistics();
    const auto add = [&](int p, const RowPack<E>& pack) {
      if (work.hold) held[p] = pack;
      T y[kPack], slope[kPack];
#pragma unroll
      for (int j = 0; j < kPack; ++j) y[j] = widen(pack[j]);
      if (!linear) transform(k, y, slope);
      T joint = all.maximum;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        y[j] = row.has(p, j) ? y[j] : minus_infinity<T>();  // a softcap has made it finite
        joint = max(joint, y[j]);
      }
      if (statistics && (joint > all.maximum || all.best == all.kNone)) {
#pragma unroll
        for (int j = kPack - 1; j >= 0; --j) {
          if (y[j] == joint && row.has(p, j)) all.best = row.first(p) + j;
        }
      }
      if (joint > all.maximum) all.raise(joint);
      const T to = shift_of(joint);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        y[j] -= to;
        all.sum += exponential(y[j]);
      }
      if (statistics) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) all.weighted += exponential(y[j]) * all.bounded(y[j]);
      }
      if (targets.every_class()) {
        T v[kPack];
        targets.class_values(row, p, v);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          all.mass += row.has(p, j) ? v[j] : T(0);
          all.dot += row.has(p, j) ? v[j] * y[j] : T(0);
        }
      }
    };
    stream_packs<1>(row, row.begin(), row.whole, add);
    for (std::int64_t slot = threadIdx.x; slot < targets.slots(); slot += blockDim.x) {
      const std::int64_t c = targets.slot_class(slot);
      const int column = c == args.ignore_index ? -1 : column_of(c);
      if (column < 0) continue;
      T y[1] = {widen(row.x[column])}, slope[1];
      transform(k, y, slope);
      all.add_target(y[0], targets.slot_value(slot, c));
      at_label = y[0];
    }
    all = block_reduce(all);
    const T log_sum = log(all.sum);
    factor = 1 / all.sum;
    if (threadIdx.x == 0) {
      write_results(args, work, k, i, all.maximum, all.sum, all.mass, all.dot);
      T* const out = work.out + i;
      const int best = all.best == all.kNone ? 0 : all.best;  // a row of NaN has no maximum
      if (statistics && work.part) {
        out[kWeighted * args.rows] = all.weighted;
        out[kAtTarget * args.rows] = at_label;
        out[kBest * args.rows] = static_cast<T>(args.first_class + best);
      } else if (statistics) {
        out[kLogprob * args.rows] = at_label - shift_of(all.maximum) - log_sum;
        out[kEntropy * args.rows] = log_sum - factor * all.weighted;
        out[kCorrect * args.rows] = best == column_of(targets.slot_class(0)) ? T(1) : T(0);
      }
    }
    shift = all.maximum;
    lse = all.maximum + log_sum;
    mass = all.mass;
  } else {
    shift = lse = work.sums[i];
    mass = work.sums[args.rows + i];
  }
  if (work.dlogits == nullptr) return;
  __syncwarp();  // a block of one warp may have met no barrier, and the targets' logits may now be overwritten

  const T scale = work.scale[i * work.scale_stride];
  factor *= probability_scale(k, scale, mass, lse);
  E* const dx = gradient_of<E>(args, work, i);
  const auto write = [&](int p, const RowPack<E>& pack) {
    T value[kPack], slope[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) value[j] = widen(pack[j]);
    if (!linear) transform(k, value, slope);
#pragma unroll
    for (int j = 0; j < kPack; ++j) value[j] = factor * exponential(value[j] - shift);
    if (targets.every_class()) {
      T v[kPack];
      targets.class_values(row, p, v);
#pragma unroll
      for (int j = 0; j < kPack; ++j) value[j] -= scale * v[j];
    }
    if (!targets.dense() && marks.has(p)) {
#pragma unroll 1
      for (std::int64_t slot = 0; slot < targets.slots(); ++slot) {
        const std::int64_t c = targets.slot_class(slot), at = c - args.first_class - row.first(p);
        if (c == args.ignore_index || at < 0 || at >= kPack) continue;
        const T v = scale * targets.slot_value(slot, c);
#pragma unroll
        for (int j = 0; j < kPack; ++j) value[j] -= j == static_cast<int>(at) ? v : T(0);
      }
    }
    RowPack<E> out;
#pragma unroll
    for (int j = 0; j < kPack; ++j) out.set(j, narrow<E>(linear ? value[j] : value[j] * slope[j]));
    row.store(p, out, dx);
  };
  stream_packs<1>(row, work.hold ? held : row.begin(), work.hold ? row.packs : row.whole, write);
}

}  // namespace
}  // namespace superfine::cuda
