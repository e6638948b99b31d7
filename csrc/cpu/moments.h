// Access to a MomentTensor's elements by type, for the optimizers' kernels.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "math/moments.h"

namespace superfine {
namespace {  // compiled once per instruction set: see cpu/isa.h

// Asks for the first lines of the page after the one that `x` lies on. The processor's own prefetcher stops at the end
// of a page, where every stream would wait for memory in turn, 0.3 us each: a third of a bf16 step.
inline void prefetch_next_page(const void* x) {
  constexpr std::uintptr_t kPage = 4096, kLine = 64, kLines = 4;
  const char* const page = reinterpret_cast<const char*>((reinterpret_cast<std::uintptr_t>(x) / kPage + 1) * kPage);
  for (std::uintptr_t line = 0; line < kLines; ++line) __builtin_prefetch(page + line * kLine);
}

// Elements between two calls of it: a page of the widest type that should be fast.
constexpr std::int64_t kPageElements = 1024;

// Asks for the lines of `count` elements. Between them a step in 8 bits computes for so long that the processor's own
// prefetcher falls behind: it takes a sixth less with this.
template <class E>
void prefetch_elements(const E* x, std::int64_t count) {
  constexpr std::int64_t kLine = 64 / sizeof(E);
  for (std::int64_t i = 0; i < count; i += kLine) __builtin_prefetch(x + i);
}

// A parameter as it is stored: `Math get(i)`, `set(i, Math)`.
template <class E>
struct Whole {
  using Element = E;
  using Math = Opmath<E>;

  explicit Whole(const MomentTensor& t) : p(static_cast<E*>(t.param)) {}
  Math get(std::int64_t i) const { return load(p[i]); }
  void set(std::int64_t i, Math x) const { store(&p[i], x); }
  void prefetch_next_page(std::int64_t i) const { superfine::prefetch_next_page(p + i); }
  void prefetch(std::int64_t i, std::int64_t count) const { prefetch_elements(p + i, count); }
  Whole from(std::int64_t i) const { return Whole(p + i); }

  E* p;

 private:
  explicit Whole(E* first) : p(first) {}
};

struct Split {
  using Element = bf16;
  using Math = float;

  explicit Split(const MomentTensor& t)
      : high(static_cast<bf16*>(t.param)), low(static_cast<std::uint16_t*>(t.remainder)) {}
  float get(std::int64_t i) const { return join(high[i], low[i]); }
  void set(std::int64_t i, float x) const { split(x, &high[i], &low[i]); }
  void prefetch_next_page(std::int64_t i) const {
    superfine::prefetch_next_page(high + i);
    superfine::prefetch_next_page(low + i);
  }
  void prefetch(std::int64_t i, std::int64_t count) const {
    prefetch_elements(high + i, count);
    prefetch_elements(low + i, count);
  }
  Split from(std::int64_t i) const { return Split(high + i, low + i); }

  bf16* high;
  std::uint16_t* low;

 private:
  Split(bf16* first, std::uint16_t* first_low) : high(first), low(first_low) {}
};

// Calls f(parameter, S{}), S being the moments' type, for the combinations that bind/moment_lists.h lets through and
// that are not staged (cpu/staging.h).
template <class F>
inline auto with_types(const MomentTensor& t, const F& f) {
  const bool wide_state = t.state_dtype == DType::f32;
  switch (t.param_dtype) {
    case DType::bf16:
      if (t.master == Master::split) return wide_state ? f(Split(t), float{}) : f(Split(t), bf16{});
      return wide_state ? f(Whole<bf16>(t), float{}) : f(Whole<bf16>(t), bf16{});
    case DType::f16: return wide_state ? f(Whole<f16>(t), float{}) : f(Whole<f16>(t), f16{});
    case DType::f64: return f(Whole<double>(t), double{});
    default: return wide_state ? f(Whole<float>(t), float{}) : f(Whole<float>(t), bf16{});
  }
}

template <class E>
inline void zero(E* x, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) x[i] = E{};
}

}  // namespace
}  // namespace superfine
