// What the machine can do at most, for bench to measure the layers against.
#pragma once

#include "cpu/team.h"
#include "cpu/tile.h"

namespace torchrnn {
inline namespace RNN_ISA {

// Independent multiply-adds, as many at a time as hide their latency. Returns how many scalar ones were made.
inline double multiply_add_loop(int64_t iterations) {
  using V = VecOf<float>;
  const ZeroUpper end;
  constexpr int kChains = 10;
  V sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = V(float(i));
  V a(0.999f), b(0.001f);
  for (int64_t k = 0; k < iterations; ++k) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * a + b;
  }
  float total = 0;
  for (int i = 0; i < kChains; ++i) total += sum[i].sum();
  // A use that the compiler cannot see through.
  asm volatile("" : : "m"(total));
  return double(iterations) * kChains * V::kSize;
}

inline float read_loop(const float* data, int64_t count, int64_t times) {
  using V = VecOf<float>;
  const ZeroUpper end;
  constexpr int kChains = 8;
  float total = 0;
  for (int64_t n = 0; n < times; ++n) {
    // Inside the loop over times, else GCC keeps the sums in memory for the asm below.
    V sum[kChains];
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sum[i] = V(0.0f);
    for (int64_t k = 0; k + kChains * V::kSize <= count; k += kChains * V::kSize)
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) sum[i] += V::load(data + k + i * V::kSize);
#pragma GCC unroll 16
    for (int i = 1; i < kChains; ++i) sum[0] += sum[i];
    total += sum[0].sum();
    asm volatile("" : : : "memory");
  }
  return total;
}

}  // namespace RNN_ISA
}  // namespace torchrnn
