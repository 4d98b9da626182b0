// Tiles of sm_90a's attention kernels: fetched by the copying unit, multiplied by warpgroups.
#pragma once
#include "attention_tile.h"
#include "ptx_sm90.h"

namespace fastattn {

// Where the n-th tile of its kind that a block takes lies, and the parity of its phase there.
template <int kStages>
struct Stage {
  int index, parity;
  FASTATTN_DEVICE explicit Stage(unsigned n)
      : index(int(n % kStages)), parity(int(n / kStages & 1)) {}
};

// Registers of a multiprocessor's 64 K: what the producer gives up, the consumers take.
template <int kGroups>
struct Registers {
  static constexpr int kProducer = 32;
  static constexpr int kConsumer = kGroups == 3 ? 160 : 240;
};

// Rows [row, row + rows) of one head, panel after panel.
template <int kHeadDim>
FASTATTN_DEVICE void fetch_panels(unsigned char* tile, const TensorMap& map, Mbarrier* full,
                                  int rows, int row, int head, int batch) {
  arrive_expecting(full, rows * kHeadDim * 2);
  FASTATTN_UNROLL
  for (int panel = 0; panel < kHeadDim / kPanelColumns; ++panel)
    copy_box(tile + panel * rows * kPanelRowBytes, &map, full, panel * kPanelColumns, row, head,
             batch);
}

// s = a . b^T, of 64 of the kRowsA rows of a tile and all rows of another; one group of products.
template <typename T, int kHeadDim, int kRowsA, int kCount>
FASTATTN_DEVICE void issue_rows(float (&s)[kCount], uint64_t a, uint64_t b) {
  FASTATTN_UNROLL
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int panel = step / 4, within = step % 4 * 32;
    multiply_rows_async<T>(s, advanced(a, panel * kRowsA * kPanelRowBytes + within),
                           advanced(b, panel * 2 * kCount * kPanelRowBytes + within), step > 0);
  }
  commit_products();
}
// o = or += w . b, of all rows of a tile; one group of products.
template <typename T, int kCount, int kSteps>
FASTATTN_DEVICE void issue_columns(float (&o)[kCount], const uint32_t (&w)[kSteps][4], uint64_t b,
                                   bool add) {
  FASTATTN_UNROLL
  for (int step = 0; step < kSteps; ++step)
    multiply_columns_async<T>(o, w[step], advanced(b, step * 16 * kPanelRowBytes), add || step > 0);
  commit_products();
}
// Fragments of the first factor of issue_columns lie as issue_rows left them.
template <typename T, int kSteps>
FASTATTN_DEVICE void pack_fragments(uint32_t (&w)[kSteps][4], const float (&s)[8 * kSteps]) {
  FASTATTN_UNROLL
  for (int step = 0; step < kSteps; ++step) FASTATTN_UNROLL
  for (int i = 0; i < 4; ++i) w[step][i] = pack<T>(s[8 * step + 2 * i], s[8 * step + 2 * i + 1]);
}

// Row n of a lane's two, times a factor, to where it is not null. The four lanes of a row exchange
// their pairs of columns for whole groups of 8, so that each stores 16 bytes, without a detour over
// shared memory.
template <typename T, int kCount>
FASTATTN_DEVICE void store_row(const float (&o)[kCount], T* out, int width, int n, float factor) {
  const int lane = thread_x() % 4;
  const bool odd = lane & 1, upper = lane & 2;
  FASTATTN_UNROLL
  for (int first = 0; first < kCount / 4; first += 4) {
    uint32_t w[4];
    FASTATTN_UNROLL
    for (int t = 0; t < 4; ++t) {
      const float* pair = o + 4 * (first + t) + 2 * n;
      w[t] = pack<T>(pair[0] * factor, pair[1] * factor);
    }
    FASTATTN_UNROLL
    for (int t = 0; t < 4; t += 2) {
      const uint32_t other = shuffle_xor(odd ? w[t] : w[t + 1], 1);
      (odd ? w[t] : w[t + 1]) = other;
    }
    FASTATTN_UNROLL
    for (int t = 0; t < 2; ++t) {
      const uint32_t other = shuffle_xor(upper ? w[t] : w[t + 2], 2);
      (upper ? w[t] : w[t + 2]) = other;
    }
    const int column = 8 * (first + lane);
    if (out != nullptr && column < width) {
      Bytes16 chunk;
      FASTATTN_UNROLL
      for (int t = 0; t < 4; ++t) {
        chunk.number[2 * t] = uint16_t(w[t]);
        chunk.number[2 * t + 1] = uint16_t(w[t] >> 16);
      }
      *reinterpret_cast<Bytes16*>(out + column) = chunk;
    }
  }
}

}  // namespace fastattn
