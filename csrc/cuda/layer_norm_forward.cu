// Layer norm and RMS norm of residual + dropout(x), forward. A warp, a block or a cluster takes a
// row and reads it once: what is normalised stays in registers, or in shared memory; only rows that
// are too wide for both are read again. Statistics are of the numbers less the row's first: a
// constant row has variance 0 and exactly its mean, and a mean of 1e4 costs no digits.
#include "kernels.h"
#include "rows.h"

namespace fastattn {
namespace {

struct Call {
  LayerNormParams p;
  RowDropout dropout;
  RowPlan plan;
  bool x_aligned, residual_aligned, out_aligned;  // rows begin at multiples of 16 bytes
  bool weight_aligned, bias_aligned;
};

template <typename T>
struct Row {
  const Call& c;
  int64_t row;
  const T *x, *residual;
  T *y, *new_residual;

  FASTATTN_DEVICE Row(const Call& call, int64_t r) : c(call), row(r) {
    const LayerNormParams& p = c.p;
    x = static_cast<const T*>(p.x.data) + p.rows.offset(r, p.x);
    residual = p.residual ? static_cast<const T*>(p.residual.data) + p.rows.offset(r, p.residual)
                          : nullptr;
    y = static_cast<T*>(p.y) + r * p.width;
    new_residual = static_cast<T*>(p.new_residual) + r * p.width;
  }

  // What is normalised. A sum is rounded as it is stored: that is what the backward will see.
  FASTATTN_DEVICE Pack<T> source(int64_t column) const {
    const int64_t width = c.p.width;
    Pack<T> pack = load_pack(x, column, width, c.x_aligned);
    if (!residual) return pack;
    const Pack<T> add = load_pack(residual, column, width, c.residual_aligned);
    float h[kPack<T>];
    FASTATTN_UNROLL
    for (int i = 0; i < kPack<T>; ++i) h[i] = to_float(pack.number[i]);
    if (c.dropout.on) c.dropout.apply(h, row, column);
    FASTATTN_UNROLL
    for (int i = 0; i < kPack<T>; ++i)
      pack.number[i] = from_float<T>(h[i] + to_float(add.number[i]));
    store_pack(new_residual, column, width, c.out_aligned, pack);
    return pack;
  }

  FASTATTN_DEVICE Pack<T> source_again(int64_t column) const {
    return residual ? load_pack(new_residual, column, c.p.width, c.out_aligned)
                    : load_pack(x, column, c.p.width, c.x_aligned);
  }

  // y = d rstd weight + bias, of the numbers less `first` and `centre`.
  FASTATTN_DEVICE void normalize(const Pack<T>& pack, int64_t column, float first, float centre,
                                 float rstd) const {
    constexpr int kN = kPack<T>;
    const LayerNormParams& p = c.p;
    float out[kN], scale[kN], shift[kN];
    if (p.weight) load_any(scale, p.weight, p.weight_dtype, column, p.width, c.weight_aligned);
    if (p.bias) load_any(shift, p.bias, p.bias_dtype, column, p.width, c.bias_aligned);
    Pack<T> result;
    FASTATTN_UNROLL
    for (int i = 0; i < kN; ++i) {
      out[i] = (to_float(pack.number[i]) - first - centre) * rstd;
      if (p.weight) out[i] *= scale[i];
      if (p.bias) out[i] += shift[i];
      result.number[i] = from_float<T>(out[i]);
    }
    store_pack(y, column, p.width, c.out_aligned, result);
  }
};

template <typename T>
FASTATTN_DEVICE int inside(int64_t column, int64_t width) {
  return int(width - column < kPack<T> ? width - column : kPack<T>);
}

// Sum of f(number) over what a pack has of the row.
template <typename T, typename F>
FASTATTN_DEVICE float pack_sum(const Pack<T>& pack, int64_t column, int64_t width, F f) {
  float sum = 0;
  FASTATTN_UNROLL
  for (int i = 0; i < kPack<T>; ++i)
    if (column + i < width) sum += f(to_float(pack.number[i]));
  return sum;
}

// Count, mean and squares about it of what a thread has seen, pack by pack (Chan et al., 1979).
struct Moments {
  float count = 0, mean = 0, squares = 0;

  template <typename T>
  FASTATTN_DEVICE void take(const Pack<T>& pack, int64_t column, int64_t width) {
    const float n = float(inside<T>(column, width)), first = to_float(pack.number[0]);
    const float centre =
        first + pack_sum(pack, column, width, [&](float h) { return h - first; }) / n;
    const float own =
        pack_sum(pack, column, width, [&](float h) { return (h - centre) * (h - centre); });
    const float step = centre - mean, total = count + n;
    squares += own + step * step * (count * n / total);
    mean += step * (n / total);
    count = total;
  }
};

// Calls f(k, column) for the packs of this thread.
template <int kHeld, typename T, typename Group, typename F>
FASTATTN_DEVICE void each_pack(const Group& group, int64_t width, F f) {
  const int64_t stride = int64_t(group.threads()) * kPack<T>;
  int64_t column = int64_t(group.thread()) * kPack<T>;
  if (kHeld > 0) {
    FASTATTN_UNROLL
    for (int k = 0; k < kHeld; ++k, column += stride)
      if (column < width) f(k, column);
  } else {
    for (int k = 0; column < width; ++k, column += stride) f(k, column);
  }
}

template <typename T, int kHeld>
FASTATTN_KERNEL(kHeld > 0 ? 512 : kWideThreads, 1)
layer_norm_forward_kernel(FASTATTN_PARAMS Call c) {
  FASTATTN_SHARED(memory);
  const LayerNormParams& p = c.p;
  RowGroup<kHeld == 0> group(c.plan, memory);
  auto* kept = reinterpret_cast<Pack<T>*>(memory + kReduceBytes);
  const int64_t rows = p.rows.count(), width = p.width;
  const float count = float(width);
  for (int64_t r = group.first_row(); r < rows; r += group.row_step()) {
    const Row<T> row(c, r);
    float first = 0, centre = 0, squares = 0;
    Pack<T> held[kHeld > 0 ? kHeld : 1];
    const auto keep = [&](int k, const Pack<T>& pack) {
      if (kHeld > 0)
        held[k] = pack;
      else
        store_shared(kept + group.place(k, 1, 0), pack);
    };
    const auto at = [&](int k) {
      return kHeld > 0 ? held[k] : load_shared(kept + group.place(k, 1, 0));
    };
    const bool once = kHeld > 0 || c.plan.shared;
    if (once) {
      each_pack<kHeld, T>(group, width,
                          [&](int k, int64_t column) { keep(k, row.source(column)); });
      if (!p.rms) {
        first = group.first(group.thread() * kPack<T> < width ? to_float(at(0).number[0]) : 0);
        float sum = 0;
        each_pack<kHeld, T>(group, width, [&](int k, int64_t column) {
          sum += pack_sum(at(k), column, width, [&](float h) { return h - first; });
        });
        centre = group.sum(sum) / count;
      }
      each_pack<kHeld, T>(group, width, [&](int k, int64_t column) {
        squares += pack_sum(at(k), column, width, [&](float h) {
          const float d = h - first - centre;
          return d * d;
        });
      });
      squares = group.sum(squares);
    } else if (p.rms) {
      each_pack<kHeld, T>(group, width, [&](int, int64_t column) {
        squares += pack_sum(row.source(column), column, width, [](float h) { return h * h; });
      });
      squares = group.sum(squares);
    } else {
      Moments seen;
      each_pack<kHeld, T>(
          group, width, [&](int, int64_t column) { seen.take(row.source(column), column, width); });
      first = group.first(seen.mean);
      centre = group.sum(seen.count * (seen.mean - first)) / count;
      const float d = seen.mean - first - centre;
      squares = group.sum(seen.squares + seen.count * d * d);
    }
    const float rstd = 1.0f / sqrtf(squares / count + float(p.eps));
    if (group.thread() == 0) {
      if (p.mean) static_cast<float*>(p.mean)[r] = first + centre;
      if (p.rstd) static_cast<float*>(p.rstd)[r] = rstd;
    }
    each_pack<kHeld, T>(group, width, [&](int k, int64_t column) {
      row.normalize(once ? at(k) : row.source_again(column), column, first, centre, rstd);
    });
  }
  group.leave();
}

template <typename T>
void forward(const LayerNormParams& p, const Device& device) {
  Call c{};
  c.p = p;
  c.dropout = RowDropout(p.dropout);
  constexpr auto kName = "layer_norm_forward";
  const auto wide = layer_norm_forward_kernel<T, 0>;
  c.plan = plan_rows(kName, wide, p.width, kPack<T>, 16, 512, device);
  c.x_aligned = rows_aligned<T>(p.x, p.rows);
  c.residual_aligned = rows_aligned<T>(p.residual, p.rows);
  c.out_aligned = is_aligned(p.y) && is_aligned(p.new_residual) && p.width % kPack<T> == 0;
  c.weight_aligned = is_aligned(p.weight);
  c.bias_aligned = is_aligned(p.bias);
  launch_rows(kName, layer_norm_forward_kernel<T, 1>, layer_norm_forward_kernel<T, 4>, wide, c,
              p.rows.count(), device);
}

}  // namespace

void layer_norm_forward(const LayerNormParams& p, const Device& device) {
  with_type(p.dtype, [&](auto type) { forward<decltype(type)>(p, device); });
}

}  // namespace fastattn
