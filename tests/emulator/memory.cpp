// The memory of blocks: who shares banks, what is copied there asynchronously. Compiled without
// sanitizers: accesses of the kernel are reported to them.
#include <cstring>

#include "machine.h"

namespace emulator {
namespace {

void note_turns(Machine& m, Where where, int ways) {
  int& worst = m.conflicts[std::string(m.launch->kernel) + ", " + text(where)];
  worst = std::max(worst, ways);
}

#ifndef EMULATOR_TSAN
// Turns that the banks take: 4 bytes wide, 32 of them; 128 bytes of the lanes at a time, and the
// same 4 bytes go to all that ask for them.
int turns_of(const SharedAccess& a) {
  const int together = 128 / (a.size < 4 ? 4 : a.size);  // lanes
  int worst = 1;
  for (int first = 0; first < kLanes; first += together) {
    uint32_t words[32][kLanes];
    int turns[32] = {};
    for (int lane = first; lane < first + together; ++lane) {
      if (!(a.lanes >> lane & 1)) continue;
      for (uint32_t word = a.place[lane] / 4; 4 * word < a.place[lane] + a.size; ++word) {
        uint32_t* bank = words[word % 32];
        int& turn = turns[word % 32];
        if (std::find(bank, bank + turn, word) == bank + turn) bank[turn++] = word;
        worst = std::max(worst, turn);
      }
    }
  }
  return worst;
}
#endif

}  // namespace

// ---- plain accesses ----------------------------------------------------------------------------

#ifndef EMULATOR_TSAN
void judge_accesses(Machine& m, Warp& warp) {
  for (SharedLine& line : warp.lines) {
    if (line.accesses.empty()) continue;
    for (const SharedAccess& access : line.accesses)
      if (const int ways = turns_of(access); ways > 1) note_turns(m, line.where, ways);
    line.accesses.clear();
    for (size_t& turn : line.turn) turn = 0;
  }
}
#else
void judge_accesses(Machine&, Warp&) {}
#endif

void note_shared_access(const void* p, size_t bytes, Where where) {
  Machine& m = machine();
  const Block& block = here(m);
  const auto* at = static_cast<const unsigned char*>(p);
  if (at < block.shared || at + bytes > block.shared + m.launch->shared_bytes)
    fail("out of shared memory", where);
  if (uintptr_t(at) % bytes) fail("shared memory: misaligned", where);
#ifndef EMULATOR_TSAN
  const int lane = m.running->index % kLanes;
  std::vector<SharedLine>& lines = warp_of(m, *m.running).lines;
  const auto here_again = [&](const SharedLine& line) {
    return line.where.line == where.line && line.where.file == where.file;
  };
  auto line = std::find_if(lines.begin(), lines.end(), here_again);
  if (line == lines.end()) {
    lines.push_back({where, {}, {}});
    line = lines.end() - 1;
  }
  const size_t turn = line->turn[lane]++;
  if (turn == line->accesses.size()) line->accesses.emplace_back();
  SharedAccess& access = line->accesses[turn];
  access.place[lane] = uint32_t(at - block.shared);
  access.lanes |= 1u << lane;
  access.size = int(bytes);
#endif
}

const void* remote_shared(const void* p, size_t bytes, int rank, Where where) {
  Machine& m = machine();
  if (rank < 0 || rank >= m.block_count)
    fail(
        "mapa: block " + std::to_string(rank) + " of a cluster of " + std::to_string(m.block_count),
        where);
  const auto* at = static_cast<const unsigned char*>(p);
  const unsigned char* own = here(m).shared;
  if (at < own || at + bytes > own + m.launch->shared_bytes)
    fail("ld.shared::cluster: out of shared memory", where);
  if (uintptr_t(at) % bytes) fail("ld.shared::cluster: misaligned", where);
  const Block& other = m.blocks[rank];
  const bool ended = other.done == m.launch->threads;
  if (!other.started || ended)
    fail("ld.shared::cluster: block " + std::to_string(rank) + " of the cluster " +
             (ended ? "has ended" : "may not have started"),
         where);
  return other.shared + (at - own);
}

// ---- asynchronous copies -----------------------------------------------------------------------

namespace {

void complete(const Copy& c) {
  tsan_read(c.source, size_t(c.bytes));
  tsan_write(c.shared, size_t(c.size));
  __builtin_memcpy(c.shared, c.source, size_t(c.bytes));
  __builtin_memset(c.shared + c.bytes, 0, size_t(c.size - c.bytes));
}

}  // namespace

void copy_async(void* shared, const void* source, int size, int bytes, Where where) {
  Machine& m = machine();
  auto* to = static_cast<char*>(shared);
  const auto* from = static_cast<const char*>(source);
  auto* begin = reinterpret_cast<char*>(here(m).shared);
  if (to < begin || to + size > begin + m.launch->shared_bytes)
    fail("copy: out of shared memory", where);
  if (uintptr_t(to) % size || uintptr_t(from) % size) fail("copy: misaligned", where);
  if (bytes && is_poisoned(from, size_t(bytes))) fail("copy: out of global memory", where);
  const Copy copy{to, from, size, bytes, m.running->group};
  if (m.options.completion == Completion::kEager) return complete(copy);
  // Until it has arrived there is nothing to rely on.
  tsan_write(to, size_t(size));
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
  note_turns(m, warp_of(m, *m.running).where, ways);
}

}  // namespace emulator
