// Powers whose bits are the same on every machine: those of `std::pow` are the C library's, and a GPU has another one.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace superfine {

// x^n for x in [0, 1] and a whole n >= 0 (a fraction of n does not count, nor what it exceeds 2^31 by), by repeated
// squaring in pairs of doubles (Dekker 1971, "A floating-point technique for extending the available precision"). A
// pair errs by less than 2^-100 in a product, which squaring doubles: for n up to 2^24, where counts in float32 end,
// less than 2^-75 remains, and only about one result in 2^20 is not the correctly rounded one.
SF_HD double power(double x, double n) {
  double high = 1, low = 0, square_high = x, square_low = 0;
  const auto multiply = [](double& a_high, double& a_low, double b_high, double b_low) {
    const double product = a_high * b_high;
    double rest = std::fma(a_high, b_high, -product);
    rest = std::fma(a_high, b_low, std::fma(a_low, b_high, rest));
    a_high = product + rest;
    a_low = rest - (a_high - product);
  };
  std::uint32_t i = n >= 1 ? static_cast<std::uint32_t>(n < 0x1p31 ? n : 0x1p31) : 0;
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
  while (i != 0) {
    if (i % 2 != 0) multiply(high, low, square_high, square_low);
    i /= 2;
    multiply(square_high, square_low, square_high, square_low);
  }
  return high;
}

}  // namespace superfine
