// Moments in 8 bits: a block of 256 elements shares a scale, and an element is a small float times it. A first moment
// has a sign, 4 bits of exponent and 3 of mantissa; a second moment 5 bits of exponent and 3 of mantissa, as its root
// is what counts.
//
// Code c stands for (f(c) - f(0)) * scale, f(c) being the float with bits kBase + (c << 20), so both directions are an
// addition and a shift, and numbers near zero are spaced evenly. f of the greatest code is 1.875.
//
// Second moments are rounded at random (math/random.h): at beta2 = 0.999 most of them change by less than half a code
// in a step, and rounded to the nearest one they would never change.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace superfine {

constexpr std::int64_t kQuantBlock = 256;

SF_HD std::int64_t quant_blocks(std::int64_t numel) { return (numel + kQuantBlock - 1) / kQuantBlock; }

template <int kBits>  // of exponent and mantissa
struct EightBit {
  static constexpr std::int32_t kMost = (1 << kBits) - 1;
  static constexpr std::int32_t kBase = 0x3ff00000 - (kMost << 20);
  static constexpr float kFirst = kBits == 7 ? 0x1p-15f : 0x1p-31f;  // f(0), whose bits are kBase
  static constexpr float kTop = 1.875f - kFirst;
};
using FirstMoment = EightBit<7>;
using SecondMoment = EightBit<8>;

// `kept` masks what is quantized: all bits, or none where there is no scale, as those of a NaN differ between
// processors.
struct QuantScale {
  float scale, inverse;
  std::uint32_t kept;
};

// From the bits of the largest magnitude of a block, which gets the greatest code. Blocks that are not finite become
// NaN, and those whose largest magnitude is no normal number become zero.
template <class Kind>
SF_HD QuantScale quant_scale(std::uint32_t largest_bits) {
  const float largest = bits_float(largest_bits);
  if (largest_bits >= 0x7f800000u) return {bits_float(0x7fc00000u), 0.0f, 0u};
  if (largest_bits < 0x00800000u) return {0.0f, 0.0f, 0u};
  return {largest / Kind::kTop, (Kind::kTop - 0x1p-20f) / largest, ~0u};  // a little less: no code is too great
}

template <class Kind>
SF_HD std::int32_t quantize_magnitude(float magnitude, float inverse, std::uint32_t rounding) {
  const float scaled = std::fma(magnitude, inverse, Kind::kFirst);
  return static_cast<std::int32_t>(float_bits(scaled) + rounding - static_cast<std::uint32_t>(Kind::kBase)) >> 20;
}
template <class Kind>
SF_HD float dequantize_magnitude(std::int32_t code, float scale) {
  return (bits_float(static_cast<std::uint32_t>((code << 20) + Kind::kBase)) - Kind::kFirst) * scale;
}

// Rounded to the nearest code.
SF_HD std::int32_t quantize_first(float x, const QuantScale& s) {
  const std::uint32_t bits = float_bits(x) & s.kept;
  const std::int32_t code = quantize_magnitude<FirstMoment>(bits_float(bits & 0x7fffffffu), s.inverse, 0x80000u);
  return code | static_cast<std::int32_t>(bits >> 24 & 0x80u);
}
SF_HD float dequantize_first(std::int32_t code, float scale) {
  const float magnitude = dequantize_magnitude<FirstMoment>(code & 0x7f, scale);
  return bits_float(float_bits(magnitude) ^ (static_cast<std::uint32_t>(code & 0x80) << 24));
}

// x >= 0, rounded at random. What is not zero does not become zero, as it is divided by.
SF_HD std::int32_t quantize_second(float x, const QuantScale& s, std::uint32_t random) {
  const std::uint32_t bits = float_bits(x) & s.kept;
  const std::int32_t code = quantize_magnitude<SecondMoment>(bits_float(bits), s.inverse, random >> 12);
  const std::int32_t least = static_cast<std::int32_t>(bits) < 1 ? static_cast<std::int32_t>(bits) : 1;
  return code < least ? least : code;
}
SF_HD float dequantize_second(std::int32_t code, float scale) {
  return dequantize_magnitude<SecondMoment>(code, scale);
}

}  // namespace superfine
