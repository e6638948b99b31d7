// Activations and gated linear units; the formulas are in math/activation.h.
//
// One pass: for the result, gate and up are read once and it is written once, 12 bytes an element in float32 and 8
// without up; for the gradients, that of the result is read, too, and there are two, 20 bytes and 12. A strip of a row
// is brought into the L1 cache as Reals, and short loops over it do the rest, so that one of them for each function
// serves all dtypes, with and without up; float32 is read where it lies.
#include "cpu/activation.h"

#include <cstring>

#include "core/parallel_for.h"

namespace superfine::cpu::SF_ISA {
namespace {

constexpr std::int64_t kGroup = 64;           // loops take multiples of it, so that none has a tail
constexpr std::int64_t kStrip = 8 * kGroup;   // five of them fit the L1 cache
constexpr std::int64_t kPiece = 16 * kStrip;  // elements that a thread takes at least, of one row at most

// Elements from `begin` on; where they are no whole groups, their copies in `buffer`.
template <class E>
const E* strip_of(const void* from, std::int64_t begin, std::int64_t count, E* buffer) {
  const E* const x = static_cast<const E*>(from) + begin;
  if (count % kGroup == 0) return x;
  std::memcpy(static_cast<void*>(buffer), x, static_cast<std::size_t>(count) * sizeof(E));
  return buffer;
}

template <class E>
const float* widened(const void* from, std::int64_t begin, std::int64_t count, std::int64_t groups, float* buffer) {
  E tail[kStrip] = {};
  const E* const x = strip_of(from, begin, count, tail);
  for (std::int64_t j = 0; j < groups * kGroup; ++j) buffer[j] = load(x[j]);
  return buffer;
}

// The same as Reals.
const float* read(const void* from, DType dtype, std::int64_t begin, std::int64_t count, float* buffer) {
  const std::int64_t groups = (count + kGroup - 1) / kGroup;
  switch (dtype) {
    case DType::bf16: return widened<bf16>(from, begin, count, groups, buffer);
    case DType::f16: return widened<f16>(from, begin, count, groups, buffer);
    default: return strip_of(from, begin, count, buffer);
  }
}
const double* read(const void* from, DType, std::int64_t begin, std::int64_t count, double* buffer) {
  return strip_of(from, begin, count, buffer);
}

// Where the next `count` results go: the output itself, if they are Reals and whole groups, else `buffer`. What is
// written stays in the caches, as the product that takes it comes next.
template <class T>
T* room(void* to, DType dtype, std::int64_t begin, std::int64_t count, T* buffer) {
  const bool direct = count % kGroup == 0 && dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32);
  return direct ? static_cast<T*>(to) + begin : buffer;
}

template <class E>
void narrow(const float* values, void* to, std::int64_t begin, std::int64_t count) {
  E tail[kStrip];
  E* const out = static_cast<E*>(to) + begin;
  E* const narrowed = count % kGroup == 0 ? out : tail;
  const std::int64_t groups = (count + kGroup - 1) / kGroup;
  for (std::int64_t j = 0; j < groups * kGroup; ++j) store(&narrowed[j], values[j]);
  if (narrowed == tail) std::memcpy(static_cast<void*>(out), tail, static_cast<std::size_t>(count) * sizeof(E));
}

// To the output, unless they are there.
void write(void* to, DType dtype, std::int64_t begin, std::int64_t count, const float* values) {
  float* const out = static_cast<float*>(to) + begin;
  switch (dtype) {
    case DType::bf16: return narrow<bf16>(values, to, begin, count);
    case DType::f16: return narrow<f16>(values, to, begin, count);
    default:
      if (out != values) std::memcpy(out, values, static_cast<std::size_t>(count) * sizeof(float));
  }
}
void write(void* to, DType, std::int64_t begin, std::int64_t count, const double* values) {
  double* const out = static_cast<double*>(to) + begin;
  if (out != values) std::memcpy(out, values, static_cast<std::size_t>(count) * sizeof(double));
}

template <Function kFunction, class T>
SF_HD ValueAndSlope<T> of(T x) {
  return kFunction == Function::gelu ? gelu(x) : kFunction == Function::gelu_tanh ? gelu_tanh(x) : silu(x);
}

// Values, slopes, or both.
template <Function kFunction, class T>
void compute(const T* x, std::int64_t groups, T* __restrict__ values, T* __restrict__ slopes) {
  if (slopes == nullptr) {
    for (std::int64_t j = 0; j < groups * kGroup; ++j) values[j] = of<kFunction>(x[j]).value;
    return;
  }
  if (values == nullptr) {
    for (std::int64_t j = 0; j < groups * kGroup; ++j) slopes[j] = of<kFunction>(x[j]).slope;
    return;
  }
  for (std::int64_t j = 0; j < groups * kGroup; ++j) {
    const ValueAndSlope<T> both = of<kFunction>(x[j]);
    values[j] = both.value;
    slopes[j] = both.slope;
  }
}

template <class T>
void compute(Function function, const T* x, std::int64_t groups, T* values, T* slopes) {
  switch (function) {
    case Function::gelu: return compute<Function::gelu>(x, groups, values, slopes);
    case Function::gelu_tanh: return compute<Function::gelu_tanh>(x, groups, values, slopes);
    case Function::silu: return compute<Function::silu>(x, groups, values, slopes);
  }
}

template <class T>
void multiply(T* __restrict__ values, const T* by, std::int64_t groups) {
  for (std::int64_t j = 0; j < groups * kGroup; ++j) values[j] *= by[j];
}

template <class T>
void run(const Activation& args, int threads) {
  // Of values and slopes, in the backward pass where the gradients of up and gate go.
  void* const of_values = args.grad.data == nullptr ? args.out : args.dup;
  void* const of_slopes = args.grad.data == nullptr ? nullptr : args.out;
  if (of_values == nullptr && of_slopes == nullptr) return;
  const std::int64_t pieces = (args.columns + kPiece - 1) / kPiece;
  const std::int64_t grain = args.columns < kPiece ? kPiece / args.columns : 1;
  parallel_for(args.rows * pieces, grain, threads, [&](Ranges& ranges) {
    alignas(64) T x[kStrip] = {}, up[kStrip] = {}, grad[kStrip] = {}, values[kStrip], slopes[kStrip];
    std::int64_t first, last;
    while (ranges.next(first, last))
      for (std::int64_t piece = first; piece < last; ++piece) {
        const std::int64_t row = piece / pieces, start = piece % pieces * kPiece;
        const std::int64_t end = start + kPiece < args.columns ? start + kPiece : args.columns;
        for (std::int64_t begin = start; begin < end; begin += kStrip) {
          const std::int64_t count = begin + kStrip < end ? kStrip : end - begin;
          const std::int64_t groups = (count + kGroup - 1) / kGroup, at = row * args.columns + begin;
          const auto strip = [&](const RowsOf& of, T* buffer) {
            return read(of.data, args.dtype, row * of.stride + begin, count, buffer);
          };
          T* const f = of_values ? room(of_values, args.dtype, at, count, values) : nullptr;
          T* const df = of_slopes ? room(of_slopes, args.dtype, at, count, slopes) : nullptr;
          compute(args.function, strip(args.gate, x), groups, f, df);
          if (args.grad.data != nullptr) {
            const T* const upstream = strip(args.grad, grad);
            if (f) multiply(f, upstream, groups);
            if (df) multiply(df, upstream, groups);
          }
          T* const by_up = args.grad.data == nullptr ? f : df;
          if (by_up && args.up.data != nullptr) multiply(by_up, strip(args.up, up), groups);
          if (f) write(of_values, args.dtype, at, count, f);
          if (df) write(of_slopes, args.dtype, at, count, df);
        }
      }
  });
}

}  // namespace

void activation(const Activation& args, int threads) {
  args.dtype == DType::f64 ? run<double>(args, threads) : run<float>(args, threads);
}

}  // namespace superfine::cpu::SF_ISA
