// Blocks of 8-bit moments, whose elements share a scale. Loops over them count in 32 bits, as vectors of indices do.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"
#include "math/quantized.h"
#include "math/random.h"

namespace superfine::cpu::SF_ISA {
namespace {

// Calls f(i, count, scale) for the blocks of n elements from `begin`, the start of a block: of elements [i, i + count).
template <class F>
void for_each_block(float* scales, std::int64_t begin, std::int64_t n, const F& f) {
  for (std::int64_t i = 0; i < n; i += kQuantBlock) {
    f(i, static_cast<std::int32_t>(std::min(kQuantBlock, n - i)), scales + (begin + i) / kQuantBlock);
  }
}

// Codes as integers. Left alone, a compiler widens by way of 16 bits, which takes three times as many operations.
inline void widen(const std::uint8_t* codes, std::int32_t n, std::int32_t* integers) {
  std::int32_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
    _mm512_storeu_si512(integers + i, _mm512_cvtepu8_epi32(bytes));
  }
#elif defined(__AVX2__)
  for (; i + 8 <= n; i += 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(integers + i), _mm256_cvtepu8_epi32(bytes));
  }
#endif
  for (; i < n; ++i) integers[i] = codes[i];
}

inline std::uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7fffffffu; }

inline std::uint32_t largest_magnitude(const float* __restrict x, std::int32_t n) {
  std::uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (std::int32_t i = 0; i < n; ++i) {
    const std::uint32_t magnitude = magnitude_bits(x[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// Writes the codes of a block from quantize(x, i, scale), and returns its scale.
template <class Kind, class Quantize>
float quantize_block(const float* __restrict x, std::int32_t n, std::uint32_t largest, std::uint8_t* __restrict codes,
                     const Quantize& quantize) {
  QuantScale scale = quant_scale<Kind>(largest);
  if (scale.kept == 0) {
    std::memset(codes, 0, static_cast<std::size_t>(n));
  } else {
    scale.kept = ~0u;  // as the compiler is to know
    alignas(64) std::int32_t integers[kQuantBlock];
#pragma omp simd
    for (std::int32_t i = 0; i < n; ++i) integers[i] = quantize(x[i], i, scale);
    for (std::int32_t i = 0; i < n; ++i) codes[i] = static_cast<std::uint8_t>(integers[i]);
  }
  return scale.scale;
}

inline float quantize_first_moments(const float* x, std::int32_t n, std::uint32_t largest, std::uint8_t* codes) {
  return quantize_block<FirstMoment>(x, n, largest, codes,
                                     [](float xi, std::int32_t, const QuantScale& s) { return quantize_first(xi, s); });
}
inline float quantize_second_moments(const float* x, std::int32_t n, std::uint32_t largest, std::uint8_t* codes,
                                     std::uint32_t key) {
  return quantize_block<SecondMoment>(x, n, largest, codes, [key](float xi, std::int32_t i, const QuantScale& s) {
    return quantize_second(xi, s, random_bits(key, i, xi));
  });
}

}  // namespace
}  // namespace superfine::cpu::SF_ISA
