// From q.k to the logits that softmax sees, one row (one query, consecutive keys) at a time; the
// same code serves forward, backward and decode. The order is the library's definition:
//   scale -> softcap -> ALiBi -> bias -> mask
#pragma once
#include "exp.h"
#include "params.h"
#include "random.h"

namespace fastattn {
namespace {

// What turns scores into logits besides a plain scale and the mask.
template <typename A>
struct ScoreMod {
  const AttentionParams& p;
  int64_t b, h;
  A slope;

  ScoreMod(const AttentionParams& params, int64_t batch, int64_t head)
      : p(params), b(batch), h(head), slope(0) {
    if (p.alibi_slopes) slope = *p.alibi_slopes.at<const A>(b, h, 0);
  }

  int64_t offset(int64_t i, int64_t j) const {
    return b * p.bias.stride[0] + h * p.bias.stride[1] + i * p.bias.stride[2] +
           j * p.bias.stride[3];
  }

  // Is there anything to do that the plain path, logits = scale * scores with scale > 0, leaves
  // out?
  static bool needed(const AttentionParams& p) {
    return p.softcap != 0 || p.alibi_slopes || p.bias || !(p.scale > 0);
  }

  // Queries [i, i + rows) and keys [j, j + keys).
  struct Block {
    int64_t i, j;
    int rows, keys;
  };
  // The bias of a block, brought near in `parts`: the processor waits for few lines at once, and
  // for nothing else meanwhile.
  class BiasFetch {
   public:
    BiasFetch(const ScoreMod& mod, Block at, int parts) {
      const View& bias = mod.p.bias;
      if (bias.stride[3] != 1 || at.keys <= 0) return;
      const int64_t size = size_of(mod.p.bias_dtype);
      row_ = static_cast<const char*>(bias.data) + mod.offset(at.i, at.j) * size;
      row_bytes_ = bias.stride[2] * size;
      lines_ = int((at.keys * size + kLine - 1) / kLine);
      rows_ = at.rows;
      part_ = (rows_ * lines_ + parts - 1) / parts;
    }
    FASTATTN_INLINE void operator()() {
      for (int k = 0; k < part_ && rows_ > 0; ++k) {
        if (line_ == 0) touch(row_);
        prefetch(row_ + line_ * kLine);
        if (++line_ == lines_) {
          line_ = 0;
          row_ += row_bytes_;
          --rows_;
        }
      }
    }

   private:
    static constexpr int kLine = 64;
    const char* row_ = nullptr;
    ptrdiff_t row_bytes_ = 0;
    int lines_ = 0, rows_ = 0, part_ = 0, line_ = 0;
  };

  // Adds a bias that lies as the scores do where their product is written: see Store in
  // tile_matmul.h.
  struct AddBias {
    const A* bias;
    ptrdiff_t row;
    A scale;
    FASTATTN_INLINE void operator()(A* c, Vec<A> sum, int m, int n) const {
      store(c, with_bias(sum, set1(scale), load(bias + m * row + n)));
    }
  };
  AddBias add_bias(Block at) const {
    return {static_cast<const A*>(p.bias.data) + offset(at.i, at.j), ptrdiff_t(p.bias.stride[2]),
            A(p.scale)};
  }
  // Whether that can be done, and is all that there is to do.
  bool bias_is_ready(Block at) const {
    constexpr int w = Vec<A>::kWidth;
    const int64_t read = at.j + (at.keys + w - 1) / w * w;  // whole vectors
    return only_bias() && p.bias.stride[3] == 1 && p.bias_dtype == dtype_of<A>() &&
           read <= p.shape.k_len;
  }
  bool only_bias() const { return p.bias && p.softcap == 0 && !p.alibi_slopes; }

  // A bias of -inf hides also what is NaN or infinite.
  static FASTATTN_INLINE Vec<A> with_bias(Vec<A> score, Vec<A> scale, Vec<A> bias) {
    const Vec<A> hidden = set1(-std::numeric_limits<A>::infinity());
    return select(equal(bias, hidden), hidden, fma(score, scale, bias));
  }

  // row[0..n): q_i . k_(j + c) -> logits, in natural units. n is padded to whole vectors; `scratch`
  // holds n values. With `slope_out`, d logit / d score goes there (1 without a softcap, times
  // scale).
  template <bool kWithSlope>
  FASTATTN_NOINLINE void apply(A* row, A* scratch, A* slope_out, int64_t i, int64_t j,
                               int n) const {
    using V = Vec<A>;
    constexpr int w = V::kWidth;
    const V scale = set1(A(p.scale)), one = set1(A(1));
    const bool capped = p.softcap != 0;
    const V cap = set1(A(p.softcap)), inv_cap = set1(capped ? A(1 / p.softcap) : A(0));
    const A* bias = p.bias ? bias_row(scratch, i, j, n) : nullptr;
    if (only_bias()) {  // by far the commonest
      for (int c = 0; c < n; c += w)
        store(row + c, with_bias(load(row + c), scale, load(bias + c)));
      if constexpr (kWithSlope) std::fill_n(slope_out, n, A(p.scale));
      return;
    }
    const V minus_slope = set1(-slope);
    V distance = set1(A(j - i - p.mask.shift)) + iota<A>();
    for (int c = 0; c < n; c += w) {
      V t = load(row + c) * scale;
      V derivative = scale;
      if (capped) {
        const V y = vtanh(t * inv_cap);
        t = cap * y;
        derivative = scale * (one - y * y);
      }
      if (p.alibi_slopes) {
        t = fma(minus_slope, vabs(distance), t);
        distance = distance + set1(A(w));
      }
      if (bias) t = with_bias(t, one, load(bias + c));
      store(row + c, t);
      if constexpr (kWithSlope) store(slope_out + c, derivative);
    }
  }

 private:
  // n values of the bias from (i, j) on: where they lie, or converted to scratch; boolean: 0 where
  // True, -inf where False; 0 beyond the last key.
  const A* bias_row(A* scratch, int64_t i, int64_t j, int n) const {
    constexpr int w = Vec<A>::kWidth;
    const int64_t step = p.bias.stride[3];
    const int live = int(std::min<int64_t>(n, p.shape.k_len - j));
    const char* data = static_cast<const char*>(p.bias.data);
    const auto convert = [&](const auto* src) -> const A* {
      using T = std::decay_t<decltype(*src)>;
      src += offset(i, j);
      if constexpr (std::is_same_v<T, A>)
        if (step == 1 && live == n) return src;
      int c = 0;
      if constexpr (std::is_same_v<Acc<T>, A>)
        if (step == 1)
          for (; c + w <= live; c += w) store(scratch + c, load(src + c));
      for (; c < live; ++c) scratch[c] = A(to_acc(src[c * step]));
      for (; c < n; ++c) scratch[c] = 0;
      return scratch;
    };
    switch (p.bias_dtype) {
      case DType::kFloat32:
        return convert(reinterpret_cast<const float*>(data));
      case DType::kFloat64:
        return convert(reinterpret_cast<const double*>(data));
      case DType::kBFloat16:
        return convert(reinterpret_cast<const bf16*>(data));
      case DType::kFloat16:
        return convert(reinterpret_cast<const f16*>(data));
      case DType::kBool:
        break;
    }
    constexpr A hidden = -std::numeric_limits<A>::infinity();
    const uint8_t* src = reinterpret_cast<const uint8_t*>(data) + offset(i, j);
    for (int c = 0; c < n; ++c) scratch[c] = c >= live || src[c * step] ? A(0) : hidden;
    return scratch;
  }
};

constexpr int words_for(int n) { return n + 8 + 4 * kGroupsAtOnce; }

// row[0..n) *= keep / (1 - p), element (b, h, i, j + c): see csrc/common/philox.h. j need not be a
// multiple of four; scratch holds words_for(n) words.
template <typename A>
FASTATTN_NOINLINE void drop_row(A* row, uint32_t* scratch, const Dropout& d, int64_t b, int64_t h,
                                int64_t i, int64_t j, int n) {
  const int64_t first = j >> 2, last = (j + n + 3) >> 2;
  random_words(scratch, d.seed, uint32_t(first), last - first, uint32_t(i), uint32_t(h),
               uint32_t(b));
  const uint32_t threshold = dropout_threshold(d.p);
  const A scale = d.p >= 1 ? A(0) : A(1 / (1 - d.p));
  const uint32_t* word = scratch + (j & 3);
  for (int c = 0; c < n; ++c) row[c] = word[c] >= threshold ? row[c] * scale : A(0);
}

// Fills with -inf what lies outside [begin, end) of row[0..n).
template <typename A>
inline void mask_row(A* row, int64_t begin, int64_t end, int n) {
  constexpr A hidden = -std::numeric_limits<A>::infinity();
  for (int c = 0; c < begin && c < n; ++c) row[c] = hidden;
  for (int64_t c = std::max<int64_t>(end, 0); c < n; ++c) row[c] = hidden;
}

}  // namespace
}  // namespace fastattn
