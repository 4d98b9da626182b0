// What layer norm and softmax share: rows in packs of 16 bytes, groups of threads that take a row
// each, and their sums.
#pragma once
#include <stdexcept>
#include <string>

#include "launch.h"
#include "params.h"
#include "ptx_sm90.h"

namespace fastattn {

// ---- packs -------------------------------------------------------------------------------------

template <typename T>
constexpr int kPack = 16 / int(sizeof(T));  // numbers of 16 bytes

template <typename T>
struct alignas(16) Pack {
  T number[kPack<T>];
};

// Numbers [column, column + kPack) of a row; 0 beyond its end. `aligned`: the row starts at a
// multiple of 16 bytes. A pack of an unaligned row, or that the row ends in, goes number by number.
template <typename T>
FASTATTN_DEVICE Pack<T> load_pack(const T* row, int64_t column, int64_t width, bool aligned) {
  if (aligned && column + kPack<T> <= width) return *reinterpret_cast<const Pack<T>*>(row + column);
  Pack<T> pack;
  FASTATTN_UNROLL
  for (int i = 0; i < kPack<T>; ++i)
    pack.number[i] = column + i < width ? row[column + i] : from_float<T>(0);
  return pack;
}

template <typename T>
FASTATTN_DEVICE void store_pack(T* row, int64_t column, int64_t width, bool aligned,
                                const Pack<T>& pack) {
  if (aligned && column + kPack<T> <= width) {
    *reinterpret_cast<Pack<T>*>(row + column) = pack;
    return;
  }
  FASTATTN_UNROLL
  for (int i = 0; i < kPack<T>; ++i)
    if (column + i < width) row[column + i] = pack.number[i];
}

// N numbers of a dtype known at run time, to and from float32.
template <typename T, int N>
FASTATTN_DEVICE void load_as(float (&out)[N], const T* row, int64_t column, int64_t width,
                             bool aligned) {
  constexpr int kStep = N < kPack<T> ? N : kPack<T>;
  if (kStep == kPack<T>) {
    FASTATTN_UNROLL
    for (int at = 0; at < N; at += kStep) {
      const Pack<T> pack = load_pack(row, column + at, width, aligned);
      FASTATTN_UNROLL
      for (int i = 0; i < kStep; ++i) out[at + i] = to_float(pack.number[i]);
    }
  } else {
    FASTATTN_UNROLL
    for (int i = 0; i < N; ++i) out[i] = column + i < width ? to_float(row[column + i]) : 0.0f;
  }
}

template <int N>
FASTATTN_DEVICE void load_any(float (&out)[N], const void* row, DType dtype, int64_t column,
                              int64_t width, bool aligned) {
  if (dtype == DType::kFloat32)
    load_as(out, static_cast<const float*>(row), column, width, aligned);
  else if (dtype == DType::kBFloat16)
    load_as(out, static_cast<const bf16*>(row), column, width, aligned);
  else
    load_as(out, static_cast<const f16*>(row), column, width, aligned);
}

template <typename T, int N>
FASTATTN_DEVICE void store_as(T* row, int64_t column, int64_t width, bool aligned,
                              const float (&values)[N]) {
  constexpr int kStep = N < kPack<T> ? N : kPack<T>;
  if (kStep == kPack<T>) {
    FASTATTN_UNROLL
    for (int at = 0; at < N; at += kStep) {
      Pack<T> pack;
      FASTATTN_UNROLL
      for (int i = 0; i < kStep; ++i) pack.number[i] = from_float<T>(values[at + i]);
      store_pack(row, column + at, width, aligned, pack);
    }
  } else {
    FASTATTN_UNROLL
    for (int i = 0; i < N; ++i)
      if (column + i < width) row[column + i] = from_float<T>(values[i]);
  }
}

template <int N>
FASTATTN_DEVICE void store_any(void* row, DType dtype, int64_t column, int64_t width, bool aligned,
                               const float (&values)[N]) {
  if (dtype == DType::kFloat32)
    store_as(static_cast<float*>(row), column, width, aligned, values);
  else if (dtype == DType::kBFloat16)
    store_as(static_cast<bf16*>(row), column, width, aligned, values);
  else
    store_as(static_cast<f16*>(row), column, width, aligned, values);
}

FASTATTN_HD bool is_aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

FASTATTN_DEVICE void* at_bytes(const void* p, int64_t numbers, DType dtype) {
  return static_cast<char*>(const_cast<void*>(p)) + numbers * (dtype == DType::kFloat32 ? 4 : 2);
}

// ---- groups of threads that share a row --------------------------------------------------------

// How a kernel walks rows of `width` numbers in packs of `pack`.
struct RowPlan {
  int threads;   // of a group, in a block
  int groups;    // of a block: rows taken at once
  int blocks;    // of the cluster that shares a row; 1: no cluster
  int held;      // packs that a thread keeps in registers: 1, 4, or 0: elsewhere
  bool shared;   // 0: there is room for the row in shared memory; else it is read again
  size_t bytes;  // of shared memory
};

constexpr size_t kReduceBytes = 128;
constexpr int kWideThreads = 512;  // more of them would have too few registers
constexpr int kMaxCluster = 8;     // of every device that has clusters

// A warp, a block, or for wide rows all the blocks of a cluster. Sums are taken in one order,
// whatever the machine does.
template <bool kWide>
struct RowGroup {
  RowPlan plan;   // a copy: nvcc takes more registers for a reference
  float* shared;  // 32 floats for a block; a warp needs none
  int blocks = 1, rank = 0, turn = 0;

  FASTATTN_DEVICE RowGroup(const RowPlan& p, unsigned char* memory)
      : plan(p), shared(reinterpret_cast<float*>(memory)) {
    if (!kWide) return;
    blocks = cluster_size();
    rank = cluster_rank();
  }
  // At the end of the kernel: until no thread of the cluster reads another block's memory any more.
  FASTATTN_DEVICE void leave() const {
    if (blocks > 1) sync_cluster();
  }

  FASTATTN_DEVICE int own_threads() const { return kWide ? kWideThreads : plan.threads; }
  // Of a constant the steps through a row would be too, and nvcc keep an address for each number.
  FASTATTN_DEVICE int threads() const { return plan.threads * blocks; }
  FASTATTN_DEVICE int thread() const {
    return kWide ? rank * kWideThreads + thread_x() : thread_x() % plan.threads;
  }
  FASTATTN_DEVICE int64_t first_row() const {
    return kWide ? block_x() / blocks
                 : int64_t(block_x()) * plan.groups + thread_x() / plan.threads;
  }
  FASTATTN_DEVICE int64_t row_step() const {
    return kWide ? grid_x() / blocks : int64_t(grid_x()) * plan.groups;
  }

  // Where this thread keeps its k-th of what its block holds of a row: `parts` of 16 bytes each, of
  // which neighbours are those of neighbouring threads, so that none share banks.
  FASTATTN_DEVICE int place(int k, int parts, int part) const {
    return (k * parts + part) * kWideThreads + thread_x();
  }

  template <typename Join>
  FASTATTN_DEVICE float join(float value, Join f) {
    FASTATTN_UNROLL
    for (int lanes = 16; lanes; lanes >>= 1) value = f(value, shuffle_xor(value, lanes));
    if (own_threads() == 32) return value;
    const int warps = own_threads() / 32, warp = thread_x() / 32, lane = thread_x() % 32;
    sync_threads();  // the last result has been read
    if (lane == 0) store_shared(shared + warp, value);
    sync_threads();
    float result = load_shared(shared);
    for (int w = 1; w < warps; ++w) result = f(result, load_shared(shared + w));
    if (blocks == 1) return result;
    result = of_block(result);
    for (int step = 1; step < blocks; step *= 2) result = f(result, shuffle_xor(result, step));
    return result;
  }
  // The value of the group's first thread.
  FASTATTN_DEVICE float first(float value) {
    if (own_threads() == 32) return shuffle(value, 0);
    if (blocks > 1) return shuffle(of_block(value), 0);
    sync_threads();
    if (thread_x() == 0) store_shared(shared, value);
    sync_threads();
    return load_shared(shared);
  }
  FASTATTN_DEVICE float sum(float value) {
    return join(value, [](float a, float b) { return a + b; });
  }
  FASTATTN_DEVICE float max(float value) {
    return join(value, [](float a, float b) { return fmaxf(a, b); });
  }

 private:
  // Lane l gets the value of the first thread of the cluster's block l % blocks. The calls take two
  // places by turns: at the barrier of the next one all have read what was in the last one's.
  FASTATTN_DEVICE float of_block(float value) {
    float* own = shared + kWideThreads / 32 + turn;  // behind the sums of the warps
    turn ^= 1;
    if (thread_x() == 0) store_shared(own, value);
    sync_cluster();
    return load_remote(own, thread_x() & (blocks - 1));
  }
};

// What lies in shared memory for each pack of a row that registers don't hold. `most_blocks`: of a
// cluster.
inline RowPlan row_plan(int64_t width, int pack, int pack_bytes, size_t shared_limit,
                        int max_threads, int most_blocks) {
  const int64_t packs = (width + pack - 1) / pack;
  RowPlan plan{32, 4, 1, 1, false, kReduceBytes};
  if (packs > 32) plan.held = 4;
  if (packs <= 32 * 4) return plan;
  plan.groups = 1;
  plan.threads = 128;
  while (plan.threads * 4 < packs && plan.threads < max_threads) plan.threads *= 2;
  if (plan.threads * 4 >= packs) return plan;
  plan.held = 0;
  plan.threads = kWideThreads;
  for (int blocks = 1; blocks <= most_blocks; blocks *= 2) {
    const int64_t together = int64_t(kWideThreads) * blocks;
    const size_t bytes = kReduceBytes + size_t((packs + together - 1) / together) * kWideThreads *
                                            size_t(pack_bytes);
    if (bytes > shared_limit) continue;
    plan.blocks = blocks;
    plan.shared = true;
    plan.bytes = bytes;
    break;
  }
  return plan;
}

// Whether the rows that a view walks all begin at multiples of 16 bytes.
template <typename T>
inline bool rows_aligned(const View& v, const RowShape& rows) {
  const int64_t sizes[3] = {rows.n0, rows.n1, rows.n2};
  for (int i = 0; i < 3; ++i)
    if (sizes[i] > 1 && v.stride[i] % kPack<T> != 0) return false;
  return is_aligned(v.data);
}

// Calls f(T{}) with the stored type of a dtype.
template <typename F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(bf16{});
    case DType::kFloat16:
      return f(f16{});
    case DType::kFloat32:
      return f(float{});
    default:
      throw std::invalid_argument("expected float32, bfloat16 or float16");
  }
}

// ---- dropout -----------------------------------------------------------------------------------

struct RowDropout {
  Dropout given;
  uint32_t threshold;
  float scale;  // of what is kept
  bool on;

  RowDropout() = default;
  explicit RowDropout(const Dropout& d)
      : given(d),
        threshold(dropout_threshold(d.p)),
        scale(d.p < 1 ? float(1 / (1 - d.p)) : 0.0f),
        on(d.p > 0) {}

  // Numbers [column, column + N) of a row, column a multiple of 4: word j & 3 of the counter
  // (j / 4, row, row >> 32, 0) decides number j.
  template <int N>
  FASTATTN_DEVICE void apply(float (&values)[N], int64_t row, int64_t column) const {
    FASTATTN_UNROLL
    for (int at = 0; at < N; at += 4) {
      const Philox random = Philox::at(given.seed_now(), uint32_t((column + at) >> 2),
                                       uint32_t(row), uint32_t(uint64_t(row) >> 32), 0);
      FASTATTN_UNROLL
      for (int i = 0; i < 4; ++i)
        values[at + i] = random.word[i] >= threshold ? values[at + i] * scale : 0.0f;
    }
  }
};

// ---- launches ----------------------------------------------------------------------------------

// At most as many as a grid may have, in whole clusters: blocks walk on to what is left.
inline Grid grid_of(int64_t blocks, const Device& device, int cluster = 1) {
  const int64_t clusters = device.max_blocks / cluster;
  return Grid{(blocks < clusters ? blocks : clusters) * cluster, 1, 1, cluster};
}

// The plan of a row, of one block or of as many as clusters of the kernel for wide rows may have.
template <typename Call>
RowPlan plan_rows(const char* name, void (*wide)(Call), int64_t width, int pack, int pack_bytes,
                  int max_threads, const Device& device) {
  const auto plan_for = [&](int blocks) {
    return row_plan(width, pack, pack_bytes, device.shared_bytes, max_threads, blocks);
  };
  const RowPlan plan = plan_for(kMaxCluster);
  if (plan.blocks == 1 || holds_clusters(name, wide, device, plan.blocks, plan.threads, plan.bytes))
    return plan;
  return plan_for(1);
}

// A group, or a cluster, for each row. Names say which of the two an error is of.
template <typename Call>
void launch_rows(const char* name, void (*kernel)(Call), const Call& c, int64_t rows,
                 const Device& device) {
  const RowPlan& plan = c.plan;
  const std::string full = std::string(name) + (plan.blocks > 1 ? ", clusters" : "");
  const Grid grid = grid_of((rows + plan.groups - 1) / plan.groups, device, plan.blocks);
  launch(full.c_str(), kernel, grid, plan.threads * plan.groups, plan.bytes, device.stream, c);
}

// One pack a thread, four, or none: what the plan has a group hold of its row in registers.
template <typename Call>
void launch_rows(const char* name, void (*one)(Call), void (*four)(Call), void (*none)(Call),
                 const Call& c, int64_t rows, const Device& device) {
  const auto kernel = c.plan.held == 1 ? one : c.plan.held == 4 ? four : none;
  launch_rows(name, kernel, c, rows, device);
}

}  // namespace fastattn
