// The head dims that there are kernels of; those between take the next one.
#pragma once
#include <stdexcept>
#include <string>

#define FASTATTN_HEAD_DIMS(f) f(32) f(64) f(96) f(128) f(192) f(256)

namespace fastattn {

constexpr int64_t kMaxHeadDim = 256;

// Calls f(std::integral_constant<int, n>{}) with the least n that holds head_dim.
template <typename F>
void with_head_dim(int64_t head_dim, const F& f) {
#define FASTATTN_CASE(n) \
  if (head_dim <= n) return f(std::integral_constant<int, n>{});
  FASTATTN_HEAD_DIMS(FASTATTN_CASE)
#undef FASTATTN_CASE
  throw std::invalid_argument("attention: serves head dims up to " + std::to_string(kMaxHeadDim));
}

}  // namespace fastattn
