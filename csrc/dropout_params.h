// The plain struct of the dropout op, as params.h has those of the layers.
#pragma once

#include <cstdint>

namespace torchrnn {

// y[i] = scale * x[i] where the i-th random number is at least the threshold, else 0 * x[i]. The numbers are
// 32 bits each, of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose
// key is the seed; torchrnn/dropout.py says which of its outputs is the i-th.
template <typename T>
struct DropoutParams {
  const T* x;  // [count], or one number that stands for all
  bool one;    // it is one
  T* y;        // [count]
  int64_t count;
  uint64_t seed;
  uint32_t threshold;
  T scale;
};

}  // namespace torchrnn
