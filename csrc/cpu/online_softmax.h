// The online softmax (Milakov and Gimelshein, 2018) of a tile of queries: a running maximum and sum
// of each row; what was accumulated so far is rescaled by exp(max_before - max) at each new block.
#pragma once
#include "attention_score.h"
#include "scratch.h"

namespace fastattn {
namespace {

// Where ScoreMod has something to do, maxima are kept in natural units, which cannot overflow for
// biases near the largest float; else in units of log2, with the scale folded into the exponent.
template <typename A>
class OnlineSoftmax {
  static constexpr A kHidden = -std::numeric_limits<A>::infinity();

 public:
  // For at most max_rows rows and blocks of max_keys keys.
  OnlineSoftmax(const AttentionParams& p, Scratch& scratch, int max_rows, int max_keys)
      : p_(p),
        modified_(ScoreMod<A>::needed(p)),
        max_(scratch.take<A>(max_rows)),
        sum_(scratch.take<A>(max_rows)),
        factor_(scratch.take<A>(max_rows)),
        block_sum_(scratch.take<A>(max_rows)),
        bias_(scratch.take<A>(max_keys + 64)),
        words_(scratch.take<uint32_t>(max_keys + 8)),
        visible_(scratch.take<bool>(max_keys)) {}

  void start(int rows) {
    std::fill_n(max_, rows, kHidden);
    std::fill_n(sum_, rows, A(0));
  }

  // Turns the scores of query i (row r of the tile) with keys [j, j + n) into p = exp(logit - max),
  // unnormalised, with dropout; zeros up to `width`, a multiple of the vector. With `mark`, what is
  // seen never comes out as exactly 0 unless dropped: see tile_matmul_sparse.
  FASTATTN_NOINLINE void row(const ScoreMod<A>& mod, A* row, int r, int64_t i, int64_t j, int n,
                             int width, bool mark) {
    using V = Vec<A>;
    constexpr int w = V::kWidth;
    if (modified_)
      mod.template apply<false>(row, bias_, nullptr, i, j, int((n + w - 1) / w * w));
    const KeyRange sees = p_.mask.keys_of(i, p_.shape.k_len);
    mask_row(row, sees.begin - j, std::min<int64_t>(sees.end - j, n), width);
    if (mark)
      for (int c = 0; c < n; ++c) visible_[c] = row[c] != kHidden;

    V best = load(row);
    for (int c = w; c < width; c += w) best = vmax(best, load(row + c));
    const A factor = modified_ ? A(kLog2E) : A(p_.scale * kLog2E);
    A m = modified_ ? hmax_any(best) : hmax_any(best) * factor;
    const A before = max_[r];
    m = m > before || m != m ? m : before;
    factor_[r] = m == before ? A(0) : (modified_ ? (before - m) * factor : before - m);
    max_[r] = m;

    V total = zero<A>();
    // A row that has seen nothing yet is all -inf: any finite reference turns it into zeros.
    const V reference = set1(m == kHidden ? A(0) : m), vfactor = set1(factor);
    const auto exponentiate = [&](auto exponent) {
      for (int c = 0; c < width; c += w) {
        const V p = exp2(exponent(load(row + c)));
        total = total + p;
        store(row + c, p);
      }
    };
    if (modified_) {
      exponentiate([&](V s) { return (s - reference) * vfactor; });
    } else {
      const V minus = zero<A>() - reference;
      exponentiate([&](V s) { return fma(s, vfactor, minus); });
    }
    block_sum_[r] = hsum(total);
    if (mark)
      for (int c = 0; c < n; ++c)
        if (visible_[c] && row[c] == 0) row[c] = std::numeric_limits<A>::min();
    if (p_.dropout.p > 0) drop_row(row, words_, p_.dropout, mod.b, mod.h, i, j, n);
  }

  // After row() on rows [r0, r0 + rows): brings their sums up to date and readies factors().
  void fold(int r0, int rows) {
    constexpr int w = Vec<A>::kWidth;
    for (int r = r0; r < r0 + rows; r += w) {
      const int live = std::min(w, r0 + rows - r);
      const Vec<A> f = exp2(load_n(factor_ + r, live));
      store_n(factor_ + r, f, live);
      store_n(sum_ + r, fma(f, load_n(sum_ + r, live), load_n(block_sum_ + r, live)), live);
    }
  }
  // What the rows' earlier results are to be multiplied by.
  const A* factors(int r0) const { return factor_ + r0; }

  A max(int r) const { return modified_ ? max_[r] : max_[r] * A(kLn2); }  // of the logits
  A sum(int r) const { return sum_[r]; }  // of exp(logit - max)

 private:
  const AttentionParams& p_;
  const bool modified_;
  A *max_, *sum_, *factor_, *block_sum_, *bias_;
  uint32_t* words_;
  bool* visible_;
};

}  // namespace
}  // namespace fastattn
