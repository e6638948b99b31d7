#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "math/lamb.h"

namespace superfine::cuda {

// Bytes of device memory that a step over these tensors works in.
std::size_t lamb_workspace_bytes(const MomentTensor* tensors, std::int64_t count);

// Steps all tensors on the current device: two launches for every batch of tensors that fits the L2 cache, with
// batches of their own for double and for 8-bit moments. The trust ratios never leave the device, and nothing
// is copied or synchronised, so the launches can be captured in a graph. `workspace` is aligned to 16
// bytes, needs no initial value, and may be freed in stream order.
// Throws std::runtime_error when a launch fails.
void lamb(const LambTensor* tensors, std::int64_t count, void* workspace, cudaStream_t stream);

}  // namespace superfine::cuda
