// Plain structs that describe one kernel call. Compiled by g++ and by nvcc; no torch, no Python.
#pragma once
#include <cstdint>

#include "mask.h"

namespace fastattn {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kBool = 4 };

// A strided view of a tensor of at most four dimensions; strides count elements.
struct View {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};

  explicit operator bool() const { return data != nullptr; }
  template <typename T>
  T* at(int64_t a, int64_t b, int64_t c) const {
    return static_cast<T*>(data) + a * stride[0] + b * stride[1] + c * stride[2];
  }
};

// The shapes of q (batch, q_heads, q_len, head_dim), k (batch, kv_heads, k_len, head_dim)
// and v (batch, kv_heads, k_len, v_dim).
struct AttentionShape {
  int64_t batch, q_heads, kv_heads, q_len, k_len, head_dim, v_dim;
  int64_t group() const { return q_heads / kv_heads; }
};

struct Dropout {
  double p = 0.0;  // 0: off
  uint64_t seed = 0;
};

struct AttentionParams {
  DType dtype;
  AttentionShape shape;
  View q, k, v;
  View out;           // forward: written; backward: read
  void* lse;          // (batch, q_heads, q_len), contiguous, statistics dtype
  View bias;          // no data: no bias; stride 0 on broadcast dimensions
  DType bias_dtype;
  View alibi_slopes;  // (batch, q_heads), statistics dtype
  const void* sinks;  // (q_heads,), statistics dtype, or null
  double scale, softcap;  // softcap 0: off
  Mask mask;
  Dropout dropout;
  int threads;
};

struct AttentionGrads {
  View dout;
  const void* dlse;  // (batch, q_heads, q_len), contiguous, or null
  void* delta;       // (batch, q_heads, q_len), contiguous: written, rowsum(dout * out) - dlse
  View dq, dk, dv;   // no data: not asked for
  View dbias;        // statistics dtype; stride 0 and size 1 where the bias broadcasts
};

}  // namespace fastattn
