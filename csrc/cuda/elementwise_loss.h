#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "math/elementwise_loss.h"

namespace superfine::cuda {

// Elements of a block, which writes one of `ElementwiseLoss::sums`; the last one may have fewer. Larger tensors take
// several calls.
constexpr std::int64_t kElementsPerSum = 8192;
constexpr std::int64_t kMostElements = std::int64_t{1} << 30;

// Launches on the current device and returns at once; std::runtime_error when a launch fails, std::invalid_argument for
// none or more than kMostElements, and for float64. With sums (as many as there are blocks) also out[0], a float, is
// their sum over the denominator, added in a fixed order.
void elementwise_loss(const ElementwiseLoss& args, void* out, cudaStream_t stream);

}  // namespace superfine::cuda
