// Attention backward on sm_90a: attention_backward.h has the formulas, and its kernel of delta runs
// before. Two kernels, and in both a block owns a tile and walks through others; with `a` and `b`
// for q and dout of its queries or k and v of its keys, and `c` and `d` for those that it walks
// through,
//   s = a . c^T -> p,   dp = b . d^T,   ds = p (dp - delta)   owned x walked
//   dk or dq += ds . c,   dv += p . d
// so that p and ds never leave registers: where a product leaves them is where the next one takes
// its first factor. What two kernels cost over one is 7 products for 5; one alone would add up dq
// across blocks, in float32 in memory, with atomics or in turns.
//
// One warp, the producer, fetches; where queries are walked through, another brings their lse and
// delta. Two warpgroups consume, 64 of the owned rows each. A tile walked through has three
// transaction barriers: `full`, where c arrives, another for d, and `empty`, where the consumers
// do. The s of the next tile is issued before ds . c of this one, so that its softmax runs while
// the tensor cores multiply.
#pragma once
#include "attention_backward.h"
#include "attention_sm90.h"
#include "attention_tile_sm90.h"

namespace fastattn {

struct Sm90BackwardCall {
  TensorMap owned[2], walked[2];  // a and b, c and d
  BackwardCall c;
};

// The tile that a block owns, and those that it walks through: for dq the keys of one head, for dk
// and dv the queries of each head of the group. In shared memory: registers are scarce.
struct Sm90Walk {
  int batch, head, first;            // of the owned tile
  int first_head, begin, end, step;  // of what is walked through; steps: tiles of a head
  int steps, total;

  FASTATTN_DEVICE int start(int n) const { return begin + n % steps * step; }
  FASTATTN_DEVICE int walked_head(int n) const { return first_head + n / steps; }
};

// kOfKeys: dk and dv, of a block's keys; else dq, of its queries.
template <int kHeadDim, bool kOfKeys>
struct Sm90BackwardShape {
  static constexpr int kGroups = 2;  // that consume
  static constexpr int kM = 64 * kGroups;
  // Of a tile walked through: as many as registers hold s and dp of, beside the sums.
  static constexpr int kN = kHeadDim == 128 ? (kOfKeys ? 64 : 96) : (kOfKeys ? 96 : 128);
  static constexpr int kStages = 3;
  static constexpr int kThreads = kWarpgroup * (kGroups + 1);
  static constexpr int kOwnedBytes = kM * kHeadDim * 2;
  static constexpr int kWalkedBytes = kN * kHeadDim * 2;
  static constexpr int kRowBytes = kOfKeys ? 2 * kN * int(sizeof(float)) : 0;
  static constexpr int kBarriers = 2 + 3 * kStages;
  static constexpr size_t kBytes = 2 * kOwnedBytes + kStages * (2 * kWalkedBytes + kRowBytes) +
                                   kBarriers * sizeof(Mbarrier) + sizeof(Sm90Walk);
};

template <typename Shape, bool kOfKeys>
FASTATTN_DEVICE Sm90Walk walk_of(const BackwardCall& c) {
  const Problem& p = c.p;
  // Under a causal mask the last queries see the most keys, and most queries see the first keys.
  const TileOrder at(block_x(), c.tiles, c.walked, c.together);
  const int heads = kOfKeys ? p.kv_heads : p.heads, length = kOfKeys ? p.k_len : p.q_len;
  Sm90Walk w;
  w.batch = at.head / heads;
  w.head = at.head % heads;
  w.first = (kOfKeys ? c.tiles - 1 - at.tile : at.tile) * Shape::kM;
  w.first_head = kOfKeys ? w.head * p.group : w.head / p.group;
  const int last = w.first + Shape::kM < length ? w.first + Shape::kM : length;
  const KeyRange range = kOfKeys ? p.mask.any_queries(w.first, last, p.q_len)
                                 : p.mask.any_keys(w.first, last, p.k_len);
  w.step = Shape::kN;
  w.begin = int(range.begin) / w.step * w.step;
  w.end = int(range.end);
  w.steps = range.empty() ? 0 : (w.end - w.begin + w.step - 1) / w.step;
  w.total = w.steps * (kOfKeys ? p.group : 1);
  return w;
}

// Of two queries side by side.
struct alignas(8) RowPair {
  float number[2];
};

template <int kHeadDim, bool kOfKeys>
struct Sm90BackwardMemory {
  using Shape = Sm90BackwardShape<kHeadDim, kOfKeys>;
  static constexpr int kStages = Shape::kStages;
  unsigned char* base;

  // `of`: 0 for a and c, the factors of s; 1 for b and d, those of dp.
  FASTATTN_DEVICE unsigned char* owned(int of) const { return base + of * Shape::kOwnedBytes; }
  FASTATTN_DEVICE unsigned char* walked(int of, int stage) const {
    return owned(2) + (of * kStages + stage) * Shape::kWalkedBytes;
  }
  FASTATTN_DEVICE float* reference(int stage) const {
    return reinterpret_cast<float*>(walked(2, 0) + stage * Shape::kRowBytes);
  }
  FASTATTN_DEVICE float* delta(int stage) const { return reference(stage) + Shape::kN; }
  FASTATTN_DEVICE Mbarrier* owned_full(int of) const {
    return reinterpret_cast<Mbarrier*>(walked(2, 0) + kStages * Shape::kRowBytes) + of;
  }
  FASTATTN_DEVICE Mbarrier* full(int of, int stage) const {
    return owned_full(2) + of * kStages + stage;
  }
  FASTATTN_DEVICE Mbarrier* empty(int stage) const { return full(2, stage); }
  FASTATTN_DEVICE Sm90Walk* walk() const { return reinterpret_cast<Sm90Walk*>(full(3, 0)); }

  FASTATTN_DEVICE void init(const BackwardCall& c) const {
    *walk() = walk_of<Shape, kOfKeys>(c);
    init_barrier(owned_full(0), 1);
    init_barrier(owned_full(1), 1);
    for (int n = 0; n < kStages; ++n) {
      init_barrier(full(0, n), kOfKeys ? 2 : 1);  // with c come lse and delta
      init_barrier(full(1, n), 1);
      init_barrier(empty(n), Shape::kGroups * kWarpgroup / 32);  // a lane of each warp
    }
    fence_async();
  }
};

// ---- the producers -----------------------------------------------------------------------------

template <int kHeadDim, bool kOfKeys>
FASTATTN_DEVICE void produce(const Sm90BackwardCall& call,
                             const Sm90BackwardMemory<kHeadDim, kOfKeys>& memory) {
  using Shape = Sm90BackwardShape<kHeadDim, kOfKeys>;
  const Sm90Walk& walk = *memory.walk();
  if (walk.total == 0) return;
  FASTATTN_UNROLL
  for (int of = 0; of < 2; ++of) {
    prefetch_map(&call.walked[of]);
    fetch_panels<kHeadDim>(memory.owned(of), call.owned[of], memory.owned_full(of), Shape::kM,
                           walk.first, walk.head, walk.batch);
  }
  FASTATTN_NO_UNROLL
  for (int n = 0; n < walk.total; ++n) {
    const Stage<Shape::kStages> stage{unsigned(n)};
    wait_barrier(memory.empty(stage.index), stage.parity ^ 1);
    FASTATTN_UNROLL
    for (int of = 0; of < 2; ++of)
      fetch_panels<kHeadDim>(memory.walked(of, stage.index), call.walked[of],
                             memory.full(of, stage.index), Shape::kN, walk.start(n),
                             walk.walked_head(n), walk.batch);
  }
}

// lse and delta of the queries of each tile; a warp. Beyond the last query p is 0.
template <int kHeadDim>
FASTATTN_DEVICE void produce_rows(const BackwardCall& c,
                                  const Sm90BackwardMemory<kHeadDim, true>& memory) {
  using Shape = Sm90BackwardShape<kHeadDim, true>;
  const Sm90Walk& walk = *memory.walk();
  const int lane = thread_x() % 32;
  FASTATTN_NO_UNROLL
  for (int n = 0; n < walk.total; ++n) {
    const Stage<Shape::kStages> stage{unsigned(n)};
    const int start = walk.start(n);
    const int64_t rows = c.p.row(walk.batch, walk.walked_head(n), start);
    wait_barrier(memory.empty(stage.index), stage.parity ^ 1);
    for (int r = lane; r < Shape::kN; r += 32) {
      const bool exists = start + r < c.p.q_len;
      store_shared(memory.reference(stage.index) + r,
                   exists ? c.rows.reference[rows + r] : -hidden_score());
      store_shared(memory.delta(stage.index) + r, exists ? c.rows.delta[rows + r] : 0.0f);
    }
    sync_warp();
    if (lane == 0) arrive(memory.full(0, stage.index));
  }
}

// ---- the consumers -----------------------------------------------------------------------------

template <typename T, int kHeadDim, bool kOfKeys>
struct Sm90BackwardConsumer {
  using Shape = Sm90BackwardShape<kHeadDim, kOfKeys>;
  using Memory = Sm90BackwardMemory<kHeadDim, kOfKeys>;
  static constexpr int kM = Shape::kM, kN = Shape::kN, kStages = Shape::kStages;

  const BackwardCall& c;
  const Memory& memory;
  const Sm90Walk& walk;
  int first;                    // of the 64 rows
  int start;                    // of the tile
  int all_begin, all_end;       // what all of them see, or are seen by
  float s[kN / 2], dp[kN / 2];  // of lane / 4 and 8 further, of the tile
  uint32_t w[kN / 16][4];       // p, then ds, as first factors
  float sum[kHeadDim / 2];      // dk or dq
  float dv[kOfKeys ? kHeadDim / 2 : 1];
  float reference[2], delta[2];  // of dq's rows

  FASTATTN_DEVICE Sm90BackwardConsumer(const BackwardCall& call, const Memory& m, int group)
      : c(call), memory(m), walk(*m.walk()), first(walk.first + 64 * group) {
    start = walk.begin;
    all_begin = int(seen(first + 63).begin);
    all_end = int(seen(first).end);
    FASTATTN_UNROLL
    for (int n = 0; n < (kOfKeys ? 0 : 2); ++n) {
      const int i = row(n);
      const int64_t at = c.p.row(walk.batch, walk.head, i);
      reference[n] = i < c.p.q_len ? c.rows.reference[at] : -hidden_score();
      delta[n] = i < c.p.q_len ? c.rows.delta[at] : 0.0f;
    }
  }
  // The lane's rows of the block's tile, as queries or keys.
  FASTATTN_DEVICE int row(int n) const {
    return first + thread_x() / 32 % 4 * 16 + thread_x() % 32 / 4 + 8 * n;
  }
  FASTATTN_DEVICE uint64_t walked(int of, int stage) const {
    return tile_descriptor(memory.walked(of, stage), kN * kPanelRowBytes);
  }
  FASTATTN_DEVICE uint64_t owned(int of) const {
    return advanced(tile_descriptor(memory.owned(of), 0), (first - walk.first) * kPanelRowBytes);
  }

  // What the owned row sees, or is seen by.
  FASTATTN_DEVICE KeyRange seen(int own) const {
    return kOfKeys ? c.p.mask.any_queries(own, own + 1, c.p.q_len)
                   : c.p.mask.keys_of(own, c.p.k_len);
  }
  FASTATTN_DEVICE void hide() {
    FASTATTN_UNROLL
    for (int n = 0; n < 2; ++n) {
      const KeyRange range = seen(row(n));
      const int column = start + thread_x() % 4 * 2;
      const int begin = int(range.begin) - column, end = int(range.end) - column;
      FASTATTN_UNROLL
      for (int t = 0; t < kN / 8; ++t) FASTATTN_UNROLL
      for (int e = 0; e < 2; ++e)
        if (8 * t + e < begin || 8 * t + e >= end) s[4 * t + 2 * n + e] = hidden_score();
    }
  }
  FASTATTN_DEVICE RowPair pair_of(const float* rows, int t) const {
    return load_shared(reinterpret_cast<const RowPair*>(rows + 8 * t + thread_x() % 4 * 2));
  }
  FASTATTN_DEVICE void probabilities(int stage) {
    FASTATTN_UNROLL
    for (int t = 0; t < kN / 8; ++t) {
      RowPair of{};
      if (kOfKeys) of = pair_of(memory.reference(stage), t);
      FASTATTN_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& number = s[4 * t + i];
        number =
            exp2_fast(fmaf(number, c.p.factor, -(kOfKeys ? of.number[i % 2] : reference[i / 2])));
      }
    }
  }
  FASTATTN_DEVICE void differentiate(int stage) {
    FASTATTN_UNROLL
    for (int t = 0; t < kN / 8; ++t) {
      RowPair of{};
      if (kOfKeys) of = pair_of(memory.delta(stage), t);
      FASTATTN_UNROLL
      for (int i = 0; i < 4; ++i)
        dp[4 * t + i] =
            s[4 * t + i] * (dp[4 * t + i] - (kOfKeys ? of.number[i % 2] : delta[i / 2]));
    }
  }

  // sum += or = ds . c of the tile before, whose ds w holds.
  FASTATTN_DEVICE void issue_sum(int n) {
    const Stage<kStages> last{unsigned(n - 1)};
    pin(w);
    pin(sum);
    fence_products();
    issue_columns<T>(sum, w, walked(0, last.index), n > 1);
  }
  // That tile is done with.
  FASTATTN_DEVICE void release_last(int n) {
    pin(sum);
    pin(w);
    sync_warp();  // all lanes have read its lse and delta
    if (thread_x() % 32 == 0) arrive(memory.empty(Stage<kStages>{unsigned(n - 1)}.index));
  }
  // From the products of one tile to its ds in w, which the next step multiplies by c: as it does
  // here of the tile before. Nothing is under way at its end.
  template <bool kFirst>
  FASTATTN_DEVICE void step(int n) {
    const Stage<kStages> now{unsigned(n)};
    wait_barrier(memory.full(0, now.index), now.parity);
    pin(s);
    fence_products();
    issue_rows<T, kHeadDim, kM>(s, owned(0), walked(0, now.index));
    if (!kFirst) issue_sum(n);
    wait_barrier(memory.full(1, now.index), now.parity);
    pin(dp);
    fence_products();
    issue_rows<T, kHeadDim, kM>(dp, owned(1), walked(1, now.index));
    wait_products<kFirst ? 1 : 2>();
    pin(s);
    if (start < all_begin || start + kN > all_end) hide();
    start = start + kN < walk.end ? start + kN : walk.begin;
    probabilities(now.index);
    if constexpr (kOfKeys) {
      wait_products<1>();
      if (!kFirst) release_last(n);
      pack_fragments<T>(w, s);
      pin(w);
      pin(dv);
      fence_products();
      issue_columns<T>(dv, w, walked(1, now.index), !kFirst);
      wait_products<1>();
      pin(dp);
      differentiate(now.index);
      wait_products<0>();
      pin(dv);
      pin(w);
    } else {
      wait_products<0>();
      if (!kFirst) release_last(n);
      pin(dp);
      differentiate(now.index);
    }
    pack_fragments<T>(w, dp);
  }

  FASTATTN_DEVICE void run() {
    if (walk.total == 0) {
      FASTATTN_UNROLL
      for (float& number : sum) number = 0.0f;
      FASTATTN_UNROLL
      for (float& number : dv) number = 0.0f;
      return;
    }
    wait_barrier(memory.owned_full(0), 0);
    wait_barrier(memory.owned_full(1), 0);
    step<true>(0);
    FASTATTN_NO_UNROLL
    for (int n = 1; n < walk.total; ++n) step<false>(n);
    issue_sum(walk.total);
    wait_products<0>();
    pin(sum);
  }

  FASTATTN_DEVICE void store(const View& to, const float (&numbers)[kHeadDim / 2], int width,
                             float factor) const {
    T* head = static_cast<T*>(to.data) + walk.batch * to.stride[0] + walk.head * to.stride[1];
    const int length = kOfKeys ? c.p.k_len : c.p.q_len;
    FASTATTN_UNROLL
    for (int n = 0; n < 2; ++n)
      store_row(numbers, to && row(n) < length ? head + row(n) * to.stride[2] : nullptr, width, n,
                factor);
  }
  // The results; then again, with care, those that are not finite.
  FASTATTN_DEVICE void finish() {
    const Problem& p = c.p;
    int unsound = 0;
    FASTATTN_UNROLL
    for (int n = 0; n < 2; ++n) {
      float all = 0;
      FASTATTN_UNROLL
      for (int t = 0; t < kHeadDim / 8; ++t) {
        all += sum[4 * t + 2 * n] + sum[4 * t + 2 * n + 1];
        if (kOfKeys) all += dv[4 * t + 2 * n] + dv[4 * t + 2 * n + 1];
      }
      all = quad_sum(all);
      if (!is_finite(all) && row(n) < (kOfKeys ? p.k_len : p.q_len))
        unsound |= 1 << (8 * n + thread_x() % 32 / 4);
    }
    store(kOfKeys ? c.dk : c.dq, sum, p.head_dim, p.scale);
    if constexpr (kOfKeys) store(c.dv, dv, p.v_dim, 1.0f);
    for (int lanes = 16; lanes; lanes >>= 1) unsound |= shuffle_xor(unsound, lanes);
    if (!unsound) return;
    sync_warp();  // what is written again has been written
    FASTATTN_NO_UNROLL
    for (int r = 0; r < 16; ++r) {
      if (!(unsound >> r & 1)) continue;
      const int at = first + thread_x() / 32 % 4 * 16 + r;
      if (kOfKeys)
        careful_key<T>(c, walk.batch, walk.head, at, 0, kHeadDim);
      else
        careful_dq<T>(c, walk.batch, walk.head, at);
    }
  }
};

template <typename T, int kHeadDim, bool kOfKeys>
FASTATTN_DEVICE void backward(const Sm90BackwardCall& call) {
  using Shape = Sm90BackwardShape<kHeadDim, kOfKeys>;
  FASTATTN_SHARED(bytes);
  const Sm90BackwardMemory<kHeadDim, kOfKeys> memory{bytes};
  if (thread_x() == 0) memory.init(call.c);
  sync_threads();
  // The same in all lanes, which the compiler is to know.
  const int warp = shuffle(thread_x() / 32, 0), group = warp / 4;
  if (group == Shape::kGroups) {
    give_registers<Registers<Shape::kGroups>::kProducer>();
    if (thread_x() % kWarpgroup == 0) produce(call, memory);
    if constexpr (kOfKeys)
      if (warp % 4 == 1) produce_rows(call.c, memory);
  } else {
    take_registers<Registers<Shape::kGroups>::kConsumer>();
    Sm90BackwardConsumer<T, kHeadDim, kOfKeys> consumer(call.c, memory, group);
    consumer.run();
    consumer.finish();
  }
}

template <typename T, int kHeadDim>
FASTATTN_KERNEL((Sm90BackwardShape<kHeadDim, false>::kThreads), 1)
attention_dq_sm90_kernel(FASTATTN_PARAMS Sm90BackwardCall call) {
#if defined(FASTATTN_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  backward<T, kHeadDim, false>(call);
#endif
}

template <typename T, int kHeadDim>
FASTATTN_KERNEL((Sm90BackwardShape<kHeadDim, true>::kThreads), 1)
attention_dkdv_sm90_kernel(FASTATTN_PARAMS Sm90BackwardCall call) {
#if defined(FASTATTN_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  backward<T, kHeadDim, true>(call);
#endif
}

}  // namespace fastattn
