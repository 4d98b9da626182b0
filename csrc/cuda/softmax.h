// What softmax's kernels share: the maths of one number, and lines that are columns.
#pragma once
#include "kernels.h"
#include "rows.h"

namespace fastattn {

FASTATTN_DEVICE float hidden() { return float_of(0xFF800000u); }  // -inf

// exp(x), also of infinities and NaN; the subnormal are not lost.
FASTATTN_DEVICE float exp_of(float x) { return exp2f(x * kLog2e); }

// What to subtract from the scores: their maximum. Where a mask leaves nothing, exp(-inf - 0) is a
// sound 0; without one, -inf - -inf is the NaN that torch has.
FASTATTN_DEVICE float softmax_base(float top, bool masked) {
  return masked && top == hidden() ? 0.0f : top;
}

// The running maximum and sum of the online softmax (Milakov and Gimelshein, arXiv:1805.02867).
struct OnlineSum {
  float top = float_of(0xFF800000u), sum = 0;

  FASTATTN_DEVICE void take(float score) {
    const float higher = fmaxf(top, score);
    const float base = higher == hidden() ? 0.0f : higher;  // nothing to keep yet
    sum = sum * exp_of(top - base) + exp_of(score - base);
    top = higher;
  }
  FASTATTN_DEVICE float rescaled(float base) const {
    return sum == 0.0f ? 0.0f : sum * exp_of(top - base);
  }
};

// exp(s - base) / total, or its logarithm; nothing to keep: 0, or -inf.
struct SoftmaxResult {
  float base, total, factor, log_total;
  bool log, nothing;

  FASTATTN_DEVICE SoftmaxResult(float b, float t, bool as_log, bool masked)
      : base(b), total(t), log(as_log), nothing(masked && t == 0.0f) {
    factor = 1.0f / total;
    log_total = log ? logf(total) : 0.0f;
  }
  FASTATTN_DEVICE float of(float score) const {
    if (log) return nothing ? hidden() : (score - base) - log_total;
    return nothing ? 0.0f : exp_of(score - base) * factor;
  }
};

// scale y (dy - total); for the logarithm scale (dy - exp(y) total), 0 where y is -inf.
FASTATTN_DEVICE float softmax_gradient(float y, float dy, float total, float scale, bool log) {
  if (log) return y == hidden() ? 0.0f : scale * (dy - exp_of(y) * total);
  return scale * (y * (dy - total));
}

FASTATTN_DEVICE float load_one(const void* p, DType dtype, int64_t at) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(p)[at];
  if (dtype == DType::kBFloat16) return to_float(static_cast<const bf16*>(p)[at]);
  return to_float(static_cast<const f16*>(p)[at]);
}

FASTATTN_DEVICE void store_one(void* p, DType dtype, int64_t at, float value) {
  if (dtype == DType::kFloat32)
    static_cast<float*>(p)[at] = value;
  else if (dtype == DType::kBFloat16)
    static_cast<bf16*>(p)[at] = from_float<bf16>(value);
  else
    static_cast<f16*>(p)[at] = from_float<f16>(value);
}

// A bool mask's -inf holds even where the score is NaN.
FASTATTN_DEVICE float masked_score(float score, const void* mask, DType dtype, int64_t at) {
  if (dtype == DType::kBool) return static_cast<const uint8_t*>(mask)[at] ? score : hidden();
  return score + load_one(mask, dtype, at);
}

// Raises unless both are served.
inline void check_dtypes(DType x, DType y) {
  with_type(x, [](auto) {});
  with_type(y, [](auto) {});
}

// Lines that are columns, adjacent to one another: a block takes kColumns of them, and kLines
// threads share each.
constexpr int kColumns = 32, kLines = 16;

struct ColumnLine {
  int64_t row, column;
  int line;
  bool exists;

  FASTATTN_DEVICE ColumnLine(int64_t block, int64_t blocks_of_row, int64_t inner) {
    row = block / blocks_of_row;
    column = block % blocks_of_row * kColumns + thread_x() % kColumns;
    line = thread_x() / kColumns;
    exists = column < inner;
  }
  // Of the numbers that the threads of a column hold; all threads of the block call it.
  template <typename Join>
  FASTATTN_DEVICE float join(float value, float* shared, Join f) const {
    const int lane = thread_x() % kColumns;
    sync_threads();  // the last result has been read
    store_shared(shared + line * kColumns + lane, value);
    sync_threads();
    float result = load_shared(shared + lane);
    for (int l = 1; l < kLines; ++l) result = f(result, load_shared(shared + l * kColumns + lane));
    return result;
  }
};
constexpr size_t kColumnBytes = size_t(kColumns) * kLines * sizeof(float);

FASTATTN_HD int64_t column_blocks(int64_t rows, int64_t inner) {
  return rows * ((inner + kColumns - 1) / kColumns);
}

// Calls f with the columns of this block's turns.
template <typename F>
FASTATTN_DEVICE void each_column(int64_t rows, int64_t inner, F f) {
  const int64_t blocks = column_blocks(rows, inner);
  for (int64_t block = block_x(); block < blocks; block += grid_x())
    f(ColumnLine(block, column_blocks(1, inner), inner));
}

}  // namespace fastattn
