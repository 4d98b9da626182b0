// The sm_90a forward kernels of one head dim; compiled for each of head_dims.h, though there are
// kernels of some only.
#include "attention_forward_sm90.h"

#include <algorithm>

namespace fastattn {
namespace {

template <typename T, int kHeadDim, int kKeys>
void run(const AttentionParams& p, const ForwardCall& call, const Device& device) {
  using Shape = Sm90Shape<kHeadDim, kKeys>;
  const AttentionShape& s = p.shape;
  const auto kernel = attention_forward_sm90_kernel<T, kHeadDim, kKeys>;
  check_is_built("attention_forward, sm_90a", kernel);
  Sm90Call c{};
  c.c = call;
  const auto map = [&](const View& v, int64_t width, int64_t length, int64_t heads, int rows) {
    return tensor_map_of("attention_forward", v, {{width, length, heads, s.batch}}, p.dtype, rows);
  };
  c.q = map(p.q, s.head_dim, s.q_len, s.q_heads, 64);
  c.k = map(p.k, s.head_dim, s.k_len, s.kv_heads, Shape::kN);
  c.v = map(p.v, s.v_dim, s.k_len, s.kv_heads, Shape::kN);
  c.c.tiles = (call.p.q_len + Shape::kM - 1) / Shape::kM;
  const int64_t total = int64_t(c.c.tiles) * call.walked;
  const Grid grid{std::min<int64_t>(total, device.multiprocessors)};
  launch("attention_forward, sm_90a", kernel, grid, Shape::kThreads, Shape::kBytes, device.stream,
         c);
}

template <typename T, int kHeadDim>
void run(const AttentionParams& p, const ForwardCall& c, const Device& device) {
  using Keys = Sm90Keys<kHeadDim>;
  if (p.mask.left < 0 && p.mask.right < 0)
    run<T, kHeadDim, Keys::kFull>(p, c, device);
  else
    run<T, kHeadDim, Keys::kMasked>(p, c, device);
}

template <int kHeadDim>
void run_if_there(const AttentionParams& p, const ForwardCall& c, const Device& device) {
  if constexpr (has_sm90_forward(kHeadDim)) {
    if (p.dtype == DType::kBFloat16)
      run<bf16, kHeadDim>(p, c, device);
    else
      run<f16, kHeadDim>(p, c, device);
  }
}

}  // namespace

template <>
void attention_forward_sm90_of<FASTATTN_HEAD_DIM>(const AttentionParams& p, const ForwardCall& c,
                                                  const Device& device) {
  run_if_there<FASTATTN_HEAD_DIM>(p, c, device);
}

}  // namespace fastattn
