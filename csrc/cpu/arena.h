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
    for (int i = 0; i < count_; ++i) free(blocks_[i]);
  }

  // count values, aligned to a cache line; also for count 0 a pointer that is not null.
  template <typename T>
  T* get(int64_t count) {
    const size_t bytes = (count * sizeof(T) / 64 + 1) * 64;
    if (bytes <= kInline - used_) {
      used_ += bytes;
      return reinterpret_cast<T*>(inline_ + used_ - bytes);
    }
    void* block = count_ < kMaxBlocks ? aligned_alloc(64, bytes) : nullptr;
    if (block == nullptr) throw std::bad_alloc();
    blocks_[count_++] = block;
    return static_cast<T*>(block);
  }

 private:
  // What a small step needs comes from the stack.
  static constexpr size_t kInline = 16 * 1024;
  alignas(64) char inline_[kInline];
  size_t used_ = 0;

  static constexpr int kMaxBlocks = 64;
  void* blocks_[kMaxBlocks];
  int count_ = 0;
};

}  // namespace RNN_ISA
}  // namespace torchrnn
