// CUDA error -> exception that names the op.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace superfine {

inline void cuda_check(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report this error again
  throw std::runtime_error(std::string(op) + ": CUDA error " + std::to_string(status) + ": " +
                           cudaGetErrorString(status));
}

}  // namespace superfine
