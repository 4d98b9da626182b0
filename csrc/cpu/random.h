// Philox for a row: see csrc/common/philox.h, which defines the numbers. Here, many counters at
// once.
#pragma once
#include "philox.h"
#include "vec64.h"

namespace fastattn {
namespace {

constexpr int kGroupsAtOnce = Vec64::kWidth;  // what random_words rounds up to

// Words of the counters (first, c1, c2, c3), (first + 1, c1, c2, c3), ..., four each. Writes whole
// vectors: dst must hold 4 * (groups + kGroupsAtOnce) words.
inline void random_words(uint32_t* dst, uint64_t seed, uint32_t first, int64_t groups, uint32_t c1,
                         uint32_t c2, uint32_t c3) {
  // Only the low half of each lane counts: what the products leave above it is never read.
  const Vec64 m0 = splat64(0xD2511F53u), m1 = splat64(0xCD9E8D57u);
  for (int64_t g = 0; g < groups; g += kGroupsAtOnce, dst += 4 * kGroupsAtOnce) {
    Vec64 x0 = add64(splat64(first + uint32_t(g)), iota64()), x1 = splat64(c1), x2 = splat64(c2),
          x3 = splat64(c3);
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Vec64 p0 = multiply_low(m0, x0), p1 = multiply_low(m1, x2);
      x0 = xor64(xor64(high64(p1), x1), splat64(k0));
      x1 = p1;
      x2 = xor64(xor64(high64(p0), x3), splat64(k1));
      x3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    store_words(dst, x0, x1, x2, x3);
  }
}

}  // namespace
}  // namespace fastattn
