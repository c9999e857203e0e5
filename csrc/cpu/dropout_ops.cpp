// The CPU kernel behind torchrnn::dropout. Schema, argument errors and gradient are in torchrnn/dropout.py.

#include <torch/csrc/stable/library.h>

#include "cpu/tensors.h"
#include "dropout_arguments.h"

namespace torchrnn {
namespace cpu {
namespace {

template <typename T>
Tensor dropped(const Tensor& x, const Tensor& seed, double keep) {
  Widened<T> wide(wide_type(x));
  DropoutParams<T> p{};
  p.threshold = dropout_threshold(x, seed, keep);
  p.count = x.numel();
  if (p.count == 0) return torch::stable::new_empty(x, x.sizes());
  // Other dtypes are spread out all the same, as conversion does not keep the strides of 0.
  p.one = is_one_number(x) && x.scalar_type() == wide_type(x);
  p.x = p.one ? x.template const_data_ptr<T>() : wide.dense(x);
  const Tensor y = torch::stable::new_empty(x, x.sizes(), wide_type(x));
  p.y = y.template mutable_data_ptr<T>();
  p.seed = uint64_t(*seed.const_data_ptr<int64_t>());
  p.scale = T(1) / T(keep);
  const int threads = threads_for(0.5 * double(p.count));
  if constexpr (sizeof(T) == sizeof(float))
    kernels().dropout_f32(p, threads, run_team);
  else
    kernels().dropout_f64(p, threads, run_team);
  return rounded(y, x.scalar_type());
}

Tensor dropout(const Tensor& x, const Tensor& seed, double keep) {
  return wide_type(x) == ScalarType::Double ? dropped<double>(x, seed, keep) : dropped<float>(x, seed, keep);
}

}  // namespace
}  // namespace cpu
}  // namespace torchrnn

STABLE_TORCH_LIBRARY_IMPL(torchrnn, CPU, m) { m.impl("dropout", TORCH_BOX(&torchrnn::cpu::dropout)); }
