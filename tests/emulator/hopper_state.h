// The state of hopper.cpp and products.cpp: of one block, since blocks run one after the other.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "hopper.h"
#include "sanitizers.h"

namespace emulator {

// What threads do to the emulator's own state is no access of the kernel. ThreadSanitizer sees it
// nevertheless where it happens in the C library: while one of these lives, only what `reads` and
// `writes` tell it counts.
struct Untracked {
  Untracked() { ignore_accesses(); }
  Untracked(const Untracked&) = delete;
  ~Untracked() { heed_accesses(); }
};
inline void reads(const void* p, size_t n) {
  heed_accesses();
  tsan_read(p, n);
  ignore_accesses();
}
inline void writes(void* p, size_t n) {
  heed_accesses();
  tsan_write(p, n);
  ignore_accesses();
}

struct TransactionBarrier {
  int arrivals = 0, left = 0;  // of a phase
  int64_t bytes = 0;           // expected and not there
  int64_t phase = 0;
  int owner = 0;        // who initialised it
  bool fenced = false;  // for the units that work beside the threads
};

struct BoxCopy {
  TensorMap map;  // a kernel's parameters lie on stacks here, which may be gone
  int at[4];
  uint32_t shared, barrier;
  int64_t bytes;
};

struct NamedBarrier {
  int count = 0, arrived = 0;
  int64_t rounds = 0;
};

// A product of one warp: its 16 rows.
struct PendingProduct {
  Product what;
  const uint32_t* a[32];
  const float* d;  // of lane 0: names the sums
  int64_t group;
  Where where;
};

// Registers that products under way write, and what they will hold.
struct Sums {
  float* d[32];
  int columns;
  int under_way;
  std::vector<float> number;  // (lane, register)
};

struct WarpProducts {
  std::vector<PendingProduct> pending;
  std::map<const float*, Sums> sums;
  int64_t group = 0, issued = 0;
  bool fenced = false;
};

struct Hopper {
  static constexpr int kNamed = 16;
  std::map<uint32_t, TransactionBarrier> barriers;  // by their place in shared memory
  std::vector<BoxCopy> copies;                      // under way
  NamedBarrier named[kNamed];
  WarpProducts products[32];  // of each warp
  // Of a warpgroup: its products in order, as the first warp issued them.
  std::vector<uint64_t> sequence[8];
  int registers[1024] = {};
  int given = 0, free_registers = -1;
};
Hopper& hopper();

// 128-byte swizzle: the 16 bytes at this place of shared memory.
inline uint32_t swizzled(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }

// The place of p in shared memory, where `bytes` from it on have to be.
uint32_t in_shared(const void* p, size_t bytes, const char* what, Where where);

}  // namespace emulator
