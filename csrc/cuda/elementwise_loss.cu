// Losses element by element; the formulas are in math/elementwise_loss.h.
//
// Each element of input and target is read once and, where it is wanted, its gradient written once: 12 bytes in fp32,
// 6 in bf16; the floor is those over the memory bandwidth. There is one kernel: which loss, which dtypes and what is
// wanted are the same for a whole launch, so asking costs little, and a copy for each would cost a wheel's space. That
// is also why float64 is left to Triton. Sums run over a thread's elements, then a tree, then blocks, in double from
// the threads on: the same bits on every run.
#include "cuda/elementwise_loss.h"

#include <cmath>
#include <stdexcept>

#include "core/cuda_check.h"
#include "cuda/block_reduce.h"
#include "cuda/cross_entropy.h"
#include "cuda/pack.h"

namespace superfine::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float read(const void* from, DType dtype, std::uint32_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(from)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(from)[i];
  return dtype == DType::bf16 ? widen(bf16{bits}) : widen(f16{bits});
}

__device__ __forceinline__ void write(void* to, DType dtype, std::uint32_t i, float value) {
  if (dtype == DType::f32) {
    static_cast<float*>(to)[i] = value;
  } else {
    const std::uint16_t bits = dtype == DType::bf16 ? narrow<bf16>(value).bits : narrow<f16>(value).bits;
    static_cast<std::uint16_t*>(to)[i] = bits;
  }
}

// Quotients of numbers below 2^31 in two instructions (Granlund & Montgomery 1994).
class Divisor {
 public:
  explicit Divisor(std::uint32_t value) : value_(value) {
    int bits = 0;  // 2^bits is the smallest power from `value` on
    while ((std::uint64_t{1} << bits) < value) ++bits;
    if (value > 1) multiplier_ = static_cast<std::uint32_t>(((std::uint64_t{1} << (31 + bits)) + value - 1) / value);
    shift_ = bits - 1;
  }
  __device__ __forceinline__ std::uint32_t quotient(std::uint32_t x) const {
    return value_ == 1 ? x : __umulhi(x, multiplier_) >> shift_;
  }
  __device__ __forceinline__ std::uint32_t rest(std::uint32_t x) const { return x - quotient(x) * value_; }

 private:
  std::uint32_t value_, multiplier_ = 0;
  int shift_ = 0;
};

struct Weights {
  const float* values;
  Divisor repeat, length;

  explicit Weights(const Pattern& pattern)
      : values(static_cast<const float*>(pattern.values)),
        repeat(static_cast<std::uint32_t>(pattern.repeat)),
        length(static_cast<std::uint32_t>(pattern.length)) {}

  __device__ __forceinline__ float at(std::uint32_t i) const {
    const float* from = values;
    asm volatile("" : "+l"(from));  // or the compiler would write the loop once for null and once for others
    return from == nullptr ? 1.0f : from[length.rest(repeat.quotient(i))];
  }
};

__global__ void __launch_bounds__(kThreads) elementwise_loss_kernel(const ElementwiseLoss args, const Weights weights,
                                                                    const Weights pos_weights, float factor) {
  constexpr auto kBlock = static_cast<std::uint32_t>(kElementsPerSum);
  const std::uint32_t end = min((blockIdx.x + 1) * kBlock, static_cast<std::uint32_t>(args.count));
  float sum = 0, next_x = 0, next_t = 0;
  bool loaded = false;
#pragma unroll 1
  for (std::uint32_t next = blockIdx.x * kBlock + threadIdx.x;; next += kThreads) {
    const float x = next_x, t = next_t;
    if (next < end) {  // on its way while the element before is computed
      next_x = read(args.input, args.dtype, next);
      next_t = read(args.target, args.target_dtype, next);
    }
    if (loaded) {
      const std::uint32_t i = next - kThreads;
      const float w = weights.at(i);
      const LossAndSlope<float> of = args.loss == Loss::mse ? mse(x, t) : bce_with_logits(x, t, pos_weights.at(i));
      const float loss = w * of.loss;
      sum += loss;
      if (args.losses != nullptr) static_cast<float*>(args.losses)[i] = loss;
      if (args.gradient != nullptr) {
        const float* const scale = static_cast<const float*>(args.scale);
        const float upstream = scale == nullptr ? 1.0f : scale[args.scale_stride == 0 ? 0 : i];
        write(args.gradient, args.dtype, i, factor * upstream * (w * of.slope));
      }
    }
    if (next >= end) break;
    loaded = true;
  }
  if (args.sums == nullptr) return;
  Sum<double> part;
  part.value = sum;
  part = block_reduce(part);
  if (threadIdx.x == 0) static_cast<float*>(args.sums)[blockIdx.x] = static_cast<float>(part.value * factor);
}

}  // namespace

void elementwise_loss(const ElementwiseLoss& args, void* out, cudaStream_t stream) {
  if (args.count < 1 || args.count > kMostElements || args.dtype == DType::f64) {
    throw std::invalid_argument("elementwise_loss: expected 1 to 2^30 elements, not of float64");
  }
  const auto blocks = static_cast<unsigned>((args.count + kElementsPerSum - 1) / kElementsPerSum);
  elementwise_loss_kernel<<<blocks, kThreads, 0, stream>>>(args, Weights(args.weight), Weights(args.pos_weight),
                                                           static_cast<float>(1 / args.denominator));
  cuda_check(cudaGetLastError(), "elementwise_loss");
  if (args.sums == nullptr) return;
  cross_entropy_reduce(args.sums, blocks, DType::f32, nullptr, out, stream);
}

}  // namespace superfine::cuda
