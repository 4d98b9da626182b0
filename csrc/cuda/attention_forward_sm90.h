// Attention forward on sm_90a, after the design of FlashAttention-3 (Shah et al., 2024): products
// by whole warpgroups out of shared memory (wgmma), tiles fetched by the copying unit (TMA).
//
// A block stays on its multiprocessor and takes tile after tile of queries. One thread, the
// producer, does nothing but fetch; two or three warpgroups of 64 queries each consume. A consumer
// issues q.k of the next tile of keys before p.v of this one, so that its softmax runs while the
// tensor cores multiply; and consumers issue by turns, so that one's softmax runs while they
// multiply for another. Each tile of K and V in shared memory has two transaction barriers: `full`,
// where the copies arrive, and `empty`, where the consumers do.
//
// What it does not serve (scores that something is added to, dropout, rows that no tensor map
// describes) attention_forward.h does.
#pragma once
#include "attention_sm90.h"
#include "attention_tile_sm90.h"

namespace fastattn {

struct Sm90Call {
  TensorMap q, k, v;
  ForwardCall c;
};

// Keys of a tile: more of them leave fewer rounds, as far as registers and shared memory go. Where
// a mask cuts through tiles, a smaller one wastes less.
template <int kHeadDim>
struct Sm90Keys {
  static constexpr int kFull = kHeadDim == 256 ? 80 : kHeadDim == 128 ? 176 : 128;
  static constexpr int kMasked = kHeadDim == 256 ? 80 : 128;
};

template <int kHeadDim, int kKeys>
struct Sm90Shape {
  static constexpr int kN = kKeys;
  static constexpr int kGroups = kHeadDim == 64 ? 3 : 2;  // that consume
  static constexpr int kM = 64 * kGroups;
  static constexpr int kThreads = kWarpgroup * (kGroups + 1);
  static constexpr int kStages = 2;
  static constexpr bool kTurns = kHeadDim <= 128;
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kQueryBytes = 64 * kHeadDim * 2;  // of a consumer
  static constexpr int kKeyBytes = kN * kHeadDim * 2;
  static constexpr int kBarriers = 2 * kGroups + 4 * kStages;
  static constexpr size_t kBytes =
      size_t(kGroups) * kQueryBytes + 2 * kStages * kKeyBytes + kBarriers * sizeof(Mbarrier);
  static_assert(kN * kPanelRowBytes % kSwizzleBytes == 0, "panels begin where the swizzle does");
};

template <int kHeadDim, int kKeys>
struct Sm90Memory {
  using Shape = Sm90Shape<kHeadDim, kKeys>;
  static constexpr int kGroups = Shape::kGroups, kStages = Shape::kStages;
  unsigned char* base;

  FASTATTN_DEVICE unsigned char* q(int group) const { return base + group * Shape::kQueryBytes; }
  FASTATTN_DEVICE unsigned char* k(int stage) const {
    return q(kGroups) + stage * Shape::kKeyBytes;
  }
  FASTATTN_DEVICE unsigned char* v(int stage) const { return k(kStages + stage); }
  FASTATTN_DEVICE Mbarrier* barriers() const { return reinterpret_cast<Mbarrier*>(k(2 * kStages)); }
  FASTATTN_DEVICE Mbarrier* q_full(int group) const { return barriers() + group; }
  FASTATTN_DEVICE Mbarrier* q_empty(int group) const { return barriers() + kGroups + group; }
  FASTATTN_DEVICE Mbarrier* k_full(int stage) const { return barriers() + 2 * kGroups + stage; }
  FASTATTN_DEVICE Mbarrier* k_empty(int stage) const { return k_full(kStages + stage); }
  FASTATTN_DEVICE Mbarrier* v_full(int stage) const { return k_full(2 * kStages + stage); }
  FASTATTN_DEVICE Mbarrier* v_empty(int stage) const { return k_full(3 * kStages + stage); }

  FASTATTN_DEVICE void init() const {
    for (int n = 0; n < kGroups; ++n) {
      init_barrier(q_full(n), 1);
      init_barrier(q_empty(n), kWarpgroup / 32);  // a lane of each warp
    }
    for (int n = 0; n < kStages; ++n) {
      init_barrier(k_full(n), 1);
      init_barrier(k_empty(n), kGroups * kWarpgroup / 32);
      init_barrier(v_full(n), 1);
      init_barrier(v_empty(n), kGroups * kWarpgroup / 32);
    }
    fence_async();
  }
};

// A tile of queries, and the keys that it walks through, from the last tile to the first: under a
// causal mask those that need it come first.
template <typename Shape>
struct Sm90Tile {
  int batch, head, first_row, count;
  KeyWalk keys;

  FASTATTN_DEVICE Sm90Tile(const ForwardCall& c, const TileOrder& at)
      : batch(at.head / c.p.heads),
        head(at.head % c.p.heads),
        first_row(at.tile * Shape::kM),
        keys(c.p, first_row, first_row + Shape::kM < c.p.q_len ? first_row + Shape::kM : c.p.q_len,
             Shape::kN, 0, c.p.k_len) {
    count = keys.end > keys.begin ? (keys.end - keys.begin + Shape::kN - 1) / Shape::kN : 0;
  }
  FASTATTN_DEVICE int start(int n) const { return keys.begin + (count - 1 - n) * Shape::kN; }
};

// The tiles of this block: every grid_x()-th, the way back and forth, since the longest come first
// and no block should get the longer one of each round.
template <typename Shape>
struct Sm90Tiles {
  const ForwardCall& c;
  unsigned first = 0;  // up to 2^32: there are 2^31 tiles at most
  bool back = false;

  FASTATTN_DEVICE explicit Sm90Tiles(const ForwardCall& call) : c(call) {}
  FASTATTN_DEVICE unsigned now() const {
    return first + unsigned(back ? grid_x() - 1 - block_x() : block_x());
  }
  FASTATTN_DEVICE bool left() const { return now() < unsigned(c.tiles) * unsigned(c.walked); }
  FASTATTN_DEVICE void next() {
    first += unsigned(grid_x());
    back = !back;
  }
  // Worked out anew at each call: what only the end of a tile needs is not kept through its middle.
  FASTATTN_DEVICE Sm90Tile<Shape> tile() const {
    const unsigned n = forgotten(now());
    return Sm90Tile<Shape>(c, TileOrder(int(n), c.tiles, c.walked, c.together));
  }
};

// ---- the producer ------------------------------------------------------------------------------

template <int kHeadDim, int kKeys>
FASTATTN_DEVICE void produce(const Sm90Call& call, const Sm90Memory<kHeadDim, kKeys>& memory) {
  using Shape = Sm90Shape<kHeadDim, kKeys>;
  constexpr int kStages = Shape::kStages, kN = Shape::kN;
  const Problem& p = call.c.p;
  prefetch_map(&call.q);
  prefetch_map(&call.k);
  prefetch_map(&call.v);
  unsigned taken = 0;  // tiles of keys, before this tile of queries
  int q_parity = 0;
  FASTATTN_NO_UNROLL
  for (Sm90Tiles<Shape> tiles(call.c); tiles.left(); tiles.next()) {
    const Sm90Tile<Shape> tile = tiles.tile();
    const int kv_head = tile.head / p.group;
    const auto fetch_k = [&](int n) {
      const Stage<kStages> k(taken + unsigned(n));
      wait_barrier(memory.k_empty(k.index), k.parity ^ 1);
      fetch_panels<kHeadDim>(memory.k(k.index), call.k, memory.k_full(k.index), kN, tile.start(n),
                             kv_head, tile.batch);
    };
    const auto fetch_v = [&](int n) {
      const Stage<kStages> v(taken + unsigned(n));
      wait_barrier(memory.v_empty(v.index), v.parity ^ 1);
      fetch_panels<kHeadDim>(memory.v(v.index), call.v, memory.v_full(v.index), kN, tile.start(n),
                             kv_head, tile.batch);
    };
    if (tile.count == 0) continue;
    fetch_k(0);
    FASTATTN_UNROLL
    for (int group = 0; group < Shape::kGroups; ++group) {
      wait_barrier(memory.q_empty(group), q_parity ^ 1);
      fetch_panels<kHeadDim>(memory.q(group), call.q, memory.q_full(group), 64,
                             tile.first_row + 64 * group, tile.head, tile.batch);
    }
    q_parity ^= 1;
    FASTATTN_NO_UNROLL
    for (int n = 0; n < tile.count; ++n) {
      if (n + 1 < tile.count) fetch_k(n + 1);
      fetch_v(n);
    }
    taken += unsigned(tile.count);
  }
}

// ---- the consumers -----------------------------------------------------------------------------

// When a warpgroup may issue its products: after the one before it has.
template <bool kTurns, int kGroups>
struct Turns {
  int group;
  static FASTATTN_DEVICE int id(int of) { return 1 + of; }  // 0 is that of the whole block
  FASTATTN_DEVICE void take() const {
    if (kTurns) sync_named(id(group), 2 * kWarpgroup);
  }
  FASTATTN_DEVICE void pass() const {
    if (kTurns) arrive_named(id(group + 1 == kGroups ? 0 : group + 1), 2 * kWarpgroup);
  }
  FASTATTN_DEVICE void begin() const {
    if (group + 1 == kGroups) pass();
  }
  FASTATTN_DEVICE void end() const {  // nobody else waits for the last pass
    if (group == 0) take();
  }
};

template <typename T, int kHeadDim, int kKeys>
struct Sm90Consumer {
  using Shape = Sm90Shape<kHeadDim, kKeys>;
  static constexpr int kN = Shape::kN, kStages = Shape::kStages;
  static constexpr int kChunks = kHeadDim / 8;  // of columns

  const Problem& p;
  float o[kHeadDim / 2];
  float max[2], sum[2];  // of rows lane / 4 and 8 further; sums are of this lane's numbers alone

  FASTATTN_DEVICE explicit Sm90Consumer(const Problem& problem) : p(problem) {
    FASTATTN_UNROLL
    for (int n = 0; n < 2; ++n) {
      max[n] = hidden_score();
      sum[n] = 0.0f;
    }
  }

  // Which keys a row sees is worked out anew for each tile: few have hidden ones, and registers are
  // scarce. Rows beyond the last see none.
  FASTATTN_DEVICE void hide(float (&s)[kN / 2], int first_row, int start) const {
    FASTATTN_UNROLL
    for (int n = 0; n < 2; ++n) {
      const int i = first_row + thread_x() % 32 / 4 + 8 * n;
      const KeyRange keys = p.mask.keys_of(i, p.k_len);
      const int first = start + thread_x() % 4 * 2;
      const int begin = int(keys.begin) - first, end = i < p.q_len ? int(keys.end) - first : -first;
      FASTATTN_UNROLL
      for (int t = 0; t < kN / 8; ++t) FASTATTN_UNROLL
      for (int e = 0; e < 2; ++e)
        if (8 * t + e < begin || 8 * t + e >= end) s[4 * t + 2 * n + e] = hidden_score();
    }
  }

  // Scores to probabilities, of which sum takes its share; alpha is what o has to be scaled by.
  FASTATTN_DEVICE void probabilities(float (&s)[kN / 2], float (&alpha)[2]) {
    FASTATTN_UNROLL
    for (int n = 0; n < 2; ++n) {
      float top = max[n];
      FASTATTN_UNROLL
      for (int t = 0; t < kN / 8; ++t)
        top = fmaxf(top, fmaxf(s[4 * t + 2 * n], s[4 * t + 2 * n + 1]));
      top = quad_max(top);
      // A row that has seen nothing yet is all -inf: any finite reference makes zeros of it.
      const float reference = is_hidden(top) ? 0.0f : top;
      alpha[n] = exp2_fast((max[n] - reference) * p.factor);
      max[n] = top;
      sum[n] *= alpha[n];
      const float scaled = reference * p.factor;
      FASTATTN_UNROLL
      for (int t = 0; t < kN / 8; ++t) FASTATTN_UNROLL
      for (int e = 0; e < 2; ++e) {
        float& number = s[4 * t + 2 * n + e];
        number = exp2_fast(fmaf(number, p.factor, -scaled));
        sum[n] += number;
      }
    }
  }
  FASTATTN_DEVICE void rescale(const float (&alpha)[2]) {
    FASTATTN_UNROLL
    for (int t = 0; t < kChunks; ++t) FASTATTN_UNROLL
    for (int e = 0; e < 4; ++e) o[4 * t + e] *= alpha[e / 2];
  }

  // out and lse of the two rows; then again, with care, the rows that cannot be trusted.
  FASTATTN_DEVICE void finish(float* lse, int b, int h, int first_row) {
    const int lane = thread_x() % 32;
    float finite[2];
    T* out = static_cast<T*>(p.out.data) + b * p.out.stride[0] + h * p.out.stride[1];
    FASTATTN_UNROLL
    for (int n = 0; n < 2; ++n) {
      sum[n] = quad_sum(sum[n]);
      float all = sum[n];
      FASTATTN_UNROLL
      for (int t = 0; t < kChunks; ++t) all += o[4 * t + 2 * n] + o[4 * t + 2 * n + 1];
      all = quad_sum(all);
      const bool large = fabsf(max[n]) * fabsf(p.factor) > kLargeExponent && !is_hidden(max[n]);
      const int i = first_row + lane / 4 + 8 * n;
      finite[n] = i >= p.q_len ? 0.0f : large ? float_of(0x7FC00000u) : all;
      const RowEnd row_end(p, h, max[n] * p.scale, sum[n]);
      if (i < p.q_len && lane % 4 == 0) lse[p.row(b, h, i)] = row_end.lse;
      store_row(o, i < p.q_len ? out + i * p.out.stride[2] : nullptr, p.v_dim, n, row_end.factor);
    }
    int any = !is_finite(finite[0]) || !is_finite(finite[1]);
    for (int lanes = 16; lanes; lanes >>= 1) any |= shuffle_xor(any, lanes);
    if (!any) return;
    sync_warp();  // what is written again has been written
    FASTATTN_NO_UNROLL
    for (int r = 0; r < 16; ++r) {
      const float mine = shuffle(r < 8 ? finite[0] : finite[1], r % 8 * 4);
      if (!is_finite(mine)) careful_row<T>(p, lse, b, h, first_row + r);
    }
  }
};

template <typename T, int kHeadDim, int kKeys>
FASTATTN_DEVICE void consume(const Sm90Call& call, const Sm90Memory<kHeadDim, kKeys>& memory,
                             int group) {
  using Consumer = Sm90Consumer<T, kHeadDim, kKeys>;
  using Shape = Sm90Shape<kHeadDim, kKeys>;
  constexpr int kStages = Shape::kStages, kN = Shape::kN;
  const Turns<Shape::kTurns, Shape::kGroups> turns{group};
  const int warp = thread_x() / 32 % 4, lane = thread_x() % 32;
  const auto release = [&](Mbarrier* empty) {
    if (lane == 0) arrive(empty);
  };
  const uint64_t q = tile_descriptor(memory.q(group), 0);
  const uint64_t k_first = tile_descriptor(memory.k(0), 0);
  const uint64_t v_first = tile_descriptor(memory.v(0), kN * kPanelRowBytes);
  unsigned taken = 0;  // tiles of keys, before this tile of queries
  int q_parity = 0;
  turns.begin();
  FASTATTN_NO_UNROLL
  for (Sm90Tiles<Shape> tiles(call.c); tiles.left(); tiles.next()) {
    const Sm90Tile<Shape> tile = tiles.tile();
    const int first_row = tile.first_row + 64 * group + 16 * warp;
    Consumer state(call.c.p);
    if (tile.count == 0) {
      FASTATTN_UNROLL
      for (int i = 0; i < kHeadDim / 2; ++i) state.o[i] = 0.0f;
      state.finish(call.c.lse, tile.batch, tile.head, first_row);
      continue;
    }
    float s[kN / 2], alpha[2];
    uint32_t weights[kN / 16][4];
    const Stage<kStages> first_k(taken);
    wait_barrier(memory.q_full(group), q_parity);
    wait_barrier(memory.k_full(first_k.index), first_k.parity);
    turns.take();
    fence_products();
    issue_rows<T, kHeadDim, 64>(s, q, advanced(k_first, first_k.index * Shape::kKeyBytes));
    turns.pass();
    wait_products<0>();
    pin(s);
    release(memory.k_empty(first_k.index));
    if (tile.keys.masked(tile.start(0))) state.hide(s, first_row, tile.start(0));
    state.probabilities(s, alpha);
    pack_fragments<T>(weights, s);
    FASTATTN_NO_UNROLL
    for (int n = 1; n < tile.count; ++n) {
      const Stage<kStages> k(taken + unsigned(n)), v(taken + unsigned(n) - 1);
      wait_barrier(memory.k_full(k.index), k.parity);
      turns.take();
      pin(s);
      fence_products();
      issue_rows<T, kHeadDim, 64>(s, q, advanced(k_first, k.index * Shape::kKeyBytes));
      wait_barrier(memory.v_full(v.index), v.parity);
      pin(state.o);
      pin(weights);
      fence_products();
      issue_columns<T>(state.o, weights, advanced(v_first, v.index * Shape::kKeyBytes), n > 1);
      turns.pass();
      wait_products<1>();
      pin(s);
      release(memory.k_empty(k.index));
      if (tile.keys.masked(tile.start(n))) state.hide(s, first_row, tile.start(n));
      state.probabilities(s, alpha);
      wait_products<0>();
      pin(state.o);
      release(memory.v_empty(v.index));
      state.rescale(alpha);
      pack_fragments<T>(weights, s);
    }
    release(memory.q_empty(group));
    q_parity ^= 1;
    taken += unsigned(tile.count);
    const Stage<kStages> v(taken - 1);
    wait_barrier(memory.v_full(v.index), v.parity);
    pin(state.o);
    pin(weights);
    fence_products();
    issue_columns<T>(state.o, weights, advanced(v_first, v.index * Shape::kKeyBytes),
                     tile.count > 1);
    wait_products<0>();
    pin(state.o);
    release(memory.v_empty(v.index));
    const Sm90Tile<Shape> same = tiles.tile();
    state.finish(call.c.lse, same.batch, same.head, same.first_row + 64 * group + 16 * warp);
  }
  turns.end();
}

template <typename T, int kHeadDim, int kKeys>
FASTATTN_KERNEL((Sm90Shape<kHeadDim, kKeys>::kThreads), 1)
attention_forward_sm90_kernel(FASTATTN_PARAMS Sm90Call call) {
#if defined(FASTATTN_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = Sm90Shape<kHeadDim, kKeys>;
  FASTATTN_SHARED(bytes);
  const Sm90Memory<kHeadDim, kKeys> memory{bytes};
  if (thread_x() == 0) memory.init();
  sync_threads();
  // The same in all lanes, which the compiler is to know.
  const int group = shuffle(thread_x() / kWarpgroup, 0);
  if (group == Shape::kGroups) {
    give_registers<Registers<Shape::kGroups>::kProducer>();
    if (thread_x() % kWarpgroup == 0) produce(call, memory);
  } else {
    take_registers<Registers<Shape::kGroups>::kConsumer>();
    consume<T>(call, memory, group);
  }
#endif
}

}  // namespace fastattn
