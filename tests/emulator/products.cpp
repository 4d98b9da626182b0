// The asynchronous products of a warpgroup (wgmma). Each warp makes its 16 rows of them when its
// lanes have met; that the warps of a group issue the same products is checked. Compiled without
// sanitizers, as emulator.cpp is.
#include <algorithm>
#include <cstring>

#include "hopper_state.h"
#include "ptx.h"

namespace emulator {
namespace {

// Of registers that nobody may touch: a signalling NaN, which arithmetic turns into another.
constexpr uint32_t kPoison = 0xFFBFFFFF;
constexpr int kLanes = 32;

WarpProducts& mine() { return hopper().products[thread_x() / kLanes]; }

// A matrix descriptor (PTX ISA, "Matrix Descriptor Format").
struct Matrix {
  uint32_t start, leading, stride;
  bool swizzle;
  Where where;

  Matrix(uint64_t d, Where w)
      : start(uint32_t(d & 0x3FFF) << 4),
        leading(uint32_t(d >> 16 & 0x3FFF) << 4),
        stride(uint32_t(d >> 32 & 0x3FFF) << 4),
        swizzle(d >> 62 == 1),
        where(w) {
    if (d >> 62 > 1) fail("wgmma: no swizzle but that of 128 bytes is emulated", where);
    if (d >> 49 & 7) fail("wgmma: a descriptor with a base offset", where);
    if (swizzle && (start & 0x380))
      fail("wgmma: a tile that begins within the swizzle's pattern has a base offset", where);
    if (start < kSharedBase) fail("wgmma: out of shared memory", where);
    start -= kSharedBase;
  }
  // Group `chunk` of 8 numbers along the row.
  void read(uint16_t* to, uint32_t row, uint32_t chunk, bool row_is_sum) const {
    uint32_t at = start + row / 8 * stride + row % 8 * 128 + chunk % 8 * 16;
    if (swizzle && row_is_sum) at += chunk / 8 * leading;
    if (!swizzle) {  // 8 rows of 16 bytes lie together
      const uint32_t across = row_is_sum ? stride : leading, down = row_is_sum ? leading : stride;
      at = start + row / 8 * down + row % 8 * 16 + chunk * across;
    }
    if (at + 16 > shared_bytes()) fail("wgmma: out of shared memory", where);
    unsigned char* from = shared_memory() + (swizzle ? swizzled(at) : at);
    reads(from, 16);
    std::memcpy(to, from, 16);
  }
};

float widen(uint16_t bits, bool bf16) {
  return bf16 ? fastattn::to_float(fastattn::bf16{bits}) : fastattn::to_float(fastattn::f16{bits});
}

void compute(const PendingProduct& p, float (&c)[16][256]) {
  static float a[16][16], b[16][256];
  const int warp = thread_x() / kLanes % 4, columns = p.what.columns;
  const bool bf16 = p.what.bf16;
  uint16_t chunk[8];
  if (p.what.a) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half)
          a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + half] =
              widen(uint16_t(p.a[lane][i] >> 16 * half), bf16);
  } else {
    const Matrix m(p.what.descriptor_a, p.where);
    for (uint32_t r = 0; r < 16; ++r)
      for (uint32_t n = 0; n < 2; ++n) {
        m.read(chunk, 16 * uint32_t(warp) + r, n, false);
        for (int i = 0; i < 8; ++i) a[r][8 * n + i] = widen(chunk[i], bf16);
      }
  }
  const Matrix m(p.what.descriptor_b, p.where);
  if (p.what.rows_are_sums) {
    for (uint32_t k = 0; k < 16; ++k)
      for (int n = 0; n < columns / 8; ++n) {
        m.read(chunk, k, uint32_t(n), true);
        for (int i = 0; i < 8; ++i) b[k][8 * n + i] = widen(chunk[i], bf16);
      }
  } else {
    for (int n = 0; n < columns; ++n)
      for (uint32_t k = 0; k < 2; ++k) {
        m.read(chunk, uint32_t(n), k, false);
        for (int i = 0; i < 8; ++i) b[8 * k + i][n] = widen(chunk[i], bf16);
      }
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < columns; ++j) c[i][j] = 0;
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < columns; ++j) c[i][j] += a[i][k] * b[k][j];
  }
}

void complete(const PendingProduct& p) {
  static float c[16][256];
  WarpProducts& w = mine();
  compute(p, c);
  tsan_release(&w);
  Sums& sums = w.sums.at(p.d);
  const int registers = p.what.columns / 2;
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < registers; ++i) {
      float& sum = sums.number[size_t(lane * registers + i)];
      const float more = c[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
      sum = p.what.add ? sum + more : more;
    }
  if (--sums.under_way) return;
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < registers; ++i) {
      uint32_t now;
      std::memcpy(&now, sums.d[lane] + i, 4);
      if (now != kPoison) fail("wgmma: a register of a product under way was written", p.where);
      sums.d[lane][i] = sums.number[size_t(lane * registers + i)];
    }
  w.sums.erase(p.d);
}

// All of the groups before `group`; they complete in order.
void complete_before(int64_t group) {
  WarpProducts& w = mine();
  while (!w.pending.empty() && w.pending.front().group < group) {
    const PendingProduct p = w.pending.front();
    w.pending.erase(w.pending.begin());
    complete(p);
  }
}

void complete_by_chance() {
  WarpProducts& w = mine();
  if (completion() != Completion::kRandom) return;
  yield();
  for (size_t n = w.pending.empty() ? 0 : chance() % (w.pending.size() + 1) / 2; n; --n) {
    const PendingProduct p = w.pending.front();
    w.pending.erase(w.pending.begin());
    complete(p);
  }
}

struct Brought {
  Product product;
  Where where;
};

void issue(const void* const* in, void* const*, uint32_t) {
  const auto at = [&](int lane) -> const Brought& {
    return *static_cast<const Brought*>(in[lane]);
  };
  const Product& p = at(0).product;
  const Where where = at(0).where;
  for (int lane = 1; lane < kLanes; ++lane) {
    const Product& other = at(lane).product;
    if (other.descriptor_a != p.descriptor_a || other.descriptor_b != p.descriptor_b ||
        other.add != p.add)
      fail("wgmma: the lanes of a warp have different operands", where);
  }
  Hopper& h = hopper();
  WarpProducts& w = mine();
  std::vector<uint64_t>& order = h.sequence[thread_x() / 128];
  for (uint64_t number : {p.descriptor_a, p.descriptor_b, uint64_t(p.columns) * 2 + p.add}) {
    if (size_t(w.issued) == order.size()) order.push_back(number);
    if (order[size_t(w.issued++)] != number)
      fail("wgmma: the warps of a warpgroup issue different products", where);
  }
  if (!w.fenced) fail("wgmma: no wgmma.fence since registers were last waited for", where);
  const auto [found, fresh] = w.sums.try_emplace(p.d);
  Sums& sums = found->second;
  if (!fresh && sums.columns != p.columns) fail("wgmma: another shape is under way there", where);
  if (fresh) {
    sums.columns = p.columns;
    sums.under_way = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      sums.d[lane] = at(lane).product.d;
      sums.number.insert(sums.number.end(), sums.d[lane], sums.d[lane] + p.columns / 2);
      for (int i = 0; i < p.columns / 2; ++i) std::memcpy(sums.d[lane] + i, &kPoison, 4);
    }
  }
  ++sums.under_way;
  PendingProduct pending{p, {}, p.d, w.group, where};
  for (int lane = 0; lane < kLanes; ++lane) pending.a[lane] = at(lane).product.a;
  w.pending.push_back(pending);
  if (completion() == Completion::kEager) complete_before(w.group + 1);
  complete_by_chance();
}

}  // namespace

void multiply_async(const Product& product, Where where) {
  const Untracked untracked;
  if (threads() % 128) fail("wgmma: not in whole warpgroups", where);
  const Brought brought{product, where};
  meet_warp("wgmma", ~0u, &brought, nullptr, issue, where);
}

void fence_products(Where where) {
  const Untracked untracked;
  const auto fence = [](const void* const*, void* const*, uint32_t) { mine().fenced = true; };
  meet_warp("wgmma.fence", ~0u, nullptr, nullptr, fence, where);
}

void commit_products(Where where) {
  const Untracked untracked;
  const auto commit = [](const void* const*, void* const*, uint32_t) {
    ++mine().group;
    complete_by_chance();
  };
  meet_warp("wgmma.commit_group", ~0u, nullptr, nullptr, commit, where);
}

void wait_products(int groups_left, Where where) {
  const Untracked untracked;
  struct Wait {
    int left;
    Where where;
  } const in{groups_left, where};
  const auto wait = [](const void* const* lanes, void* const*, uint32_t) {
    const auto& asked = *static_cast<const Wait*>(lanes[0]);
    // As late as it may be: whoever overwrites what the products have yet to read can do so.
    if (completion() == Completion::kLazy) wait_for_others("wgmma.wait_group", asked.where);
    complete_by_chance();
    WarpProducts& w = mine();
    complete_before(w.group - asked.left);
    w.fenced = false;
  };
  meet_warp("wgmma.wait_group", ~0u, &in, nullptr, wait, where);
  tsan_acquire(&mine());  // one lane has read for all: they may tell others that it is done
}

}  // namespace emulator
