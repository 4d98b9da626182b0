// The one way to start a kernel.
#pragma once

#include "kernels.h"
#include "ptx.h"

#ifndef FASTATTN_EMULATE
#include "status.h"
#endif

namespace fastattn {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
  int cluster = 1;  // blocks of one, along x
};

#ifdef FASTATTN_EMULATE

template <typename Params>
void launch(const char* name, void (*kernel)(Params), Grid grid, int threads, size_t shared_bytes,
            Stream, const std::remove_const_t<Params>& params) {
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  } const call{kernel, &params};
  const auto body = [](const void* p) {
    const auto& c = *static_cast<const Call*>(p);
    c.kernel(*c.params);
  };
  emulator::launch(
      {name, {grid.x, grid.y, grid.z}, grid.cluster, threads, shared_bytes, body, &call});
}

template <typename Params>
bool holds_clusters(const char*, void (*)(Params), const Device& device, int, int, size_t) {
  return device.capability >= 90;
}

#else

inline void allow_shared_bytes(const char* name, const void* function, size_t bytes) {
  if (bytes > (48u << 10))  // what every device grants unasked
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
          name);
}

struct LaunchConfig {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};

  LaunchConfig(Grid grid, int threads, size_t shared_bytes) {
    config.gridDim = dim3(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared_bytes;
    if (grid.cluster == 1) return;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(grid.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

template <typename Params>
void launch(const char* name, void (*kernel)(Params), Grid grid, int threads, size_t shared_bytes,
            Stream stream, const std::remove_const_t<Params>& params) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  allow_shared_bytes(name, function, shared_bytes);
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&params))};
  LaunchConfig call(grid, threads, shared_bytes);
  call.config.stream = static_cast<cudaStream_t>(stream.handle);
  check(cudaLaunchKernelExC(&call.config, function, arguments), name);
}

// Whether the device can run clusters of `blocks` blocks of this kernel, and the code that it would
// run was compiled for an architecture that has them.
template <typename Params>
bool holds_clusters(const char* name, void (*kernel)(Params), const Device& device, int blocks,
                    int threads, size_t shared_bytes) {
  if (device.capability < 90) return false;
  const auto* function = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, function), name);
  if (attributes.ptxVersion < 90) return false;
  allow_shared_bytes(name, function, shared_bytes);
  const LaunchConfig call(Grid{blocks, 1, 1, blocks}, threads, shared_bytes);
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, function, &call.config), name);
  return clusters > 0;
}

#endif

}  // namespace fastattn
