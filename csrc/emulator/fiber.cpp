#include "emulator/fiber.h"

#include <cstdint>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Pushes the registers that a call preserves, stores the stack pointer in *from, takes `to` as the new one, pops.
extern "C" void madkernels_switch_stack(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.type madkernels_switch_stack, @function
madkernels_switch_stack:
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
.size madkernels_switch_stack, .-madkernels_switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
.text
.type madkernels_switch_stack, %function
madkernels_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size madkernels_switch_stack, .-madkernels_switch_stack
)");
#else
#error "the emulator's fibers are written for x86-64 and aarch64"
#endif

namespace madkernels::emulator {
namespace {

constexpr uint64_t kGuard = 0x5afe57ac5afe57acull;
constexpr size_t kGuardWords = 32;

// What the fiber entered next is to call, if it is new.
void (*next_function)(void*);
void* next_argument;

void start_fiber() {
  next_function(next_argument);
  __builtin_trap();  // it does not return
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
struct Fiber::Sanitizer {
  void* fiber_stack = nullptr;
  void* scheduler_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
};
#else
struct Fiber::Sanitizer {};
#endif

Fiber::Fiber() : stack_(new std::byte[kStackBytes]), sanitizer_(new Sanitizer) {
  for (size_t i = 0; i < kGuardWords; i++) std::memcpy(&stack_[i * sizeof(kGuard)], &kGuard, sizeof(kGuard));
}

Fiber::~Fiber() = default;

void Fiber::prepare(void (*f)(void*), void* argument) {
  // The registers that the switch pops, then the address it returns to; a call leaves the stack 8 bytes off a multiple
  // of 16.
  auto top = reinterpret_cast<uintptr_t>(stack_.get() + kStackBytes) & ~uintptr_t{63};
#if defined(__x86_64__)
  auto* words = reinterpret_cast<void**>(top) - 8;
  std::memset(words, 0, 8 * sizeof(void*));
  words[6] = reinterpret_cast<void*>(&start_fiber);
#else
  auto* words = reinterpret_cast<void**>(top) - 20;
  std::memset(words, 0, 20 * sizeof(void*));
  words[11] = reinterpret_cast<void*>(&start_fiber);
#endif
  context_ = words;
  start_ = {f, argument};
  fresh_ = true;
#if defined(__SANITIZE_ADDRESS__)
  sanitizer_->fiber_stack = nullptr;
#endif
}

void Fiber::enter() {
  if (fresh_) next_function = start_.f, next_argument = start_.argument;
  fresh_ = false;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&sanitizer_->scheduler_stack, stack_.get(), kStackBytes);
#endif
  madkernels_switch_stack(&scheduler_, context_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(sanitizer_->scheduler_stack, nullptr, nullptr);
#endif
}

void Fiber::arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &sanitizer_->scheduler_bottom, &sanitizer_->scheduler_size);
#endif
}

void Fiber::leave(bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &sanitizer_->fiber_stack, sanitizer_->scheduler_bottom,
                                 sanitizer_->scheduler_size);
#else
  static_cast<void>(last);
#endif
  madkernels_switch_stack(&context_, scheduler_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(sanitizer_->fiber_stack, &sanitizer_->scheduler_bottom, &sanitizer_->scheduler_size);
#endif
}

bool Fiber::overflowed() const {
  for (size_t i = 0; i < kGuardWords; i++) {
    uint64_t word;
    std::memcpy(&word, &stack_[i * sizeof(word)], sizeof(word));
    if (word != kGuard) return true;
  }
  return false;
}

}  // namespace madkernels::emulator
