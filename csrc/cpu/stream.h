// Stores that pass the caches by, for results that would push out what is still to be read.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace superfine {
namespace {  // compiled once per instruction set: see cpu/isa.h

// Results larger than this pass the caches by.
constexpr std::int64_t kStreamBytes = std::int64_t{4} << 20;

// Copies `count` elements; what does not fill 16 aligned bytes goes the usual way.
template <class E>
inline void stream_out(E* out, const E* staged, std::int64_t count) {
#if defined(__SSE2__)
  constexpr std::int64_t kPack = 16 / sizeof(E);
  const auto misaligned = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out) % 16 / sizeof(E));
  std::int64_t i = misaligned == 0 ? 0 : kPack - misaligned < count ? kPack - misaligned : count;
  std::memcpy(out, staged, static_cast<std::size_t>(i) * sizeof(E));
  for (; i + kPack <= count; i += kPack) {
    const __m128i pack = _mm_loadu_si128(reinterpret_cast<const __m128i*>(staged + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), pack);
  }
  std::memcpy(out + i, staged + i, static_cast<std::size_t>(count - i) * sizeof(E));
#else
  std::memcpy(out, staged, static_cast<std::size_t>(count) * sizeof(E));
#endif
}

}  // namespace
}  // namespace superfine
