// Cross-entropy of logits x against what is wanted of C classes, q, row by row, with class weights w, smoothing s and
// z-loss z:
//
//   y_c  = softcap * tanh(scale * x_c / softcap);  scale * x_c without a softcap
//   lse  = log sum_c exp(y_c)
//   v_c  = w_c ((1 - s) q_c + s/C);  mass = sum_c v_c
//   loss = sum_c v_c (lse - y_c) + z lse^2
//   dx_c = [(mass + 2 z lse) exp(y_c - lse) - v_c] dy_c/dx_c
//
// q is 1 at a row's label and 0 elsewhere, or probabilities: of a few classes, by index, or of all.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace superfine {

// What a kernel reads: logits, targets and settings, in memory of the device it runs on. "Real" is
// double for f64 logits and float for all others.
struct CrossEntropy {
  const void* input;  // rows x vocab, unit stride within a row; for CUDA vocab is at most 2^30
  std::int64_t rows, vocab, row_stride;
  DType dtype;  // of input and dlogits
  // Classes by index, `targets` a row, unit stride within a row; null where the probabilities are of all classes. An
  // index outside [0, classes): refused before a CPU kernel, NaN from CUDA. One equal to ignore_index does not count;
  // where none does, the row has no loss and no gradient.
  const void* target;
  bool target_is_int64;
  std::int64_t target_stride, targets;
  const void* probabilities;  // Reals, rows x targets, or rows x classes; null: 1 for each index
  std::int64_t probabilities_stride;
  const void* weight;  // null, or one Real for each of `classes`
  std::int64_t ignore_index;
  double label_smoothing, z_loss;
  double softcap;  // 0: none
  double scale;    // of logits, above 0
  // The input may be a part of a wider matrix: it holds the classes from `first_class` on, of `classes`. Targets,
  // probabilities and weights are those of all of them.
  std::int64_t first_class, classes;
};

// Results are arrays of `rows` Reals, one behind the other, in the order of these enums; those behind the first count
// are written where statistics are asked for.

// Of whole rows. The gradient can be made again from the input, kLse and kMass.
enum RowResult { kLoss, kLse, kMass, kRowResults, kLogprob = kRowResults, kEntropy, kCorrect, kRowStatistics };

// Of a part of the classes: M the maximum of its y_c; sum exp(y_c - M), sum v_c, sum v_c (y_c - M); for statistics
// sum exp(y_c - M) (y_c - M), y of the label (0 where that is another part's) and the first class with y_c = M.
// (y_c - M is y_c where M is -inf.)
enum PartResult {
  kMaximum,
  kSum,
  kPartMass,
  kDot,
  kPartResults,
  kWeighted = kPartResults,
  kAtTarget,
  kBest,
  kPartStatistics
};

}  // namespace superfine
