#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"
#include "math/cross_entropy.h"

namespace superfine::cuda {

// All functions launch on the current device and return at once; std::runtime_error when a launch
// fails, std::invalid_argument for a vocab out of range. dlogits is dense, or the input itself.

// Writes losses and lse (rows Reals each; 0 for ignored rows). Unless dlogits is null also
// dlogits[i] = scale[i * scale_stride] * dloss_i/dinput_i, in the same pass.
void cross_entropy_forward(const CrossEntropy& args, void* losses, void* lse, void* dlogits, const void* scale,
                           std::int64_t scale_stride, cudaStream_t stream);

// dlogits as above, from the lse of the forward pass: one read and one write of the logits.
void cross_entropy_backward(const CrossEntropy& args, const void* lse, const void* scale, std::int64_t scale_stride,
                            void* dlogits, cudaStream_t stream);

// out[0] = sum of w_t over the rows that are not ignored, out[1] = 1 / out[0]: the mean's denominator
// and the scale of its gradient, without a word to the host. Reads target, weight and sizes only.
void cross_entropy_denominator(const CrossEntropy& args, void* out, cudaStream_t stream);

// out[0] = sum of the losses, over denominator[0] unless that is null; NaN when no row counts.
void cross_entropy_reduce(const void* losses, std::int64_t rows, DType dtype, const void* denominator, void* out,
                          cudaStream_t stream);

}  // namespace superfine::cuda
