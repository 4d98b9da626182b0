// The state of the machine: of emulator.cpp, which schedules, and memory.cpp.
#pragma once
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <random>

#include "emulator.h"
#include "fibre.h"
#include "sanitizers.h"

namespace emulator {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr int kBarriers = 16;
constexpr int kMaxCluster = 8;            // blocks, of every device that has clusters
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
  int index = 0;  // in its block
  int block = 0;  // in its cluster
  bool done = false;
  const char* waits_at = nullptr;
  Where where{};
  bool (*ready)(void*) = nullptr;
  void* ready_state = nullptr;
  bool last = false;         // waits for the others alone
  std::vector<Copy> copies;  // under way; room for kMaxCopies, made by the host
  int64_t group = 0;         // that the next copy belongs to
};

#ifndef EMULATOR_TSAN  // which is slow enough without
// What the lanes of a warp read or wrote in shared memory by one line, the n-th time that each of
// them came there since they last met.
struct SharedAccess {
  uint32_t place[kLanes];  // bytes from the block's first
  uint32_t lanes = 0;
  int size = 0;
};
struct SharedLine {
  Where where{};
  size_t turn[kLanes] = {};
  std::vector<SharedAccess> accesses;
};
#endif

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
#ifndef EMULATOR_TSAN
  std::vector<SharedLine> lines;
#endif
};

struct Barrier {
  Where where{};
  int count = 0, arrived = 0, generation = 0;
  bool any = false, result = false;
  uint32_t waiting[kMaxThreads / kLanes] = {};  // lanes of each warp
  char sync[2];
};

// A block of the running cluster. Without clusters each block is one.
struct Block {
  std::unique_ptr<Thread>* threads = nullptr;
  Warp warps[kMaxThreads / kLanes];
  Barrier barriers[kBarriers];
  unsigned char* shared = nullptr;
  int64_t at[3] = {0, 0, 0};  // in the grid
  int done = 0;               // threads that have ended
  bool started = false;
};

// Where all threads of a cluster meet.
struct ClusterBarrier {
  Where where{};
  int arrived = 0;
  int64_t phase = 0;
  char sync[2];
};

// One launch at a time; its clusters one after the other.
struct Machine {
  std::mutex mutex;
  Options options;
  std::mt19937_64 chance;
  const Launch* launch = nullptr;
  std::unique_ptr<Thread> slots[kMaxCluster + 1][kMaxThreads];  // see slot_of
  Block blocks[kMaxCluster];
  int block_count = 1, warp_count = 0;  // of the cluster, of a block
  ClusterBarrier cluster;
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

Machine& machine();
inline bool by_chance(const Machine& m) { return m.options.completion == Completion::kRandom; }
inline Block& here(Machine& m) { return m.blocks[m.running->block]; }
inline Warp& warp_of(Machine& m, const Thread& t) {
  return m.blocks[t.block].warps[t.index / kLanes];
}
std::string text(Where w);

// The lanes have met: what they did before in shared memory is complete.
void judge_accesses(Machine& m, Warp& warp);

}  // namespace emulator
