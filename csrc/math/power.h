// base^exponent for the bias corrections, with the same bits on every processor: the libraries' pow differ by an ulp.
#pragma once

#include <cmath>

#include "core/macros.h"

namespace superfine {

// For 0 <= base < 1 and a whole exponent of 0 to 2^53, by repeated squaring in pairs of doubles, whose sum has 106 bits
// (Dekker 1971, "A floating-point technique for extending the available precision"): after 24 squarings still some 80
// bits are right, so the result is the correctly rounded one but in rare cases. Other exponents are left to pow.
SF_HD double power(double base, double exponent) {
  if (!(exponent >= 0 && exponent <= 9007199254740992.0) || exponent != std::floor(exponent)) {
    return std::pow(base, exponent);
  }
  struct Pair {
    double high, low;
    SF_HD Pair times(const Pair& other) const {
      const double product = high * other.high;
      const double rest = std::fma(high, other.high, -product) + (high * other.low + low * other.high);
      const double sum = product + rest;
      return {sum, rest - (sum - product)};
    }
  };
  Pair result{1.0, 0.0}, square{base, 0.0};
  for (auto bits = static_cast<unsigned long long>(exponent); bits != 0; bits >>= 1) {
    if ((bits & 1) != 0) result = result.times(square);
    square = square.times(square);
  }
  return result.high;
}

}  // namespace superfine
