// Layer norm and RMS norm of residual + dropout(x), forward and backward.
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

// Mean and variance of a row in one walk through memory: two passes over each block while it is in
// the first-level cache, then the blocks are joined (Chan et al., 1979). Everything is relative to
// the row's first number, so that a constant row has the variance 0 and its mean exactly.
template <typename T>
FASTATTN_NOINLINE Moments moments(const T* x, int64_t n) {
  using A = Acc<T>;
  const A pivot = to_acc(x[0]);
  const Vec<A> pivots = set1(pivot);
  double mean = 0, squares = 0;  // of x - pivot, over the blocks so far
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t m = std::min(kBlock, n - begin);
    const T* block = x + begin;

    const auto [sum] = sum_vectors<T, 1>(
        m, [&](Vec<A>(&acc)[1], int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
          acc[0] = acc[0] + lanes.keep(lanes.load(block + j) - pivots, A(0));
        });
    // The second pass is around this centre, and corrects for its rounding.
    const A centre = pivot + sum / A(m);

    const Vec<A> centres = set1(centre);
    const auto [first, second] = sum_vectors<T, 2>(
        m, [&](Vec<A>(&acc)[2], int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
          const Vec<A> d = lanes.keep(lanes.load(block + j) - centres, A(0));
          acc[0] = acc[0] + d;
          acc[1] = fma(d, d, acc[1]);
        });
    const double s1 = first, s2 = second;
    const double block_mean = (double(centre) - double(pivot)) + s1 / double(m);
    const double delta = block_mean - mean, share = double(m) / double(begin + m);
    mean += delta * share;
    squares += s2 - s1 * s1 / double(m) + delta * delta * double(begin) * share;
  }
  const double variance = squares / double(n);
  // Rounding may leave a tiny negative one; NaN stays.
  return {double(pivot) + mean, variance < 0 ? 0.0 : variance};
}

template <typename T>
FASTATTN_NOINLINE Moments mean_square(const T* x, int64_t n) {
  using A = Acc<T>;
  double squares = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const auto [sum] = sum_vectors<T, 1>(
        std::min(kBlock, n - begin),
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
FASTATTN_NOINLINE void add_row(T* h, const T* residual, const T* x, const Dropout& dropout, int64_t row, int64_t n) {
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
      own_ = scratch<A>(n);
      if (data)
        widen_row(own_.get(), data, dtype, 1, n);
      else
        std::fill_n(own_.get(), n, missing);
      values_ = own_.get();
    }
    if (kPaired<T> && data) {
      std::unique_ptr<A[]> ordered = scratch<A>(n);
      to_order_of<T>(ordered.get(), values_, n);
      own_ = std::move(ordered);
      values_ = own_.get();
    }
  }
  const A* get() const { return values_; }

 private:
  std::unique_ptr<A[]> own_;
  const A* values_;
};

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
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x.data) + p.rows.offset(row, p.x);
      const T* next =
          row + 1 < end ? static_cast<const T*>(p.x.data) + p.rows.offset(row + 1, p.x) : x;
      if (p.new_residual) {
        T* h = static_cast<T*>(p.new_residual) + row * n;
        const T* residual = static_cast<const T*>(p.residual.data) + p.rows.offset(row, p.residual);
        add_row(h, residual, x, p.dropout, row, n);
        x = h;
      }
      const Moments moment = p.rms ? mean_square(x, n) : moments(x, n);
      const double rstd = 1 / std::sqrt(moment.variance + p.eps);
      if (!p.rms) static_cast<A*>(p.mean)[row] = A(moment.mean);
      static_cast<A*>(p.rstd)[row] = A(rstd);

      // y = ((x - centre) - rest) rstd weight + bias, where centre + rest is the mean to more
      // digits than one number holds: a mean of 1e4 must not cost the last digits of y.
      const A centre = A(moment.mean);
      const Vec<A> centres = set1(centre), scale = set1(A(rstd));
      const Vec<A> rest = set1(A((double(centre) - moment.mean) * rstd));
      write_row<T>(static_cast<T*>(p.y) + row * n, n, past_cache,
                   [&](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
                     prefetch(next + j);
                     const Vec<A> x_hat = fma(lanes.load(x + j) - centres, scale, rest);
                     return fma(x_hat, lanes.load(weight + j), lanes.load(bias + j));
                   });
    }
    stream_fence();
  });
}

// ---- backward ----------------------------------------------------------------------------------

// A thread's sums of dweight and dbias, in the order of T, over two levels: the first takes kFlush
// additions, then goes into the second, so that thousands of rows do not add up their rounding.
template <typename A>
class Partials {
 public:
  explicit Partials(int64_t n) : n_(n), sums_(new A[size_t(4 * n)]()) {}
  A* dweight() { return sums_.get(); }
  A* dbias() { return sums_.get() + n_; }
  const A* total_dweight() const { return sums_.get() + 2 * n_; }
  const A* total_dbias() const { return sums_.get() + 3 * n_; }
  void added() {
    if (++pending_ == kFlush) flush();
  }
  void flush() {
    A *recent = sums_.get(), *total = recent + 2 * n_;
    each_vector<A>(2 * n_, [&](auto, int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
      lanes.store(total + j, lanes.load(total + j) + lanes.load(recent + j));
      lanes.store(recent + j, zero<A>());
    });
    pending_ = 0;
  }

 private:
  static constexpr int kFlush = 16;
  int64_t n_;
  std::unique_ptr<A[]> sums_;
  int pending_ = 0;
};

// One row of a group: g = dy weight, d = x - mean, x_hat = d rstd.
template <typename T>
struct BackwardRow {
  const T *x, *dy;
  Acc<T> mean, rstd;
  double sum_g, sum_gd;
};

// First pass over kRows rows at once, so that dweight, dbias and the weights are loaded once for
// all: sum_g = sum(g), sum_gd = sum(g d), dweight += dy x_hat, dbias += dy.
template <typename T, int kRows, bool kPartials>
FASTATTN_NOINLINE void backward_sums(BackwardRow<T>* rows, const Acc<T>* weight, Acc<T>* dweight, Acc<T>* dbias,
                   int64_t n) {
  using A = Acc<T>;
  Vec<A> mean[kRows], rstd[kRows];
  const T *x[kRows], *dy[kRows];
  for (int r = 0; r < kRows; ++r) {
    mean[r] = set1(rows[r].mean);
    rstd[r] = set1(rows[r].rstd);
    x[r] = rows[r].x;
    dy[r] = rows[r].dy;
  }
  constexpr int64_t kRun = 512;  // sums over two levels, as in sum_vectors
  Vec<A> total_g[kRows], total_gd[kRows];
  for (int r = 0; r < kRows; ++r) total_g[r] = total_gd[r] = zero<A>();
  for (int64_t begin = 0; begin < n; begin += kRun) {
    Vec<A> sum_g[kRows], sum_gd[kRows];
    for (int r = 0; r < kRows; ++r) sum_g[r] = sum_gd[r] = zero<A>();
    each_vector<T>(std::min(kRun, n - begin),
                   [&](auto, int64_t i, auto lanes) FASTATTN_INLINE_LAMBDA {
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
    }
  }
  for (int r = 0; r < kRows; ++r) {
    rows[r].sum_g = hsum(total_g[r]);
    rows[r].sum_gd = hsum(total_gd[r]);
  }
}

// Second pass, of one row:
//   dh = rstd (g - mean(g) - x_hat mean(g x_hat)) + dnew_residual;  RMS: without mean(g)
//   dresidual = dh, dx = dropout(dh)
template <typename T>
FASTATTN_NOINLINE void backward_row(const BackwardRow<T>& row, const LayerNormParams& p, const LayerNormGrads& grads,
                  const Acc<T>* weight, int64_t index, const BackwardRow<T>& next,
                  bool past_cache) {
  using A = Acc<T>;
  const int64_t n = p.width;
  // A row of one number is its own mean: exactly no gradient, which rounding would blow up by rstd.
  const double rstd = n == 1 && !p.rms ? 0.0 : double(row.rstd);
  const Vec<A> mean = set1(row.mean), scale = set1(A(rstd));
  const Vec<A> mean_g = set1(p.rms ? A(0) : A(row.sum_g / double(n)));
  const Vec<A> slope = set1(A(-rstd * rstd * rstd * row.sum_gd / double(n)));
  const auto through_norm = [&](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
    prefetch(next.x + j);
    prefetch(next.dy + j);
    const Vec<A> g = lanes.load(row.dy + j) * lanes.load(weight + j);
    const Vec<A> d = lanes.load(row.x + j) - mean;
    return fma(d, slope, (g - mean_g) * scale);
  };
  T* dx = grads.dx ? static_cast<T*>(grads.dx) + index * n : nullptr;
  T* dresidual = grads.dresidual ? static_cast<T*>(grads.dresidual) + index * n : nullptr;
  if (!grads.dnew_residual && !dresidual && p.dropout.p == 0) {
    if (dx) write_row<T>(dx, n, past_cache, through_norm);
    return;
  }

  const T* dnew = nullptr;
  if (grads.dnew_residual)
    dnew =
        static_cast<const T*>(grads.dnew_residual.data) + p.rows.offset(index, grads.dnew_residual);
  A dh[kBlock], natural[kBlock], factor[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t m = std::min(kBlock, n - begin);
    each_vector<T>(m, [&](auto, int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
      const Vec<A> v = through_norm(begin + j, lanes);
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
  for (int r = 0; r < kRows; ++r) {
    // The row of the next group that takes this one's place in the cache.
    const int64_t following = first + r + kRows;
    const BackwardRow<T> next = following < p.rows.count() ? locate(following) : rows[r];
    backward_row(rows[r], p, grads, weight, first + r, next, past_cache);
  }
}

template <typename T>
void backward(const LayerNormParams& p, const LayerNormGrads& grads) {
  using A = Acc<T>;
  constexpr int kGroup = 2;
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
  const auto reduce = [&](void* out, DType dtype, const A* (Partials<A>::*total)() const) {
    if (!out) return;
    const std::unique_ptr<A[]> sum(new A[size_t(n)]());
    for (const auto& partial : partials)
      if (partial)
        for (int64_t j = 0; j < n; ++j) sum[j] += ((*partial).*total)()[j];
    const std::unique_ptr<A[]> natural = scratch<A>(n);
    from_order_of<T>(natural.get(), sum.get(), n);
    narrow_row(out, natural.get(), dtype, n);
  };
  reduce(grads.dweight, p.weight_dtype, &Partials<A>::total_dweight);
  reduce(grads.dbias, p.bias_dtype, &Partials<A>::total_dbias);
}

}  // namespace

void layer_norm_forward(const LayerNormParams& params) {
  with_type(params.dtype, [&](auto type) { forward<decltype(type)>(params); });
}

void layer_norm_backward(const LayerNormParams& params, const LayerNormGrads& grads) {
  with_type(params.dtype, [&](auto type) { backward<decltype(type)>(params, grads); });
}

}  // namespace fastattn
