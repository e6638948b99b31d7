// The sum of squares over many tensors: one read of everything.
//
// 32 lanes of the type of computation add up a block of 2048 elements, so that additions do not wait for each other;
// the lanes of a block, and the blocks of a piece in their order, are added in double.
#include "cpu/norm.h"

#include <cmath>

#include "core/parallel_for.h"

namespace superfine::cpu::SF_ISA {
namespace {

constexpr std::int64_t kBlock = 2048;
constexpr int kLanes = 32;

template <class E>
double sum_block(const E* __restrict x, std::int64_t n) {
  using T = Opmath<E>;
  T lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const T value = load(x[i + lane]);
      lanes[lane] = std::fma(value, value, lanes[lane]);
    }
  }
  for (int lane = 0; i < n; ++i, ++lane) {
    const T value = load(x[i]);
    lanes[lane] = std::fma(value, value, lanes[lane]);
  }
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

double sum_block(const DenseTensor& t, std::int64_t begin, std::int64_t n) {
  switch (t.dtype) {
    case DType::bf16: return sum_block(static_cast<const bf16*>(t.data) + begin, n);
    case DType::f16: return sum_block(static_cast<const f16*>(t.data) + begin, n);
    case DType::f64: return sum_block(static_cast<const double*>(t.data) + begin, n);
    default: break;
  }
  return sum_block(static_cast<const float*>(t.data) + begin, n);
}

}  // namespace

void sums_of_squares(const DenseTensor* tensors, std::int64_t count, double* sums, int threads) {
  std::int64_t pieces = 0;
  for (std::int64_t i = 0; i < count; ++i) pieces += norm_pieces(tensors[i]);
  constexpr std::int64_t kGrain = 4;
  parallel_for(pieces, kGrain, threads, [&](Ranges& ranges) {
    std::int64_t begin, end, i = 0, start = 0;  // the tensor of a piece
    while (ranges.next(begin, end)) {
      if (begin < start) i = start = 0;
      for (std::int64_t piece = begin; piece < end; ++piece) {
        for (; start + norm_pieces(tensors[i]) <= piece; ++i) start += norm_pieces(tensors[i]);
        const std::int64_t first = (piece - start) * kNormPiece;
        const std::int64_t last = first + kNormPiece < tensors[i].numel ? first + kNormPiece : tensors[i].numel;
        double sum = 0;
        for (std::int64_t at = first; at < last; at += kBlock) {
          sum += sum_block(tensors[i], at, last - at < kBlock ? last - at : kBlock);
        }
        sums[piece] = sum;
      }
    }
  });
}

}  // namespace superfine::cpu::SF_ISA
