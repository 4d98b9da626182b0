// The sm_90a backward kernels of one head dim; compiled for each of head_dims.h, though there are
// kernels of some only.
#include "attention_backward_sm90.h"

namespace fastattn {
namespace {

template <int kHeadDim, bool kOfKeys, typename Kernel>
void launch_one(const char* name, Kernel* kernel, const AttentionParams& p,
                const BackwardCall& call, const Device& device) {
  using Shape = Sm90BackwardShape<kHeadDim, kOfKeys>;
  const AttentionShape& s = p.shape;
  check_is_built(name, kernel);
  const int owned = Shape::kM, walked = Shape::kN;
  const auto queries = [&](const View& v, int64_t width, int rows) {
    return tensor_map_of(name, v, {{width, s.q_len, s.q_heads, s.batch}}, p.dtype, rows);
  };
  const auto keys = [&](const View& v, int64_t width, int rows) {
    return tensor_map_of(name, v, {{width, s.k_len, s.kv_heads, s.batch}}, p.dtype, rows);
  };
  Sm90BackwardCall c{};
  c.c = call;
  TensorMap* const of_queries = kOfKeys ? c.walked : c.owned;
  TensorMap* const of_keys = kOfKeys ? c.owned : c.walked;
  of_queries[0] = queries(p.q, s.head_dim, kOfKeys ? walked : owned);
  of_queries[1] = queries(call.p.dout, s.v_dim, kOfKeys ? walked : owned);
  of_keys[0] = keys(p.k, s.head_dim, kOfKeys ? owned : walked);
  of_keys[1] = keys(p.v, s.v_dim, kOfKeys ? owned : walked);
  c.c.tiles = int((kOfKeys ? s.k_len : s.q_len) + Shape::kM - 1) / Shape::kM;
  c.c.walked = int(s.batch * (kOfKeys ? s.kv_heads : s.q_heads));
  const int64_t walked_bytes =
      (kOfKeys ? s.q_len * s.group() : s.k_len) * (s.head_dim + s.v_dim) * 2;
  c.c.together = heads_together(walked_bytes, kOfKeys ? 1 : s.group(), c.c.walked);
  launch(name, kernel, Grid{int64_t(c.c.tiles) * c.c.walked}, Shape::kThreads, Shape::kBytes,
         device.stream, c);
}

template <typename T, int kHeadDim>
void run(const AttentionParams& p, const BackwardCall& c, const Device& device) {
  if (c.dq)
    launch_one<kHeadDim, false>("attention_backward, dq, sm_90a",
                                attention_dq_sm90_kernel<T, kHeadDim>, p, c, device);
  if (c.dk || c.dv)
    launch_one<kHeadDim, true>("attention_backward, dk and dv, sm_90a",
                               attention_dkdv_sm90_kernel<T, kHeadDim>, p, c, device);
}

template <int kHeadDim>
void run_if_there(const AttentionParams& p, const BackwardCall& c, const Device& device) {
  if constexpr (has_sm90_backward(kHeadDim)) {
    if (p.dtype == DType::kBFloat16)
      run<bf16, kHeadDim>(p, c, device);
    else
      run<f16, kHeadDim>(p, c, device);
  }
}

}  // namespace

template <>
void attention_backward_sm90_of<FASTATTN_HEAD_DIM>(const AttentionParams& p, const BackwardCall& c,
                                                   const Device& device) {
  run_if_there<FASTATTN_HEAD_DIM>(p, c, device);
}

}  // namespace fastattn
