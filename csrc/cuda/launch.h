// How the step path's kernels are started: a function object for each element, or for each row by one warp.
// A host compiler gets loops instead, so that tests run the same sources on a machine without a GPU.
#pragma once

#include <cstdint>

#include "cells/math.h"

namespace torchrnn {
namespace cuda {

// The lanes that share a row: lane k has the columns k, k + count, ...
struct Lanes {
  int lane, count;

  template <typename T>
  RNN_FN T sum(T x) const {
#ifdef __CUDA_ARCH__
    // All lanes get the same sum, whose order is fixed.
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
#endif
    return x;
  }
};

#ifdef __CUDACC__

constexpr int kThreads = 256, kWarp = 32;

template <typename Use>
__global__ void __launch_bounds__(kThreads, 1) each_element(int64_t count, Use use) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) use(i);
}

template <typename Use>
__global__ void __launch_bounds__(kThreads, 1) each_row(int64_t count, Use use) {
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (row < count) use(row, Lanes{int(threadIdx.x) % kWarp, kWarp});
}

// Start use(i) for i in 0..count-1, or use(row, lanes). Return CUDA's error code.
template <typename Use>
int for_each(int64_t count, const Use& use, void* stream) {
  if (count == 0) return 0;
  each_element<<<unsigned((count + kThreads - 1) / kThreads), kThreads, 0, cudaStream_t(stream)>>>(count,
                                                                                                   use);
  return cudaPeekAtLastError();
}

template <typename Use>
int for_each_row(int64_t count, const Use& use, void* stream) {
  if (count == 0) return 0;
  constexpr int kRows = kThreads / kWarp;
  each_row<<<unsigned((count + kRows - 1) / kRows), kThreads, 0, cudaStream_t(stream)>>>(count, use);
  return cudaPeekAtLastError();
}

#else

template <typename Use>
int for_each(int64_t count, const Use& use, void*) {
  for (int64_t i = 0; i < count; ++i) use(i);
  return 0;
}

template <typename Use>
int for_each_row(int64_t count, const Use& use, void*) {
  for (int64_t row = 0; row < count; ++row) use(row, Lanes{0, 1});
  return 0;
}

#endif

}  // namespace cuda
}  // namespace torchrnn
