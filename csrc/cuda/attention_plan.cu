// How a call of attention becomes launches; and the kernels that know no head dim.
#include <algorithm>
#include <stdexcept>

#include "attention_backward.h"
#include "attention_forward.h"
#include "attention_sm90.h"
#include "head_dims.h"

namespace fastattn {
namespace {

// A walked head: its rows, tiles of them, and how many of its kind there are.
struct Walk {
  bool grouped;
  int64_t rows, tiles, heads;
};

constexpr int64_t kChunk = 64;  // parts begin at multiples of every kernel's tile of keys

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Walk walk_of(const AttentionParams& p) {
  const AttentionShape& s = p.shape;
  Walk w{};
  w.grouped = s.q_len <= kGroupedQueries && s.group() > 1;
  w.rows = s.q_len * (w.grouped ? s.group() : 1);
  w.heads = s.batch * (w.grouped ? s.kv_heads : s.q_heads);
  with_head_dim(std::max(s.head_dim, s.v_dim), [&](auto n) {
    constexpr int kHeadDim = decltype(n)::value;
    const bool modified = problem_of(p).modified;
    w.tiles = ceil_div(
        w.rows, modified ? ForwardShape<kHeadDim, true>::kM : ForwardShape<kHeadDim, false>::kM);
  });
  return w;
}

bool empty(const AttentionShape& s) { return s.batch * s.q_heads * s.q_len == 0; }

void check(const AttentionParams& p, int64_t blocks) {
  const AttentionShape& s = p.shape;
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16)
    throw std::invalid_argument("attention: serves bfloat16 and float16");
  if (s.q_len > 1 << 30 || s.k_len > 1 << 30 || blocks > 2147483647)
    throw std::invalid_argument("attention: serves up to 2^30 queries and keys, 2^31 tiles");
}

template <typename T>
void merge(const ForwardCall& c, const Device& device) {
  const int64_t rows = int64_t(c.p.batch) * c.p.heads * c.p.q_len;
  launch("attention_forward, merge", attention_merge_kernel<T>,
         Grid{ceil_div(rows, kAttentionWarps)}, kAttentionThreads, 0, device.stream, c);
}

// Whether sm_90a's forward can take the call. Few queries would leave most of its rows empty.
bool sm90_serves(const AttentionParams& p, int capability) {
  const AttentionShape& s = p.shape;
  if (capability != 90 || s.q_len < 64 || s.k_len == 0 || problem_of(p).modified) return false;
  bool has_kernel = false;
  with_head_dim(std::max(s.head_dim, s.v_dim),
                [&](auto n) { has_kernel = has_sm90_forward(decltype(n)::value); });
  return has_kernel && rows_are_aligned(p.out, s.v_dim) &&
         has_tensor_map(p.q, {{s.head_dim, s.q_len, s.q_heads, s.batch}}) &&
         has_tensor_map(p.k, {{s.head_dim, s.k_len, s.kv_heads, s.batch}}) &&
         has_tensor_map(p.v, {{s.v_dim, s.k_len, s.kv_heads, s.batch}});
}

// Whether its backward can: what the forward can, of some head dims and of as many keys as queries.
bool sm90_serves(const AttentionParams& p, const AttentionGrads& g, int capability) {
  const AttentionShape& s = p.shape;
  if (s.k_len < 64 || !sm90_serves(p, capability)) return false;
  bool has_kernel = false;
  with_head_dim(std::max(s.head_dim, s.v_dim),
                [&](auto n) { has_kernel = has_sm90_backward(decltype(n)::value); });
  const auto stored = [](const View& v, int64_t width) { return !v || rows_are_aligned(v, width); };
  return has_kernel && has_tensor_map(g.dout, {{s.v_dim, s.q_len, s.q_heads, s.batch}}) &&
         stored(g.dq, s.head_dim) && stored(g.dk, s.head_dim) && stored(g.dv, s.v_dim);
}

}  // namespace

size_t attention_shared_bytes(int64_t head_dim) {
  if (head_dim > kMaxHeadDim) return 0;
  size_t bytes = 0;
  with_head_dim(head_dim, [&](auto n) {
    constexpr int kHeadDim = decltype(n)::value;
    bytes = std::max(ForwardShape<kHeadDim, false>::kBytes, BackwardShape<kHeadDim>::kBytes);
  });
  return bytes;
}

// Enough parts that every multiprocessor has two blocks, and none of fewer than four tiles of keys.
ForwardPlan attention_forward_plan(const AttentionParams& p, const Device& device) {
  ForwardPlan plan;
  if (empty(p.shape)) return plan;
  // sm_90a's kernel splits no keys; it is faster all the same where it keeps half of the device.
  const int64_t sm90_tiles = p.shape.batch * p.shape.q_heads * ceil_div(p.shape.q_len, 128);
  if (2 * sm90_tiles >= device.multiprocessors && sm90_serves(p, device.capability)) return plan;
  const Walk w = walk_of(p);
  const int64_t most = ceil_div(p.shape.k_len, 4 * kChunk);
  const int64_t wanted =
      2 * int64_t(device.multiprocessors) / std::max<int64_t>(w.tiles * w.heads, 1);
  int64_t parts = std::max<int64_t>(1, std::min({wanted, most, int64_t(128)}));
  if (parts > 1) {  // no empty ones
    const int64_t chunk = ceil_div(p.shape.k_len, parts * kChunk) * kChunk;
    parts = ceil_div(p.shape.k_len, chunk);
  }
  plan.parts = int(parts);
  if (parts > 1)
    plan.workspace_floats =
        p.shape.batch * p.shape.q_heads * p.shape.q_len * parts * (p.shape.v_dim + 2);
  return plan;
}

void attention_forward(const AttentionParams& p, const ForwardPlan& plan, float* workspace,
                       const Device& device) {
  const AttentionShape& s = p.shape;
  if (empty(s)) return;
  const Walk w = walk_of(p);
  check(p, w.tiles * w.heads);
  ForwardCall c{};
  c.p = problem_of(p);
  c.lse = static_cast<float*>(p.lse);
  c.grouped = w.grouped;
  c.rows = int(w.rows);
  c.tiles = int(w.tiles);
  c.walked = int(w.heads);
  c.together =
      heads_together(s.k_len * (s.head_dim + s.v_dim) * 2, w.grouped ? 1 : s.group(), w.heads);
  const int64_t rows = s.batch * s.q_heads * s.q_len;
  c.parts.count = plan.parts;
  c.parts.chunk = int(std::max<int64_t>(ceil_div(s.k_len, plan.parts * kChunk), 1) * kChunk);
  if (plan.parts > 1) {
    c.parts.acc = workspace;
    c.parts.max = workspace + rows * plan.parts * s.v_dim;
    c.parts.sum = c.parts.max + rows * plan.parts;
  }
  if (plan.parts == 1 && sm90_serves(p, device.capability)) {
    with_head_dim(std::max(s.head_dim, s.v_dim),
                  [&](auto n) { attention_forward_sm90_of<decltype(n)::value>(p, c, device); });
    return;
  }
  with_head_dim(std::max(s.head_dim, s.v_dim),
                [&](auto n) { attention_forward_of<decltype(n)::value>(p.dtype, c, device); });
  if (plan.parts == 1) return;
  if (p.dtype == DType::kBFloat16)
    merge<bf16>(c, device);
  else
    merge<f16>(c, device);
}

void attention_backward(const AttentionParams& p, const AttentionGrads& g, float* workspace,
                        const Device& device) {
  const AttentionShape& s = p.shape;
  if (empty(s)) return;
  BackwardCall c{};
  c.p = problem_of(p);
  c.p.dout = g.dout;
  c.p.dout_aligned = rows_are_aligned(g.dout, s.v_dim);
  c.lse = static_cast<const float*>(p.lse);
  c.dlse = static_cast<const float*>(g.dlse);
  const int64_t rows = s.batch * s.q_heads * s.q_len;
  c.rows = {workspace, workspace + rows, workspace + 2 * rows, workspace + 3 * rows};
  c.delta_out = static_cast<float*>(g.delta);
  c.dq = g.dq;
  c.dk = g.dk;
  c.dv = g.dv;
  c.dq_aligned = rows_are_aligned(g.dq, s.head_dim);
  c.dk_aligned = rows_are_aligned(g.dk, s.head_dim);
  c.dv_aligned = rows_are_aligned(g.dv, s.v_dim);
  c.dbias = g.dbias;
  c.own_batches = g.dbias.stride[0] ? int(s.batch) : 1;
  c.own_heads = g.dbias.stride[1] ? int(s.q_heads) : 1;
  c.shares_queries = g.dbias.stride[2] == 0;
  c.shares_keys = g.dbias.stride[3] == 0;
  constexpr int64_t kTile = 32;  // no kernel's is smaller
  const int64_t most = ceil_div(std::max(s.q_len, s.k_len), kTile);
  check(p, s.batch * s.q_heads * most * (g.dbias ? most : 1));
  with_head_dim(std::max(s.head_dim, s.v_dim), [&](auto n) {
    constexpr int kHeadDim = decltype(n)::value;
    attention_rows_of<kHeadDim>(p.dtype, c, device);
    if (s.k_len == 0) return;
    if (sm90_serves(p, g, device.capability))
      attention_backward_sm90_of<kHeadDim>(p, c, device);
    else
      attention_backward_of<kHeadDim>(p.dtype, c, device);
  });
}

}  // namespace fastattn
