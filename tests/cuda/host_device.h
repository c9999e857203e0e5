// In place of csrc/cuda/device.h in a build for the host: matrix products are loops, and there is no stream.
#pragma once

#include "cuda/half.h"
#include "cuda/scan.h"
#include "cuda/step.h"

namespace torchrnn {
namespace cuda {

struct Device {
  explicit Device(const torch::stable::Tensor&) {}
  int index() const { return 0; }
  void* stream() const { return nullptr; }
};

class Products {
 public:
  explicit Products(bool) {}
  Blas blas() { return {nullptr, &gemm}; }

 private:
  template <typename In, typename Sum, typename Out>
  static void multiply(bool transposed_a, bool transposed_b, int64_t m, int64_t n, int64_t k, const void* a,
                       int64_t lda, const void* b, int64_t ldb, bool accumulates, void* c, int64_t ldc) {
    const In *left = static_cast<const In*>(a), *right = static_cast<const In*>(b);
    Out* out = static_cast<Out*>(c);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        Sum total = accumulates ? Sum(widen(out[i * ldc + j])) : Sum(0);
        for (int64_t l = 0; l < k; ++l)
          total += Sum(widen(left[transposed_a ? l * lda + i : i * lda + l])) *
                   Sum(widen(right[transposed_b ? j * ldb + l : l * ldb + j]));
        round_to(decltype(widen(Out()))(total), out[i * ldc + j]);
      }
  }

  static void gemm(void*, Dtype in, Dtype out, bool transposed_a, bool transposed_b, int64_t m, int64_t n,
                   int64_t k, const void* a, int64_t lda, const void* b, int64_t ldb, bool accumulates,
                   void* c, int64_t ldc) {
    if (k == 0) return;  // As on the device, where nothing is started then.
    if (in == Dtype::kFloat64)
      return multiply<double, double, double>(transposed_a, transposed_b, m, n, k, a, lda, b, ldb,
                                              accumulates, c, ldc);
    with_io<float>(in, [&](auto number) {
      using In = decltype(number);
      const auto run = out == Dtype::kFloat32 ? multiply<In, double, float> : multiply<In, double, In>;
      run(transposed_a, transposed_b, m, n, k, a, lda, b, ldb, accumulates, c, ldc);
      return 0;
    });
  }
};

// The emulated device has clusters.
inline int compute_capability(int) { return 90; }

}  // namespace cuda
}  // namespace torchrnn
