// One attention call as its kernels see it, and what becomes of q.k:
//   scale -> softcap -> ALiBi -> bias -> mask -> softmax -> dropout
#pragma once
#include "launch.h"

namespace fastattn {

FASTATTN_DEVICE float hidden_score() { return float_of(0xFF800000u); }  // -inf
FASTATTN_DEVICE bool is_hidden(float score) { return score == hidden_score(); }
FASTATTN_DEVICE bool is_finite(float x) { return x - x == 0.0f; }

// The rule that drops elements, by their coordinates.
struct DropoutRule {
  Dropout given;
  uint32_t threshold;
  float scale;  // of what is kept
  bool on;

  FASTATTN_DEVICE Philox words(int b, int h, int i, int j) const {
    return Philox::at(given.seed_now(), uint32_t(j) >> 2, uint32_t(i), uint32_t(h), uint32_t(b));
  }
  FASTATTN_DEVICE bool keeps(int b, int h, int i, int j) const {
    const Philox random = words(b, h, i, j);  // selected: an index would put it into memory
    const uint32_t even = j & 2 ? random.word[2] : random.word[0];
    const uint32_t odd = j & 2 ? random.word[3] : random.word[1];
    return (j & 1 ? odd : even) >= threshold;
  }
};

struct Problem {
  int batch, heads, kv_heads, group, q_len, k_len, head_dim, v_dim;
  Mask mask;
  View q, k, v, out, dout;
  bool q_aligned, k_aligned, v_aligned, out_aligned, dout_aligned;  // every row, to 16 bytes
  View bias, slopes;
  DType bias_dtype;
  const float* sinks;
  float scale, softcap, inverse_cap;
  float factor;   // exp(logit) = exp2(factor * x) of an x as the tiles have it
  bool modified;  // x are logits; else q.k, and the exponent takes the scale along
  DropoutRule dropout;

  FASTATTN_DEVICE int64_t row(int b, int h, int i) const {
    return (int64_t(b) * heads + h) * q_len + i;
  }
  FASTATTN_DEVICE float slope(int b, int h) const {
    return slopes
               ? static_cast<const float*>(slopes.data)[b * slopes.stride[0] + h * slopes.stride[1]]
               : 0.0f;
  }
  // In float32; of a boolean bias 0 where True, else -inf.
  FASTATTN_DEVICE float bias_at(int b, int h, int i, int j) const {
    const int64_t at =
        b * bias.stride[0] + h * bias.stride[1] + i * bias.stride[2] + j * bias.stride[3];
    if (bias_dtype == DType::kBool)
      return static_cast<const uint8_t*>(bias.data)[at] ? 0.0f : hidden_score();
    if (bias_dtype == DType::kFloat32) return static_cast<const float*>(bias.data)[at];
    if (bias_dtype == DType::kBFloat16) return to_float(static_cast<const bf16*>(bias.data)[at]);
    return to_float(static_cast<const f16*>(bias.data)[at]);
  }
  // q.k -> logit; tanh gets tanh(scale x / softcap), of which the derivative is made. A bias of
  // -inf hides also what is NaN or infinite.
  FASTATTN_DEVICE float logit(float x, float slope_of_head, int b, int h, int i, int j,
                              float& tanh) const {
    x *= scale;
    tanh = 0.0f;
    if (softcap != 0.0f) {
      tanh = tanhf(x * inverse_cap);
      x = softcap * tanh;
    }
    if (slopes) x -= slope_of_head * fabsf(float(i + int(mask.shift) - j));
    if (bias) {
      const float add = bias_at(b, h, i, j);
      x = is_hidden(add) ? add : x + add;
    }
    return x;
  }
  FASTATTN_DEVICE bool sees(int i, int j) const {
    const int offset = j - i - int(mask.shift);
    return (mask.left < 0 || offset >= -int(mask.left)) &&
           (mask.right < 0 || offset <= int(mask.right)) && j < k_len && i < q_len;
  }
};

// Rows of 16 bytes that begin at multiples of 16 bytes.
inline bool rows_are_aligned(const View& v, int64_t width) {
  for (int i = 0; i < 3; ++i)
    if (v.stride[i] % 8) return false;
  return (reinterpret_cast<uintptr_t>(v.data) & 15) == 0 && v.stride[3] == 1 && width % 8 == 0;
}

inline Problem problem_of(const AttentionParams& p) {
  const AttentionShape& s = p.shape;
  Problem c{};
  c.batch = int(s.batch);
  c.heads = int(s.q_heads);
  c.kv_heads = int(s.kv_heads);
  c.group = int(s.group());
  c.q_len = int(s.q_len);
  c.k_len = int(s.k_len);
  c.head_dim = int(s.head_dim);
  c.v_dim = int(s.v_dim);
  c.mask = p.mask;
  const int64_t far = s.q_len + s.k_len;  // a limit beyond it limits nothing
  if (c.mask.left > far) c.mask.left = -1;
  if (c.mask.right > far) c.mask.right = -1;
  c.q = p.q;
  c.k = p.k;
  c.v = p.v;
  c.out = p.out;
  c.q_aligned = rows_are_aligned(p.q, s.head_dim);
  c.k_aligned = rows_are_aligned(p.k, s.head_dim);
  c.v_aligned = rows_are_aligned(p.v, s.v_dim);
  c.out_aligned = rows_are_aligned(p.out, s.v_dim);
  c.bias = p.bias;
  c.bias_dtype = p.bias_dtype;
  c.slopes = p.alibi_slopes;
  c.sinks = static_cast<const float*>(p.sinks);
  c.scale = float(p.scale);
  c.softcap = float(p.softcap);
  c.inverse_cap = c.softcap != 0 ? 1.0f / c.softcap : 0.0f;
  c.modified = c.softcap != 0 || c.slopes || c.bias || p.dropout.p > 0 || !(c.scale > 0);
  c.factor = c.modified ? kLog2e : c.scale * kLog2e;
  c.dropout = {p.dropout, dropout_threshold(p.dropout.p),
               p.dropout.p < 1 ? float(1 / (1 - p.dropout.p)) : 0.0f, p.dropout.p > 0};
  return c;
}

// The keys [begin, end) that some of the queries [i_begin, i_end) see, from a multiple of `step`
// on, and among them the tiles [all_begin, all_end) of keys that all of them see.
struct KeyWalk {
  int begin, all_begin, all_end, end;

  FASTATTN_DEVICE KeyWalk(const Problem& p, int i_begin, int i_end, int step, int part_begin,
                          int part_end) {
    const KeyRange any = p.mask.any_keys(i_begin, i_end, p.k_len);
    const KeyRange all = p.mask.all_keys(i_begin, i_end, p.k_len);
    begin = int(any.begin) > part_begin ? int(any.begin) : part_begin;
    end = int(any.end) < part_end ? int(any.end) : part_end;
    begin = begin / step * step;
    all_begin = (int(all.begin) + step - 1) / step * step;
    all_end = (int(all.end) < end ? int(all.end) : end) / step * step;
  }
  FASTATTN_DEVICE bool masked(int start) const { return start < all_begin || start >= all_end; }
};

// Which tile a block takes. Heads in groups whose keys stay in cache together; in a group the last
// tile of each head first, since under a causal mask it has the most keys.
struct TileOrder {
  int tile, head;

  FASTATTN_DEVICE TileOrder(int block, int tiles, int heads, int together) {
    const int first = block / (tiles * together) * together;
    const int rest = block - first * tiles;
    const int here = heads - first < together ? heads - first : together;
    tile = tiles - 1 - rest / here;
    head = first + rest % here;
  }
};

// How many heads are worked on together: of what they walk through, `bytes` for each `sharing`
// heads, 16 MB, a part of the second-level cache.
inline int heads_together(int64_t bytes, int64_t sharing, int64_t heads) {
  const int64_t fit = (int64_t(16) << 20) / (bytes > 0 ? bytes : 1);
  const int64_t together = (fit > 0 ? fit : 1) * sharing;
  return int(together < heads ? together : heads);
}

}  // namespace fastattn
