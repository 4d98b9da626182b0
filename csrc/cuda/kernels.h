// What module.cpp calls: each launches the kernels of one call.
#pragma once
#include <cstddef>

#include "params.h"

namespace fastattn {

constexpr float kLog2e = 1.4426950408889634f;

// Where a call runs: the address of a cudaStream_t.
struct Stream {
  void* handle = nullptr;
};

// What a call may use of the device.
struct Device {
  size_t shared_bytes = 48 << 10;  // of a block
  int multiprocessors = 1;
  int capability = 80;              // 90: sm_90
  int64_t max_blocks = 2147483647;  // of a grid, along x
  Stream stream;
};

void layer_norm_forward(const LayerNormParams& params, const Device& device);
// partials: (partial_rows, 2, width) float32, for dweight and dbias; unused where neither is asked
// for.
void layer_norm_backward(const LayerNormParams& params, const LayerNormGrads& grads,
                         float* partials, int64_t partial_rows, const Device& device);

// How the forward splits the keys: into parts, of which each leaves (batch, q_heads, q_len, parts)
// maxima and sums, and v_dim numbers with each, in `workspace`, float32; one part needs none.
struct ForwardPlan {
  int parts = 1;
  int64_t workspace_floats = 0;
};
ForwardPlan attention_forward_plan(const AttentionParams& params, const Device& device);
void attention_forward(const AttentionParams& params, const ForwardPlan& plan, float* workspace,
                       const Device& device);

// workspace: (4, batch, q_heads, q_len) float32. grads.dbias is float32, and 0 is its stride where
// the bias is shared.
void attention_backward(const AttentionParams& params, const AttentionGrads& grads,
                        float* workspace, const Device& device);

// What a block of the attention kernels needs of shared memory, for head dims up to this one; 0:
// none serves it.
size_t attention_shared_bytes(int64_t head_dim);

void softmax_forward(const SoftmaxParams& params, const Device& device);
void softmax_backward(const SoftmaxGrads& grads, const Device& device);

}  // namespace fastattn
