// One tile of the backward pass, queries against keys: makes p and ds from lse, and adds their
// products to dq, dk and dv. The formulas are at the head of attention_backward.cpp.
#pragma once
#include <cmath>
#include <tuple>
#include <utility>

#include "attention_plan.h"
#include "attention_score.h"
#include "scratch.h"
#include "tile_matmul.h"

namespace fastattn {
namespace {

// Tile sizes: multiples of the register tile's rows, keys of the panel too.
constexpr int kQueryBlock = 8 * kTileRows;
template <typename A>
constexpr int kKeyBlock = (kTotalsInRegisters                      ? 8
                           : kTileRows == 6 && Vec<A>::kWidth == 8 ? 12
                                                                   : 4) *
                          Vec<A>::kWidth;

// The gradients of few queries have few terms for roundings to average out in, and are cheap: their
// scores are made again as decode made them, so that their p add up to 1, and no exponent of a p is
// rounded.
inline bool few_queries(const AttentionParams& p) {
  return p.shape.q_len <= ForwardPlan::kDecodeQueries;
}

struct Wanted {
  bool dq, dk, dv;
  bool dbias;   // written while sweeping
  bool dlogit;  // d logit in place of ds
  bool ds() const { return dq || dk || dbias || dlogit; }
  Wanted without_dq() const { return {false, dk, dv, dbias, dlogit}; }
};

template <typename T>
class BackwardTile {
  using Compute = typename ComputeOf<T>::type;
  using A = typename Compute::Acc;
  using Elem = typename Compute::Elem;
  static constexpr int kDepth = Compute::kDepth;
  static constexpr int kWide = kPanel<A>;
  static constexpr int kKeys = kKeyBlock<A>;
  static constexpr int kRows = kQueryBlock;
  static constexpr ptrdiff_t kByRow = kRows / kDepth * kWide;  // panel strides: K runs along rows,
  static constexpr ptrdiff_t kByKey = kKeys / kDepth * kWide;  // or along keys
  using Narrow = std::conditional_t<kDepth == 1, A, T>;        // what the products read

 public:
  BackwardTile(const AttentionParams& p, const AttentionGrads& g, Wanted wanted, Scratch& s)
      : p_(p),
        g_(g),
        wanted_(wanted),
        modified_(ScoreMod<A>::needed(p)),
        few_(kDepth == 1 && few_queries(p)),
        d_(int(p.shape.head_dim)),
        dv_(int(p.shape.v_dim)),
        d_elems_(int(round_up(d_, kDepth) / kDepth)),
        dv_elems_(int(round_up(dv_, kDepth) / kDepth)),
        d_cols_(int(round_up(d_, kWide))),
        dv_cols_(int(round_up(dv_, kWide))),
        k_transposed_(s.take<Elem>(size_t(kKeys) * d_elems_)),
        v_transposed_(s.take<Elem>(size_t(kKeys) * dv_elems_)),
        k_panels_(s.take<Elem>(size_t(kKeys / kDepth) * d_cols_)),
        q_rows_(s.take<Elem>(size_t(kRows) * d_elems_)),
        q_panels_(s.take<Elem>(size_t(kRows / kDepth) * d_cols_)),
        do_rows_(s.take<Elem>(size_t(kRows) * dv_elems_)),
        do_panels_(s.take<Elem>(size_t(kRows / kDepth) * dv_cols_)),
        scores_(s.take<A>(size_t(kRows) * kKeys)),
        dprobs_(s.take<A>(size_t(kRows) * kKeys)),
        ds_rows_(kDepth == 1 ? nullptr : s.take<Narrow>(size_t(kRows) * kKeys)),
        p_pairs_(kDepth == 1 ? nullptr : s.take<Elem>(size_t(kRows / kDepth) * kKeys)),
        ds_pairs_(kDepth == 1 ? nullptr : s.take<Elem>(size_t(kRows / kDepth) * kKeys)),
        slope_(s.take<A>(kKeys)),
        bias_(s.take<A>(kKeys)),
        keep_(s.take<A>(kKeys)),
        words_(s.take<uint32_t>(words_for(kKeys))) {}

  int d_cols() const { return d_cols_; }
  int dv_cols() const { return dv_cols_; }

  // Readies keys [j, j + n) of KV head (b, kv).
  FASTATTN_NOINLINE void load_keys(int64_t b, int64_t kv, int64_t j, int n) {
    b_ = b;
    j_ = j;
    n_ = loaded_ = n;
    const Source<T> k{p_.k.at<const T>(b, kv, j), p_.k.stride[2], p_.k.stride[3]};
    const Source<T> v{p_.v.at<const T>(b, kv, j), p_.v.stride[2], p_.v.stride[3]};
    pack_panels_transposed<Compute>(k_transposed_, ptrdiff_t(d_elems_) * kWide, k, n, d_);
    pack_panels_transposed<Compute>(v_transposed_, ptrdiff_t(dv_elems_) * kWide, v, n, dv_);
    if (wanted_.dq) keys_ = panels_of<Compute>(k_panels_, kByKey, k, n, d_);
    keys_finite_ = all_finite(k, n, d_);
  }

  // Makes the tiles of p and ds for queries [i, i + rows) of head h and the keys at hand.
  FASTATTN_NOINLINE void load_queries(int64_t h, int64_t i, int rows) {
    // Keys after the last that any of them sees are left out; a row of dlogit has them all.
    const KeyRange seen = p_.mask.any_keys(i, i + rows, p_.shape.k_len);
    if (!wanted_.dlogit) n_ = int(std::min<int64_t>(loaded_, seen.end - j_));
    const Source<T> q = load_scores(h, i, rows);
    const Source<T> dout{g_.dout.at<const T>(b_, h, i), g_.dout.stride[2], g_.dout.stride[3]};
    const KeyRange full = p_.mask.all_keys(i, i + rows, p_.shape.k_len);
    const bool hides = p_.bias || j_ < full.begin || j_ + n_ > full.end;
    spoils_ = hides && !(keys_finite_ && all_finite(q, rows, d_) && all_finite(dout, rows, dv_));
    if (wanted_.ds()) {
      product(rows_of<Compute>(do_rows_, dv_elems_, dout, rows, dv_),
              {v_transposed_, ptrdiff_t(dv_elems_) * kWide}, dprobs_, rows, dv_elems_);
    }
    if (wanted_.dk) queries_ = panels_of<Compute>(q_panels_, kByRow, q, rows, d_);
    if (wanted_.dv) douts_ = panels_of<Compute>(do_panels_, kByRow, dout, rows, dv_);
    differentiate();
  }

  // dv (n, dv_cols) += drop(p)^T . do
  void add_dv(A* dv) const { add(by_key(scores_, p_pairs_), douts_, dv, dv_cols_, n_, rows_); }
  // dk (n, d_cols) += ds^T . q
  void add_dk(A* dk) const { add(by_key(dprobs_, ds_pairs_), queries_, dk, d_cols_, n_, rows_); }
  // dq (rows, d_cols) += ds . k
  void add_dq(A* dq) const {
    const auto* ds = kDepth == 1 ? reinterpret_cast<const Elem*>(dprobs_)
                                 : reinterpret_cast<const Elem*>(ds_rows_);
    add({ds, kKeys / kDepth, 1}, keys_, dq, d_cols_, rows_, n_);
  }
  // Row r of d logit (n), which is the bias's gradient: only of a tile that wants nothing else.
  const A* dlogit(int r) const { return dprobs_ + ptrdiff_t(r) * kKeys; }

 private:
  static Left<Compute> by_key(const A* plain, const Elem* pairs) {
    if constexpr (kDepth == 1) return {reinterpret_cast<const Elem*>(plain), 1, kKeys};
    return {pairs, 1, kKeys};
  }
  void add(Left<Compute> left, Panels<Compute> right, A* c, int cols, int rows, int depth) const {
    const int elems = int(round_up(depth, kDepth) / kDepth);
    if (spoils_)
      tile_matmul_sparse(left, right, c, cols, rows, cols, elems);
    else
      tile_matmul(left, right, c, cols, rows, cols, elems, Add{});
  }

  // c (rows, n_) = a . b
  void product(Left<Compute> a, Panels<Compute> b, A* c, int rows, int elems) const {
    if constexpr (kDepth == 1)
      if (few_) return tile_product_by_lanes(a, b, c, kKeys, rows, n_, elems);
    tile_matmul(a, b, c, kKeys, rows, n_, elems, Store{});
  }

  // scores_ = q . k^T
  Source<T> load_scores(int64_t h, int64_t i, int rows) {
    h_ = h;
    i_ = i;
    rows_ = rows;
    const Source<T> q{p_.q.at<const T>(b_, h, i), p_.q.stride[2], p_.q.stride[3]};
    product(rows_of<Compute>(q_rows_, d_elems_, q, rows, d_),
            {k_transposed_, ptrdiff_t(d_elems_) * kWide}, scores_, rows, d_elems_);
    return q;
  }

  // Row r of scores_ -> logits, and their derivatives to slope_.
  A* make_logits(const ScoreMod<A>& mod, int r) {
    A* s = scores_ + ptrdiff_t(r) * kKeys;
    const int width = int(round_up(n_, Vec<A>::kWidth));
    if (modified_) mod.template apply<true>(s, bias_, slope_, i_ + r, j_, width);
    const KeyRange sees = p_.mask.keys_of(i_ + r, p_.shape.k_len);
    mask_row(s, sees.begin - j_, std::min<int64_t>(sees.end - j_, n_), width);
    return s;
  }

  // scores_ -> drop(p), dprobs_ -> ds, and their narrow copies.
  void differentiate() {
    constexpr int w = Vec<A>::kWidth;
    const ScoreMod<A> mod(p_, b_, h_);
    const int width = int(round_up(n_, w));
    const size_t at = size_t((b_ * p_.shape.q_heads + h_) * p_.shape.q_len + i_);
    for (int r = 0; r < rows_; ++r) {
      A* s = make_logits(mod, r);
      A* dp = dprobs_ + ptrdiff_t(r) * kKeys;
      const A lse = static_cast<const A*>(p_.lse)[at + r];
      const A low = p_.lse_low ? static_cast<const A*>(p_.lse_low)[at + r] : A(0);
      const A delta = g_.delta ? static_cast<const A*>(g_.delta)[at + r] : A(0);
      const A dlse = g_.dlse ? static_cast<const A*>(g_.dlse)[at + r] : A(0);
      row(s, dp, width, lse, low, delta, dlse, r);
      if (kDepth == 2 || p_.dropout.p > 0) {
        // Keys beyond the last must not reach the products as NaN.
        for (int c = n_; c < width; ++c) s[c] = dp[c] = 0;
      }
      if (p_.dropout.p > 0 && wanted_.dv) drop_row(s, words_, p_.dropout, b_, h_, i_ + r, j_, n_);
    }
    if constexpr (kDepth == 2) narrow(width);
  }

  void row(A* s, A* dp, int width, A lse, A low, A delta, A dlse, int r) {
    constexpr A infinity = std::numeric_limits<A>::infinity();
    if (lse == -infinity) lse = infinity;  // sees no key: p = 0
    const bool drops = p_.dropout.p > 0;
    if (drops && wanted_.ds()) {  // dp = drop(do . v)
      std::fill_n(keep_, width, A(1));
      drop_row(keep_, words_, p_.dropout, b_, h_, i_ + r, j_, n_);
      for (int c = 0; c < n_; ++c) dp[c] *= keep_[c];
    }
    if (sizeof(T) == 2 && g_.delta && wanted_.ds()) {
      const KeyRange sees = p_.mask.keys_of(i_ + r, p_.shape.k_len);
      if (sees.begin >= j_ && sees.end <= j_ + n_) delta = own_delta(s, dp, width, lse, low);
    }
    // One that saw a NaN has lse NaN, and still p = 0 where it sees nothing.
    const bool spoilt = lse != lse;
    if (modified_ || spoilt || few_ || wanted_.dbias || wanted_.dlogit || !wanted_.ds())
      row_loop<true>(s, dp, width, lse, low, delta, dlse, r);
    else
      row_loop<false>(s, dp, width, lse, low, delta, dlse, r);
  }

  // delta_i as sum_j p_ij dp_ij, of a row all of whose keys are at hand. In do_i . o_i, o has been
  // rounded to 16 bits, which shows where the gradients of a row that sees few keys cancel.
  A own_delta(const A* s, const A* dp, int width, A lse, A low) const {
    using V = Vec<A>;
    const V factor = set1(modified_ ? A(1) : A(p_.scale));
    const V minus_lse = set1(-lse), minus_low = set1(-low);
    const V hidden = set1(-std::numeric_limits<A>::infinity());
    V sum = zero<A>();
    for (int c = 0; c < width; c += V::kWidth) {
      const V score = load(s + c);
      V p[] = {fma(score, factor, minus_lse) + minus_low};
      exp_(p);
      p[0] = select(equal(score, hidden), zero<A>(), p[0]);
      sum = sum + select(equal(p[0], zero<A>()), zero<A>(), p[0] * load(dp + c));
    }
    return hsum(sum);
  }

  // score factor - lse - low, and what rounding takes off it.
  static FASTATTN_INLINE std::pair<Vec<A>, Vec<A>> exact_exponent(Vec<A> score, Vec<A> factor,
                                                                  Vec<A> minus_lse,
                                                                  Vec<A> minus_low) {
    const Vec<A> logit = score * factor;
    const auto [high, low] = exact_sum(logit, minus_lse);
    return exact_sum(high, fma(score, factor, zero<A>() - logit) + low + minus_low);
  }

  template <bool kGeneral>
  FASTATTN_INLINE void row_loop(A* s, A* dp, int width, A lse, A low, A delta, A dlse, int r) {
    using V = Vec<A>;
    constexpr int w = V::kWidth;
    A* dbias = kGeneral && wanted_.dbias ? g_.dbias.at<A>(b_, h_, i_ + r) + j_ : nullptr;
    const V vdelta = set1(delta), vdlse = set1(dlse), scale = set1(A(p_.scale));
    const V minus_lse = set1(-lse), minus_low = set1(-low);
    const V hidden = set1(-std::numeric_limits<A>::infinity());
    const V factor = kGeneral && modified_ ? set1(A(1)) : scale;
    int c = 0;
    const auto step = [&](auto count) FASTATTN_INLINE_LAMBDA {
      V p[count], rest[count];
      unroll<count>([&](auto k) FASTATTN_INLINE_LAMBDA {
        const V score = load(s + c + k * w);
        p[k] = fma(score, factor, minus_lse) + minus_low;
        if (kGeneral && few_)
          std::tie(p[k], rest[k]) = exact_exponent(score, factor, minus_lse, minus_low);
      });
      exp_(p);
      unroll<count>([&](auto k) FASTATTN_INLINE_LAMBDA {
        const int at = c + k * w;
        if (kGeneral && few_)  // infinities leave no number
          p[k] = select(equal(rest[k], rest[k]), fma(p[k], rest[k], p[k]), p[k]);
        if (kGeneral) p[k] = select(equal(load(s + at), hidden), zero<A>(), p[k]);
        store(s + at, p[k]);
        if (kGeneral && !wanted_.ds()) return;
        V g = p[k] * ((load(dp + at) - vdelta) + vdlse);
        const auto unseen = equal(p[k], zero<A>());
        if (dbias) store_n(dbias + at, select(unseen, zero<A>(), g), std::min(w, n_ - at));
        if (!kGeneral)
          g = g * scale;
        else if (!wanted_.dlogit)
          g = g * (modified_ ? load(slope_ + at) : scale);
        // Where p is 0, so is the gradient, whatever do . v is.
        store(dp + at, select(unseen, zero<A>(), g));
      });
      c += count * w;
    };
    if constexpr (!kGeneral)
      while (c + 4 * w <= width) step(std::integral_constant<int, 4>{});
    while (c < width) step(std::integral_constant<int, 1>{});
  }

  // bf16 copies of p and ds: ds by rows for dq, both by pairs of rows for dv and dk.
  void narrow(int width) {
    if constexpr (kDepth == 2) {
      constexpr int w = Vec<A>::kWidth;
      const auto pair_rows = [&](const A* src, Elem* dst) {
        for (int r = 0; r < rows_; r += 2)
          for (int c = 0; c < width; c += w) {
            const A* first = src + ptrdiff_t(r) * kKeys + c;
            const Vec<A> second = r + 1 < rows_ ? load(first + kKeys) : zero<A>();
            store_pairs(dst + ptrdiff_t(r / 2) * kKeys + c, load(first), second);
          }
      };
      if (wanted_.dv) pair_rows(scores_, p_pairs_);
      if (wanted_.dk) pair_rows(dprobs_, ds_pairs_);
      if (wanted_.dq)
        for (int r = 0; r < rows_; ++r) {
          Narrow* dst = ds_rows_ + ptrdiff_t(r) * kKeys;
          for (int c = 0; c < width; c += w)
            store(dst + c, load(dprobs_ + ptrdiff_t(r) * kKeys + c));
          if (n_ % 2) dst[n_] = Narrow{0};
        }
    }
  }

  const AttentionParams& p_;
  const AttentionGrads& g_;
  const Wanted wanted_;
  const bool modified_, few_;
  const ScaledExp<A, true> exp_{1.0};
  const int d_, dv_, d_elems_, dv_elems_, d_cols_, dv_cols_;
  Elem *k_transposed_, *v_transposed_, *k_panels_, *q_rows_, *q_panels_, *do_rows_, *do_panels_;
  Panels<Compute> keys_{}, queries_{}, douts_{};  // at hand, for dq, dk and dv
  A *scores_, *dprobs_;                           // (kRows, kKeys): scores, then p; do . v, then ds
  Narrow* ds_rows_;
  Elem *p_pairs_, *ds_pairs_;
  A *slope_, *bias_, *keep_;
  uint32_t* words_;
  int64_t b_ = 0, h_ = 0, i_ = 0, j_ = 0;
  int loaded_ = 0, n_ = 0, rows_ = 0;  // keys loaded; keys and queries at hand
  bool keys_finite_ = true, spoils_ = false;
};

}  // namespace
}  // namespace fastattn
