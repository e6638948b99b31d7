// Element types: the storage types bf16 and f16 with branch-free conversions that every compiler
// vectorises, and the codes by which Python names a type (superfine_kernels/_library.py).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace superfine {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, i16 = 4, u8 = 5 };  // the last two hold bits

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

SF_HD std::uint32_t float_bits(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
SF_HD float bits_float(std::uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// All arithmetic on a storage type T happens in Opmath<T>: double for double, float otherwise.
template <class T>
struct OpmathOf {
  using type = float;
};
template <>
struct OpmathOf<double> {
  using type = double;
};
template <class T>
using Opmath = typename OpmathOf<T>::type;

SF_HD float load(float x) { return x; }
SF_HD double load(double x) { return x; }
SF_HD float load(bf16 x) { return bits_float(static_cast<std::uint32_t>(x.bits) << 16); }

SF_HD float load(f16 x) {
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t rebias = 112u << 23;
  const std::uint32_t normal = (magnitude << 13) + rebias + (magnitude >= 0x7c00u ? rebias : 0u);
  const std::uint32_t subnormal = float_bits(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
  return bits_float(sign | (magnitude < 0x400u ? subnormal : normal));
}

SF_HD void store(float* out, float x) { *out = x; }
SF_HD void store(double* out, double x) { *out = x; }

// Rounds to nearest even what is not NaN.
SF_HD void store_number(bf16* out, float x) {
  const std::uint32_t u = float_bits(x);
  out->bits = static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// Every NaN becomes the quiet NaN 0x7fc0, as torch does.
SF_HD void store(bf16* out, float x) {
  store_number(out, x);
  out->bits = x != x ? std::uint16_t{0x7fc0} : out->bits;
}

// An fp32 number in two halves: `high` is it rounded to bf16 (halves away from zero), `low` its lower 16 bits, so
// both together are the number. Every NaN becomes the quiet NaN 0x7fc00000, as rounding could turn others to zero.
// Zeros are not rounded up to: where `high` is one beside such a `low`, somebody has zeroed the parameter.
SF_HD float join(bf16 high, std::uint16_t low) {
  const std::uint32_t rounded_up = (high.bits & 0x7fffu) != 0 ? static_cast<std::uint32_t>(low >> 15) << 16 : 0u;
  return bits_float((static_cast<std::uint32_t>(high.bits) << 16 | low) - rounded_up);
}
SF_HD void split(float x, bf16* high, std::uint16_t* low) {
  const std::uint32_t u = x != x ? 0x7fc00000u : float_bits(x);
  high->bits = static_cast<std::uint16_t>((u + 0x8000u) >> 16);
  *low = static_cast<std::uint16_t>(u);
}

// Rounds, and keeps what that took away: two numbers of the narrow type whose sum is x to twice its precision
// (the compensation of Kahan 1965, "Further remarks on reducing truncation errors").
template <class E>
SF_HD void store_compensated(float x, E* high, E* low) {
  store(high, x);
  const float rest = x - load(*high);
  store(low, rest - rest == 0 ? rest : 0.0f);  // what is rounded to infinity leaves nothing
}

SF_HD void store(f16* out, float x) {
  const std::uint32_t u = float_bits(x);
  const std::uint32_t magnitude = u & 0x7fffffffu;
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5, whose unit in the last place is 2^-24, rounds to a multiple of half's smallest subnormal.
  const std::uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  std::uint32_t h = magnitude < 0x38800000u ? subnormal : normal;  // 2^-14
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;                      // 65520 rounds to infinity
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  out->bits = static_cast<std::uint16_t>(h | ((u >> 16) & 0x8000u));
}

SF_HD void store_number(f16* out, float x) { store(out, x); }
SF_HD void store_number(float* out, float x) { store(out, x); }
SF_HD void store_number(double* out, double x) { store(out, x); }

}  // namespace superfine
