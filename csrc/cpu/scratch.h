// Memory that kernels work in, aligned to a cache line: a vector across two lines takes both.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace fastattn {
namespace {

constexpr std::align_val_t kLine{64};

struct AlignedDelete {
  void operator()(void* p) const { operator delete(p, kLine); }
};
template <typename A>
using Array = std::unique_ptr<A[], AlignedDelete>;

// n numbers, uninitialised.
template <typename A>
Array<A> make_array(int64_t n) {
  return Array<A>(static_cast<A*>(operator new(size_t(n) * sizeof(A), kLine)));
}

// Memory of one thread, for tiles: kept between calls, so that a small call allocates nothing.
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
  // Uninitialised, valid until reset().
  template <typename T>
  T* take(size_t count) {
    const size_t bytes = (count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    if (used_ + bytes > size_) {
      if (block_) outgrown_.push_back(block_);
      size_ = std::max(2 * size_, bytes);
      block_ = static_cast<char*>(operator new(size_, kLine));
      used_ = 0;
    }
    T* p = reinterpret_cast<T*>(block_ + used_);
    used_ += bytes;
    return p;
  }

 private:
  static constexpr size_t kAlign = size_t(kLine);
  static void release(char* block) { operator delete(block, kLine); }
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
