// Stores that pass the caches by, for results that would push out what is still to be read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace superfine {
namespace {  // compiled once per instruction set: see cpu/isa.h

// Results larger than this pass the caches by.
constexpr std::int64_t kStreamBytes = std::int64_t{4} << 20;

// Writes bytes one after the other to `out`, in whole lines: parts of one would take as long as several.
class LineStream {
 public:
  explicit LineStream(void* out)
      : to_(static_cast<char*>(out)), head_(-reinterpret_cast<std::uintptr_t>(out) % kLine) {}
  ~LineStream() { std::memcpy(to_, line_, kept_); }
  LineStream(const LineStream&) = delete;
  LineStream& operator=(const LineStream&) = delete;

#ifdef __GNUC__  // one copy of it
  __attribute__((noinline))
#endif
  void write(const void* values, std::size_t bytes) {
    const auto* from = static_cast<const char*>(values);
    if (head_ > 0) {  // the line before the first whole one
      const std::size_t count = least(head_, bytes);
      std::memcpy(to_, from, count);
      to_ += count, from += count, bytes -= count, head_ -= count;
    }
    if (kept_ > 0) {
      const std::size_t count = least(kLine - kept_, bytes);
      std::memcpy(line_ + kept_, from, count);
      from += count, bytes -= count, kept_ += count;
      if (kept_ < kLine) return;
      write_line(line_);
      kept_ = 0;
    }
    for (; bytes >= kLine; from += kLine, bytes -= kLine) write_line(from);
    std::memcpy(line_, from, bytes);
    kept_ = bytes;
  }

 private:
  static constexpr std::size_t kLine = 64;

  static std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }

  void write_line(const char* from) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to_), _mm512_loadu_si512(from));
#elif defined(__SSE2__)
    for (std::size_t i = 0; i < kLine; i += sizeof(__m128i)) {
      const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to_ + i), part);
    }
#else
    std::memcpy(to_, from, kLine);
#endif
    to_ += kLine;
  }

  char* to_;
  std::size_t head_, kept_ = 0;
  alignas(kLine) char line_[kLine];
};

}  // namespace
}  // namespace superfine
