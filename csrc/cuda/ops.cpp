// The CUDA kernels behind torchrnn's ops: allocates outputs, fills the structs of scan.h, and runs the matrix
// products before and after the scan. Schemas, argument errors and gradients are in torchrnn/ops.py.
//
// Nothing here waits for the device, so calls can be captured in a CUDA graph. Tensors that are freed before
// the device is done with them are torch's allocator's business, which hands memory out by stream.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "arguments.h"
#include "cuda/dropout.h"
#include "cuda/rows.h"
#include "cuda/scan.h"
#include "dropout_arguments.h"

// Tests build this file for the host, with a device whose kernels are loops.
#ifdef RNN_ON_HOST
#include "host_device.h"
#else
#include "cuda/device.h"
#endif

namespace torchrnn {
namespace cuda {
namespace {

// The values are those of torchrnn/cuda.py.
enum class Path : int64_t { kAutomatic = 0, kStep = 1, kCluster = 2 };

void check(int error) { STD_TORCH_CHECK(error == 0, "CUDA error ", error, " in a kernel of torchrnn"); }

Dtype dtype_of(const Tensor& x) {
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
constexpr ScalarType kAcc = sizeof(Acc) == sizeof(double) ? ScalarType::Double : ScalarType::Float;

// One op's device, and the tensors that its pointers point to.
template <typename Acc>
class Call {
 public:
  explicit Call(const Arguments& a)
      : a_(a), x_(a.x), sizes_(checked_sizes(a)), dtype_(dtype_of(a.x)), device_(a.x, a.tf32) {
    STD_TORCH_CHECK(rows() <= INT32_MAX && gates() <= INT32_MAX && sizes_.inputs <= INT32_MAX,
                    "matrices of at most 2^31 - 1 rows and columns are supported");
  }

  Device& device() { return device_; }
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
  const void* dense(const Tensors& tensors, int64_t d, std::optional<ScalarType> dtype = std::nullopt) {
    return tensors.empty() ? nullptr : dense(tensors.at(d), dtype);
  }
  const Acc* wide(const MaybeTensor& tensor) { return static_cast<const Acc*>(dense(tensor, kAcc<Acc>)); }
  const Acc* wide(const Tensors& tensors, int64_t d) {
    return static_cast<const Acc*>(dense(tensors, d, kAcc<Acc>));
  }

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
    const Blas blas = device_.blas();
    blas.gemm(blas.context, dtype_, out, transposed_a, transposed_b, m, n, k, a, transposed_a ? m : k, b,
              transposed_b ? k : n, accumulates, c, n);
  }

  // Everything but the outputs.
  ForwardScan<Acc> scan() {
    ForwardScan<Acc> p{};
    p.cell = Cell(a_.cell), p.activation = Activation(a_.activation), p.dtype = dtype_;
    p.steps = sizes_.steps, p.batch = sizes_.batch, p.hidden = sizes_.hidden, p.outputs = sizes_.outputs;
    p.directions = sizes_.directions, p.reverse = a_.reverse, p.projected = !a_.weight_hr.empty();
    p.cell_clip = bound<Acc>(a_.cell_clip), p.proj_clip = bound<Acc>(a_.proj_clip),
    p.norm_eps = Acc(a_.norm_eps);
    for (int64_t d = 0; d < p.directions; ++d) {
      auto& w = p.direction[d];
      w.weight_hh = dense(a_.weight_hh, d), w.weight_hr = dense(a_.weight_hr, d);
      w.peephole = wide(a_.peephole, d);
      w.norm_gain = wide(a_.norm_gain, d), w.norm_shift = wide(a_.norm_shift, d);
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
    if (!a_.bias_ih.empty()) {
      const bool apart = Cell(a_.cell) == Cell::kGru;  // The reset gate multiplies b_hn.
      const int64_t both = apart ? gates() - sizes_.hidden : gates();
      Acc* bias = static_cast<Acc*>(keep_empty({2 * gates() - both}, kAcc<Acc>));
      check(sum_biases(dtype_, dense(a_.bias_ih, d), dense(a_.bias_hh, d), gates(), both, bias,
                       device_.stream()));
      w.bias = bias, w.bias_h = apart ? bias + gates() : nullptr;
    }
    Acc* wx = static_cast<Acc*>(keep_empty({rows(), gates()}, kAcc<Acc>));
    product(sums(), false, true, rows(), gates(), sizes_.inputs, x, dense(a_.weight_ih, d), wx);
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
  const int64_t* lengths_ = nullptr;
  Tensors kept_;
};

// Whether a call is to run on the cluster path. Only if it is asked for, as long as no committed measurement
// shows where it is the faster one: see the table in torchrnn/cuda.py.
template <typename Acc>
bool takes_cluster(const Arguments& a, const ForwardScan<Acc>& p, int device) {
  if (Path(a.path) != Path::kCluster) return false;
  const char* why_not = "float64 is not served";
  if constexpr (sizeof(Acc) == sizeof(float)) why_not = cluster_why_not(p, device);
  STD_TORCH_CHECK(why_not == nullptr, "the cluster path does not serve this call: ", why_not);
  return true;
}

struct LayerOutput { Tensor y, c_all, h_n, c_n, tape; };

template <typename Acc>
LayerOutput forward(const Arguments& a, bool all_states, bool training) {
  Call<Acc> call(a);
  ForwardScan<Acc> p = call.scan();
  const bool memory = cell_info(a.cell).memory;
  const ScalarType dtype = a.x.scalar_type();
  LayerOutput out{
      call.empty({p.steps, p.batch, p.directions * p.outputs}),
      memory && all_states ? call.empty({p.steps, p.batch, p.directions * p.hidden}) : call.empty({0}),
      call.empty({p.directions, p.batch, p.outputs}, kAcc<Acc>),
      memory ? call.empty({p.directions, p.batch, p.hidden}, kAcc<Acc>) : call.empty({0}, kAcc<Acc>),
      // The kernels leave out what is past a row's length; it is to be the same number at every call.
      !training               ? call.empty({0}, kAcc<Acc>)
      : a.lengths.has_value() ? call.zeros({p.directions, p.steps, p.batch, p.tape_size}, kAcc<Acc>)
                              : call.empty({p.directions, p.steps, p.batch, p.tape_size}, kAcc<Acc>),
  };
  p.y = call.pointer(out.y), p.h_n = call.sums_pointer(out.h_n);
  if (memory) p.c_n = call.sums_pointer(out.c_n);
  if (memory && all_states) p.c_all = call.pointer(out.c_all);
  if (training) p.tape = call.sums_pointer(out.tape);
  const bool cluster = takes_cluster(a, p, call.device().index());
  const void* x = call.inputs(false);
  for (int64_t d = 0; d < p.directions; ++d) call.project(p.direction[d], d, x);
  void* stream = call.device().stream();
  if constexpr (sizeof(Acc) == sizeof(float)) {
    if (cluster) check(cluster_forward(p, stream));
  }
  if (!cluster) check(step_forward(p, call.device().blas(), call.workspace(p), stream));
  const auto rounded = [&](const Tensor& state) {
    return dtype == kAcc<Acc> ? state : torch::stable::to(call.keep(state), dtype);
  };
  return {out.y, out.c_all, rounded(out.h_n), rounded(out.c_n), out.tape};
}

struct LayerGradient {
  Tensor dx, dh0, dc0;
  Tensors dweights;
};
struct Needs { bool dx, dstate, dweights; };

// The gradients by one direction's weights, from what the scan left.
template <typename Acc>
class WeightGradients {
 public:
  WeightGradients(Call<Acc>& call, const Arguments& a, const BackwardScan<Acc>& q, const void* x)
      : call_(call), a_(a), q_(q), x_(x) {}

  Tensor weight_ih(int64_t d) {
    return product(q_.direction[d].dgates_x, call_.gates(), call_.gates(), x_, call_.sizes().inputs);
  }
  Tensor weight_hh(int64_t d) {
    const auto& w = q_.direction[d];
    const int64_t H = call_.sizes().hidden, R = call_.sizes().outputs;
    if (Cell(a_.cell) != Cell::kGruResetBefore)
      return product(gates_h(d), call_.gates(), call_.gates(), w.h_prev, R);
    // The rows of n were multiplied by r * h.
    const Tensor out = zeros_or_empty({3 * H, H});
    char* to = static_cast<char*>(call_.pointer(out));
    const auto part = [&](int64_t first, int64_t count, const void* right) {
      columns_product(static_cast<const char*>(w.dgates_x) + first * size(), count, right, H,
                      to + first * H * size());
    };
    part(0, 2 * H, w.h_prev), part(2 * H, H, w.aside);
    return out;
  }
  Tensor bias_ih(int64_t d) { return column_sums(tensors_.x[d]); }
  Tensor bias_hh(int64_t d) { return column_sums(tensors_.h[d]); }
  Tensor weight_hr(int64_t d) {
    return product(q_.direction[d].dprojected, call_.sizes().outputs, call_.sizes().outputs,
                   q_.direction[d].aside, call_.sizes().hidden);
  }

  // The gate gradients as tensors, which the column sums need.
  struct { Tensors x, h; } tensors_;

 private:
  int64_t size() const { return sizeof(Acc) == 8 ? 8 : a_.x.scalar_type() == ScalarType::Float ? 4 : 2; }
  const void* gates_h(int64_t d) const {
    const auto& w = q_.direction[d];
    return w.dgates_h == nullptr ? w.dgates_x : w.dgates_h;
  }
  // left[T*B, distance]' right[T*B, n], of `count` columns of the left.
  Tensor product(const void* left, int64_t distance, int64_t count, const void* right, int64_t n) {
    const Tensor out = zeros_or_empty({count, n});
    run(left, distance, count, right, n, call_.pointer(out));
    return out;
  }
  // A product over no rows writes nothing.
  Tensor zeros_or_empty(std::initializer_list<int64_t> shape) {
    return call_.rows() > 0 ? call_.empty(shape) : call_.zeros(shape);
  }
  void columns_product(const void* left, int64_t count, const void* right, int64_t n, void* out) {
    run(left, call_.gates(), count, right, n, out);
  }
  void run(const void* left, int64_t distance, int64_t count, const void* right, int64_t n, void* out) {
    const Blas blas = call_.device().blas();
    const Dtype dtype = dtype_of(a_.x);
    blas.gemm(blas.context, dtype, dtype, true, false, count, n, call_.rows(), left, distance, right, n,
              false, out, n);
  }
  Tensor column_sums(const Tensor& gates) {
    const int64_t first[] = {0};
    return torch::stable::sum(gates, torch::headeronly::IntHeaderOnlyArrayRef(first, 1));
  }

  Call<Acc>& call_;
  const Arguments& a_;
  const BackwardScan<Acc>& q_;
  const void* x_;
};

template <typename Acc>
LayerGradient backward(const MaybeTensor& dy, const MaybeTensor& dc_all, const MaybeTensor& dh_n,
                       const MaybeTensor& dc_n, const Arguments& a, const Tensor& y, const Tensor& tape,
                       Needs needs) {
  Call<Acc> call(a);
  BackwardScan<Acc> q{};
  q.forward = call.scan();
  ForwardScan<Acc>& p = q.forward;
  const bool memory = cell_info(a.cell).memory;
  RNN_CHECK_SHAPE(y, p.steps, p.batch, p.directions * p.outputs);
  RNN_CHECK_SHAPE(tape, p.directions, p.steps, p.batch, p.tape_size);
  // The struct has no const for the outputs of forward, which are only read here.
  p.y = const_cast<void*>(call.dense(y)), p.tape = static_cast<Acc*>(const_cast<void*>(call.dense(tape)));
  if (dy.has_value()) {
    RNN_CHECK_SHAPE(*dy, p.steps, p.batch, p.directions * p.outputs);
    const bool strided = dy->stride(2) == 1 || dy->size(2) <= 1;
    const Tensor rows = strided ? *dy : call.keep(torch::stable::contiguous(*dy));
    q.dy = rows.const_data_ptr(), q.dy_stride_t = rows.stride(0), q.dy_stride_b = rows.stride(1);
  }
  q.dh_n = call.wide(dh_n);
  if (memory) q.dc_all = call.dense(dc_all), q.dc_n = call.wide(dc_n);
  const Tensor dh0 = call.empty({p.directions, p.batch, p.outputs}, kAcc<Acc>);
  const Tensor dc0 = call.empty({p.directions, p.batch, p.hidden}, kAcc<Acc>);
  q.dh0 = call.sums_pointer(dh0), q.dc0 = memory ? call.sums_pointer(dc0) : nullptr;

  const void* x = needs.dweights ? call.inputs(true) : nullptr;
  WeightGradients<Acc> gradients(call, a, q, x);
  Tensors dpeephole, dgain, dshift;
  const auto sums = [&](Tensors& list, const Tensors& like, int64_t d) -> Acc* {
    if (like.empty()) return nullptr;
    list.push_back(call.empty({like[d].size(0), p.hidden}, kAcc<Acc>));
    return call.sums_pointer(list.back());
  };
  for (int64_t d = 0; d < p.directions; ++d) {
    auto& w = q.direction[d];
    const auto& of = p.direction[d];
    w.weight_hh = of.weight_hh, w.weight_hr = of.weight_hr, w.peephole = of.peephole;
    w.norm_gain = of.norm_gain, w.norm_shift = of.norm_shift;
    const bool apart = p.cell == Cell::kGru, aside = p.projected || p.cell == Cell::kGruResetBefore;
    gradients.tensors_.x.push_back(call.empty({call.rows(), call.gates()}));
    gradients.tensors_.h.push_back(apart ? call.empty({call.rows(), call.gates()})
                                         : gradients.tensors_.x.back());
    w.dgates_x = call.pointer(gradients.tensors_.x.back());
    w.dgates_h = apart ? call.pointer(gradients.tensors_.h.back()) : nullptr;
    w.h_prev = call.keep_empty({call.rows(), p.outputs});
    w.aside = aside ? call.keep_empty({call.rows(), p.hidden}) : nullptr;
    w.dprojected = p.projected ? call.keep_empty({call.rows(), p.outputs}) : nullptr;
    w.dpeephole = sums(dpeephole, a.peephole, d);
    w.dnorm_gain = sums(dgain, a.norm_gain, d), w.dnorm_shift = sums(dshift, a.norm_shift, d);
  }
  const bool cluster = takes_cluster(a, p, call.device().index());
  void* stream = call.device().stream();
  if constexpr (sizeof(Acc) == sizeof(float)) {
    if (cluster) check(cluster_backward(q, stream));
  }
  if (!cluster) check(step_backward(q, call.device().blas(), call.workspace(q), stream));

  const ScalarType dtype = a.x.scalar_type();
  const auto rounded = [&](const Tensor& sum) {
    return dtype == kAcc<Acc> ? sum : torch::stable::to(call.keep(sum), dtype);
  };
  const Tensor none = call.empty({0});
  LayerGradient grad{none,
                     needs.dstate && a.h0.has_value() ? rounded(dh0) : none,
                     needs.dstate && a.c0.has_value() ? rounded(dc0) : none,
                     {}};
  if (needs.dx) {
    // Summed over the directions before it is rounded.
    const Tensor dx = call.empty({p.steps, p.batch, call.sizes().inputs}, kAcc<Acc>);
    for (int64_t d = 0; d < p.directions; ++d)
      call.product(call.sums(), false, false, call.rows(), call.sizes().inputs, call.gates(),
                   q.direction[d].dgates_x, call.dense(a.weight_ih, d), call.pointer(dx), d > 0);
    grad.dx = rounded(dx);
  }
  if (!needs.dweights) return grad;
  const auto list = [&](const Tensors& like, const auto& gradient) {
    for (size_t d = 0; d < like.size(); ++d) grad.dweights.push_back(gradient(d));
  };
  list(a.weight_ih, [&](int64_t d) { return gradients.weight_ih(d); });
  list(a.weight_hh, [&](int64_t d) { return gradients.weight_hh(d); });
  list(a.bias_ih, [&](int64_t d) { return gradients.bias_ih(d); });
  list(a.bias_hh, [&](int64_t d) { return gradients.bias_hh(d); });
  list(a.weight_hr, [&](int64_t d) { return gradients.weight_hr(d); });
  list(a.peephole, [&](int64_t d) { return rounded(dpeephole[d]); });
  list(a.norm_gain, [&](int64_t d) { return rounded(dgain[d]); });
  list(a.norm_shift, [&](int64_t d) { return rounded(dshift[d]); });
  return grad;
}

Tensor dropout(const Tensor& x, const Tensor& seed, double keep) {
  const uint32_t threshold = dropout_threshold(seed, keep);
  Device device(x, false);
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  const bool one = is_one_number(x);
  const Tensor dense = one ? x : torch::stable::contiguous(x);
  check(run_dropout({dtype_of(x), dense.const_data_ptr(), one, y.mutable_data_ptr(), x.numel(),
                     seed.const_data_ptr<int64_t>(), threshold, 1 / keep},
                    device.stream()));
  return y;
}

bool is_wide(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer(RNN_PARAMETERS, bool all_states) {
  const auto run = is_wide(x) ? forward<double> : forward<float>;
  const LayerOutput out = run(RNN_ARGUMENTS, all_states, true);
  return {out.y, out.c_all, out.h_n, out.c_n, out.tape};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_infer(RNN_PARAMETERS, bool all_states) {
  const auto run = is_wide(x) ? forward<double> : forward<float>;
  const LayerOutput out = run(RNN_ARGUMENTS, all_states, false);
  return {out.y, out.c_all, out.h_n, out.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensors> layer_backward(const MaybeTensor& dy, const MaybeTensor& dc_all,
                                                           const MaybeTensor& dh_n, const MaybeTensor& dc_n,
                                                           RNN_PARAMETERS, const Tensor& y,
                                                           const Tensor& tape, bool need_dx, bool need_dstate,
                                                           bool need_dweights) {
  const auto run = is_wide(x) ? backward<double> : backward<float>;
  const LayerGradient grad =
      run(dy, dc_all, dh_n, dc_n, RNN_ARGUMENTS, y, tape, {need_dx, need_dstate, need_dweights});
  return {grad.dx, grad.dh0, grad.dc0, grad.dweights};
}

}  // namespace
}  // namespace cuda
}  // namespace torchrnn

#ifdef RNN_ON_HOST
STABLE_TORCH_LIBRARY_IMPL(torchrnn, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(torchrnn, CUDA, m) {
#endif
  m.impl("layer", TORCH_BOX(&torchrnn::cuda::layer));
  m.impl("layer_infer", TORCH_BOX(&torchrnn::cuda::layer_infer));
  m.impl("layer_backward", TORCH_BOX(&torchrnn::cuda::layer_backward));
  m.impl("dropout", TORCH_BOX(&torchrnn::cuda::dropout));
}
