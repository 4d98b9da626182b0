// Plain structs that describe one kernel call. Compiled by g++ and by nvcc; no torch, no Python.
#pragma once
#include <cstdint>

#include "mask.h"

namespace fastattn {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kBool = 4 };

FASTATTN_HD int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64   ? 8
         : dtype == DType::kFloat32 ? 4
         : dtype == DType::kBool    ? 1
                                    : 2;
}
// Of float or double.
template <typename A>
constexpr DType dtype_of() {
  return sizeof(A) == 8 ? DType::kFloat64 : DType::kFloat32;
}

// A strided view of a tensor of at most four dimensions; strides count elements.
struct View {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};

  FASTATTN_HD explicit operator bool() const { return data != nullptr; }
  template <typename T>
  FASTATTN_HD T* at(int64_t a, int64_t b, int64_t c) const {
    return static_cast<T*>(data) + a * stride[0] + b * stride[1] + c * stride[2];
  }
};

// The shapes of q (batch, q_heads, q_len, head_dim), k (batch, kv_heads, k_len, head_dim)
// and v (batch, kv_heads, k_len, v_dim).
struct AttentionShape {
  int64_t batch, q_heads, kv_heads, q_len, k_len, head_dim, v_dim;
  FASTATTN_HD int64_t group() const { return q_heads / kv_heads; }
};

struct Dropout {
  double p = 0.0;  // 0: off
  uint64_t seed = 0;
  const uint64_t* seed_at = nullptr;  // on a device: where the seed is, when the kernel runs

  FASTATTN_HD uint64_t seed_now() const { return seed_at ? *seed_at : seed; }
};

struct AttentionParams {
  DType dtype;
  AttentionShape shape;
  View q, k, v;
  View out;  // forward: written; backward: read
  // (batch, q_heads, q_len), contiguous, statistics dtype: as out. lse_low is what rounding took
  // off lse, so that their sum is twice as exact; null where nobody asks for it.
  void *lse, *lse_low;
  View bias;  // no data: no bias; stride 0 on broadcast dimensions
  DType bias_dtype;
  View alibi_slopes;      // (batch, q_heads), statistics dtype
  const void* sinks;      // (q_heads,), statistics dtype, or null
  double scale, softcap;  // softcap 0: off
  Mask mask;
  Dropout dropout;
  int threads;
};

struct AttentionGrads {
  View dout;
  const void* dlse;  // (batch, q_heads, q_len), contiguous, or null
  void* delta;       // (batch, q_heads, q_len), contiguous: written, rowsum(dout * out)
  View dq, dk, dv;   // no data: not asked for
  View dbias;        // statistics dtype; stride 0 and size 1 where the bias broadcasts
};

// Rows numbered along three outer dimensions; a View's first three strides walk them.
struct RowShape {
  int64_t n0, n1, n2;
  FASTATTN_HD int64_t count() const { return n0 * n1 * n2; }
  FASTATTN_HD int64_t offset(int64_t row, const View& v) const {
    if (row < n2) return row * v.stride[2];  // the usual case, n0 = n1 = 1, without a division
    const int64_t c = row % n2, ab = row / n2;
    return ab / n1 * v.stride[0] + ab % n1 * v.stride[1] + c * v.stride[2];
  }
};

// y = normalise(h) * weight + bias, with h = residual + dropout(x), or x. The numbers of a row are
// contiguous in every tensor; tensors that are plain addresses are contiguous altogether.
struct LayerNormParams {
  DType dtype;
  RowShape rows;
  int64_t width;
  View x, residual;           // the backward has h, what was normalised, as x
  const void *weight, *bias;  // (width,), or null
  DType weight_dtype, bias_dtype;
  void *y, *new_residual;  // forward
  void *mean, *rstd;       // (rows,), statistics dtype; the forward writes those it is given
  double eps;
  bool rms;
  Dropout dropout;
  int threads;
};

struct LayerNormGrads {
  View dy, dnew_residual;  // the gradient that reached new_residual, or no data
  void *dx, *dresidual;    // null: not asked for
  void *dweight, *dbias;   // (width,), dtypes of weight and bias; null: not asked for
};

// softmax(scale * x + mask) over the `width` numbers of each of rows x inner columns. A View's
// stride[3] walks the width; inner columns are adjacent, in the mask adjacent or (mask_inner 0)
// one.
struct SoftmaxParams {
  DType x_dtype, y_dtype, mask_dtype;
  RowShape rows;
  int64_t width, inner;
  View x, mask;  // bool mask: true keeps; else added
  int64_t mask_inner;
  void* y;  // contiguous (rows, width, inner)
  double scale;
  bool log;
  int threads;
};

struct SoftmaxGrads {
  DType y_dtype, x_dtype;
  RowShape rows;
  int64_t width, inner;
  View y, dy;
  void* dx;  // contiguous (rows, width, inner)
  double scale;
  bool log;
  int threads;
};

}  // namespace fastattn
