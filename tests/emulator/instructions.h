// The instructions of csrc/cuda/ptx.h, by the emulator. What a lane reads or writes in memory, it
// reads and writes here itself, for the sanitizers to see; the rest happens in instructions.cpp.
#pragma once
#include <cmath>
#include <cstring>

#include "emulator.h"

namespace fastattn {

using emulator::Where;

inline int thread_x() { return emulator::thread_x(); }
inline int block_threads() { return emulator::threads(); }
inline int block_x() { return int(emulator::block(0)); }
inline int block_y() { return int(emulator::block(1)); }
inline int block_z() { return int(emulator::block(2)); }
inline int grid_x() { return int(emulator::grid(0)); }
inline int grid_y() { return int(emulator::grid(1)); }

inline unsigned forgotten(unsigned x) { return x; }

inline void note_rare(const char* what) { emulator::note_rare(what); }

// ---- waiting -----------------------------------------------------------------------------------

inline void sync_threads(Where where = Where::here()) {
  emulator::sync_block(0, emulator::threads(), false, where);
}
inline bool sync_threads_or(bool value, Where where = Where::here()) {
  return emulator::sync_block(0, emulator::threads(), value, where);
}
inline void sync_warp(Where where = Where::here()) { emulator::sync_warp(~0u, where); }

// ---- shared memory -----------------------------------------------------------------------------

template <typename T>
inline T load_shared(const T* p, Where where = Where::here()) {
  emulator::note_shared_access(p, sizeof(T), where);
  return *p;
}
template <typename T>
inline void store_shared(T* p, const T& value, Where where = Where::here()) {
  emulator::note_shared_access(p, sizeof(T), where);
  *p = value;
}

// ---- exchange ----------------------------------------------------------------------------------

struct ShuffleIn {
  uint32_t value;
  int source;
};
void emulated_shuffle(const void* const* in, void* const* out, uint32_t mask);

template <typename T>
inline T shuffle_from(T value, int source, const char* name, Where where) {
  static_assert(sizeof(T) == 4, "a shuffle moves 32 bits");
  ShuffleIn in{0, source};
  std::memcpy(&in.value, &value, 4);
  uint32_t out = 0;
  emulator::meet_warp(name, ~0u, &in, &out, emulated_shuffle, where);
  std::memcpy(&value, &out, 4);
  return value;
}
template <typename T>
inline T shuffle_xor(T value, int lanes, Where where = Where::here()) {
  return shuffle_from(value, (thread_x() & 31) ^ lanes, "shuffle_xor", where);
}
template <typename T>
inline T shuffle(T value, int lane, Where where = Where::here()) {
  return shuffle_from(value, lane, "shuffle", where);
}

// ---- asynchronous copies -----------------------------------------------------------------------

inline void copy_async_16(void* shared, const void* global, bool there,
                          Where where = Where::here()) {
  emulator::copy_async(shared, global, 16, there ? 16 : 0, where);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int kGroupsLeft>
inline void wait_copies() {
  emulator::wait_copies(kGroupsLeft);
}

// ---- matrices ----------------------------------------------------------------------------------

struct MatrixRow {
  uint16_t number[8];
  uint32_t bank;  // of 16 bytes
};
void emulated_load_matrices(const void* const* in, void* const* out, uint32_t mask);
void emulated_load_matrices_transposed(const void* const* in, void* const* out, uint32_t mask);

inline void read_matrix_row(MatrixRow& row, const void* shared, Where where) {
  if (uintptr_t(shared) % 16) emulator::fail("ldmatrix: misaligned", where);
  const auto* p = static_cast<const uint16_t*>(shared);
  for (int i = 0; i < 8; ++i) row.number[i] = p[i];
  row.bank = uint32_t((static_cast<const unsigned char*>(shared) - emulator::shared_memory()) / 16);
}
inline void load_matrices(uint32_t (&r)[4], const void* row, Where where = Where::here()) {
  MatrixRow in;
  read_matrix_row(in, row, where);
  emulator::meet_warp("ldmatrix", ~0u, &in, r, emulated_load_matrices, where);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row,
                                     Where where = Where::here()) {
  MatrixRow in;
  read_matrix_row(in, row, where);
  emulator::meet_warp("ldmatrix.trans", ~0u, &in, r, emulated_load_matrices_transposed, where);
}

struct MultiplyIn {
  uint32_t a[4], b[2];
};
void emulated_multiply_bf16(const void* const* in, void* const* out, uint32_t mask);
void emulated_multiply_f16(const void* const* in, void* const* out, uint32_t mask);

template <typename T>
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     Where where = Where::here()) {
  const MultiplyIn in{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto compute = std::is_same_v<T, bf16> ? emulated_multiply_bf16 : emulated_multiply_f16;
  emulator::meet_warp("mma", ~0u, &in, c, compute, where);
}

// ---- numbers -----------------------------------------------------------------------------------

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
float to_float(f16 x);
template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return {0x7FFF};
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
f16 from_float<f16>(float x);

// Two numbers in one register, the first in its low half.
template <typename T>
inline uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

}  // namespace fastattn
