#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"
#include "math/cross_entropy.h"

namespace superfine::cuda {

// All functions launch on the current device and return at once; std::runtime_error when a launch fails,
// std::invalid_argument for a vocab out of range. dlogits is dense, or the input itself. Statistics are for rows of
// one label without probabilities.

// Writes RowResult of every row, which holds all classes; unless dlogits is null also, in the same pass,
// dlogits[i] = scale[i * scale_stride] * dloss_i/dinput_i.
void cross_entropy_forward(const CrossEntropy& args, void* out, bool statistics, void* dlogits, const void* scale,
                           std::int64_t scale_stride, cudaStream_t stream);

// dlogits as above, one read and one write of the logits. `sums` are kLse and kMass of the forward pass, 2 x rows
// Reals, those of all classes where the input holds a part of them.
void cross_entropy_backward(const CrossEntropy& args, const void* sums, const void* scale, std::int64_t scale_stride,
                            void* dlogits, cudaStream_t stream);

// Writes PartResult of every row. Ignored rows: maximum 0, sum 1, the rest 0. Rows with a bad label: NaN.
void cross_entropy_part(const CrossEntropy& args, void* out, bool statistics, cudaStream_t stream);

// out[0] = sum of w_t over the rows that are not ignored, or the number of them where targets have probabilities;
// out[1] = 1 / out[0]: the mean's denominator and the scale of its gradient, without a word to the host. Reads
// targets, weight and sizes only.
void cross_entropy_denominator(const CrossEntropy& args, void* out, cudaStream_t stream);

// out[0] = sum of the losses, over denominator[0] unless that is null; NaN when no row counts.
void cross_entropy_reduce(const void* losses, std::int64_t rows, DType dtype, const void* denominator, void* out,
                          cudaStream_t stream);

}  // namespace superfine::cuda
