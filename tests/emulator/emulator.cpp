// The scheduler. Compiled without sanitizers: what lanes hand to one another here is no memory
// access of the kernel.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "machine.h"

namespace emulator {

Machine& machine() {
  static Machine* m = [] {
    auto* made = new Machine;
    if (const char* mode = std::getenv("FASTATTN_EMULATOR")) {
      if (!std::strncmp(mode, "eager", 5)) made->options.completion = Completion::kEager;
      if (!std::strncmp(mode, "random", 6)) {
        made->options.completion = Completion::kRandom;
        if (mode[6] == ':') made->options.seed = std::strtoull(mode + 7, nullptr, 10);
      }
    }
    return made;
  }();
  return *m;
}

std::string text(Where w) {
  const char* name = std::strrchr(w.file, '/');
  return std::string(name ? name + 1 : w.file) + ":" + std::to_string(w.line);
}

// ---- scheduling --------------------------------------------------------------------------------

namespace {

void go_to(Machine& m, Thread* next) {
  Thread* self = m.running;
  if (next == self) return;
  m.running = next;
  Context& from = self ? self->context : m.host;
  from.switch_to(next ? next->context : m.host);
}

Thread* first_of(Block& b, int warp, uint32_t ready) {
  return b.threads[warp * kLanes + __builtin_ctz(ready)].get();
}

Thread* next_of(Machine& m, Block& b, int warp) {
  for (int i = 0; i < m.warp_count; ++i) {
    const int w = (warp + i) % m.warp_count;
    if (b.warps[w].ready) return first_of(b, w, b.warps[w].ready);
  }
  return nullptr;
}

// The next thread that can run: of the same warp if there is one, in the order of lanes, else of
// the same block. A block of a cluster runs as far as it can before the next: from the first or
// from the last on, or by chance.
Thread* next_ready(Machine& m) {
  if (m.running) {
    Block& b = here(m);
    const int warp = m.running->index / kLanes, lane = m.running->index % kLanes;
    if (uint32_t ready = b.warps[warp].ready) {
      const uint32_t above = lane == kLanes - 1 ? 0 : ready & (~0u << (lane + 1));
      return first_of(b, warp, above ? above : ready);
    }
    if (m.block_count == 1 || !by_chance(m) || m.chance() % 2)
      if (Thread* next = next_of(m, b, by_chance(m) ? int(m.chance() % m.warp_count) : warp + 1))
        return next;
  }
  const int start = by_chance(m) && m.block_count > 1 ? int(m.chance() % m.block_count) : 0;
  for (int i = 0; i < m.block_count; ++i) {
    const int n = (start + i) % m.block_count;
    const bool from_last = m.options.completion == Completion::kEager;
    Block& b = m.blocks[from_last ? m.block_count - 1 - n : n];
    const int warp = by_chance(m) ? int(m.chance() % m.warp_count) : 0;
    if (Thread* next = next_of(m, b, warp)) return next;
  }
  return nullptr;
}

[[noreturn]] void end_launch(Machine& m, const std::string& message) {
  m.failure = message;
  go_to(m, nullptr);
  std::abort();  // never resumed
}

std::string name_of(Machine& m, const Thread& t) {
  const int64_t* at = m.blocks[t.block].at;
  char line[200];
  std::snprintf(line, sizeof line, "%s, block (%lld, %lld, %lld), thread %d", m.launch->kernel,
                (long long)at[0], (long long)at[1], (long long)at[2], t.index);
  return line;
}

// Calls f with every thread of the cluster.
template <typename F>
void each_thread(Machine& m, F f) {
  for (int n = 0; n < m.block_count; ++n)
    for (int i = 0; i < m.launch->threads; ++i) f(*m.blocks[n].threads[i]);
}

// Threads that wait for others' work and need not any more; `last`: those of wait_for_others.
bool wake(Machine& m, bool last) {
  bool any = false;
  each_thread(m, [&](Thread& t) {
    if (!t.ready || t.last != last || !t.ready(t.ready_state)) return;
    t.ready = nullptr;
    warp_of(m, t).ready |= 1u << (t.index % kLanes);
    any = true;
  });
  return any;
}

// Nobody can run: threads that wait for others' work may, or all are done, or never will be.
Thread* next_or_end(Machine& m) {
  if (Thread* next = next_ready(m)) return next;
  do {
    if (wake(m, false) || wake(m, true)) return next_ready(m);
  } while (m.unit.advance && m.unit.advance());
  each_thread(m, [&](const Thread& t) {
    if (!t.done && m.failure.empty())
      m.failure = name_of(m, t) + ": deadlock, waits at " + (t.waits_at ? t.waits_at : "?") + " (" +
                  text(t.where) + ")";
  });
  return nullptr;
}

void wait_here(Machine& m, const char* name, Where where) {
  Thread& t = *m.running;
  t.waits_at = name;
  t.where = where;
  go_to(m, next_or_end(m));
}

void thread_main() {
  Machine& m = machine();
  m.running->context.arrived();
  tsan_acquire(&m.start);
  here(m).started = true;
  m.launch->body(m.launch->params);
  Thread& t = *m.running;
  if (!t.copies.empty())
    end_launch(m, name_of(m, t) + ": ends with a copy that it never waited for");
  Block& block = here(m);
  Warp& warp = block.warps[t.index / kLanes];
  const uint32_t bit = 1u << (t.index % kLanes);
  if (warp.arrived && (warp.mask & bit))
    end_launch(m, name_of(m, t) + ": ends while its warp waits for it at " + warp.name + " (" +
                      text(warp.where) + ")");
  for (const Barrier& b : block.barriers)
    if (b.arrived && b.count == m.launch->threads)
      end_launch(m, name_of(m, t) + ": ends while others wait for it at a barrier (" +
                        text(b.where) + ")");
  if (m.cluster.arrived)
    end_launch(m, name_of(m, t) +
                      ": ends while others wait for it at the barrier of the cluster (" +
                      text(m.cluster.where) + ")");
  t.done = true;
  ++block.done;
  warp.ready &= ~bit;
  warp.done |= bit;
  tsan_release(&m.end_of_launch);
  go_to(m, next_or_end(m));
  std::abort();  // never resumed
}

// Where the threads of blocks are, by turns. Blocks in one place are ordered for ThreadSanitizer,
// as if one had waited for the other: three that follow one another must not be, nor those of one
// rank in three clusters. More places would see more, but its threads are slow to make and to
// order.
int slots_for(int cluster) {
#ifdef EMULATOR_TSAN
  return cluster == 1 ? 3 : cluster + 1;
#else
  return cluster;
#endif
}

// Block n of the cluster that begins with block `first` of the grid and is the `turn`-th to run.
void begin_block(Machine& m, int n, int64_t turn, int64_t first) {
  const Launch& l = *m.launch;
  Block& b = m.blocks[n];
  b.threads = m.slots[(turn * l.cluster + n) % slots_for(l.cluster)];
  b.done = 0;
  b.started = false;
  b.at[0] = (first + n) % l.grid[0];
  b.at[1] = (first + n) / l.grid[0] % l.grid[1];
  b.at[2] = (first + n) / l.grid[0] / l.grid[1];
  // Exactly as large as asked for, so that AddressSanitizer sees the end; full of NaNs.
  const size_t bytes = l.shared_bytes ? l.shared_bytes : 1;
  if (!b.shared) {
    void* shared = nullptr;
    if (posix_memalign(&shared, 1024, bytes)) throw std::bad_alloc();
    b.shared = static_cast<unsigned char*>(shared);
  }
  std::memset(b.shared, 0xFF, bytes);
  for (int i = 0; i < l.threads; ++i) {
    if (!b.threads[i]) {
      b.threads[i] = std::make_unique<Thread>();
      b.threads[i]->copies.reserve(kMaxCopies);
    }
    Thread& t = *b.threads[i];
    t.index = i;
    t.block = n;
    t.done = false;
    t.waits_at = nullptr;
    t.ready = nullptr;
    t.last = false;
    t.copies.clear();
    t.group = 0;
    t.context.prepare(thread_main);
  }
  for (int w = 0; w < m.warp_count; ++w) {
    b.warps[w].ready = ~0u;
    b.warps[w].done = b.warps[w].arrived = 0;
  }
  for (Barrier& barrier : b.barriers) {
    barrier.arrived = 0;
    for (uint32_t& lanes : barrier.waiting) lanes = 0;
  }
}

void run_cluster(Machine& m, int64_t turn, int64_t first) {
  m.block_count = m.launch->cluster;
  m.warp_count = m.launch->threads / kLanes;
  m.cluster.arrived = 0;
  for (int n = 0; n < m.block_count; ++n) begin_block(m, n, turn, first);
  m.running = nullptr;
  if (m.unit.begin) m.unit.begin();
  tsan_release(&m.start);
  go_to(m, next_ready(m));
  if (m.unit.end && m.failure.empty()) {
    const std::string wrong = m.unit.end();
    if (!wrong.empty()) m.failure = name_of(m, *m.blocks[0].threads[0]) + ": " + wrong;
  }
  if (!m.failure.empty()) each_thread(m, [](Thread& t) { t.context.abandon(); });
  for (int n = 0; n < m.block_count; ++n) {
    Block& b = m.blocks[n];
    for (int w = 0; w < m.warp_count; ++w) judge_accesses(m, b.warps[w]);
#ifdef EMULATOR_TSAN  // the next block is ordered behind none of these threads
    m.left.push_back(b.shared);
    b.shared = nullptr;
#endif
  }
}

}  // namespace

// ---- tests -------------------------------------------------------------------------------------

void set_options(const Options& options) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  m.options = options;
}

std::vector<std::string> take_bank_conflicts() {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  std::vector<std::string> lines;
  for (const auto& [place, ways] : m.conflicts)
    lines.push_back(place + ": " + std::to_string(ways) + " ways");
  m.conflicts.clear();
  return lines;
}

std::vector<std::string> take_rare() {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  std::vector<std::string> names;
  for (const char* what : m.rare)
    if (what) names.push_back(what);
  for (const char*& what : m.rare) what = nullptr;
  return names;
}

std::vector<std::string> take_launches() {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  std::vector<std::string> names;
  for (const auto& [name, count] : m.launches) names.push_back(name);
  m.launches.clear();
  return names;
}

void launch(const Launch& l) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  ++m.launches[l.kernel];
  const auto refuse = [&](const char* why) {
    throw std::runtime_error(std::string(l.kernel) + ": " + why);
  };
  if (l.threads < 1 || l.threads > kMaxThreads || l.threads % kLanes) refuse("bad block size");
  if (l.shared_bytes > kMaxShared) refuse("more shared memory than a multiprocessor has");
  for (int axis = 0; axis < 3; ++axis)
    if (l.grid[axis] < 1 || l.grid[axis] > (axis ? 65535 : 2147483647)) refuse("bad grid size");
  if (l.cluster < 1 || l.cluster > kMaxCluster || l.grid[0] % l.cluster) refuse("bad cluster size");
  m.launch = &l;
  m.failure.clear();
  m.chance.seed(m.options.seed);
  const int64_t blocks = l.grid[0] * l.grid[1] * l.grid[2];
  const bool backwards = by_chance(m) && (m.options.seed & 1);
  const int64_t clusters = blocks / l.cluster;
  for (int64_t n = 0; n < clusters && m.failure.empty(); ++n)
    run_cluster(m, n, l.cluster * (backwards ? clusters - 1 - n : n));
  tsan_acquire(&m.end_of_launch);
  for (void* block : m.left) std::free(block);
  m.left.clear();
  for (Block& b : m.blocks) {
    std::free(b.shared);
    b.shared = nullptr;
#ifndef EMULATOR_TSAN
    for (Warp& warp : b.warps) warp.lines.clear();
#endif
  }
  m.launch = nullptr;
  if (!m.failure.empty()) throw std::runtime_error("emulator: " + m.failure);
}

// ---- instructions ------------------------------------------------------------------------------

int thread_x() { return machine().running->index; }
int threads() { return machine().launch->threads; }
int64_t block(int axis) { return here(machine()).at[axis]; }
int64_t grid(int axis) { return machine().launch->grid[axis]; }
unsigned char* shared_memory() { return here(machine()).shared; }
int cluster_rank() { return machine().running->block; }
int cluster_size() { return machine().launch->cluster; }

void fail(const std::string& message, Where where) {
  Machine& m = machine();
  end_launch(m, name_of(m, *m.running) + ", " + text(where) + ": " + message);
}

void meet_warp(const char* name, uint32_t mask, const void* in, void* out, Compute compute,
               Where where) {
  Machine& m = machine();
  const int lane = m.running->index % kLanes;
  Warp& warp = warp_of(m, *m.running);
  const uint32_t bit = 1u << lane;
  if (!(mask & bit)) fail(std::string(name) + ": the lane is not in its own mask", where);
  if (mask & warp.done) fail(std::string(name) + ": the mask has lanes that have ended", where);
  if (!warp.arrived) {
    warp.name = name;
    warp.where = where;
    warp.mask = mask;
  } else if ((warp.name != name && std::strcmp(warp.name, name)) || warp.where.line != where.line ||
             warp.mask != mask) {
    fail(std::string("divergent: one lane at ") + name + ", others at " + warp.name + " (" +
             text(warp.where) + ")",
         where);
  }
  warp.in[lane] = in;
  warp.out[lane] = out;
  warp.arrived |= bit;
  poll();
  if (warp.arrived == mask) {
    if (compute) compute(warp.in, warp.out, mask);
    judge_accesses(m, warp);
    warp.arrived = 0;
    ++warp.generation;
    warp.ready |= mask;
    return;
  }
  warp.ready &= ~bit;
  wait_here(m, name, where);
}

void sync_warp(uint32_t mask, Where where) {
  Machine& m = machine();
  Warp& warp = warp_of(m, *m.running);
  char* order = &warp.sync[warp.generation & 1];
  tsan_release(order);
  meet_warp("syncwarp", mask, nullptr, nullptr, nullptr, where);
  tsan_acquire(order);
}

bool sync_block(int id, int count, bool value, Where where) {
  Machine& m = machine();
  const int index = m.running->index;
  Block& block = here(m);
  Barrier& b = block.barriers[id];
  if (!b.arrived) {
    b.where = where;
    b.count = count;
    b.any = false;
    if (count == m.launch->threads)
      for (int w = 0; w < m.warp_count; ++w)
        if (block.warps[w].done) fail("barrier: threads of the block have ended", where);
  } else if (b.where.line != where.line || b.count != count) {
    fail("divergent: others are at the barrier of " + text(b.where), where);
  }
  char* order = &b.sync[b.generation & 1];
  tsan_release(order);
  b.any |= value;
  poll();
  if (++b.arrived == count) {
    b.arrived = 0;
    b.result = b.any;
    ++b.generation;
    for (int w = 0; w < m.warp_count; ++w) {
      block.warps[w].ready |= b.waiting[w];
      b.waiting[w] = 0;
      if (count == m.launch->threads) judge_accesses(m, block.warps[w]);
    }
  } else {
    b.waiting[index / kLanes] |= 1u << (index % kLanes);
    block.warps[index / kLanes].ready &= ~(1u << (index % kLanes));
    wait_here(m, "a barrier of the block", where);
  }
  tsan_acquire(order);
  return b.result;
}

void attach(const Unit& unit) { machine().unit = unit; }
Completion completion() { return machine().options.completion; }
uint64_t chance() { return machine().chance(); }
size_t shared_bytes() { return machine().launch->shared_bytes; }

void wait_for_others(const char* name, Where where) {
  Machine& m = machine();
  Thread& t = *m.running;
  t.ready = [](void*) { return true; };
  t.last = true;
  warp_of(m, t).ready &= ~(1u << (t.index % kLanes));
  wait_here(m, name, where);
  t.last = false;
}

void yield() {
  Machine& m = machine();
  if (!by_chance(m) || m.chance() % 2) return;
  wake(m, false);
  Block& b = m.block_count > 1 ? m.blocks[m.chance() % m.block_count] : here(m);
  if (Thread* next = next_of(m, b, int(m.chance() % m.warp_count))) go_to(m, next);
}

void wait_until(const char* name, bool (*ready)(void*), void* state, Where where) {
  Machine& m = machine();
  poll();
  if (ready(state)) return;
  Thread& t = *m.running;
  t.ready = ready;
  t.ready_state = state;
  warp_of(m, t).ready &= ~(1u << (t.index % kLanes));
  wait_here(m, name, where);
}

// ---- clusters ----------------------------------------------------------------------------------

void sync_cluster(Where where) {
  Machine& m = machine();
  ClusterBarrier& b = m.cluster;
  yield();
  if (!b.arrived) {
    b.where = where;
    for (int n = 0; n < m.block_count; ++n)
      if (m.blocks[n].done) fail("barrier.cluster: threads of the cluster have ended", where);
  } else if (b.where.line != where.line) {
    fail("divergent: others are at the barrier of the cluster of " + text(b.where), where);
  }
  struct State {
    const ClusterBarrier* barrier;
    int64_t phase;
  } state{&b, b.phase};
  char* order = &b.sync[b.phase & 1];
  tsan_release(order);
  if (++b.arrived == m.block_count * m.launch->threads) {
    b.arrived = 0;
    ++b.phase;
  }
  wait_until(
      "the barrier of the cluster",
      [](void* p) {
        const auto& s = *static_cast<State*>(p);
        return s.barrier->phase != s.phase;
      },
      &state, where);
  tsan_acquire(order);
}

void note_rare(const char* what) {
  for (const char*& place : machine().rare) {
    if (place == what) return;
    if (!place) {
      place = what;
      return;
    }
  }
}

// AddressSanitizer calls it before it reports: which thread of which kernel it was.
extern "C" __attribute__((visibility("default"))) void __asan_on_error() {
  Machine& m = machine();
  if (m.launch && m.running)
    std::fprintf(stderr, "emulator: in %s\n", name_of(m, *m.running).c_str());
}

}  // namespace emulator
