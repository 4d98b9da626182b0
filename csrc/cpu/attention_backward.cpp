// Attention backward (Dao et al., "FlashAttention", 2022): the probabilities are made again from
// lse, tile by tile, and never held whole. With p the probabilities, o the output and l the lse:
//   dv_j = sum_i drop(p_ij) do_i              dp_ij = drop(do_i . v_j)
//   dlogit_ij = p_ij (dp_ij - delta_i + dl_i) delta_i = do_i . o_i
//   ds_ij = dlogit_ij * dlogit/ds             dq_i = sum_j ds_ij k_j,   dk_j = sum_i ds_ij q_i
// A unit of work takes a range of keys of one KV head through the queries that see them: dk and dv
// gather in a tile, dq in a float32 copy of the head.
//
// A large lse, say -3e38 from a bias of the smallest float, has no room for the log of the sum, and
// exp(logit - lse) would be anything: the maxima and sums of those rows are made again.
#include <memory>
#include <numeric>

#include "attention_score.h"
#include "backward_plan.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "tile_matmul.h"

namespace fastattn {
namespace {

// Tile sizes: multiples of the register tile's rows, keys of the panel too.
constexpr int kQueryBlock = 8 * kTileRows;
template <typename A>
constexpr int kKeyBlock = kTileRows == 6 && kPanel<A> == 16 ? 96 : 2 * kPanel<A>;

// What turns a logit into its probability: exp(logit - reference) * factor. Usually the
// reference is lse and the factor 1; for a row made again, its maximum and 1 / its sum.
template <typename A>
struct RowScale {
  A reference, factor;
};

// Few queries can afford shorter sums, as exact as the forward's, which sums by lanes (decode).
inline int sum_run(const AttentionParams& p) {
  return p.shape.q_len <= ForwardPlan::kDecodeQueries ? 16 : kSumRun;
}

struct Wanted {
  bool dq, dk, dv;
  bool dbias;   // written while sweeping
  bool dlogit;  // d logit in place of ds
  bool ds() const { return dq || dk || dbias || dlogit; }
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
  // `again`: of all rows, where some were made again, else null.
  BackwardTile(const AttentionParams& p, const AttentionGrads& g, Wanted wanted,
               const RowScale<A>* again, Scratch& s)
      : p_(p),
        g_(g),
        wanted_(wanted),
        again_(again),
        modified_(ScoreMod<A>::needed(p) || again),
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
  void load_keys(int64_t b, int64_t kv, int64_t j, int n) {
    b_ = b;
    j_ = j;
    n_ = n;
    const Source<T> k{p_.k.at<const T>(b, kv, j), p_.k.stride[2], p_.k.stride[3]};
    const Source<T> v{p_.v.at<const T>(b, kv, j), p_.v.stride[2], p_.v.stride[3]};
    pack_panels_transposed<Compute>(k_transposed_, ptrdiff_t(d_elems_) * kWide, k, n, d_);
    pack_panels_transposed<Compute>(v_transposed_, ptrdiff_t(dv_elems_) * kWide, v, n, dv_);
    if (wanted_.dq) pack_panels<Compute>(k_panels_, kByKey, k, n, d_);
    keys_finite_ = all_finite(k, n, d_);
  }

  // Makes the tiles of p and ds for queries [i, i + rows) of head h and the keys at hand.
  void load_queries(int64_t h, int64_t i, int rows) {
    const Source<T> q = load_scores(h, i, rows);
    const Source<T> dout{g_.dout.at<const T>(b_, h, i), g_.dout.stride[2], g_.dout.stride[3]};
    const KeyRange full = p_.mask.all_keys(i, i + rows, p_.shape.k_len);
    const bool hides = p_.bias || j_ < full.begin || j_ + n_ > full.end;
    spoils_ = hides && !(keys_finite_ && all_finite(q, rows, d_) && all_finite(dout, rows, dv_));
    const int panels = int(round_up(n_, kWide) / kWide);
    if (wanted_.ds()) {
      pack_rows<Compute>(do_rows_, dv_elems_, dout, rows, dv_);
      tile_product<Compute>({do_rows_, dv_elems_, 1}, {v_transposed_, ptrdiff_t(dv_elems_) * kWide},
                            dprobs_, kKeys, rows, panels, dv_elems_, sum_run(p_));
    }
    if (wanted_.dk) pack_panels<Compute>(q_panels_, kByRow, q, rows, d_);
    if (wanted_.dv) pack_panels<Compute>(do_panels_, kByRow, dout, rows, dv_);
    differentiate();
  }

  // Takes the keys at hand into the maximum and the sum of exp(logit - maximum) of each query.
  void sum_rows(int64_t h, int64_t i, int rows, A* max, double* sum) {
    load_scores(h, i, rows);
    const ScoreMod<A> mod(p_, b_, h_);
    for (int r = 0; r < rows; ++r) {
      const A* s = make_logits(mod, r);
      for (int c = 0; c < n_; ++c) {
        if (s[c] == -std::numeric_limits<A>::infinity()) continue;
        if (s[c] > max[r]) {
          sum[r] *= std::exp(double(max[r]) - s[c]);
          max[r] = s[c];
        }
        sum[r] += std::exp(double(s[c]) - max[r]);
      }
    }
  }

  // dv (n, dv_cols) += drop(p)^T . do
  void add_dv(A* dv) const {
    add(by_key(scores_, p_pairs_), {do_panels_, kByRow}, dv, dv_cols_, n_, rows_);
  }
  // dk (n, d_cols) += ds^T . q
  void add_dk(A* dk) const {
    add(by_key(dprobs_, ds_pairs_), {q_panels_, kByRow}, dk, d_cols_, n_, rows_);
  }
  // dq (rows, d_cols) += ds . k
  void add_dq(A* dq) const {
    const auto* ds = kDepth == 1 ? reinterpret_cast<const Elem*>(dprobs_)
                                 : reinterpret_cast<const Elem*>(ds_rows_);
    add({ds, kKeys / kDepth, 1}, {k_panels_, kByKey}, dq, d_cols_, rows_, n_);
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
      tile_matmul_sparse(left, right, c, cols, rows, cols / kWide, elems);
    else
      tile_matmul<Into::kAdd>(left, right, c, cols, rows, cols / kWide, elems);
  }

  // scores_ = q . k^T
  Source<T> load_scores(int64_t h, int64_t i, int rows) {
    h_ = h;
    i_ = i;
    rows_ = rows;
    const Source<T> q{p_.q.at<const T>(b_, h, i), p_.q.stride[2], p_.q.stride[3]};
    const int panels = int(round_up(n_, kWide) / kWide);
    pack_rows<Compute>(q_rows_, d_elems_, q, rows, d_);
    tile_product<Compute>({q_rows_, d_elems_, 1}, {k_transposed_, ptrdiff_t(d_elems_) * kWide},
                          scores_, kKeys, rows, panels, d_elems_, sum_run(p_));
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
      const A delta = static_cast<const A*>(g_.delta)[at + r];
      const A dlse = g_.dlse ? static_cast<const A*>(g_.dlse)[at + r] : A(0);
      row(s, dp, width, again_ ? again_[at + r] : RowScale<A>{lse, 1}, delta, dlse, r);
      if (kDepth == 2 || p_.dropout.p > 0) {
        // Keys beyond the last must not reach the products as NaN.
        for (int c = n_; c < width; ++c) s[c] = dp[c] = 0;
      }
      if (p_.dropout.p > 0 && wanted_.dv) drop_row(s, words_, p_.dropout, b_, h_, i_ + r, j_, n_);
    }
    if constexpr (kDepth == 2) narrow(width);
  }

  void row(A* s, A* dp, int width, RowScale<A> to_p, A delta, A dlse, int r) {
    constexpr A infinity = std::numeric_limits<A>::infinity();
    if (to_p.reference == -infinity) to_p.reference = infinity;  // sees no key: p = 0
    const bool drops = p_.dropout.p > 0;
    if (drops && wanted_.ds()) {  // dp = drop(do . v)
      std::fill_n(keep_, width, A(1));
      drop_row(keep_, words_, p_.dropout, b_, h_, i_ + r, j_, n_);
      for (int c = 0; c < n_; ++c) dp[c] *= keep_[c];
    }
    // One that saw a NaN has lse NaN, and still p = 0 where it sees nothing.
    const bool spoilt = to_p.reference != to_p.reference;
    if (modified_ || spoilt || wanted_.dbias || wanted_.dlogit || !wanted_.ds())
      row_loop<true>(s, dp, width, to_p, delta, dlse, r);
    else
      row_loop<false>(s, dp, width, to_p, delta, dlse, r);
  }

  template <bool kGeneral>
  FASTATTN_INLINE void row_loop(A* s, A* dp, int width, RowScale<A> to_p, A delta, A dlse, int r) {
    using V = Vec<A>;
    constexpr int w = V::kWidth;
    A* dbias = kGeneral && wanted_.dbias ? g_.dbias.at<A>(b_, h_, i_ + r) + j_ : nullptr;
    const V vdelta = set1(delta), vdlse = set1(dlse), scale = set1(A(p_.scale));
    const V reference = set1(to_p.reference), share = set1(to_p.factor);
    const V hidden = set1(-std::numeric_limits<A>::infinity());
    const V factor = kGeneral && modified_ ? set1(A(1)) : scale;
    for (int c = 0; c < width; c += w) {
      // The logit is rounded as it was for lse.
      const V logit = load(s + c) * factor;
      V p = exp_below(logit - reference) * share;
      if (kGeneral) p = select(equal(logit, hidden), zero<A>(), p);
      store(s + c, p);
      if (kGeneral && !wanted_.ds()) continue;
      V g = p * ((load(dp + c) - vdelta) + vdlse);
      if (dbias) store_n(dbias + c, select(equal(p, zero<A>()), zero<A>(), g), std::min(w, n_ - c));
      if (!kGeneral)
        g = g * scale;
      else if (!wanted_.dlogit)
        g = g * (modified_ ? load(slope_ + c) : scale);
      // Where p is 0, so is the gradient, whatever do . v is.
      store(dp + c, select(equal(p, zero<A>()), zero<A>(), g));
    }
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
  const RowScale<A>* again_;
  const bool modified_;
  const int d_, dv_, d_elems_, dv_elems_, d_cols_, dv_cols_;
  Elem *k_transposed_, *v_transposed_, *k_panels_, *q_rows_, *q_panels_, *do_rows_, *do_panels_;
  A *scores_, *dprobs_;  // (kRows, kKeys): scores, then p; do . v, then ds
  Narrow* ds_rows_;
  Elem *p_pairs_, *ds_pairs_;
  A *slope_, *bias_, *keep_;
  uint32_t* words_;
  int64_t b_ = 0, h_ = 0, i_ = 0, j_ = 0;
  int n_ = 0, rows_ = 0;
  bool keys_finite_ = true, spoils_ = false;
};

// delta_i = do_i . o_i, one product after the other as tile_matmul sums do_i . v_j: for a query
// that sees one key the two then cancel to the last bit. Rows side by side keep the processor busy.
template <typename T>
void compute_delta(const AttentionParams& p, const AttentionGrads& g, int threads) {
  using A = Acc<T>;
  constexpr int kAtOnce = 8;
  const AttentionShape& s = p.shape;
  const int64_t rows = s.batch * s.q_heads * s.q_len;
  parallel_static(rows, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t first = begin; first < end; first += kAtOnce) {
      const T *o[kAtOnce], *d[kAtOnce];
      for (int k = 0; k < kAtOnce; ++k) {
        const int64_t r = std::min(first + k, end - 1);
        const int64_t b = r / s.q_len / s.q_heads, h = r / s.q_len % s.q_heads, i = r % s.q_len;
        o[k] = p.out.at<const T>(b, h, i);
        d[k] = g.dout.at<const T>(b, h, i);
      }
      A total[kAtOnce] = {};
      for (int64_t run = 0; run < s.v_dim; run += sum_run(p)) {
        A sum[kAtOnce] = {};
        for (int64_t c = run; c < std::min<int64_t>(run + sum_run(p), s.v_dim); ++c)
          unroll<kAtOnce>([&](auto k) {
            sum[k] =
                fma(to_acc(o[k][c * p.out.stride[3]]), to_acc(d[k][c * g.dout.stride[3]]), sum[k]);
          });
        unroll<kAtOnce>([&](auto k) { total[k] = total[k] + sum[k]; });
      }
      std::copy_n(total, std::min<int64_t>(kAtOnce, end - first), static_cast<A*>(g.delta) + first);
    }
  });
}

// Rows (rows, cols) of an accumulator to a tensor; dst.stride[3] may be anything.
template <typename T, typename A>
void write_rows(const View& dst, int64_t b, int64_t h, int64_t i, const A* src, int64_t rows,
                int cols, int src_row) {
  constexpr int w = Vec<A>::kWidth;
  for (int64_t r = 0; r < rows; ++r, src += src_row) {
    T* out = dst.at<T>(b, h, i + r);
    int c = 0;
    if (dst.stride[3] == 1)
      for (; c + w <= cols; c += w) store(out + c, load(src + c));
    for (; c < cols; ++c) out[c * dst.stride[3]] = from_acc<T>(src[c]);
  }
}

template <typename A>
void add_rows(A* total, const A* part, int64_t count) {
  constexpr int w = Vec<A>::kWidth;  // counts are multiples of the panel
  for (int64_t c = 0; c < count; c += w) store(total + c, load(total + c) + load(part + c));
}

template <typename T>
class Backward {
  using A = Acc<T>;

 public:
  Backward(const AttentionParams& p, const AttentionGrads& g)
      : p_(p),
        g_(g),
        plan_(p, kKeyBlock<A>),
        bias_in_sweep_(g.dbias && same_shape_as_scores(p, g)),
        wanted_{bool(g.dq), bool(g.dk), bool(g.dv), bias_in_sweep_, false},
        d_cols_(round_up(p.shape.head_dim, kPanel<A>)),
        dv_cols_(round_up(p.shape.v_dim, kPanel<A>)) {}

  void run() {
    compute_delta<T>(p_, g_, plan_.threads);
    if (p_.shape.k_len == 0) return;
    make_inexact_rows_again();
    if (wanted_.ds() || wanted_.dv) sweep();
    if (g_.dbias && !bias_in_sweep_) sum_bias();
  }

 private:
  // The bias has an element for each score: its gradient needs no sum.
  static bool same_shape_as_scores(const AttentionParams& p, const AttentionGrads& g) {
    const AttentionShape& s = p.shape;
    return (g.dbias.stride[0] || s.batch == 1) && (g.dbias.stride[1] || s.q_heads == 1) &&
           (g.dbias.stride[2] || s.q_len == 1) && g.dbias.stride[3] == 1;
  }

  const RowScale<A>* again() const { return again_.empty() ? nullptr : again_.data(); }

  // Where a rounding of lse would change a probability by more than about 1e-4; and where queries
  // are few: the forward then summed q . k in another order, and making them again costs little.
  bool inexact(A lse) const {
    return std::isfinite(lse) && (p_.shape.q_len <= ForwardPlan::kDecodeQueries ||
                                  std::abs(lse) * std::numeric_limits<A>::epsilon() > A(1e-4));
  }

  void make_inexact_rows_again() {
    const AttentionShape& s = p_.shape;
    const A* lse = static_cast<const A*>(p_.lse);
    const int64_t rows = s.batch * s.q_heads * s.q_len;
    const auto is_inexact = [&](A x) { return inexact(x); };
    if (std::none_of(lse, lse + rows, is_inexact)) return;
    again_.resize(rows);
    for (int64_t r = 0; r < rows; ++r) again_[r] = {lse[r], 1};
    const int64_t blocks = (s.q_len + kQueryBlock - 1) / kQueryBlock;
    parallel_dynamic(s.batch * s.q_heads * blocks, plan_.threads, [&](int64_t n, int) {
      const int64_t head = n / blocks, b = head / s.q_heads, h = head % s.q_heads;
      const int64_t i = n % blocks * kQueryBlock, first = head * s.q_len + i;
      const int count = int(std::min<int64_t>(kQueryBlock, s.q_len - i));
      if (std::none_of(lse + first, lse + first + count, is_inexact)) return;
      BackwardTile<T> tile(p_, g_, {}, again(), scratch_of_this_thread());
      A max[kQueryBlock];
      double sum[kQueryBlock];
      std::fill_n(
          max, count,
          p_.sinks ? static_cast<const A*>(p_.sinks)[h] : -std::numeric_limits<A>::infinity());
      std::fill_n(sum, count, p_.sinks ? 1.0 : 0.0);
      const KeyRange seen = p_.mask.any_keys(i, i + count, s.k_len);
      for (int64_t j = seen.begin / kKeyBlock<A> * kKeyBlock<A>; j < seen.end; j += kKeyBlock<A>) {
        tile.load_keys(b, h / s.group(), j, int(std::min<int64_t>(kKeyBlock<A>, seen.end - j)));
        tile.sum_rows(h, i, count, max, sum);
      }
      for (int r = 0; r < count; ++r)
        if (inexact(lse[first + r])) again_[first + r] = {max[r], A(1 / sum[r])};
    });
  }

  void sweep() {
    const AttentionShape& s = p_.shape;
    const int64_t units = plan_.units();
    // Where several units add to one head's dq, or to one KV head's dk and dv, each keeps its own
    // part until all are done; else one buffer a thread serves.
    const bool dq_parts = plan_.key_splits > 1, dkv_parts = plan_.group_splits > 1;
    std::vector<std::unique_ptr<A[]>> dq(dq_parts ? units : plan_.threads);
    std::vector<std::unique_ptr<A[]>> dkv(dkv_parts ? units : plan_.threads);
    const int64_t dq_size = s.q_len * d_cols_;
    parallel_dynamic(units, plan_.threads, [&](int64_t u, int thread) {
      const BackwardPlan::Unit unit = plan_.unit(u);
      auto& my_dq = dq[dq_parts ? u : thread];
      auto& my_dkv = dkv[dkv_parts ? u : thread];
      if (wanted_.dq && !my_dq) my_dq.reset(new A[dq_size]);
      const bool several = unit.heads.end - unit.heads.begin > 1;
      if ((dkv_parts || several) && !my_dkv)
        my_dkv.reset(new A[plan_.max_keys * (d_cols_ + dv_cols_)]);
      BackwardTile<T> tile(p_, g_, wanted_, again(), scratch_of_this_thread());
      for (int64_t h = unit.heads.begin; h < unit.heads.end; ++h) {
        if (wanted_.dq) std::fill_n(my_dq.get(), dq_size, A(0));
        head(tile, unit, h, my_dq.get(), my_dkv.get());
        if (wanted_.dq && !dq_parts)
          write_rows<T>(g_.dq, unit.b, h, 0, my_dq.get(), s.q_len, int(s.head_dim), int(d_cols_));
      }
    });
    if (dq_parts && wanted_.dq) merge_dq(dq);
    if (dkv_parts) merge_dkv(dkv);
  }

  // One query head against the unit's keys. dk and dv of a group's heads add up in dkv (keys, dk
  // columns then dv columns), from where the last head takes them to the tensors.
  void head(BackwardTile<T>& tile, const BackwardPlan::Unit& unit, int64_t h, A* dq, A* dkv) {
    constexpr int keys = kKeyBlock<A>;
    const AttentionShape& s = p_.shape;
    const bool first = h == unit.heads.begin, last = h + 1 == unit.heads.end;
    const bool parts = plan_.group_splits > 1;
    std::vector<A> own(dkv ? 0 : size_t(keys) * (d_cols_ + dv_cols_));
    for (int64_t j = unit.keys.begin; j < unit.keys.end; j += keys) {
      const int n = int(std::min<int64_t>(keys, unit.keys.end - j));
      A* dk = dkv ? dkv + (j - unit.keys.begin) * (d_cols_ + dv_cols_) : own.data();
      A* dv = dk + n * d_cols_;
      if (first) std::fill_n(dk, n * (d_cols_ + dv_cols_), A(0));
      tile.load_keys(unit.b, unit.kv, j, n);
      const KeyRange seen = p_.mask.any_queries(j, j + n, s.q_len);
      for (int64_t i = seen.begin; i < seen.end; i += kQueryBlock) {
        const int rows = int(std::min<int64_t>(kQueryBlock, seen.end - i));
        tile.load_queries(h, i, rows);
        if (wanted_.dv) tile.add_dv(dv);
        if (wanted_.dk) tile.add_dk(dk);
        if (wanted_.dq) tile.add_dq(dq + i * d_cols_);
      }
      if (last && !parts) {
        if (wanted_.dk)
          write_rows<T>(g_.dk, unit.b, unit.kv, j, dk, n, int(s.head_dim), int(d_cols_));
        if (wanted_.dv)
          write_rows<T>(g_.dv, unit.b, unit.kv, j, dv, n, int(s.v_dim), int(dv_cols_));
      }
    }
  }

  void merge_dq(const std::vector<std::unique_ptr<A[]>>& parts) {
    const AttentionShape& s = p_.shape;
    const int64_t blocks = (s.q_len + kQueryBlock - 1) / kQueryBlock;
    parallel_static(s.batch * s.q_heads * blocks, plan_.threads,
                    [&](int64_t begin, int64_t end, int) {
                      for (int64_t n = begin; n < end; ++n) {
                        const int64_t head = n / blocks, i = n % blocks * kQueryBlock;
                        const int64_t rows = std::min<int64_t>(kQueryBlock, s.q_len - i);
                        // Splitting the keys, each unit has one query head: see BackwardPlan.
                        A* total = parts[head * plan_.key_splits].get() + i * d_cols_;
                        for (int k = 1; k < plan_.key_splits; ++k)
                          add_rows(total, parts[head * plan_.key_splits + k].get() + i * d_cols_,
                                   rows * d_cols_);
                        write_rows<T>(g_.dq, head / s.q_heads, head % s.q_heads, i, total, rows,
                                      int(s.head_dim), int(d_cols_));
                      }
                    });
  }

  void merge_dkv(const std::vector<std::unique_ptr<A[]>>& parts) {
    const AttentionShape& s = p_.shape;
    const int64_t width = d_cols_ + dv_cols_;
    const int splits = plan_.group_splits;
    // Unit of KV head n, group split g and key split k: (n * group_splits + g) * key_splits + k.
    parallel_static(s.batch * s.kv_heads * plan_.key_splits, plan_.threads,
                    [&](int64_t begin, int64_t end, int) {
                      for (int64_t n = begin; n < end; ++n) {
                        const int64_t first =
                            n / plan_.key_splits * splits * plan_.key_splits + n % plan_.key_splits;
                        const BackwardPlan::Unit unit = plan_.unit(first);
                        const int64_t keys = unit.keys.end - unit.keys.begin;
                        A* total = parts[first].get();
                        for (int g = 1; g < splits; ++g)
                          add_rows(total, parts[first + int64_t(g) * plan_.key_splits].get(),
                                   keys * width);
                        for (int64_t j = 0; j < keys; j += kKeyBlock<A>) {
                          const int64_t rows = std::min<int64_t>(kKeyBlock<A>, keys - j);
                          const A* dk = total + j * width;
                          if (wanted_.dk)
                            write_rows<T>(g_.dk, unit.b, unit.kv, unit.keys.begin + j, dk, rows,
                                          int(s.head_dim), int(d_cols_));
                          if (wanted_.dv)
                            write_rows<T>(g_.dv, unit.b, unit.kv, unit.keys.begin + j,
                                          dk + rows * d_cols_, rows, int(s.v_dim), int(dv_cols_));
                        }
                      }
                    });
  }

  // The gradient of a bias that broadcasts: each thread takes tiles of the bias and sums over all
  // scores that a tile's elements went to. Makes p and dp once more, adds no atomics and no copies.
  void sum_bias() {
    const AttentionShape& s = p_.shape;
    const auto spread = [&](int dim, int64_t size) { return g_.dbias.stride[dim] ? size : 1; };
    const int64_t b_count = spread(0, s.batch), h_count = spread(1, s.q_heads);
    constexpr int keys = kKeyBlock<A>;
    const bool by_query = g_.dbias.stride[2] != 0, by_key = g_.dbias.stride[3] != 0;
    const int64_t q_blocks = by_query ? (s.q_len + kQueryBlock - 1) / kQueryBlock : 1;
    const int64_t k_blocks = by_key ? (s.k_len + keys - 1) / keys : 1;
    parallel_dynamic(b_count * h_count * q_blocks * k_blocks, plan_.threads, [&](int64_t u, int) {
      Scratch& scratch = scratch_of_this_thread();
      BackwardTile<T> tile(p_, g_, {false, false, false, false, true}, again(), scratch);
      // The sum may have millions of terms.
      double* total = scratch.take<double>(size_t(kQueryBlock) * keys);
      std::fill_n(total, size_t(kQueryBlock) * keys, 0.0);
      const int64_t j0 = u % k_blocks * keys, i0 = u / k_blocks % q_blocks * kQueryBlock;
      const int64_t head = u / k_blocks / q_blocks, bh = head / h_count, hh = head % h_count;
      const int64_t i_end = by_query ? std::min(s.q_len, i0 + kQueryBlock) : s.q_len;
      const int64_t j_end = by_key ? std::min(s.k_len, j0 + keys) : s.k_len;
      for (int64_t b = b_count == 1 ? 0 : bh; b < (b_count == 1 ? s.batch : bh + 1); ++b)
        for (int64_t h = h_count == 1 ? 0 : hh; h < (h_count == 1 ? s.q_heads : hh + 1); ++h)
          for (int64_t j = j0; j < j_end; j += keys) {
            const int n = int(std::min<int64_t>(keys, j_end - j));
            const KeyRange seen = p_.mask.any_queries(j, j + n, s.q_len);
            const int64_t begin = std::max(seen.begin, i0), end = std::min(seen.end, i_end);
            if (begin >= end) continue;
            tile.load_keys(b, h / s.group(), j, n);
            for (int64_t i = begin; i < end; i += kQueryBlock) {
              const int rows = int(std::min<int64_t>(kQueryBlock, end - i));
              tile.load_queries(h, i, rows);
              for (int r = 0; r < rows; ++r) {
                double* row = total + (by_query ? (i + r - i0) * keys : 0);
                if (by_key) {
                  for (int c = 0; c < n; ++c) row[c] += tile.dlogit(r)[c];
                } else {
                  row[0] += std::accumulate(tile.dlogit(r), tile.dlogit(r) + n, 0.0);
                }
              }
            }
          }
      for (int64_t r = 0; r < (by_query ? i_end - i0 : 1); ++r) {
        A* out = g_.dbias.at<A>(bh, hh, by_query ? i0 + r : 0) + (by_key ? j0 : 0);
        for (int64_t c = 0; c < (by_key ? j_end - j0 : 1); ++c) out[c] = A(total[r * keys + c]);
      }
    });
  }

  const AttentionParams& p_;
  const AttentionGrads& g_;
  const BackwardPlan plan_;
  const bool bias_in_sweep_;
  const Wanted wanted_;
  const int64_t d_cols_, dv_cols_;
  std::vector<RowScale<A>> again_;  // of all rows; empty: all as usual
};

}  // namespace

void attention_backward(const AttentionParams& p, const AttentionGrads& g) {
  const AttentionShape& s = p.shape;
  if (s.batch == 0 || s.q_heads == 0 || s.q_len == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return Backward<float>(p, g).run();
    case DType::kFloat64:
      return Backward<double>(p, g).run();
    case DType::kBFloat16:
      return Backward<bf16>(p, g).run();
    case DType::kFloat16:
      return Backward<f16>(p, g).run();
    case DType::kBool:
      return;
  }
}

}  // namespace fastattn
