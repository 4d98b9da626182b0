// Switching between stacks: a few instructions on x86-64, ucontext elsewhere; and what the
// sanitizers have to be told of it (EMULATOR_ASAN, EMULATOR_TSAN).
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include <sys/mman.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#ifdef EMULATOR_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
#endif
#ifdef EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif

namespace emulator {

#if defined(__x86_64__)
// Saves what a call preserves on the old stack, and takes it from the new one.
extern "C" void fastattn_emulator_switch(void** save, void* load);
asm(R"(
  .text
  .type fastattn_emulator_switch, @function
fastattn_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fastattn_emulator_switch, .-fastattn_emulator_switch
)");
#endif

class Context {
 public:
  static constexpr size_t kStack = size_t(512) << 10;

  Context() = default;  // of the thread that launches: it has a stack
  Context(const Context&) = delete;
  ~Context() {
    if (stack_) munmap(stack_, kStack);
  }

  // Makes the next switch_to call entry(), which must never return.
  void prepare(void (*entry)()) {
    if (!stack_) {
      const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, flags, -1, 0);
      if (p == MAP_FAILED) throw std::runtime_error("emulator: no memory for a stack");
      stack_ = static_cast<char*>(p);
    }
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack_ + kStack) - 1;
    *top = nullptr;  // where entry would return to; aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer_ = top;
#else
    getcontext(&machine_);
    machine_.uc_stack.ss_sp = stack_;
    machine_.uc_stack.ss_size = kStack;
    machine_.uc_link = nullptr;
    makecontext(&machine_, entry, 0);
#endif
#ifdef EMULATOR_TSAN
    if (!tsan_) tsan_ = __tsan_create_fiber(0);
#endif
  }

  // Of one that is never resumed: what its calls told AddressSanitizer of the stack no longer
  // holds. Those of a call that has returned are gone already, and this takes longer than most of
  // them.
  void abandon() {
#ifdef EMULATOR_ASAN
    if (stack_) __asan_unpoison_memory_region(stack_, kStack);
#endif
  }

  // Leaves this context, which is the running one.
  void switch_to(Context& next) {
#ifdef EMULATOR_TSAN
    if (!tsan_) tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(next.tsan_, 1);  // 1: orders nothing
#endif
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&fake_stack_, next.bottom(), next.size());
    from = this;
#endif
#if defined(__x86_64__)
    fastattn_emulator_switch(&pointer_, next.pointer_);
#else
    swapcontext(&machine_, &next.machine_);
#endif
    arrived();
  }

  // What runs first after a switch to this context.
  void arrived() {
#ifdef EMULATOR_ASAN
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
    if (!from->stack_) from->native_bottom_ = bottom, from->native_size_ = size;
#endif
  }

 private:
#ifdef EMULATOR_ASAN
  const void* bottom() const { return stack_ ? stack_ : native_bottom_; }
  size_t size() const { return stack_ ? kStack : native_size_; }
  inline static Context* from = nullptr;
  void* fake_stack_ = nullptr;
  const void* native_bottom_ = nullptr;
  size_t native_size_ = 0;
#endif
#ifdef EMULATOR_TSAN
  void* tsan_ = nullptr;
#endif
#if defined(__x86_64__)
  void* pointer_ = nullptr;
#else
  ucontext_t machine_;
#endif
  char* stack_ = nullptr;
};

}  // namespace emulator
