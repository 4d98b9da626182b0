// The head dims that there are kernels of, ascending; those between take the next one. A quick
// build, such as some of the tests', may have fewer.
#pragma once
#include <stdexcept>
#include <string>

#ifndef FASTATTN_HEAD_DIMS
#define FASTATTN_HEAD_DIMS(f) f(32) f(64) f(96) f(128) f(192) f(256)
#endif

namespace fastattn {

#define FASTATTN_ITEM(n) n,
constexpr int kHeadDims[] = {FASTATTN_HEAD_DIMS(FASTATTN_ITEM)};
#undef FASTATTN_ITEM
constexpr int64_t kMaxHeadDim = kHeadDims[sizeof(kHeadDims) / sizeof(int) - 1];

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
