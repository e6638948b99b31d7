// Moments in 8 bits: a block of 256 elements shares a scale, the block's largest magnitude over 1.875, and an element
// is a number of 3 bits of mantissa times it. A first moment has a sign and 4 bits of exponent, so 5 decades below
// the largest; a second moment has 5 bits of exponent, as twice the decades count for its root.
//
// Code c > 0 stands for the float with bits kBase + (c << 20), so both directions are an addition and a shift; 0
// stands for zero. Second moments are rounded at random (math/random.h): at beta2 = 0.999 most of them change by less
// than half a code in a step, and rounded to the nearest one they would never change.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace superfine {

constexpr std::int64_t kQuantBlock = 256;

SF_HD std::int64_t quant_blocks(std::int64_t numel) { return (numel + kQuantBlock - 1) / kQuantBlock; }

constexpr std::uint32_t kRoundToNearest = 0x80000u;  // half a code
// As many of the lower bits below a code as there are.
SF_HD std::uint32_t round_at_random(std::uint32_t random) { return random >> 12; }

// What a block's largest magnitude, given by its bits, makes of it: blocks that are not finite become NaN, and those
// whose largest magnitude is no normal number become zero.
struct QuantScale {
  float scale, inverse;
};
SF_HD QuantScale quant_scale(std::uint32_t largest_bits) {
  const float largest = bits_float(largest_bits);
  if (largest_bits >= 0x7f800000u) return {bits_float(0x7fc00000u), 0.0f};
  if (largest_bits < 0x00800000u) return {0.0f, 0.0f};
  return {largest / 1.875f, 1.875f / largest};
}

template <int kBits>  // of the magnitude
constexpr std::int32_t kQuantBase = 0x3ff00000 - (((1 << kBits) - 1) << 20);

template <int kBits>
SF_HD std::int32_t quantize_magnitude(std::uint32_t magnitude_bits, float inverse, std::uint32_t rounding) {
  constexpr std::int32_t kMost = (1 << kBits) - 1;
  // Without a scale all codes are zero: the bits of infinity * 0 differ between processors.
  const std::uint32_t bits = inverse > 0 ? float_bits(bits_float(magnitude_bits) * inverse) : 0u;
  const std::int32_t code = (static_cast<std::int32_t>(bits + rounding) - kQuantBase<kBits>) >> 20;
  return code < 0 ? 0 : code > kMost ? kMost : code;
}
template <int kBits>
SF_HD float dequantize_magnitude(std::int32_t code, float scale) {
  const std::uint32_t bits = static_cast<std::uint32_t>((code << 20) + kQuantBase<kBits>);
  return bits_float(code == 0 ? 0u : bits) * scale;
}

// A first moment: sign and 7 bits.
SF_HD std::uint8_t quantize_first(float x, float inverse) {
  const std::uint32_t bits = float_bits(x);
  const std::int32_t code = quantize_magnitude<7>(bits & 0x7fffffffu, inverse, kRoundToNearest);
  return static_cast<std::uint8_t>(code | (bits >> 24 & 0x80u));
}
SF_HD float dequantize_first(std::uint8_t code, float scale) {
  const float magnitude = dequantize_magnitude<7>(code & 0x7f, scale);
  return bits_float(float_bits(magnitude) ^ (static_cast<std::uint32_t>(code & 0x80) << 24));
}

// A second moment: 8 bits. What is not zero does not become zero, as it is divided by.
SF_HD std::uint8_t quantize_second(float x, float inverse, std::uint32_t random) {
  const std::int32_t code = quantize_magnitude<8>(float_bits(x) & 0x7fffffffu, inverse, round_at_random(random));
  return static_cast<std::uint8_t>(code == 0 && x > 0 ? 1 : code);
}
SF_HD float dequantize_second(std::uint8_t code, float scale) { return dequantize_magnitude<8>(code, scale); }

}  // namespace superfine
