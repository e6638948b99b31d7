// Losses element by element; the formulas are in math/elementwise_loss.h, for losses and gradients of the CPU's bits.
//
// Each element of input and target is read once and, where it is wanted, its gradient written once: 12 bytes in fp32,
// 6 in bf16; the floor is those over the memory bandwidth. A thread takes packs of eight: one or two 16-byte accesses
// for each tensor, and enough of them on the way without unrolling. There is one kernel for each type of computation:
// which loss, which dtypes and what is wanted are the same for a whole launch, so that asking costs next to nothing.
// Sums run over threads in order, then a tree, then blocks: the same bits on every run.
#include "cuda/elementwise_loss.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "core/cuda_check.h"
#include "cuda/block_reduce.h"
#include "cuda/pack.h"

namespace superfine::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ std::int64_t bytes_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}
__device__ __forceinline__ const void* from_element(const void* array, DType dtype, std::int64_t i) {
  return static_cast<const char*>(array) + i * bytes_of(dtype);
}

__device__ __forceinline__ void read(const void* from, DType dtype, int i, float* value) {
  if (dtype == DType::f32) {
    *value = static_cast<const float*>(from)[i];
  } else {
    const std::uint16_t bits = static_cast<const std::uint16_t*>(from)[i];
    *value = dtype == DType::bf16 ? widen(bf16{bits}) : widen(f16{bits});
  }
}
__device__ __forceinline__ void read(const void* from, DType, int i, double* value) {
  *value = static_cast<const double*>(from)[i];
}

__device__ __forceinline__ void write(void* to, DType dtype, std::int64_t i, float value) {
  if (dtype == DType::f32) {
    static_cast<float*>(to)[i] = value;
  } else {
    const std::uint16_t bits = dtype == DType::bf16 ? narrow<bf16>(value).bits : narrow<f16>(value).bits;
    static_cast<std::uint16_t*>(to)[i] = bits;
  }
}
__device__ __forceinline__ void write(void* to, DType, std::int64_t i, double value) {
  static_cast<double*>(to)[i] = value;
}

// A pattern, how far kThreads elements move on in it, and reciprocals: 64-bit division is a long subroutine.
struct Walk {
  Pattern pattern;
  std::int64_t at_step, rest_step;
  double per_repeat, per_length;

  explicit Walk(const Pattern& of)
      : pattern(of),
        at_step(kThreads / of.repeat % of.length),
        rest_step(kThreads % of.repeat),
        per_repeat(1.0 / static_cast<double>(of.repeat)),
        per_length(1.0 / static_cast<double>(of.length)) {}
};

// a = quotient * b + what it returns, for a below 2^53.
__device__ __forceinline__ std::int64_t divide(std::int64_t a, std::int64_t b, double per_b, std::int64_t* quotient) {
  *quotient = static_cast<std::int64_t>(static_cast<double>(a) * per_b);
  std::int64_t rest = a - *quotient * b;
  if (rest < 0) --*quotient, rest += b;
  if (rest >= b) ++*quotient, rest -= b;
  return rest;
}

// Where a thread is in a pattern.
template <class T>
struct Place {
  std::int64_t at, rest;

  __device__ __forceinline__ Place(const Walk& walk, std::int64_t i) {
    std::int64_t quotient;
    rest = divide(i, walk.pattern.repeat, walk.per_repeat, &quotient);
    at = divide(quotient, walk.pattern.length, walk.per_length, &quotient);
  }

  // The value there; moves on.
  __device__ __forceinline__ T next(const Walk& walk) {
    const T* values = static_cast<const T*>(walk.pattern.values);
    asm volatile("" : "+l"(values));  // or the compiler would write the whole loop twice, with and without a pattern
    const T value = values == nullptr ? T(1) : values[at];
    at += walk.at_step;
    rest += walk.rest_step;
    if (rest >= walk.pattern.repeat) {
      rest -= walk.pattern.repeat;
      ++at;
    }
    if (at >= walk.pattern.length) at -= walk.pattern.length;
    return value;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    elementwise_loss_kernel(const ElementwiseLoss args, const Walk weights, const Walk pos_weights, T factor) {
  const std::int64_t first = blockIdx.x * kElementsPerSum;
  const int end = static_cast<int>(min(args.count - first, kElementsPerSum));
  const void* const input = from_element(args.input, args.dtype, first);
  const void* const target = from_element(args.target, args.target_dtype, first);
  Place<T> weight(weights, first + threadIdx.x), positive(pos_weights, first + threadIdx.x);
  T sum = 0, next_x = 0, next_t = 0;
  int i = threadIdx.x;
  if (i < end) {
    read(input, args.dtype, i, &next_x);
    read(target, args.target_dtype, i, &next_t);
  }
#pragma unroll 1
  while (i < end) {
    const T x = next_x, t = next_t;
    const int next = i + kThreads;
    if (next < end) {  // on its way while this element is computed
      read(input, args.dtype, next, &next_x);
      read(target, args.target_dtype, next, &next_t);
    }
    const T w = weight.next(weights), p = positive.next(pos_weights);
    const LossAndSlope<T> of = args.loss == Loss::mse ? mse(x, t) : bce_with_logits(x, t, p);
    const T loss = w * of.loss;
    sum += loss;
    if (args.losses != nullptr) static_cast<T*>(args.losses)[first + i] = loss;
    if (args.gradient != nullptr) {
      const T* const scale = static_cast<const T*>(args.scale);
      const T upstream = scale == nullptr ? T(1) : scale[(first + i) * args.scale_stride];
      write(args.gradient, args.dtype, first + i, factor * upstream * (w * of.slope));
    }
    i = next;
  }
  if (args.sums == nullptr) return;
  Sum<double> part;
  part.value = sum;
  part = block_reduce(part);
  if (threadIdx.x == 0) args.sums[blockIdx.x] = part.value;
}

__global__ void __launch_bounds__(kMaxThreads)
    elementwise_loss_sum_kernel(const double* sums, int count, double factor, void* out, bool as_double) {
  Sum<double> part;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kMaxThreads) part.value += sums[i];
  part = block_reduce(part);
  if (threadIdx.x != 0) return;
  const double value = part.value * factor;
  if (as_double) {
    *static_cast<double*>(out) = value;
  } else {
    *static_cast<float*>(out) = static_cast<float>(value);
  }
}

template <class T>
void launch(const ElementwiseLoss& args, unsigned blocks, cudaStream_t stream) {
  elementwise_loss_kernel<T><<<blocks, kThreads, 0, stream>>>(args, Walk(args.weight), Walk(args.pos_weight),
                                                             static_cast<T>(1 / args.denominator));
}

}  // namespace

void elementwise_loss(const ElementwiseLoss& args, void* out, cudaStream_t stream) {
  const std::int64_t blocks = (args.count + kElementsPerSum - 1) / kElementsPerSum;
  const bool as_double = args.dtype == DType::f64;
  if (blocks > 0) {
    as_double ? launch<double>(args, static_cast<unsigned>(blocks), stream)
              : launch<float>(args, static_cast<unsigned>(blocks), stream);
    cuda_check(cudaGetLastError(), "elementwise_loss");
  }
  if (args.sums == nullptr) return;
  elementwise_loss_sum_kernel<<<1, kMaxThreads, 0, stream>>>(args.sums, static_cast<int>(blocks), 1 / args.denominator, out, as_double);
  cuda_check(cudaGetLastError(), "elementwise_loss");
}

}  // namespace superfine::cuda
