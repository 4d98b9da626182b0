// The instructions that C++ has no words for, and with ptx_sm90.h the only inline PTX. With
// FASTATTN_EMULATE they are those of tests/emulator, and a host compiler builds the kernels.
#pragma once
#include <cstdint>

#include "../common/philox.h"

namespace fastattn {

// The bits of a number; to_float and from_float below convert.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace fastattn

#ifdef FASTATTN_EMULATE
#include "instructions.h"

#define FASTATTN_DEVICE inline
#define FASTATTN_KERNEL(threads, blocks) static void
#define FASTATTN_NOINLINE_DEVICE static __attribute__((noinline))
#define FASTATTN_SHARED(name) unsigned char* const name = ::emulator::shared_memory()
#define FASTATTN_UNROLL
#define FASTATTN_NO_UNROLL
#define FASTATTN_PARAMS const

#else

#define FASTATTN_DEVICE __device__ __forceinline__
// At most `threads` in a block, and registers for `blocks` of them on a multiprocessor.
#define FASTATTN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FASTATTN_NOINLINE_DEVICE static __device__ __noinline__
#define FASTATTN_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define FASTATTN_UNROLL _Pragma("unroll")
#define FASTATTN_NO_UNROLL _Pragma("unroll 1")
#define FASTATTN_PARAMS const __grid_constant__

namespace fastattn {

FASTATTN_DEVICE int thread_x() { return int(threadIdx.x); }
FASTATTN_DEVICE int block_threads() { return int(blockDim.x); }
FASTATTN_DEVICE int block_x() { return int(blockIdx.x); }
FASTATTN_DEVICE int block_y() { return int(blockIdx.y); }
FASTATTN_DEVICE int block_z() { return int(blockIdx.z); }
FASTATTN_DEVICE int grid_x() { return int(gridDim.x); }
FASTATTN_DEVICE int grid_y() { return int(gridDim.y); }

// A number of which the compiler forgets where it has it from.
FASTATTN_DEVICE unsigned forgotten(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The emulator counts it: that something rare happened.
FASTATTN_DEVICE void note_rare(const char*) {}

// ---- waiting -----------------------------------------------------------------------------------

FASTATTN_DEVICE void sync_threads() { __syncthreads(); }
FASTATTN_DEVICE bool sync_threads_or(bool value) { return __syncthreads_or(value); }
FASTATTN_DEVICE void sync_warp() { __syncwarp(); }

// ---- shared memory -----------------------------------------------------------------------------
// Plain accesses by these names, of which the emulator sees the places: whether lanes share banks.

template <typename T>
FASTATTN_DEVICE T load_shared(const T* p) {
  return *p;
}
template <typename T>
FASTATTN_DEVICE void store_shared(T* p, const T& value) {
  *p = value;
}

// ---- exchange: all lanes of a warp -------------------------------------------------------------

template <typename T>
FASTATTN_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
}
template <typename T>
FASTATTN_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xFFFFFFFFu, value, lane);
}

// ---- asynchronous copies -----------------------------------------------------------------------

FASTATTN_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, past the registers; zeros where nothing is there.
FASTATTN_DEVICE void copy_async_16(void* shared, const void* global, bool there) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
      "l"(global), "r"(there ? 16 : 0)
      : "memory");
}
FASTATTN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Until all but the last kGroupsLeft groups of this thread's copies have arrived.
template <int kGroupsLeft>
FASTATTN_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroupsLeft) : "memory");
}

// ---- matrices ----------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit numbers. Lane l gives the address of row l % 8 of matrix l / 8, 16
// bytes in shared memory, and gets numbers 2 * (l % 4) and the next of row l / 4 of each.
FASTATTN_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
FASTATTN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16 x 8, float32) += a (16 x 16) b (16 x 8). Lane l holds of c: row l / 4, columns 2 * (l % 4)
// and the next, then those of row l / 4 + 8.
template <typename T>
FASTATTN_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
FASTATTN_DEVICE void multiply<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
FASTATTN_DEVICE void multiply<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- numbers -----------------------------------------------------------------------------------

// To 2 units in the last place; subnormal results are zero.
FASTATTN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
FASTATTN_DEVICE float log2_fast(float x) { return __log2f(x); }
FASTATTN_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FASTATTN_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

FASTATTN_DEVICE float to_float(float x) { return x; }
FASTATTN_DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
FASTATTN_DEVICE float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(y) : "h"(x.bits));
  return y;
}
template <typename T>
FASTATTN_DEVICE T from_float(float x);
template <>
FASTATTN_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
FASTATTN_DEVICE bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
FASTATTN_DEVICE f16 from_float<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two numbers in one register, the first in its low half.
template <typename T>
FASTATTN_DEVICE uint32_t pack(float low, float high);
template <>
FASTATTN_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
FASTATTN_DEVICE uint32_t pack<f16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

}  // namespace fastattn
#endif
