// Transaction barriers, copies of tiles, registers and named barriers. The products are in
// products.cpp. Compiled without sanitizers, as emulator.cpp is.
#include "hopper.h"

#include <cstring>
#include <map>
#include <stdexcept>

#include "hopper_state.h"

namespace emulator {

Hopper& hopper() {
  static Hopper* h = new Hopper;
  return *h;
}

// The state is of one block.
static void expect_no_cluster(const char* what, Where where) {
  if (cluster_size() > 1) fail(std::string(what) + ": not emulated in clusters", where);
}

uint32_t in_shared(const void* p, size_t bytes, const char* what, Where where) {
  expect_no_cluster(what, where);
  const auto* at = static_cast<const unsigned char*>(p);
  if (at < shared_memory() || at + bytes > shared_memory() + shared_bytes())
    fail(std::string(what) + ": out of shared memory", where);
  return uint32_t(at - shared_memory());
}

namespace {

constexpr int kRegisters = 64 << 10;  // of a multiprocessor

// ---- transaction barriers ----------------------------------------------------------------------

TransactionBarrier& barrier_at(void* p, const char* what, Where where) {
  const auto found = hopper().barriers.find(in_shared(p, 8, what, where));
  if (found == hopper().barriers.end()) fail(std::string(what) + ": no mbarrier there", where);
  return found->second;
}

void end_phase_if_due(TransactionBarrier& b) {
  if (b.left || b.bytes) return;
  ++b.phase;
  b.left = b.arrivals;
}

// ---- copies ------------------------------------------------------------------------------------

// Numbers of the tensor that a row of the box has, from its first column on.
uint64_t columns_there(const BoxCopy& c) {
  const TensorMap& m = c.map;
  const int64_t x = c.at[0];
  if (x < 0 || uint64_t(x) >= m.size[0]) return 0;
  const uint64_t left = m.size[0] - uint64_t(x);
  return left < m.box[0] ? left : m.box[0];
}

const char* row_of(const BoxCopy& c, uint32_t row) {
  const TensorMap& m = c.map;
  const int64_t at[3] = {c.at[1] + int64_t(row), c.at[2], c.at[3]};
  const char* p = m.data + int64_t(c.at[0]) * 2;
  for (int i = 0; i < 3; ++i) {
    if (at[i] < 0 || uint64_t(at[i]) >= m.size[i + 1]) return nullptr;
    p += at[i] * int64_t(m.step[i]);
  }
  return p;
}

void complete(const BoxCopy& c) {
  const uint64_t columns = columns_there(c);
  const uint32_t row_bytes = c.map.box[0] * 2;
  for (uint32_t r = 0; r < c.map.box[1]; ++r) {
    unsigned char row[128] = {};
    const char* from = row_of(c, r);
    if (from && columns) std::memcpy(row, from, columns * 2);
    for (uint32_t chunk = 0; chunk < row_bytes / 16; ++chunk)
      std::memcpy(shared_memory() + swizzled(c.shared + r * row_bytes + 16 * chunk),
                  row + 16 * chunk, 16);
  }
  TransactionBarrier& b = hopper().barriers.at(c.barrier);
  b.bytes -= c.bytes;
  end_phase_if_due(b);
}

void complete_one(size_t i) {
  Hopper& h = hopper();
  const BoxCopy copy = h.copies[i];
  h.copies.erase(h.copies.begin() + long(i));
  complete(copy);
}

void begin_block() {
  const Untracked untracked;
  Hopper& h = hopper();
  h.barriers.clear();
  h.copies.clear();
  for (NamedBarrier& b : h.named) b.arrived = 0;
  for (WarpProducts& w : h.products) {
    w.pending.clear();
    w.sums.clear();
    w.group = w.issued = 0;
    w.fenced = false;
  }
  for (std::vector<uint64_t>& order : h.sequence) order.clear();
  for (int& r : h.registers) r = 0;
  h.free_registers = -1;
}

std::string end_block() {
  Hopper& h = hopper();
  for (const WarpProducts& w : h.products)
    if (!w.pending.empty()) return "ends with products that were never waited for";
  if (!h.copies.empty()) return "ends with a tile under way";
  for (const auto& [at, b] : h.barriers)
    if (b.bytes) return "ends with an mbarrier that still expects bytes";
  for (const NamedBarrier& b : h.named)
    if (b.arrived) return "ends with arrivals at a named barrier that nobody waited for";
  return "";
}

bool advance() {
  const Untracked untracked;
  Hopper& h = hopper();
  if (h.copies.empty()) return false;
  complete_one(completion() == Completion::kRandom ? chance() % h.copies.size() : 0);
  return true;
}

void poll_units() {
  const Untracked untracked;
  Hopper& h = hopper();
  // Lanes poll thousands of times while a tile of keys is worked on.
  if (!h.copies.empty() && chance() % 16384 == 0) complete_one(chance() % h.copies.size());
}

const bool attached = (attach({begin_block, end_block, advance, poll_units}), true);

}  // namespace

void init_barrier(void* barrier, int arrivals, Where where) {
  const Untracked untracked;
  (void)attached;
  const uint32_t at = in_shared(barrier, 8, "mbarrier.init", where);
  if (at % 8) fail("mbarrier.init: misaligned", where);
  if (arrivals < 1) fail("mbarrier.init: nobody arrives", where);
  TransactionBarrier& b = hopper().barriers[at];
  b.arrivals = b.left = arrivals;
  b.bytes = 0;
  b.phase = 0;
  b.owner = thread_x();
  b.fenced = false;
}

void fence_async() {
  const Untracked untracked;
  for (auto& [at, b] : hopper().barriers) b.fenced |= b.owner == thread_x();
}

void arrive(void* barrier, int64_t bytes, Where where) {
  const Untracked untracked;
  yield();
  TransactionBarrier& b = barrier_at(barrier, "mbarrier.arrive", where);
  if (b.left == 0) fail("mbarrier.arrive: more arrivals than the barrier has", where);
  tsan_release(&b);
  b.bytes += bytes;
  --b.left;
  end_phase_if_due(b);
  yield();
}

void wait_barrier(void* barrier, int parity, Where where) {
  const Untracked untracked;
  if (parity != 0 && parity != 1) fail("mbarrier.try_wait: a parity is 0 or 1", where);
  yield();
  struct State {
    TransactionBarrier* barrier;
    int64_t parity;
  } state{&barrier_at(barrier, "mbarrier.try_wait", where), parity};
  wait_until(
      "mbarrier.try_wait",
      [](void* p) {
        const auto& s = *static_cast<State*>(p);
        return (s.barrier->phase & 1) != s.parity;
      },
      &state, where);
  tsan_acquire(state.barrier);
}

TensorMap make_tensor_map(const char* name, const void* data, const uint64_t* size,
                          const uint64_t* step, const uint32_t* box) {
  const auto refuse = [&](const char* why) {
    throw std::runtime_error(std::string(name) + ": no tensor map: " + why);
  };
  TensorMap m{};
  m.data = static_cast<const char*>(data);
  if (uintptr_t(data) % 16) refuse("the address is no multiple of 16");
  for (int i = 0; i < 4; ++i) {
    m.size[i] = size[i];
    m.box[i] = box[i];
    if (size[i] < 1 || size[i] > uint64_t(1) << 32) refuse("a size out of range");
    if (box[i] < 1 || box[i] > 256) refuse("a box out of range");
  }
  for (int i = 0; i < 3; ++i) {
    m.step[i] = step[i];
    if (step[i] % 16 || step[i] >= uint64_t(1) << 40) refuse("a stride out of range");
  }
  if (box[0] * 2 != 128) refuse("rows of the box are not the 128 bytes of the swizzle");
  return m;
}

void copy_box(void* shared, const TensorMap& map, void* barrier, const int* at, Where where) {
  const Untracked untracked;
  Hopper& h = hopper();
  yield();
  BoxCopy c{};
  c.map = map;
  for (int i = 0; i < 4; ++i) c.at[i] = at[i];
  c.bytes = int64_t(map.box[0]) * map.box[1] * map.box[2] * map.box[3] * 2;
  c.shared = in_shared(shared, size_t(c.bytes), "bulk copy", where);
  if (uintptr_t(&map) % 64) fail("bulk copy: the tensor map is misaligned", where);
  if (c.shared % 1024)
    fail("bulk copy: the tile is no multiple of the swizzle's 1024 bytes", where);
  TransactionBarrier& b = barrier_at(barrier, "bulk copy", where);
  if (!b.fenced)
    fail("bulk copy: the mbarrier was initialised without fence.proxy.async behind it", where);
  c.barrier = uint32_t(static_cast<unsigned char*>(barrier) - shared_memory());
  for (const auto& [place, other] : h.barriers)
    if (place + 8 > c.shared && place < c.shared + c.bytes)
      fail("bulk copy: overwrites an mbarrier", where);
  for (uint32_t r = 0; r < map.box[1]; ++r)
    if (const char* from = row_of(c, r))
      if (columns_there(c) && is_poisoned(from, columns_there(c) * 2))
        fail("bulk copy: out of global memory", where);
  writes(shared_memory() + c.shared, size_t(c.bytes));
  tsan_release(&b);
  if (completion() == Completion::kEager) {
    complete(c);
    return;
  }
  std::memset(shared_memory() + c.shared, 0xFF, size_t(c.bytes));
  h.copies.push_back(c);
  yield();
}

// ---- registers and named barriers --------------------------------------------------------------

void set_registers(int count, bool more, Where where) {
  const Untracked untracked;
  Hopper& h = hopper();
  if (h.free_registers < 0) {  // what the launch leaves: 8 at a time to a thread
    h.given = kRegisters / threads() / 8 * 8;
    h.free_registers = kRegisters - h.given * threads();
  }
  expect_no_cluster("setmaxnreg", where);
  if (count % 8 || count < 24 || count > 256) fail("setmaxnreg: 24 to 256, by 8", where);
  int& mine = h.registers[thread_x()];
  if (!mine) mine = h.given;
  if (more != (count > mine) && count != mine)
    fail("setmaxnreg: " + std::to_string(mine) + " registers are held already", where);
  struct State {
    int* free;
    int wanted;
  } state{&h.free_registers, count - mine};
  wait_until(
      "setmaxnreg",
      [](void* p) {
        const auto& s = *static_cast<State*>(p);
        if (*s.free < s.wanted) return false;
        *s.free -= s.wanted;  // before the next one asks
        return true;
      },
      &state, where);
  mine = count;
}

void sync_named(int id, int count, bool waits, Where where) {
  const Untracked untracked;
  yield();
  expect_no_cluster("named barrier", where);
  if (id < 1 || id >= Hopper::kNamed) fail("named barrier: 1 to 15", where);
  if (count % 32) fail("named barrier: whole warps", where);
  NamedBarrier& b = hopper().named[id];
  if (b.arrived && b.count != count) fail("named barrier: others expect another count", where);
  tsan_release(&b);
  b.count = count;
  const int64_t round = b.rounds;
  if (++b.arrived == count) {
    b.arrived = 0;
    ++b.rounds;
  }
  if (!waits) return;
  struct State {
    NamedBarrier* barrier;
    int64_t round;
  } state{&b, round};
  wait_until(
      "a named barrier",
      [](void* p) {
        const auto& s = *static_cast<State*>(p);
        return s.barrier->rounds != s.round;
      },
      &state, where);
  tsan_acquire(&b);
}

}  // namespace emulator
