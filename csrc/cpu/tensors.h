// What the files of CPU ops share: the instruction set and the threads that kernels run on, and the way from
// tensors to pointers. Together with the ops the only CPU code that includes torch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"

namespace torchrnn {
namespace cpu {

// Instruction sets
// ------------------------------------------------------------------------------------------------

inline bool isa_supported(int64_t isa) {
  switch (Isa(isa)) {
    case Isa::kGeneric:
      return true;
#ifdef __x86_64__
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return isa_supported(int64_t(Isa::kAvx2)) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl");
#endif
    default:
      return false;
  }
}

inline int64_t best_isa() {
  int64_t isa = kIsaCount - 1;
  while (!isa_supported(isa)) --isa;
  return isa;
}

inline std::atomic<int64_t> active_isa{best_isa()};

inline const Kernels& kernels_of(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa < kIsaCount && isa_supported(isa), "instruction set ", isa,
                  " is not supported");
#ifdef __x86_64__
  if (Isa(isa) == Isa::kAvx512) return kAvx512Kernels;
  if (Isa(isa) == Isa::kAvx2) return kAvx2Kernels;
#endif
  return kGenericKernels;
}

inline const Kernels& kernels() { return kernels_of(active_isa.load(std::memory_order_relaxed)); }

// Threads
// ---------------------------------------------------------------------------------------------------------

// How many threads share work that takes one thread so many nanoseconds. Another thread halves them at best,
// and costs a time slice of the system, milliseconds, if its core is taken just then: the caller alone does
// what is soon done.
inline int threads_for(double nanoseconds) {
  return nanoseconds < 150e3 ? 1 : int(torch::stable::get_num_threads());
}

// Runs a team on torch's threads. Inside another parallel region, say, parallel_for calls all from one.
inline void run_team(int threads, Task task, void* context) {
  if (threads <= 1) return task(context, 0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t id = begin; id < end; ++id) task(context, int(id));
  });
}

inline ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Owns the widened copies that the pointers of a parameter struct point to.
template <typename T>
class Widened {
 public:
  explicit Widened(ScalarType dtype) : dtype_(dtype) {}

  // In the kernels' dtype, the last dimension with stride 1.
  Tensor rows(const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    if (tensor.scalar_type() == dtype_ && (tensor.size(last) <= 1 || tensor.stride(last) == 1)) return tensor;
    return dense_tensor(tensor, dtype_);
  }
  const T* dense(const Tensor& tensor) { return dense_tensor(tensor, dtype_).template const_data_ptr<T>(); }
  const T* dense(const MaybeTensor& tensor) { return tensor.has_value() ? dense(*tensor) : nullptr; }
  const T* dense(const Tensors& tensors, int64_t d) { return tensors.empty() ? nullptr : dense(tensors[d]); }
  template <typename U>
  const U* dense_as(const MaybeTensor& tensor, ScalarType dtype) {
    if (!tensor.has_value()) return nullptr;
    return dense_tensor(*tensor, dtype).template const_data_ptr<U>();
  }

 private:
  // A tensor that is as it should be is alive for the call anyway, and is spared the calls of torch's
  // operators: they would cost more than a small step.
  Tensor dense_tensor(const Tensor& tensor, ScalarType dtype) {
    const bool converts = tensor.scalar_type() != dtype;
    if (!converts && tensor.is_contiguous()) return tensor;
    return keep(torch::stable::contiguous(converts ? torch::stable::to(tensor, dtype) : tensor));
  }
  Tensor keep(const Tensor& tensor) {
    kept_.push_back(tensor);
    return tensor;
  }

  ScalarType dtype_;
  Tensors kept_;
};

// By the shim: torch::stable::new_empty goes through the dispatcher, and small steps would feel it.
inline Tensor empty(const int64_t* shape, int64_t dim, ScalarType dtype) {
  constexpr int64_t kMaxDim = 4;
  STD_TORCH_CHECK(dim <= kMaxDim, "at most 4 dimensions are needed, got ", dim);
  int64_t strides[kMaxDim];
  for (int64_t i = dim, stride = 1; i-- > 0; stride *= shape[i] > 0 ? shape[i] : 1) strides[i] = stride;
  const int32_t code = dtype == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, shape, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype) {
  return empty(shape.begin(), int64_t(shape.size()), dtype);
}

inline Tensor rounded(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

}  // namespace cpu
}  // namespace torchrnn
