// Softmax and log-softmax, backward: dx = scale y (dy - sum(y dy)); for the logarithm
// dx = scale (dy - exp(y) sum(dy)). Rows and columns as in the forward.
#include "softmax.h"

namespace fastattn {
namespace {

struct Call {
  SoftmaxGrads g;
  RowPlan plan;
  float scale;
  bool y_aligned, dy_aligned, dx_aligned;
};

// What is summed over a line.
FASTATTN_DEVICE float term(float y, float dy, bool log) { return log ? dy : y * dy; }

template <typename T, int kHeld>
FASTATTN_KERNEL(kHeld > 0 ? 256 : kWideThreads, 1)
softmax_backward_kernel(FASTATTN_PARAMS Call c) {
  FASTATTN_SHARED(memory);
  constexpr int kN = kPack<T>;
  const SoftmaxGrads& g = c.g;
  RowGroup<kHeld == 0> group(c.plan, memory);
  auto* kept = reinterpret_cast<Pack<T>*>(memory + kReduceBytes);
  const int64_t rows = g.rows.count(), width = g.width;
  const int64_t stride = int64_t(group.threads()) * kN, begin = int64_t(group.thread()) * kN;
  for (int64_t r = group.first_row(); r < rows; r += group.row_step()) {
    const T* y = static_cast<const T*>(g.y.data) + g.rows.offset(r, g.y);
    const T* dy = static_cast<const T*>(g.dy.data) + g.rows.offset(r, g.dy);
    const auto add = [&](const Pack<T>& v, const Pack<T>& up, int64_t column, float& sum) {
      FASTATTN_UNROLL
      for (int i = 0; i < kN; ++i)
        if (column + i < width) sum += term(to_float(v.number[i]), to_float(up.number[i]), g.log);
    };
    const auto store = [&](const Pack<T>& v, const Pack<T>& up, int64_t column, float total) {
      float dx[kN];
      FASTATTN_UNROLL
      for (int i = 0; i < kN; ++i)
        dx[i] =
            softmax_gradient(to_float(v.number[i]), to_float(up.number[i]), total, c.scale, g.log);
      store_any(at_bytes(g.dx, r * width, g.x_dtype), g.x_dtype, column, width, c.dx_aligned, dx);
    };
    float sum = 0;
    if constexpr (kHeld > 0) {
      Pack<T> v[kHeld > 0 ? kHeld : 1], up[kHeld > 0 ? kHeld : 1];
      FASTATTN_UNROLL
      for (int k = 0; k < kHeld; ++k) {
        if (begin + k * stride >= width) continue;
        v[k] = load_pack(y, begin + k * stride, width, c.y_aligned);
        up[k] = load_pack(dy, begin + k * stride, width, c.dy_aligned);
      }
      FASTATTN_UNROLL
      for (int k = 0; k < kHeld; ++k)
        if (begin + k * stride < width) add(v[k], up[k], begin + k * stride, sum);
      const float total = group.sum(sum);
      FASTATTN_UNROLL
      for (int k = 0; k < kHeld; ++k)
        if (begin + k * stride < width) store(v[k], up[k], begin + k * stride, total);
      continue;
    }
    int k = 0;
    for (int64_t column = begin; column < width; column += stride, ++k) {
      const Pack<T> v = load_pack(y, column, width, c.y_aligned);
      const Pack<T> up = load_pack(dy, column, width, c.dy_aligned);
      if (c.plan.shared) {
        store_shared(kept + group.place(k, 2, 0), v);
        store_shared(kept + group.place(k, 2, 1), up);
      }
      add(v, up, column, sum);
    }
    const float total = group.sum(sum);
    k = 0;
    for (int64_t column = begin; column < width; column += stride, ++k) {
      if (c.plan.shared)
        store(load_shared(kept + group.place(k, 2, 0)), load_shared(kept + group.place(k, 2, 1)),
              column, total);
      else
        store(load_pack(y, column, width, c.y_aligned), load_pack(dy, column, width, c.dy_aligned),
              column, total);
    }
  }
  group.leave();
}

FASTATTN_KERNEL(kColumns* kLines, 1)
softmax_backward_columns_kernel(FASTATTN_PARAMS Call c) {
  FASTATTN_SHARED(memory);
  const SoftmaxGrads& g = c.g;
  each_column(g.rows.count(), g.inner, [&](const ColumnLine& at) {
    const int64_t y0 = g.rows.offset(at.row, g.y) + at.column;
    const int64_t dy0 = g.rows.offset(at.row, g.dy) + at.column;
    const auto y = [&](int64_t j) { return load_one(g.y.data, g.y_dtype, y0 + j * g.y.stride[3]); };
    const auto dy = [&](int64_t j) {
      return load_one(g.dy.data, g.y_dtype, dy0 + j * g.dy.stride[3]);
    };
    float sum = 0;
    if (at.exists)
      for (int64_t j = at.line; j < g.width; j += kLines) sum += term(y(j), dy(j), g.log);
    const float total =
        at.join(sum, reinterpret_cast<float*>(memory), [](float a, float b) { return a + b; });
    if (!at.exists) return;
    for (int64_t j = at.line; j < g.width; j += kLines)
      store_one(g.dx, g.x_dtype, (at.row * g.width + j) * g.inner + at.column,
                softmax_gradient(y(j), dy(j), total, c.scale, g.log));
  });
}

template <typename T>
void rows_backward(Call& c, const Device& device) {
  const SoftmaxGrads& g = c.g;
  constexpr auto kName = "softmax_backward";
  const auto wide = softmax_backward_kernel<T, 0>;
  c.plan = plan_rows(kName, wide, g.width, kPack<T>, 32, 256, device);
  c.y_aligned = rows_aligned<T>(g.y, g.rows);
  c.dy_aligned = rows_aligned<T>(g.dy, g.rows);
  launch_rows(kName, softmax_backward_kernel<T, 1>, softmax_backward_kernel<T, 4>, wide, c,
              g.rows.count(), device);
}

}  // namespace

void softmax_backward(const SoftmaxGrads& g, const Device& device) {
  Call c{};
  c.g = g;
  c.scale = float(g.scale);
  check_dtypes(g.x_dtype, g.y_dtype);
  if (g.inner > 1) {
    launch("softmax_backward, columns", softmax_backward_columns_kernel,
           grid_of(column_blocks(g.rows.count(), g.inner), device), kColumns * kLines, kColumnBytes,
           device.stream, c);
    return;
  }
  const int64_t dx_pack = g.x_dtype == DType::kFloat32 ? 4 : 8;
  c.dx_aligned = is_aligned(g.dx) && g.width % dx_pack == 0;
  with_type(g.y_dtype, [&](auto type) { rows_backward<decltype(type)>(c, device); });
}

}  // namespace fastattn
