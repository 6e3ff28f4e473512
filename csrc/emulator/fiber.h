// A stack of its own to run a function on, and the switch to it and back. Saves what a call saves, so it costs about as much
// as one.
#pragma once

#include <cstddef>
#include <memory>

namespace madkernels::emulator {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 128 << 10;

  Fiber();
  ~Fiber();
  // Makes the next `enter` call f(argument) on this fiber's stack. f must not return: it ends with a last `leave`.
  void prepare(void (*f)(void*), void* argument);
  void enter();                   // from the scheduler
  void arrived();                 // first thing on the fiber's own stack
  void leave(bool last = false);  // to the scheduler
  bool overflowed() const;

 private:
  struct Sanitizer;
  struct Start {
    void (*f)(void*);
    void* argument;
  } start_{};
  bool fresh_ = false;
  std::unique_ptr<std::byte[]> stack_;
  void* context_ = nullptr;
  void* scheduler_ = nullptr;
  std::unique_ptr<Sanitizer> sanitizer_;
};

}  // namespace madkernels::emulator
