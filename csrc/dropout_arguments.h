// What the ops files of the devices share of the dropout op.
#pragma once

#include <cmath>

#include "checks.h"

namespace torchrnn {

// One number that stands for all is not spread out: a whole mask is made of a one, say.
inline bool is_one_number(const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) != 1 && x.stride(d) != 0) return false;
  return true;
}

// What a random number must reach for its element to be kept; raises if an argument does not hold.
inline uint32_t dropout_threshold(const Tensor& x, const Tensor& seed, double keep) {
  check_floating("x", x);
  check_memory("x", x);
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed must be one int64");
  check_device("seed", seed, Kind(x));
  STD_TORCH_CHECK(keep >= 0x1p-32 && keep <= 1, "keep must be in 2^-32..1, got ", keep);
  return uint32_t(std::ceil((1 - keep) * 0x1p32));
}

}  // namespace torchrnn
