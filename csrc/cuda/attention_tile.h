// Tiles in shared memory, and their products on tensor cores.
#pragma once
#include "params.h"
#include "ptx.h"

namespace fastattn {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = 32 * kAttentionWarps;

// kRows x kColumns numbers of 16 bits. Groups of 8 (16 bytes) lie where an exclusive-or puts them,
// so that 8 rows of one group, which is what ldmatrix fetches at once, are in different banks.
template <int kRows, int kColumns>
struct Tile {
  static constexpr int kChunks = kColumns / 8;
  static constexpr int kBytes = kRows * kColumns * 2;
  static_assert(kChunks % 4 == 0, "the swizzle permutes four groups at least");

  unsigned char* base;

  FASTATTN_DEVICE unsigned char* at(int row, int chunk) const {
    const int swizzle = kChunks % 8 == 0 ? row & 7 : (row >> 1) & 3;
    return base + (row * kChunks + (chunk ^ swizzle)) * 16;
  }
};

struct alignas(16) Bytes16 {
  uint16_t number[8];
};

// Copies a tile, by the threads of the block: row(r) is the address of row r, or null where there
// is none; zeros there, and from `width` columns on. Asynchronous where rows are aligned.
template <typename T, int kRows, int kColumns, typename Row>
FASTATTN_DEVICE void copy_tile(const Tile<kRows, kColumns>& tile, int width, int64_t column_stride,
                               bool aligned, const T* somewhere, Row row) {
  constexpr int kChunks = kColumns / 8;
  static_assert(kRows * kChunks % kAttentionThreads == 0, "every thread copies as much");
  if (aligned) {
    const int thread = int(forgotten(unsigned(thread_x())));  // addresses of a loop's copies would
    FASTATTN_UNROLL                                           // stay in registers through it
        for (int n = 0; n < kRows * kChunks / kAttentionThreads; ++n) {
      const int at = n * kAttentionThreads + thread;
      const int r = at / kChunks, chunk = at % kChunks;
      const T* from = row(r);
      const bool there = from != nullptr && chunk * 8 < width;
      copy_async_16(tile.at(r, chunk), there ? from + chunk * 8 : somewhere, there);
    }
    return;
  }
  FASTATTN_NO_UNROLL
  for (int at = thread_x(); at < kRows * kChunks; at += kAttentionThreads) {
    const int r = at / kChunks, chunk = at % kChunks;
    const T* from = row(r);
    Bytes16 numbers;
    FASTATTN_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int column = chunk * 8 + i;
      numbers.number[i] =
          from != nullptr && column < width ? from[column * column_stride].bits : uint16_t(0);
    }
    store_shared(reinterpret_cast<Bytes16*>(tile.at(r, chunk)), numbers);
  }
}

// Rows [first, first + kRows) of one head, or nothing beyond the end.
template <typename T, int kRows, int kHeadDim>
FASTATTN_DEVICE void copy_rows(const Tile<kRows, kHeadDim>& tile, const View& v, int b, int h,
                               int first, int rows, int width, bool aligned) {
  const T* head = static_cast<const T*>(v.data) + b * v.stride[0] + h * v.stride[1];
  copy_tile(tile, width, v.stride[3], aligned, head, [&](int r) -> const T* {
    return first + r < rows ? head + int64_t(first + r) * v.stride[2] : nullptr;
  });
}

// The reverse, by one warp: kCopied rows of the tile from first_row on, kChunksStored groups of
// columns of each from first_chunk on.
template <typename T, int kCopied, int kChunksStored, int kRows, int kColumns, typename Row>
FASTATTN_DEVICE void store_rows(const Tile<kRows, kColumns>& tile, int first_row, int first_chunk,
                                int width, int64_t column_stride, bool aligned, Row row) {
  // Eight lanes fetch at once: out of one row, unless two fill the banks.
  constexpr int kAcross = kColumns % 64 == 0 ? (kChunksStored + 7) / 8 * 8 : kChunksStored;
  FASTATTN_NO_UNROLL
  for (int at = thread_x() % 32; at < kCopied * kAcross; at += 32) {
    const int r = at / kAcross, n = at % kAcross, chunk = first_chunk + n;
    if (n >= kChunksStored) continue;
    T* to = row(first_row + r);
    const auto* from = reinterpret_cast<const Bytes16*>(tile.at(first_row + r, chunk));
    const Bytes16 numbers = load_shared(from);  // by all lanes together, whoever stores
    if (to == nullptr || chunk * 8 >= width) continue;
    if (aligned) {
      *reinterpret_cast<Bytes16*>(to + chunk * 8) = numbers;
    } else {
      for (int i = 0; i < 8 && chunk * 8 + i < width; ++i)
        to[(chunk * 8 + i) * column_stride].bits = numbers.number[i];
    }
  }
}

// ---- fragments ---------------------------------------------------------------------------------
// Of an m16n8k16 product: see multiply() in ptx.h.

// Rows [row, row + 16), columns [16 k, 16 k + 16) as the first factor.
template <int kRows, int kColumns>
FASTATTN_DEVICE void load_a(uint32_t (&a)[4], const Tile<kRows, kColumns>& tile, int row, int k,
                            int lane) {
  load_matrices(a, tile.at(row + (lane & 15), 2 * k + (lane >> 4)));
}

// Rows [row, row + 16) as 16 columns of the second factor, of which the columns
// [16 k, 16 k + 16) are summed over: two fragments.
template <int kRows, int kColumns>
FASTATTN_DEVICE void load_b(uint32_t (&b)[4], const Tile<kRows, kColumns>& tile, int row, int k,
                            int lane) {
  load_matrices(b, tile.at(row + (lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
}

// Rows [row, row + 16) to be summed over, columns [16 n, 16 n + 16) as columns of the second
// factor: two fragments.
template <int kRows, int kColumns>
FASTATTN_DEVICE void load_b_transposed(uint32_t (&b)[4], const Tile<kRows, kColumns>& tile, int row,
                                       int n, int lane) {
  load_matrices_transposed(b, tile.at(row + (lane & 15), 2 * n + (lane >> 4)));
}

// The lane, for addresses. Two tiles of rows, or long ones, leave no registers for addresses to
// stay in through the loop around a product: there they are made anew each time.
template <bool kAnew>
FASTATTN_DEVICE int lane_of_addresses() {
  return (kAnew ? int(forgotten(unsigned(thread_x()))) : thread_x()) % 32;
}

// c[rows][columns / 8] = a . b^T of kRowTiles x 16 rows of `a` from a_row on and kN rows of `b`
// from b_row on.
template <typename T, int kRowTiles, int kN, int kRowsA, int kRowsB, int kColumns>
FASTATTN_DEVICE void multiply_rows(float (&c)[kRowTiles][kN / 8][4],
                                   const Tile<kRowsA, kColumns>& a, int a_row,
                                   const Tile<kRowsB, kColumns>& b, int b_row = 0) {
  FASTATTN_UNROLL
  for (int r = 0; r < kRowTiles; ++r) FASTATTN_UNROLL
  for (int n = 0; n < kN / 8; ++n) FASTATTN_UNROLL
  for (int e = 0; e < 4; ++e) c[r][n][e] = 0.0f;
  const int lane = lane_of_addresses<(kRowTiles > 1 || kColumns > 192)>();
  FASTATTN_UNROLL
  for (int k = 0; k < kColumns / 16; ++k) {
    uint32_t fa[kRowTiles][4];
    FASTATTN_UNROLL
    for (int r = 0; r < kRowTiles; ++r) load_a(fa[r], a, a_row + 16 * r, k, lane);
    FASTATTN_UNROLL
    for (int n = 0; n < kN / 16; ++n) {
      uint32_t fb[4];
      load_b(fb, b, b_row + 16 * n, k, lane);
      FASTATTN_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        multiply<T>(c[r][2 * n], fa[r], fb[0], fb[1]);
        multiply<T>(c[r][2 * n + 1], fa[r], fb[2], fb[3]);
      }
    }
  }
}

// c[rows][kOut / 8] += p . b of kN rows of `b`, its columns from 8 * first_chunk on; p lies in
// registers as multiply_rows left it.
template <typename T, int kRowTiles, int kN, int kOut, int kRowsB, int kColumns>
FASTATTN_DEVICE void multiply_columns(float (&c)[kRowTiles][kOut / 8][4],
                                      const float (&p)[kRowTiles][kN / 8][4],
                                      const Tile<kRowsB, kColumns>& b, int first_chunk) {
  const int lane = lane_of_addresses<(kColumns > 192)>();
  FASTATTN_UNROLL
  for (int k = 0; k < kN / 16; ++k) {
    uint32_t fa[kRowTiles][4];
    FASTATTN_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      fa[r][0] = pack<T>(p[r][2 * k][0], p[r][2 * k][1]);
      fa[r][1] = pack<T>(p[r][2 * k][2], p[r][2 * k][3]);
      fa[r][2] = pack<T>(p[r][2 * k + 1][0], p[r][2 * k + 1][1]);
      fa[r][3] = pack<T>(p[r][2 * k + 1][2], p[r][2 * k + 1][3]);
    }
    FASTATTN_UNROLL
    for (int n = 0; n < kOut / 16; ++n) {
      uint32_t fb[4];
      load_b_transposed(fb, b, 16 * k, first_chunk / 2 + n, lane);
      FASTATTN_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        multiply<T>(c[r][2 * n], fa[r], fb[0], fb[1]);
        multiply<T>(c[r][2 * n + 1], fa[r], fb[2], fb[3]);
      }
    }
  }
}

// Writes 16 rows of float32 fragments, times a factor for each half, into columns of a tile from
// first_chunk on.
template <typename T, int kOut, int kRows, int kColumns>
FASTATTN_DEVICE void fragments_to_tile(const Tile<kRows, kColumns>& tile, int row, int first_chunk,
                                       const float (&c)[kOut / 8][4], float upper, float lower) {
  const int lane = thread_x() % 32;
  FASTATTN_UNROLL
  for (int n = 0; n < kOut / 8; ++n) {
    const int chunk = first_chunk + n;
    auto* top = reinterpret_cast<uint32_t*>(tile.at(row + lane / 4, chunk)) + lane % 4;
    auto* bottom = reinterpret_cast<uint32_t*>(tile.at(row + lane / 4 + 8, chunk)) + lane % 4;
    store_shared(top, pack<T>(c[n][0] * upper, c[n][1] * upper));
    store_shared(bottom, pack<T>(c[n][2] * lower, c[n][3] * lower));
  }
}

// Over the four lanes that share a row.
FASTATTN_DEVICE float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
FASTATTN_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

}  // namespace fastattn
