// A GPU for tests: what kernels need of one, on a processor. Each thread of a block is a fibre;
// barriers and the collectives of a warp are places where fibres wait for one another. The
// instructions that kernels call are in instructions.h; this is what they are made of.
//
// A program that breaks a rule of the machine ends its launch with a runtime_error that names the
// kernel, the block, the thread and the line.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

// The line of a kernel that called an instruction: a default argument of each.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// ---- for tests
// ---------------------------------------------------------------------------------

// When an asynchronous copy arrives: as late as it is allowed to, at once, or at any time between.
// Each finds mistakes that the others miss.
enum class Completion { kLazy, kEager, kRandom };

struct Options {
  Completion completion = Completion::kLazy;
  uint64_t seed = 0;  // kRandom: of arrivals, and of the order of warps and blocks
};
void set_options(const Options& options);

// "kernel, file:line: 8 ways" since the last call: of every ldmatrix whose rows shared banks, and
// of every load_shared and store_shared whose lanes did.
std::vector<std::string> take_bank_conflicts();

// What kernels called note_rare with since the last call. A kernel that repairs what it finds
// broken would hide a mistake otherwise.
std::vector<std::string> take_rare();

// The names of kernels launched since the last call.
std::vector<std::string> take_launches();

// ---- for launch.h
// ------------------------------------------------------------------------------

struct Launch {
  const char* kernel;
  int64_t grid[3];
  int cluster;  // blocks of one, along x
  int threads;
  size_t shared_bytes;
  void (*body)(const void* params);
  const void* params;
};
void launch(const Launch& launch);

// ---- for instructions.h
// ------------------------------------------------------------------------

int thread_x();
int threads();
int64_t block(int axis);
int64_t grid(int axis);
unsigned char* shared_memory();
int cluster_rank();
int cluster_size();

// Ends the launch.
[[noreturn]] void fail(const std::string& message, Where where);

// All lanes of `mask` meet here; the last one there calls compute(in, out, mask), with a pointer
// from each lane.
using Compute = void (*)(const void* const* in, void* const* out, uint32_t mask);
void meet_warp(const char* name, uint32_t mask, const void* in, void* out, Compute compute,
               Where where);
// As meet_warp for __syncwarp: memory written before is seen behind it.
void sync_warp(uint32_t mask, Where where);

// Waits for `count` threads of the block at barrier `id`; returns whether any of them came with
// true.
bool sync_block(int id, int count, bool value, Where where);

// Asynchronous copies of the calling thread: bytes [0, bytes) of source, then zeros to `size`.
void copy_async(void* shared, const void* source, int size, int bytes, Where where);
void commit_copies();
void wait_copies(int groups_left);

// For instructions that wait for others' work, such as a transaction barrier: goes on when
// ready(state) is true, which the scheduler asks when no thread can run.
void wait_until(const char* name, bool (*ready)(void*), void* state, Where where);

// All threads of the cluster meet here: what they wrote before is seen behind it.
void sync_cluster(Where where);
// Where p, in this block's shared memory, lies in that of the cluster's block `rank`.
const void* remote_shared(const void* p, size_t bytes, int rank, Where where);

// A load or a store of 2, 4, 8 or 16 bytes in shared memory. Those of a warp's lanes by one line
// are one access: the first of each since the lanes last met, the second, and so on.
void note_shared_access(const void* p, size_t bytes, Where where);

// Notes that 8 rows of 16 bytes, fetched from shared memory in one go, took `ways` turns.
void note_bank_conflict(int ways);

void note_rare(const char* what);

// ---- for hopper.cpp ----------------------------------------------------------------------------

// Units that work beside the threads of a block.
struct Unit {
  void (*begin)();       // of a block
  std::string (*end)();  // of a block: what is wrong with how it ended
  bool (*advance)();     // no thread can run: whether something under way has arrived
  void (*poll)();        // as poll() below
};
void attach(const Unit& unit);

// Goes on when no other thread can run, and before anything under way has to arrive.
void wait_for_others(const char* name, Where where);
// Lets other threads run, where chance would have it.
void yield();

Completion completion();
uint64_t chance();
size_t shared_bytes();

// Lets what is under way arrive where chance would have it.
void poll();

}  // namespace emulator
