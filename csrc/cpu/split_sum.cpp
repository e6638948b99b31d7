// A sum of bf16 tensors with the bits of one in fp32. Its numbers are held in two halves (core/dtype.h): the upper ones
// where the result will be, so that the sum needs two bytes an element beside it instead of four.
#include "cpu/split_sum.h"

#include "core/parallel_for.h"

namespace superfine::cpu::SF_ISA {
namespace {

constexpr std::int64_t kGrain = 16384;  // elements: a few us

template <class Element>
void for_each_element(std::int64_t count, int threads, const Element& element) {
  parallel_for(count, kGrain, threads, [&](Ranges& ranges) {
    std::int64_t begin, end;
    while (ranges.next(begin, end)) {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) element(i);
    }
  });
}

}  // namespace

void add_to_split(bf16* high, std::uint16_t* low, const bf16* x, std::int64_t count, int threads) {
  for_each_element(count, threads, [=](std::int64_t i) __attribute__((always_inline)) {
    split(join(high[i], low[i]) + load(x[i]), &high[i], &low[i]);
  });
}

void round_split(bf16* high, const std::uint16_t* low, std::int64_t count, int threads) {
  for_each_element(count, threads,
                   [=](std::int64_t i) __attribute__((always_inline)) { store(&high[i], join(high[i], low[i])); });
}

}  // namespace superfine::cpu::SF_ISA
