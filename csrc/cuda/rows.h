// Small passes over tensors before and after the scan.
#pragma once

#include "cuda/scan.h"

namespace torchrnn {
namespace cuda {

// out[T, B, I] = x, with zeros past each row's length whatever is there: in a product a NaN would spread.
struct Unpadded {
  Dtype dtype;
  int64_t steps, batch, inputs;
  const void* x;
  int64_t stride_t, stride_b;
  const int64_t* lengths;  // null is all T
};
int copy_unpadded(const Unpadded& p, void* out, void* stream);

// out[k] = b_ih[k] + b_hh[k] for k < both, b_ih[k] from there on up to rows; then follow the rows - both
// numbers of b_hh that were left out.
template <typename Acc>
int sum_biases(Dtype dtype, const void* b_ih, const void* b_hh, int64_t rows, int64_t both, Acc* out,
               void* stream);

}  // namespace cuda
}  // namespace torchrnn
