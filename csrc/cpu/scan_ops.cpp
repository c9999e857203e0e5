// The CPU kernels behind torchrnn::scan. Schemas, argument errors and gradients are in torchrnn/scan.py.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "checks.h"
#include "cpu/tensors.h"

namespace torchrnn {
namespace cpu {
namespace {

struct ScanInfo {
  int64_t gates;
  bool carries_h, carries_c;
};

ScanInfo scan_info(int64_t cell) {
  switch (ScanCell(cell)) {
    case ScanCell::kIndRnn:
      return {1, true, false};
    case ScanCell::kIndyGru:
      return {3, true, false};
    case ScanCell::kIndyLstm:
      return {4, true, true};
    case ScanCell::kSru:
      return {4, false, true};
  }
  STD_TORCH_CHECK(false, "cell ", cell, " is not known");
}

// What the ops have in common, in the order of their schemas.
struct ScanArguments {
  const Tensor& wx;
  const MaybeTensor &u, &h0, &c0, &lengths, &mask_h, &mask_c;
  int64_t cell, activation;
  bool reverse;
};

#define RNN_SCAN_PARAMETERS                                                                           \
  const Tensor &wx, const MaybeTensor &u, const MaybeTensor &h0, const MaybeTensor &c0,               \
      const MaybeTensor &lengths, const MaybeTensor &mask_h, const MaybeTensor &mask_c, int64_t cell, \
      int64_t activation, bool reverse
#define RNN_SCAN_ARGUMENTS \
  ScanArguments { wx, u, h0, c0, lengths, mask_h, mask_c, cell, activation, reverse }

template <typename T>
ScanParams<T> scan_params(const ScanArguments& a, Widened<T>& wide) {
  ScanParams<T> p{};
  const ScanInfo info = scan_info(a.cell);
  check_activation(a.activation);
  check_floating("wx", a.wx);
  check_memory("wx", a.wx);
  STD_TORCH_CHECK(a.wx.dim() == 3 && a.wx.size(2) % info.gates == 0,
                  "wx must be [T, B, G*U] with G=", info.gates);
  p.cell = ScanCell(a.cell), p.activation = Activation(a.activation), p.reverse = a.reverse;
  p.steps = a.wx.size(0), p.batch = a.wx.size(1), p.units = a.wx.size(2) / info.gates;
  STD_TORCH_CHECK(a.u.has_value() == info.carries_h, "u is for cells that carry h, and for all of them");
  STD_TORCH_CHECK(info.carries_h || !(a.h0.has_value() || a.mask_h.has_value()),
                  "h0 and mask_h are for cells that carry h");
  STD_TORCH_CHECK(info.carries_c || !(a.c0.has_value() || a.mask_c.has_value()),
                  "c0 and mask_c are for cells that carry c");
  const Kind kind(a.wx);
  check_maybe("u", a.u, {info.gates * p.units}, kind);
  check_maybe("h0", a.h0, {p.batch, p.units}, kind);
  check_maybe("c0", a.c0, {p.batch, p.units}, kind);
  if (a.lengths.has_value()) check_lengths(*a.lengths, p.batch, kind);
  const Tensor wx = wide.rows(a.wx);
  p.wx = wx.template const_data_ptr<T>(), p.wx_stride_t = wx.stride(0), p.wx_stride_b = wx.stride(1);
  p.u = wide.dense(a.u), p.h0 = wide.dense(a.h0), p.c0 = wide.dense(a.c0);
  const auto mask = [&](const char* name, const MaybeTensor& tensor, int64_t& stride_t) -> const T* {
    if (!tensor.has_value()) return nullptr;
    const bool once = tensor->dim() == 3 && tensor->size(0) == 1;
    check_maybe(name, tensor, {once ? 1 : p.steps, p.batch, p.units}, kind);
    stride_t = once ? 0 : p.batch * p.units;
    return wide.dense(tensor);
  };
  p.mask_h = mask("mask_h", a.mask_h, p.mask_h_stride_t);
  p.mask_c = mask("mask_c", a.mask_c, p.mask_c_stride_t);
  p.lengths = wide.template dense_as<int64_t>(a.lengths, ScalarType::Long);
  for (int64_t b = 0; p.lengths != nullptr && b < p.batch; ++b)
    STD_TORCH_CHECK(p.lengths[b] >= 0 && p.lengths[b] <= p.steps, "lengths must be in 0..T=", p.steps,
                    ", got ", p.lengths[b]);
  return p;
}

// A value of wx takes about a quarter of a nanosecond.
template <typename T>
int scan_team(const ScanParams<T>& p, int64_t gates) {
  return threads_for(0.25 * double(p.steps) * p.batch * p.units * gates);
}

struct ScanOutput { Tensor y, h_n, c_n, tape; };

template <typename T>
ScanOutput scan_forward(const ScanArguments& a, bool training) {
  const ScalarType dtype = a.wx.scalar_type(), wide_dtype = wide_type(a.wx);
  Widened<T> wide(wide_dtype);
  ScanParams<T> p = scan_params<T>(a, wide);
  const ScanInfo info = scan_info(a.cell);
  const auto make = [&](bool wanted, std::initializer_list<int64_t> shape, T*& pointer) {
    const Tensor result = wanted ? empty(shape, wide_dtype) : empty({0}, wide_dtype);
    pointer = wanted ? result.template mutable_data_ptr<T>() : nullptr;
    return result;
  };
  const ScanOutput out{make(true, {p.steps, p.batch, p.units}, p.y),
                       make(info.carries_h, {p.batch, p.units}, p.h_n),
                       make(info.carries_c, {p.batch, p.units}, p.c_n),
                       make(training && info.carries_c, {p.steps, p.batch, p.units}, p.tape)};
  if constexpr (sizeof(T) == sizeof(float))
    kernels().scan_f32(p, scan_team(p, info.gates), run_team);
  else
    kernels().scan_f64(p, scan_team(p, info.gates), run_team);
  return {rounded(out.y, dtype), rounded(out.h_n, dtype), rounded(out.c_n, dtype), out.tape};
}

ScanOutput scan_forward(const ScanArguments& a, bool training) {
  return wide_type(a.wx) == ScalarType::Double ? scan_forward<double>(a, training)
                                               : scan_forward<float>(a, training);
}

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor, Tensor> scan_infer(RNN_SCAN_PARAMETERS) {
  const ScanOutput out = scan_forward(RNN_SCAN_ARGUMENTS, false);
  return {out.y, out.h_n, out.c_n};
}

FourTensors scan_train(RNN_SCAN_PARAMETERS) {
  const ScanOutput out = scan_forward(RNN_SCAN_ARGUMENTS, true);
  return {out.y, out.h_n, out.c_n, out.tape};
}

struct Needs { bool wx, u, h0, c0; };

template <typename T>
FourTensors scan_gradient(const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
                          const ScanArguments& a, const Tensor& y, const Tensor& tape, Needs needs) {
  const ScalarType dtype = a.wx.scalar_type(), wide_dtype = wide_type(a.wx);
  Widened<T> wide(wide_dtype);
  ScanBackwardParams<T> q{};
  q.scan = scan_params<T>(a, wide);
  ScanParams<T>& p = q.scan;
  const ScanInfo info = scan_info(a.cell);
  const Kind kind(a.wx);
  check_shape("y", y, {p.steps, p.batch, p.units});
  check_like("y", y, kind);
  check_maybe("dy", dy, {p.steps, p.batch, p.units}, kind);
  check_maybe("dh_n", dh_n, {p.batch, p.units}, kind);
  check_maybe("dc_n", dc_n, {p.batch, p.units}, kind);
  STD_TORCH_CHECK(info.carries_h || !dh_n.has_value(), "dh_n is for cells that carry h");
  STD_TORCH_CHECK(info.carries_c || !dc_n.has_value(), "dc_n is for cells that carry c");
  // The struct has no const for the outputs of forward, which are only read here.
  p.y = const_cast<T*>(wide.dense(y));
  if (info.carries_c) {
    check_shape("tape", tape, {p.steps, p.batch, p.units});
    STD_TORCH_CHECK(tape.scalar_type() == wide_dtype, "tape has a wrong dtype");
    check_device("tape", tape, kind);
    p.tape = const_cast<T*>(wide.dense(tape));
  }
  if (dy.has_value()) {
    const Tensor rows = wide.rows(*dy);
    q.dy = rows.template const_data_ptr<T>(), q.dy_stride_t = rows.stride(0), q.dy_stride_b = rows.stride(1);
  }
  q.dh_n = wide.dense(dh_n), q.dc_n = wide.dense(dc_n);
  const auto make = [&](bool wanted, std::initializer_list<int64_t> shape, T*& pointer) {
    const Tensor result = wanted ? empty(shape, wide_dtype) : empty({0}, wide_dtype);
    pointer = wanted ? result.template mutable_data_ptr<T>() : nullptr;
    return result;
  };
  const bool need_du = needs.u && info.carries_h;
  const int64_t sums = info.gates * p.units;
  const Tensor dwx = make(true, {p.steps, p.batch, sums}, q.dwx);
  const Tensor du = make(need_du, {sums}, q.du);
  const Tensor dh0 = make(info.carries_h, {p.batch, p.units}, q.dh0);
  const Tensor dc0 = make(info.carries_c, {p.batch, p.units}, q.dc0);
  const Tensor du_rows = make(need_du, {p.batch, sums}, q.du_rows);
  if constexpr (sizeof(T) == sizeof(float))
    kernels().scan_backward_f32(q, scan_team(p, info.gates), run_team);
  else
    kernels().scan_backward_f64(q, scan_team(p, info.gates), run_team);
  // The kernel writes the others too, as it carries them from step to step.
  const auto result = [&](const Tensor& gradient, bool wanted) {
    return rounded(wanted ? gradient : empty({0}, wide_dtype), dtype);
  };
  return {result(dwx, needs.wx), result(du, need_du), result(dh0, needs.h0 && a.h0.has_value()),
          result(dc0, needs.c0 && a.c0.has_value())};
}

FourTensors scan_backward(const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
                          RNN_SCAN_PARAMETERS, const MaybeTensor& y, const Tensor& tape, bool need_wx,
                          bool need_u, bool need_h0, bool need_c0) {
  STD_TORCH_CHECK(y.has_value(), "y is needed");
  const auto run = wide_type(wx) == ScalarType::Double ? scan_gradient<double> : scan_gradient<float>;
  return run(dy, dh_n, dc_n, RNN_SCAN_ARGUMENTS, *y, tape, {need_wx, need_u, need_h0, need_c0});
}

}  // namespace
}  // namespace cpu
}  // namespace torchrnn

STABLE_TORCH_LIBRARY_IMPL(torchrnn, CPU, m) {
  m.impl("scan_infer", TORCH_BOX(&torchrnn::cpu::scan_infer));
  m.impl("scan_train", TORCH_BOX(&torchrnn::cpu::scan_train));
  m.impl("scan_backward", TORCH_BOX(&torchrnn::cpu::scan_backward));
}
