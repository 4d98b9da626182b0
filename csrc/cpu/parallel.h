// Threads. Where torch's OpenMP runtime is in the process its team is used: a second pool would
// fight the first for the cores, since idle OpenMP workers spin. Elsewhere (macOS, Windows, a child
// made by fork, whose OpenMP team did not survive) threads are started for the call.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "vec.h"  // FASTATTN_NOINLINE

#if !defined(_WIN32)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace fastattn {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

inline GompParallel find_openmp() {
#if defined(_WIN32)
  return nullptr;
#else
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
}

// The runtime to use in this process, or null.
#if defined(_WIN32)
inline GompParallel openmp() { return nullptr; }
#else
// When this module was loaded: torch may have made its team before the first call of a kernel.
const pid_t owner = getpid();

inline GompParallel openmp() {
  static const GompParallel runtime = find_openmp();
  return getpid() == owner ? runtime : nullptr;
}
#endif

// Calls call(body, thread) once for each thread in [0, threads), concurrently where it can. The
// calls must not wait for one another: fewer real threads than asked for may serve them.
FASTATTN_NOINLINE inline void parallel(int threads, void (*call)(const void* body, int thread),
                                       const void* body) {
  if (threads <= 1) return call(body, 0);
  struct Team {
    void (*const call)(const void*, int);
    const void* const body;
    const int threads;
    std::atomic<int> next{0};
    std::mutex mutex{};
    std::exception_ptr error{};

    void work() {
      for (int t; (t = next.fetch_add(1, std::memory_order_relaxed)) < threads;) {
        try {
          call(body, t);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex);
          if (!error) error = std::current_exception();
        }
      }
    }
  } team{call, body, threads};
  const auto enter = [](void* p) { static_cast<Team*>(p)->work(); };
  if (const GompParallel run = openmp()) {
    run(enter, &team, unsigned(threads), 0);
  } else {
    std::vector<std::thread> helpers;
    for (int t = 1; t < threads; ++t) helpers.emplace_back(enter, &team);
    team.work();
    for (std::thread& helper : helpers) helper.join();
  }
  if (team.error) std::rethrow_exception(team.error);
}

// body(thread) for each thread; all of the above is compiled once for bodies of all types.
template <typename Body>
void parallel(int threads, const Body& body) {
  const auto call = [](const void* p, int thread) { (*static_cast<const Body*>(p))(thread); };
  parallel(threads, call, &body);
}

// Calls body(item, thread) for each item in [0, items), in order of index, each taken by the next
// free thread. Which thread takes an item varies from run to run: results must not depend on it.
template <typename Body>
void parallel_dynamic(int64_t items, int threads, const Body& body) {
  if (threads > items) threads = int(items);
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int thread) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(i, thread);
  });
}

// Calls body(begin, end, thread) on equal contiguous shares of [0, items): the same at every run.
template <typename Body>
void parallel_static(int64_t items, int threads, const Body& body) {
  if (threads > items) threads = int(items);
  parallel(threads, [&](int thread) {
    const int64_t begin = items * thread / threads, end = items * (thread + 1) / threads;
    if (begin < end) body(begin, end, thread);
  });
}

}  // namespace
}  // namespace fastattn
