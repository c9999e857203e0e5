// The CUDA kernels behind torchrnn's ops: allocates outputs, fills the structs of scan.h, and runs the matrix
// products before and after the scan. Schemas, argument errors and gradients are in torchrnn/ops.py.
//
// Nothing here waits for the device, so calls can be captured in a CUDA graph. Tensors that are freed before
// the device is done with them are torch's allocator's business, which hands memory out by stream.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda/call.h"
#include "cuda/dispatch.h"
#include "cuda/dropout.h"
#include "dropout_arguments.h"

namespace torchrnn {
namespace cuda {
namespace {

// Whether a call runs on the cluster path; raises if that is asked for and does not serve the call.
template <typename Acc>
bool takes_cluster(const Arguments& a, const ForwardScan<Acc>& p, int device) {
  const Choice choice = choose(p, device, Path(a.path));
  STD_TORCH_CHECK(choice.why_not == nullptr, "the cluster path does not serve this call: ", choice.why_not);
  return choice.path == Path::kCluster;
}

struct LayerOutput { Tensor y, c_all, h_n, c_n, tape; };

template <typename Acc>
LayerOutput forward(const Arguments& a, bool training) {
  Call<Acc> call(a);
  ForwardScan<Acc> p = call.scan();
  const bool memory = cell_info(a.cell).memory;
  const ScalarType dtype = a.x.scalar_type();
  LayerOutput out{
      call.empty({p.steps, p.batch, p.directions * p.outputs}),
      memory && a.all_states ? call.empty({p.steps, p.batch, p.directions * p.hidden}) : call.empty({0}),
      call.empty({p.directions, p.batch, p.outputs}, kAcc<Acc>),
      memory ? call.empty({p.directions, p.batch, p.hidden}, kAcc<Acc>) : call.empty({0}, kAcc<Acc>),
      // The kernels leave out what is past a row's length; it is to be the same number at every call.
      !training               ? call.empty({0}, kAcc<Acc>)
      : a.lengths.has_value() ? call.zeros({p.directions, p.steps, p.batch, p.tape_size}, kAcc<Acc>)
                              : call.empty({p.directions, p.steps, p.batch, p.tape_size}, kAcc<Acc>),
  };
  p.y = call.pointer(out.y), p.h_n = call.sums_pointer(out.h_n);
  if (memory) p.c_n = call.sums_pointer(out.c_n);
  if (memory && a.all_states) p.c_all = call.pointer(out.c_all);
  if (training) p.tape = call.sums_pointer(out.tape);
  const bool cluster = takes_cluster(a, p, call.device().index());
  const void* x = call.inputs(false);
  for (int64_t d = 0; d < p.directions; ++d) call.project(p.direction[d], d, x);
  void* stream = call.device().stream();
  if constexpr (sizeof(Acc) == sizeof(float)) {
    if (cluster) check(cluster_forward(p, stream));
  }
  if (!cluster) check(step_forward(p, call.blas(), call.workspace(p), stream));
  const auto rounded = [&](const Tensor& state) {
    return dtype == kAcc<Acc> ? state : torch::stable::to(call.keep(state), dtype);
  };
  return {out.y, out.c_all, rounded(out.h_n), rounded(out.c_n), out.tape};
}

struct LayerGradient {
  Tensor dx, dh0, dc0;
  Tensors dweights;
};
struct Needs { bool x, weights, h0, c0; };

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
    const Blas blas = call_.blas();
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
                       const MaybeTensor& dc_n, const Arguments& a, const MaybeTensor& y, const Tensor& tape,
                       Needs needs) {
  Call<Acc> call(a);
  BackwardScan<Acc> q{};
  q.forward = call.scan();
  ForwardScan<Acc>& p = q.forward;
  const bool memory = cell_info(a.cell).memory;
  check_gradients(a, call.sizes(), dy, dc_all, dh_n, dc_n);
  check_kept(a, call.sizes(), y, tape, p.tape_size, kAcc<Acc>);
  // The struct has no const for the outputs of forward, which are only read here.
  p.y = const_cast<void*>(call.dense(y)), p.tape = static_cast<Acc*>(const_cast<void*>(call.dense(tape)));
  if (dy.has_value()) {
    const bool strided = dy->stride(2) == 1 || dy->size(2) <= 1;
    const Tensor rows = strided ? *dy : call.keep(torch::stable::contiguous(*dy));
    q.dy = rows.const_data_ptr(), q.dy_stride_t = rows.stride(0), q.dy_stride_b = rows.stride(1);
  }
  q.dh_n = call.wide(dh_n);
  if (memory) q.dc_all = call.dense(dc_all), q.dc_n = call.wide(dc_n);
  const Tensor dh0 = call.empty({p.directions, p.batch, p.outputs}, kAcc<Acc>);
  const Tensor dc0 = call.empty({p.directions, p.batch, p.hidden}, kAcc<Acc>);
  q.dh0 = call.sums_pointer(dh0), q.dc0 = memory ? call.sums_pointer(dc0) : nullptr;

  const void* x = needs.weights ? call.inputs(true) : nullptr;
  WeightGradients<Acc> gradients(call, a, q, x);
  Tensors dpeephole, dgain, dshift;
  const auto sums = [&](Tensors& list, Part part, int64_t d) -> Acc* {
    const Tensor* like = a.part(part, d);
    if (like == nullptr) return nullptr;
    list.push_back(call.empty({like->size(0), p.hidden}, kAcc<Acc>));
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
    w.dpeephole = sums(dpeephole, Part::kPeephole, d);
    w.dnorm_gain = sums(dgain, Part::kNormGain, d), w.dnorm_shift = sums(dshift, Part::kNormShift, d);
  }
  const bool cluster = takes_cluster(a, p, call.device().index());
  void* stream = call.device().stream();
  if constexpr (sizeof(Acc) == sizeof(float)) {
    if (cluster) check(cluster_backward(q, stream));
  }
  if (!cluster) check(step_backward(q, call.blas(), call.workspace(q), stream));

  const ScalarType dtype = a.x.scalar_type();
  const auto rounded = [&](const Tensor& sum) {
    return dtype == kAcc<Acc> ? sum : torch::stable::to(call.keep(sum), dtype);
  };
  LayerGradient grad{call.empty({0}),
                     needs.h0 && a.h0.has_value() ? rounded(dh0) : call.empty({0}),
                     needs.c0 && a.c0.has_value() ? rounded(dc0) : call.empty({0}),
                     {}};
  if (needs.x) {
    // Summed over the directions before it is rounded.
    const Tensor dx = call.empty({p.steps, p.batch, call.sizes().inputs}, kAcc<Acc>);
    for (int64_t d = 0; d < p.directions; ++d)
      call.product(call.sums(), false, false, call.rows(), call.sizes().inputs, call.gates(),
                   q.direction[d].dgates_x, call.dense(Part::kWeightIh, d), call.pointer(dx), d > 0);
    grad.dx = rounded(dx);
  }
  if (!needs.weights) return grad;
  const auto gradient = [&](Part part, int64_t d) -> Tensor {
    switch (part) {
      case Part::kWeightIh:
        return gradients.weight_ih(d);
      case Part::kWeightHh:
        return gradients.weight_hh(d);
      case Part::kBiasIh:
        return gradients.bias_ih(d);
      case Part::kBiasHh:
        return gradients.bias_hh(d);
      case Part::kWeightHr:
        return gradients.weight_hr(d);
      case Part::kPeephole:
        return rounded(dpeephole[d]);
      case Part::kNormGain:
        return rounded(dgain[d]);
      default:
        return rounded(dshift[d]);
    }
  };
  for (int64_t d = 0; d < p.directions; ++d)
    for (const Part part : kAllParts)
      if (a.parts.has(part)) grad.dweights.push_back(gradient(part, d));
  return grad;
}

Tensor dropout(const Tensor& x, const Tensor& seed, double keep) {
  const uint32_t threshold = dropout_threshold(x, seed, keep);
  const Device device(x);
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  const bool one = is_one_number(x);
  const Tensor dense = one ? x : torch::stable::contiguous(x);
  check(run_dropout({dtype_of(x), dense.const_data_ptr(), one, y.mutable_data_ptr(), x.numel(),
                     seed.const_data_ptr<int64_t>(), threshold, 1 / keep},
                    device.stream()));
  return y;
}

bool is_wide(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_infer(RNN_PARAMETERS) {
  const auto run = is_wide(x) ? forward<double> : forward<float>;
  const LayerOutput out = run(RNN_ARGUMENTS, false);
  return {out.y, out.c_all, out.h_n, out.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_train(RNN_PARAMETERS) {
  const auto run = is_wide(x) ? forward<double> : forward<float>;
  const LayerOutput out = run(RNN_ARGUMENTS, true);
  return {out.y, out.c_all, out.h_n, out.c_n, out.tape};
}

std::tuple<Tensor, Tensors, Tensor, Tensor> layer_backward(const MaybeTensor& dy, const MaybeTensor& dc_all,
                                                           const MaybeTensor& dh_n, const MaybeTensor& dc_n,
                                                           RNN_PARAMETERS, const MaybeTensor& y,
                                                           const Tensor& tape, bool need_x, bool need_weights,
                                                           bool need_h0, bool need_c0) {
  const auto run = is_wide(x) ? backward<double> : backward<float>;
  const LayerGradient grad =
      run(dy, dc_all, dh_n, dc_n, RNN_ARGUMENTS, y, tape, {need_x, need_weights, need_h0, need_c0});
  return {grad.dx, grad.dweights, grad.dh0, grad.dc0};
}

}  // namespace
}  // namespace cuda
}  // namespace torchrnn

#ifdef RNN_ON_HOST
STABLE_TORCH_LIBRARY_IMPL(torchrnn, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(torchrnn, CUDA, m) {
#endif
  m.impl("layer_infer", TORCH_BOX(&torchrnn::cuda::layer_infer));
  m.impl("layer_train", TORCH_BOX(&torchrnn::cuda::layer_train));
  m.impl("layer_backward", TORCH_BOX(&torchrnn::cuda::layer_backward));
  m.impl("dropout", TORCH_BOX(&torchrnn::cuda::dropout));
}
