// Layer norm and RMS norm, backward. With x_hat = (x - mean) rstd and g = dy weight,
//   dx = rstd (g - mean(g) - x_hat mean(g x_hat))      (RMS: without mean(g)),
//   dweight = sum of dy x_hat over rows, dbias = sum of dy.
// Blocks walk over rows and sum dweight and dbias for their columns in registers; each leaves one
// row of partial sums, which a second kernel adds in order: no atomics. Of rows too wide for
// registers these sums lie in shared memory beside the row, and a block, or a cluster, has the same
// columns of each row that it takes. Where there is no room for both, they have a kernel of their
// own, which reads x and dy once more.
#include <algorithm>
#include <stdexcept>

#include "kernels.h"
#include "rows.h"

namespace fastattn {
namespace {

struct Call {
  LayerNormParams p;
  LayerNormGrads g;
  RowDropout dropout;
  RowPlan plan;
  float* partials;  // (partial_rows, 2, width): of dweight, of dbias; or null
  int64_t partial_rows;
  bool x_aligned, dy_aligned, new_aligned, out_aligned, weight_aligned;
};

template <typename T>
struct Row {
  static constexpr int kN = kPack<T>;
  const Call& c;
  int64_t row;
  const T *x, *dy;
  float mean, rstd;

  FASTATTN_DEVICE Row(const Call& call, int64_t r) : c(call), row(r) {
    const LayerNormParams& p = c.p;
    x = static_cast<const T*>(p.x.data) + p.rows.offset(r, p.x);
    dy = static_cast<const T*>(c.g.dy.data) + p.rows.offset(r, c.g.dy);
    mean = p.rms ? 0.0f : static_cast<const float*>(p.mean)[r];
    rstd = static_cast<const float*>(p.rstd)[r];
  }

  FASTATTN_DEVICE Pack<T> load_x(int64_t column) const {
    return load_pack(x, column, c.p.width, c.x_aligned);
  }
  FASTATTN_DEVICE Pack<T> load_dy(int64_t column) const {
    return load_pack(dy, column, c.p.width, c.dy_aligned);
  }
  FASTATTN_DEVICE void load_weight(float (&weight)[kN], int64_t column) const {
    const LayerNormParams& p = c.p;
    if (p.weight) {
      load_any(weight, p.weight, p.weight_dtype, column, p.width, c.weight_aligned);
    } else {
      FASTATTN_UNROLL
      for (int i = 0; i < kN; ++i) weight[i] = 1.0f;
    }
  }
  FASTATTN_DEVICE float x_hat(T number) const { return (to_float(number) - mean) * rstd; }

  // Adds to the sums of g and of g x_hat.
  FASTATTN_DEVICE void add(const Pack<T>& px, const Pack<T>& pdy, int64_t column, float& sum_g,
                           float& sum_gx) const {
    float weight[kN];
    load_weight(weight, column);
    FASTATTN_UNROLL
    for (int i = 0; i < kN; ++i) {
      if (column + i >= c.p.width) continue;
      const float g = to_float(pdy.number[i]) * weight[i];
      sum_g += g;
      sum_gx += g * x_hat(px.number[i]);
    }
  }

  // dresidual = dh + dnew_residual, and dx = dropout of it, whichever are asked for.
  FASTATTN_DEVICE void store(const Pack<T>& px, const Pack<T>& pdy, int64_t column, float mean_g,
                             float mean_gx) const {
    const int64_t width = c.p.width;
    float dh[kN];
    load_weight(dh, column);
    FASTATTN_UNROLL
    for (int i = 0; i < kN; ++i)
      dh[i] = (to_float(pdy.number[i]) * dh[i] - mean_g - x_hat(px.number[i]) * mean_gx) * rstd;
    if (c.g.dnew_residual) {
      const T* more =
          static_cast<const T*>(c.g.dnew_residual.data) + c.p.rows.offset(row, c.g.dnew_residual);
      const Pack<T> pack = load_pack(more, column, width, c.new_aligned);
      FASTATTN_UNROLL
      for (int i = 0; i < kN; ++i) dh[i] += to_float(pack.number[i]);
    }
    if (c.g.dresidual)
      store_as(static_cast<T*>(c.g.dresidual) + row * width, column, width, c.out_aligned, dh);
    if (c.g.dx) {
      if (c.dropout.on) c.dropout.apply(dh, row, column);
      store_as(static_cast<T*>(c.g.dx) + row * width, column, width, c.out_aligned, dh);
    }
  }
};

// Adds dy x_hat and dy to the sums of kPack columns.
template <typename T>
FASTATTN_DEVICE void add_weights(const Row<T>& row, const Pack<T>& px, const Pack<T>& pdy,
                                 float* dweight, float* dbias) {
  FASTATTN_UNROLL
  for (int i = 0; i < kPack<T>; ++i) {
    const float up = to_float(pdy.number[i]);
    dweight[i] += up * row.x_hat(px.number[i]);
    dbias[i] += up;
  }
}

template <typename T>
FASTATTN_DEVICE void store_weights(const Call& c, int64_t partial_row, int64_t column,
                                   const float* dweight, const float* dbias) {
  float* out = c.partials + partial_row * 2 * c.p.width;
  FASTATTN_UNROLL
  for (int i = 0; i < kPack<T>; ++i) {
    if (column + i >= c.p.width) continue;
    out[column + i] = dweight[i];
    out[c.p.width + column + i] = dbias[i];
  }
}

// A whole row in registers.
template <typename T, int kHeld>
FASTATTN_KERNEL(256, 1)
layer_norm_backward_kernel(FASTATTN_PARAMS Call c) {
  FASTATTN_SHARED(memory);
  constexpr int kN = kPack<T>;
  RowGroup<false> group(c.plan, memory);
  const int64_t rows = c.p.rows.count(), width = c.p.width;
  const int64_t stride = int64_t(group.threads()) * kN, begin = int64_t(group.thread()) * kN;
  const int64_t first_row = group.first_row();
  const bool dh = c.g.dx || c.g.dresidual;
  float dweight[kHeld][kN] = {}, dbias[kHeld][kN] = {};
  for (int64_t r = first_row; r < rows; r += group.row_step()) {
    const Row<T> row(c, r);
    Pack<T> x[kHeld], dy[kHeld];
    FASTATTN_UNROLL
    for (int k = 0; k < kHeld; ++k) {
      if (begin + k * stride >= width) continue;
      x[k] = row.load_x(begin + k * stride);
      dy[k] = row.load_dy(begin + k * stride);
    }
    if (c.partials) {
      FASTATTN_UNROLL
      for (int k = 0; k < kHeld; ++k)
        if (begin + k * stride < width) add_weights(row, x[k], dy[k], dweight[k], dbias[k]);
    }
    if (!dh) continue;
    float sum_g = 0, sum_gx = 0;
    FASTATTN_UNROLL
    for (int k = 0; k < kHeld; ++k)
      if (begin + k * stride < width) row.add(x[k], dy[k], begin + k * stride, sum_g, sum_gx);
    const float mean_gx = group.sum(sum_gx) / float(width);
    const float mean_g = c.p.rms ? 0.0f : group.sum(sum_g) / float(width);
    FASTATTN_UNROLL
    for (int k = 0; k < kHeld; ++k)
      if (begin + k * stride < width) row.store(x[k], dy[k], begin + k * stride, mean_g, mean_gx);
  }
  if (!c.partials) return;
  FASTATTN_UNROLL
  for (int k = 0; k < kHeld; ++k)
    if (begin + k * stride < width)
      store_weights<T>(c, first_row, begin + k * stride, dweight[k], dbias[k]);
}

// Parts of 16 bytes that shared memory holds for each pack of a wide row: x, dy, and where there is
// room the sums of dweight and of dbias.
template <typename T>
constexpr int kSumParts = 2 * kPack<T> / kPack<float>;
constexpr int kRowParts = 2;

// dx and dresidual of a wide row: in shared memory, or read twice. kSums: with what partials get.
// Registers for two blocks, where their shared memory lets two run.
template <typename T, bool kSums>
FASTATTN_KERNEL(kWideThreads, 2)
layer_norm_backward_wide_kernel(FASTATTN_PARAMS Call c) {
  FASTATTN_SHARED(memory);
  constexpr int kN = kPack<T>;
  RowGroup<true> group(c.plan, memory);
  auto* kept = reinterpret_cast<Pack<T>*>(memory + kReduceBytes);
  constexpr int kParts = kRowParts + (kSums ? kSumParts<T> : 0);
  const int64_t rows = c.p.rows.count(), width = c.p.width;
  const int64_t stride = int64_t(group.threads()) * kN, begin = int64_t(group.thread()) * kN;
  const auto sums_of = [&](int k, int part) {
    return reinterpret_cast<Pack<float>*>(kept + group.place(k, kParts, kRowParts + part));
  };
  const auto load_sums = [&](float (&sums)[2 * kN], int k) {
    FASTATTN_UNROLL
    for (int part = 0; part < kSumParts<T>; ++part) {
      const Pack<float> four = load_shared(sums_of(k, part));
      FASTATTN_UNROLL
      for (int i = 0; i < 4; ++i) sums[4 * part + i] = four.number[i];
    }
  };
  const auto store_sums = [&](const float (&sums)[2 * kN], int k) {
    FASTATTN_UNROLL
    for (int part = 0; part < kSumParts<T>; ++part)
      store_shared(sums_of(k, part), Pack<float>{{sums[4 * part], sums[4 * part + 1],
                                                  sums[4 * part + 2], sums[4 * part + 3]}});
  };
  if (kSums) {
    const float zeros[2 * kN] = {};
    int k = 0;
    for (int64_t column = begin; column < width; column += stride, ++k) store_sums(zeros, k);
  }
  for (int64_t r = group.first_row(); r < rows; r += group.row_step()) {
    const Row<T> row(c, r);
    float sum_g = 0, sum_gx = 0;
    int k = 0;
    for (int64_t column = begin; column < width; column += stride, ++k) {
      const Pack<T> x = row.load_x(column), dy = row.load_dy(column);
      if (kSums || c.plan.shared) {
        store_shared(kept + group.place(k, kParts, 0), x);
        store_shared(kept + group.place(k, kParts, 1), dy);
      }
      row.add(x, dy, column, sum_g, sum_gx);
    }
    const float mean_gx = group.sum(sum_gx) / float(width);
    const float mean_g = c.p.rms ? 0.0f : group.sum(sum_g) / float(width);
    k = 0;
    for (int64_t column = begin; column < width; column += stride, ++k) {
      const bool once = kSums || c.plan.shared;
      const Pack<T> x = once ? load_shared(kept + group.place(k, kParts, 0)) : row.load_x(column);
      const Pack<T> dy = once ? load_shared(kept + group.place(k, kParts, 1)) : row.load_dy(column);
      if (kSums) {
        float sums[2 * kN];
        load_sums(sums, k);
        add_weights(row, x, dy, sums, sums + kN);
        store_sums(sums, k);
      }
      row.store(x, dy, column, mean_g, mean_gx);
    }
  }
  if (kSums) {
    int k = 0;
    for (int64_t column = begin; column < width; column += stride, ++k) {
      float sums[2 * kN];
      load_sums(sums, k);
      store_weights<T>(c, group.first_row(), column, sums, sums + kN);
    }
  }
  group.leave();
}

constexpr int kWeightThreads = 128;

// Sums of dweight and dbias of wide rows: a thread has a pack of columns, block (x, y) every
// grid_y-th row.
template <typename T>
FASTATTN_KERNEL(kWeightThreads, 1)
layer_norm_weights_kernel(FASTATTN_PARAMS Call c) {
  const int64_t column = (int64_t(block_x()) * kWeightThreads + thread_x()) * kPack<T>;
  if (column >= c.p.width) return;
  float dweight[kPack<T>] = {}, dbias[kPack<T>] = {};
  for (int64_t r = block_y(); r < c.p.rows.count(); r += grid_y()) {
    const Row<T> row(c, r);
    add_weights(row, row.load_x(column), row.load_dy(column), dweight, dbias);
  }
  store_weights<T>(c, block_y(), column, dweight, dbias);
}

// ---- the sum of partial sums -------------------------------------------------------------------

struct Reduction {
  const float* partials;
  int64_t partial_rows, width;
  void *dweight, *dbias;
  DType weight_dtype, bias_dtype;
};

constexpr int kReduceColumns = 32, kReduceLines = 8;

FASTATTN_KERNEL(kReduceColumns* kReduceLines, 1)
layer_norm_reduce_kernel(FASTATTN_PARAMS Reduction c) {
  FASTATTN_SHARED(memory);
  auto* sums = reinterpret_cast<float*>(memory);  // (2, lines, columns)
  const int lane = thread_x() % kReduceColumns, line = thread_x() / kReduceColumns;
  const int64_t column = int64_t(block_x()) * kReduceColumns + lane;
  float sum[2] = {0, 0};
  if (column < c.width)
    for (int64_t r = line; r < c.partial_rows; r += kReduceLines) {
      sum[0] += c.partials[r * 2 * c.width + column];
      sum[1] += c.partials[(r * 2 + 1) * c.width + column];
    }
  store_shared(sums + line * kReduceColumns + lane, sum[0]);
  store_shared(sums + (kReduceLines + line) * kReduceColumns + lane, sum[1]);
  sync_threads();
  if (line > 1 || column >= c.width) return;
  float total[1] = {0};
  for (int l = 0; l < kReduceLines; ++l)
    total[0] += load_shared(sums + (line * kReduceLines + l) * kReduceColumns + lane);
  void* out = line ? c.dbias : c.dweight;
  if (out) store_any(out, line ? c.bias_dtype : c.weight_dtype, column, c.width, false, total);
}

template <typename T>
void backward(const LayerNormParams& p, const LayerNormGrads& g, float* partials,
              int64_t partial_rows, const Device& device) {
  Call c{};
  c.p = p;
  c.g = g;
  c.dropout = RowDropout(p.dropout);
  constexpr auto kName = "layer_norm_backward";
  const auto wide = layer_norm_backward_wide_kernel<T, false>;
  const auto wide_sums = layer_norm_backward_wide_kernel<T, true>;
  const bool sums = g.dweight || g.dbias, dh = g.dx || g.dresidual;
  const auto plan_for = [&](const auto& kernel, int parts) {
    return plan_rows(kName, kernel, p.width, kPack<T>, 16 * parts, 256, device);
  };
  c.plan = plan_for(wide, kRowParts);
  bool keeps_sums = c.plan.held != 0;
  if (!keeps_sums && sums && dh) {
    const RowPlan with_sums = plan_for(wide_sums, kRowParts + kSumParts<T>);
    keeps_sums = with_sums.shared;
    if (keeps_sums) c.plan = with_sums;
  }
  c.x_aligned = rows_aligned<T>(p.x, p.rows);
  c.dy_aligned = rows_aligned<T>(g.dy, p.rows);
  c.new_aligned = rows_aligned<T>(g.dnew_residual, p.rows);
  c.out_aligned = is_aligned(g.dx) && is_aligned(g.dresidual) && p.width % kPack<T> == 0;
  c.weight_aligned = is_aligned(p.weight);
  const int64_t rows = p.rows.count(), packs = (p.width + kPack<T> - 1) / kPack<T>;
  if (keeps_sums) {
    int64_t together = rows;
    if (sums) {  // as many as there is room for
      const int64_t groups = c.plan.groups;
      int64_t most = std::min(partial_rows / groups, device.max_blocks / c.plan.blocks);
      if (!c.plan.held) {  // and as run at a time: each leaves as much as two rows in float32
        const int64_t blocks =
            device.multiprocessors * (2 * c.plan.bytes <= device.shared_bytes ? 2 : 1);
        most = std::min(most, std::max<int64_t>(blocks / c.plan.blocks, 1));
      }
      if (most < 1) throw std::runtime_error("layer_norm_backward: too few partial rows");
      c.partials = partials;
      partial_rows = together = std::min((rows + groups - 1) / groups, most) * groups;
    }
    const auto kernel = c.plan.held == 1   ? layer_norm_backward_kernel<T, 1>
                        : c.plan.held == 4 ? layer_norm_backward_kernel<T, 4>
                                           : wide_sums;
    launch_rows(kName, kernel, c, together, device);
  } else {
    if (dh) launch_rows(kName, wide, c, rows, device);
    if (sums) {
      c.partials = partials;
      partial_rows = rows < partial_rows ? rows : partial_rows;
      partial_rows = partial_rows < 65535 ? partial_rows : 65535;
      launch("layer_norm_backward, weights", layer_norm_weights_kernel<T>,
             Grid{(packs + kWeightThreads - 1) / kWeightThreads, partial_rows}, kWeightThreads, 0,
             device.stream, c);
    }
  }
  if (!sums) return;
  launch(
      "layer_norm_backward, reduction", layer_norm_reduce_kernel,
      Grid{(p.width + kReduceColumns - 1) / kReduceColumns}, kReduceColumns * kReduceLines,
      size_t(2) * kReduceColumns * kReduceLines * sizeof(float), device.stream,
      Reduction{partials, partial_rows, p.width, g.dweight, g.dbias, p.weight_dtype, p.bias_dtype});
}

}  // namespace

void layer_norm_backward(const LayerNormParams& p, const LayerNormGrads& g, float* partials,
                         int64_t partial_rows, const Device& device) {
  with_type(p.dtype,
            [&](auto type) { backward<decltype(type)>(p, g, partials, partial_rows, device); });
}

}  // namespace fastattn
