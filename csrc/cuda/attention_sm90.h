// What the choice of kernels has to know of those of sm_90a.
#pragma once
#include "attention_backward.h"
#include "attention_forward.h"
#include "tensor_map.h"

namespace fastattn {

constexpr bool has_sm90_forward(int head_dim) {
  return head_dim == 64 || head_dim == 128 || head_dim == 256;
}
constexpr bool has_sm90_backward(int head_dim) { return head_dim == 64 || head_dim == 128; }

// Launch them for one head dim; their .cu files are compiled once for each.
template <int kHeadDim>
void attention_forward_sm90_of(const AttentionParams& p, const ForwardCall& call,
                               const Device& device);
template <int kHeadDim>
void attention_backward_sm90_of(const AttentionParams& p, const BackwardCall& call,
                                const Device& device);

// A build for other architectures alone has nothing in such a kernel.
template <typename Kernel>
void check_is_built(const char* name, Kernel* kernel) {
#ifdef FASTATTN_EMULATE
  (void)name, (void)kernel;
#else
  static const int version = [&] {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), name);
    return attributes.binaryVersion;
  }();
  if (version != 90) throw std::runtime_error(std::string(name) + ": built without it");
#endif
}

}  // namespace fastattn
