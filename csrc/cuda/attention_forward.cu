// The forward kernels of one head dim; compiled once for each of head_dims.h.
#include "attention_forward.h"

namespace fastattn {
namespace {

template <typename T, bool kModified>
void run(const ForwardCall& c, const Device& device) {
  constexpr int kHeadDim = FASTATTN_HEAD_DIM;
  const Grid grid{int64_t(c.tiles) * c.walked, c.parts.count};
  launch("attention_forward", attention_forward_kernel<T, kHeadDim, kModified>, grid,
         kAttentionThreads, ForwardShape<kHeadDim, kModified>::kBytes, device.stream, c);
}

template <typename T>
void run(const ForwardCall& c, const Device& device) {
  if (c.p.modified)
    run<T, true>(c, device);
  else
    run<T, false>(c, device);
}

}  // namespace

template <>
void attention_forward_of<FASTATTN_HEAD_DIM>(DType dtype, const ForwardCall& c,
                                             const Device& device) {
  if (dtype == DType::kBFloat16)
    run<bf16>(c, device);
  else
    run<f16>(c, device);
}

}  // namespace fastattn
