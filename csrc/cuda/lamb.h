#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "cuda/step.h"
#include "math/lamb.h"

namespace superfine::cuda {

// Bytes of device memory that a step works in.
std::size_t lamb_workspace_bytes(const Step& step);

// Steps all tensors on the current device: a small launch for up to 512 of them, which counts, then two for every batch
// of tensors that fits the L2 cache, with batches of their own for double and for 8-bit moments. The trust ratios never
// leave the device, and nothing is copied or synchronised; the launches can be captured in a graph, and count again
// when it is replayed. `workspace` is aligned to 16 bytes, needs no initial value, and may be freed in stream order.
// Throws std::runtime_error when a launch fails.
void lamb(const Step& step, void* workspace, cudaStream_t stream);

}  // namespace superfine::cuda
