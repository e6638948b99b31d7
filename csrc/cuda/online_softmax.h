// Maximum and sum of exponentials in one pass (Milakov & Gimelshein 2018), mergeable across threads.
// Differences to the maximum are taken before anything is rounded, so that a common offset of the
// logits costs no accuracy. -inf, alone or in whole blocks, is right; NaN and +inf end up in the sum.
#pragma once

#include <limits>

#include "cuda/block_reduce.h"

namespace superfine::cuda {

// exp(x) in one multiplication and one instruction, within 2 units in the last place of the terms
// that count (the error grows with |x|, as exp(x) vanishes); below 2^-126 it is zero.
__device__ __forceinline__ float exponential(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}
__device__ __forceinline__ double exponential(double x) { return exp(x); }

template <class T>
__device__ __forceinline__ T minus_infinity() {
  return -std::numeric_limits<T>::infinity();
}

// What exponentials are relative to: the maximum, or 0 where that is -inf, as -inf - -inf would be NaN.
template <class T>
__device__ __forceinline__ T shift_of(T maximum) {
  return maximum == minus_infinity<T>() ? T(0) : maximum;
}

// What is known of a part of a row: maximum, and sum of exp(x - maximum).
template <class T>
struct Softmax {
  T maximum = minus_infinity<T>();
  T sum = 0;

  __device__ Softmax shuffled(int mask) const { return {shuffle(maximum, mask), shuffle(sum, mask)}; }

  __device__ void merge(const Softmax& other) {
    const T joint = max(maximum, other.maximum);
    const T shift = shift_of(joint);
    sum = sum * exponential(maximum - shift) + other.sum * exponential(other.maximum - shift);
    maximum = joint;
  }

  template <int N>
  __device__ __forceinline__ void add(const T (&x)[N]) {
    T joint = maximum;
#pragma unroll
    for (int j = 0; j < N; ++j) joint = max(joint, x[j]);
    const T shift = shift_of(joint);
    sum *= exponential(maximum - shift);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += exponential(x[j] - shift);
    maximum = joint;
  }
};

}  // namespace superfine::cuda
