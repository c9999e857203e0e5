// Invariants of the ops files. Users' mistakes are refused in torchrnn/ops.py, with better words; what fails
// here called the op directly and wrongly.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define RNN_CHECK_SHAPE(tensor, ...) \
  ::torchrnn::check_shape(#tensor, tensor, std::initializer_list<int64_t>{__VA_ARGS__})

namespace torchrnn {

inline void check_shape(const char* name, const torch::stable::Tensor& tensor,
                        std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && tensor.size(i++) == size;
  STD_TORCH_CHECK(same, name, " has a wrong shape");
}

}  // namespace torchrnn
