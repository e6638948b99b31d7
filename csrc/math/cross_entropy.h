// Cross-entropy of logits x against class t, row by row, with class weights w and smoothing s:
//
//   lse    = log sum_c exp(x_c)
//   loss   = (1 - s) w_t (lse - x_t) + s/C sum_c w_c (lse - x_c)
//   dx_c   = [(1 - s) w_t + s/C sum_c w_c] exp(x_c - lse) - (1 - s) w_t [c = t] - s/C w_c
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace superfine {

// What a kernel reads: logits, labels and settings, in memory of the device it runs on. "Real" is
// double for f64 logits and float for all others.
struct CrossEntropy {
  const void* input;  // rows x vocab, unit stride within a row; for CUDA vocab is at most 2^30
  std::int64_t rows, vocab, row_stride;
  DType dtype;         // of input and dlogits; losses and lse are Reals
  const void* target;  // class indices; one outside [0, vocab): refused before a CPU kernel, NaN from CUDA
  bool target_is_int64;
  std::int64_t target_stride;
  const void* weight;  // null, or one Real for each of `classes`
  std::int64_t ignore_index;
  double label_smoothing;
  // The input may be a part of a wider matrix: it holds the classes from `first_class` on, of `classes`. Labels count
  // in all of them. Only the CPU's cross_entropy_part and cross_entropy_backward take parts.
  std::int64_t first_class, classes;
};

}  // namespace superfine
