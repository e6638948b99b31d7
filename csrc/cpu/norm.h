#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/isa.h"

namespace superfine {

struct DenseTensor {
  const void* data;
  std::int64_t numel;
  DType dtype;
};

// Tensors are summed up in pieces of so many elements, each in one number.
constexpr std::int64_t kNormPiece = 65536;
inline std::int64_t norm_pieces(const DenseTensor& t) { return (t.numel + kNormPiece - 1) / kNormPiece; }

namespace cpu {

// The sum of each piece of each tensor, in one parallel region. The bits do not depend on `threads` or the ISA.
#define SF_DECLARE(isa)                                                                            \
  namespace isa {                                                                                  \
  void sums_of_squares(const DenseTensor* tensors, std::int64_t count, double* sums, int threads); \
  }
SF_FOR_EACH_ISA(SF_DECLARE)
#undef SF_DECLARE

}  // namespace cpu
}  // namespace superfine
