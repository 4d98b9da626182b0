// The online softmax (Milakov and Gimelshein, 2018) of a tile of queries: a running maximum and sum
// of each row; what was accumulated so far is rescaled by exp(max_before - max) at each new block.
#pragma once
#include <cstddef>

#include "attention_score.h"
#include "scratch.h"

namespace fastattn {
namespace {

struct Maximum {
  template <typename V>
  FASTATTN_INLINE V operator()(V a, V b) const {
    return vmax(a, b);
  }
};
struct Sum {
  template <typename V>
  FASTATTN_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};
// The w vectors at rows[0], rows[w], ... as one vector: lane r is the reduction of vector r.
template <class Reduce, typename A>
FASTATTN_NOINLINE Vec<A> reduce_rows(const A* rows) {
  constexpr int w = Vec<A>::kWidth;
  Vec<A> x[w];
  for (int r = 0; r < w; ++r) x[r] = load(rows + r * w);
  transpose(x);
  reduce_as_tree<w>(x, Reduce{});
  return x[0];
}

// What a row of the tile is: its query and how its scores become logits.
template <typename A>
struct Query {
  const ScoreMod<A>& mod;
  int64_t i;
};
// Queries i, i + 1, ... of one head; or all queries, head by head, of a group of heads.
template <typename A>
struct QueriesOfHead {
  const ScoreMod<A>& mod;
  int64_t i;
  Query<A> operator()(int r) const { return {mod, i + r}; }
};
template <typename A>
struct QueriesOfGroup {
  const ScoreMod<A>* mods;
  int64_t q_len;
  Query<A> operator()(int r) const { return {mods[r / q_len], r % q_len}; }
};

// Maxima are kept as scores, scaled or not, and a score's difference to them is taken before it is
// scaled: the greatest itself must come out as exactly 0, also where a rounding is worth
// thousands, and biases near the largest float must not overflow.
//
// kExact: to libm's accuracy, for inputs of type A; narrower ones take a shorter exp.
template <typename A, bool kExact>
class OnlineSoftmax {
  using V = Vec<A>;
  static constexpr int w = V::kWidth;
  static constexpr int kAtOnce = w == 16 ? 8 : 4;
  static constexpr A kHidden = -std::numeric_limits<A>::infinity();

 public:
  // For tiles of at most max_rows rows, of which block() sees at most block_rows at once, with at
  // most max_keys keys.
  OnlineSoftmax(const AttentionParams& p, Scratch& scratch, int max_rows, int block_rows,
                int max_keys)
      : p_(p),
        modified_(ScoreMod<A>::needed(p)),
        exp_(modified_ ? 1.0 : p.scale),
        max_(scratch.take<A>(max_rows + w)),
        sum_(scratch.take<A>(max_rows + w)),
        sum_low_(scratch.take<A>(max_rows + w)),
        factor_(scratch.take<A>(max_rows + w)),
        reference_(scratch.take<A>(block_rows + w)),
        lanes_(scratch.take<A>((block_rows + w) * w)),
        bias_(scratch.take<A>(max_keys + w)),
        words_(scratch.take<uint32_t>(words_for(max_keys))),
        visible_(scratch.take<bool>(block_rows * max_keys)) {}

  void start(int rows) {
    std::fill_n(max_, rows + w, kHidden);
    std::fill_n(sum_, rows + w, A(0));
    std::fill_n(sum_low_, rows + w, A(0));
  }

  // Turns scores (rows, score_row) of rows [r0, r0 + rows) of the tile with keys [j, j + n) into
  // p = exp(logit - max), unnormalised, with dropout, as type P at probs, for P = A the scores;
  // zeros from n to `width`, a multiple of the vector. query(r) describes row r of the block. With
  // `mark`, what is seen never comes out as exactly 0 unless dropped: see tile_matmul_sparse.
  // `are_logits`: the bias is in the scores already.
  template <typename P, typename QueryOf>
  FASTATTN_NOINLINE void block(A* scores, P* probs, int score_row, int r0, int rows, int64_t j,
                               int n, int width, bool mark, const QueryOf& query,
                               bool are_logits = false) {
    for (int r = 0; r < rows; ++r) {
      A* row = scores + ptrdiff_t(r) * score_row;
      const Query<A> q = query(r);
      if (modified_ && !are_logits)
        q.mod.template apply<false>(row, bias_, nullptr, q.i, j, (n + w - 1) / w * w);
      const KeyRange sees = p_.mask.keys_of(q.i, p_.shape.k_len);
      mask_row(row, sees.begin - j, std::min<int64_t>(sees.end - j, n), width);
      if (mark)
        for (int c = 0; c < n; ++c) visible_[r * n + c] = row[c] != kHidden;
      V even = load(row), odd = even;
      int c = w;
      for (; c + w < width; c += 2 * w) {
        odd = vmax(odd, load(row + c));
        even = vmax(even, load(row + c + w));
      }
      if (c < width) odd = vmax(odd, load(row + c));
      store(lanes_ + r * w, vmax(even, odd));
    }
    update_max(r0, rows);

    const bool convert_later = mark || p_.dropout.p > 0;
    for (int r = 0; r < rows; ++r) {
      A* row = scores + ptrdiff_t(r) * score_row;
      P* out = probs + ptrdiff_t(r) * score_row;
      V total;
      if (std::is_same_v<P, A> || !convert_later)
        total = exponentiate<kAtOnce>(row, out, width, reference_[r]);
      else
        total = exponentiate<1>(row, row, width, reference_[r]);
      store(lanes_ + r * w, total);
      if (mark)
        for (int c = 0; c < n; ++c)
          if (visible_[r * n + c] && row[c] == 0) row[c] = std::numeric_limits<A>::min();
      if (p_.dropout.p > 0) {
        const Query<A> q = query(r);
        drop_row(row, words_, p_.dropout, q.mod.b, q.mod.h, q.i, j, n);
      }
      if constexpr (!std::is_same_v<P, A>)
        if (convert_later)
          for (int c = 0; c < width; c += w) store(out + c, load(row + c));
    }
    update_sum(r0, rows);
  }

  // What the results of row r0, ... before the last block() are to be multiplied by.
  const A* factors(int r0) const { return factor_ + r0; }
  // The maximum of the logits, the product of the backward: exact, so that lse is rounded once, or
  // rounded as there. Where one key takes all its probability there is then exactly 1.
  double max(int r) const {
    if (modified_) return double(max_[r]);
    const A scale = A(p_.scale);
    return kFmaIsExact ? double(max_[r]) * double(scale) : double(A(max_[r] * scale));
  }
  double sum(int r) const { return double(sum_[r]) + double(sum_low_[r]); }  // of exp(logit - max)

 private:
  // out = exp(row - reference); returns the sums of the lanes.
  template <int kTogether, typename P>
  FASTATTN_INLINE V exponentiate(const A* row, P* out, int width, A reference) const {
    const ScaledExp<A, kExact> exp = exp_;
    const V base = set1(reference);
    V total[2] = {zero<A>(), zero<A>()};
    int c = 0;
    const auto step = [&](auto count) FASTATTN_INLINE_LAMBDA {
      V x[count];
      unroll<count>([&](auto i) FASTATTN_INLINE_LAMBDA { x[i] = load(row + c + i * w) - base; });
      exp(x);
      unroll<count>([&](auto i) FASTATTN_INLINE_LAMBDA { total[i % 2] = total[i % 2] + x[i]; });
      if constexpr (count % 2 == 0)
        unroll<count / 2>([&](auto i) FASTATTN_INLINE_LAMBDA {
          store_two(out + c + 2 * i * w, x[2 * i], x[2 * i + 1]);
        });
      else
        unroll<count>([&](auto i) FASTATTN_INLINE_LAMBDA { store(out + c + i * w, x[i]); });
      c += count * w;
    };
    if constexpr (kTogether > 1)
      while (c + kTogether * w <= width) step(std::integral_constant<int, kTogether>{});
    while (c < width) step(std::integral_constant<int, 1>{});
    return total[0] + total[1];
  }

  // Rows beyond the last are carried along as garbage in the padding, and overwritten later.
  void update_max(int r0, int rows) {
    const V hidden = set1(kHidden);
    for (int r = 0; r < rows; r += w) {
      const int live = std::min(w, rows - r);
      const V block = reduce_rows<Maximum>(lanes_ + r * w);
      const V before = load_n(max_ + r0 + r, live);
      const V now = vmax(block, before);
      // No change, also from -inf to -inf: a factor of 1.
      V step[] = {select(equal(now, before), zero<A>(), before - now)};
      exp_(step);
      store_n(max_ + r0 + r, now, live);
      store_n(factor_ + r0 + r, step[0], live);
      // A row that has seen nothing yet is all -inf: any finite reference turns it into zeros.
      store(reference_ + r, select(equal(now, hidden), zero<A>(), now));
    }
  }
  void update_sum(int r0, int rows) {
    for (int r = 0; r < rows; r += w) {
      const int live = std::min(w, rows - r);
      const V block = reduce_rows<Sum>(lanes_ + r * w);
      const V factor = load_n(factor_ + r0 + r, live), before = load_n(sum_ + r0 + r, live);
      // What rounding takes off is carried along (all of it with fused products).
      const V rescaled = factor * before;
      const auto [now, rest] = exact_sum(rescaled, block);
      const V lost = fma(factor, before, zero<A>() - rescaled) + rest;
      store_n(sum_ + r0 + r, now, live);
      store_n(sum_low_ + r0 + r, fma(factor, load_n(sum_low_ + r0 + r, live), lost), live);
    }
  }

  const AttentionParams& p_;
  const bool modified_;
  const ScaledExp<A, kExact> exp_;      // of a difference of scores
  A *max_, *sum_, *sum_low_, *factor_;  // of the tile
  A *reference_, *lanes_;               // of the block: maxima, and per-lane maxima or sums
  A* bias_;
  uint32_t* words_;
  bool* visible_;
};

}  // namespace
}  // namespace fastattn
