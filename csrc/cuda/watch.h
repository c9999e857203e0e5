// What the emulator tells ThreadSanitizer, in a build with -fsanitize=thread; nothing in other builds. The
// sanitizer sees the accesses of the kernel, and by the clocks which of them are ordered; it does not see the
// emulator's own, which run under `Off`, as does every fiber that is not running. Built by g++ only.
#pragma once

#include <cstdint>

#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace torchrnn {
namespace emulator {
namespace watch {

#ifdef __SANITIZE_THREAD__
using Thread = void*;
inline Thread self() { return __tsan_get_current_fiber(); }
inline void become(Thread thread) { __tsan_switch_to_fiber(thread, 1); }  // 1: this orders nothing
inline void release(void* clock) { __tsan_release(clock); }
inline void acquire(void* clock) { __tsan_acquire(clock); }
inline void off() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
inline void on() { AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0); }

inline Thread create() {
  const Thread caller = self(), thread = __tsan_create_fiber(0);
  become(thread);
  off();
  become(caller);
  return thread;
}

// All that the thread did comes before what the caller does next.
inline void join(Thread thread) {
  const Thread caller = self();
  become(thread);
  release(thread);
  on();
  become(caller);
  acquire(thread);
  __tsan_destroy_fiber(thread);
}
#else
using Thread = int;
inline Thread self() { return 0; }
inline void become(Thread) {}
inline void release(void*) {}
inline void acquire(void*) {}
inline void off() {}
inline void on() {}
inline Thread create() { return 0; }
inline void join(Thread) {}
#endif

struct Off {
  Off() { off(); }
  Off(const Off&) = delete;
  Off& operator=(const Off&) = delete;
  ~Off() { on(); }
};

// What a thread did before release comes before what another does after acquire. Odd and even rounds apart,
// as a fast thread may be in the next round before a slow one has left the last.
struct Clock {
  char rounds[2];
  void release(uint64_t round) { watch::release(&rounds[round & 1]); }
  void acquire(uint64_t round) { watch::acquire(&rounds[round & 1]); }
};

}  // namespace watch
}  // namespace emulator
}  // namespace torchrnn
