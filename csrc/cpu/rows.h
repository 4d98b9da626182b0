// How layer norm and softmax visit rows: vector by vector, written past the cache when large.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "parallel.h"
#include "params.h"
#include "philox.h"
#include "scratch.h"
#include "vec.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastattn {
namespace {

// ---- the vectors of a row ----------------------------------------------------------------------

// Which lanes of a vector belong to the row: all of them, or the first n.
struct Whole {
  template <typename T>
  FASTATTN_INLINE auto load(const T* p) const {
    return fastattn::load(p);
  }
  template <typename T, typename V>
  FASTATTN_INLINE void store(T* p, V x) const {
    fastattn::store(p, x);
  }
  template <typename A>
  FASTATTN_INLINE Vec<A> keep(Vec<A> x, A) const {
    return x;
  }
};
struct First {
  int n;
  template <typename T>
  FASTATTN_INLINE auto load(const T* p) const {
    return fastattn::load_n(p, n);
  }
  template <typename T, typename V>
  FASTATTN_INLINE void store(T* p, V x) const {
    fastattn::store_n(p, x, n);
  }
  template <typename A>
  FASTATTN_INLINE Vec<A> keep(Vec<A> x, A other) const {  // x, and `other` beyond the row
    return select(less(iota<A>(), set1(A(n))), x, set1(other));
  }
};

// Half of two vectors of bf16 that are taken at once, in the order that the instruction set likes:
// the even numbers, then the odd ones. Numbers of the accumulation type beside them lie in this
// "paired" order too: even ones, odd ones, for each 2 kWidth of a row; what does not fill a pair
// lies as is.
template <bool kOdd>
struct HalfPair {
  template <typename T>
  FASTATTN_INLINE auto load(const T* p) const {
#if defined(FASTATTN_X86_VECTORS)
    if constexpr (std::is_same_v<T, bf16>) return kOdd ? load_odd(p) : load_even(p);
#endif
    return fastattn::load(p + (kOdd ? Vec<Acc<T>>::kWidth : 0));
  }
  template <typename A>
  FASTATTN_INLINE void store(A* p, Vec<A> x) const {
    fastattn::store(p + (kOdd ? Vec<A>::kWidth : 0), x);
  }
  template <typename A>
  FASTATTN_INLINE Vec<A> keep(Vec<A> x, A) const {
    return x;
  }
};

// Whether rows of T are visited in paired order.
#if defined(FASTATTN_X86_VECTORS)
template <typename T>
constexpr bool kPaired = std::is_same_v<T, bf16>;
#else
template <typename T>
constexpr bool kPaired = false;
#endif

// out = in in the order of T, or back from it.
template <typename T, typename A>
void to_order_of(A* out, const A* in, int64_t n) {
  constexpr int64_t w = Vec<A>::kWidth;
  int64_t j = 0;
  if constexpr (kPaired<T>)
    for (; j + 2 * w <= n; j += 2 * w)
      for (int64_t i = 0; i < w; ++i) {
        out[j + i] = in[j + 2 * i];
        out[j + w + i] = in[j + 2 * i + 1];
      }
  std::copy(in + j, in + n, out + j);
}
template <typename T, typename Number>
void from_order_of(Number* out, const Number* in, int64_t n) {
  constexpr int64_t w = Vec<Acc<T>>::kWidth;
  int64_t j = 0;
  if constexpr (kPaired<T>)
    for (; j + 2 * w <= n; j += 2 * w)
      for (int64_t i = 0; i < w; ++i) {
        out[j + 2 * i] = in[j + i];
        out[j + 2 * i + 1] = in[j + w + i];
      }
  std::copy(in + j, in + n, out + j);
}

// Rows of the cache that are visited together: what they share is loaded once, and one alone would
// wait for its own sums more than it adds. As many as there are registers for.
constexpr int kRowsTogether = Vec<float>::kWidth == 16 ? 4 : 2;

// How many rows before it is read a row is fetched.
constexpr int kRowsAhead = 2;

// Independent accumulators hide the latency of additions.
#if defined(FASTATTN_X86_VECTORS) || defined(__ARM_NEON)
constexpr int kUnroll = 4;
#else
constexpr int kUnroll = 1;  // the compiler has its hands full with the portable vector
#endif

// Calls body(slot, j, lanes) for each vector of n numbers, in the order of T; `slot` is a
// compile-time 0 .. kSlots - 1, for the accumulators.
template <typename T, int kSlots = kUnroll, typename Body>
FASTATTN_INLINE void each_vector(int64_t n, const Body& body) {
  constexpr int64_t w = Vec<Acc<T>>::kWidth;
  const std::integral_constant<int, 0> s0;
  const std::integral_constant<int, 1 % kSlots> s1;
  const std::integral_constant<int, 2 % kSlots> s2;
  const std::integral_constant<int, 3 % kSlots> s3;
  int64_t j = 0;
  if constexpr (kPaired<T>) {
    if constexpr (kSlots > 1)
      for (; j + kSlots * w <= n; j += kSlots * w) {
        body(s0, j, HalfPair<false>{});
        body(s1, j, HalfPair<true>{});
        body(s2, j + 2 * w, HalfPair<false>{});
        body(s3, j + 2 * w, HalfPair<true>{});
      }
    for (; j + 2 * w <= n; j += 2 * w) {
      body(s0, j, HalfPair<false>{});
      body(s1, j, HalfPair<true>{});
    }
  } else if constexpr (kSlots > 1) {
    for (; j + kSlots * w <= n; j += kSlots * w) {
      body(s0, j, Whole{});
      body(s1, j + w, Whole{});
      body(s2, j + 2 * w, Whole{});
      body(s3, j + 3 * w, Whole{});
    }
  }
  for (; j + w <= n; j += w) body(s0, j, Whole{});
  if (j < n) body(s0, j, First{int(n - j)});
}

// Four vectors of a row at once: vector i is the numbers of Lanes<i> from offset<i> on.
template <typename T>
struct Four {
  static constexpr int kCount = 4;
  static constexpr int64_t kNumbers = kCount * Vec<Acc<T>>::kWidth;
  template <int i>
  static constexpr int64_t offset = (kPaired<T> ? i / 2 * 2 : i) * Vec<Acc<T>>::kWidth;
  template <int i>
  using Lanes = std::conditional_t<kPaired<T>, HalfPair<i % 2 != 0>, Whole>;
};

// Numbers summed in one run. The portable vector has four lanes and one sum of each, to which 128
// additions would show beside PyTorch's.
template <typename A>
constexpr int64_t kRowRun = sizeof(A) == 8 ? 128
                            : kUnroll == 1 ? 64
                                           : 512;

// kSums sums over n numbers, to which add(acc, j, lanes) adds a vector each. Sums are over two
// levels, runs of kRun numbers and their totals, so that many small terms are not rounded against
// one large sum.
template <typename T, int kSums, typename Add>
FASTATTN_INLINE std::array<Acc<T>, kSums> sum_vectors(int64_t n, const Add& add) {
  using A = Acc<T>;
  constexpr int64_t kRun = kRowRun<A>;
  constexpr int kSlots = kSums < 8 ? kUnroll : 1;  // eight sums hide the latency by themselves
  Vec<A> total[kSums];
  for (Vec<A>& sum : total) sum = zero<A>();
  for (int64_t begin = 0; begin < n; begin += kRun) {
    Vec<A> recent[kSlots][kSums];
    for (auto& sums : recent)
      for (Vec<A>& sum : sums) sum = zero<A>();
    each_vector<T, kSlots>(std::min(kRun, n - begin),
                           [&](auto slot, int64_t j, auto lanes)
                               FASTATTN_INLINE_LAMBDA { add(recent[slot], begin + j, lanes); });
    for (int k = 0; k < kSums; ++k) {
      Vec<A> sum = recent[0][k];
      if constexpr (kSlots == 4) sum = (sum + recent[1][k]) + (recent[2][k] + recent[3][k]);
      total[k] = total[k] + sum;
    }
  }
  std::array<A, kSums> result;
  for (int k = 0; k < kSums; ++k) result[size_t(k)] = hsum(total[k]);
  return result;
}

// The maximum of kUnroll vectors; unspecified if a lane is NaN.
template <typename A>
FASTATTN_INLINE A hmax_of(const Vec<A> (&top)[kUnroll]) {
  Vec<A> m = top[0];
  if constexpr (kUnroll == 4) m = vmax(vmax(m, top[1]), vmax(top[2], top[3]));
  return hmax_any(m);
}

// The numbers before the first address at which stream() may store.
template <typename T>
int64_t unaligned_head(const T* p) {
  constexpr uintptr_t bytes = Vec<Acc<T>>::kWidth * sizeof(T);
  return int64_t((bytes - reinterpret_cast<uintptr_t>(p) % bytes) % bytes / sizeof(T));
}

// Writes value(j, lanes)[r] to out[r][j] for kRows rows at once, in the order of T.
template <int kRows, typename T, typename Value>
FASTATTN_INLINE void write_rows(T* const (&out)[kRows], int64_t n, const Value& value) {
  constexpr int64_t w = Vec<Acc<T>>::kWidth;
  int64_t j = 0;
#if defined(FASTATTN_X86_VECTORS)
  if constexpr (kPaired<T>)
    for (; j + 2 * w <= n; j += 2 * w) {
      const auto even = value(j, HalfPair<false>{}), odd = value(j, HalfPair<true>{});
      for (int r = 0; r < kRows; ++r) store_pair(out[r] + j, even[size_t(r)], odd[size_t(r)]);
    }
#endif
  for (; j + w <= n; j += w) {
    const auto x = value(j, Whole{});
    for (int r = 0; r < kRows; ++r) store(out[r] + j, x[size_t(r)]);
  }
  if (j == n) return;
  const First tail{int(n - j)};
  const auto x = value(j, tail);
  for (int r = 0; r < kRows; ++r) tail.store(out[r] + j, x[size_t(r)]);
}

// Writes value(j, lanes) to out[j], in the order of Order: T, or Acc<T> for j as it is.
// `past_cache` sends it straight to memory.
template <typename Order, typename T, typename Value>
FASTATTN_INLINE void write_row(T* out, int64_t n, bool past_cache, const Value& value) {
#if defined(FASTATTN_X86_VECTORS)
  if constexpr (kPaired<Order>) {
    int64_t j = 0;
    static_assert(std::is_same_v<Order, T>);
    constexpr int64_t w = Vec<Acc<T>>::kWidth;
    const HalfPair<false> even;
    const HalfPair<true> odd;
    // A head would shift the pairs against those of the numbers beside: such rows go by the cache.
    past_cache = past_cache && reinterpret_cast<uintptr_t>(out) % (2 * w * sizeof(T)) == 0;
    if (past_cache)
      for (; j + 2 * w <= n; j += 2 * w) stream_pair(out + j, value(j, even), value(j, odd));
    else
      for (; j + 2 * w <= n; j += 2 * w) store_pair(out + j, value(j, even), value(j, odd));
    for (; j < n; j += w) {
      const First lanes{int(std::min<int64_t>(w, n - j))};
      lanes.store(out + j, value(j, lanes));
    }
    return;
  }
#endif
  constexpr int64_t w = Vec<Acc<T>>::kWidth;
  int64_t j = 0;
  if (past_cache) {
    j = std::min(unaligned_head(out), n);
    const First head{int(j)};
    if (j) head.store(out, value(0, head));
    for (; j + w <= n; j += w) stream(out + j, value(j, Whole{}));
  } else {
    for (; j + w <= n; j += w) store(out + j, value(j, Whole{}));
  }
  const First tail{int(n - j)};
  if (j < n) tail.store(out + j, value(j, tail));
}

// ---- memory ------------------------------------------------------------------------------------

constexpr int64_t kBlock = 2048;  // numbers that a thread's first-level cache holds beside others

// Outputs from this size on go past the cache: what is read next has been evicted anyway, and a
// normal store would first read the line it overwrites.
constexpr int64_t kStreamBytes = int64_t(8) << 20;

// Asks the system for huge pages under an output that is about to be written: fresh memory costs a
// page fault every 4 KiB otherwise, which takes longer than the kernel.
inline void expect_large_write(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + uintptr_t(bytes)) & ~(page - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

// Threads for a kernel that touches this many numbers: waking a second one costs as much as
// kGrain of them.
inline int useful_threads(int threads, int64_t numbers) {
  constexpr int64_t kGrain = 16384;
  return int(std::clamp<int64_t>(numbers / kGrain, 1, std::max(threads, 1)));
}

// ---- conversions -------------------------------------------------------------------------------

// out[i] = in[i * stride] as an accumulation type, for a dtype known at run time; a bool keeps or
// masks: 0 or -inf.
template <typename A>
FASTATTN_NOINLINE void widen_row(A* out, const void* in, DType dtype, int64_t stride, int64_t n) {
  const auto copy = [&](auto* p) {
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) out[i] = A(to_acc(p[i]));
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = A(to_acc(p[i * stride]));
    }
  };
  switch (dtype) {
    case DType::kFloat32:
      return copy(static_cast<const float*>(in));
    case DType::kFloat64:
      return copy(static_cast<const double*>(in));
    case DType::kBFloat16:
      return copy(static_cast<const bf16*>(in));
    case DType::kFloat16:
      return copy(static_cast<const f16*>(in));
    case DType::kBool: {
      const auto* p = static_cast<const uint8_t*>(in);
      for (int64_t i = 0; i < n; ++i)
        out[i] = p[i * stride] ? A(0) : -std::numeric_limits<A>::infinity();
    }
  }
}

template <typename A>
FASTATTN_NOINLINE void narrow_row(void* out, const A* in, DType dtype, int64_t n) {
  switch (dtype) {
    case DType::kFloat64:
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(out)[i] = double(in[i]);
      return;
    case DType::kBFloat16:
      for (int64_t i = 0; i < n; ++i) static_cast<bf16*>(out)[i] = from_acc<bf16>(float(in[i]));
      return;
    case DType::kFloat16:
      for (int64_t i = 0; i < n; ++i) static_cast<f16*>(out)[i] = from_acc<f16>(float(in[i]));
      return;
    default:
      for (int64_t i = 0; i < n; ++i) static_cast<float*>(out)[i] = float(in[i]);
  }
}

// Calls f(T{}) with the stored type of a floating dtype, float64 excepted (float64.cpp).
template <typename F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(bf16{});
    case DType::kFloat16:
      return f(f16{});
    default:
      return f(float{});
  }
}

// ---- dropout -----------------------------------------------------------------------------------

// factor[c] for columns [begin, begin + n) of a row, begin a multiple of 4: 0 where the element is
// dropped, 1 / (1 - p) where it is kept. Element (row, col) has word col & 3 of the counter
// (col >> 2, row, row >> 32, 0). The loop over `kLanes` counters is there to be vectorised.
template <typename A>
FASTATTN_NOINLINE void dropout_factors(A* factor, const Dropout& dropout, int64_t row,
                                       int64_t begin, int64_t n) {
  constexpr int kLanes = 16;
  const uint32_t threshold = dropout_threshold(dropout.p);
  const A kept = dropout.p < 1 ? A(1 / (1 - dropout.p)) : A(0);
  A words[4 * kLanes];
  for (int64_t j = 0; j < n; j += 4 * kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t group = uint32_t((begin + j) / 4 + lane);
      const Philox random =
          Philox::at(dropout.seed, group, uint32_t(row), uint32_t(uint64_t(row) >> 32), 0);
      for (int k = 0; k < 4; ++k) words[4 * lane + k] = random.word[k] >= threshold ? kept : A(0);
    }
    std::copy_n(words, std::min<int64_t>(4 * kLanes, n - j), factor + j);
  }
}

}  // namespace
}  // namespace fastattn
