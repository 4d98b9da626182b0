// Every wrapper of an instruction in csrc/cuda/ptx.h and ptx_sm90.h, one tiny kernel each, against
// what it is documented to do: in the emulator, and compiled by nvcc on a device. What both agree
// with here, the emulator's verdicts on whole kernels rest on. Numbers are small integers, so that
// sums are exact in any order. Arguments in the emulator: lazy, eager or random:SEED.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "launch.h"
#include "tensor_map.h"

using namespace fastattn;

namespace {

#if defined(FASTATTN_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTATTN_SM90
#endif

int failures = 0;

template <typename T>
struct Array {
  size_t size;
  T* data = nullptr;

  explicit Array(size_t n) : size(n) {
#ifdef FASTATTN_EMULATE
    data = static_cast<T*>(std::aligned_alloc(16, (n * sizeof(T) + 15) / 16 * 16));
#else
    check(cudaMallocManaged(&data, n * sizeof(T)), "cudaMallocManaged");
#endif
    std::memset(static_cast<void*>(data), 0xFF, n * sizeof(T));
  }
  Array(const Array&) = delete;
  ~Array() {
#ifdef FASTATTN_EMULATE
    std::free(data);
#else
    cudaFree(data);
#endif
  }
  T& operator[](size_t i) { return data[i]; }
};

// A wrapper's kernels: numbers in, numbers out.
struct Call {
  const void* in;
  float* out;
  TensorMap map;
};

template <typename Kernel>
void run(const char* name, Kernel kernel, int threads, size_t shared, const Call& c,
         Grid grid = Grid{}) {
  launch(name, kernel, grid, threads, shared, Stream{}, c);
#ifndef FASTATTN_EMULATE
  check(cudaDeviceSynchronize(), name);
#endif
}

template <typename Want>
void expect(const char* name, Array<float>& got, Want want) {
  for (size_t i = 0; i < got.size; ++i) {
    const float x = got[i], y = want(int(i));
    if (x == y || (x != x && y != y)) continue;
    std::printf("%s: number %d is %g, not %g\n", name, int(i), x, y);
    ++failures;
    return;
  }
}

// Small integers that no wrong index repeats by chance.
FASTATTN_HD int digit(int i) { return int((unsigned(i) * 2654435761u >> 13) % 7) - 3; }

template <typename T>
uint16_t bits_of_digit(int i) {
  const float x = float(digit(i));
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::is_same<T, bf16>::value) return uint16_t(bits >> 16);
  const int exponent = int(bits >> 23 & 255) - 127 + 15;
  return x == 0 ? uint16_t(0)
                : uint16_t((bits >> 16 & 0x8000) | unsigned(exponent) << 10 | (bits >> 13 & 0x3FF));
}

// ---- exchange, waiting -------------------------------------------------------------------------

FASTATTN_KERNEL(64, 1) exchange_kernel(FASTATTN_PARAMS Call c) {
  FASTATTN_SHARED(memory);
  auto* shared = reinterpret_cast<float*>(memory);
  const int t = thread_x();
  c.out[t] = shuffle_xor(float(t), 5);
  c.out[64 + t] = shuffle(float(t), 7);
  shared[t] = float(t);
  sync_threads();
  c.out[128 + t] = shared[63 - t];
  c.out[192 + t] = sync_threads_or(t == 40) ? 1.0f : 0.0f;
  c.out[256 + t] = sync_threads_or(t == 64) ? 1.0f : 0.0f;
  sync_threads();
  shared[t] = float(2 * t);
  sync_warp();
  c.out[320 + t] = shared[t ^ 31];
  c.out[384 + t] = float(block_threads() + grid_x() + grid_y() + block_x() + block_y() + block_z());
}

void exchange() {
  Array<float> out(448);
  run("exchange", exchange_kernel, 64, 256, {nullptr, out.data, {}});
  expect("shuffles and barriers", out, [](int i) {
    const int t = i % 64, want[] = {t ^ 5, t / 32 * 32 + 7, 63 - t, 1, 0, 2 * (t ^ 31), 66};
    return float(want[i / 64]);
  });
}

// Plain accesses by their names, of 16, 8, 4 and 2 bytes.
struct alignas(16) Four {
  float number[4];
};
struct alignas(8) Two {
  float number[2];
};
FASTATTN_KERNEL(32, 1) shared_kernel(FASTATTN_PARAMS Call c) {
  FASTATTN_SHARED(memory);
  auto* fours = reinterpret_cast<Four*>(memory);
  auto* halves = reinterpret_cast<bf16*>(memory + 512);
  const int t = thread_x();
  store_shared(fours + t, Four{{float(t), float(t + 100), float(t + 200), float(t + 300)}});
  store_shared(halves + t, from_float<bf16>(float(2 * t)));
  sync_warp();
  const Four four = load_shared(fours + (t ^ 3));
  for (int i = 0; i < 4; ++i) c.out[4 * t + i] = four.number[i];
  c.out[128 + t] = load_shared(reinterpret_cast<const Two*>(fours + (t ^ 5))).number[1];
  c.out[160 + t] = load_shared(&fours[31 - t].number[2]);
  c.out[192 + t] = to_float(load_shared(halves + (t ^ 1)));
}

void shared_memory() {
  Array<float> out(224);
  run("shared memory", shared_kernel, 32, 576, {nullptr, out.data, {}});
  expect("shared memory", out, [](int i) {
    const int t = i % 32, want[] = {(t ^ 5) + 100, 31 - t + 200, 2 * (t ^ 1)};
    return i < 128 ? float((i / 4 ^ 3) + i % 4 * 100) : float(want[i / 32 - 4]);
  });
#if defined(FASTATTN_EMULATE) && !defined(__SANITIZE_THREAD__)  // with which nothing is counted
  // Lanes 16 bytes apart: of the 8 bytes half a warp's share the banks, of the 4 all of them.
  std::string ways;
  for (const std::string& line : emulator::take_bank_conflicts())
    ways += line.substr(line.rfind(": ") + 2) + "; ";
  if (ways != "2 ways; 4 ways; ") {
    std::printf("bank conflicts of plain accesses: %s\n", ways.c_str());
    ++failures;
  }
#endif
}

// ---- copies ------------------------------------------------------------------------------------

FASTATTN_KERNEL(32, 1) copies_kernel(FASTATTN_PARAMS Call c) {
  FASTATTN_SHARED(memory);
  auto* shared = reinterpret_cast<float*>(memory);
  const auto* in = static_cast<const float*>(c.in);
  const int t = thread_x();
  copy_async_16(shared + 4 * t, in + 4 * t, t % 3 != 0);
  commit_copies();
  copy_async_16(shared + 128 + 4 * t, in + 128 + 4 * t, true);
  commit_copies();
  wait_copies<1>();
  sync_warp();
  for (int i = 0; i < 4; ++i) c.out[4 * t + i] = shared[4 * (31 - t) + i];
  wait_copies<0>();
  sync_warp();
  for (int i = 0; i < 4; ++i) c.out[128 + 4 * t + i] = shared[128 + 4 * (31 - t) + i];
}

void copies() {
  Array<float> in(256), out(256);
  for (int i = 0; i < 256; ++i) in[i] = float(i);
  run("copies", copies_kernel, 32, 1024, {in.data, out.data, {}});
  expect("cp.async", out, [](int i) {
    const int from = 31 - i % 128 / 4;
    return i < 128 && from % 3 == 0 ? 0.0f : float(i / 128 * 128 + 4 * from + i % 4);
  });
}

// ---- matrices ----------------------------------------------------------------------------------

template <bool kTransposed>
FASTATTN_KERNEL(32, 1)
matrices_kernel(FASTATTN_PARAMS Call c) {
  FASTATTN_SHARED(memory);
  auto* shared = reinterpret_cast<uint16_t*>(memory);  // four matrices, row after row
  const int t = thread_x();
  for (int i = 0; i < 8; ++i) shared[8 * t + i] = uint16_t(8 * t + i);
  sync_warp();
  uint32_t r[4];
  if (kTransposed)
    load_matrices_transposed(r, shared + 8 * t);
  else
    load_matrices(r, shared + 8 * t);
  for (int i = 0; i < 4; ++i) {
    c.out[8 * t + 2 * i] = float(r[i] & 0xFFFF);
    c.out[8 * t + 2 * i + 1] = float(r[i] >> 16);
  }
}

void matrices() {
  Array<float> out(256);
  run("ldmatrix", matrices_kernel<false>, 32, 512, {nullptr, out.data, {}});
  expect("ldmatrix", out, [](int i) {
    const int lane = i / 8, matrix = i % 8 / 2, row = lane / 4, column = lane % 4 * 2 + i % 2;
    return float(64 * matrix + 8 * row + column);
  });
  run("ldmatrix.trans", matrices_kernel<true>, 32, 512, {nullptr, out.data, {}});
  expect("ldmatrix.trans", out, [](int i) {
    const int lane = i / 8, matrix = i % 8 / 2, column = lane / 4, row = lane % 4 * 2 + i % 2;
    return float(64 * matrix + 8 * row + column);
  });
}

// a (16 x 16), then b (16 x 8) as (8, 16): fragments are pairs along the summed dimension.
template <typename T>
FASTATTN_KERNEL(32, 1)
multiply_kernel(FASTATTN_PARAMS Call c) {
  const auto* a = static_cast<const uint32_t*>(c.in);
  const auto* b = a + 128;
  const int row = thread_x() / 4, pair = thread_x() % 4;
  const uint32_t fa[4] = {a[8 * row + pair], a[8 * (row + 8) + pair], a[8 * row + pair + 4],
                          a[8 * (row + 8) + pair + 4]};
  float d[4] = {1, 2, 3, 4};
  multiply<T>(d, fa, b[8 * row + pair], b[8 * row + pair + 4]);
  for (int i = 0; i < 4; ++i) c.out[(row + i / 2 * 8) * 8 + 2 * pair + i % 2] = d[i];
}

template <typename T>
void multiply_of(const char* name) {
  Array<uint16_t> in(384);
  Array<float> out(128);
  for (int i = 0; i < 384; ++i) in[i] = bits_of_digit<T>(i);
  run(name, multiply_kernel<T>, 32, 0, {in.data, out.data, {}});
  expect(name, out, [](int i) {
    const int row = i / 8, column = i % 8;
    float sum = float(1 + column % 2 + row / 8 * 2);
    for (int k = 0; k < 16; ++k) sum += float(digit(16 * row + k) * digit(256 + 16 * column + k));
    return sum;
  });
}

// ---- numbers -----------------------------------------------------------------------------------

FASTATTN_KERNEL(32, 1) numbers_kernel(FASTATTN_PARAMS Call c) {
  const float x = static_cast<const float*>(c.in)[thread_x()];
  float* out = c.out + 8 * thread_x();
  out[0] = to_float(from_float<bf16>(x));
  out[1] = to_float(from_float<f16>(x));
  const uint32_t b = pack<bf16>(x, 1.0f), h = pack<f16>(1.0f, x);
  out[2] = to_float(bf16{uint16_t(b)});
  out[3] = to_float(bf16{uint16_t(b >> 16)});
  out[4] = to_float(f16{uint16_t(h)});
  out[5] = to_float(f16{uint16_t(h >> 16)});
  out[6] = exp2_fast(x);
  out[7] = log2_fast(x);
}

float rounded(float x, int digits, int least_exponent, float largest) {
  if (x != x || std::isinf(x) || x == 0) return x;
  const int exponent = std::max(std::ilogb(x), least_exponent);
  const float unit = std::ldexp(1.0f, exponent - digits);
  const float y = std::nearbyint(x / unit) * unit;
  return std::fabs(y) > largest ? std::copysign(HUGE_VALF, x) : y;
}

void numbers() {
  const float some[] = {0,       1,     -1,     1.00390625f, 1.01171875f, 1.00048828f, 1.00146484f,
                        65504,   65519, 65520,  -70000,      3e38f,       3.4e38f,     6e-8f,
                        2.9e-8f, 1e-5f, 1e-30f, HUGE_VALF,   -HUGE_VALF,  NAN,         0.3f,
                        -0.7f,   2.5f,  -3.5f,  10.1f,       -20.7f,      126.9f,      -125.9f,
                        7,       100,   1e-3f,  5e4f};
  Array<float> in(32), out(256);
  for (int i = 0; i < 32; ++i) in[i] = some[i];
  run("numbers", numbers_kernel, 32, 0, {in.data, out.data, {}});
  expect("conversions", out, [&](int i) {
    const float x = some[i / 8], b = rounded(x, 7, -126, 3.3895314e38f),
                h = rounded(x, 10, -14, 65504.0f);
    const float want[] = {b, h, b, 1, 1, h};
    if (i % 8 < 6) return want[i % 8];
    const float exact = i % 8 == 6 ? std::exp2(x) : std::log2(x), got = out[i];
    const float error = std::fabs(got - exact);
    // ex2.approx: two units; lg2.approx: 2^-22, or as much of a large result.
    const bool close =
        i % 8 == 6 ? error <= 3e-7f * exact : error <= std::max(3e-7f, 3e-7f * std::fabs(exact));
    return close || (got != got && exact != exact) || got == exact ? got : exact;
  });
}

// ---- sm_90a ------------------------------------------------------------------------------------

// Two clusters of four blocks: each block reads what its thread's number has in the next block, and
// again after it has changed.
FASTATTN_KERNEL(64, 1) cluster_kernel(FASTATTN_PARAMS Call c) {
#ifdef FASTATTN_SM90
  FASTATTN_SHARED(memory);
  auto* shared = reinterpret_cast<float*>(memory);
  const int t = thread_x(), rank = cluster_rank(), next = (rank + 1) % cluster_size();
  float* out = c.out + 256 * block_x();
  out[t] = float(10 * rank + cluster_size());
  shared[t] = float(1000 * block_x() + t);
  sync_cluster();
  out[64 + t] = load_remote(shared + (t ^ 9), next);
  out[128 + t] = load_remote(shared + t, rank);
  sync_cluster();
  shared[t] = float(-1000 * block_x() - t);
  sync_cluster();
  out[192 + t] = load_remote(shared + (63 - t), next);
  sync_cluster();
#endif
}

void clusters() {
  Array<float> out(8 * 256);
  run("clusters", cluster_kernel, 64, 256, {nullptr, out.data, {}}, Grid{8, 1, 1, 4});
  expect("clusters", out, [](int i) {
    const int block = i / 256, t = i % 64, next = block / 4 * 4 + (block + 1) % 4;
    const int want[] = {10 * (block % 4) + 4, 1000 * next + (t ^ 9), 1000 * block + t,
                        -1000 * next - (63 - t)};
    return float(want[i % 256 / 64]);
  });
}

// Warp 0 hands numbers to warp 1 by a barrier, twice through its phases; then by a named barrier.
FASTATTN_KERNEL(64, 1) barriers_kernel(FASTATTN_PARAMS Call c) {
#ifdef FASTATTN_SM90
  FASTATTN_SHARED(memory);
  auto* shared = reinterpret_cast<float*>(memory);
  auto* full = reinterpret_cast<Mbarrier*>(memory + 128);
  auto* empty = full + 1;
  const int lane = thread_x() % 32;
  const bool writes = thread_x() < 32;
  if (thread_x() == 0) {
    init_barrier(full, 32);
    init_barrier(empty, 32);
    fence_async();
  }
  sync_threads();
  for (int n = 0; n < 4; ++n) {
    if (writes) {
      wait_barrier(empty, (n & 1) ^ 1);
      shared[lane] = float(100 * n + lane);
      arrive(full);
    } else {
      wait_barrier(full, n & 1);
      c.out[32 * n + lane] = shared[31 - lane];
      arrive(empty);
    }
  }
  if (writes) {
    wait_barrier(empty, 1);
    shared[lane] = float(1000 + lane);
    arrive_named(3, 64);
  } else {
    sync_named(3, 64);
    c.out[128 + lane] = shared[31 - lane];
  }
#endif
}

void barriers() {
  Array<float> out(160);
  run("mbarrier", barriers_kernel, 64, 144, {nullptr, out.data, {}});
  expect("mbarrier and bar", out, [](int i) {
    return i < 128 ? float(100 * (i / 32) + 31 - i % 32) : float(1000 + 31 - i % 32);
  });
}

// A box that reaches over the edges, as it lies in shared memory.
FASTATTN_KERNEL(32, 1) box_kernel(FASTATTN_PARAMS Call c) {
#ifdef FASTATTN_SM90
  FASTATTN_SHARED(memory);
  auto* barrier = reinterpret_cast<Mbarrier*>(memory + 2048);
  if (thread_x() == 0) {
    init_barrier(barrier, 1);
    fence_async();
    prefetch_map(&c.map);
    arrive_expecting(barrier, 2048);
    copy_box(memory, &c.map, barrier, 64, 12, 1, 1);
  }
  sync_threads();
  wait_barrier(barrier, 0);
  const auto* got = reinterpret_cast<const bf16*>(memory);
  for (int i = thread_x(); i < 1024; i += 32) c.out[i] = to_float(got[i]);
#endif
}

void box() {
  constexpr int kColumns = 104, kRows = 20, kHeads = 2, kBatch = 2;
  Array<uint16_t> in(size_t(kColumns) * kRows * kHeads * kBatch);
  for (size_t i = 0; i < in.size; ++i) in[i] = bits_of_digit<bf16>(int(i));
  View view;
  view.data = in.data;
  view.stride[0] = kColumns * kRows * kHeads;
  view.stride[1] = kColumns * kRows;
  view.stride[2] = kColumns;
  view.stride[3] = 1;
  Array<float> out(1024);
  Call c{nullptr, out.data,
         tensor_map_of("box", view, {{kColumns, kRows, kHeads, kBatch}}, DType::kBFloat16, 16)};
  run("box", box_kernel, 32, 2048 + 8, c);
  expect("cp.async.bulk.tensor", out, [&](int i) {
    const int row = i / 64, chunk = (i % 64 / 8) ^ (row & 7);  // the 128-byte swizzle
    const int column = 64 + 8 * chunk + i % 8, at = 12 + row;
    if (column >= kColumns || at >= kRows) return 0.0f;
    return float(digit(((kHeads + 1) * kRows + at) * kColumns + column));
  });
}

// d = a . b^T or a . b of 64 columns of `a`, with one panel of each in shared memory.
template <typename T, int kN, bool kOfColumns>
FASTATTN_KERNEL(kWarpgroup, 1)
products_kernel(FASTATTN_PARAMS Call c) {
#ifdef FASTATTN_SM90
  FASTATTN_SHARED(memory);
  const auto* in = static_cast<const uint16_t*>(c.in);
  auto* a = memory;
  auto* b = memory + 64 * kPanelRowBytes;
  // Of b.columns: 64 rows to be summed over, panels of 64 of the kN columns.
  constexpr int kRowsB = kOfColumns ? 64 : kN;
  constexpr int kColumnsB = kOfColumns ? kN : 64;
  const auto put = [&](unsigned char* tile, int rows, int row, int column, uint16_t bits) {
    auto* at = tile + column / 64 * rows * kPanelRowBytes + row * kPanelRowBytes;
    reinterpret_cast<uint16_t*>(at + ((column % 64 / 8) ^ (row & 7)) * 16)[column % 8] = bits;
  };
  for (int i = thread_x(); i < 64 * 64; i += kWarpgroup) put(a, 64, i / 64, i % 64, in[i]);
  for (int i = thread_x(); i < kRowsB * kColumnsB; i += kWarpgroup)
    put(b, kRowsB, i / kColumnsB, i % kColumnsB, in[4096 + i]);
  fence_async();
  sync_threads();
  float d[kN / 2];
  for (int i = 0; i < kN / 2; ++i) d[i] = 1000.0f;
  const int lane = thread_x() % 32;
  const int row = thread_x() / 32 * 16 + lane / 4;
  uint32_t fragments[4][4];
  for (int k = 0; k < 4; ++k)
    for (int i = 0; i < 4; ++i) {
      const auto* from = in + 64 * (row + i % 2 * 8) + 16 * k + lane % 4 * 2 + i / 2 * 8;
      fragments[k][i] = from[0] | uint32_t(from[1]) << 16;
    }
  const uint64_t of_a = tile_descriptor(a, 64 * kPanelRowBytes);
  const uint64_t of_b = tile_descriptor(b, kRowsB * kPanelRowBytes);
  pin(d);
  pin(fragments);
  fence_products();
  FASTATTN_UNROLL for (int k = 0; k < 4; ++k) {
    if constexpr (kOfColumns)
      multiply_columns_async<T>(d, fragments[k], advanced(of_b, 16 * k * kPanelRowBytes), k > 0);
    else
      multiply_rows_async<T>(d, advanced(of_a, 32 * k), advanced(of_b, 32 * k), k > 0);
  }
  commit_products();
  wait_products<0>();
  pin(d);
  for (int t = 0; t < kN / 8; ++t)
    for (int i = 0; i < 4; ++i)
      c.out[(row + i / 2 * 8) * kN + 8 * t + lane % 4 * 2 + i % 2] = d[4 * t + i];
#endif
}

template <typename T, int kN, bool kOfColumns>
void products_of() {
  const std::string name = std::string("wgmma ") + (kOfColumns ? "columns " : "rows ") +
                           (std::is_same<T, bf16>::value ? "bf16 " : "f16 ") + std::to_string(kN);
  Array<uint16_t> in(4096 + 64 * kN);
  for (size_t i = 0; i < in.size; ++i) in[i] = bits_of_digit<T>(int(i));
  Array<float> out(64 * kN);
  run(name.c_str(), products_kernel<T, kN, kOfColumns>, kWarpgroup,
      size_t(64 + kN) * kPanelRowBytes, {in.data, out.data, {}});
  expect(name.c_str(), out, [](int i) {
    const int row = i / kN, column = i % kN;
    float sum = 0;
    for (int k = 0; k < 64; ++k)
      sum += float(digit(64 * row + k) *
                   digit(4096 + (kOfColumns ? k * kN + column : column * 64 + k)));
    return sum;
  });
}

template <typename T>
void products() {
  products_of<T, 64, false>();
  products_of<T, 80, false>();
  products_of<T, 96, false>();
  products_of<T, 128, false>();
  products_of<T, 176, false>();
  products_of<T, 64, true>();
  products_of<T, 128, true>();
  products_of<T, 256, true>();
}

// Registers change hands, and numbers stay.
FASTATTN_KERNEL(3 * kWarpgroup, 1) registers_kernel(FASTATTN_PARAMS Call c) {
#ifdef FASTATTN_SM90
  float number = float(thread_x());
  if (thread_x() < kWarpgroup) {
    give_registers<24>();
    c.out[thread_x()] = number;
  } else {
    take_registers<240>();
    c.out[thread_x()] = number + 1;
  }
#endif
}

void registers() {
  Array<float> out(3 * kWarpgroup);
  run("setmaxnreg", registers_kernel, 3 * kWarpgroup, 0, {nullptr, out.data, {}});
  expect("setmaxnreg", out, [](int i) { return float(i < kWarpgroup ? i : i + 1); });
}

}  // namespace

int main(int count, char** arguments) {
  int capability = 90;
#ifdef FASTATTN_EMULATE
  const std::string mode = count > 1 ? arguments[1] : "lazy";
  using emulator::Completion;
  if (mode == "eager") emulator::set_options({Completion::kEager, 0});
  if (mode.rfind("random:", 0) == 0)
    emulator::set_options({Completion::kRandom, std::strtoull(mode.c_str() + 7, nullptr, 10)});
#else
  (void)count, (void)arguments;
#endif
  try {
#ifndef FASTATTN_EMULATE
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    capability = 10 * properties.major + properties.minor;
    std::printf("%s, sm_%d\n", properties.name, capability);
#endif
    exchange();
    shared_memory();
    copies();
    matrices();
    multiply_of<bf16>("mma bf16");
    multiply_of<f16>("mma f16");
    numbers();
    if (capability == 90) {
      clusters();
      barriers();
      box();
      products<bf16>();
      products<f16>();
      registers();
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return failures ? 1 : 0;
}
