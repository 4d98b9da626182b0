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
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int w = V::kWidth;
  static constexpr int kKeys = 32;  // keys between two visits to the online softmax

 public:
  DecodeTile(const AttentionParams& p, Scratch& scratch)
      : p_(p),
        rows_(int(p.shape.q_len * p.shape.group())),
        d_cols_(int(round_up(p.shape.head_dim, w))),
        v_cols_(int(round_up(p.shape.v_dim, 4 * w))),
        q_(scratch.take<A>(size_t(rows_) * d_cols_)),
        k_(scratch.take<A>(size_t(kKeys) * d_cols_)),
        v_(scratch.take<A>(size_t(kKeys) * v_cols_)),
        scores_(scratch.take<A>(size_t(rows_) * kKeys)),
        out_(scratch.take<A>(size_t(rows_) * v_cols_)),
        softmax_(p, scratch, rows_, rows_, kKeys) {}

  // All queries of the group of KV head kv, rows (head, query), against the keys in `keys`.
  void run(int64_t b, int64_t kv, KeyRange keys) {
    const AttentionShape& s = p_.shape;
    std::fill_n(q_, size_t(rows_) * d_cols_, A(0));
    std::fill_n(out_, size_t(rows_) * v_cols_, A(0));
    for (int g = 0; g < s.group(); ++g) {
      const Source<T> q{p_.q.at<const T>(b, kv * s.group() + g, 0), p_.q.stride[2], p_.q.stride[3]};
      pack_rows<Fma<A>>(q_ + g * s.q_len * d_cols_, d_cols_, q, int(s.q_len), int(s.head_dim));
    }
    softmax_.start(rows_);
    std::vector<ScoreMod<A>> mods;
    for (int g = 0; g < s.group(); ++g) mods.emplace_back(p_, b, kv * s.group() + g);
    const Source<T> k{p_.k.at<const T>(b, kv, 0), p_.k.stride[2], p_.k.stride[3]};
    const Source<T> v{p_.v.at<const T>(b, kv, 0), p_.v.stride[2], p_.v.stride[3]};
    const KeyRange full = p_.mask.all_keys(0, s.q_len, s.k_len);
    // Rows that are read once are converted on the way; read by several queries, they are
    // converted once.
    const bool k_direct = k.col == 1 && s.head_dim % w == 0 && (std::is_same_v<T, A> || rows_ == 1);
    const bool v_direct =
        v.col == 1 && s.v_dim % (4 * w) == 0 && (std::is_same_v<T, A> || rows_ <= 2);
    for (int64_t j = keys.begin; j < keys.end; j += kKeys) {
      const int n = int(std::min<int64_t>(kKeys, keys.end - j));
      const Source<T> kj{k.at(j, 0), k.row, k.col}, vj{v.at(j, 0), v.row, v.col};
      if (k_direct) {
        score(kj, n, vj);
      } else {
        convert(k_, d_cols_, kj, n, int(s.head_dim));
        score(Source<A>{k_, d_cols_, 1}, n, vj);
      }
      const bool hides = p_.bias || j < full.begin || j + n > full.end;
      const bool spoils = hides && !all_finite(vj, n, int(s.v_dim));
      softmax_.block(
          scores_, scores_, kKeys, 0, rows_, j, n, int(round_up(n, w)), spoils,
          QueriesOfGroup<A>{mods.data(), s.q_len});
      const Source<T> next{k.at(std::min(j + kKeys, keys.end - 1), 0), k.row, k.col};
      if (v_direct && !spoils) {
        accumulate(vj, n, next);
      } else {
        convert(v_, v_cols_, vj, n, int(s.v_dim));
        if (spoils)
          accumulate_sparse(n);
        else
          accumulate(Source<A>{v_, v_cols_, 1}, n, next);
      }
    }
  }

  const A* out() const { return out_; }
  int out_stride() const { return v_cols_; }
  const OnlineSoftmax<A>& state() const { return softmax_; }

 private:
  static void convert(A* dst, int dst_row, Source<T> s, int rows, int cols) {
    pack_rows<Fma<A>>(dst, dst_row, s, rows, cols);
    for (int r = 0; r < rows; ++r)
      std::fill(dst + ptrdiff_t(r) * dst_row + cols, dst + ptrdiff_t(r) * dst_row + dst_row, A(0));
  }

  // scores_ = q . k^T; meanwhile the rows of v are on their way to the cache.
  template <typename U>
  void score(Source<U> k, int n, Source<T> v) {
    const int64_t v_bytes = v.col == 1 ? p_.shape.v_dim * int64_t(sizeof(T)) : 0;
    for (int j = 0; j < n; j += w) {
      const U* key[w];
      for (int c = 0; c < w; ++c) {
        const int row = std::min(j + c, n - 1);
        key[c] = k.at(row, 0);
        prefetch_bytes(v.at(row, 0), v_bytes);
      }
      for (int r = 0; r < rows_; ++r) {
        const A* q = q_ + ptrdiff_t(r) * d_cols_;
        V sum[w];
        unroll<w>([&](auto c) { sum[c] = zero<A>(); });
        for (int d = 0; d < d_cols_; d += w) {
          const V x = load(q + d);
          unroll<w>([&](auto c) { sum[c] = fma(x, load(key[c] + d), sum[c]); });
        }
        transpose(sum);
        unroll<w - 1>([&](auto c) { sum[0] = sum[0] + sum[c + 1]; });
        store(scores_ + ptrdiff_t(r) * kKeys + j, sum[0]);
      }
    }
  }

  // out = factor * out + p . v; meanwhile the next keys are on their way to the cache.
  template <typename U>
  void accumulate(Source<U> v, int n, Source<T> next) {
    const int64_t k_bytes = next.col == 1 ? p_.shape.head_dim * int64_t(sizeof(T)) : 0;
    for (int j = 0; j < n; ++j) prefetch_bytes(next.at(j, 0), k_bytes);
    const A* factor = softmax_.factors(0);
    for (int c = 0; c < v_cols_; c += 4 * w) {
      int r = 0;
      for (; r + 2 <= rows_; r += 2) accumulate_rows<2>(v, n, r, c, factor);
      if (r < rows_) accumulate_rows<1>(v, n, r, c, factor);
    }
  }
  template <int kRows, typename U>
  FASTATTN_INLINE void accumulate_rows(Source<U> v, int n, int r, int c, const A* factor) {
    V sum[kRows][4];
    A* out = out_ + ptrdiff_t(r) * v_cols_ + c;
    const A* p = scores_ + ptrdiff_t(r) * kKeys;
    unroll<kRows>([&](auto row) {
      unroll<4>(
          [&](auto x) { sum[row][x] = set1(factor[r + row]) * load(out + row * v_cols_ + x * w); });
    });
    for (int j = 0; j < n; ++j) {
      const U* value = v.at(j, c);
      unroll<4>([&](auto x) {
        const V y = load(value + x * w);
        unroll<kRows>(
            [&](auto row) { sum[row][x] = fma(set1(p[row * kKeys + j]), y, sum[row][x]); });
      });
    }
    unroll<kRows>([&](auto row) {
      unroll<4>([&](auto x) { store(out + row * v_cols_ + x * w, sum[row][x]); });
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
  const int rows_, d_cols_, v_cols_;
  A *q_, *k_, *v_, *scores_, *out_;
  OnlineSoftmax<A> softmax_;
};

}  // namespace
}  // namespace fastattn
