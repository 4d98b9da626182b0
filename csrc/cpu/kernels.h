// What a module offers: the border between the binding (module.cpp, compiled for any processor) and
// the kernels (one object file each per instruction set).
#pragma once
#include <cstddef>

#include "params.h"

namespace fastattn {

extern const char* const isa;  // the instruction set that the kernels were compiled for

// Flash attention (Dao et al., 2022): tiled, online softmax; scratch is allocated inside, a few
// tiles a thread.
void attention_forward(const AttentionParams& params);
// Writes the gradients that are asked for, and grads.delta.
void attention_backward(const AttentionParams& params, const AttentionGrads& grads);

// Layer norm (Ba et al., 2016), RMS norm (Zhang and Sennrich, 2019).
void layer_norm_forward(const LayerNormParams& params);
void layer_norm_backward(const LayerNormParams& params, const LayerNormGrads& grads);

void softmax_forward(const SoftmaxParams& params);
void softmax_backward(const SoftmaxGrads& grads);

// Operations a second of bare multiply-adds on operands of a dtype: what no kernel can exceed.
double multiply_add_rate(DType dtype, int threads);

// The same for float64 (float64.cpp).
void attention_forward_float64(const AttentionParams& params);
void attention_backward_float64(const AttentionParams& params, const AttentionGrads& grads);
void layer_norm_forward_float64(const LayerNormParams& params);
void layer_norm_backward_float64(const LayerNormParams& params, const LayerNormGrads& grads);
void softmax_forward_float64(const SoftmaxParams& params);
void softmax_backward_float64(const SoftmaxGrads& grads);
double multiply_add_rate_float64(int threads);

}  // namespace fastattn
