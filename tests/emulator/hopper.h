// What kernels of sm_90a need of the machine: transaction barriers, the unit that copies tiles of
// tensors, the asynchronous products of a warpgroup, registers that warps exchange. The
// instructions are in instructions_sm90.h.
//
// Copies and products complete lazily, eagerly or at random (emulator.h). What a product reads, it
// reads when it completes; until then its results are NaN. Until a copy has arrived, so is what it
// fills.
#pragma once
#include "emulator.h"

namespace emulator {

struct alignas(64) TensorMap {
  const char* data;
  uint64_t size[4], step[3];  // step: bytes
  uint32_t box[4];
};
static_assert(sizeof(TensorMap) <= 128,
              "a map takes as much of a kernel's parameters as a real one");

// Of 16-bit numbers, with 128-byte swizzle; throws where the driver would refuse.
TensorMap make_tensor_map(const char* name, const void* data, const uint64_t* size,
                          const uint64_t* step, const uint32_t* box);

// Where a kernel sees shared memory begin; not at 0, so that a null pointer is nowhere in it.
constexpr uint32_t kSharedBase = 1024;

// ---- transaction barriers: 8 bytes of shared memory, by their address ---------------------------

void init_barrier(void* barrier, int arrivals, Where where);
void fence_async();
void arrive(void* barrier, int64_t expected_bytes, Where where);
void wait_barrier(void* barrier, int parity, Where where);

void copy_box(void* shared, const TensorMap& map, void* barrier, const int* at, Where where);

// ---- of some warps ------------------------------------------------------------------------------

void set_registers(int count, bool more, Where where);
void sync_named(int id, int threads, bool waits, Where where);

// ---- products -----------------------------------------------------------------------------------

// What a lane brings to d (64 x columns) += a (64 x 16) b (16 x columns).
struct Product {
  float* d;
  const uint32_t* a;  // in registers; null: descriptor_a
  uint64_t descriptor_a, descriptor_b;
  int columns;
  bool bf16, add;
  bool rows_are_sums;  // b lies as 16 rows, else as `columns` rows
};
void multiply_async(const Product& product, Where where);
void fence_products(Where where);
void commit_products(Where where);
void wait_products(int groups_left, Where where);

}  // namespace emulator
