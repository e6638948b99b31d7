#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "math/adamw.h"

namespace superfine::cuda {

// Steps all tensors on the current device: one launch for every pair of types, and one for all 8-bit moments
// (another when its tensors outgrow a table). The tensors' addresses travel as a
// kernel argument, so nothing is copied or synchronised and the launches can be captured in a graph.
// Throws std::runtime_error when a launch fails.
void adamw(const AdamWTensor* tensors, std::int64_t count, cudaStream_t stream);

}  // namespace superfine::cuda
