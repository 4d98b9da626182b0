// Layer norm and RMS norm of residual + dropout(x), forward and backward.
#include <array>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace fastattn {
namespace {

// ---- forward -----------------------------------------------------------------------------------

struct Moments {
  double mean, variance;  // RMS: 0 and the mean square
};

// Of each row: the sums of x - centre and of its square over n numbers of the first-level cache.
template <typename T, int kRows>
FASTATTN_INLINE auto sums_around(const Acc<T> (&centre)[kRows], const T* const (&x)[kRows],
                                 int64_t n) {
  using A = Acc<T>;
  Vec<A> centres[kRows];
  for (int r = 0; r < kRows; ++r) centres[r] = set1(centre[r]);
  return sum_vectors<T, 2 * kRows>(
      n, [&](Vec<A>(&acc)[2 * kRows], int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
        for (int r = 0; r < kRows; ++r) {
          const Vec<A> d = lanes.keep(lanes.load(x[r] + j) - centres[r], A(0));
          acc[2 * r] = acc[2 * r] + d;
          acc[2 * r + 1] = fma(d, d, acc[2 * r + 1]);
        }
      });
}

// Mean and variance of rows, in one walk through memory, block by block, the blocks joined as Chan
// et al. (1979) do. Everything is relative to the row's first number, so that a constant row has
// the variance 0 and its mean exactly. A block's sums are taken around the mean of its first
// numbers; where that is far from the block's own, which would cost digits of the variance, around
// that.
template <typename T, int kRows>
FASTATTN_NOINLINE void moments(const T* const (&x)[kRows], int64_t n, Moments (&out)[kRows]) {
  using A = Acc<T>;
  constexpr int64_t kHead = 4 * Vec<A>::kWidth;
  A pivot[kRows];
  double mean[kRows], squares[kRows];  // of x - pivot, over the blocks so far
  for (int r = 0; r < kRows; ++r) {
    pivot[r] = to_acc(x[r][0]);
    mean[r] = squares[r] = 0;
  }
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t m = std::min(kBlock, n - begin), head = std::min(kHead, m);
    const double share = double(m) / double(begin + m);
    const T* block[kRows];
    for (int r = 0; r < kRows; ++r) block[r] = x[r] + begin;
    const auto first_sums = sums_around<T, kRows>(pivot, block, head);
    A centre[kRows];
    for (int r = 0; r < kRows; ++r) centre[r] = pivot[r] + first_sums[size_t(2 * r)] / A(head);
    const auto sums = sums_around<T, kRows>(centre, block, m);
    for (int r = 0; r < kRows; ++r) {
      A first = sums[size_t(2 * r)], second = sums[size_t(2 * r + 1)];
      if (first * first > A(m) * second / 4) {
        const A nearer[] = {centre[r] + first / A(m)};
        const T* const row[] = {block[r]};
        const auto again = sums_around<T, 1>(nearer, row, m);
        centre[r] = nearer[0];
        first = again[0];
        second = again[1];
      }
      const double s1 = first, s2 = second;
      const double block_mean = (double(centre[r]) - double(pivot[r])) + s1 / double(m);
      const double delta = block_mean - mean[r];
      mean[r] += delta * share;
      squares[r] += s2 - s1 * s1 / double(m) + delta * delta * double(begin) * share;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const double variance = squares[r] / double(n);
    // Rounding may leave a tiny negative one; NaN stays.
    out[r] = {double(pivot[r]) + mean[r], variance < 0 ? 0.0 : variance};
  }
}

template <typename T>
FASTATTN_NOINLINE Moments mean_square(const T* x, int64_t n) {
  using A = Acc<T>;
  double squares = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const auto [sum] =
        sum_vectors<T, 1>(std::min(kBlock, n - begin),
                          [&](Vec<A>(&acc)[1], int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
                            const Vec<A> v = lanes.load(x + begin + j);
                            acc[0] = fma(v, v, acc[0]);
                          });
    squares += sum;
  }
  return {0, squares / double(n)};
}

// h = residual + dropout(x), rounded as stored: what is normalised is what the backward will see.
template <typename T>
FASTATTN_NOINLINE void add_row(T* h, const T* residual, const T* x, const Dropout& dropout,
                               int64_t row, int64_t n) {
  using A = Acc<T>;
  A factor[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t m = std::min(kBlock, n - begin);
    const T *r = residual + begin, *branch = x + begin;
    if (dropout.p > 0) {
      dropout_factors(factor, dropout, row, begin, m);
      write_row<A>(h + begin, m, false, [&](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
        return lanes.load(branch + j) * lanes.load(factor + j) + lanes.load(r + j);
      });
    } else {
      write_row<A>(h + begin, m, false, [&](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
        return lanes.load(branch + j) + lanes.load(r + j);
      });
    }
  }
}

// The weights in the accumulation type and the order of T; `missing` where there are none.
template <typename T, typename A = Acc<T>>
class Weights {
 public:
  Weights(const void* data, DType dtype, int64_t n, A missing) {
    const bool direct = data && dtype == dtype_of<A>();
    values_ = static_cast<const A*>(data);
    if (direct && !kPaired<T>) return;
    if (!direct) {
      own_ = make_array<A>(n);
      if (data)
        widen_row(own_.get(), data, dtype, 1, n);
      else
        std::fill_n(own_.get(), n, missing);
      values_ = own_.get();
    }
    if (kPaired<T> && data) {
      Array<A> ordered = make_array<A>(n);
      to_order_of<T>(ordered.get(), values_, n);
      own_ = std::move(ordered);
      values_ = own_.get();
    }
  }
  const A* get() const { return values_; }

 private:
  Array<A> own_;
  const A* values_;
};

template <typename T, int kRows>
void forward_group(int64_t first, const LayerNormParams& p, const Acc<T>* weight,
                   const Acc<T>* bias, bool past_cache) {
  using A = Acc<T>;
  const int64_t n = p.width;
  const T* x[kRows];
  T* y[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r;
    x[r] = static_cast<const T*>(p.x.data) + p.rows.offset(row, p.x);
    y[r] = static_cast<T*>(p.y) + row * n;
    if (p.new_residual) {
      T* h = static_cast<T*>(p.new_residual) + row * n;
      const T* residual = static_cast<const T*>(p.residual.data) + p.rows.offset(row, p.residual);
      add_row(h, residual, x[r], p.dropout, row, n);
      x[r] = h;
    }
  }
  Moments moment[kRows];
  if (p.rms)
    for (int r = 0; r < kRows; ++r) moment[r] = mean_square(x[r], n);
  else
    moments<T, kRows>(x, n, moment);

  // y = ((x - centre) - rest) rstd weight + bias, where centre + rest is the mean to more digits
  // than one number holds: a mean of 1e4 must not cost the last digits of y.
  Vec<A> centre[kRows], scale[kRows], rest[kRows];
  for (int r = 0; r < kRows; ++r) {
    const double mean = moment[r].mean, rstd = 1 / std::sqrt(moment[r].variance + p.eps);
    if (p.mean) static_cast<A*>(p.mean)[first + r] = A(mean);
    if (p.rstd) static_cast<A*>(p.rstd)[first + r] = A(rstd);
    centre[r] = set1(A(mean));
    scale[r] = set1(A(rstd));
    rest[r] = set1(A((double(A(mean)) - mean) * rstd));
  }
  const int64_t later = std::min(first + kRows - 1 + kRowsAhead, p.rows.count() - 1);
  const T* ahead = static_cast<const T*>(p.x.data) + p.rows.offset(later, p.x);
  const bool fetch = n * int64_t(sizeof(T)) <= 16384;  // a longer one is read fastest as it comes
  const auto x_hat = [=](int r, int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
    return fma(lanes.load(x[r] + j) - centre[r], scale[r], rest[r]);
  };
  if constexpr (kRows == 1)
    return write_row<T>(y[0], n, past_cache, [=](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
      // Memory is read while it is written.
      if (fetch) prefetch(ahead + j);
      return fma(x_hat(0, j, lanes), lanes.load(weight + j), lanes.load(bias + j));
    });
  else
    write_rows<kRows>(y, n, [=](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
      const Vec<A> w = lanes.load(weight + j), b = lanes.load(bias + j);
      std::array<Vec<A>, kRows> result;
      for (int r = 0; r < kRows; ++r) result[size_t(r)] = fma(x_hat(r, j, lanes), w, b);
      return result;
    });
}

template <typename T>
void forward(const LayerNormParams& p) {
  using A = Acc<T>;
  const int64_t n = p.width, rows = p.rows.count(), bytes = rows * n * int64_t(sizeof(T));
  const Weights<T> weights(p.weight, p.weight_dtype, n, A(1));
  const Weights<T> biases(p.bias, p.bias_dtype, n, A(0));
  const A *weight = weights.get(), *bias = biases.get();
  const bool past_cache = bytes >= kStreamBytes;
  if (past_cache) {
    expect_large_write(p.y, bytes);
    if (p.new_residual) expect_large_write(p.new_residual, bytes);
  }
  parallel_static(rows, useful_threads(p.threads, rows * n), [&](int64_t begin, int64_t end, int) {
    int64_t row = begin;
    if (!past_cache)  // a stream of reads and one of writes is what memory likes best
      for (; row + kRowsTogether <= end; row += kRowsTogether)
        forward_group<T, kRowsTogether>(row, p, weight, bias, false);
    for (; row < end; ++row) forward_group<T, 1>(row, p, weight, bias, past_cache);
    stream_fence();
  });
}

// ---- backward ----------------------------------------------------------------------------------

// A thread's sums of dweight and dbias, in the order of T, over two levels: the first takes kFlush
// additions, then goes into the second, in float64, so that thousands of rows do not add up their
// rounding.
template <typename A>
class Partials {
 public:
  explicit Partials(int64_t n)
      : n_((n + 15) / 16 * 16), recent_(make_array<A>(2 * n_)), total_(make_array<double>(2 * n_)) {
    std::fill_n(recent_.get(), 2 * n_, A(0));
    std::fill_n(total_.get(), 2 * n_, 0.0);
  }
  A* dweight() { return recent_.get(); }
  A* dbias() { return recent_.get() + n_; }
  const double* total_dweight() const { return total_.get(); }
  const double* total_dbias() const { return total_.get() + n_; }
  void added() {
    if (++pending_ == kFlush) flush();
  }
  void flush() {
    A* recent = recent_.get();
    double* total = total_.get();
    for (int64_t j = 0; j < 2 * n_; ++j) {
      total[j] += double(recent[j]);
      recent[j] = 0;
    }
    pending_ = 0;
  }

 private:
  static constexpr int kFlush = 16;
  int64_t n_;  // rounded up, so that both are aligned
  Array<A> recent_;
  Array<double> total_;
  int pending_ = 0;
};

// One row of a group: g = dy weight, d = x - mean, x_hat = d rstd.
template <typename T>
struct BackwardRow {
  const T *x, *dy;
  Acc<T> mean, rstd;
  double sum_g, sum_gd, sum_d;
};

// First pass over kRows rows at once, so that dweight, dbias and the weights are loaded once for
// all: sum_g = sum(g), sum_gd = sum(g d), sum_d = sum(d), dweight += dy x_hat, dbias += dy.
template <typename T, int kRows, bool kPartials>
FASTATTN_NOINLINE void backward_sums(BackwardRow<T>* rows, const Acc<T>* weight, Acc<T>* dweight,
                                     Acc<T>* dbias, int64_t n) {
  using A = Acc<T>;
  Vec<A> mean[kRows], rstd[kRows];
  const T *x[kRows], *dy[kRows];
  for (int r = 0; r < kRows; ++r) {
    mean[r] = set1(rows[r].mean);
    rstd[r] = set1(rows[r].rstd);
    x[r] = rows[r].x;
    dy[r] = rows[r].dy;
  }
  constexpr int64_t kRun = kRowRun<A>;  // sums over two levels, as in sum_vectors
  Vec<A> total_g[kRows], total_gd[kRows], total_d[kRows];
  for (int r = 0; r < kRows; ++r) total_g[r] = total_gd[r] = total_d[r] = zero<A>();
  for (int64_t begin = 0; begin < n; begin += kRun) {
    Vec<A> sum_g[kRows], sum_gd[kRows], sum_d[kRows];
    for (int r = 0; r < kRows; ++r) sum_g[r] = sum_gd[r] = sum_d[r] = zero<A>();
    each_vector<T, kRows == 1 ? kUnroll : 1>(
        std::min(kRun, n - begin), [&](auto, int64_t i, auto lanes) FASTATTN_INLINE_LAMBDA {
          const int64_t j = begin + i;
          const Vec<A> w = lanes.load(weight + j);
          Vec<A> dw = zero<A>(), db = zero<A>();
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const Vec<A> up = lanes.load(dy[r] + j);
            const Vec<A> d = lanes.keep(lanes.load(x[r] + j) - mean[r], A(0));
            const Vec<A> g = up * w;
            sum_g[r] = sum_g[r] + g;
            sum_gd[r] = fma(g, d, sum_gd[r]);
            sum_d[r] = sum_d[r] + d;
            if (kPartials) {
              dw = fma(up, d * rstd[r], dw);
              db = db + up;
            }
          }
          if (kPartials) {
            lanes.store(dweight + j, lanes.load(dweight + j) + dw);
            lanes.store(dbias + j, lanes.load(dbias + j) + db);
          }
        });
    for (int r = 0; r < kRows; ++r) {
      total_g[r] = total_g[r] + sum_g[r];
      total_gd[r] = total_gd[r] + sum_gd[r];
      total_d[r] = total_d[r] + sum_d[r];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    rows[r].sum_g = hsum(total_g[r]);
    rows[r].sum_gd = hsum(total_gd[r]);
    rows[r].sum_d = hsum(total_d[r]);
  }
}

// Second pass, of one row:
//   dh = rstd (g - mean(g) - x_hat mean(g x_hat)) + dnew_residual;  RMS: without mean(g)
//   dresidual = dh, dx = dropout(dh)
// This is dh without dnew_residual.
template <typename T>
class ThroughNorm {
  using A = Acc<T>;

 public:
  ThroughNorm() = default;
  ThroughNorm(const BackwardRow<T>& row, const BackwardRow<T>& ahead, const LayerNormParams& p)
      : x_(row.x), dy_(row.dy), ahead_x_(ahead.x), ahead_dy_(ahead.dy) {
    // What rounding took off the mean is the same in every d, and shows where they are small.
    const double n = double(p.width), rest = p.rms ? 0.0 : row.sum_d / n;
    const double sum_gd = row.sum_gd - rest * row.sum_g;
    double rstd = row.rstd, pull = -rstd * rstd * rstd * sum_gd / n;
    const double mean_g = (p.rms ? 0.0 : row.sum_g / n) - rest * rstd * rstd * sum_gd / n;
    if (p.width == 1) {
      // A row of one number is its own mean, or but for eps its own root mean square: what is left
      // of the gradient, eps rstd^3 g if anything, would be lost in the difference of the terms.
      rstd = p.rms ? rstd * rstd * rstd * p.eps : 0.0;
      pull = 0;
    }
    mean_ = set1(row.mean);
    scale_ = set1(A(rstd));
    mean_g_ = set1(A(mean_g));
    slope_ = set1(A(pull));
  }
  template <typename Lanes>
  FASTATTN_INLINE Vec<A> operator()(int64_t j, Lanes lanes, Vec<A> weight) const {
    const Vec<A> g = lanes.load(dy_ + j) * weight, d = lanes.load(x_ + j) - mean_;
    return fma(d, slope_, (g - mean_g_) * scale_);
  }
  // Fetches the same numbers of the row that is read some rows later.
  FASTATTN_INLINE void fetch_ahead(int64_t j) const {
    prefetch(ahead_x_ + j);
    prefetch(ahead_dy_ + j);
  }

 private:
  const T *x_ = nullptr, *dy_ = nullptr, *ahead_x_ = nullptr, *ahead_dy_ = nullptr;
  Vec<A> mean_, scale_, mean_g_, slope_;
};

// dx of kRows rows at once, where it is dh.
template <typename T, int kRows>
FASTATTN_NOINLINE void backward_rows(const ThroughNorm<T> (&rows)[kRows], T* const (&dx)[kRows],
                                     const Acc<T>* weight, int64_t n, bool past_cache) {
  using A = Acc<T>;
  if constexpr (kRows == 1) {
    const ThroughNorm<T> dh = rows[0];
    write_row<T>(dx[0], n, past_cache, [=](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
      dh.fetch_ahead(j);
      return dh(j, lanes, lanes.load(weight + j));
    });
  } else {
    std::array<ThroughNorm<T>, kRows> dh;
    std::copy_n(rows, kRows, dh.begin());
    write_rows<kRows>(dx, n, [=](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
      const Vec<A> w = lanes.load(weight + j);
      std::array<Vec<A>, kRows> result;
      unroll<kRows>([&](auto r) FASTATTN_INLINE_LAMBDA { result[r] = dh[r](j, lanes, w); });
      return result;
    });
  }
}

// dx and dresidual of a row in general.
template <typename T>
FASTATTN_NOINLINE void backward_row(const ThroughNorm<T>& through_norm, const LayerNormParams& p,
                                    const LayerNormGrads& grads, const Acc<T>* weight,
                                    int64_t index, bool past_cache) {
  using A = Acc<T>;
  const int64_t n = p.width;
  T* dx = grads.dx ? static_cast<T*>(grads.dx) + index * n : nullptr;
  T* dresidual = grads.dresidual ? static_cast<T*>(grads.dresidual) + index * n : nullptr;
  const T* dnew = nullptr;
  if (grads.dnew_residual)
    dnew =
        static_cast<const T*>(grads.dnew_residual.data) + p.rows.offset(index, grads.dnew_residual);
  A dh[kBlock], natural[kBlock], factor[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t m = std::min(kBlock, n - begin);
    each_vector<T>(m, [&](auto, int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
      through_norm.fetch_ahead(begin + j);
      const Vec<A> v = through_norm(begin + j, lanes, lanes.load(weight + begin + j));
      lanes.store(dh + j, dnew ? v + lanes.load(dnew + begin + j) : v);
    });
    if (dresidual)
      write_row<T>(dresidual + begin, m, past_cache,
                   [&](int64_t j, auto lanes)
                       FASTATTN_INLINE_LAMBDA { return lanes.load(dh + j); });
    if (!dx) continue;
    if (p.dropout.p > 0) {
      dropout_factors(natural, p.dropout, index, begin, m);
      to_order_of<T>(factor, natural, m);
      write_row<T>(dx + begin, m, past_cache, [&](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
        return lanes.load(dh + j) * lanes.load(factor + j);
      });
    } else {
      write_row<T>(dx + begin, m, past_cache, [&](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
        return lanes.load(dh + j);
      });
    }
  }
}

template <typename T, int kRows>
void backward_group(int64_t first, BackwardRow<T>* rows, const LayerNormParams& p,
                    const LayerNormGrads& grads, const Acc<T>* weight, Partials<Acc<T>>* partials,
                    bool past_cache) {
  using A = Acc<T>;
  const auto locate = [&](int64_t index) {
    BackwardRow<T> row;
    row.x = static_cast<const T*>(p.x.data) + p.rows.offset(index, p.x);
    row.dy = static_cast<const T*>(grads.dy.data) + p.rows.offset(index, grads.dy);
    return row;
  };
  for (int r = 0; r < kRows; ++r) {
    rows[r] = locate(first + r);
    rows[r].mean = p.rms ? A(0) : static_cast<const A*>(p.mean)[first + r];
    rows[r].rstd = static_cast<const A*>(p.rstd)[first + r];
  }
  if (partials) {
    backward_sums<T, kRows, true>(rows, weight, partials->dweight(), partials->dbias(), p.width);
    partials->added();
  } else {
    backward_sums<T, kRows, false>(rows, weight, nullptr, nullptr, p.width);
  }
  if (!grads.dx && !grads.dresidual) return;
  const auto through_norm = [&](int r) {
    const int64_t later = first + r + kRows + kRowsAhead;  // the first pass will have read kRows
    return ThroughNorm<T>(rows[r], later < p.rows.count() ? locate(later) : rows[r], p);
  };
  if (grads.dnew_residual || grads.dresidual || p.dropout.p > 0) {
    for (int r = 0; r < kRows; ++r)
      backward_row(through_norm(r), p, grads, weight, first + r, past_cache);
    return;
  }
  const auto dx = [&](int r) { return static_cast<T*>(grads.dx) + (first + r) * p.width; };
  if (kRows > 1 && !past_cache) {
    ThroughNorm<T> all[kRows];
    T* out[kRows];
    for (int r = 0; r < kRows; ++r) {
      all[r] = through_norm(r);
      out[r] = dx(r);
    }
    backward_rows<T, kRows>(all, out, weight, p.width, false);
    return;
  }
  for (int r = 0; r < kRows; ++r) {
    const ThroughNorm<T> row[] = {through_norm(r)};
    T* const out[] = {dx(r)};
    backward_rows<T, 1>(row, out, weight, p.width, past_cache);
  }
}

template <typename T>
void backward(const LayerNormParams& p, const LayerNormGrads& grads) {
  using A = Acc<T>;
  constexpr int kGroup = 2;                   // four, and their sums wait for registers
  constexpr int64_t kGroupBytes = 256 << 10;  // of x and dy, to be found again by the second pass
  const int64_t n = p.width, rows = p.rows.count(), bytes = rows * n * int64_t(sizeof(T));
  const Weights<T> weights(p.weight, p.weight_dtype, n, A(1));
  const A* weight = weights.get();
  const bool past_cache = bytes >= kStreamBytes;
  if (past_cache) {
    if (grads.dx) expect_large_write(grads.dx, bytes);
    if (grads.dresidual) expect_large_write(grads.dresidual, bytes);
  }
  const bool want_partials = grads.dweight || grads.dbias;
  const bool grouped = kGroup * n * 2 * int64_t(sizeof(T)) <= kGroupBytes;
  const int threads = int(std::min<int64_t>(useful_threads(p.threads, rows * n), rows));
  std::vector<std::unique_ptr<Partials<A>>> partials(size_t(std::max(threads, 1)));

  parallel_static(rows, threads, [&](int64_t begin, int64_t end, int thread) {
    Partials<A>* mine = nullptr;
    if (want_partials) {
      partials[size_t(thread)] = std::make_unique<Partials<A>>(n);
      mine = partials[size_t(thread)].get();
    }
    BackwardRow<T> group[kGroup];
    int64_t row = begin;
    if (grouped)
      for (; row + kGroup <= end; row += kGroup)
        backward_group<T, kGroup>(row, group, p, grads, weight, mine, past_cache);
    for (; row < end; ++row) backward_group<T, 1>(row, group, p, grads, weight, mine, past_cache);
    if (mine) mine->flush();
    stream_fence();
  });
  if (!want_partials) return;

  // The threads' sums in their order: the same at every run.
  const Array<double> sum = make_array<double>(n), natural = make_array<double>(n);
  const auto reduce = [&](void* out, DType dtype, const double* (Partials<A>::*total)() const) {
    if (!out) return;
    const double* first = (*partials[0].*total)();  // every thread had a row
    for (size_t t = 1; t < partials.size(); ++t) {
      const double* other = (*partials[t].*total)();
      for (int64_t j = 0; j < n; ++j) sum[j] = first[j] + other[j];
      first = sum.get();
    }
    if (kPaired<T>) {
      from_order_of<T>(natural.get(), first, n);
      first = natural.get();
    }
    narrow_row(out, first, dtype, n);
  };
  reduce(grads.dweight, p.weight_dtype, &Partials<A>::total_dweight);
  reduce(grads.dbias, p.bias_dtype, &Partials<A>::total_dbias);
}

}  // namespace

#if defined(FASTATTN_FLOAT64)
void layer_norm_forward_float64(const LayerNormParams& params) { forward<double>(params); }
void layer_norm_backward_float64(const LayerNormParams& params, const LayerNormGrads& grads) {
  backward<double>(params, grads);
}
#else
void layer_norm_forward(const LayerNormParams& params) {
  if (params.dtype == DType::kFloat64) return layer_norm_forward_float64(params);
  with_type(params.dtype, [&](auto type) { forward<decltype(type)>(params); });
}

void layer_norm_backward(const LayerNormParams& params, const LayerNormGrads& grads) {
  if (params.dtype == DType::kFloat64) return layer_norm_backward_float64(params, grads);
  with_type(params.dtype, [&](auto type) { backward<decltype(type)>(params, grads); });
}
#endif

}  // namespace fastattn
