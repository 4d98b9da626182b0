// The scheduler, the memory and the asynchronous copies. Compiled without sanitizers: what lanes
// hand to one another here is no memory access of the kernel; those that are one are reported.
#include "emulator.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>

#include "fibre.h"

#ifdef EMULATOR_ASAN
extern "C" void* __asan_region_is_poisoned(void* begin, size_t size);
#endif
#ifdef EMULATOR_TSAN
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
}
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
static void __tsan_read_range(void*, unsigned long) {}
static void __tsan_write_range(void*, unsigned long) {}
#endif

namespace emulator {
namespace {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr int kBarriers = 16;
#ifdef EMULATOR_TSAN
constexpr int kSets = 3;
#else
constexpr int kSets = 1;
#endif
constexpr size_t kMaxCopies = 1024;       // under way, of a thread
constexpr size_t kMaxShared = 227 << 10;  // of sm_90

struct Copy {
  char* shared;
  const char* source;
  int size, bytes;
  int64_t group;
};

struct Thread {
  Context context;
  int index = 0;
  bool done = false;
  const char* waits_at = nullptr;
  Where where{};
  bool (*ready)(void*) = nullptr;
  void* ready_state = nullptr;
  bool last = false;         // waits for the others alone
  std::vector<Copy> copies;  // under way; room for kMaxCopies, made by the host
  int64_t group = 0;         // that the next copy belongs to
};

struct Warp {
  uint32_t ready = 0, done = 0;
  // The collective that lanes are waiting at.
  const char* name = nullptr;
  Where where{};
  uint32_t mask = 0, arrived = 0;
  const void* in[kLanes];
  void* out[kLanes];
  int generation = 0;
  char sync[2];  // addresses for the order of memory, by turns
};

struct Barrier {
  Where where{};
  int count = 0, arrived = 0, generation = 0;
  bool any = false, result = false;
  uint32_t waiting[kMaxThreads / kLanes] = {};  // lanes of each warp
  char sync[2];
};

// One launch at a time; its blocks one after the other.
struct Machine {
  std::mutex mutex;
  Options options;
  std::mt19937_64 chance;
  const Launch* launch = nullptr;
  int64_t block[3] = {0, 0, 0};
  // ThreadSanitizer has a thread of its own for each thread of kSets blocks, which is slow to make;
  // only blocks so far apart in the launch are ordered, as if one had waited for the other.
  std::unique_ptr<Thread> sets[kSets][kMaxThreads];
  std::unique_ptr<Thread>* threads = sets[0];  // of the running block
  Warp warps[kMaxThreads / kLanes];
  int warp_count = 0;
  Barrier barriers[kBarriers];
  unsigned char* shared = nullptr;
  std::vector<void*> left;  // shared memory of blocks that have ended
  Context host;
  Thread* running = nullptr;
  std::string failure;
  char start = 0, end_of_launch = 0;
  std::map<std::string, int> conflicts;
  const char* rare[8] = {};
  std::map<std::string, int> launches;
  Unit unit{};
};

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

bool by_chance(Machine& m) { return m.options.completion == Completion::kRandom; }

std::string text(Where w) {
  const char* name = std::strrchr(w.file, '/');
  return std::string(name ? name + 1 : w.file) + ":" + std::to_string(w.line);
}

// ---- scheduling --------------------------------------------------------------------------------

void go_to(Machine& m, Thread* next) {
  Thread* self = m.running;
  if (next == self) return;
  m.running = next;
  Context& from = self ? self->context : m.host;
  from.switch_to(next ? next->context : m.host);
}

Thread* first_of(Machine& m, int warp, uint32_t ready) {
  return m.threads[warp * kLanes + __builtin_ctz(ready)].get();
}

// The next thread that can run: of the same warp if there is one, in the order of lanes.
Thread* next_ready(Machine& m) {
  const int here = m.running ? m.running->index : 0;
  const int warp = here / kLanes, lane = here % kLanes;
  if (uint32_t ready = m.warps[warp].ready) {
    const uint32_t above = lane == kLanes - 1 ? 0 : ready & (~0u << (lane + 1));
    return first_of(m, warp, above ? above : ready);
  }
  const int start = by_chance(m) ? int(m.chance() % m.warp_count) : warp + 1;
  for (int i = 0; i < m.warp_count; ++i) {
    const int w = (start + i) % m.warp_count;
    if (m.warps[w].ready) return first_of(m, w, m.warps[w].ready);
  }
  return nullptr;
}

[[noreturn]] void end_launch(Machine& m, const std::string& message) {
  m.failure = message;
  go_to(m, nullptr);
  std::abort();  // never resumed
}

std::string name_of(Machine& m, int thread) {
  char line[200];
  std::snprintf(line, sizeof line, "%s, block (%lld, %lld, %lld), thread %d", m.launch->kernel,
                (long long)m.block[0], (long long)m.block[1], (long long)m.block[2], thread);
  return line;
}

// Threads that wait for others' work and need not any more; `last`: those of wait_for_others.
bool wake(Machine& m, bool last) {
  bool any = false;
  for (int i = 0; i < m.launch->threads; ++i) {
    Thread& t = *m.threads[i];
    if (!t.ready || t.last != last || !t.ready(t.ready_state)) continue;
    t.ready = nullptr;
    m.warps[i / kLanes].ready |= 1u << (i % kLanes);
    any = true;
  }
  return any;
}

// Nobody can run: threads that wait for others' work may, or all are done, or never will be.
Thread* next_or_end(Machine& m) {
  if (Thread* next = next_ready(m)) return next;
  do {
    if (wake(m, false) || wake(m, true)) return next_ready(m);
  } while (m.unit.advance && m.unit.advance());
  for (int i = 0; i < m.launch->threads; ++i)
    if (!m.threads[i]->done) {
      const Thread& t = *m.threads[i];
      m.failure = name_of(m, i) + ": deadlock, waits at " + (t.waits_at ? t.waits_at : "?") + " (" +
                  text(t.where) + ")";
      return nullptr;
    }
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
  __tsan_acquire(&m.start);
  m.launch->body(m.launch->params);
  Thread& t = *m.running;
  if (!t.copies.empty())
    end_launch(m, name_of(m, t.index) + ": ends with a copy that it never waited for");
  Warp& warp = m.warps[t.index / kLanes];
  const uint32_t bit = 1u << (t.index % kLanes);
  if (warp.arrived && (warp.mask & bit))
    end_launch(m, name_of(m, t.index) + ": ends while its warp waits for it at " + warp.name +
                      " (" + text(warp.where) + ")");
  for (const Barrier& b : m.barriers)
    if (b.arrived && b.count == m.launch->threads)
      end_launch(m, name_of(m, t.index) + ": ends while others wait for it at a barrier (" +
                        text(b.where) + ")");
  t.done = true;
  warp.ready &= ~bit;
  warp.done |= bit;
  __tsan_release(&m.end_of_launch);
  go_to(m, next_or_end(m));
  std::abort();  // never resumed
}

void run_block(Machine& m, int set) {
  const Launch& l = *m.launch;
  m.threads = m.sets[set];
  m.warp_count = l.threads / kLanes;
  // Exactly as large as asked for, so that AddressSanitizer sees the end; full of NaNs.
  const size_t bytes = l.shared_bytes ? l.shared_bytes : 1;
  void* block = nullptr;
  if (posix_memalign(&block, 1024, bytes)) throw std::bad_alloc();
  m.shared = static_cast<unsigned char*>(block);
  std::memset(m.shared, 0xFF, bytes);
  for (int i = 0; i < l.threads; ++i) {
    if (!m.threads[i]) {
      m.threads[i] = std::make_unique<Thread>();
      m.threads[i]->copies.reserve(kMaxCopies);
    }
    Thread& t = *m.threads[i];
    t.index = i;
    t.done = false;
    t.waits_at = nullptr;
    t.ready = nullptr;
    t.last = false;
    t.copies.clear();
    t.group = 0;
    t.context.prepare(thread_main);
  }
  for (int w = 0; w < m.warp_count; ++w) {
    m.warps[w].ready = ~0u;
    m.warps[w].done = m.warps[w].arrived = 0;
  }
  for (Barrier& b : m.barriers) {
    b.arrived = 0;
    for (uint32_t& lanes : b.waiting) lanes = 0;
  }
  m.running = nullptr;
  if (m.unit.begin) m.unit.begin();
  __tsan_release(&m.start);
  go_to(m, next_ready(m));
  if (m.unit.end && m.failure.empty()) {
    const std::string wrong = m.unit.end();
    if (!wrong.empty()) m.failure = name_of(m, 0) + ": " + wrong;
  }
  m.shared = nullptr;
#ifdef EMULATOR_TSAN
  m.left.push_back(block);  // its threads and the host meet at the end of the launch
#else
  std::free(block);
#endif
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
  m.launch = &l;
  m.failure.clear();
  m.chance.seed(m.options.seed);
  const int64_t blocks = l.grid[0] * l.grid[1] * l.grid[2];
  const bool backwards = by_chance(m) && (m.options.seed & 1);
  for (int64_t n = 0; n < blocks && m.failure.empty(); ++n) {
    const int64_t at = backwards ? blocks - 1 - n : n;
    m.block[0] = at % l.grid[0];
    m.block[1] = at / l.grid[0] % l.grid[1];
    m.block[2] = at / l.grid[0] / l.grid[1];
    run_block(m, int(n % kSets));
  }
  __tsan_acquire(&m.end_of_launch);
  for (void* block : m.left) std::free(block);
  m.left.clear();
  m.launch = nullptr;
  if (!m.failure.empty()) throw std::runtime_error("emulator: " + m.failure);
}

// ---- instructions ------------------------------------------------------------------------------

int thread_x() { return machine().running->index; }
int threads() { return machine().launch->threads; }
int64_t block(int axis) { return machine().block[axis]; }
int64_t grid(int axis) { return machine().launch->grid[axis]; }
unsigned char* shared_memory() { return machine().shared; }

void fail(const std::string& message, Where where) {
  Machine& m = machine();
  end_launch(m, name_of(m, m.running->index) + ", " + text(where) + ": " + message);
}

void meet_warp(const char* name, uint32_t mask, const void* in, void* out, Compute compute,
               Where where) {
  Machine& m = machine();
  const int index = m.running->index, lane = index % kLanes;
  Warp& warp = m.warps[index / kLanes];
  const uint32_t bit = 1u << lane;
  if (!(mask & bit)) fail(std::string(name) + ": the lane is not in its own mask", where);
  if (mask & warp.done) fail(std::string(name) + ": the mask has lanes that have ended", where);
  if (!warp.arrived) {
    warp.name = name;
    warp.where = where;
    warp.mask = mask;
  } else if (std::strcmp(warp.name, name) || warp.where.line != where.line || warp.mask != mask) {
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
  Warp& warp = m.warps[m.running->index / kLanes];
  char* order = &warp.sync[warp.generation & 1];
  __tsan_release(order);
  meet_warp("syncwarp", mask, nullptr, nullptr, nullptr, where);
  __tsan_acquire(order);
}

bool sync_block(int id, int count, bool value, Where where) {
  Machine& m = machine();
  const int index = m.running->index;
  Barrier& b = m.barriers[id];
  if (!b.arrived) {
    b.where = where;
    b.count = count;
    b.any = false;
    if (count == m.launch->threads)
      for (int w = 0; w < m.warp_count; ++w)
        if (m.warps[w].done) fail("barrier: threads of the block have ended", where);
  } else if (b.where.line != where.line || b.count != count) {
    fail("divergent: others are at the barrier of " + text(b.where), where);
  }
  char* order = &b.sync[b.generation & 1];
  __tsan_release(order);
  b.any |= value;
  poll();
  if (++b.arrived == count) {
    b.arrived = 0;
    b.result = b.any;
    ++b.generation;
    for (int w = 0; w < m.warp_count; ++w) {
      m.warps[w].ready |= b.waiting[w];
      b.waiting[w] = 0;
    }
  } else {
    b.waiting[index / kLanes] |= 1u << (index % kLanes);
    m.warps[index / kLanes].ready &= ~(1u << (index % kLanes));
    wait_here(m, "a barrier of the block", where);
  }
  __tsan_acquire(order);
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
  m.warps[t.index / kLanes].ready &= ~(1u << (t.index % kLanes));
  wait_here(m, name, where);
  t.last = false;
}

void yield() {
  Machine& m = machine();
  if (!by_chance(m) || m.chance() % 2) return;
  wake(m, false);
  const int start = int(m.chance() % m.warp_count);
  for (int i = 0; i < m.warp_count; ++i) {
    const int w = (start + i) % m.warp_count;
    if (m.warps[w].ready) return go_to(m, first_of(m, w, m.warps[w].ready));
  }
}

void wait_until(const char* name, bool (*ready)(void*), void* state, Where where) {
  Machine& m = machine();
  poll();
  if (ready(state)) return;
  Thread& t = *m.running;
  t.ready = ready;
  t.ready_state = state;
  m.warps[t.index / kLanes].ready &= ~(1u << (t.index % kLanes));
  wait_here(m, name, where);
}

// ---- asynchronous copies -----------------------------------------------------------------------

namespace {

void complete(const Copy& c) {
  __tsan_read_range(const_cast<char*>(c.source), (unsigned long)c.bytes);
  __tsan_write_range(c.shared, (unsigned long)c.size);
  __builtin_memcpy(c.shared, c.source, size_t(c.bytes));
  __builtin_memset(c.shared + c.bytes, 0, size_t(c.size - c.bytes));
}

}  // namespace

void copy_async(void* shared, const void* source, int size, int bytes, Where where) {
  Machine& m = machine();
  auto* to = static_cast<char*>(shared);
  const auto* from = static_cast<const char*>(source);
  if (to < reinterpret_cast<char*>(m.shared) ||
      to + size > reinterpret_cast<char*>(m.shared) + m.launch->shared_bytes)
    fail("copy: out of shared memory", where);
  if (uintptr_t(to) % size || uintptr_t(from) % size) fail("copy: misaligned", where);
#ifdef EMULATOR_ASAN
  if (bytes && __asan_region_is_poisoned(const_cast<char*>(from), size_t(bytes)))
    fail("copy: out of global memory", where);
#endif
  const Copy copy{to, from, size, bytes, m.running->group};
  if (m.options.completion == Completion::kEager) return complete(copy);
  // Until it has arrived there is nothing to rely on.
  __tsan_write_range(to, (unsigned long)size);
  __builtin_memset(to, 0xFF, size_t(size));
  if (m.running->copies.size() == kMaxCopies) fail("copy: never waited for", where);
  m.running->copies.push_back(copy);
}

void commit_copies() { ++machine().running->group; }

void wait_copies(int groups_left) {
  Thread& t = *machine().running;
  size_t kept = 0;
  for (size_t i = 0; i < t.copies.size(); ++i) {
    if (t.copies[i].group < t.group - groups_left)
      complete(t.copies[i]);
    else
      t.copies[kept++] = t.copies[i];
  }
  t.copies.resize(kept);
}

void poll() {
  Machine& m = machine();
  if (!by_chance(m)) return;
  if (m.unit.poll) m.unit.poll();
  std::vector<Copy>& copies = m.running->copies;
  if (copies.empty() || m.chance() % 4) return;
  const size_t i = m.chance() % copies.size();
  complete(copies[i]);
  copies[i] = copies.back();
  copies.pop_back();
}

void note_bank_conflict(int ways) {
  Machine& m = machine();
  const Warp& warp = m.warps[m.running->index / kLanes];
  int& worst = m.conflicts[std::string(m.launch->kernel) + ", " + text(warp.where)];
  worst = worst > ways ? worst : ways;
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
    std::fprintf(stderr, "emulator: in %s\n", name_of(m, m.running->index).c_str());
}

}  // namespace emulator
