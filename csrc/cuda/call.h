// One call of a layer op: its sizes and device, the structs of scan.h from torch's tensors, and the tensors
// that their pointers point to. With ops.cpp and device.h all that includes torch here.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "cuda/rows.h"
#include "cuda/scan.h"

// Tests build this for the host, with a device whose kernels are loops.
#ifdef RNN_ON_HOST
#include "host_device.h"
#else
#include "cuda/device.h"
#endif

namespace torchrnn {
namespace cuda {

inline void check(int error) {
  STD_TORCH_CHECK(error == 0, "CUDA error ", error, " in a kernel of torchrnn");
}

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBfloat16;
    default:
      return Dtype::kFloat16;
  }
}

template <typename Acc>
inline constexpr ScalarType kAcc = sizeof(Acc) == sizeof(double) ? ScalarType::Double : ScalarType::Float;

// One op's device, and the tensors that its pointers point to.
template <typename Acc>
class Call {
 public:
  explicit Call(const Arguments& a)
      : a_(a), x_(a.x), sizes_(checked_sizes(a)), dtype_(dtype_of(a.x)), device_(a.x), products_(a.tf32) {
    STD_TORCH_CHECK(rows() <= INT32_MAX && gates() <= INT32_MAX && sizes_.inputs <= INT32_MAX,
                    "matrices of at most 2^31 - 1 rows and columns are supported");
  }

  const Device& device() const { return device_; }
  Blas blas() { return products_.blas(); }
  const Sizes& sizes() const { return sizes_; }
  int64_t rows() const { return sizes_.steps * sizes_.batch; }
  int64_t gates() const { return cell_info(a_.cell).gates * sizes_.hidden; }
  Dtype sums() const { return sizeof(Acc) == sizeof(double) ? Dtype::kFloat64 : Dtype::kFloat32; }

  // New memory on the device, of x's dtype or another one; what is kept lives as long as the call.
  Tensor empty(std::initializer_list<int64_t> shape, std::optional<ScalarType> dtype = std::nullopt) const {
    return torch::stable::new_empty(x_, {shape.begin(), shape.size()}, dtype);
  }
  Tensor zeros(std::initializer_list<int64_t> shape, std::optional<ScalarType> dtype = std::nullopt) const {
    return torch::stable::new_zeros(x_, {shape.begin(), shape.size()}, dtype);
  }
  void* keep_empty(std::initializer_list<int64_t> shape, std::optional<ScalarType> dtype = std::nullopt) {
    return pointer(keep(empty(shape, dtype)));
  }
  static void* pointer(const Tensor& tensor) { return tensor.mutable_data_ptr(); }
  static Acc* sums_pointer(const Tensor& tensor) { return tensor.mutable_data_ptr<Acc>(); }

  // Dense, of a dtype; null if absent.
  const void* dense(const Tensor& tensor, std::optional<ScalarType> dtype = std::nullopt) {
    const bool converts = dtype.has_value() && tensor.scalar_type() != *dtype;
    if (!converts && tensor.is_contiguous()) return tensor.const_data_ptr();
    return keep(torch::stable::contiguous(converts ? torch::stable::to(tensor, dtype) : tensor))
        .const_data_ptr();
  }
  const void* dense(const MaybeTensor& tensor, std::optional<ScalarType> dtype = std::nullopt) {
    return tensor.has_value() ? dense(*tensor, dtype) : nullptr;
  }
  const void* dense(Part part, int64_t d, std::optional<ScalarType> dtype = std::nullopt) {
    const Tensor* tensor = a_.part(part, d);
    return tensor == nullptr ? nullptr : dense(*tensor, dtype);
  }
  const Acc* wide(const MaybeTensor& tensor) { return static_cast<const Acc*>(dense(tensor, kAcc<Acc>)); }
  const Acc* wide(Part part, int64_t d) { return static_cast<const Acc*>(dense(part, d, kAcc<Acc>)); }

  // x with zeros past the lengths, if there are some and they matter, dense in any case: [T*B, I].
  const void* inputs(bool without_padding) {
    if (x_.is_contiguous() && (lengths() == nullptr || !without_padding)) return x_.const_data_ptr();
    const bool strided = x_.stride(2) == 1 || x_.size(2) <= 1;
    const Tensor rows = strided ? x_ : keep(torch::stable::contiguous(x_));
    void* out = keep_empty({sizes_.steps, sizes_.batch, sizes_.inputs});
    check(copy_unpadded({dtype_, sizes_.steps, sizes_.batch, sizes_.inputs, rows.const_data_ptr(),
                         rows.stride(0), rows.stride(1), without_padding ? lengths() : nullptr},
                        out, device_.stream()));
    return out;
  }
  const int64_t* lengths() {
    if (lengths_ == nullptr) lengths_ = static_cast<const int64_t*>(dense(a_.lengths, ScalarType::Long));
    return lengths_;
  }

  // c[m, n] = op(a) op(b); dense, from x's dtype to `out`.
  void product(Dtype out, bool transposed_a, bool transposed_b, int64_t m, int64_t n, int64_t k,
               const void* a, const void* b, void* c, bool accumulates = false) {
    const Blas blas = products_.blas();
    blas.gemm(blas.context, dtype_, out, transposed_a, transposed_b, m, n, k, a, transposed_a ? m : k, b,
              transposed_b ? k : n, accumulates, c, n);
  }

  // Everything but the outputs.
  ForwardScan<Acc> scan() {
    ForwardScan<Acc> p{};
    p.cell = Cell(a_.cell), p.activation = Activation(a_.activation), p.dtype = dtype_;
    p.steps = sizes_.steps, p.batch = sizes_.batch, p.hidden = sizes_.hidden, p.outputs = sizes_.outputs;
    p.directions = sizes_.directions, p.reverse = a_.reverse, p.projected = a_.parts.projection;
    p.tf32 = a_.tf32;
    p.cell_clip = bound<Acc>(a_.cell_clip), p.proj_clip = bound<Acc>(a_.proj_clip),
    p.norm_eps = Acc(a_.norm_eps);
    for (int64_t d = 0; d < p.directions; ++d) {
      auto& w = p.direction[d];
      w.weight_hh = dense(Part::kWeightHh, d), w.weight_hr = dense(Part::kWeightHr, d);
      w.peephole = wide(Part::kPeephole, d);
      w.norm_gain = wide(Part::kNormGain, d), w.norm_shift = wide(Part::kNormShift, d);
    }
    p.h0 = wide(a_.h0), p.c0 = wide(a_.c0);
    p.lengths = lengths(), p.resets = static_cast<const bool*>(dense(a_.resets, ScalarType::Bool));
    p.mask_h = wide(a_.mask_h), p.mask_c = wide(a_.mask_c);
    if (a_.mask_h.has_value()) p.mask_h_steps = a_.mask_h->size(1);
    if (a_.mask_c.has_value()) p.mask_c_steps = a_.mask_c->size(1);
    p.tape_size = tape_size(a_, p);
    return p;
  }

  // Biases and W x of one direction.
  void project(DirectionForward<Acc>& w, int64_t d, const void* x) {
    if (a_.parts.bias) {
      const bool apart = Cell(a_.cell) == Cell::kGru;  // The reset gate multiplies b_hn.
      const int64_t both = apart ? gates() - sizes_.hidden : gates();
      Acc* bias = static_cast<Acc*>(keep_empty({2 * gates() - both}, kAcc<Acc>));
      check(sum_biases(dtype_, dense(Part::kBiasIh, d), dense(Part::kBiasHh, d), gates(), both, bias,
                       device_.stream()));
      w.bias = bias, w.bias_h = apart ? bias + gates() : nullptr;
    }
    Acc* wx = static_cast<Acc*>(keep_empty({rows(), gates()}, kAcc<Acc>));
    product(sums(), false, true, rows(), gates(), sizes_.inputs, x, dense(Part::kWeightIh, d), wx);
    w.wx = wx;
  }

  template <typename Scan>
  void* workspace(const Scan& scan) {
    return keep_empty({step_workspace(scan)}, ScalarType::Byte);
  }

  Tensor keep(const Tensor& tensor) {
    kept_.push_back(tensor);
    return tensor;
  }

 private:
  const Arguments& a_;
  const Tensor& x_;
  Sizes sizes_;
  Dtype dtype_;
  Device device_;
  Products products_;
  const int64_t* lengths_ = nullptr;
  Tensors kept_;
};

}  // namespace cuda
}  // namespace torchrnn
