// The instructions of csrc/cuda/ptx_sm90.h, by the emulator.
#pragma once
#include "hopper.h"
#include "instructions.h"

namespace fastattn {

using TensorMap = emulator::TensorMap;
using Mbarrier = uint64_t;

inline uint32_t shared_address(const void* p) {
  return emulator::kSharedBase +
         uint32_t(static_cast<const unsigned char*>(p) - emulator::shared_memory());
}

// The sanitizers have to see who uses a barrier that another thread makes.
inline void touch(const Mbarrier* barrier) {
  (void)*static_cast<const volatile Mbarrier*>(barrier);
}
inline void init_barrier(Mbarrier* barrier, int arrivals, Where where = Where::here()) {
  *barrier = 0;
  emulator::init_barrier(barrier, arrivals, where);
}
inline void fence_async() { emulator::fence_async(); }
inline void arrive(Mbarrier* barrier, Where where = Where::here()) {
  touch(barrier);
  emulator::arrive(barrier, 0, where);
}
inline void arrive_expecting(Mbarrier* barrier, int bytes, Where where = Where::here()) {
  touch(barrier);
  emulator::arrive(barrier, bytes, where);
}
inline void wait_barrier(Mbarrier* barrier, int parity, Where where = Where::here()) {
  touch(barrier);
  emulator::wait_barrier(barrier, parity, where);
}

inline void copy_box(void* shared, const TensorMap* map, Mbarrier* barrier, int x, int y, int z,
                     int w, Where where = Where::here()) {
  touch(barrier);
  const int at[4] = {x, y, z, w};
  emulator::copy_box(shared, *map, barrier, at, where);
}
inline void prefetch_map(const TensorMap*) {}

inline int cluster_rank() { return emulator::cluster_rank(); }
inline int cluster_size() { return emulator::cluster_size(); }
inline void sync_cluster(Where where = Where::here()) { emulator::sync_cluster(where); }
inline float load_remote(const float* p, int rank, Where where = Where::here()) {
  return *static_cast<const float*>(emulator::remote_shared(p, sizeof(float), rank, where));
}

template <int kRegisters>
inline void give_registers(Where where = Where::here()) {
  emulator::set_registers(kRegisters, false, where);
}
template <int kRegisters>
inline void take_registers(Where where = Where::here()) {
  emulator::set_registers(kRegisters, true, where);
}
inline void sync_named(int id, int threads, Where where = Where::here()) {
  emulator::sync_named(id, threads, true, where);
}
inline void arrive_named(int id, int threads, Where where = Where::here()) {
  emulator::sync_named(id, threads, false, where);
}

inline void fence_products(Where where = Where::here()) { emulator::fence_products(where); }
inline void commit_products(Where where = Where::here()) { emulator::commit_products(where); }
template <int kGroupsLeft>
inline void wait_products(Where where = Where::here()) {
  emulator::wait_products(kGroupsLeft, where);
}
template <int kCount>
inline void pin(float (&)[kCount]) {}
template <int kCount>
inline void pin(uint32_t (&)[kCount][4]) {}

template <typename T, int kCount>
inline void multiply_rows_async(float (&d)[kCount], uint64_t a, uint64_t b, bool add,
                                Where where = Where::here()) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  emulator::multiply_async({d, nullptr, a, b, 2 * kCount, kBf16, add, false}, where);
}
template <typename T, int kCount>
inline void multiply_columns_async(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool add,
                                   Where where = Where::here()) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  emulator::multiply_async({d, a, 0, b, 2 * kCount, kBf16, add, true}, where);
}

}  // namespace fastattn
