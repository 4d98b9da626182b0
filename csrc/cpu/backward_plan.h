// Who computes what in the backward pass. A unit is a KV head with all its query heads and keys;
// where that leaves threads idle, first the group of query heads is split, then the keys. A pure
// function of the call, so that results repeat at a given thread count.
#pragma once
#include "attention_plan.h"

namespace fastattn {
namespace {

struct BackwardPlan {
  // What threads may hold of dq, dk and dv before it is written.
  static constexpr int64_t kMaxBytes = int64_t(48) << 20;
  static constexpr int64_t kKeysApart = 1024;

  struct Unit {
    int64_t b, kv;
    KeyRange heads;  // query heads
    KeyRange keys;
  };

  const AttentionParams& p;
  int threads, group_splits = 1, key_splits = 1;
  bool dq_apart = false;        // make dq in a sweep of its own: more work, no copies
  int64_t max_keys;             // of a unit
  std::vector<int64_t> bounds;  // unit k of a head has the keys [bounds[k], bounds[k + 1])

  BackwardPlan(const AttentionParams& params, int key_block, int64_t number_bytes)
      : p(params), threads(useful_threads(params)) {
    const AttentionShape& s = p.shape;
    const int64_t heads = s.batch * s.kv_heads, blocks = (s.k_len + key_block - 1) / key_block;
    if (heads % threads != 0 && heads < 4 * threads) {
      group_splits = int(std::min<int64_t>(s.group(), (threads + heads - 1) / heads));
      const int64_t units = heads * group_splits;
      if (units % threads != 0 && units < 4 * threads) {
        // A unit that holds part of the keys has one query head: its part of dq is that head's.
        group_splits = int(s.group());
        const int64_t alone = heads * group_splits;
        if (alone % threads != 0)
          key_splits =
              int(std::min((2 * threads + alone - 1) / alone, std::max<int64_t>(blocks, 1)));
      }
    }
    split_keys(blocks, key_block);
    if (held() * number_bytes > kMaxBytes) {
      dq_apart = true;
      group_splits = 1;
      key_splits = int(std::max<int64_t>((2 * threads + heads - 1) / heads,
                                         (s.k_len + kKeysApart - 1) / kKeysApart));
      key_splits = int(std::min<int64_t>(key_splits, std::max<int64_t>(blocks, 1)));
      split_keys(blocks, key_block);
    }
  }

  // Numbers of dq, dk and dv that wait in memory at the same time.
  int64_t held() const {
    const AttentionShape& s = p.shape;
    const int64_t dq = (key_splits > 1 ? units() : threads) * s.q_len * s.head_dim;
    const bool gathers = group_splits > 1 || s.group() > group_splits;
    const int64_t dkv = (group_splits > 1 ? units() : threads) * max_keys * (s.head_dim + s.v_dim);
    return dq + (gathers ? dkv : 0);
  }

  // Bounds of equal work: a key costs as many scores as queries see it.
  void split_keys(int64_t blocks, int key_block) {
    const AttentionShape& s = p.shape;
    const auto work = [&](int64_t block) {
      const int64_t j = block * key_block;
      const KeyRange seen = p.mask.any_queries(j, std::min(s.k_len, j + key_block), s.q_len);
      return seen.end - seen.begin;
    };
    int64_t total = 0, done = 0, block = 0;
    for (int64_t n = 0; n < blocks; ++n) total += work(n);
    bounds.assign(1, 0);
    for (int k = 1; k < key_splits; ++k) {
      while (block < blocks && done * key_splits < total * k) done += work(block++);
      bounds.push_back(std::min(s.k_len, block * key_block));
    }
    bounds.push_back(s.k_len);
    max_keys = 0;
    for (int k = 0; k < key_splits; ++k) max_keys = std::max(max_keys, bounds[k + 1] - bounds[k]);
  }

  int64_t units() const { return p.shape.batch * p.shape.kv_heads * group_splits * key_splits; }

  Unit unit(int64_t n) const {
    const int64_t k = n % key_splits;
    n /= key_splits;
    const int64_t g = n % group_splits, group = p.shape.group();
    n /= group_splits;
    const int64_t kv = n % p.shape.kv_heads, first = kv * group;
    return {n / p.shape.kv_heads,
            kv,
            {first + group * g / group_splits, first + group * (g + 1) / group_splits},
            {bounds[k], bounds[k + 1]}};
  }
};

}  // namespace
}  // namespace fastattn
