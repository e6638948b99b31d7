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

// Copies `bytes`; what does not fill 16 aligned ones goes the usual way.
inline void stream_out(void* out, const void* staged, std::int64_t bytes) {
  char* const to = static_cast<char*>(out);
  const char* const from = static_cast<const char*>(staged);
  std::int64_t i = 0;
#if defined(__SSE2__)
  i = static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(out) % 16);
  i = i < bytes ? i : bytes;
  std::memcpy(to, from, static_cast<std::size_t>(i));
  for (; i + 16 <= bytes; i += 16) {
    const __m128i pack = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), pack);
  }
#endif
  std::memcpy(to + i, from + i, static_cast<std::size_t>(bytes - i));
}

}  // namespace
}  // namespace superfine
