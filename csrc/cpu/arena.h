// Uninitialised memory for the length of a call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace torchrnn {
inline namespace RNN_ISA {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    while (blocks_ != nullptr) {
      void* before = *static_cast<void**>(blocks_);
      free(blocks_);
      blocks_ = before;
    }
  }

  // count values, aligned to a cache line; also for count 0 a pointer that is not null.
  template <typename T>
  T* get(int64_t count) {
    const size_t bytes = (count * sizeof(T) / 64 + 1) * 64;
    if (bytes <= kInline - used_) {
      used_ += bytes;
      return reinterpret_cast<T*>(inline_ + used_ - bytes);
    }
    // In front of the values, on a line of its own, the address of the block before.
    void* block = aligned_alloc(64, 64 + bytes);
    if (block == nullptr) throw std::bad_alloc();
    *static_cast<void**>(block) = blocks_;
    blocks_ = block;
    return reinterpret_cast<T*>(static_cast<char*>(block) + 64);
  }

 private:
  // What a small step needs comes from the stack.
  static constexpr size_t kInline = 16 * 1024;
  alignas(64) char inline_[kInline];
  size_t used_ = 0;

  void* blocks_ = nullptr;  // the last one
};

}  // namespace RNN_ISA
}  // namespace torchrnn
