// Softmax and log-softmax of scale * x + mask, forward and backward.
#include <cmath>

#include "exp.h"
#include "kernels.h"
#include "rows.h"

namespace fastattn {
namespace {

template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <typename A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

// A row's scores s = scale x + mask wait here, in the accumulation type, for their second visit,
// up to this many; a longer row computes its scores twice. A share of a second-level cache.
constexpr int64_t kKeptScores = 65536;

enum class MaskKind { kNone, kAdded, kKept };

// The numbers of the mask beside a run of scores, as numbers to add, for a layout known at run
// time.
template <typename A>
class MaskRun {
 public:
  explicit MaskRun(const SoftmaxParams& p, int64_t longest) : p_(p) {
    if (p.mask && !direct()) own_ = make_array<A>(longest);
  }
  // n of them from `offset`, `stride` apart.
  const A* at(int64_t offset, int64_t stride, int64_t n) {
    const char* data = static_cast<const char*>(p_.mask.data) + offset * size_of(p_.mask_dtype);
    if (direct() && stride == 1) return reinterpret_cast<const A*>(data);
    if (!own_) own_ = make_array<A>(kBlock);
    // A mask that is broadcast over rows is converted once.
    if (data != last_ || n != last_n_) widen_row(own_.get(), data, p_.mask_dtype, stride, n);
    last_ = data;
    last_n_ = n;
    return own_.get();
  }

 private:
  bool direct() const { return p_.mask_dtype == dtype_of<A>(); }

  const SoftmaxParams& p_;
  Array<A> own_;
  const char* last_ = nullptr;
  int64_t last_n_ = -1;
};

// A row is read as x, or as scale x + mask where there is a mask; `unit` times what is read is its
// score.
template <typename A>
struct Scale {
  A scale, unit;
  explicit Scale(const SoftmaxParams& p) : scale(A(p.scale)), unit(p.mask ? A(1) : A(p.scale)) {}
};

// A vector of a row; a bool mask's -inf holds even where x is NaN.
template <typename In, MaskKind kMask, typename Lanes, typename A = Acc<In>>
FASTATTN_INLINE Vec<A> read(const In* x, const A* mask, Vec<A> scale, Lanes lanes) {
  if constexpr (kMask == MaskKind::kNone) return lanes.load(x);
  const Vec<A> m = lanes.load(mask), s = fma(lanes.load(x), scale, m);
  if constexpr (kMask == MaskKind::kKept) return select(less(m, zero<A>()), m, s);
  return s;
}

template <typename A>
FASTATTN_INLINE Vec<A> exp_of(Vec<A> x) {
  return exp2_or_nan(x * set1(A(kLog2E)));
}

// The same to the last digit: x log2(e) is taken with what its rounding leaves.
FASTATTN_INLINE Vec<float> accurate_exp_of(Vec<float> x) {
  const Vec<float> high = set1(float(kLog2E)), low = set1(float(kLog2E - double(float(kLog2E))));
  const Vec<float> t = x * high, rest = fma(x, low, fma(x, high, zero<float>() - t));
  const Vec<float> power = exp2_below(vmax(set1(-127.0f), t));
  const Vec<float> result = fma(power, rest * set1(float(kLn2)), power);
  return select(less(set1(-127.0f), x), result, select(equal(x, x), zero<float>(), x));
}
FASTATTN_INLINE Vec<double> accurate_exp_of(Vec<double> x) { return exp_of(x); }

// What to subtract before exp: -inf - -inf would be NaN in a block without anything to keep.
template <typename A>
A safe_base(A maximum) {
  return maximum == -kInfinity<A> ? A(0) : maximum;
}

// ---- rows: inner = 1 ---------------------------------------------------------------------------

// How the n numbers of a block are visited, compiled for each way to store them. A `Block` says
// where they lie.
template <typename A>
struct Block {
  const void* x;
  const A* mask;
  int64_t n;
};

// The number read whose score is the highest.
template <typename Order, typename In, MaskKind kMask, typename A = Acc<In>>
FASTATTN_NOINLINE A highest(const Block<A>& block, const Scale<A>& scale) {
  const In* x = static_cast<const In*>(block.x);
  const A up = scale.unit < 0 ? A(-1) : A(1);
  const Vec<A> ups = set1(up), scales = set1(scale.scale);
  Vec<A> top[kUnroll];
  for (Vec<A>& lane : top) lane = set1(-kInfinity<A>);
  each_vector<Order>(block.n, [&](auto slot, int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
    const Vec<A> r = read<In, kMask>(x + j, block.mask + j, scales, lanes) * ups;
    top[slot] = vmax(top[slot], lanes.keep(r, -kInfinity<A>));
  });
  return hmax_of(top) * up;
}

// e = exp(score - base's score), and their sum. Meanwhile, without a mask, reads as many of the
// numbers at `next`, of which the highest is returned second, and fetches those at `ahead`.
template <typename Order, typename In, typename Out, MaskKind kMask, typename A = Acc<In>>
FASTATTN_NOINLINE std::pair<A, A> exponentials(A* e, const Block<A>& block, const Scale<A>& scale,
                                               A base, const void* next, const void* ahead) {
  constexpr bool stored_short = sizeof(Out) == 2 && kMask == MaskKind::kNone;
  const In* x = static_cast<const In*>(block.x);
  const Vec<A> bases = set1(base), scales = set1(scale.scale);
  const Vec<A> exponent = set1(A(double(scale.unit) * kLog2E));
  const auto power = [&](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
    return (read<In, kMask>(x + j, block.mask + j, scales, lanes) - bases) * exponent;
  };
  using Group = Four<Order>;
  Vec<A> sum[Group::kCount], top[kUnroll];
  for (Vec<A>& lane : sum) lane = zero<A>();
  for (Vec<A>& lane : top) lane = set1(-kInfinity<A>);
  const auto look = [&](auto slot, int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
    prefetch(static_cast<const In*>(ahead) + j);
    if constexpr (kMask == MaskKind::kNone) {
      const Vec<A> r = lanes.load(static_cast<const In*>(next) + j);
      top[slot] = vmax(top[slot], lanes.keep(r, -kInfinity<A>));
    }
  };
  int64_t done = 0;
  for (; done + Group::kNumbers <= block.n; done += Group::kNumbers) {
    Vec<A> v[Group::kCount];
    unroll<Group::kCount>([&](auto i) FASTATTN_INLINE_LAMBDA {
      const typename Group::template Lanes<i> lanes;
      const int64_t j = done + Group::template offset<i>;
      look(std::integral_constant<int, i % kUnroll>{}, j, lanes);
      v[i] = power(j, lanes);
    });
    exp2_or_nan<stored_short>(v);
    unroll<Group::kCount>([&](auto i) FASTATTN_INLINE_LAMBDA {
      const typename Group::template Lanes<i> lanes;
      lanes.store(e + done + Group::template offset<i>, v[i]);
      sum[i] = sum[i] + v[i];
    });
  }
  each_vector<Order>(block.n - done, [&](auto slot, int64_t i, auto lanes) FASTATTN_INLINE_LAMBDA {
    const int64_t j = done + i;
    look(slot, j, lanes);
    const Vec<A> v = exp2_or_nan(power(j, lanes));
    lanes.store(e + j, v);
    sum[slot] = sum[slot] + lanes.keep(v, A(0));
  });
  return {hsum((sum[0] + sum[1]) + (sum[2] + sum[3])), hmax_of(top)};
}

// y = e factor
template <typename Order, typename Out, typename A = Acc<Out>>
FASTATTN_NOINLINE void write_scaled(void* out, const A* e, A factor, int64_t n, bool past_cache) {
  const Vec<A> factors = set1(factor);
  write_row<Order>(static_cast<Out*>(out), n, past_cache,
                   [&](int64_t j, auto lanes)
                       FASTATTN_INLINE_LAMBDA { return lanes.load(e + j) * factors; });
}

// y = score - base's score - log_total
template <typename Order, typename In, typename Out, MaskKind kMask, typename A = Acc<In>>
FASTATTN_NOINLINE void write_log(void* out, const Block<A>& block, const Scale<A>& scale, A base,
                                 A log_total, bool past_cache) {
  const In* x = static_cast<const In*>(block.x);
  const Vec<A> bases = set1(base), scales = set1(scale.scale), unit = set1(scale.unit);
  const Vec<A> rest = set1(-log_total);
  write_row<Order>(static_cast<Out*>(out), block.n, past_cache,
                   [&](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
                     const Vec<A> r = read<In, kMask>(x + j, block.mask + j, scales, lanes);
                     return fma(r - bases, unit, rest);
                   });
}

template <typename A>
struct Visits {
  A (*highest)(const Block<A>&, const Scale<A>&);
  std::pair<A, A> (*exponentials)(A*, const Block<A>&, const Scale<A>&, A, const void*,
                                  const void*);
  void (*write_scaled)(void*, const A*, A, int64_t, bool);
  void (*write_log)(void*, const Block<A>&, const Scale<A>&, A, A, bool);
  int64_t x_size, y_size;
};

template <typename In, typename Out, MaskKind kMask>
Visits<Acc<In>> visits() {
  // A mask lies as it is, so do numbers of another type.
  using A = Acc<In>;
  constexpr bool paired = kPaired<Out> && kMask == MaskKind::kNone && std::is_same_v<In, Out>;
  using Order = std::conditional_t<paired, Out, A>;
  return {highest<Order, In, kMask>,
          exponentials<Order, In, Out, kMask>,
          write_scaled<Order, Out>,
          write_log<Order, In, Out, kMask>,
          sizeof(In),
          sizeof(Out)};
}

// total = sum(exp(score - top's score)), gathered block by block.
template <typename A>
struct RowSum {
  A unit, top;
  double total = 0;

  // What to count from: -inf - -inf would be NaN in a block without anything to keep.
  A base(A top_) const { return top_ * unit == -kInfinity<A> ? A(0) : top_; }

  // A block with its own top and its sum from base(top).
  void join(A block_top, A block_sum) {
    const bool higher = block_top * unit > top * unit;
    if (higher) {
      total = (total == 0 ? 0 : total * share(top, block_top)) + block_sum;
      top = block_top;
    } else {
      total += block_sum * share(block_top, top);
    }
  }
  // What exponentials of a block with its own top are of those of the row.
  double share(A block_top, A row_top) const {
    const double from = base(block_top), to = base(row_top);
    return from == to ? 1 : std::exp((from - to) * double(unit));
  }
  bool empty() const { return top * unit == -kInfinity<A> && total == 0; }
};

// Compiled once for all that rows are stored as.
template <typename A>
void forward_rows(const SoftmaxParams& p, const Visits<A>& visit) {
  const int64_t n = p.width, rows = p.rows.count(), bytes = rows * n * visit.y_size;
  const bool past_cache = bytes >= kStreamBytes, keep = !p.log && n <= kKeptScores;
  const Scale<A> scale(p);
  if (past_cache) expect_large_write(p.y, bytes);
  parallel_static(rows, useful_threads(p.threads, rows * n), [&](int64_t begin, int64_t end, int) {
    const Array<A> kept = make_array<A>(keep ? n : kBlock);
    const Array<A> tops = make_array<A>(n / kBlock + 1);
    MaskRun<A> mask_run(p, kBlock);
    const auto x_of = [&](int64_t row) {
      const int64_t existing = std::min(row, end - 1);
      return static_cast<const char*>(p.x.data) + p.rows.offset(existing, p.x) * visit.x_size;
    };
    bool top_is_known = false;
    A top = 0;
    for (int64_t row = begin; row < end; ++row) {
      const char *x = x_of(row), *next_row = x_of(row + 1), *row_ahead = x_of(row + 1 + kRowsAhead);
      const int64_t mask_row = p.mask ? p.rows.offset(row, p.mask) : 0;
      char* y = static_cast<char*>(p.y) + row * n * visit.y_size;
      const auto block_at = [&](int64_t first) {
        const int64_t m = std::min(kBlock, n - first), step = p.mask.stride[3];
        return Block<A>{x + first * visit.x_size,
                        p.mask ? mask_run.at(mask_row + first * step, step, m) : nullptr, m};
      };

      RowSum<A> sum{scale.unit, scale.unit < 0 ? kInfinity<A> : -kInfinity<A>};
      for (int64_t first = 0; first < n; first += kBlock) {
        const Block<A> block = block_at(first);
        if (!top_is_known) top = visit.highest(block, scale);
        tops[first / kBlock] = top;
        // Without a mask the next block's top is found meanwhile, if it has as many numbers.
        const bool in_row = first + block.n < n;
        const int64_t at = in_row ? first + block.n : 0;
        const Block<A> next{(in_row ? x : next_row) + at * visit.x_size, nullptr,
                            std::min(kBlock, n - at)};
        top_is_known = !p.mask && scale.unit >= 0 && next.n >= block.n;
        const auto [block_sum, next_top] = visit.exponentials(
            kept.get() + (keep ? first : 0), block, scale, sum.base(top),
            top_is_known ? next.x : block.x, (in_row ? next_row : row_ahead) + at * visit.x_size);
        sum.join(top, block_sum);
        if (top_is_known) {
          top = next_top;
          if (next.n > block.n) {
            const char* rest = static_cast<const char*>(next.x) + block.n * visit.x_size;
            top = std::max(top, visit.highest({rest, nullptr, next.n - block.n}, scale));
          }
        }
      }
      const bool masked = p.mask && sum.empty();  // everything
      for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t m = std::min(kBlock, n - first);
        char* out = y + first * visit.y_size;
        A* e = kept.get() + (keep ? first : 0);
        if (p.log) {
          visit.write_log(out, block_at(first), scale, masked ? A(0) : sum.top,
                          A(std::log(masked ? 1 : sum.total)), past_cache);
          continue;
        }
        // Without a mask, a row of -inf is NaN.
        double factor = masked ? 0 : sum.empty() ? double(kNaN<A>) : 1 / sum.total;
        if (keep)
          factor *= masked ? 0 : sum.share(tops[first / kBlock], sum.top);
        else
          visit.exponentials(e, block_at(first), scale, sum.base(sum.top), x, x);
        visit.write_scaled(out, e, A(factor), m, past_cache);
      }
    }
    stream_fence();
  });
}

// dx = scale y (dy - sum(y dy)); log: dx = scale (dy - exp(y) sum(dy)), 0 where y = -inf (masked).
template <typename T, typename Dx, bool kLog>
void backward_rows(const SoftmaxGrads& p) {
  using A = Acc<T>;
  using Order = std::conditional_t<kPaired<Dx> && std::is_same_v<T, Dx>, Dx, A>;
  const int64_t n = p.width, rows = p.rows.count(), bytes = rows * n * int64_t(sizeof(Dx));
  const bool past_cache = bytes >= kStreamBytes;
  if (past_cache) expect_large_write(p.dx, bytes);
  parallel_static(rows, useful_threads(p.threads, rows * n), [&](int64_t begin, int64_t end, int) {
    const Vec<A> scale = set1(A(p.scale)), masked = set1(-kInfinity<A>);
    for (int64_t row = begin; row < end; ++row) {
      const T* y = static_cast<const T*>(p.y.data) + p.rows.offset(row, p.y);
      const T* dy = static_cast<const T*>(p.dy.data) + p.rows.offset(row, p.dy);
      const int64_t later = std::min(row + kRowsAhead, end - 1);
      const T* ahead_y = static_cast<const T*>(p.y.data) + p.rows.offset(later, p.y);
      const T* ahead_dy = static_cast<const T*>(p.dy.data) + p.rows.offset(later, p.dy);
      double total = 0;
      for (int64_t first = 0; first < n; first += kBlock) {
        const auto [sum] = sum_vectors<Order, 1>(
            std::min(kBlock, n - first),
            [&](Vec<A>(&acc)[1], int64_t i, auto lanes) FASTATTN_INLINE_LAMBDA {
              const Vec<A> up = lanes.load(dy + first + i);
              if constexpr (kLog)
                acc[0] = acc[0] + up;
              else
                acc[0] = fma(lanes.load(y + first + i), up, acc[0]);
            });
        total += sum;
      }
      const Vec<A> dot = set1(A(total));
      write_row<Order>(static_cast<Dx*>(p.dx) + row * n, n, past_cache,
                       [&](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
                         if (past_cache) {
                           prefetch(ahead_y + j);
                           prefetch(ahead_dy + j);
                         }
                         const Vec<A> v = lanes.load(y + j), up = lanes.load(dy + j);
                         if constexpr (!kLog) return v * (up - dot) * scale;
                         const Vec<A> d = scale * (up - accurate_exp_of(v) * dot);
                         return select(equal(v, masked), zero<A>(), d);
                       });
    }
    stream_fence();
  });
}

// ---- columns: inner > 1, lanes are inner columns -----------------------------------------------

// Columns that one task takes together: whole cache lines, and few enough for their scores to stay
// in the second-level cache.
constexpr int64_t kMaxColumns = 256;

inline int64_t columns_at_once(int64_t width, int64_t inner) {
  constexpr int64_t kMin = 32;
  return std::min(inner, std::clamp(kKeptScores / width / kMin * kMin, kMin, kMaxColumns));
}

// Sums of columns over two levels, so that thousands of terms do not add up their rounding.
template <typename A>
struct ColumnSums {
  static constexpr int64_t kRun = 32;
  A recent[kMaxColumns];
  double total[kMaxColumns];

  void clear(int64_t count) {
    std::fill_n(recent, count, A(0));
    std::fill_n(total, count, 0.0);
  }
  // To be called after row d of `n`.
  void added(int64_t d, int64_t n, int64_t count) {
    if (d % kRun != kRun - 1 && d != n - 1) return;
    for (int64_t j = 0; j < count; ++j) {
      total[j] += double(recent[j]);
      recent[j] = 0;
    }
    if (d == n - 1) std::copy_n(total, count, recent);
  }
  const A* sums() const { return recent; }  // after the last row
};

template <typename In, MaskKind kMask, typename A = Acc<In>>
FASTATTN_NOINLINE void load_columns(A* s, const void* data, const A* mask, A scale, int64_t n) {
  const In* x = static_cast<const In*>(data);
  const Vec<A> scales = set1(scale);
  write_row<A>(s, n, false, [&](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
    const Vec<A> r = read<In, kMask>(x + j, mask + j, scales, lanes);
    return kMask == MaskKind::kNone ? r * scales : r;
  });
}

template <typename A>
FASTATTN_NOINLINE void raise_columns(A* maximum, const A* s, int64_t n) {
  write_row<A>(maximum, n, false, [&](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
    return vmax(lanes.load(maximum + j), lanes.load(s + j));
  });
}

// s = exp(s - base), added to sum.
template <typename A>
FASTATTN_NOINLINE void add_columns(A* sum, A* s, const A* base, int64_t n) {
  write_row<A>(sum, n, false, [&](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
    const Vec<A> e = exp_of(lanes.load(s + j) - lanes.load(base + j));
    lanes.store(s + j, e);
    return lanes.load(sum + j) + e;
  });
}

// log ? (s - base) - factor : s factor
template <typename Out, typename A = Acc<Out>>
FASTATTN_NOINLINE void finish_columns(void* out, const A* s, const A* base, const A* factor,
                                      bool log, int64_t n) {
  Out* y = static_cast<Out*>(out);
  if (log)
    write_row<A>(y, n, false, [&](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
      return (lanes.load(s + j) - lanes.load(base + j)) - lanes.load(factor + j);
    });
  else
    write_row<A>(y, n, false, [&](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
      return lanes.load(s + j) * lanes.load(factor + j);
    });
}

// Compiled once, as forward_rows: read is a load_columns, write a finish_columns.
template <typename A>
void forward_columns(const SoftmaxParams& p, void (*load)(A*, const void*, const A*, A, int64_t),
                     void (*write)(void*, const A*, const A*, const A*, bool, int64_t)) {
  const int64_t x_size = size_of(p.x_dtype), y_size = size_of(p.y_dtype);
  const int64_t n = p.width, at_once = columns_at_once(n, p.inner);
  const int64_t blocks = (p.inner + at_once - 1) / at_once, rows = p.rows.count();
  const int64_t bytes = rows * n * p.inner * y_size;
  const bool keep = n * at_once <= kKeptScores;
  if (bytes >= kStreamBytes) expect_large_write(p.y, bytes);
  const int threads = useful_threads(p.threads, rows * n * p.inner);
  parallel_static(rows * blocks, threads, [&](int64_t begin, int64_t end, int) {
    const Array<A> kept = make_array<A>(keep ? n * at_once : at_once);
    MaskRun<A> mask_run(p, kMaxColumns);
    A maximum[kMaxColumns], base[kMaxColumns], factor[kMaxColumns];
    ColumnSums<A> sum;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / blocks, column = task % blocks * at_once;
      const int64_t count = std::min(at_once, p.inner - column);
      const char* x =
          static_cast<const char*>(p.x.data) + (p.rows.offset(row, p.x) + column) * x_size;
      const int64_t mask_row = p.mask ? p.rows.offset(row, p.mask) + column * p.mask_inner : 0;
      char* y = static_cast<char*>(p.y) + (row * n * p.inner + column) * y_size;
      const auto scores = [&](int64_t d) { return kept.get() + (keep ? d * at_once : 0); };
      const auto scores_of = [&](int64_t d) {
        const A* mask = nullptr;
        if (p.mask) mask = mask_run.at(mask_row + d * p.mask.stride[3], p.mask_inner, count);
        load(scores(d), x + d * p.x.stride[3] * x_size, mask, A(p.scale), count);
      };

      std::fill_n(maximum, count, -kInfinity<A>);
      sum.clear(count);
      for (int64_t d = 0; d < n; ++d) {
        scores_of(d);
        raise_columns(maximum, scores(d), count);
      }
      for (int64_t j = 0; j < count; ++j) base[j] = safe_base(maximum[j]);
      for (int64_t d = 0; d < n; ++d) {
        if (!keep) scores_of(d);
        // Log needs the scores again: their exponentials go elsewhere.
        A* e = scores(d);
        if (p.log && keep) e = std::copy_n(e, count, factor) - count;
        add_columns(sum.recent, e, base, count);
        sum.added(d, n, count);
      }
      for (int64_t j = 0; j < count; ++j) {
        const bool empty = maximum[j] == -kInfinity<A> && sum.total[j] == 0;
        factor[j] = empty   ? (p.mask ? A(0) : kNaN<A>)
                    : p.log ? A(std::log(sum.total[j]))
                            : A(1 / sum.total[j]);
      }
      for (int64_t d = 0; d < n; ++d) {
        if (!keep) {
          scores_of(d);
          if (!p.log) {
            A unused[kMaxColumns] = {};
            add_columns(unused, scores(d), base, count);
          }
        }
        write(y + d * p.inner * y_size, scores(d), base, factor, p.log, count);
      }
    }
  });
}

template <typename T, typename Dx, bool kLog>
void backward_columns(const SoftmaxGrads& p) {
  using A = Acc<T>;
  const int64_t n = p.width, at_once = columns_at_once(n, p.inner);
  const int64_t blocks = (p.inner + at_once - 1) / at_once, rows = p.rows.count();
  const int64_t bytes = rows * n * p.inner * int64_t(sizeof(Dx));
  if (bytes >= kStreamBytes) expect_large_write(p.dx, bytes);
  const int threads = useful_threads(p.threads, rows * n * p.inner);
  parallel_static(rows * blocks, threads, [&](int64_t begin, int64_t end, int) {
    const Vec<A> scale = set1(A(p.scale)), masked = set1(-kInfinity<A>);
    ColumnSums<A> dot;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / blocks, column = task % blocks * at_once;
      const int64_t count = std::min(at_once, p.inner - column);
      const T* y = static_cast<const T*>(p.y.data) + p.rows.offset(row, p.y) + column;
      const T* dy = static_cast<const T*>(p.dy.data) + p.rows.offset(row, p.dy) + column;
      Dx* dx = static_cast<Dx*>(p.dx) + row * n * p.inner + column;
      dot.clear(count);
      for (int64_t d = 0; d < n; ++d) {
        const T *v = y + d * p.y.stride[3], *up = dy + d * p.dy.stride[3];
        each_vector<A>(count, [&](auto, int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
          const Vec<A> sum = lanes.load(dot.recent + j), g = lanes.load(up + j);
          lanes.store(dot.recent + j, kLog ? sum + g : fma(lanes.load(v + j), g, sum));
        });
        dot.added(d, n, count);
      }
      for (int64_t d = 0; d < n; ++d) {
        const T *v = y + d * p.y.stride[3], *up = dy + d * p.dy.stride[3];
        write_row<A>(dx + d * p.inner, count, false,
                     [&](int64_t j, auto lanes) FASTATTN_INLINE_LAMBDA {
                       const Vec<A> out = lanes.load(v + j), g = lanes.load(up + j),
                                    total = lanes.load(dot.sums() + j);
                       if constexpr (!kLog) return out * (g - total) * scale;
                       const Vec<A> gradient = scale * (g - accurate_exp_of(out) * total);
                       return select(equal(out, masked), zero<A>(), gradient);
                     });
      }
    }
  });
}

// ---- the choice --------------------------------------------------------------------------------

template <typename In, typename Out, MaskKind kMask>
void forward(const SoftmaxParams& p) {
  using A = Acc<In>;
  if (p.inner == 1)
    forward_rows(p, visits<In, Out, kMask>());
  else
    forward_columns<A>(p, load_columns<In, kMask>, finish_columns<Out>);
}

template <typename In, typename Out>
void forward(const SoftmaxParams& p) {
  if (!p.mask)
    forward<In, Out, MaskKind::kNone>(p);
  else if (p.mask_dtype == DType::kBool)
    forward<In, Out, MaskKind::kKept>(p);
  else
    forward<In, Out, MaskKind::kAdded>(p);
}

template <typename T, typename Dx>
void backward(const SoftmaxGrads& p) {
  if (p.inner == 1)
    p.log ? backward_rows<T, Dx, true>(p) : backward_rows<T, Dx, false>(p);
  else
    p.log ? backward_columns<T, Dx, true>(p) : backward_columns<T, Dx, false>(p);
}

}  // namespace

#if defined(FASTATTN_FLOAT64)
void softmax_forward_float64(const SoftmaxParams& params) { forward<double, double>(params); }
void softmax_backward_float64(const SoftmaxGrads& grads) { backward<double, double>(grads); }
#else
void softmax_forward(const SoftmaxParams& params) {
  if (params.x_dtype == DType::kFloat64) return softmax_forward_float64(params);
  with_type(params.x_dtype, [&](auto type) {
    using In = decltype(type);
    if (params.y_dtype == params.x_dtype)
      forward<In, In>(params);
    else if constexpr (sizeof(In) == 2)
      forward<In, float>(params);  // softmax(half, dtype=float32)
  });
}

void softmax_backward(const SoftmaxGrads& grads) {
  if (grads.x_dtype == DType::kFloat64) return softmax_backward_float64(grads);
  with_type(grads.x_dtype, [&](auto type) {
    using Dx = decltype(type);
    if (grads.y_dtype == grads.x_dtype)
      backward<Dx, Dx>(grads);
    else if constexpr (sizeof(Dx) == 2)
      backward<float, Dx>(grads);
  });
}
#endif

}  // namespace fastattn
