// Attention forward on tensor cores (sm_80 and up): the online softmax (Milakov and Gimelshein,
// 2018; Dao et al., 2022) with everything but K and V in registers.
//
// A block takes a tile of queries of one head through the keys they see. While it multiplies with a
// tile of K, its tile of V arrives, and while it multiplies with V, the next of K. Few queries
// (decoding) are taken together with those of the other heads that read the same keys: the rows of
// a tile are then (head, query) pairs. Where blocks are too few for the device, several share a
// row's keys, and a second kernel merges what they leave.
//
// Rows whose logits are too large for a difference of rounded numbers, or whose result is not
// finite, are done again by attention_careful.h.
#pragma once
#include "attention_careful.h"
#include "attention_tile.h"

namespace fastattn {

constexpr int kGroupedQueries = 16;           // of a head, at most, where rows are of several heads
constexpr float kLargeExponent = 1048576.0f;  // beyond it float32 has no digits left for p

struct Parts {
  float *acc, *max, *sum;  // (batch, heads, q_len, parts, v_dim), and without v_dim
  int count, chunk;        // keys of a part
};

struct ForwardCall {
  Problem p;
  float* lse;
  float* lse_low;
  Parts parts;
  bool grouped;
  int rows;      // of a walked head: queries, or (head, query) pairs
  int tiles;     // of a walked head
  int walked;    // heads of all batches, or KV heads where grouped
  int together;  // heads whose keys stay in cache together
};

// Each fragment of K and V that a warp fetches serves all its rows: the more the better, as far as
// the registers go.
template <int kHeadDim, bool kModified>
struct ForwardShape {
  static constexpr int kRowTiles = kHeadDim <= 128 && !kModified ? 2 : 1;  // of 16 rows, a warp
  static constexpr int kM = 16 * kAttentionWarps * kRowTiles;
  static constexpr int kN = kHeadDim <= (kModified ? 128 : 64) ? 64 : 32;
  static constexpr size_t kBytes = size_t(kM + 2 * kN) * kHeadDim * 2;
};

template <typename T, int kHeadDim, bool kModified>
struct Forward {
  using Shape = ForwardShape<kHeadDim, kModified>;
  static constexpr int kRowTiles = Shape::kRowTiles, kM = Shape::kM, kN = Shape::kN;
  static constexpr int kRows = 2 * kRowTiles;  // that a lane holds numbers of

  const ForwardCall& c;
  const Problem& p;
  int batch, kv_head, head0, tile, warp_row;
  float o[kRowTiles][kHeadDim / 8][4];
  float max[kRows], sum[kRows];  // sums are of this lane's numbers alone

  FASTATTN_DEVICE Forward(const ForwardCall& call, const TileOrder& at) : c(call), p(call.p) {
    const int heads = c.grouped ? p.kv_heads : p.heads;
    batch = at.head / heads;
    head0 = at.head % heads * (c.grouped ? p.group : 1);
    kv_head = head0 / p.group;
    tile = at.tile;
    warp_row = thread_x() / 32 * 16 * kRowTiles;
    FASTATTN_UNROLL
    for (int n = 0; n < kRows; ++n) {
      max[n] = hidden_score();
      sum[n] = 0.0f;
    }
    FASTATTN_UNROLL
    for (int r = 0; r < kRowTiles; ++r) FASTATTN_UNROLL
    for (int n = 0; n < kHeadDim / 8; ++n) FASTATTN_UNROLL
    for (int e = 0; e < 4; ++e) o[r][n][e] = 0.0f;
  }

  // Row n of a lane's, as a row of the tile: rows lane / 4 and 8 further, 16 further, ...
  FASTATTN_DEVICE int row(int n) const { return warp_row + thread_x() % 32 / 4 + 8 * n; }
  FASTATTN_DEVICE int query(int r) const {
    if (!c.grouped) return r;
    return r < c.rows ? r % p.q_len : p.q_len;
  }
  FASTATTN_DEVICE int head(int r) const {
    if (!c.grouped) return head0;
    const int n = r / p.q_len;
    return head0 + (n < p.group ? n : p.group - 1);
  }
  FASTATTN_DEVICE bool has_rows() const { return tile * kM + warp_row < c.rows; }

  // q.k to scores, -inf where hidden.
  FASTATTN_DEVICE void scores(float (&x)[kRowTiles][kN / 8][4], int start) {
    FASTATTN_UNROLL
    for (int n = 0; n < kRows; ++n) {
      const int i = query(tile * kM + row(n));
      const int h = kModified ? head(tile * kM + row(n)) : 0;
      const float slope = kModified ? p.slope(batch, h) : 0.0f;
      FASTATTN_UNROLL
      for (int t = 0; t < kN / 8; ++t) FASTATTN_UNROLL
      for (int e = 0; e < 2; ++e) {
        float& score = x[n / 2][t][n % 2 * 2 + e];
        const int j = start + 8 * t + thread_x() % 4 * 2 + e;
        const bool there = p.sees(i, j);
        if (kModified && there) {
          float tanh;
          score = p.logit(score, slope, batch, h, i, j, tanh);
        }
        if (!there) score = hidden_score();
      }
    }
  }

  // Scores to probabilities, of which o and sum take their share.
  FASTATTN_DEVICE void probabilities(float (&x)[kRowTiles][kN / 8][4], int start) {
    FASTATTN_UNROLL
    for (int n = 0; n < kRows; ++n) {
      float top = max[n];
      FASTATTN_UNROLL
      for (int t = 0; t < kN / 8; ++t)
        top = fmaxf(top, fmaxf(x[n / 2][t][n % 2 * 2], x[n / 2][t][n % 2 * 2 + 1]));
      top = quad_max(top);
      // A row that has seen nothing yet is all -inf: any finite reference makes zeros of it.
      const float reference = is_hidden(top) ? 0.0f : top;
      const float alpha = exp2_fast((max[n] - reference) * p.factor);
      max[n] = top;
      sum[n] *= alpha;
      const float scaled = reference * p.factor;
      FASTATTN_UNROLL
      for (int t = 0; t < kN / 8; ++t) FASTATTN_UNROLL
      for (int e = 0; e < 2; ++e) {
        float& number = x[n / 2][t][n % 2 * 2 + e];
        number = kModified ? exp2_fast((number - reference) * p.factor)
                           : exp2_fast(fmaf(number, p.factor, -scaled));
        sum[n] += number;
      }
      FASTATTN_UNROLL
      for (int t = 0; t < kHeadDim / 8; ++t) {
        o[n / 2][t][n % 2 * 2] *= alpha;
        o[n / 2][t][n % 2 * 2 + 1] *= alpha;
      }
    }
    if (kModified && p.dropout.on) drop(x, start);
  }

  FASTATTN_DEVICE void drop(float (&x)[kRowTiles][kN / 8][4], int start) const {
    FASTATTN_UNROLL
    for (int n = 0; n < kRows; ++n) {
      const int r = tile * kM + row(n);
      FASTATTN_UNROLL
      for (int t = 0; t < kN / 8; ++t) {
        const int j = start + 8 * t + thread_x() % 4 * 2;
        const Philox random = p.dropout.words(batch, head(r), query(r), j);
        const bool second = (j & 2) != 0;
        const uint32_t w0 = second ? random.word[2] : random.word[0];
        const uint32_t w1 = second ? random.word[3] : random.word[1];
        if (w0 < p.dropout.threshold) x[n / 2][t][n % 2 * 2] = 0.0f;
        if (w1 < p.dropout.threshold) x[n / 2][t][n % 2 * 2 + 1] = 0.0f;
      }
    }
  }
};

template <typename T, int kHeadDim, bool kModified>
FASTATTN_KERNEL(kAttentionThreads, 1)
attention_forward_kernel(FASTATTN_PARAMS ForwardCall c) {
  using Walk = Forward<T, kHeadDim, kModified>;
  constexpr int kM = Walk::kM, kN = Walk::kN, kRowTiles = Walk::kRowTiles, kRows = Walk::kRows;
  FASTATTN_SHARED(memory);
  const Tile<kM, kHeadDim> q_tile{memory};
  const Tile<kN, kHeadDim> k_tile{memory + q_tile.kBytes};
  const Tile<kN, kHeadDim> v_tile{memory + q_tile.kBytes + k_tile.kBytes};
  const Problem& p = c.p;
  Walk state(c, TileOrder(block_x(), c.tiles, c.walked, c.together));
  const int first_row = state.tile * kM;

  const int i_begin = c.grouped ? 0 : first_row;
  const int i_end = c.grouped || first_row + kM > p.q_len ? p.q_len : first_row + kM;
  const int part = block_y();
  const int64_t part_end = int64_t(part + 1) * c.parts.chunk;
  const KeyWalk keys(p, i_begin, i_end, kN, part * c.parts.chunk,
                     part_end < p.k_len ? int(part_end) : p.k_len);

  const T* q_data = static_cast<const T*>(p.q.data) + state.batch * p.q.stride[0];
  copy_tile(q_tile, p.head_dim, p.q.stride[3], p.q_aligned, q_data, [&](int r) -> const T* {
    const int i = state.query(first_row + r);
    return i < p.q_len ? q_data + state.head(first_row + r) * p.q.stride[1] + i * p.q.stride[2]
                       : nullptr;
  });
  commit_copies();  // it may be all that there is to wait for
  const auto fetch = [&](const Tile<kN, kHeadDim>& tile, const View& v, int start, int width,
                         bool aligned) {
    copy_rows<T>(tile, v, state.batch, state.kv_head, start, p.k_len, width, aligned);
    commit_copies();
  };
  if (keys.begin < keys.end) fetch(k_tile, p.k, keys.begin, p.head_dim, p.k_aligned);
  for (int start = keys.begin; start < keys.end; start += kN) {
    wait_copies<0>();
    sync_threads();  // K has arrived, and nobody reads V any more
    fetch(v_tile, p.v, start, p.v_dim, p.v_aligned);
    float x[kRowTiles][kN / 8][4];
    if (state.has_rows()) multiply_rows<T, kRowTiles, kN>(x, q_tile, state.warp_row, k_tile);
    wait_copies<0>();
    sync_threads();  // V has arrived, and nobody reads K any more
    if (start + kN < keys.end) fetch(k_tile, p.k, start + kN, p.head_dim, p.k_aligned);
    if (!state.has_rows()) continue;
    if (kModified || keys.masked(start)) state.scores(x, start);
    state.probabilities(x, start);
    multiply_columns<T, kRowTiles, kN, kHeadDim>(state.o, x, v_tile, 0);
  }
  wait_copies<0>();
  sync_threads();  // q has arrived everywhere, also where there were no keys

  uint32_t unsound = 0;  // rows of the warp
  FASTATTN_UNROLL
  for (int n = 0; n < kRows; ++n) {
    state.sum[n] = quad_sum(state.sum[n]);
    float all = state.sum[n];
    FASTATTN_UNROLL
    for (int t = 0; t < kHeadDim / 8; ++t)
      all += state.o[n / 2][t][n % 2 * 2] + state.o[n / 2][t][n % 2 * 2 + 1];
    const bool large =
        fabsf(state.max[n]) * fabsf(p.factor) > kLargeExponent && !is_hidden(state.max[n]);
    all = quad_sum(all);
    if (large || !is_finite(all)) unsound |= 1u << (8 * n + thread_x() % 32 / 4);
  }

  if (c.parts.count > 1) {
    FASTATTN_UNROLL
    for (int n = 0; n < kRows; ++n) {
      const int r = first_row + state.row(n), i = state.query(r);
      if (i >= p.q_len) continue;
      const int64_t at = p.row(state.batch, state.head(r), i) * c.parts.count + part;
      if (thread_x() % 4 == 0) {
        const bool sound = !(unsound >> (8 * n + thread_x() % 32 / 4) & 1);
        c.parts.max[at] =
            sound ? state.max[n] * (kModified ? 1.0f : p.scale) : float_of(0x7FC00000u);
        c.parts.sum[at] = state.sum[n];
      }
      FASTATTN_UNROLL
      for (int t = 0; t < kHeadDim / 8; ++t) FASTATTN_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int d = 8 * t + thread_x() % 4 * 2 + e;
        if (d < p.v_dim) c.parts.acc[at * p.v_dim + d] = state.o[n / 2][t][n % 2 * 2 + e];
      }
    }
    return;
  }

  float factor[kRows];
  FASTATTN_UNROLL
  for (int n = 0; n < kRows; ++n) {
    const int r = first_row + state.row(n), i = state.query(r), h = state.head(r);
    const RowEnd row_end(p, h, state.max[n] * (kModified ? 1.0f : p.scale), state.sum[n]);
    factor[n] = row_end.factor;
    if (i < p.q_len && thread_x() % 4 == 0) c.lse[p.row(state.batch, h, i)] = row_end.lse;
  }
  // Through the rows of q that this warp alone has read, so that they leave in whole chunks.
  sync_warp();
  FASTATTN_UNROLL
  for (int r = 0; r < kRowTiles; ++r)
    fragments_to_tile<T, kHeadDim>(q_tile, state.warp_row + 16 * r, 0, state.o[r], factor[2 * r],
                                   factor[2 * r + 1]);
  sync_warp();
  T* out = static_cast<T*>(p.out.data) + state.batch * p.out.stride[0];
  store_rows<T, 16 * kRowTiles, kHeadDim / 8>(
      q_tile, state.warp_row, 0, p.v_dim, p.out.stride[3], p.out_aligned, [&](int r) -> T* {
        const int i = state.query(first_row + r);
        return i < p.q_len ? out + state.head(first_row + r) * p.out.stride[1] + i * p.out.stride[2]
                           : nullptr;
      });

  for (int lanes = 16; lanes; lanes >>= 1) unsound |= shuffle_xor(unsound, lanes);
  if (!unsound) return;
  sync_warp();  // what is written again has been written
  for (int r = 0; r < 16 * kRowTiles; ++r) {
    const int i = state.query(first_row + state.warp_row + r);
    if (!(unsound >> r & 1) || i >= p.q_len) continue;
    careful_row<T>(p, c.lse, state.batch, state.head(first_row + state.warp_row + r), i);
  }
}

// A warp: one row from its parts.
template <typename T>
FASTATTN_KERNEL(kAttentionThreads, 1)
attention_merge_kernel(FASTATTN_PARAMS ForwardCall c) {
  const Problem& p = c.p;
  const int lane = thread_x() % 32;
  const int64_t row = int64_t(block_x()) * kAttentionWarps + thread_x() / 32;
  if (row >= int64_t(p.batch) * p.heads * p.q_len) return;
  const int i = int(row % p.q_len), h = int(row / p.q_len % p.heads);
  const int b = int(row / p.q_len / p.heads);
  const float* maxima = c.parts.max + row * c.parts.count;
  float max = hidden_score(), all = 0;
  for (int n = 0; n < c.parts.count; ++n) {
    max = fmaxf(max, maxima[n]);
    if (!is_hidden(maxima[n])) all += maxima[n];
  }
  if (!is_finite(all)) {
    careful_row<T>(p, c.lse, b, h, i);
    return;
  }
  const float reference = is_hidden(max) ? 0.0f : max;
  float sum = 0;
  for (int n = 0; n < c.parts.count; ++n)
    sum += exp2f((maxima[n] - reference) * kLog2e) * c.parts.sum[row * c.parts.count + n];
  const RowEnd end(p, h, max, sum);
  if (lane == 0) c.lse[row] = end.lse;
  T* out = const_cast<T*>(row_of<T>(p.out, b, h, i));
  for (int d = lane; d < p.v_dim; d += 32) {
    float acc = 0;
    for (int n = 0; n < c.parts.count; ++n)
      acc += exp2f((maxima[n] - reference) * kLog2e) *
             c.parts.acc[(row * c.parts.count + n) * p.v_dim + d];
    out[d * p.out.stride[3]] = from_float<T>(acc * end.factor);
  }
}

// Launches the forward of one head dim: attention_forward.cu is compiled once for each.
template <int kHeadDim>
void attention_forward_of(DType dtype, const ForwardCall& call, const Device& device);

}  // namespace fastattn
