// The device that a tensor is on, for one op: makes it the current one, and has its stream. And its matrix
// products, which come from the cuBLAS that torch has loaded, by torch's handle, which knows stream and
// workspace; this library is not linked against one, since that would tie it to a version of CUDA.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include "arguments.h"
#include "cuda/scan.h"

namespace torchrnn {
namespace cuda {

// What is needed of cublas_api.h, which a machine with only nvcc does not have.
struct Cublas {
  using GemmEx = int (*)(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha,
                         const void* a, int type_a, int lda, const void* b, int type_b, int ldb,
                         const void* beta, void* c, int type_c, int ldc, int compute_type, int algorithm);
  using GetMathMode = int (*)(void* handle, int* mode);
  using SetMathMode = int (*)(void* handle, int mode);
  static constexpr int kNormal = 0, kTransposed = 1;      // cublasOperation_t
  static constexpr int kCompute32 = 68, kCompute64 = 70;  // cublasComputeType_t
  static constexpr int kDefaultAlgorithm = -1;            // cublasGemmAlgo_t
  static constexpr int kDefaultMath = 0, kTf32Math = 3;   // cublasMath_t
  static constexpr int kNoReducedSums = 16;               // likewise
  static int type(Dtype dtype) {                          // cudaDataType_t
    constexpr int kTypes[] = {0, 1, 14, 2};
    return kTypes[int(dtype)];
  }

  GemmEx gemm = nullptr;
  GetMathMode get_math_mode = nullptr;
  SetMathMode set_math_mode = nullptr;

  static const Cublas& loaded() {
    static const Cublas cublas;
    return cublas;
  }

 private:
  Cublas() {
    for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
      void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
      if (library == nullptr) continue;
      gemm = reinterpret_cast<GemmEx>(dlsym(library, "cublasGemmEx"));
      get_math_mode = reinterpret_cast<GetMathMode>(dlsym(library, "cublasGetMathMode"));
      set_math_mode = reinterpret_cast<SetMathMode>(dlsym(library, "cublasSetMathMode"));
      break;
    }
    STD_TORCH_CHECK(gemm != nullptr && get_math_mode != nullptr && set_math_mode != nullptr,
                    "torchrnn: torch has loaded no cuBLAS that the CUDA kernels know");
  }
};

class Device {
 public:
  explicit Device(const Tensor& x) : guard_(x.get_device_index()), index_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }

  int index() const { return index_; }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t index_;
  void* stream_ = nullptr;
};

// Matrix products on the stream of the current device, for the life of the object.
class Products {
 public:
  explicit Products(bool tf32) {
    TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle_));
    const Cublas& cublas = Cublas::loaded();
    // The handle is torch's: its mode is set back in the end.
    check_blas(cublas.get_math_mode(handle_, &mode_));
    const int mode = tf32 ? Cublas::kTf32Math : Cublas::kDefaultMath;
    check_blas(cublas.set_math_mode(handle_, mode | Cublas::kNoReducedSums));
  }
  Products(const Products&) = delete;
  ~Products() { Cublas::loaded().set_math_mode(handle_, mode_); }

  Blas blas() { return {this, &gemm}; }

 private:
  static void check_blas(int status) { STD_TORCH_CHECK(status == 0, "cuBLAS failed with status ", status); }

  // cuBLAS counts columns first, and so sees each matrix transposed: c' = op(b)' op(a)'.
  static void gemm(void* context, Dtype in, Dtype out, bool transposed_a, bool transposed_b, int64_t m,
                   int64_t n, int64_t k, const void* a, int64_t lda, const void* b, int64_t ldb,
                   bool accumulates, void* c, int64_t ldc) {
    if (m == 0 || n == 0 || k == 0) return;
    const bool wide = in == Dtype::kFloat64;
    const double one64 = 1, start64 = accumulates ? 1 : 0;
    const float one32 = 1, start32 = accumulates ? 1 : 0;
    const auto op = [](bool transposed) { return transposed ? Cublas::kTransposed : Cublas::kNormal; };
    check_blas(Cublas::loaded().gemm(
        static_cast<Products*>(context)->handle_, op(transposed_b), op(transposed_a), int(n), int(m), int(k),
        wide ? static_cast<const void*>(&one64) : &one32, b, Cublas::type(in), int(ldb), a, Cublas::type(in),
        int(lda), wide ? static_cast<const void*>(&start64) : &start32, c, Cublas::type(out), int(ldc),
        wide ? Cublas::kCompute64 : Cublas::kCompute32, Cublas::kDefaultAlgorithm));
  }

  void* handle_ = nullptr;
  int mode_ = 0;
};

}  // namespace cuda
}  // namespace torchrnn
