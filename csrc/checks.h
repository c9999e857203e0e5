// Checks of single tensors for the ops files. Users' mistakes are refused in Python, with better words; what
// fails here called an op directly and wrongly. The ops are public to compiled and exported programs, so that
// nothing is taken on trust.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace torchrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string text_of_shape(const int64_t* sizes, int64_t dim) {
  std::string text = "[";
  for (int64_t i = 0; i < dim; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline void check_shape(const char* name, const Tensor& tensor, const int64_t* shape, int64_t dim) {
  bool same = tensor.dim() == dim;
  for (int64_t i = 0; i < dim && same; ++i) same = tensor.size(i) == shape[i];
  if (same) return;
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(false, name, " must be ", text_of_shape(shape, dim), ", got ",
                  text_of_shape(sizes.data(), int64_t(sizes.size())));
}

inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  check_shape(name, tensor, shape.begin(), int64_t(shape.size()));
}

inline void check_floating(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

// What tells apart tensors that one kernel cannot read together, by the shim: torch::stable::Tensor turns
// each of these codes into an enumeration first, and small steps would feel it.
struct Kind {
  int32_t dtype, device_type, device_index;

  explicit Kind(const Tensor& tensor) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
  }
  bool same_device(const Kind& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
};

// Memory that was given back, as sharded training does between steps, has sizes still.
inline void check_memory(const char* name, const Tensor& tensor) {
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  STD_TORCH_CHECK(bytes > 0 || tensor.numel() == 0, name, " has no memory");
}

inline void check_device(const char* name, const Tensor& tensor, const Kind& x) {
  STD_TORCH_CHECK(Kind(tensor).same_device(x), name, " must be on x's device");
  check_memory(name, tensor);
}

inline void check_like(const char* name, const Tensor& tensor, const Kind& x) {
  const Kind kind(tensor);
  STD_TORCH_CHECK(kind.dtype == x.dtype, name, " must have x's dtype");
  STD_TORCH_CHECK(kind.same_device(x), name, " must be on x's device");
  check_memory(name, tensor);
}

}  // namespace torchrnn
