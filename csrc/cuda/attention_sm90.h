// What the choice of kernels has to know of those of sm_90a.
#pragma once
#include "attention_forward.h"
#include "tensor_map.h"

namespace fastattn {

constexpr bool has_sm90_kernel(int head_dim) {
  return head_dim == 64 || head_dim == 128 || head_dim == 256;
}

// Launches it for one head dim; attention_forward_sm90.cu is compiled once for each.
template <int kHeadDim>
void attention_forward_sm90_of(const AttentionParams& p, const ForwardCall& call,
                               const Device& device);

}  // namespace fastattn
