// Losses element by element; the formulas are in math/elementwise_loss.h.
//
// One pass: input and target are read once, the gradient is written once: 12 bytes an element in float32, where eager
// torch and its backward move several times that. A strip of elements is read into the L1 cache as Reals, so that one
// loop serves all dtypes and all ways to broadcast weights; float32 is read where it lies. Strips and lanes of a sum
// are the same for every vector width and thread count, and so are the bits.
#include "cpu/elementwise_loss.h"

#include <cstring>

#include "core/parallel_for.h"
#include "cpu/stream.h"

namespace superfine::cpu::SF_ISA {
namespace {

constexpr int kLanes = 64;                   // of a sum: four AVX-512 vectors, enough to hide its latency
constexpr std::int64_t kStrip = 8 * kLanes;  // seven of them fit the L1 cache
static_assert(kElementsPerSum % kStrip == 0, "a sum is one of whole strips");

// Loops below run over whole strips, so that none has a tail: what lies behind `count` is computed and not used.

// Elements from `begin` on; where there is no whole strip of them, their copies in `buffer`.
template <class E>
const E* strip_of(const void* from, std::int64_t begin, std::int64_t count, E* buffer) {
  const E* const x = static_cast<const E*>(from) + begin;
  if (count == kStrip) return x;
  std::memcpy(static_cast<void*>(buffer), x, static_cast<std::size_t>(count) * sizeof(E));
  return buffer;
}

template <class E>
const float* convert(const void* from, std::int64_t begin, std::int64_t count, float* buffer) {
  E tail[kStrip] = {};
  const E* const x = strip_of(from, begin, count, tail);
  for (std::int64_t j = 0; j < kStrip; ++j) buffer[j] = load(x[j]);
  return buffer;
}

// The same as Reals.
const float* read(const void* from, DType dtype, std::int64_t begin, std::int64_t count, float* buffer) {
  switch (dtype) {
    case DType::bf16: return convert<bf16>(from, begin, count, buffer);
    case DType::f16: return convert<f16>(from, begin, count, buffer);
    default: return strip_of(from, begin, count, buffer);
  }
}
const double* read(const void* from, DType, std::int64_t begin, std::int64_t count, double* buffer) {
  return strip_of(from, begin, count, buffer);
}

// The same of a pattern; without one, `buffer` holds ones.
template <class T>
const T* read(const Pattern& pattern, std::int64_t begin, std::int64_t count, T* buffer) {
  if (pattern.values == nullptr) return buffer;
  const T* const values = static_cast<const T*>(pattern.values);
  for (std::int64_t j = 0; j < count;) {
    const std::int64_t at = (begin + j) / pattern.repeat % pattern.length;
    const std::int64_t left = pattern.repeat == 1 ? pattern.length - at : pattern.repeat - (begin + j) % pattern.repeat;
    const std::int64_t run = left < count - j ? left : count - j;
    if (pattern.repeat == 1 && run == kStrip) return values + at;
    for (std::int64_t k = 0; k < run; ++k) buffer[j + k] = values[pattern.repeat == 1 ? at + k : at];
    j += run;
  }
  return buffer;
}

template <class E>
void convert(const float* values, E* buffer) {
  for (std::int64_t j = 0; j < kStrip; ++j) store(&buffer[j], values[j]);
}

void write(void* to, DType dtype, std::int64_t begin, std::int64_t count, const void* values, bool stream) {
  alignas(64) std::uint16_t narrow[kStrip];
  std::int64_t size = dtype == DType::f64 ? 8 : 4;
  if (dtype == DType::bf16 || dtype == DType::f16) {
    size = 2;
    dtype == DType::bf16 ? convert(static_cast<const float*>(values), reinterpret_cast<bf16*>(narrow))
                         : convert(static_cast<const float*>(values), reinterpret_cast<f16*>(narrow));
    values = narrow;
  }
  char* const out = static_cast<char*>(to) + begin * size;
  const auto bytes = static_cast<std::size_t>(count * size);
  stream ? LineStream(out).write(values, bytes) : static_cast<void>(std::memcpy(out, values, bytes));
}

template <class T>
struct Strip {
  const T *x, *t, *weight, *pos_weight, *scale;
};

template <Loss kLoss, class T>
void compute(const Strip<T>& in, T factor, T* __restrict__ losses, T* __restrict__ gradient) {
  for (std::int64_t j = 0; j < kStrip; ++j) {
    const LossAndSlope<T> of =
        kLoss == Loss::mse ? mse(in.x[j], in.t[j]) : bce_with_logits(in.x[j], in.t[j], in.pos_weight[j]);
    losses[j] = in.weight[j] * of.loss;
    gradient[j] = factor * in.scale[j] * (in.weight[j] * of.slope);
  }
}

// Of a whole strip.
template <class T>
double sum(const T* losses) {
  T lanes[kLanes] = {};
  for (std::int64_t j = 0; j < kStrip; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += losses[j + l];
  }
  double tree[kLanes];
  for (int l = 0; l < kLanes; ++l) tree[l] = lanes[l];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) tree[l] += tree[l + width];
  }
  return tree[0];
}

template <class T>
void run(const ElementwiseLoss& args, int threads) {
  const T factor = static_cast<T>(1 / args.denominator);
  const bool stream = args.gradient != args.input && args.count * static_cast<std::int64_t>(sizeof(T)) >= kStreamBytes;
  const std::int64_t sums = (args.count + kElementsPerSum - 1) / kElementsPerSum;
  // A sum's elements need a core some 10 us, several times what it costs to wake a second thread.
  parallel_for(sums, 1, threads, [&](Ranges& ranges) {
    alignas(64) T x[kStrip] = {}, t[kStrip] = {}, weight[kStrip], pos_weight[kStrip], scale[kStrip];
    alignas(64) T losses[kStrip], gradient[kStrip];
    const T* const scales = static_cast<const T*>(args.scale);
    const T common = scales != nullptr && args.scale_stride == 0 ? scales[0] : T(1);
    for (std::int64_t j = 0; j < kStrip; ++j) {
      weight[j] = pos_weight[j] = T(1);
      scale[j] = common;
    }
    std::int64_t first, last;
    while (ranges.next(first, last))
      for (std::int64_t s = first; s < last; ++s) {
        double total = 0;
        const std::int64_t end = (s + 1) * kElementsPerSum < args.count ? (s + 1) * kElementsPerSum : args.count;
        for (std::int64_t begin = s * kElementsPerSum; begin < end; begin += kStrip) {
          const std::int64_t count = begin + kStrip < end ? kStrip : end - begin;
          const Strip<T> in{read(args.input, args.dtype, begin, count, x),
                            read(args.target, args.target_dtype, begin, count, t),
                            read(args.weight, begin, count, weight), read(args.pos_weight, begin, count, pos_weight),
                            args.scale_stride == 0 ? scale : strip_of(scales, begin, count, scale)};
          if (args.loss == Loss::mse) {
            compute<Loss::mse>(in, factor, losses, gradient);
          } else {
            compute<Loss::bce_with_logits>(in, factor, losses, gradient);
          }
          if (args.gradient != nullptr) write(args.gradient, args.dtype, begin, count, gradient, stream);
          if (args.losses != nullptr) {
            write(args.losses, sizeof(T) == 8 ? DType::f64 : DType::f32, begin, count, losses, false);
          }
          if (args.sums != nullptr) {
            for (std::int64_t j = count; j < kStrip; ++j) losses[j] = T(0);
            total += sum(losses);
          }
        }
        if (args.sums != nullptr) static_cast<double*>(args.sums)[s] = total;
      }
  });
}

}  // namespace

void elementwise_loss(const ElementwiseLoss& args, int threads) {
  args.dtype == DType::f64 ? run<double>(args, threads) : run<float>(args, threads);
}

}  // namespace superfine::cpu::SF_ISA
