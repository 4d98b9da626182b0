// Attention forward: out = softmax(logits) . v and lse = log sum exp(logits), tile by tile with an
// online softmax (Milakov and Gimelshein, 2018; Dao et al., "FlashAttention", 2022). A thread takes
// a tile of queries through the keys they see; lanes are keys in S = Q . K^T and columns of v in P
// . V.
#include "attention_decode.h"
#include "attention_plan.h"
#include "attention_results.h"
#include "kernels.h"
#include "online_softmax.h"
#include "parallel.h"
#include "scratch.h"
#include "tile_matmul.h"

namespace fastattn {
namespace {

constexpr int kPackedKeys = 256;              // keys packed at a time
constexpr int kSubRows = 2 * kTileRows;       // queries whose scores stay in L1
constexpr int kMaxQueryTile = 64 * kSubRows;  // queries that share one packing of keys and values,
constexpr size_t kQueryTileBytes = 1 << 19;   // as long as they and their outputs fit in L2

template <typename T>
class ForwardTile {
  using Compute = typename ComputeOf<T>::type;
  using A = typename Compute::Acc;
  using Elem = typename Compute::Elem;
  using Block = typename ScoreMod<A>::Block;
  using BiasFetch = typename ScoreMod<A>::BiasFetch;
  static constexpr int kDepth = Compute::kDepth;
  using Prob = std::conditional_t<kDepth == 1, A, T>;  // what P . V multiplies
  static constexpr int kWide = kPanel<A>;

 public:
  // For at most max_rows queries.
  ForwardTile(const AttentionParams& p, int64_t max_rows, Scratch& scratch)
      : p_(p),
        d_elems_(int(round_up(p.shape.head_dim, kDepth) / kDepth)),
        v_cols_(int(round_up(p.shape.v_dim, kWide))),
        q_(scratch.take<Elem>(size_t(max_rows) * d_elems_)),
        k_(scratch.take<Elem>(size_t(kPackedKeys) * d_elems_)),
        v_(scratch.take<Elem>(size_t(kPackedKeys / kDepth) * v_cols_)),
        scores_(scratch.take<A>(size_t(kSubRows) * kPackedKeys)),
        probs_(kDepth == 1 ? reinterpret_cast<Prob*>(scores_)
                           : scratch.take<Prob>(size_t(kSubRows) * kPackedKeys)),
        out_(scratch.take<A>(size_t(max_rows) * v_cols_)),
        softmax_(p, scratch, int(max_rows), kSubRows, kPackedKeys) {}

  // Queries [i, i + rows) of head (b, h) against the keys in [keys.begin, keys.end).
  void run(int64_t b, int64_t h, int64_t i, int rows, KeyRange keys) {
    const int64_t kv = h / p_.shape.group();
    const Source<T> q{p_.q.at<const T>(b, h, i), p_.q.stride[2], p_.q.stride[3]};
    const Left<Compute> queries = rows_of<Compute>(q_, d_elems_, q, rows, int(p_.shape.head_dim));
    std::fill_n(out_, size_t(rows) * v_cols_, A(0));
    softmax_.start(rows);
    const ScoreMod<A> mod(p_, b, h);
    for (int64_t j = keys.begin; j < keys.end; j += kPackedKeys) {
      const int n = int(std::min<int64_t>(kPackedKeys, keys.end - j));
      const Source<T> k{p_.k.at<const T>(b, kv, j), p_.k.stride[2], p_.k.stride[3]};
      const Source<T> v{p_.v.at<const T>(b, kv, j), p_.v.stride[2], p_.v.stride[3]};
      pack_panels_transposed<Compute>(k_, ptrdiff_t(d_elems_) * kWide, k, n,
                                      int(p_.shape.head_dim));
      const Panels<Compute> values =
          panels_of<Compute>(v_, kValueStride, v, n, int(p_.shape.v_dim));
      const KeyRange full = p_.mask.all_keys(i, i + rows, p_.shape.k_len);
      const bool hides = p_.bias || j < full.begin || j + n > full.end;
      const bool spoils = hides && !all_finite(v, n, int(p_.shape.v_dim));
      const int next = int(std::min<int64_t>(kPackedKeys, keys.end - (j + n)));
      for (int r = 0; r < rows; r += kSubRows) {
        // The next queries and, share by share, the next values are on their way meanwhile.
        const int done = std::min(r + kSubRows, rows);
        if (j == keys.begin) fetch(q, done, std::min(done + kSubRows, rows), p_.shape.head_dim);
        fetch(v, n + next * r / rows, n + next * done / rows, p_.shape.v_dim);
        const Block after = done < rows ? Block{i + done, j, std::min(kSubRows, rows - done), n}
                                        : Block{i, j + n, std::min(kSubRows, rows), next};
        block(mod, {i + r, j, done - r, n}, r, queries, values, spoils, after);
      }
    }
  }

  const A* out() const { return out_; }  // (rows, out_stride()), unnormalised
  int out_stride() const { return v_cols_; }
  const OnlineSoftmax<A, std::is_same_v<T, A>>& state() const { return softmax_; }

 private:
  static constexpr ptrdiff_t kValueStride = ptrdiff_t(kPackedKeys / kDepth) * kWide;

  static void fetch(Source<T> s, int begin, int end, int64_t cols) {
    if (s.col == 1)
      for (int r = begin; r < end; ++r) prefetch_bytes(s.at(r, 0), cols * int64_t(sizeof(T)));
  }

  // A block, whose first row is the tile's r0, against the packed keys and their values; `after` is
  // the block that comes next.
  void block(const ScoreMod<A>& mod, Block at, int r0, Left<Compute> queries,
             Panels<Compute> values, bool spoils, Block after) {
    const KeyRange seen = p_.mask.any_keys(at.i, at.i + at.rows, p_.shape.k_len);
    const int begin = int(std::max<int64_t>(seen.begin - at.j, 0) / kWide * kWide);
    const int end = int(std::min<int64_t>(seen.end - at.j, at.keys));
    if (begin >= end) return;
    const int rows = at.rows, width = int(round_up(end - begin, Vec<A>::kWidth));
    at.j += begin;
    at.keys = end - begin;
    const ptrdiff_t k_stride = ptrdiff_t(d_elems_) * kWide;
    queries.data += r0 * queries.row;
    const Panels<Compute> keys{k_ + begin / kWide * k_stride, k_stride};
    bool are_logits = false;
    if (p_.bias) {
      constexpr int tiles = (kSubRows + kTileRows - 1) / kTileRows * (kPackedKeys / kWide);
      const int runs = (d_elems_ + kSumRun - 1) / kSumRun;
      BiasFetch fetch_bias(mod, after, tiles * runs);
      const auto multiply = [&](const auto& into) {
        tile_matmul(queries, keys, scores_, kPackedKeys, rows, width, d_elems_, into, fetch_bias);
      };
      if constexpr (kTotalsInRegisters) {
        are_logits = mod.bias_is_ready(at);
        if (are_logits) multiply(mod.add_bias(at));
      }
      if (!are_logits) multiply(Store{});
    } else {
      tile_matmul(queries, keys, scores_, kPackedKeys, rows, width, d_elems_, Store{});
    }
    softmax_.block(scores_, probs_, kPackedKeys, r0, rows, at.j, at.keys, width, spoils,
                   QueriesOfHead<A>{mod, at.i}, are_logits);
    const Left<Compute> left{reinterpret_cast<const Elem*>(probs_), kPackedKeys / kDepth, 1};
    Panels<Compute> right = values;
    right.data += begin / kDepth * values.depth;
    A* out = out_ + ptrdiff_t(r0) * v_cols_;
    const int depth = int(round_up(end - begin, kDepth) / kDepth);
    if (spoils) {
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < v_cols_; ++c) out[r * v_cols_ + c] *= softmax_.factors(r0)[r];
      tile_matmul_sparse(left, right, out, v_cols_, rows, v_cols_, depth);
    } else {
      tile_matmul(left, right, out, v_cols_, rows, v_cols_, depth,
                  Rescale<A>{softmax_.factors(r0)});
    }
  }

  const AttentionParams& p_;
  const int d_elems_, v_cols_;  // elements along the head dim; columns of v, padded
  Elem *q_, *k_, *v_;
  A* scores_;    // (kSubRows, kPackedKeys)
  Prob* probs_;  // the same, or a copy in bf16
  A* out_;       // (max_rows, v_cols_)
  OnlineSoftmax<A, std::is_same_v<T, A>> softmax_;
};

template <typename T>
void forward(const AttentionParams& p) {
  const AttentionShape& s = p.shape;
  const size_t row_bytes = size_t(s.head_dim + s.v_dim) * sizeof(Acc<T>);
  const int fitting = int(kQueryTileBytes / row_bytes / kSubRows) * kSubRows;
  const ForwardPlan plan(p, kSubRows, std::clamp(fitting, kSubRows, kMaxQueryTile), kPackedKeys);
  ForwardResults<T> results(p, plan.splits);
  parallel_dynamic(plan.items(), plan.threads, [&](int64_t item, int) {
    const ForwardPlan::Item at = plan.item(item);
    Scratch& scratch = scratch_of_this_thread();
    if (plan.decode) {
      DecodeTile<T> tile(p, scratch);
      tile.run(at.b, at.h, at.keys);
      for (int g = 0, r = 0; g < s.group(); ++g)
        for (int i = 0; i < s.q_len; ++i, ++r)
          results.put(at.split, at.b, at.h * s.group() + g, i,
                      tile.out() + ptrdiff_t(r) * tile.out_stride(), tile.state().max(r),
                      tile.state().sum(r));
    } else {
      ForwardTile<T> tile(p, plan.tile_rows, scratch);
      tile.run(at.b, at.h, at.i, at.rows, at.keys);
      for (int r = 0; r < at.rows; ++r)
        results.put(at.split, at.b, at.h, at.i + r, tile.out() + ptrdiff_t(r) * tile.out_stride(),
                    tile.state().max(r), tile.state().sum(r));
    }
  });
  if (plan.splits > 1) results.merge(plan.threads);
}

}  // namespace

#if defined(FASTATTN_FLOAT64)
void attention_forward_float64(const AttentionParams& p) { forward<double>(p); }
#else
void attention_forward(const AttentionParams& p) {
  if (p.shape.batch == 0 || p.shape.q_heads == 0 || p.shape.q_len == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return forward<float>(p);
    case DType::kFloat64:
      return attention_forward_float64(p);
    case DType::kBFloat16:
      return forward<bf16>(p);
    case DType::kFloat16:
      return forward<f16>(p);
    case DType::kBool:
      return;
  }
}
#endif

}  // namespace fastattn
