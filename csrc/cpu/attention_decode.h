// Attention of few queries to many keys, bound by reading K and V: each KV head is read once for
// all the queries of its group. Lanes run along head_dim in q . k and along v's columns in p . v.
#pragma once
#include <vector>

#include "online_softmax.h"
#include "tile_matmul.h"

namespace fastattn {
namespace {

template <typename T>
class DecodeTile {
  using Compute = typename ComputeOf<T>::type;
  using A = typename Compute::Acc;
  using Elem = typename Compute::Elem;
  using V = Vec<A>;
  static constexpr int w = V::kWidth;
  static constexpr int kKeys = 32;  // keys between two visits to the online softmax
  static constexpr int kChunk = w * Compute::kDepth;          // numbers of a key in one vector
  static constexpr int kRows = w >= 16 ? 4 : w >= 4 ? 2 : 1;  // queries that share a load
  // One query reads so fast that the processor's own prefetching does better, and short vectors
  // would ask for every cache line several times.
  template <int kCount>
  static constexpr bool kFetches = kCount > 1 && w >= 8;

 public:
  DecodeTile(const AttentionParams& p, Scratch& scratch)
      : p_(p),
        rows_(int(p.shape.q_len * p.shape.group())),
        d_cols_(int(round_up(p.shape.head_dim, kChunk))),
        d_elems_(d_cols_ / Compute::kDepth),
        v_cols_(int(round_up(p.shape.v_dim, 4 * w))),
        q_(scratch.take<Elem>(size_t(rows_) * d_elems_)),
        k_(scratch.take<Elem>(size_t(kKeys) * d_elems_)),
        v_(scratch.take<A>(size_t(kKeys) * v_cols_)),
        scores_(scratch.take<A>(size_t(rows_) * kKeys)),
        out_(scratch.take<A>(size_t(rows_) * v_cols_)),
        softmax_(p, scratch, rows_, rows_, kKeys) {}

  // All queries of the group of KV head kv, rows (head, query), against the keys in `keys`.
  void run(int64_t b, int64_t kv, KeyRange keys) {
    const AttentionShape& s = p_.shape;
    std::fill_n(out_, size_t(rows_) * v_cols_, A(0));
    for (int g = 0; g < s.group(); ++g) {
      const Source<T> q{p_.q.at<const T>(b, kv * s.group() + g, 0), p_.q.stride[2], p_.q.stride[3]};
      pack<Compute>(q_ + g * s.q_len * d_elems_, d_elems_, q, int(s.q_len), int(s.head_dim));
    }
    softmax_.start(rows_);
    std::vector<ScoreMod<A>> mods;
    for (int g = 0; g < s.group(); ++g) mods.emplace_back(p_, b, kv * s.group() + g);
    const Source<T> k{p_.k.at<const T>(b, kv, 0), p_.k.stride[2], p_.k.stride[3]};
    const Source<T> v{p_.v.at<const T>(b, kv, 0), p_.v.stride[2], p_.v.stride[3]};
    const KeyRange full = p_.mask.all_keys(0, s.q_len, s.k_len);
    // Where a conversion would serve few queries it is done on the way, each time anew.
    const bool as_is = std::is_same_v<T, A> || Compute::kDepth == 2;
    const bool k_direct = k.col == 1 && s.head_dim % kChunk == 0 && (as_is || rows_ <= kRows);
    const bool v_direct =
        v.col == 1 && s.v_dim % (4 * w) == 0 && (std::is_same_v<T, A> || rows_ <= kRows);
    for (int64_t j = keys.begin; j < keys.end; j += kKeys) {
      const int n = int(std::min<int64_t>(kKeys, keys.end - j));
      const Source<T> kj{k.at(j, 0), k.row, k.col}, vj{v.at(j, 0), v.row, v.col};
      // What is read in place for several queries at once is asked for two blocks ahead.
      constexpr int kAhead = 2 * kKeys;
      const bool last = j + kAhead + kKeys > keys.end;
      if (k_direct) {
        score(kj, n, last ? 0 : kAhead * k.row);
      } else {
        pack<Compute>(k_, d_elems_, kj, n, int(s.head_dim));
        using Packed = std::conditional_t<Compute::kDepth == 2, T, Elem>;
        score(Source<Packed>{reinterpret_cast<const Packed*>(k_), d_elems_ * Compute::kDepth, 1}, n,
              0);
      }
      const bool hides = p_.bias || j < full.begin || j + n > full.end;
      const bool spoils = hides && !all_finite(vj, n, int(s.v_dim));
      softmax_.block(scores_, scores_, kKeys, 0, rows_, j, n, int(round_up(n, w)), spoils,
                     QueriesOfGroup<A>{mods.data(), s.q_len});
      if (v_direct && !spoils) {
        accumulate(vj, n, last ? 0 : kAhead * v.row);
      } else {
        pack<Fma<A>>(v_, v_cols_, vj, n, int(s.v_dim));
        if (spoils)
          accumulate_sparse(n);
        else
          accumulate(Source<A>{v_, v_cols_, 1}, n, 0);
      }
    }
  }

  const A* out() const { return out_; }
  int out_stride() const { return v_cols_; }
  const OnlineSoftmax<A, std::is_same_v<T, A>>& state() const { return softmax_; }

 private:
  // Rows of elements, padded with zeros to dst_row.
  template <class To>
  static void pack(typename To::Elem* dst, int dst_row, Source<T> s, int rows, int cols) {
    pack_rows<To>(dst, dst_row, s, rows, cols);
    const int elems = int(round_up(cols, To::kDepth)) / To::kDepth;
    for (int r = 0; r < rows; ++r)
      std::fill_n(dst + ptrdiff_t(r) * dst_row + elems, dst_row - elems, typename To::Elem(0));
  }

  // scores_ = q . k^T; meanwhile keys `ahead` numbers further on are on their way to the cache.
  template <typename U>
  void score(Source<U> k, int n, int64_t ahead) {
    for (int j = 0; j < n; j += w) {
      int r = 0;
      for (; r + kRows <= rows_; r += kRows)
        for (int c = j; c < j + w && c < n; c += w / kRows)
          score_rows<kRows>(k, n, r, c, r == 0 ? ahead : 0);
      if constexpr (kRows > 1)
        for (; r < rows_; ++r) score_rows<1>(k, n, r, j, 0);
    }
  }

  // Scores of kCount queries from r on with w / kCount keys from j on: the w sums of products lie
  // each in a vector, and are summed across all at once.
  template <int kCount, typename U>
  FASTATTN_INLINE void score_rows(Source<U> k, int n, int r, int j, int64_t ahead) {
    constexpr int kWide = w / kCount;
    const U* key[kWide];
    for (int c = 0; c < kWide; ++c) key[c] = k.at(std::min(j + c, n - 1), 0);
    const Elem* q = q_ + ptrdiff_t(r) * d_elems_;
    V sum[w];
    unroll<w>([&](auto x) { sum[x] = zero<A>(); });
    const auto step = [&](auto c, int d) FASTATTN_INLINE_LAMBDA {
      const U* p = key[c] + d * Compute::kDepth;
      if constexpr (kFetches<kCount>) prefetch(p + ahead);
      const auto y = load_key(p);
      unroll<kCount>([&](auto row) {
        sum[row * kWide + c] =
            Compute::step(Compute::load_b(q + row * d_elems_ + d), y, sum[row * kWide + c]);
      });
    };
    // Key after key, as they lie in memory; short vectors, of which more are summed, side by side:
    // they would wait for each other.
    if constexpr (kCount == 1 && w >= 8)
      unroll<kWide>([&](auto c) {
        for (int d = 0; d < d_elems_; d += w) step(c, d);
      });
    else
      for (int d = 0; d < d_elems_; d += w) unroll<kWide>([&](auto c) { step(c, d); });
    transpose(sum);
    reduce_as_tree<w>(sum, [](V x, V y) { return x + y; });
    if constexpr (kCount == 1) {
      store(scores_ + ptrdiff_t(r) * kKeys + j, sum[0]);
    } else {
      A lanes[w];
      store(lanes, sum[0]);
      unroll<kCount>([&](auto row) {
        std::copy_n(lanes + row * kWide, kWide, scores_ + ptrdiff_t(r + row) * kKeys + j);
      });
    }
  }
  template <typename U>
  static FASTATTN_INLINE typename Compute::Operand load_key(const U* p) {
    if constexpr (Compute::kDepth == 2)
      return Compute::load_b(reinterpret_cast<const Elem*>(p));
    else
      return load(p);
  }

  // out = factor * out + p . v; meanwhile rows of v `ahead` numbers further on are on their way.
  template <typename U>
  void accumulate(Source<U> v, int n, int64_t ahead) {
    for (int c = 0; c < v_cols_;) {
      int r = 0, wide = w >= 8 && v_cols_ - c >= 8 * w && rows_ < kRows ? 8 : 4;
      if constexpr (kRows > 1)
        for (; r + kRows <= rows_; r += kRows)
          accumulate_rows<kRows, 4>(v, n, r, c, r == 0 ? ahead : 0);
      for (; r < rows_; ++r)
        wide == 8 ? accumulate_rows<1, 8>(v, n, r, c, 0) : accumulate_rows<1, 4>(v, n, r, c, 0);
      c += wide * w;
    }
  }
  template <int kCount, int kVectors, typename U>
  FASTATTN_INLINE void accumulate_rows(Source<U> v, int n, int r, int c, int64_t ahead) {
    V sum[kCount][kVectors];
    A* out = out_ + ptrdiff_t(r) * v_cols_ + c;
    const A *p = scores_ + ptrdiff_t(r) * kKeys, *factor = softmax_.factors(r);
    unroll<kCount>([&](auto row) { unroll<kVectors>([&](auto x) { sum[row][x] = zero<A>(); }); });
    for (int j = 0; j < n; ++j) {
      const U* value = v.at(j, c);
      if constexpr (kFetches<kCount>) prefetch_bytes(value + ahead, kVectors * w * sizeof(U));
      unroll<kVectors>([&](auto x) {
        const V y = load(value + x * w);
        unroll<kCount>(
            [&](auto row) { sum[row][x] = fma(set1(p[row * kKeys + j]), y, sum[row][x]); });
      });
    }
    unroll<kCount>([&](auto row) {
      const V f = set1(factor[row]);
      unroll<kVectors>([&](auto x) {
        A* dst = out + row * v_cols_ + x * w;
        store(dst, fma(f, load(dst), sum[row][x]));
      });
    });
  }
  void accumulate_sparse(int n) {
    for (int r = 0; r < rows_; ++r) {
      A* out = out_ + ptrdiff_t(r) * v_cols_;
      for (int c = 0; c < v_cols_; ++c) out[c] *= softmax_.factors(0)[r];
      for (int j = 0; j < n; ++j)
        if (const A p = scores_[ptrdiff_t(r) * kKeys + j]; p != 0)
          for (int c = 0; c < v_cols_; ++c) out[c] += p * v_[ptrdiff_t(j) * v_cols_ + c];
    }
  }

  const AttentionParams& p_;
  const int rows_, d_cols_, d_elems_, v_cols_;
  Elem *q_, *k_;
  A *v_, *scores_, *out_;
  OnlineSoftmax<A, std::is_same_v<T, A>> softmax_;
};

}  // namespace
}  // namespace fastattn
