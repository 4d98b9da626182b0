// Attention backward (Dao et al., "FlashAttention", 2022): the probabilities are made again from
// lse, tile by tile, and never held whole. With p the probabilities, o the output and l the lse:
//   dv_j = sum_i drop(p_ij) do_i              dp_ij = drop(do_i . v_j)
//   dlogit_ij = p_ij (dp_ij - delta_i + dl_i) delta_i = do_i . o_i
//   ds_ij = dlogit_ij * dlogit/ds             dq_i = sum_j ds_ij k_j,   dk_j = sum_i ds_ij q_i
// A unit of work takes a range of keys of one KV head through the queries that see them: dk and dv
// gather in a tile, dq in a float32 copy of the head. Where such copies would take too much memory,
// dq has a sweep of its own, in which a unit of work takes a range of queries through their keys.
//
// lse comes in two numbers: one has no room for the log of the sum beside a bias of, say, -3e38,
// and its rounding would show in each p of the row.
#include <memory>
#include <numeric>

#include "backward_plan.h"
#include "backward_tile.h"
#include "kernels.h"
#include "parallel.h"

namespace fastattn {
namespace {

// delta_i = do_i . o_i, one product after the other as the tiles sum do_i . v_j: for a query that
// sees one key the two then cancel to the last bit. Rows side by side keep the processor busy.
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
      for (int64_t run = 0; run < s.v_dim; run += kSumRun) {
        A sum[kAtOnce] = {};
        for (int64_t c = run; c < std::min<int64_t>(run + kSumRun, s.v_dim); ++c)
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
        plan_(p, kKeyBlock<A>, sizeof(A)),
        bias_in_sweep_(g.dbias && same_shape_as_scores(p, g)),
        wanted_{bool(g.dq), bool(g.dk), bool(g.dv), bias_in_sweep_, false},
        d_cols_(round_up(p.shape.head_dim, kPanel<A>)),
        dv_cols_(round_up(p.shape.v_dim, kPanel<A>)) {}

  void run() {
    if (few_queries(p_) || (sizeof(T) == 2 && g_.dbias && p_.bias_dtype == DType::kFloat32))
      sum_delta();
    else
      compute_delta<T>(p_, g_, plan_.threads);
    if (p_.shape.k_len == 0) return;
    if (wanted_.ds() || wanted_.dv) sweep(plan_.dq_apart ? wanted_.without_dq() : wanted_);
    if (wanted_.dq && plan_.dq_apart) sweep_dq();
    if (g_.dbias && !bias_in_sweep_) sum_bias();
  }

 private:
  // The bias has an element for each score: its gradient needs no sum.
  static bool same_shape_as_scores(const AttentionParams& p, const AttentionGrads& g) {
    const AttentionShape& s = p.shape;
    return (g.dbias.stride[0] || s.batch == 1) && (g.dbias.stride[1] || s.q_heads == 1) &&
           (g.dbias.stride[2] || s.q_len == 1) && g.dbias.stride[3] == 1;
  }

  // delta_i = sum_j p_ij dp_ij instead, as exact as dp: do_i . o_i has the rounding of o, which is
  // common to a row. Gradients of few terms would show it beside plain PyTorch's, and so would, in
  // half precision, that of a float32 bias.
  void sum_delta() {
    constexpr int keys = kKeyBlock<A>;
    const AttentionShape& s = p_.shape;
    const int64_t blocks = (s.q_len + kQueryBlock - 1) / kQueryBlock;
    AttentionGrads g{};  // d logit without a delta is p dp
    g.dout = g_.dout;
    parallel_dynamic(s.batch * s.q_heads * blocks, plan_.threads, [&](int64_t n, int) {
      const int64_t head = n / blocks, b = head / s.q_heads, h = head % s.q_heads;
      const int64_t i = n % blocks * kQueryBlock;
      const int count = int(std::min<int64_t>(kQueryBlock, s.q_len - i));
      BackwardTile<T> tile(p_, g, {false, false, false, false, true}, scratch_of_this_thread());
      double total[kQueryBlock] = {};
      const KeyRange seen = p_.mask.any_keys(i, i + count, s.k_len);
      for (int64_t j = seen.begin / keys * keys; j < seen.end; j += keys) {
        const int width = int(std::min<int64_t>(keys, s.k_len - j));
        tile.load_keys(b, h / s.group(), j, width);
        tile.load_queries(h, i, count);
        for (int r = 0; r < count; ++r)
          total[r] = std::accumulate(tile.dlogit(r), tile.dlogit(r) + width, total[r]);
      }
      std::copy_n(total, count, static_cast<A*>(g_.delta) + head * s.q_len + i);
    });
  }

  void sweep(const Wanted wanted) {
    const AttentionShape& s = p_.shape;
    const int64_t units = plan_.units();
    // Where several units add to one head's dq, or to one KV head's dk and dv, each keeps its own
    // part until all are done; else one buffer a thread serves.
    const bool dq_parts = plan_.key_splits > 1, dkv_parts = plan_.group_splits > 1;
    std::vector<Array<A>> dq(dq_parts ? units : plan_.threads);
    std::vector<Array<A>> dkv(dkv_parts ? units : plan_.threads);
    const int64_t dq_size = s.q_len * d_cols_;
    parallel_dynamic(units, plan_.threads, [&](int64_t u, int thread) {
      const BackwardPlan::Unit unit = plan_.unit(u);
      auto& my_dq = dq[dq_parts ? u : thread];
      auto& my_dkv = dkv[dkv_parts ? u : thread];
      if (wanted.dq && !my_dq) my_dq = make_array<A>(dq_size);
      const bool several = unit.heads.end - unit.heads.begin > 1;
      if ((dkv_parts || several) && !my_dkv)
        my_dkv = make_array<A>(plan_.max_keys * (d_cols_ + dv_cols_));
      BackwardTile<T> tile(p_, g_, wanted, scratch_of_this_thread());
      for (int64_t h = unit.heads.begin; h < unit.heads.end; ++h) {
        if (wanted.dq) std::fill_n(my_dq.get(), dq_size, A(0));
        head(tile, wanted, unit, h, my_dq.get(), my_dkv.get());
        if (wanted.dq && !dq_parts)
          write_rows<T>(g_.dq, unit.b, h, 0, my_dq.get(), s.q_len, int(s.head_dim), int(d_cols_));
      }
    });
    if (dq_parts && wanted.dq) merge_dq(dq);
    if (dkv_parts) merge_dkv(dkv);
  }

  // One query head against the unit's keys. dk and dv of a group's heads add up in dkv (keys, dk
  // columns then dv columns), from where the last head takes them to the tensors.
  void head(BackwardTile<T>& tile, const Wanted wanted, const BackwardPlan::Unit& unit, int64_t h,
            A* dq, A* dkv) {
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
        if (wanted.dv) tile.add_dv(dv);
        if (wanted.dk) tile.add_dk(dk);
        if (wanted.dq) tile.add_dq(dq + i * d_cols_);
      }
      if (last && !parts) {
        if (wanted.dk)
          write_rows<T>(g_.dk, unit.b, unit.kv, j, dk, n, int(s.head_dim), int(d_cols_));
        if (wanted.dv) write_rows<T>(g_.dv, unit.b, unit.kv, j, dv, n, int(s.v_dim), int(dv_cols_));
      }
    }
  }

  // dq of so many queries at once that packing their keys anew costs little.
  void sweep_dq() {
    constexpr int64_t queries = 512;
    constexpr int keys = kKeyBlock<A>;
    const AttentionShape& s = p_.shape;
    const int64_t chunks = (s.q_len + queries - 1) / queries;
    parallel_dynamic(s.batch * s.q_heads * chunks, plan_.threads, [&](int64_t n, int) {
      const int64_t head = n / chunks, b = head / s.q_heads, h = head % s.q_heads;
      const int64_t begin = (chunks - 1 - n % chunks) * queries;  // causal: the most keys first
      const int64_t end = std::min(s.q_len, begin + queries);
      BackwardTile<T> tile(p_, g_, {true, false, false, false, false}, scratch_of_this_thread());
      std::vector<A> dq(size_t(end - begin) * d_cols_);
      const KeyRange seen = p_.mask.any_keys(begin, end, s.k_len);
      for (int64_t j = seen.begin / keys * keys; j < seen.end; j += keys) {
        const int count = int(std::min<int64_t>(keys, s.k_len - j));
        tile.load_keys(b, h / s.group(), j, count);
        const KeyRange queries_seen = p_.mask.any_queries(j, j + count, s.q_len);
        const int64_t last = std::min(end, queries_seen.end);
        for (int64_t i = std::max(begin, queries_seen.begin); i < last; i += kQueryBlock) {
          tile.load_queries(h, i, int(std::min<int64_t>(kQueryBlock, last - i)));
          tile.add_dq(dq.data() + (i - begin) * d_cols_);
        }
      }
      write_rows<T>(g_.dq, b, h, begin, dq.data(), end - begin, int(s.head_dim), int(d_cols_));
    });
  }

  void merge_dq(const std::vector<Array<A>>& parts) {
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

  void merge_dkv(const std::vector<Array<A>>& parts) {
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
      BackwardTile<T> tile(p_, g_, {false, false, false, false, true}, scratch);
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
};

}  // namespace

#if defined(FASTATTN_FLOAT64)
void attention_backward_float64(const AttentionParams& p, const AttentionGrads& g) {
  Backward<double>(p, g).run();
}
#else
void attention_backward(const AttentionParams& p, const AttentionGrads& g) {
  const AttentionShape& s = p.shape;
  if (s.batch == 0 || s.q_heads == 0 || s.q_len == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return Backward<float>(p, g).run();
    case DType::kFloat64:
      return attention_backward_float64(p, g);
    case DType::kBFloat16:
      return Backward<bf16>(p, g).run();
    case DType::kFloat16:
      return Backward<f16>(p, g).run();
    case DType::kBool:
      return;
  }
}
#endif

}  // namespace fastattn
