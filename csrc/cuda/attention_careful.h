// One row at a time, by a warp, number by number: for the rare rows that the common kernels cannot
// trust. Logits so large that the product's rounding matters, and NaNs or infinities, which a
// product of tiles would carry to rows that do not see them (0 * nan is nan). Slow, short and
// exact.
#pragma once
#include "attention_problem.h"

namespace fastattn {

template <typename T>
FASTATTN_DEVICE float dot_of(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int n) {
  float sum = 0;
  for (int d = 0; d < n; ++d) sum += to_float(a[d * a_stride]) * to_float(b[d * b_stride]);
  return sum;
}

template <typename T>
FASTATTN_DEVICE const T* row_of(const View& v, int b, int h, int i) {
  return static_cast<const T*>(v.data) + b * v.stride[0] + h * v.stride[1] + i * v.stride[2];
}

// The logit of query i and key j; the same bits wherever it is called.
template <typename T>
FASTATTN_NOINLINE_DEVICE float careful_logit(const Problem& p, int b, int h, int i, int j,
                                             float* tanh) {
  const float x = dot_of(row_of<T>(p.q, b, h, i), p.q.stride[3], row_of<T>(p.k, b, h / p.group, j),
                         p.k.stride[3], p.head_dim);
  return p.logit(x, p.slope(b, h), b, h, i, j, *tanh);
}

// Maximum and sum of exp(logit - maximum) of a row, without its sink; all lanes get them.
struct CarefulSum {
  float max, sum;
};

template <typename T>
FASTATTN_NOINLINE_DEVICE CarefulSum careful_sum(const Problem& p, int b, int h, int i) {
  const KeyRange keys = p.mask.keys_of(i, p.k_len);
  float m = hidden_score(), total = 0, tanh;
  for (int j = int(keys.begin) + thread_x() % 32; j < int(keys.end); j += 32)
    m = fmaxf(m, careful_logit<T>(p, b, h, i, j, &tanh));
  for (int lanes = 16; lanes; lanes >>= 1) m = fmaxf(m, shuffle_xor(m, lanes));
  for (int j = int(keys.begin) + thread_x() % 32; j < int(keys.end); j += 32) {
    const float x = careful_logit<T>(p, b, h, i, j, &tanh);
    if (!is_hidden(x)) total += exp2f((x - m) * kLog2e);
  }
  for (int lanes = 16; lanes; lanes >>= 1) total += shuffle_xor(total, lanes);
  return {m, total};
}

// What a row's sum makes of its result: a sink is one more logit, and has no value.
struct RowEnd {
  float factor;  // of the accumulated exp(logit - max) . v
  float lse;

  FASTATTN_DEVICE RowEnd(const Problem& p, int h, float max, float sum) {
    float scale = 1.0f;
    if (p.sinks) {
      const float sink = p.sinks[h], peak = fmaxf(max, sink);
      const float reference = is_hidden(peak) ? 0.0f : peak;
      scale = exp2f((max - reference) * kLog2e);
      sum = sum * scale + exp2f((sink - reference) * kLog2e);
      max = peak;
    }
    const bool blind = sum == 0.0f;
    factor = blind ? 0.0f : scale / sum * (p.dropout.on ? p.dropout.scale : 1.0f);
    lse = blind ? hidden_score() : max + logf(sum);
  }
};

// out and lse of one row.
template <typename T>
FASTATTN_NOINLINE_DEVICE void careful_row(const Problem& p, float* lse, int b, int h, int i) {
  const int lane = thread_x() % 32;
  note_rare("careful row");
  const CarefulSum all = careful_sum<T>(p, b, h, i);
  const RowEnd end(p, h, all.max, all.sum);
  float tanh;
  if (lane == 0) lse[p.row(b, h, i)] = end.lse;
  const KeyRange keys = p.mask.keys_of(i, p.k_len);
  T* out = const_cast<T*>(row_of<T>(p.out, b, h, i));
  for (int d = lane; d - lane < p.v_dim; d += 32) {
    float acc = 0;
    for (int first = int(keys.begin); first < int(keys.end); first += 32) {
      const int j = first + lane;
      float weight = 0;
      bool seen = false;
      if (j < int(keys.end)) {
        const float x = careful_logit<T>(p, b, h, i, j, &tanh);
        seen = !is_hidden(x);
        if (seen) weight = exp2f((x - all.max) * kLog2e);
        if (p.dropout.on && !p.dropout.keeps(b, h, i, j)) weight = 0;
      }
      for (int n = 0; n < 32; ++n) {
        const float w = shuffle(weight, n);
        const bool visible = shuffle(int(seen), n) != 0;
        if (!visible || d >= p.v_dim) continue;
        acc += w * to_float(row_of<T>(p.v, b, h / p.group, first + n)[d * p.v.stride[3]]);
      }
    }
    if (d < p.v_dim) out[d * p.out.stride[3]] = from_float<T>(acc * end.factor);
  }
}

}  // namespace fastattn
