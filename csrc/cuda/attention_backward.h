// Attention backward on tensor cores (Dao et al., 2022): the probabilities are made again from lse,
// tile by tile. With p the probabilities, o the output and l the lse,
//   dv_j = sum_i drop(p_ij) do_i              dp_ij = drop(do_i . v_j)
//   dlogit_ij = p_ij (dp_ij - delta_i)        delta_i = do_i . o_i - dl_i
//   ds_ij = dlogit_ij * dlogit/ds             dq_i = sum_j ds_ij k_j,   dk_j = sum_i ds_ij q_i
// First delta, row by row; then dq, a tile of queries through its keys; then dk and dv, a tile of
// keys through the queries of all heads that read it; and dbias, a tile of it through what it is
// shared by. Every sum is one block's, in a fixed order: no atomics.
//
// Where lse has no room for the logarithm of the sum (say -3e38, from a bias of the smallest float)
// the tiles have NaN for it. A row of a result that is not finite is made again number by number.
#pragma once
#include "attention_careful.h"
#include "attention_tile.h"

namespace fastattn {

constexpr float kInexactLse = 800.0f;  // rounded by more than 1e-4 of a probability

// What the backward knows of each query: float32 (batch, heads, q_len).
struct RowNumbers {
  float* delta;
  float* reference;   // p = exp2(factor * x - reference): lse; inf where no key is seen
  float *high, *low;  // p = exp2((logit - high) * log2(e) - low), where that is NaN
};

struct BackwardCall {
  Problem p;
  const float *lse, *dlse;
  RowNumbers rows;
  float* delta_out;  // as rows.delta, plus dlse: what the caller asked for
  View dq, dk, dv, dbias;
  bool dq_aligned, dk_aligned, dv_aligned;
  int tiles, walked, together;  // of the kernel at hand: tiles of a head, heads; see TileOrder
  int own_batches, own_heads;   // of dbias
  bool shares_queries, shares_keys;
};

template <int kHeadDim>
struct BackwardShape {
  static constexpr int kM = 16 * kAttentionWarps;          // what a block owns: queries, or keys
  static constexpr int kN = kHeadDim <= 64 ? 64 : 32;      // what it walks through
  static constexpr int kStages = kHeadDim <= 128 ? 2 : 1;  // tiles of them in shared memory
  static constexpr int kColumns = kHeadDim <= 128 ? kHeadDim : kHeadDim / 2;  // of dk and dv
  static constexpr size_t kBytes = size_t(2 * kM + 2 * kN * kStages) * kHeadDim * 2;
  static constexpr size_t kRowBytes = size_t(2 * kM) * kHeadDim * 2;
  static constexpr size_t kBiasBytes = size_t(2 * kM + 2 * kN) * kHeadDim * 2;
};

// ---- one element -------------------------------------------------------------------------------

// From q.k and do.v to ds and to what of p dropout leaves; both 0 where the key is hidden. kOfBias:
// to dlogit, since the bias comes behind the softcap.
template <bool kModified, bool kOfBias>
FASTATTN_DEVICE void differentiate(const Problem& p, float& x, float& dp, float reference,
                                   float delta, float slope, int b, int h, int i, int j, bool there,
                                   bool keep) {
  float tanh = 0.0f;
  if (kModified && there) x = p.logit(x, slope, b, h, i, j, tanh);
  const bool seen = there && !is_hidden(x);
  const float probability = exp2_fast(fmaf(x, p.factor, -reference));
  float up = dp, left = probability;
  if (kModified && p.dropout.on) {
    up = keep ? dp * p.dropout.scale : 0.0f;
    left = keep ? probability * p.dropout.scale : 0.0f;
  }
  float ds = probability * (up - delta);
  if (kModified && !kOfBias) ds *= 1.0f - tanh * tanh;
  x = seen ? ds : 0.0f;
  dp = seen ? left : 0.0f;
}

struct CarefulPair {
  float dlogit, ds, left;
  bool seen;
};

template <typename T>
FASTATTN_NOINLINE_DEVICE CarefulPair careful_pair(const BackwardCall& c, int b, int h, int i,
                                                  int j) {
  note_rare("careful pair");
  const Problem& p = c.p;
  float tanh;
  const float x = careful_logit<T>(p, b, h, i, j, &tanh);
  if (is_hidden(x) || !p.sees(i, j)) return {0.0f, 0.0f, 0.0f, false};
  const int64_t row = p.row(b, h, i);
  const float probability = exp2f((x - c.rows.high[row]) * kLog2e - c.rows.low[row]);
  float up = dot_of(row_of<T>(p.dout, b, h, i), p.dout.stride[3], row_of<T>(p.v, b, h / p.group, j),
                    p.v.stride[3], p.v_dim);
  float left = probability;
  if (p.dropout.on) {
    const bool keep = p.dropout.keeps(b, h, i, j);
    up = keep ? up * p.dropout.scale : 0.0f;
    left = keep ? left * p.dropout.scale : 0.0f;
  }
  const float dlogit = probability * (up - c.rows.delta[row]);
  return {dlogit, dlogit * (1.0f - tanh * tanh), left, true};
}

// ---- row by row --------------------------------------------------------------------------------

// The numbers of a tile of queries.
template <typename T, int kHeadDim>
FASTATTN_KERNEL(kAttentionThreads, 1)
attention_rows_kernel(FASTATTN_PARAMS BackwardCall c) {
  constexpr int kM = BackwardShape<kHeadDim>::kM;
  FASTATTN_SHARED(memory);
  const Tile<kM, kHeadDim> out{memory}, dout{memory + out.kBytes};
  const Problem& p = c.p;
  const int number = block_x() / c.tiles, first = block_x() % c.tiles * kM;
  const int b = number / p.heads, h = number % p.heads, lane = thread_x() % 32;
  copy_rows<T>(out, p.out, b, h, first, p.q_len, p.v_dim, p.out_aligned);
  copy_rows<T>(dout, p.dout, b, h, first, p.q_len, p.v_dim, p.dout_aligned);
  commit_copies();
  wait_copies<0>();
  sync_threads();
  // do_i . o_i by the same instructions as do_i . v_j: where one key is seen they cancel.
  const int warp_row = thread_x() / 32 * 16;
  float product[1][2][4];
  multiply_rows<T, 1, 16>(product, dout, warp_row, out, warp_row);
  for (int half = 0; half < 2; ++half) {
    const int i = first + warp_row + 8 * half + lane / 4;
    const int64_t row = p.row(b, h, i);
    const bool mine = lane % 4 == lane / 4 / 2 && i < p.q_len;  // the lane of the diagonal
    bool inexact = false;
    if (mine) {
      const float dot = lane / 4 % 2 ? product[0][half][2 * half + 1] : product[0][half][2 * half];
      const float lse = c.lse[row];
      const float reference = is_hidden(lse) ? -lse : lse * kLog2e;
      inexact = fabsf(lse) > kInexactLse && is_finite(lse);
      c.rows.delta[row] = dot - (c.dlse ? c.dlse[row] : 0.0f);
      if (c.delta_out) c.delta_out[row] = dot;
      c.rows.reference[row] = inexact ? float_of(0x7FC00000u) : reference;
      c.rows.high[row] = 0.0f;
      c.rows.low[row] = reference;
    }
    for (int r = 0; r < 8; ++r) {
      if (!shuffle(int(inexact), r * 4 + r / 2)) continue;
      const int query = first + warp_row + 8 * half + r;
      const CarefulSum all = careful_sum<T>(p, b, h, query);
      if (lane != r * 4 + r / 2) continue;
      const float high = is_hidden(all.max) ? 0.0f : all.max;
      const float sum = all.sum + (p.sinks ? exp2f((p.sinks[h] - high) * kLog2e) : 0.0f);
      c.rows.high[row] = high;
      c.rows.low[row] = log2f(sum);
    }
  }
}

// ---- dq ----------------------------------------------------------------------------------------

// dq of one row; a warp.
template <typename T>
FASTATTN_NOINLINE_DEVICE void careful_dq(const BackwardCall& c, int b, int h, int i) {
  const Problem& p = c.p;
  const int lane = thread_x() % 32;
  const KeyRange keys = p.mask.keys_of(i, p.k_len);
  T* dq = const_cast<T*>(row_of<T>(c.dq, b, h, i));
  for (int d = lane; d - lane < p.head_dim; d += 32) {
    float acc = 0;
    for (int first = int(keys.begin); first < int(keys.end); first += 32) {
      CarefulPair pair{0.0f, 0.0f, 0.0f, false};
      if (first + lane < int(keys.end)) pair = careful_pair<T>(c, b, h, i, first + lane);
      for (int n = 0; n < 32; ++n) {
        const float ds = shuffle(pair.ds, n);
        const bool seen = shuffle(int(pair.seen), n) != 0;
        if (!seen || d >= p.head_dim) continue;
        acc += ds * to_float(row_of<T>(p.k, b, h / p.group, first + n)[d * p.k.stride[3]]);
      }
    }
    if (d < p.head_dim) dq[d * c.dq.stride[3]] = from_float<T>(acc * p.scale);
  }
}

// ds of a tile, in place of x = q.k, for the two queries of a lane; dp becomes what dropout leaves
// of p.
template <bool kModified, bool kOfBias, int kN>
FASTATTN_DEVICE void differentiate_rows(const BackwardCall& c, float (&x)[1][kN / 8][4],
                                        float (&dp)[1][kN / 8][4], const float (&reference)[2],
                                        const float (&delta)[2], int b, int h, int first_query,
                                        int start, bool masked) {
  const Problem& p = c.p;
  const float slope = kModified ? p.slope(b, h) : 0.0f;
  FASTATTN_UNROLL
  for (int n = 0; n < 2; ++n) {
    const int i = first_query + 8 * n;
    FASTATTN_UNROLL
    for (int t = 0; t < kN / 8; ++t) {
      const int j = start + 8 * t + thread_x() % 4 * 2;
      uint32_t w0 = 0, w1 = 0;
      if (kModified && p.dropout.on) {
        const Philox random = p.dropout.words(b, h, i, j);
        w0 = j & 2 ? random.word[2] : random.word[0];
        w1 = j & 2 ? random.word[3] : random.word[1];
      }
      FASTATTN_UNROLL
      for (int e = 0; e < 2; ++e) {
        const bool there = !masked || p.sees(i, j + e);
        differentiate<kModified, kOfBias>(p, x[0][t][2 * n + e], dp[0][t][2 * n + e], reference[n],
                                          delta[n], slope, b, h, i, j + e, there,
                                          (e ? w1 : w0) >= p.dropout.threshold);
      }
    }
  }
}

template <typename T, int kHeadDim, bool kModified>
FASTATTN_KERNEL(kAttentionThreads, 1)
attention_dq_kernel(FASTATTN_PARAMS BackwardCall c) {
  using Shape = BackwardShape<kHeadDim>;
  constexpr int kM = Shape::kM, kN = Shape::kN, kStages = Shape::kStages;
  FASTATTN_SHARED(memory);
  const Tile<kM, kHeadDim> q{memory}, dout{memory + q.kBytes};
  unsigned char* walked = memory + 2 * q.kBytes;
  const auto k_tile = [&](int n) {
    return Tile<kN, kHeadDim>{walked + n % kStages * 2 * Tile<kN, kHeadDim>::kBytes};
  };
  const auto v_tile = [&](int n) {
    return Tile<kN, kHeadDim>{k_tile(n).base + Tile<kN, kHeadDim>::kBytes};
  };
  const Problem& p = c.p;
  // The last tiles of all heads first: under a causal mask they see the most keys.
  const int first = (c.tiles - 1 - block_x() / c.walked) * kM, number = block_x() % c.walked;
  const int b = number / p.heads, h = number % p.heads, kv_head = h / p.group;
  const int warp_row = thread_x() / 32 * 16, first_query = first + warp_row + thread_x() % 32 / 4;
  const int last = first + kM < p.q_len ? first + kM : p.q_len;
  const KeyWalk keys(p, first, last, kN, 0, p.k_len);

  copy_rows<T>(q, p.q, b, h, first, p.q_len, p.head_dim, p.q_aligned);
  copy_rows<T>(dout, p.dout, b, h, first, p.q_len, p.v_dim, p.dout_aligned);
  const auto fetch = [&](int start, int n) {
    copy_rows<T>(k_tile(n), p.k, b, kv_head, start, p.k_len, p.head_dim, p.k_aligned);
    copy_rows<T>(v_tile(n), p.v, b, kv_head, start, p.k_len, p.v_dim, p.v_aligned);
    commit_copies();
  };
  commit_copies();
  if (keys.begin < keys.end) fetch(keys.begin, 0);

  float reference[2], delta[2];
  FASTATTN_UNROLL
  for (int n = 0; n < 2; ++n) {
    const int i = first_query + 8 * n;
    reference[n] = i < p.q_len ? c.rows.reference[p.row(b, h, i)] : -hidden_score();
    delta[n] = i < p.q_len ? c.rows.delta[p.row(b, h, i)] : 0.0f;
  }
  float dq[1][kHeadDim / 8][4] = {};
  int n = 0;
  for (int start = keys.begin; start < keys.end; start += kN, ++n) {
    wait_copies<0>();
    sync_threads();  // these tiles have arrived, and nobody reads the last ones any more
    const bool more = start + kN < keys.end;
    if (kStages > 1 && more) fetch(start + kN, n + 1);
    float x[1][kN / 8][4], dp[1][kN / 8][4];
    multiply_rows<T, 1, kN>(x, q, warp_row, k_tile(n));
    multiply_rows<T, 1, kN>(dp, dout, warp_row, v_tile(n));
    differentiate_rows<kModified, false, kN>(c, x, dp, reference, delta, b, h, first_query, start,
                                             kModified || keys.masked(start));
    multiply_columns<T, 1, kN, kHeadDim>(dq, x, k_tile(n), 0);
    if (kStages == 1 && more) {
      sync_threads();  // everyone is done with the only tiles
      fetch(start + kN, n + 1);
    }
  }
  wait_copies<0>();
  sync_threads();  // everything has arrived everywhere, also where there was nothing to walk

  int unsound = 0;
  FASTATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    float all = 0;
    FASTATTN_UNROLL
    for (int t = 0; t < kHeadDim / 8; ++t) all += dq[0][t][2 * half] + dq[0][t][2 * half + 1];
    all = quad_sum(all);
    if (!is_finite(all)) unsound |= 1 << (8 * half + thread_x() % 32 / 4);
  }
  sync_warp();  // the rows of q are this warp's alone
  fragments_to_tile<T, kHeadDim>(q, warp_row, 0, dq[0], p.scale, p.scale);
  sync_warp();
  T* out = static_cast<T*>(c.dq.data) + b * c.dq.stride[0] + h * c.dq.stride[1];
  store_rows<T, 16, kHeadDim / 8>(
      q, warp_row, 0, p.head_dim, c.dq.stride[3], c.dq_aligned, [&](int r) -> T* {
        return first + r < p.q_len ? out + int64_t(first + r) * c.dq.stride[2] : nullptr;
      });
  for (int lanes = 16; lanes; lanes >>= 1) unsound |= shuffle_xor(unsound, lanes);
  if (!unsound) return;
  sync_warp();
  for (int r = 0; r < 16; ++r)
    if ((unsound >> r & 1) && first + warp_row + r < p.q_len)
      careful_dq<T>(c, b, h, first + warp_row + r);
}

// ---- dk and dv ---------------------------------------------------------------------------------

// Columns [begin, end) of dk and dv of one key; a warp.
template <typename T>
FASTATTN_NOINLINE_DEVICE void careful_key(const BackwardCall& c, int b, int kv_head, int j,
                                          int begin, int end) {
  const Problem& p = c.p;
  const int lane = thread_x() % 32;
  const KeyRange queries = p.mask.any_queries(j, j + 1, p.q_len);
  for (int d = begin + lane; d - lane < end; d += 32) {
    float dk = 0, dv = 0;
    for (int h = kv_head * p.group; h < (kv_head + 1) * p.group; ++h)
      for (int first = int(queries.begin); first < int(queries.end); first += 32) {
        CarefulPair pair{0.0f, 0.0f, 0.0f, false};
        if (first + lane < int(queries.end)) pair = careful_pair<T>(c, b, h, first + lane, j);
        for (int n = 0; n < 32; ++n) {
          const float ds = shuffle(pair.ds, n), left = shuffle(pair.left, n);
          const bool seen = shuffle(int(pair.seen), n) != 0;
          if (!seen || d >= end) continue;
          if (d < p.head_dim)
            dk += ds * to_float(row_of<T>(p.q, b, h, first + n)[d * p.q.stride[3]]);
          if (d < p.v_dim)
            dv += left * to_float(row_of<T>(p.dout, b, h, first + n)[d * p.dout.stride[3]]);
        }
      }
    if (d >= end) continue;
    if (c.dk && d < p.head_dim)
      const_cast<T*>(row_of<T>(c.dk, b, kv_head, j))[d * c.dk.stride[3]] =
          from_float<T>(dk * p.scale);
    if (c.dv && d < p.v_dim)
      const_cast<T*>(row_of<T>(c.dv, b, kv_head, j))[d * c.dv.stride[3]] = from_float<T>(dv);
  }
}

// As differentiate_rows, of a transposed tile: its rows are the two keys of a lane.
template <bool kModified, int kN>
FASTATTN_DEVICE void differentiate_keys(const BackwardCall& c, float (&x)[1][kN / 8][4],
                                        float (&dp)[1][kN / 8][4], int b, int h, int first_key,
                                        int start, bool masked) {
  const Problem& p = c.p;
  const float slope = kModified ? p.slope(b, h) : 0.0f;
  const int64_t rows = p.row(b, h, 0);
  FASTATTN_UNROLL
  for (int t = 0; t < kN / 8; ++t) FASTATTN_UNROLL
  for (int e = 0; e < 2; ++e) {
    const int i = start + 8 * t + thread_x() % 4 * 2 + e;
    const bool exists = i < p.q_len;
    const float reference = exists ? c.rows.reference[rows + i] : -hidden_score();
    const float delta = exists ? c.rows.delta[rows + i] : 0.0f;
    FASTATTN_UNROLL
    for (int n = 0; n < 2; ++n) {
      const int j = first_key + 8 * n;
      const bool there = !masked || p.sees(i, j);
      const bool keep = !kModified || !p.dropout.on || p.dropout.keeps(b, h, i, j);
      differentiate<kModified, false>(p, x[0][t][2 * n + e], dp[0][t][2 * n + e], reference, delta,
                                      slope, b, h, i, j, there, keep);
    }
  }
}

template <typename T, int kHeadDim, bool kModified>
FASTATTN_KERNEL(kAttentionThreads, 1)
attention_dkdv_kernel(FASTATTN_PARAMS BackwardCall c) {
  using Shape = BackwardShape<kHeadDim>;
  constexpr int kM = Shape::kM, kN = Shape::kN, kStages = Shape::kStages;
  constexpr int kColumns = Shape::kColumns;
  FASTATTN_SHARED(memory);
  const Tile<kM, kHeadDim> k{memory}, v{memory + k.kBytes};
  unsigned char* walked = memory + 2 * k.kBytes;
  const auto q_tile = [&](int n) {
    return Tile<kN, kHeadDim>{walked + n % kStages * 2 * Tile<kN, kHeadDim>::kBytes};
  };
  const auto dout_tile = [&](int n) {
    return Tile<kN, kHeadDim>{q_tile(n).base + Tile<kN, kHeadDim>::kBytes};
  };
  const Problem& p = c.p;
  // The first tiles of all heads first: under a causal mask the most queries see them.
  const int first = block_x() / c.walked * kM, number = block_x() % c.walked;
  const int b = number / p.kv_heads, kv_head = number % p.kv_heads;
  const int column = block_y() * kColumns, warp_row = thread_x() / 32 * 16;
  const int first_key = first + warp_row + thread_x() % 32 / 4;
  const int last = first + kM < p.k_len ? first + kM : p.k_len;
  const KeyRange queries = p.mask.any_queries(first, last, p.q_len);
  const int begin = int(queries.begin) / kN * kN, end = int(queries.end);
  const int steps = end > begin ? (end - begin + kN - 1) / kN : 0;  // of a head

  copy_rows<T>(k, p.k, b, kv_head, first, p.k_len, p.head_dim, p.k_aligned);
  copy_rows<T>(v, p.v, b, kv_head, first, p.k_len, p.v_dim, p.v_aligned);
  const auto fetch = [&](int n) {
    const int h = kv_head * p.group + n / steps, start = begin + n % steps * kN;
    copy_rows<T>(q_tile(n), p.q, b, h, start, p.q_len, p.head_dim, p.q_aligned);
    copy_rows<T>(dout_tile(n), p.dout, b, h, start, p.q_len, p.v_dim, p.dout_aligned);
    commit_copies();
  };
  commit_copies();
  const int total = steps * p.group;
  if (total) fetch(0);

  float dk[1][kColumns / 8][4] = {}, dv[1][kColumns / 8][4] = {};
  for (int n = 0; n < total; ++n) {
    wait_copies<0>();
    sync_threads();  // these tiles have arrived, and nobody reads the last ones any more
    if (kStages > 1 && n + 1 < total) fetch(n + 1);
    const int h = kv_head * p.group + n / steps, start = begin + n % steps * kN;
    const int stop = start + kN < p.q_len ? start + kN : p.q_len;
    const KeyRange all = p.mask.all_keys(start, stop, p.k_len);
    const bool masked =
        kModified || first < all.begin || first + kM > all.end || start + kN > p.q_len;
    float x[1][kN / 8][4], dp[1][kN / 8][4];
    multiply_rows<T, 1, kN>(x, k, warp_row, q_tile(n));
    multiply_rows<T, 1, kN>(dp, v, warp_row, dout_tile(n));
    differentiate_keys<kModified, kN>(c, x, dp, b, h, first_key, start, masked);
    multiply_columns<T, 1, kN, kColumns>(dv, dp, dout_tile(n), column / 8);
    multiply_columns<T, 1, kN, kColumns>(dk, x, q_tile(n), column / 8);
    if (kStages == 1 && n + 1 < total) {
      sync_threads();  // everyone is done with the only tiles
      fetch(n + 1);
    }
  }
  wait_copies<0>();
  sync_threads();  // everything has arrived everywhere, also where there was nothing to walk

  int unsound = 0;
  FASTATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
    FASTATTN_UNROLL
    for (int t = 0; t < kColumns / 8; ++t)
      sum +=
          dk[0][t][2 * half] + dk[0][t][2 * half + 1] + dv[0][t][2 * half] + dv[0][t][2 * half + 1];
    sum = quad_sum(sum);
    if (!is_finite(sum)) unsound |= 1 << (8 * half + thread_x() % 32 / 4);
  }
  sync_warp();  // the rows of k and v are this warp's alone
  fragments_to_tile<T, kColumns>(k, warp_row, column / 8, dk[0], p.scale, p.scale);
  fragments_to_tile<T, kColumns>(v, warp_row, column / 8, dv[0], 1.0f, 1.0f);
  sync_warp();
  const auto store = [&](const Tile<kM, kHeadDim>& tile, const View& to, int width, bool aligned) {
    if (!to) return;
    T* out = static_cast<T*>(to.data) + b * to.stride[0] + kv_head * to.stride[1];
    store_rows<T, 16, kColumns / 8>(
        tile, warp_row, column / 8, width, to.stride[3], aligned, [&](int r) -> T* {
          return first + r < p.k_len ? out + int64_t(first + r) * to.stride[2] : nullptr;
        });
  };
  store(k, c.dk, p.head_dim, c.dk_aligned);
  store(v, c.dv, p.v_dim, c.dv_aligned);
  for (int lanes = 16; lanes; lanes >>= 1) unsound |= shuffle_xor(unsound, lanes);
  if (!unsound) return;
  sync_warp();
  for (int r = 0; r < 16; ++r)
    if ((unsound >> r & 1) && first + warp_row + r < p.k_len)
      careful_key<T>(c, b, kv_head, first + warp_row + r, column, column + kColumns);
}

// ---- dbias -------------------------------------------------------------------------------------

// A tile of dbias: the sum of ds over the batches and heads that share it, and over all queries or
// keys where the bias is the same for them.
template <typename T, int kHeadDim>
FASTATTN_KERNEL(kAttentionThreads, 1)
attention_dbias_kernel(FASTATTN_PARAMS BackwardCall c) {
  using Shape = BackwardShape<kHeadDim>;
  constexpr int kM = Shape::kM, kN = Shape::kN;
  FASTATTN_SHARED(memory);
  const Tile<kM, kHeadDim> q{memory}, dout{memory + q.kBytes};
  const Tile<kN, kHeadDim> k{memory + 2 * q.kBytes}, v{k.base + k.kBytes};
  const Problem& p = c.p;
  const int q_tiles = (p.q_len + kM - 1) / kM, k_tiles = (p.k_len + kN - 1) / kN;
  const int own_q = c.shares_queries ? 1 : q_tiles, own_k = c.shares_keys ? 1 : k_tiles;
  int number = block_x();
  const int k0 = number % own_k, q0 = number / own_k % own_q;
  number /= own_k * own_q;
  const int own_head = number % c.own_heads, own_batch = number / c.own_heads;
  const int warp_row = thread_x() / 32 * 16, lane = thread_x() % 32;

  float sum[kN / 8][4] = {};
  for (int b = own_batch; b < p.batch; b += c.own_batches)
    for (int h = own_head; h < p.heads; h += c.own_heads)
      for (int qt = q0; qt < q_tiles; qt += own_q) {
        const int first = qt * kM, first_query = first + warp_row + lane / 4;
        const int last = first + kM < p.q_len ? first + kM : p.q_len;
        const KeyWalk keys(p, first, last, kN, 0, p.k_len);
        bool fresh = true;
        for (int kt = k0; kt < k_tiles; kt += own_k) {
          const int start = kt * kN;
          if (start < keys.begin || start >= keys.end) continue;
          sync_threads();  // nobody reads the last tiles any more
          if (fresh) {
            copy_rows<T>(q, p.q, b, h, first, p.q_len, p.head_dim, p.q_aligned);
            copy_rows<T>(dout, p.dout, b, h, first, p.q_len, p.v_dim, p.dout_aligned);
            fresh = false;
          }
          copy_rows<T>(k, p.k, b, h / p.group, start, p.k_len, p.head_dim, p.k_aligned);
          copy_rows<T>(v, p.v, b, h / p.group, start, p.k_len, p.v_dim, p.v_aligned);
          commit_copies();
          wait_copies<0>();
          sync_threads();
          float reference[2], delta[2];
          FASTATTN_UNROLL
          for (int n = 0; n < 2; ++n) {
            const int i = first_query + 8 * n;
            reference[n] = i < p.q_len ? c.rows.reference[p.row(b, h, i)] : -hidden_score();
            delta[n] = i < p.q_len ? c.rows.delta[p.row(b, h, i)] : 0.0f;
          }
          float x[1][kN / 8][4], dp[1][kN / 8][4];
          multiply_rows<T, 1, kN>(x, q, warp_row, k);
          multiply_rows<T, 1, kN>(dp, dout, warp_row, v);
          differentiate_rows<true, true, kN>(c, x, dp, reference, delta, b, h, first_query, start,
                                             true);
          FASTATTN_UNROLL
          for (int t = 0; t < kN / 8; ++t) FASTATTN_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int i = first_query + e / 2 * 8, j = start + 8 * t + lane % 4 * 2 + e % 2;
            if (!is_finite(x[0][t][e])) x[0][t][e] = careful_pair<T>(c, b, h, i, j).dlogit;
            sum[t][e] += x[0][t][e];
          }
        }
      }

  auto* columns = reinterpret_cast<float*>(memory);  // (warps, kN)
  if (c.shares_keys) {
    FASTATTN_UNROLL
    for (int n = 0; n < 2; ++n) {
      float all = 0;
      FASTATTN_UNROLL
      for (int t = 0; t < kN / 8; ++t) all += sum[t][2 * n] + sum[t][2 * n + 1];
      sum[0][2 * n] = quad_sum(all);
    }
  }
  if (c.shares_queries) {
    FASTATTN_UNROLL
    for (int t = 0; t < kN / 8; ++t) FASTATTN_UNROLL
    for (int e = 0; e < 2; ++e) {
      float all = sum[t][e] + sum[t][2 + e];
      for (int lanes = 4; lanes < 32; lanes <<= 1) all += shuffle_xor(all, lanes);
      sum[t][e] = all;
    }
    sync_threads();  // nobody reads tiles any more
    FASTATTN_UNROLL
    for (int t = 0; t < kN / 8; ++t) FASTATTN_UNROLL
    for (int e = 0; e < 2; ++e)
      if (lane < 4) store_shared(columns + thread_x() / 32 * kN + 8 * t + 2 * lane + e, sum[t][e]);
    sync_threads();
  }
  auto* out = static_cast<float*>(c.dbias.data) + own_batch * c.dbias.stride[0] +
              own_head * c.dbias.stride[1];
  if (c.shares_queries) {
    const int j = k0 * kN + thread_x();
    const bool writes = c.shares_keys ? thread_x() == 0 : thread_x() < kN && j < p.k_len;
    if (!writes) return;
    float all = 0;
    for (int w = 0; w < kAttentionWarps; ++w) all += load_shared(columns + w * kN + thread_x());
    out[c.shares_keys ? 0 : j * c.dbias.stride[3]] = all;
    return;
  }
  FASTATTN_UNROLL
  for (int n = 0; n < 2; ++n) {
    const int i = q0 * kM + warp_row + lane / 4 + 8 * n;
    if (i >= p.q_len) continue;
    float* row = out + i * c.dbias.stride[2];
    if (c.shares_keys) {
      if (lane % 4 == 0) row[0] = sum[0][2 * n];
      continue;
    }
    FASTATTN_UNROLL
    for (int t = 0; t < kN / 8; ++t) FASTATTN_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int j = k0 * kN + 8 * t + lane % 4 * 2 + e;
      if (j < p.k_len) row[j * c.dbias.stride[3]] = sum[t][2 * n + e];
    }
  }
}

// Launches of one head dim: attention_backward.cu is compiled once for each. First those of the
// rows.
template <int kHeadDim>
void attention_rows_of(DType dtype, BackwardCall call, const Device& device);
template <int kHeadDim>
void attention_backward_of(DType dtype, BackwardCall call, const Device& device);

}  // namespace fastattn
