// Who computes what in the forward pass: tiles of queries for each head, or, when queries are few,
// all queries of a KV head at once (decode); the keys are split where there would be too few items
// for the threads. A pure function of the call, so that results repeat at a given thread count.
#pragma once
#include <algorithm>
#include <vector>

#include "params.h"

namespace fastattn {
namespace {

// Below this many floating-point operations a second thread costs more than it brings.
constexpr double kFlopsPerThread = 2.5e5;

inline int useful_threads(const AttentionParams& p) {
  const AttentionShape& s = p.shape;
  const double flops = 2.0 * double(s.batch) * double(s.q_heads) * double(s.q_len) *
                       double(s.k_len) * double(s.head_dim + s.v_dim);
  return int(std::max(1.0, std::min(double(p.threads), flops / kFlopsPerThread)));
}

struct ForwardPlan {
  static constexpr int kDecodeQueries = 8, kDecodeRows = 64, kDecodeKeysPerSplit = 256;

  struct Item {
    int64_t b, h;  // decode: h is a KV head
    int64_t i;
    int rows;
    int split;
    KeyRange keys;
  };

  const AttentionParams& p;
  bool decode;
  int threads, splits;
  int64_t tile_rows, tiles;

  ForwardPlan(const AttentionParams& params, int sub_rows, int max_rows, int key_block)
      : p(params), threads(useful_threads(params)) {
    const AttentionShape& s = p.shape;
    decode = s.q_len <= kDecodeQueries && s.q_len * s.group() <= kDecodeRows;
    const int64_t heads = s.batch * (decode ? s.kv_heads : s.q_heads);
    const int64_t wanted = threads == 1 ? 1 : 4 * threads;  // enough to even out unequal items
    tiles = 1;
    if (!decode) {
      const int64_t most = (s.q_len + sub_rows - 1) / sub_rows;
      tiles = std::max((s.q_len + max_rows - 1) / max_rows, (wanted + heads - 1) / heads);
      tiles = std::min(tiles, most);
    }
    tile_rows = (s.q_len + tiles - 1) / tiles;
    tiles = (s.q_len + tile_rows - 1) / tile_rows;
    splits = 1;
    const int64_t items = heads * tiles, unit = decode ? kDecodeKeysPerSplit : key_block;
    if (threads > 1 && items % threads != 0 && items < wanted)
      splits = int(std::max<int64_t>(1, std::min((wanted + items - 1) / items, s.k_len / unit)));
  }

  int64_t items() const { return p.shape.batch * heads() * tiles * splits; }
  int64_t heads() const { return decode ? p.shape.kv_heads : p.shape.q_heads; }

  // Head by head, so that a head's keys stay in cache; the last queries first: with a causal mask
  // they have the most keys.
  Item item(int64_t n) const {
    Item at;
    at.split = int(n % splits);
    n /= splits;
    const int64_t tile = tiles - 1 - n % tiles;
    n /= tiles;
    at.h = n % heads();
    at.b = n / heads();
    at.i = tile * tile_rows;
    at.rows = int(std::min(tile_rows, p.shape.q_len - at.i));
    const KeyRange seen = p.mask.any_keys(at.i, at.i + at.rows, p.shape.k_len);
    const int64_t length = seen.end - seen.begin;
    at.keys = {seen.begin + length * at.split / splits,
               seen.begin + length * (at.split + 1) / splits};
    return at;
  }
};

}  // namespace
}  // namespace fastattn
