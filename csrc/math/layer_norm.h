// Normalisation of rows: layer norm (Ba et al. 2016) and RMS norm (Zhang & Sennrich 2019). For a row x of n elements:
//
//   layer norm   n = (x - mean) rstd,  rstd = 1 / sqrt(mean((x - mean)^2) + eps)
//   RMS norm     n = x rstd,           rstd = 1 / sqrt(mean(x^2) + eps)
//   output       y = n w + b
//   gradient     dx = rstd (gw - mean(gw) - n mean(gw n)),  gw = dy w;  without mean(gw) in an RMS norm
//                dw = sum of dy n over the rows,  db = sum of dy
//
// A mean of 1e4 rounded to float32 is off by up to 5e-4, which beside a deviation of 1 is the third digit of n. So the
// rest, the mean of x - mean as computed, is taken off, too: x - mean is exact where the mean is that large.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace superfine {

// What a kernel reads and writes, dense, in memory of the device it runs on. "Real" is double for f64 inputs and float
// for all others. Addresses may be null for none.
struct LayerNorm {
  bool rms;
  std::int64_t rows, size;  // elements of a row
  double eps;
  double weight_offset;     // added to the weights, Gemma's 1
  bool cast_before_weight;  // n is rounded to the input's type before the weight
  const void* input;
  DType dtype;           // of input, residual and sum
  const void* residual;  // added to the input
  const void* weight;    // of one row
  DType weight_dtype;
  const void* bias;  // of one row; not in an RMS norm
  DType bias_dtype;
  void* sum;  // input + residual
  void* output;
  DType output_dtype;
  void* mean;  // Reals, one for each row; not in an RMS norm
  void* rstd;
};

// The arguments of its gradient; those it shares are as above.
struct LayerNormGradient {
  bool rms;
  std::int64_t rows, size;
  double weight_offset;
  const void* grad;  // of the output
  DType grad_dtype;
  const void* grad_sum;  // of the sum, in its type
  const void* input;     // or the sum; may be null where only dbias is wanted
  DType dtype;           // of input, grad_sum and dinput
  const void* weight;
  DType weight_dtype;
  const void* mean;
  const void* rstd;
  void* dinput;   // null, or where the gradient of input and residual goes
  void* dweight;  // null, or Reals of one row
  void* dbias;    // the same
};

// Of one row. `rest` is what the rounded mean leaves of the mean.
template <class T>
struct RowStatistics {
  T mean, rest, rstd;
};

template <class T>
SF_HD T reciprocal_root(T mean_square, double eps) {
  return T(1) / std::sqrt(mean_square + static_cast<T>(eps));
}

template <bool kRms, class T>
SF_HD T normalized(T x, const RowStatistics<T>& row) {
  return kRms ? x * row.rstd : ((x - row.mean) - row.rest) * row.rstd;
}

// `mean_gw` and `mean_gwn` are the means of gw and gw n over the row.
template <bool kRms, class T>
SF_HD T norm_gradient(T n, T gw, T rstd, T mean_gw, T mean_gwn) {
  const T centred = kRms ? gw : gw - mean_gw;
  return rstd * std::fma(-n, mean_gwn, centred);
}

}  // namespace superfine
