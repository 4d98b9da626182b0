// Softmax and log-softmax of scale * x + mask, forward. A warp, a block or a cluster takes a row
// and reads it once: the scores stay in registers, or in shared memory; rows too wide for both are
// read again. Where the summed dimension is not the last, a block takes adjacent columns.
#include "softmax.h"

namespace fastattn {
namespace {

struct Call {
  SoftmaxParams p;
  RowPlan plan;
  float scale;
  bool x_aligned, y_aligned;
};

template <typename T, int kHeld>
FASTATTN_KERNEL(kHeld > 0 ? 256 : kWideThreads, 1)
softmax_forward_kernel(FASTATTN_PARAMS Call c) {
  FASTATTN_SHARED(memory);
  constexpr int kN = kPack<T>;
  const SoftmaxParams& p = c.p;
  RowGroup<kHeld == 0> group(c.plan, memory);
  auto* kept = reinterpret_cast<Pack<float>*>(memory + kReduceBytes);
  const int64_t rows = p.rows.count(), width = p.width;
  const int64_t stride = int64_t(group.threads()) * kN, begin = int64_t(group.thread()) * kN;
  const bool masked = bool(p.mask);
  for (int64_t r = group.first_row(); r < rows; r += group.row_step()) {
    const T* x = static_cast<const T*>(p.x.data) + p.rows.offset(r, p.x);
    const int64_t mask_row = masked ? p.rows.offset(r, p.mask) : 0;
    // -inf beyond the end of the row.
    const auto load = [&](float (&s)[kN], int64_t column) {
      load_as(s, x, column, width, c.x_aligned);
      FASTATTN_UNROLL
      for (int i = 0; i < kN; ++i) {
        s[i] *= c.scale;
        if (column + i >= width)
          s[i] = hidden();
        else if (masked)
          s[i] = masked_score(s[i], p.mask.data, p.mask_dtype,
                              mask_row + (column + i) * p.mask.stride[3]);
      }
    };
    const auto store = [&](float (&s)[kN], int64_t column, const SoftmaxResult& result) {
      FASTATTN_UNROLL
      for (int i = 0; i < kN; ++i) s[i] = result.of(s[i]);
      store_any(at_bytes(p.y, r * width, p.y_dtype), p.y_dtype, column, width, c.y_aligned, s);
    };
    if constexpr (kHeld > 0) {
      float s[kHeld > 0 ? kHeld : 1][kN];
      float top = hidden(), sum = 0;
      FASTATTN_UNROLL
      for (int k = 0; k < kHeld; ++k) {
        if (begin + k * stride >= width) continue;
        load(s[k], begin + k * stride);
      }
      FASTATTN_UNROLL
      for (int k = 0; k < kHeld; ++k) {
        if (begin + k * stride >= width) continue;
        FASTATTN_UNROLL
        for (int i = 0; i < kN; ++i) top = fmaxf(top, s[k][i]);
      }
      const float base = softmax_base(group.max(top), masked);
      FASTATTN_UNROLL
      for (int k = 0; k < kHeld; ++k) {
        if (begin + k * stride >= width) continue;
        FASTATTN_UNROLL
        for (int i = 0; i < kN; ++i)
          if (begin + k * stride + i < width) sum += exp_of(s[k][i] - base);
      }
      const SoftmaxResult result(base, group.sum(sum), p.log, masked);
      FASTATTN_UNROLL
      for (int k = 0; k < kHeld; ++k)
        if (begin + k * stride < width) store(s[k], begin + k * stride, result);
      continue;
    }
    constexpr int kParts = kN / kPack<float>;
    OnlineSum seen;
    int k = 0;
    for (int64_t column = begin; column < width; column += stride, ++k) {
      float s[kN];
      load(s, column);
      FASTATTN_UNROLL
      for (int i = 0; i < kN; ++i)
        if (column + i < width) seen.take(s[i]);
      if (!c.plan.shared) continue;
      FASTATTN_UNROLL
      for (int part = 0; part < kParts; ++part) {
        const float* from = s + part * kPack<float>;
        store_shared(kept + group.place(k, kParts, part),
                     Pack<float>{{from[0], from[1], from[2], from[3]}});
      }
    }
    const float base = softmax_base(group.max(seen.top), masked);
    const SoftmaxResult result(base, group.sum(seen.rescaled(base)), p.log, masked);
    k = 0;
    for (int64_t column = begin; column < width; column += stride, ++k) {
      float s[kN];
      if (c.plan.shared) {
        FASTATTN_UNROLL
        for (int part = 0; part < kParts; ++part) {
          const Pack<float> from = load_shared(kept + group.place(k, kParts, part));
          FASTATTN_UNROLL
          for (int i = 0; i < kPack<float>; ++i) s[part * kPack<float> + i] = from.number[i];
        }
      } else {
        load(s, column);
      }
      store(s, column, result);
    }
  }
  group.leave();
}

FASTATTN_KERNEL(kColumns* kLines, 1)
softmax_forward_columns_kernel(FASTATTN_PARAMS Call c) {
  FASTATTN_SHARED(memory);
  auto* shared = reinterpret_cast<float*>(memory);
  const SoftmaxParams& p = c.p;
  const bool masked = bool(p.mask);
  each_column(p.rows.count(), p.inner, [&](const ColumnLine& at) {
    const int64_t x0 = p.rows.offset(at.row, p.x) + at.column;
    const int64_t mask0 = masked ? p.rows.offset(at.row, p.mask) + at.column * p.mask_inner : 0;
    const auto score = [&](int64_t j) {
      const float s = load_one(p.x.data, p.x_dtype, x0 + j * p.x.stride[3]) * c.scale;
      return masked ? masked_score(s, p.mask.data, p.mask_dtype, mask0 + j * p.mask.stride[3]) : s;
    };
    OnlineSum seen;
    if (at.exists)
      for (int64_t j = at.line; j < p.width; j += kLines) seen.take(score(j));
    const float top = at.join(seen.top, shared, [](float a, float b) { return fmaxf(a, b); });
    const float base = softmax_base(top, masked);
    const float total =
        at.join(seen.rescaled(base), shared, [](float a, float b) { return a + b; });
    if (!at.exists) return;
    const SoftmaxResult result(base, total, p.log, masked);
    for (int64_t j = at.line; j < p.width; j += kLines)
      store_one(p.y, p.y_dtype, (at.row * p.width + j) * p.inner + at.column, result.of(score(j)));
  });
}

template <typename T>
void rows_forward(Call& c, const Device& device) {
  const SoftmaxParams& p = c.p;
  constexpr auto kName = "softmax_forward";
  const auto wide = softmax_forward_kernel<T, 0>;
  c.plan = plan_rows(kName, wide, p.width, kPack<T>, 4 * kPack<T>, 256, device);
  c.x_aligned = rows_aligned<T>(p.x, p.rows);
  launch_rows(kName, softmax_forward_kernel<T, 1>, softmax_forward_kernel<T, 4>, wide, c,
              p.rows.count(), device);
}

}  // namespace

void softmax_forward(const SoftmaxParams& p, const Device& device) {
  Call c{};
  c.p = p;
  c.scale = float(p.scale);
  check_dtypes(p.x_dtype, p.y_dtype);
  if (p.inner > 1) {
    launch("softmax_forward, columns", softmax_forward_columns_kernel,
           grid_of(column_blocks(p.rows.count(), p.inner), device), kColumns * kLines, kColumnBytes,
           device.stream, c);
    return;
  }
  const int64_t y_pack = p.y_dtype == DType::kFloat32 ? 4 : 8;
  c.y_aligned = is_aligned(p.y) && p.width % y_pack == 0;
  with_type(p.x_dtype, [&](auto type) { rows_forward<decltype(type)>(c, device); });
}

}  // namespace fastattn
