// Memory of one thread, for tiles: kept between calls, so that a small call allocates nothing.
#pragma once
#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

namespace fastattn {
namespace {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    reset();
    release(block_);
  }
  // Gives back all that was taken. Call it at the start of each use.
  void reset() {
    for (char* block : outgrown_) release(block);
    outgrown_.clear();
    used_ = 0;
  }
  // Uninitialised, aligned to a cache line, valid until reset().
  template <typename T>
  T* take(size_t count) {
    const size_t bytes = (count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    if (used_ + bytes > size_) {
      if (block_) outgrown_.push_back(block_);
      size_ = std::max(2 * size_, bytes);
      block_ = static_cast<char*>(operator new(size_, std::align_val_t(kAlign)));
      used_ = 0;
    }
    T* p = reinterpret_cast<T*>(block_ + used_);
    used_ += bytes;
    return p;
  }

 private:
  static constexpr size_t kAlign = 64;
  static void release(char* block) { operator delete(block, std::align_val_t(kAlign)); }
  char* block_ = nullptr;
  size_t size_ = 0, used_ = 0;
  std::vector<char*> outgrown_;
};

inline Scratch& scratch_of_this_thread() {
  static thread_local Scratch scratch;
  scratch.reset();
  return scratch;
}

}  // namespace
}  // namespace fastattn
