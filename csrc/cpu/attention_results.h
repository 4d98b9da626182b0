// Where finished rows go: straight to out and lse, or, when the keys were split, to partial results
// that are merged by their maxima and sums afterwards.
#pragma once
#include <cmath>
#include <vector>

#include "parallel.h"
#include "params.h"
#include "vec.h"

namespace fastattn {
namespace {

template <typename T>
class ForwardResults {
  using A = Acc<T>;
  static constexpr double kHidden = -std::numeric_limits<double>::infinity();

 public:
  ForwardResults(const AttentionParams& p, int splits) : p_(p), splits_(splits) {
    if (splits > 1) {
      const size_t rows = size_t(p.shape.batch * p.shape.q_heads * p.shape.q_len) * splits;
      out_.resize(rows * p.shape.v_dim);
      max_.resize(rows);
      sum_.resize(rows);
    }
  }

  // The row's sum of exp(logit - max) . v, its maximum and its sum of exp(logit - max).
  void put(int split, int64_t b, int64_t h, int64_t i, const A* out, double max, double sum) {
    if (splits_ == 1) return finish(b, h, i, out, max, sum);
    const size_t at = row(b, h, i) * splits_ + split;
    std::copy_n(out, p_.shape.v_dim, &out_[at * p_.shape.v_dim]);
    max_[at] = max;
    sum_[at] = sum;
  }

  void merge(int threads) {
    const AttentionShape& s = p_.shape;
    const int64_t rows = s.batch * s.q_heads * s.q_len, width = s.v_dim;
    parallel_static(rows, threads, [&](int64_t begin, int64_t end, int) {
      std::vector<A> total(width);
      for (int64_t r = begin; r < end; ++r) {
        const double* max = &max_[r * splits_];
        double m = kHidden;
        for (int k = 0; k < splits_; ++k) m = max[k] > m || max[k] != max[k] ? max[k] : m;
        std::fill(total.begin(), total.end(), A(0));
        double sum = 0;
        for (int k = 0; k < splits_; ++k) {
          if (max[k] == kHidden) continue;
          const double f = max[k] == m ? 1.0 : std::exp(max[k] - m);
          sum += f * sum_[r * splits_ + k];
          const A* part = &out_[(r * splits_ + k) * width];
          for (int64_t c = 0; c < width; ++c) total[c] += A(f) * part[c];
        }
        finish(r / s.q_len / s.q_heads, r / s.q_len % s.q_heads, r % s.q_len, total.data(), m, sum);
      }
    });
  }

 private:
  size_t row(int64_t b, int64_t h, int64_t i) const {
    return size_t((b * p_.shape.q_heads + h) * p_.shape.q_len + i);
  }

  void finish(int64_t b, int64_t h, int64_t i, const A* out, double max, double sum) const {
    double factor, log_sum;
    const double sink = p_.sinks ? static_cast<const A*>(p_.sinks)[h] : kHidden;
    if (sink != kHidden) {  // one more logit in the denominator, with no value
      const double m = max > sink || max != max ? max : sink;
      const double f = max == kHidden ? 0.0 : std::exp(max - m);
      sum = sum * f + std::exp(sink - m);
      factor = f / sum;
      log_sum = std::log(sum);
      max = m;
    } else if (max == kHidden) {  // sees no key
      factor = 0;
      log_sum = 0;
    } else {
      factor = 1 / sum;
      log_sum = std::log(sum);
    }
    T* dst = p_.out.at<T>(b, h, i);
    constexpr int w = Vec<A>::kWidth;
    const Vec<A> f = set1(A(factor));
    const int width = int(p_.shape.v_dim);
    int c = 0;
    for (; c + w <= width; c += w) store(dst + c, load(out + c) * f);
    if (c < width) store_n(dst + c, load_n(out + c, width - c) * f, width - c);
    const A lse = A(max + log_sum);
    static_cast<A*>(p_.lse)[row(b, h, i)] = lse;
    if (p_.lse_low)
      static_cast<A*>(p_.lse_low)[row(b, h, i)] =
          std::isfinite(lse) ? A((max - double(lse)) + log_sum) : A(0);
  }

  const AttentionParams& p_;
  const int splits_;
  std::vector<A> out_;  // (batch, q_heads, q_len, splits, v_dim)
  std::vector<double> max_, sum_;
};

}  // namespace
}  // namespace fastattn
