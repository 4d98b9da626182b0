// What the lanes of a warp make together of their registers. Compiled without sanitizers.
#include <algorithm>
#include <type_traits>

#include "ptx.h"

namespace fastattn {

void emulated_shuffle(const void* const* in, void* const* out, uint32_t mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const int source = static_cast<const ShuffleIn*>(in[lane])->source & 31;
    const int from = mask >> source & 1 ? source : lane;
    *static_cast<uint32_t*>(out[lane]) = static_cast<const ShuffleIn*>(in[from])->value;
  }
}

namespace {

const MatrixRow& row_of(const void* const* in, int matrix, int row) {
  return *static_cast<const MatrixRow*>(in[8 * matrix + row]);
}

// The rows of one matrix are fetched together: 8 banks of 16 bytes.
void look_for_conflicts(const void* const* in) {
  int worst = 1;
  for (int matrix = 0; matrix < 4; ++matrix) {
    int turns[8] = {};
    for (int row = 0; row < 8; ++row) {
      const uint32_t bank = row_of(in, matrix, row).bank;
      bool again = false;  // the same 16 bytes
      for (int other = 0; other < row; ++other) again |= row_of(in, matrix, other).bank == bank;
      if (!again) worst = std::max(worst, ++turns[bank % 8]);
    }
  }
  if (worst > 1) emulator::note_bank_conflict(worst);
}

float widen(uint16_t bits, bf16) { return to_float(bf16{bits}); }
float widen(uint16_t bits, f16) { return to_float(f16{bits}); }

// mma.m16n8k16: lane l holds rows l / 4 and l / 4 + 8 of a and of c, and column l / 4 of b.
template <typename T>
void multiply_all(const void* const* in, void* const* out) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const MultiplyIn*>(in[lane]);
    const int row = lane / 4, column = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      const auto number = [&](uint32_t word) { return widen(uint16_t(word >> 16 * half), T{}); };
      a[row][column + half] = number(mine.a[0]);
      a[row + 8][column + half] = number(mine.a[1]);
      a[row][column + 8 + half] = number(mine.a[2]);
      a[row + 8][column + 8 + half] = number(mine.a[3]);
      b[column + half][row] = number(mine.b[0]);
      b[column + 8 + half][row] = number(mine.b[1]);
    }
  }
  float c[16][8] = {};
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<float*>(out[lane]);
    const int row = lane / 4, column = lane % 4 * 2;
    mine[0] += c[row][column];
    mine[1] += c[row][column + 1];
    mine[2] += c[row + 8][column];
    mine[3] += c[row + 8][column + 1];
  }
}

}  // namespace

void emulated_load_matrices(const void* const* in, void* const* out, uint32_t) {
  look_for_conflicts(in);
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      const uint16_t* n = row_of(in, matrix, lane / 4).number + lane % 4 * 2;
      static_cast<uint32_t*>(out[lane])[matrix] = n[0] | uint32_t(n[1]) << 16;
    }
}

void emulated_load_matrices_transposed(const void* const* in, void* const* out, uint32_t) {
  look_for_conflicts(in);
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int row = lane % 4 * 2, column = lane / 4;
      static_cast<uint32_t*>(out[lane])[matrix] =
          row_of(in, matrix, row).number[column] |
          uint32_t(row_of(in, matrix, row + 1).number[column]) << 16;
    }
}

void emulated_multiply_bf16(const void* const* in, void* const* out, uint32_t) {
  multiply_all<bf16>(in, out);
}

void emulated_multiply_f16(const void* const* in, void* const* out, uint32_t) {
  multiply_all<f16>(in, out);
}

// IEEE 754 half precision by integers: the oldest compilers that build the tests know no _Float16.
float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7F800000 | fraction << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  const float tiny = float(fraction) * 0x1p-24f;
  return sign ? -tiny : tiny;
}

template <>
f16 from_float<f16>(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (size != size) return {0x7FFF};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7C00)};
  if (size < 0x1p-14f) return {uint16_t(sign | uint32_t(std::nearbyint(size * 0x1p24f)))};
  const uint32_t shifted = bits_of(size) - (112u << 23);
  return {uint16_t(sign | (shifted + 0xFFF + (shifted >> 13 & 1)) >> 13)};
}

}  // namespace fastattn
