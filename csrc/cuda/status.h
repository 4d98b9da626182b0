// An error of the CUDA runtime as an exception.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace fastattn {

inline void check(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the next call starts without it
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
}

}  // namespace fastattn
