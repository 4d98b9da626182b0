// The backward kernels of one head dim; compiled once for each of head_dims.h.
#include "attention_backward.h"

namespace fastattn {
namespace {

constexpr int kHeadDim = FASTATTN_HEAD_DIM;
using Shape = BackwardShape<kHeadDim>;

int64_t tiles_of(int64_t n, int64_t step) { return (n + step - 1) / step; }

template <typename T, bool kModified>
void walk(BackwardCall c, const Device& device) {
  const Problem& p = c.p;
  if (c.dq) {
    c.tiles = int(tiles_of(p.q_len, Shape::kM));
    c.walked = p.batch * p.heads;
    launch("attention_backward, dq", attention_dq_kernel<T, kHeadDim, kModified>,
           Grid{int64_t(c.tiles) * c.walked}, kAttentionThreads, Shape::kBytes, device.stream, c);
  }
  if (c.dk || c.dv) {
    c.tiles = int(tiles_of(p.k_len, Shape::kM));
    c.walked = p.batch * p.kv_heads;
    const int widest = p.head_dim > p.v_dim ? p.head_dim : p.v_dim;
    launch("attention_backward, dk and dv", attention_dkdv_kernel<T, kHeadDim, kModified>,
           Grid{int64_t(c.tiles) * c.walked, tiles_of(widest, Shape::kColumns)}, kAttentionThreads,
           Shape::kBytes, device.stream, c);
  }
}

template <typename T>
void run_rows(BackwardCall c, const Device& device) {
  c.tiles = int(tiles_of(c.p.q_len, Shape::kM));
  launch("attention_backward, rows", attention_rows_kernel<T, kHeadDim>,
         Grid{int64_t(c.tiles) * c.p.batch * c.p.heads}, kAttentionThreads, Shape::kRowBytes,
         device.stream, c);
}

template <typename T>
void run(BackwardCall c, const Device& device) {
  const Problem& p = c.p;
  if (p.modified)
    walk<T, true>(c, device);
  else
    walk<T, false>(c, device);
  if (!c.dbias) return;
  const int64_t own_q = c.shares_queries ? 1 : tiles_of(p.q_len, Shape::kM);
  const int64_t own_k = c.shares_keys ? 1 : tiles_of(p.k_len, Shape::kN);
  launch("attention_backward, dbias", attention_dbias_kernel<T, kHeadDim>,
         Grid{own_q * own_k * c.own_batches * c.own_heads}, kAttentionThreads, Shape::kBiasBytes,
         device.stream, c);
}

}  // namespace

template <>
void attention_rows_of<FASTATTN_HEAD_DIM>(DType dtype, BackwardCall c, const Device& device) {
  if (dtype == DType::kBFloat16)
    run_rows<bf16>(c, device);
  else
    run_rows<f16>(c, device);
}

template <>
void attention_backward_of<FASTATTN_HEAD_DIM>(DType dtype, BackwardCall c, const Device& device) {
  if (dtype == DType::kBFloat16)
    run<bf16>(c, device);
  else
    run<f16>(c, device);
}

}  // namespace fastattn
