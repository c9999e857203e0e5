// The CPU kernel behind torchrnn::dropout. Schema, argument errors and gradient are in torchrnn/dropout.py.

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "checks.h"
#include "cpu/tensors.h"

namespace torchrnn {
namespace cpu {
namespace {

// Below this many numbers a thread is not worth starting.
constexpr int64_t kNumbersPerThread = 1 << 15;

// One number that stands for all is not spread out: a whole mask is made of a one, say.
bool is_one_number(const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) != 1 && x.stride(d) != 0) return false;
  return true;
}

template <typename T>
Tensor dropped(const Tensor& x, const Tensor& seed, double keep) {
  Widened<T> wide(wide_type(x));
  DropoutParams<T> p{};
  p.count = x.numel();
  if (p.count == 0) return torch::stable::new_empty(x, x.sizes());
  // Other dtypes are spread out all the same, as conversion does not keep the strides of 0.
  p.one = is_one_number(x) && x.scalar_type() == wide_type(x);
  p.x = p.one ? x.template const_data_ptr<T>() : wide.dense(x);
  const Tensor y = torch::stable::new_empty(x, x.sizes(), wide_type(x));
  p.y = y.template mutable_data_ptr<T>();
  p.seed = uint64_t(*seed.const_data_ptr<int64_t>());
  p.threshold = uint32_t(std::ceil((1 - keep) * 0x1p32));
  p.scale = T(1) / T(keep);
  const int threads = p.count < kNumbersPerThread ? 1 : int(torch::stable::get_num_threads());
  if constexpr (sizeof(T) == sizeof(float))
    kernels().dropout_f32(p, threads, run_team);
  else
    kernels().dropout_f64(p, threads, run_team);
  return rounded(y, x.scalar_type());
}

Tensor dropout(const Tensor& x, const Tensor& seed, double keep) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed must be one int64");
  STD_TORCH_CHECK(keep >= 0x1p-32 && keep <= 1, "keep must be in 2^-32..1, got ", keep);
  return wide_type(x) == ScalarType::Double ? dropped<double>(x, seed, keep) : dropped<float>(x, seed, keep);
}

}  // namespace
}  // namespace cpu
}  // namespace torchrnn

STABLE_TORCH_LIBRARY_IMPL(torchrnn, CPU, m) { m.impl("dropout", TORCH_BOX(&torchrnn::cpu::dropout)); }
