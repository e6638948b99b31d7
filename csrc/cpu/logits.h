// Logits as the softmax sees them, y = softcap * tanh(scale * x / softcap), a few thousand at a time; and sums over
// kLanes fixed lanes and a fixed tree, whatever the vector width, so that every instruction set and thread count gives
// the same bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/isa.h"
#include "math/cross_entropy.h"
#include "math/softmax.h"

namespace superfine::cpu::SF_ISA {
namespace {

constexpr int kLanes = 64;                    // four AVX-512 vectors: enough to hide the latency of a sum
constexpr std::int64_t kBlock = 64 * kLanes;  // 16 KiB of floats: maximum, then sum, from the L1 cache
constexpr std::int64_t kStage = 8 * kLanes;   // what the other passes take at a time

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

template <class T>
T tree(const T* lanes, bool maximum) {
  T x[kLanes];
  std::memcpy(x, lanes, sizeof x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) {
      x[l] = maximum ? (x[l + width] > x[l] ? x[l + width] : x[l]) : x[l] + x[l + width];
    }
  }
  return x[0];
}

// Calls body(pointer, offset) for every kLanes elements; a last partial group is padded with `pad`.
template <class T, class Body>
inline void for_each_group(const T* x, std::int64_t count, T pad, const Body& body) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(x + i, i);
  if (i < count) {
    T padded[kLanes];
    for (int l = 0; l < kLanes; ++l) padded[l] = i + l < count ? x[i + l] : pad;
    body(padded, i);
  }
}

template <class E>
class Logits {
 public:
  using T = Opmath<E>;

  explicit Logits(const CrossEntropy& args)
      : input_(static_cast<const E*>(args.input)),
        row_stride_(args.row_stride),
        softcap_(static_cast<T>(args.softcap)),
        scale_(static_cast<T>(args.softcap > 0 ? args.scale / args.softcap : args.scale)) {}

  const E* row(std::int64_t i) const { return input_ + i * row_stride_; }
  bool plain() const { return scale_ == T(1) && !capped(); }  // y = x
  bool capped() const { return softcap_ > T(0); }

  T value(const E& x) const {
    const T u = scale_ * T(load(x));
    return capped() ? softcap_ * hyperbolic_tangent(u) : u;
  }

  // The values of x[0..count); `buffer` has room for them.
  const T* values(const E* x, std::int64_t count, T* buffer) const {
    if constexpr (std::is_same_v<E, T>) {
      if (plain()) return x;
    }
    read(x, count, buffer);
    return buffer;
  }

  void read(const E* x, std::int64_t count, T* values) const {
    if (const T scale = scale_; scale == T(1)) {
      for (std::int64_t j = 0; j < count; ++j) values[j] = T(load(x[j]));
    } else {
      for (std::int64_t j = 0; j < count; ++j) values[j] = scale * T(load(x[j]));
    }
    if (!capped()) return;
    for (std::int64_t j = 0; j < count; ++j) values[j] = softcap_ * hyperbolic_tangent(values[j]);
  }

  // From gradients by y to those by x, but for the factor `scale` of the arguments.
  void times_slope(const E* x, std::int64_t count, T* gradients) const {
    for (std::int64_t j = 0; j < count; ++j) gradients[j] *= tangent_slope(scale_ * T(load(x[j])));
  }

 private:
  const E* input_;
  std::int64_t row_stride_;
  T softcap_, scale_;
};

}  // namespace
}  // namespace superfine::cpu::SF_ISA
