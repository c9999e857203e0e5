// The dropout op on CUDA: as csrc/dropout_params.h says, but the seed is on the device.
#pragma once

#include "cuda/scan.h"

namespace torchrnn {
namespace cuda {

struct Dropout {
  Dtype dtype;
  const void* x;  // [count], or one number that stands for all
  bool one;
  void* y;  // [count]
  int64_t count;
  const int64_t* seed;
  uint32_t threshold;
  double scale;
};

int run_dropout(const Dropout& p, void* stream);

}  // namespace cuda
}  // namespace torchrnn
