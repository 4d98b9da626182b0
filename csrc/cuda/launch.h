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
  emulator::launch({name, {grid.x, grid.y, grid.z}, threads, shared_bytes, body, &call});
}

#else

template <typename Params>
void launch(const char* name, void (*kernel)(Params), Grid grid, int threads, size_t shared_bytes,
            Stream stream, const std::remove_const_t<Params>& params) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > (48u << 10))  // what every device grants unasked
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared_bytes)),
          name);
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&params))};
  const dim3 blocks(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z));
  check(cudaLaunchKernel(function, blocks, dim3(unsigned(threads)), arguments, shared_bytes,
                         static_cast<cudaStream_t>(stream.handle)),
        name);
}

#endif

}  // namespace fastattn
