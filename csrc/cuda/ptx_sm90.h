// The instructions of sm_90a: transaction barriers, bulk copies of tensor tiles (TMA), clusters of
// blocks that read one another's shared memory, asynchronous products of a warpgroup (wgmma),
// registers that warps hand to one another. What ptx.h is for every architecture; with
// FASTATTN_EMULATE they are those of tests/emulator.
#pragma once
#include "ptx.h"

namespace fastattn {

constexpr int kWarpgroup = 128;    // threads that multiply together
constexpr int kPanelColumns = 64;  // of 16 bits: the 128 bytes that the swizzle permutes
constexpr int kPanelRowBytes = 128;
constexpr int kSwizzleBytes = 1024;  // 8 rows, after which the pattern repeats

}  // namespace fastattn

#ifdef FASTATTN_EMULATE
#include "instructions_sm90.h"
#else
#include <cuda.h>

namespace fastattn {

// How a tensor lies in memory, as the copying unit reads it; see tensor_map.h.
using TensorMap = CUtensorMap;
using Mbarrier = uint64_t;

// ---- transaction barriers ----------------------------------------------------------------------
// A phase ends when all arrivals have come and all the bytes that were announced.

FASTATTN_DEVICE void init_barrier(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// What this thread has written to shared memory, asynchronous units see from now on.
FASTATTN_DEVICE void fence_async() { asm volatile("fence.proxy.async;\n" ::: "memory"); }

FASTATTN_DEVICE void arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
               : "memory");
}
FASTATTN_DEVICE void arrive_expecting(Mbarrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of that parity has ended; the one before the first counts as odd.
FASTATTN_DEVICE void wait_barrier(Mbarrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- tiles of tensors --------------------------------------------------------------------------

// The box of the map at (x, y, z, w), zeros outside the tensor; its bytes count at the barrier.
FASTATTN_DEVICE void copy_box(void* shared, const TensorMap* map, Mbarrier* barrier, int x, int y,
                              int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
FASTATTN_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// ---- clusters ----------------------------------------------------------------------------------
// Of sm_90 and what comes after it, not of sm_90a alone; elsewhere each block is a cluster.

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

FASTATTN_DEVICE int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}
FASTATTN_DEVICE int cluster_size() {
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(size));
  return size;
}
// Until all threads of the cluster have come here: what they wrote to shared memory before is seen
// behind it. No block may end while others read its memory.
FASTATTN_DEVICE void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}
// What the cluster's block `rank` has where p is in this block's shared memory.
FASTATTN_DEVICE float load_remote(const float* p, int rank) {
  float x;
  asm volatile(
      "{\n"
      ".reg .b32 at;\n"
      "mapa.shared::cluster.u32 at, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [at];\n"
      "}\n"
      : "=f"(x)
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
  return x;
}

#else

FASTATTN_DEVICE int cluster_rank() { return 0; }
FASTATTN_DEVICE int cluster_size() { return 1; }
FASTATTN_DEVICE void sync_cluster() {}
FASTATTN_DEVICE float load_remote(const float* p, int) { return *p; }

#endif

// ---- registers and barriers of some of the warps -----------------------------------------------

template <int kRegisters>
FASTATTN_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
FASTATTN_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

FASTATTN_DEVICE void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
FASTATTN_DEVICE void arrive_named(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// ---- products of a warpgroup -------------------------------------------------------------------

// Before the first product, and before one whose registers were touched since the last.
FASTATTN_DEVICE void fence_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
FASTATTN_DEVICE void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Until all but the last kGroupsLeft groups are done.
template <int kGroupsLeft>
FASTATTN_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kGroupsLeft) : "memory");
}
// The compiler knows nothing of products under way: it must not move a use of their registers
// across this.
template <int kCount>
FASTATTN_DEVICE void pin(float (&x)[kCount]) {
  FASTATTN_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int kCount>
FASTATTN_DEVICE void pin(uint32_t (&x)[kCount][4]) {
  FASTATTN_UNROLL
  for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+r"(x[i / 4][i % 4])::"memory");
}

// multiply_rows_async: d (64 x kN, float32) = or += a . b^T, of 16 columns of 64 rows of `a` and
// kN rows of `b`. multiply_columns_async: d += a . b, of 16 columns of `a`, which lie in registers
// as multiply() has them, and 16 rows of `b`. Warp w of the warpgroup holds rows [16 w, 16 w + 16)
// of d, of each 8 columns as multiply() does.
template <typename T, int kN>
struct Products;

#define FASTATTN_D0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FASTATTN_D1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define FASTATTN_D2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define FASTATTN_D3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_D4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FASTATTN_D5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define FASTATTN_D6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define FASTATTN_D7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define FASTATTN_D8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define FASTATTN_D9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define FASTATTN_D10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FASTATTN_D11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define FASTATTN_D12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define FASTATTN_D13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define FASTATTN_D14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define FASTATTN_D15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define FASTATTN_D32 FASTATTN_D0 ", " FASTATTN_D1 ", " FASTATTN_D2 ", " FASTATTN_D3
#define FASTATTN_D40 FASTATTN_D32 ", " FASTATTN_D4
#define FASTATTN_D48 FASTATTN_D40 ", " FASTATTN_D5
#define FASTATTN_D64 FASTATTN_D48 ", " FASTATTN_D6 ", " FASTATTN_D7
#define FASTATTN_D88 FASTATTN_D64 ", " FASTATTN_D8 ", " FASTATTN_D9 ", " FASTATTN_D10
#define FASTATTN_D128                                                                  \
  FASTATTN_D88 ", " FASTATTN_D11 ", " FASTATTN_D12 ", " FASTATTN_D13 ", " FASTATTN_D14 \
               ", " FASTATTN_D15

#define FASTATTN_O8(i)                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTATTN_O32 FASTATTN_O8(0), FASTATTN_O8(8), FASTATTN_O8(16), FASTATTN_O8(24)
#define FASTATTN_O40 FASTATTN_O32, FASTATTN_O8(32)
#define FASTATTN_O48 FASTATTN_O40, FASTATTN_O8(40)
#define FASTATTN_O64 FASTATTN_O48, FASTATTN_O8(48), FASTATTN_O8(56)
#define FASTATTN_O88 FASTATTN_O64, FASTATTN_O8(64), FASTATTN_O8(72), FASTATTN_O8(80)
#define FASTATTN_O128                                                                 \
  FASTATTN_O88, FASTATTN_O8(88), FASTATTN_O8(96), FASTATTN_O8(104), FASTATTN_O8(112), \
      FASTATTN_O8(120)

// count: registers of d, n / 2; then the numbers of the operands behind them.
#define FASTATTN_ROWS(name, n, count, a, b, flag)                                               \
  FASTATTN_DEVICE static void rows(float (&d)[count], uint64_t of_a, uint64_t of_b, bool add) { \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #flag                                 \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name          \
                 " {" FASTATTN_D##count "}, %" #a ", %" #b ", add, 1, 1, 0, 0;\n}\n"            \
                 : FASTATTN_O##count                                                            \
                 : "l"(of_a), "l"(of_b), "r"(int(add)));                                        \
  }
#define FASTATTN_COLUMNS(name, n, count, a0, a1, a2, a3, b, flag)                               \
  FASTATTN_DEVICE static void columns(float (&d)[count], const uint32_t (&a)[4], uint64_t of_b, \
                                      bool add) {                                               \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #flag                                 \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name          \
                 " {" FASTATTN_D##count "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b     \
                                        ", add, 1, 1, 1;\n}\n"                                  \
                 : FASTATTN_O##count                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(of_b), "r"(int(add)));       \
  }
#define FASTATTN_PRODUCTS(type, name)                              \
  template <>                                                      \
  struct Products<type, 64> {                                      \
    FASTATTN_ROWS(name, 64, 32, 32, 33, 34)                        \
    FASTATTN_COLUMNS(name, 64, 32, 32, 33, 34, 35, 36, 37)         \
  };                                                               \
  template <>                                                      \
  struct Products<type, 80> {                                      \
    FASTATTN_ROWS(name, 80, 40, 40, 41, 42)                        \
  };                                                               \
  template <>                                                      \
  struct Products<type, 96> {                                      \
    FASTATTN_ROWS(name, 96, 48, 48, 49, 50)                        \
  };                                                               \
  template <>                                                      \
  struct Products<type, 128> {                                     \
    FASTATTN_ROWS(name, 128, 64, 64, 65, 66)                       \
    FASTATTN_COLUMNS(name, 128, 64, 64, 65, 66, 67, 68, 69)        \
  };                                                               \
  template <>                                                      \
  struct Products<type, 176> {                                     \
    FASTATTN_ROWS(name, 176, 88, 88, 89, 90)                       \
  };                                                               \
  template <>                                                      \
  struct Products<type, 256> {                                     \
    FASTATTN_COLUMNS(name, 256, 128, 128, 129, 130, 131, 132, 133) \
  };
FASTATTN_PRODUCTS(bf16, "bf16")
FASTATTN_PRODUCTS(f16, "f16")

template <typename T, int kCount>
FASTATTN_DEVICE void multiply_rows_async(float (&d)[kCount], uint64_t a, uint64_t b, bool add) {
  Products<T, 2 * kCount>::rows(d, a, b, add);
}
template <typename T, int kCount>
FASTATTN_DEVICE void multiply_columns_async(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b,
                                            bool add) {
  Products<T, 2 * kCount>::columns(d, a, b, add);
}

}  // namespace fastattn
#endif

namespace fastattn {

// How a product finds a tile in shared memory: 128-byte swizzle; 8 rows are 1024 bytes. Tiles wider
// than a panel of 64 columns lie panel after panel.
FASTATTN_DEVICE uint64_t tile_descriptor(const void* tile, int panel_bytes) {
  return uint64_t(shared_address(tile) >> 4) | uint64_t(panel_bytes >> 4) << 16 |
         uint64_t(kSwizzleBytes >> 4) << 32 | uint64_t(1) << 62;
}
FASTATTN_DEVICE uint64_t advanced(uint64_t descriptor, int bytes) {
  return descriptor + uint64_t(bytes >> 4);
}

}  // namespace fastattn
