// The matrix product that all of attention is made of: C (M, N) = A (M, K) . B (K, N) on tiles that
// fit the caches. Lanes run along N; A is broadcast element by element, with any strides; B is
// packed into panels of kPanel columns, [panel][k][kPanel], zero-padded, so that it is read in
// order.
//
// A Compute policy says what an element is: a float, a double, or (with AVX-512 BF16) a pair of
// bf16 neighbours along K, which one instruction multiplies and adds in float32.
#pragma once
#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "vec.h"

namespace fastattn {
namespace {

template <typename A>
struct Fma {
  using Acc = A;
  using Elem = A;  // one element of an operand
  using Operand = Vec<A>;
  static constexpr int kDepth = 1;  // values along K in one element
  static FASTATTN_INLINE Operand broadcast(const Elem* a) { return set1(*a); }
  static FASTATTN_INLINE Operand load_b(const Elem* b) { return load(b); }
  static FASTATTN_INLINE Vec<A> step(Operand a, Operand b, Vec<A> c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
  using Acc = float;
  using Elem = uint32_t;
  using Operand = __m512bh;
  static constexpr int kDepth = 2;
  static FASTATTN_INLINE Operand broadcast(const Elem* a) {
    return (Operand)_mm512_set1_epi32(int(*a));
  }
  static FASTATTN_INLINE Operand load_b(const Elem* b) { return (Operand)_mm512_loadu_si512(b); }
  static FASTATTN_INLINE VecF step(Operand a, Operand b, VecF c) {
    return {_mm512_dpbf16_ps(c.v, a, b)};
  }
};
#endif

template <typename T>
struct ComputeOf {
  using type = Fma<Acc<T>>;
};
#if defined(__AVX512BF16__)
template <>
struct ComputeOf<bf16> {
  using type = Bf16Pairs;
};
#endif

// Register tile: kTileRows x kPanel sums. Where there are registers for it (AVX-512), a tile is one
// vector wide, each step broadcasts from memory on its way into the multiply-add, and the tile's
// totals stay in registers beside the sums of the run at hand; elsewhere totals wait in C.
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kPanelVectors = 1;
constexpr bool kTotalsInRegisters = true;
#else
#if defined(FASTATTN_X86_VECTORS)
constexpr int kTileRows = 6;
#elif defined(__aarch64__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kPanelVectors = 2;
constexpr bool kTotalsInRegisters = false;
#endif
template <typename A>
constexpr int kPanel = kPanelVectors * Vec<A>::kWidth;

// Elements along K that are summed in one go; a longer product is summed by runs, which rounds
// less than one long chain of additions does.
constexpr int kSumRun = kTileRows == 8 ? 16 : 32;

FASTATTN_INLINE constexpr int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// What becomes of a sum that belongs at *c, in row m and column n of C.
struct Store {
  template <typename A>
  FASTATTN_INLINE void operator()(A* c, Vec<A> sum, int, int) const {
    store(c, sum);
  }
};
struct Add {
  template <typename A>
  FASTATTN_INLINE void operator()(A* c, Vec<A> sum, int, int) const {
    store(c, load(c) + sum);
  }
};
template <typename A>
struct Rescale {
  const A* factor;  // of each row of C
  FASTATTN_INLINE void operator()(A* c, Vec<A> sum, int m, int) const {
    store(c, fma(set1(factor[m]), load(c), sum));
  }
};

// What a product does beside its own work, once after each run of kSumRun.
struct NoSideWork {
  void operator()() const {}
};

// A left operand: element (m, k) at data[m * row + k * depth].
template <class Compute>
struct Left {
  const typename Compute::Elem* data;
  ptrdiff_t row, depth;
};
// Panels of k_elems x kPanel elements: `stride` elements from one panel to the next, `depth` from
// one row of a panel to the next. Packed panels hold their rows one after the other.
template <class Compute>
struct Panels {
  const typename Compute::Elem* data;
  ptrdiff_t stride;
  ptrdiff_t depth = kPanel<typename Compute::Acc>;
};

// kRows rows of C, kVectors (2 or 1) vectors wide. Sums are scalar variables: gcc keeps small
// arrays in loops on the stack, and takes minutes over lambdas that unroll them where a sanitizer
// is at work.
template <class Compute, int kVectors, int kRows, class Into, class Side>
FASTATTN_INLINE void tile_matmul_step(Left<Compute> a, Panels<Compute> b, typename Compute::Acc* c,
                                      ptrdiff_t c_row, int k_elems, int m, int n, const Into& into,
                                      Side& side) {
  using A = typename Compute::Acc;
  using V = Vec<A>;
  constexpr int w = V::kWidth;
#define FASTATTN_ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define FASTATTN_TOTALS(r) V total##r##0 = zero<A>(), total##r##1 = zero<A>();
#define FASTATTN_SUMS(r) V sum##r##0 = zero<A>(), sum##r##1 = zero<A>();
#define FASTATTN_STEP(r)                                                     \
  if constexpr (kRows > r) {                                                 \
    const auto x = Compute::broadcast(a.data + r * a.row);                   \
    sum##r##0 = Compute::step(x, b0, sum##r##0);                             \
    if constexpr (kVectors > 1) sum##r##1 = Compute::step(x, b1, sum##r##1); \
  }
#define FASTATTN_WRITE(r, into, value)                                              \
  if constexpr (kRows > r) {                                                        \
    into(c + r * c_row, value##r##0, m + r, n);                                     \
    if constexpr (kVectors > 1) into(c + r * c_row + w, value##r##1, m + r, n + w); \
  }
#define FASTATTN_ADD(r)                                                \
  if constexpr (kRows > r) {                                           \
    total##r##0 = total##r##0 + sum##r##0;                             \
    if constexpr (kVectors > 1) total##r##1 = total##r##1 + sum##r##1; \
  }
#define FASTATTN_WRITE_TOTAL(r) FASTATTN_WRITE(r, into, total)
#define FASTATTN_WRITE_FIRST(r) FASTATTN_WRITE(r, into, sum)
#define FASTATTN_WRITE_MORE(r) FASTATTN_WRITE(r, Add{}, sum)
  FASTATTN_ROWS(FASTATTN_TOTALS)
  int done = 0;
  do {
    const int run = std::min(k_elems - done, kSumRun);
    FASTATTN_ROWS(FASTATTN_SUMS)
    for (int k = 0; k < run; ++k) {
      const auto b0 = Compute::load_b(b.data);
      const auto b1 = kVectors > 1 ? Compute::load_b(b.data + w) : b0;
      FASTATTN_ROWS(FASTATTN_STEP)
      a.data += a.depth;
      b.data += b.depth;
    }
    if constexpr (kTotalsInRegisters) {
      FASTATTN_ROWS(FASTATTN_ADD)
    } else if (done == 0) {
      FASTATTN_ROWS(FASTATTN_WRITE_FIRST)
    } else {
      FASTATTN_ROWS(FASTATTN_WRITE_MORE)
    }
    side();
    done += run;
  } while (done < k_elems);
  if constexpr (kTotalsInRegisters) {
    FASTATTN_ROWS(FASTATTN_WRITE_TOTAL)
  }
#undef FASTATTN_ROWS
#undef FASTATTN_TOTALS
#undef FASTATTN_SUMS
#undef FASTATTN_STEP
#undef FASTATTN_WRITE
#undef FASTATTN_ADD
#undef FASTATTN_WRITE_TOTAL
#undef FASTATTN_WRITE_FIRST
#undef FASTATTN_WRITE_MORE
}

// The last rows, fewer than 2 kRows: by tiles of kRows, kRows / 2, ... 1.
template <class Compute, int kVectors, int kRows, class Into, class Side>
FASTATTN_INLINE void tile_matmul_rest(int rows, Left<Compute> a, Panels<Compute> b,
                                      typename Compute::Acc* c, ptrdiff_t c_row, int k_elems, int m,
                                      int n, const Into& into, Side& side) {
  if constexpr (kRows > 0) {
    if (rows >= kRows) {
      tile_matmul_step<Compute, kVectors, kRows>(a, b, c, c_row, k_elems, m, n, into, side);
      a.data += kRows * a.row;
      c += kRows * c_row;
      m += kRows;
      rows -= kRows;
    }
    tile_matmul_rest<Compute, kVectors, kRows / 2>(rows, a, b, c, c_row, k_elems, m, n, into, side);
  }
}

template <class Compute, int kVectors, class Into, class Side>
FASTATTN_INLINE void tile_matmul_panel(Left<Compute> a, Panels<Compute> b, typename Compute::Acc* c,
                                       ptrdiff_t c_row, int rows, int k_elems, int n,
                                       const Into& into, Side& side) {
  int m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) {
    tile_matmul_step<Compute, kVectors, kTileRows>(a, b, c, c_row, k_elems, m, n, into, side);
    a.data += kTileRows * a.row;
    c += kTileRows * c_row;
  }
  constexpr int half = kTileRows > 4 ? 4 : 2;
  tile_matmul_rest<Compute, kVectors, half>(rows - m, a, b, c, c_row, k_elems, m, n, into, side);
}

// C has `rows` rows and `cols` columns, which are filled up to a whole vector.
template <class Compute, class Into, class Side = NoSideWork>
FASTATTN_NOINLINE void tile_matmul(Left<Compute> a, Panels<Compute> b, typename Compute::Acc* c,
                                   ptrdiff_t c_row, int rows, int cols, int k_elems,
                                   const Into& into, Side&& side = {}) {
  constexpr int width = kPanel<typename Compute::Acc>, narrow = width - width / kPanelVectors;
  int n = 0;
  for (; n + narrow < cols; n += width, b.data += b.stride)
    tile_matmul_panel<Compute, kPanelVectors>(a, b, c + n, c_row, rows, k_elems, n, into, side);
  if constexpr (kPanelVectors > 1)
    if (n < cols) tile_matmul_panel<Compute, 1>(a, b, c + n, c_row, rows, k_elems, n, into, side);
}

// One of the values of an element.
template <class Compute>
inline typename Compute::Acc elem_value(const typename Compute::Elem* e, int part) {
  if constexpr (Compute::kDepth == 1) {
    return *e;
  } else {
    return bits_to_float(part ? *e & 0xffff0000u : *e << 16);
  }
}

// A . B summed as decode sums along head_dim, bit for bit: lane l takes the elements l, l + w,
// ..., and then the lanes are added as a tree.
template <typename A>
FASTATTN_NOINLINE void tile_product_by_lanes(Left<Fma<A>> a, Panels<Fma<A>> b, A* c,
                                             ptrdiff_t c_row, int rows, int cols, int k_elems) {
  using V = Vec<A>;
  constexpr int w = V::kWidth, width = kPanel<A>;
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < cols; n += w) {
      const A* column = b.data + n / width * b.stride + n % width;
      V sum[w];
      for (V& lane : sum) lane = zero<A>();
      for (int k = 0; k < k_elems; ++k)
        sum[k % w] =
            fma(set1(a.data[m * a.row + k * a.depth]), load(column + k * b.depth), sum[k % w]);
      reduce_as_tree<w>(sum, [](V x, V y) { return x + y; });
      store(c + m * c_row + n, sum[0]);
    }
}

// As tile_matmul, for tiles that hold NaN or infinity beside masked elements: a zero in A adds
// nothing, where 0 * NaN would spoil rows that do not see the element. Slow, and seldom called.
template <class Compute>
FASTATTN_NOINLINE void tile_matmul_sparse(Left<Compute> a, Panels<Compute> b,
                                          typename Compute::Acc* c, ptrdiff_t c_row, int rows,
                                          int cols, int k_elems) {
  using A = typename Compute::Acc;
  constexpr int width = kPanel<A>;
  for (int m = 0; m < rows; ++m)
    for (int k = 0; k < k_elems; ++k)
      for (int part = 0; part < Compute::kDepth; ++part) {
        const A x = elem_value<Compute>(a.data + m * a.row + k * a.depth, part);
        if (x == 0) continue;
        for (int n = 0; n < cols; ++n) {
          const auto* e = b.data + n / width * b.stride + k * b.depth + n % width;
          c[m * c_row + n] += x * elem_value<Compute>(e, part);
        }
      }
}

// ---- packing ------------------------------------------------------------------------------------

// A matrix where it lies in a tensor.
template <typename T>
struct Source {
  const T* data;
  int64_t row, col;  // strides, in elements
  const T* at(int64_t r, int64_t c) const { return data + r * row + c * col; }
};

template <typename T>
FASTATTN_NOINLINE bool all_finite(Source<T> s, int rows, int cols) {
  // x * 0 is NaN for NaN and infinity, and the sums keep it.
  using A = Acc<T>;
  constexpr int w = Vec<A>::kWidth;
  Vec<A> lanes = zero<A>();
  A rest = 0;
  for (int r = 0; r < rows; ++r) {
    int c = 0;
    if (s.col == 1)
      for (; c + w <= cols; c += w) lanes = fma(load(s.at(r, c)), zero<A>(), lanes);
    for (; c < cols; ++c) rest += to_acc(*s.at(r, c)) * A(0);
  }
  return hsum(lanes) + rest == 0;
}

#if defined(__AVX512BF16__)
// dst[c] = (first[c], second[c]) in bf16.
FASTATTN_INLINE void store_pairs(uint32_t* dst, VecF first, VecF second) {
  const __m512i even = _mm512_cvtepu16_epi32(narrow(bf16{}, first));
  const __m512i odd = _mm512_cvtepu16_epi32(narrow(bf16{}, second));
  _mm512_storeu_si512(dst, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
}
FASTATTN_INLINE uint32_t make_pair(const bf16* first, const bf16* second) {
  return (first ? first->bits : 0u) | uint32_t(second ? second->bits : 0u) << 16;
}
#endif

// A matrix as an operand where it lies, if it can be one: numbers of the compute type side by side.
template <class Compute, typename T>
bool lies_ready(Source<T> s) {
  return std::is_same_v<T, typename Compute::Elem> && s.col == 1;
}

// Left operand, row by row: (rows, cols) -> elements [row][round_up(cols, depth) / depth].
template <class Compute, typename T>
FASTATTN_NOINLINE void pack_rows(typename Compute::Elem* dst, ptrdiff_t dst_row, Source<T> s,
                                 int rows, int cols) {
  using A = typename Compute::Acc;
  constexpr int w = Vec<A>::kWidth;
  for (int r = 0; r < rows; ++r, dst += dst_row) {
    const T* p = s.at(r, 0);
    if constexpr (Compute::kDepth == 1) {
      int c = 0;
      if (s.col == 1) {
        for (; c + w <= cols; c += w) store(dst + c, load(p + c));
      }
      for (; c < cols; ++c) dst[c] = to_acc(p[c * s.col]);
    } else {
#if defined(__AVX512BF16__)
      if (s.col == 1) {
        dst[(cols - 1) / 2] = 0;
        std::memcpy(dst, p, size_t(cols) * sizeof(T));
      } else {
        for (int c = 0; c < cols; c += 2)
          dst[c / 2] = make_pair(p + c * s.col, c + 1 < cols ? p + (c + 1) * s.col : nullptr);
      }
#endif
    }
  }
}

// The same, where it lies or else packed at dst.
template <class Compute, typename T>
Left<Compute> rows_of(typename Compute::Elem* dst, ptrdiff_t dst_row, Source<T> s, int rows,
                      int cols) {
  if (lies_ready<Compute>(s))
    return {reinterpret_cast<const typename Compute::Elem*>(s.data), s.row, 1};
  pack_rows<Compute>(dst, dst_row, s, rows, cols);
  return {dst, dst_row, 1};
}

// Right operand whose K runs down the source's rows: B (k, n) = source (k, n), k < rows, n < cols.
// Columns are padded with zeros to whole panels, k to whole elements.
template <class Compute, typename T>
FASTATTN_NOINLINE void pack_panels(typename Compute::Elem* dst, ptrdiff_t panel_stride, Source<T> s,
                                   int rows, int cols) {
  using A = typename Compute::Acc;
  constexpr int w = Vec<A>::kWidth, width = kPanel<A>;
  for (int n0 = 0; n0 < cols; n0 += width, dst += panel_stride) {
    const int n = std::min(width, cols - n0);
    typename Compute::Elem* d = dst;
    for (int k = 0; k < rows; k += Compute::kDepth, d += width) {
      const T* p = s.at(k, n0);
      if constexpr (Compute::kDepth == 1) {
        if (n == width && s.col == 1) {
          for (int c = 0; c < width; c += w) store(d + c, load(p + c));
        } else {
          for (int c = 0; c < width; ++c) d[c] = c < n ? to_acc(p[c * s.col]) : A(0);
        }
      } else {
#if defined(__AVX512BF16__)
        const T* q = k + 1 < rows ? s.at(k + 1, n0) : nullptr;
        if (n == width && s.col == 1) {
          for (int c = 0; c < width; c += w) {
            const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(p + c)));
            const __m512i odd =
                q ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(q + c)))
                  : _mm512_setzero_si512();
            _mm512_storeu_si512(d + c, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
          }
        } else {
          for (int c = 0; c < width; ++c)
            d[c] = c < n ? make_pair(p + c * s.col, q ? q + c * s.col : nullptr) : 0;
        }
#endif
      }
    }
  }
}

// The same, where it lies if its columns are whole panels and its rows follow one another (rows
// further apart would compete for the same sets of a cache), or else packed at dst.
template <class Compute, typename T>
Panels<Compute> panels_of(typename Compute::Elem* dst, ptrdiff_t panel_stride, Source<T> s,
                          int rows, int cols) {
  constexpr int width = kPanel<typename Compute::Acc>;
  if (lies_ready<Compute>(s) && s.row == cols && cols % width == 0)
    return {reinterpret_cast<const typename Compute::Elem*>(s.data), width, s.row};
  pack_panels<Compute>(dst, panel_stride, s, rows, cols);
  return {dst, panel_stride};
}

// Right operand whose K runs along the source's columns: B (k, n) = source (n, k), n < rows, k <
// cols.
template <class Compute, typename T>
FASTATTN_NOINLINE void pack_panels_transposed(typename Compute::Elem* dst, ptrdiff_t panel_stride,
                                              Source<T> s, int rows, int cols) {
  using A = typename Compute::Acc;
  using Elem = typename Compute::Elem;
  constexpr int w = Vec<A>::kWidth, width = kPanel<A>, depth = Compute::kDepth;
  for (int n0 = 0; n0 < rows; n0 += width, dst += panel_stride) {
    for (int half = 0; half < width; half += w) {
      const int n = std::min(w, rows - n0 - half);  // source rows in this vector; <= 0: padding
      int k = 0;
      if (n <= 0) {
        for (; k < cols; k += depth)
          store(reinterpret_cast<A*>(dst + k / depth * width + half), zero<A>());
      } else if (s.col == 1) {
        for (; k + w * depth <= cols; k += w * depth) {
          Vec<A> x[w];
          for (int i = 0; i < w; ++i) {
            if (i >= n) {
              x[i] = zero<A>();
              continue;
            }
            const T* p = s.at(n0 + half + i, k);
            if constexpr (depth == 1) {
              x[i] = load(p);
            } else {
              x[i] = load(reinterpret_cast<const A*>(p));  // pairs travel as 32-bit lanes
            }
          }
          transpose(x);
          for (int i = 0; i < w; ++i)
            store(reinterpret_cast<A*>(dst + (k / depth + i) * width + half), x[i]);
        }
      }
      for (; k < cols; k += depth) {
        Elem* d = dst + k / depth * width + half;
        for (int i = 0; i < w; ++i) {
          if (i >= n) {
            d[i] = 0;
          } else if constexpr (depth == 1) {
            d[i] = to_acc(*s.at(n0 + half + i, k));
          } else {
#if defined(__AVX512BF16__)
            d[i] = make_pair(s.at(n0 + half + i, k),
                             k + 1 < cols ? s.at(n0 + half + i, k + 1) : nullptr);
#endif
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace fastattn
