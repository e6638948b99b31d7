// Random bits from a counter, so that rounding at random gives the same bits on every device, for every number of
// threads and after a checkpoint: they follow from the seed, the step, the element's place and its value alone.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace superfine {

// A bijection of 32 bits in which every bit of the input flips every bit of the output with a probability close to a
// half ("lowbias32": C. Wellons 2018, "Prospecting for Hash Functions").
SF_HD std::uint32_t mix_bits(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  x ^= x >> 15;
  x *= 0xd35a2d97u;
  x ^= x >> 15;
  return x;
}

// Of one step; `step` counts from 1.
SF_HD std::uint32_t random_key(std::uint32_t seed, float step) {
  return mix_bits(mix_bits(seed) + static_cast<std::uint32_t>(step));
}

// For the i-th element of a tensor; the upper bits are the better ones. Its value makes tensors differ that are alike
// in all else: low bits of a result are as good as random, and a value that is exact in the narrower type is never
// changed. One multiplication is enough to round moments by, and a step in 8 bits is bound by arithmetic; errors of
// parameters stay, so they are rounded by `mix_bits` of it.
SF_HD std::uint32_t random_bits(std::uint32_t key, std::int32_t i, float x) {
  std::uint32_t bits = (key + static_cast<std::uint32_t>(i)) ^ float_bits(x);
  bits ^= bits >> 16;
  return bits * 0x21f0aaadu;
}

// The key for a stretch that begins at the element `begin`, whose own elements then count from 0.
SF_HD std::uint32_t random_key_at(std::uint32_t key, std::int64_t begin) {
  return key + static_cast<std::uint32_t>(begin);
}

// Rounds to one of both neighbours, to each with the probability that makes the expectation x.
SF_HD void store_stochastic(bf16* out, float x, std::uint32_t random) {
  const std::uint32_t rounded = (float_bits(x) + (mix_bits(random) >> 16)) >> 16;
  out->bits = static_cast<std::uint16_t>(x != x ? 0x7fc0u : rounded);
}

}  // namespace superfine
