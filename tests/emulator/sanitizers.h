// What the emulator, which is compiled without them, tells the sanitizers (EMULATOR_ASAN,
// EMULATOR_TSAN).
#pragma once
#include <cstddef>

#ifdef EMULATOR_ASAN
extern "C" void* __asan_region_is_poisoned(void* begin, size_t size);
#endif
#ifdef EMULATOR_TSAN
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif

namespace emulator {

#ifdef EMULATOR_ASAN
inline bool is_poisoned(const void* p, size_t n) {
  return __asan_region_is_poisoned(const_cast<void*>(p), n) != nullptr;
}
#else
inline bool is_poisoned(const void*, size_t) { return false; }
#endif

#ifdef EMULATOR_TSAN
inline void tsan_acquire(void* p) { __tsan_acquire(p); }
inline void tsan_release(void* p) { __tsan_release(p); }
inline void tsan_read(const void* p, size_t n) { __tsan_read_range(const_cast<void*>(p), n); }
inline void tsan_write(void* p, size_t n) { __tsan_write_range(p, n); }
inline void ignore_accesses() { __tsan_ignore_thread_begin(); }
inline void heed_accesses() { __tsan_ignore_thread_end(); }
#else
inline void tsan_acquire(void*) {}
inline void tsan_release(void*) {}
inline void tsan_read(const void*, size_t) {}
inline void tsan_write(void*, size_t) {}
inline void ignore_accesses() {}
inline void heed_accesses() {}
#endif

}  // namespace emulator
