// The CPU kernels behind torchrnn's ops: allocates outputs, fills the parameter structs, picks dtype,
// instruction set and number of threads. Schemas, argument errors and gradients are in torchrnn/ops.py.
// Over 400 lines because the ops have most of their arguments in common.
//
// bfloat16 and float16 are widened to float32 here, once per call, and the results rounded.

#include <torch/csrc/stable/library.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "checks.h"
#include "cpu/tensors.h"

namespace torchrnn {
namespace cpu {

int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

namespace {

// How many threads share a call: one, too, for many small steps, after each of which they would wait for each
// other.
template <typename T>
int team_size(const LayerParams<T>& p, int64_t gates) {
  constexpr double kStepAlone = 2e3;  // nanoseconds
  const double columns = double(gates * p.hidden), bytes = columns * (p.inputs + p.outputs) * sizeof(T);
  // Of one core: multiply-adds, and bytes from its own cache or from beyond, a nanosecond.
  const double flops = 150, bandwidth = bytes <= l2_bytes() ? 80 : 20;
  const auto nanoseconds = [&](double weights, double rows) {
    return weights * std::max(2 * rows / flops, sizeof(T) / bandwidth);
  };
  const double step = nanoseconds(columns * p.outputs, p.batch);
  const double input = nanoseconds(columns * p.inputs, double(p.steps) * p.batch);
  if (p.batch < 8 && p.directions == 1 && step < kStepAlone) return 1;
  return threads_for(p.directions * (p.steps * step + input));
}

// Tensors to pointers
// -----------------------------------------------------------------------------------------------

template <typename T>
void set_sequences(LayerParams<T>& p, Widened<T>& wide, const MaybeTensor& lengths,
                   const MaybeTensor& resets) {
  p.lengths = wide.template dense_as<int64_t>(lengths, ScalarType::Long);
  for (int64_t b = 0; p.lengths != nullptr && b < p.batch; ++b)
    STD_TORCH_CHECK(p.lengths[b] >= 0 && p.lengths[b] <= p.steps, "lengths must be in 0..T=", p.steps,
                    ", got ", p.lengths[b]);
  p.resets = wide.template dense_as<bool>(resets, ScalarType::Bool);
}

template <typename T>
LayerParams<T> layer_params(const Arguments& a, const Sizes& sizes, Widened<T>& wide) {
  LayerParams<T> p{};
  p.cell = Cell(a.cell);
  p.activation = Activation(a.activation);
  p.steps = sizes.steps, p.batch = sizes.batch, p.inputs = sizes.inputs;
  p.hidden = sizes.hidden, p.outputs = sizes.outputs, p.directions = sizes.directions;
  p.reverse = a.reverse;
  p.projected = a.parts.projection;

  const Tensor x = wide.rows(a.x);
  p.x = x.template const_data_ptr<T>();
  p.x_stride_t = x.stride(0), p.x_stride_b = x.stride(1);
  size_t at = 0;
  for (int64_t d = 0; d < p.directions; ++d)
    for (const Part part : kAllParts)
      if (a.parts.has(part)) p.weights[d].*kPartFields<const T>[int(part)] = wide.dense(a.weights[at++]);
  p.h0 = wide.dense(a.h0), p.c0 = wide.dense(a.c0);
  set_sequences(p, wide, a.lengths, a.resets);

  p.mask_h = wide.dense(a.mask_h), p.mask_c = wide.dense(a.mask_c);
  p.mask_h_steps = a.mask_h.has_value() ? a.mask_h->size(1) : 0;
  p.mask_c_steps = a.mask_c.has_value() ? a.mask_c->size(1) : 0;
  p.cell_clip = bound<T>(a.cell_clip), p.proj_clip = bound<T>(a.proj_clip);
  p.norm_eps = T(a.norm_eps);
  return p;
}

template <typename T>
void run_forward(const LayerParams<T>& p, int64_t gates) {
  if constexpr (sizeof(T) == sizeof(float))
    kernels().forward_f32(p, team_size(p, gates), run_team);
  else
    kernels().forward_f64(p, team_size(p, gates), run_team);
}

// Ops
// ---------------------------------------------------------------------------------------------------------------

struct LayerOutput { Tensor y, c_all, h_n, c_n, tape; };

template <typename T>
LayerOutput forward(const Arguments& a, bool training) {
  const ScalarType dtype = a.x.scalar_type(), wide_dtype = wide_type(a.x);
  Widened<T> wide(wide_dtype);
  LayerParams<T> p = layer_params<T>(a, checked_sizes(a), wide);
  const CellInfo info = cell_info(a.cell);
  const auto maybe = [&](bool wanted, std::initializer_list<int64_t> shape) {
    return wanted ? empty(shape, wide_dtype) : empty({0}, wide_dtype);
  };
  LayerOutput out{
      empty({p.steps, p.batch, p.directions * p.outputs}, wide_dtype),
      maybe(info.memory && a.all_states, {p.steps, p.batch, p.directions * p.hidden}),
      empty({p.directions, p.batch, p.outputs}, wide_dtype),
      maybe(info.memory, {p.directions, p.batch, p.hidden}),
      maybe(training, {p.directions, p.steps, p.batch, tape_size(a, p)}),
  };
  p.y = out.y.template mutable_data_ptr<T>();
  p.h_n = out.h_n.template mutable_data_ptr<T>();
  if (info.memory) p.c_n = out.c_n.template mutable_data_ptr<T>();
  if (info.memory && a.all_states) p.c_all = out.c_all.template mutable_data_ptr<T>();
  if (training) p.tape = out.tape.template mutable_data_ptr<T>();
  run_forward(p, info.gates);
  return {rounded(out.y, dtype), rounded(out.c_all, dtype), rounded(out.h_n, dtype), rounded(out.c_n, dtype),
          out.tape};
}

LayerOutput forward(const Arguments& a, bool training) {
  return wide_type(a.x) == ScalarType::Double ? forward<double>(a, training) : forward<float>(a, training);
}

// Packed weights
// ----------------------------------------------------------------------------------------------

// What packed weights must agree on with the call that reads them; it stands before them.
constexpr int64_t kHeader = 16;

template <typename T>
void packed_header(const LayerParams<T>& p, T* header) {
  const int64_t values[kHeader] = {active_isa.load(), int64_t(p.cell), p.directions, p.inputs,
                                   p.hidden,          p.outputs,       p.projected};
  for (int64_t i = 0; i < kHeader; ++i) header[i] = T(values[i]);
}

template <typename T>
int64_t run_pack(const LayerParams<T>& p, T* out) {
  if constexpr (sizeof(T) == sizeof(float))
    return kernels().pack_f32(p, out);
  else
    return kernels().pack_f64(p, out);
}

template <typename T>
Tensor pack(const Tensors& weights, int64_t cell, Parts parts) {
  const Tensor& first = weights[0];  // weight_ih
  STD_TORCH_CHECK(first.dim() == 2, "weight_ih must be [G*H, I]");
  const ScalarType dtype = wide_type(first);
  Widened<T> wide(dtype);
  const Tensor x = torch::stable::new_empty(first, {1, 0, first.size(1)});
  const Arguments a{.x = x, .weights = weights, .cell = cell, .parts = parts};  // Of no rows.
  const LayerParams<T> p = layer_params<T>(a, checked_sizes(a), wide);
  const Tensor packed = empty({kHeader + run_pack<T>(p, nullptr)}, dtype);
  T* out = packed.template mutable_data_ptr<T>();
  packed_header(p, out);
  run_pack<T>(p, out + kHeader);
  return packed;
}

Tensor pack_weights(const Tensors& weights, int64_t cell, bool bias, bool projection) {
  STD_TORCH_CHECK(!weights.empty(), "weights must not be empty");
  const auto run = wide_type(weights[0]) == ScalarType::Double ? pack<double> : pack<float>;
  return run(weights, cell, {bias, projection, false, false});
}

struct PackedSizes { int64_t hidden, outputs, directions; };

template <typename T>
std::tuple<Tensor, Tensor, Tensor> forward_packed(const Tensor& x, const Tensor& packed,
                                                  const MaybeTensor& h0, const MaybeTensor& c0,
                                                  const MaybeTensor& lengths, const MaybeTensor& resets,
                                                  Cell cell, Activation activation, PackedSizes sizes,
                                                  bool projection, bool reverse) {
  const ScalarType dtype = x.scalar_type(), wide_dtype = wide_type(x);
  const CellInfo info = cell_info(int64_t(cell));
  check_floating("x", x);
  check_memory("x", x);
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) >= 1, "x must be [T, B, I] with at least 1 step");
  STD_TORCH_CHECK(sizes.directions >= 1 && sizes.directions <= kMaxDirections && sizes.hidden >= 0 &&
                      sizes.outputs >= 0 && (projection || sizes.hidden == sizes.outputs) &&
                      (info.memory || !projection),
                  "sizes that no layer has");
  check_activation(int64_t(activation));
  STD_TORCH_CHECK(info.memory || !c0.has_value(), "c0 is for cells with memory");
  LayerParams<T> p{};
  p.cell = cell, p.activation = activation;
  p.directions = sizes.directions, p.hidden = sizes.hidden, p.outputs = sizes.outputs;
  p.steps = x.size(0), p.batch = x.size(1), p.inputs = x.size(2);
  p.reverse = reverse, p.projected = projection;
  const Kind kind(x);
  check_maybe("h0", h0, {p.directions, p.batch, p.outputs}, kind);
  check_maybe("c0", c0, {p.directions, p.batch, p.hidden}, kind);
  if (lengths.has_value()) check_lengths(*lengths, p.batch, kind);
  if (resets.has_value()) check_resets(*resets, p.steps, p.batch, kind);
  p.cell_clip = p.proj_clip = std::numeric_limits<T>::infinity();

  T header[kHeader];
  packed_header(p, header);
  const int64_t size = kHeader + run_pack<T>(p, nullptr);
  STD_TORCH_CHECK(packed.scalar_type() == wide_dtype && packed.is_contiguous() && packed.dim() == 1 &&
                      packed.size(0) == size,
                  "weights were packed for another layer, dtype or instruction set");
  check_device("packed", packed, kind);
  const T* data = packed.template const_data_ptr<T>();
  STD_TORCH_CHECK(std::equal(header, header + kHeader, data),
                  "weights were packed for another layer, dtype or instruction set");
  p.packed = data + kHeader;

  Widened<T> wide(wide_dtype);
  const Tensor rows = wide.rows(x);
  p.x = rows.template const_data_ptr<T>();
  p.x_stride_t = rows.stride(0), p.x_stride_b = rows.stride(1);
  p.h0 = wide.dense(h0), p.c0 = wide.dense(c0);
  set_sequences(p, wide, lengths, resets);

  const Tensor y = empty({p.steps, p.batch, p.directions * p.outputs}, wide_dtype);
  const Tensor h_n = empty({p.directions, p.batch, p.outputs}, wide_dtype);
  const Tensor c_n =
      info.memory ? empty({p.directions, p.batch, p.hidden}, wide_dtype) : empty({0}, wide_dtype);
  p.y = y.template mutable_data_ptr<T>(), p.h_n = h_n.template mutable_data_ptr<T>();
  if (info.memory) p.c_n = c_n.template mutable_data_ptr<T>();
  run_forward(p, info.gates);
  return {rounded(y, dtype), rounded(h_n, dtype), rounded(c_n, dtype)};
}

std::tuple<Tensor, Tensor, Tensor> layer_packed(const Tensor& x, const Tensor& packed, const MaybeTensor& h0,
                                                const MaybeTensor& c0, const MaybeTensor& lengths,
                                                const MaybeTensor& resets, int64_t cell, int64_t activation,
                                                int64_t hidden, int64_t outputs, int64_t directions,
                                                bool projection, bool reverse) {
  const auto run = wide_type(x) == ScalarType::Double ? forward_packed<double> : forward_packed<float>;
  return run(x, packed, h0, c0, lengths, resets, Cell(cell), Activation(activation),
             {hidden, outputs, directions}, projection, reverse);
}

struct LayerGradient {
  Tensor dx, dh0, dc0;
  Tensors dweights;
};

struct Needs { bool x, weights, h0, c0; };

template <typename T>
LayerGradient backward(const MaybeTensor& dy, const MaybeTensor& dc_all, const MaybeTensor& dh_n,
                       const MaybeTensor& dc_n, const Arguments& a, const MaybeTensor& y, const Tensor& tape,
                       Needs needs) {
  const ScalarType dtype = a.x.scalar_type(), wide_dtype = wide_type(a.x);
  const CellInfo info = cell_info(a.cell);
  const Sizes sizes = checked_sizes(a);
  check_gradients(a, sizes, dy, dc_all, dh_n, dc_n);
  Widened<T> wide(wide_dtype);
  BackwardParams<T> q{};
  q.layer = layer_params<T>(a, sizes, wide);
  LayerParams<T>& p = q.layer;
  check_kept(a, sizes, y, tape, tape_size(a, p), wide_dtype);
  // The struct has no const for the outputs of forward, which are only read here.
  p.y = const_cast<T*>(info.keeps_output ? nullptr : wide.dense(y));
  p.tape = const_cast<T*>(wide.dense(tape));
  if (dy.has_value()) {
    const Tensor rows = wide.rows(*dy);
    q.dy = rows.template const_data_ptr<T>();
    q.dy_stride_t = rows.stride(0), q.dy_stride_b = rows.stride(1);
  }
  q.dc_all = wide.dense(dc_all), q.dh_n = wide.dense(dh_n), q.dc_n = wide.dense(dc_n);

  // Allocates a gradient of the shape of `like` if it is wanted, else an empty tensor.
  const auto gradient = [&](const Tensor* like, bool wanted, T*& pointer) {
    wanted = wanted && like != nullptr;
    const Tensor result =
        wanted ? empty(like->sizes().data(), like->dim(), wide_dtype) : empty({0}, wide_dtype);
    pointer = wanted ? result.template mutable_data_ptr<T>() : nullptr;
    return result;
  };
  const auto maybe = [](const MaybeTensor& tensor) { return tensor.has_value() ? &*tensor : nullptr; };
  LayerGradient grad{gradient(&a.x, needs.x, q.dx),
                     gradient(maybe(a.h0), needs.h0, q.dh0),
                     gradient(maybe(a.c0), needs.c0, q.dc0),
                     {}};
  q.needs_weights = needs.weights;
  if (needs.weights)
    for (int64_t d = 0; d < p.directions; ++d)
      for (const Part part : kAllParts)
        if (a.parts.has(part))
          grad.dweights.push_back(gradient(a.part(part, d), true, q.dweights[d].*kPartFields<T>[int(part)]));
  if constexpr (sizeof(T) == sizeof(float))
    kernels().backward_f32(q, team_size(p, info.gates), run_team);
  else
    kernels().backward_f64(q, team_size(p, info.gates), run_team);
  for (Tensor* tensor : {&grad.dx, &grad.dh0, &grad.dc0}) *tensor = rounded(*tensor, dtype);
  for (Tensor& tensor : grad.dweights) tensor = rounded(tensor, dtype);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_infer(RNN_PARAMETERS) {
  LayerOutput out = forward(RNN_ARGUMENTS, false);
  return {out.y, out.c_all, out.h_n, out.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_train(RNN_PARAMETERS) {
  LayerOutput out = forward(RNN_ARGUMENTS, true);
  return {out.y, out.c_all, out.h_n, out.c_n, out.tape};
}

// The plain layer with few arguments, as each costs a small step some time.
std::tuple<Tensor, Tensor, Tensor> plain_layer(const Tensor& x, const Tensors& weights, const MaybeTensor& h0,
                                               const MaybeTensor& c0, int64_t cell, int64_t activation,
                                               bool bias, bool projection) {
  const Arguments a{.x = x,
                    .weights = weights,
                    .h0 = h0,
                    .c0 = c0,
                    .cell = cell,
                    .activation = activation,
                    .parts = {bias, projection, false, false}};
  LayerOutput out = forward(a, false);
  return {out.y, out.h_n, out.c_n};
}

std::tuple<Tensor, Tensors, Tensor, Tensor> layer_backward(const MaybeTensor& dy, const MaybeTensor& dc_all,
                                                           const MaybeTensor& dh_n, const MaybeTensor& dc_n,
                                                           RNN_PARAMETERS, const MaybeTensor& y,
                                                           const Tensor& tape, bool need_x, bool need_weights,
                                                           bool need_h0, bool need_c0) {
  const Needs needs{need_x, need_weights, need_h0, need_c0};
  LayerGradient grad = wide_type(x) == ScalarType::Double
                           ? backward<double>(dy, dc_all, dh_n, dc_n, RNN_ARGUMENTS, y, tape, needs)
                           : backward<float>(dy, dc_all, dh_n, dc_n, RNN_ARGUMENTS, y, tape, needs);
  return {grad.dx, grad.dweights, grad.dh0, grad.dc0};
}

// One step of a cell of torch.nn, without the detour over lists and sequences.
template <typename T>
std::tuple<Tensor, Tensor> cell(const Tensor& x, const Tensor& weight_ih, const Tensor& weight_hh,
                                const MaybeTensor& bias_ih, const MaybeTensor& bias_hh, const MaybeTensor& h0,
                                const MaybeTensor& c0, int64_t code, int64_t activation) {
  const ScalarType dtype = x.scalar_type(), wide_dtype = wide_type(x);
  const CellInfo info = cell_info(code);
  check_floating("x", x);
  check_activation(activation);
  STD_TORCH_CHECK(x.dim() == 2 && weight_hh.dim() == 2, "x must be [B, I] and weight_hh [G*H, H]");
  STD_TORCH_CHECK(info.memory || !c0.has_value(), "c0 is for cells with memory");
  LayerParams<T> p{};
  p.cell = Cell(code), p.activation = Activation(activation);
  p.steps = p.directions = 1;
  p.batch = x.size(0), p.inputs = x.size(1), p.hidden = p.outputs = weight_hh.size(1);
  const int64_t rows = info.gates * p.hidden;
  const Kind kind(x);
  check_memory("x", x);
  check_shape("weight_ih", weight_ih, {rows, p.inputs});
  check_shape("weight_hh", weight_hh, {rows, p.hidden});
  check_like("weight_ih", weight_ih, kind);
  check_like("weight_hh", weight_hh, kind);
  STD_TORCH_CHECK(bias_ih.has_value() == bias_hh.has_value(), "there must be both biases or none");
  check_maybe("bias_ih", bias_ih, {rows}, kind);
  check_maybe("bias_hh", bias_hh, {rows}, kind);
  check_maybe("h0", h0, {p.batch, p.hidden}, kind);
  check_maybe("c0", c0, {p.batch, p.hidden}, kind);

  Widened<T> wide(wide_dtype);
  const Tensor in = wide.rows(x);
  p.x = in.template const_data_ptr<T>(), p.x_stride_b = in.stride(0);
  DirectionWeights<const T>& w = p.weights[0];
  w.weight_ih = wide.dense(weight_ih), w.weight_hh = wide.dense(weight_hh);
  w.bias_ih = wide.dense(bias_ih), w.bias_hh = wide.dense(bias_hh);
  p.h0 = wide.dense(h0), p.c0 = wide.dense(c0);
  p.cell_clip = p.proj_clip = std::numeric_limits<T>::infinity();
  const Tensor h = empty({p.batch, p.hidden}, wide_dtype);
  const Tensor c = info.memory ? empty({p.batch, p.hidden}, wide_dtype) : empty({0}, wide_dtype);
  p.y = p.h_n = h.template mutable_data_ptr<T>();
  if (info.memory) p.c_n = c.template mutable_data_ptr<T>();
  run_forward(p, info.gates);
  return {rounded(h, dtype), rounded(c, dtype)};
}

std::tuple<Tensor, Tensor> plain_cell(const Tensor& x, const Tensor& weight_ih, const Tensor& weight_hh,
                                      const MaybeTensor& bias_ih, const MaybeTensor& bias_hh,
                                      const MaybeTensor& h0, const MaybeTensor& c0, int64_t code,
                                      int64_t activation) {
  const auto run = wide_type(x) == ScalarType::Double ? cell<double> : cell<float>;
  return run(x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, code, activation);
}

// Instruction sets and floors
// ------------------------------------------------------------------------------------------------------------

int64_t get_isa() { return active_isa.load(); }

void set_isa(int64_t isa) {
  kernels_of(isa);
  active_isa.store(isa);
}

// Repeats work, which returns how much it did, on all threads for about `seconds`; returns the total per
// nanosecond.
template <typename Work>
double rate(double seconds, int64_t threads, const Work& work) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> rates(threads, 0.0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto start = Clock::now();
      double done = 0, elapsed = 0;
      while (elapsed < seconds) {
        done += work();
        elapsed = std::chrono::duration<double>(Clock::now() - start).count();
      }
      rates[i] = done / elapsed * 1e-9;
    }
  });
  double total = 0;
  for (const double r : rates) total += r;
  return total;
}

void check_effort(double seconds, int64_t threads) {
  STD_TORCH_CHECK(seconds >= 0 && seconds <= 60, "seconds must be in 0..60, got ", seconds);
  STD_TORCH_CHECK(threads >= 1 && threads <= 4096, "threads must be in 1..4096, got ", threads);
}

double fma_peak(int64_t isa, double seconds, int64_t threads) {
  check_effort(seconds, threads);
  const Kernels& k = kernels_of(isa);
  return rate(seconds, threads, [&] { return 2 * k.multiply_add_loop(100000); });
}

double read_bandwidth(int64_t bytes, double seconds, int64_t threads) {
  check_effort(seconds, threads);
  const Kernels& k = kernels();
  const int64_t count = std::max<int64_t>(bytes / sizeof(float), 1024);
  const int64_t times = std::max<int64_t>(1, (1 << 22) / count);
  return rate(seconds, threads, [&] {
    thread_local std::vector<float> data;
    constexpr int64_t kLine = 64 / sizeof(float);
    if (int64_t(data.size()) != count + kLine) data.assign(count + kLine, 1.0f);
    // From a line on: loads that cross two lines take twice as long.
    const int64_t past = reinterpret_cast<uintptr_t>(data.data()) / sizeof(float) % kLine;
    k.read_loop(data.data() + (kLine - past) % kLine, count, times);
    return double(count) * times * sizeof(float);
  });
}

}  // namespace
}  // namespace cpu
}  // namespace torchrnn

STABLE_TORCH_LIBRARY_IMPL(torchrnn, CPU, m) {
  m.impl("layer_infer", TORCH_BOX(&torchrnn::cpu::layer_infer));
  m.impl("layer_train", TORCH_BOX(&torchrnn::cpu::layer_train));
  m.impl("plain_layer", TORCH_BOX(&torchrnn::cpu::plain_layer));
  m.impl("plain_cell", TORCH_BOX(&torchrnn::cpu::plain_cell));
  m.impl("layer_backward", TORCH_BOX(&torchrnn::cpu::layer_backward));
  m.impl("pack", TORCH_BOX(&torchrnn::cpu::pack_weights));
  m.impl("layer_packed", TORCH_BOX(&torchrnn::cpu::layer_packed));
}

// Ops without tensors, which belong to this library alone.
STABLE_TORCH_LIBRARY_FRAGMENT(torchrnn, m) {
  m.def("isa() -> int");
  m.def("isa_supported(int isa) -> bool");
  m.def("set_isa(int isa) -> ()");
  m.def("fma_peak(int isa, float seconds, int threads) -> float");
  m.def("read_bandwidth(int bytes, float seconds, int threads) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(torchrnn, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&torchrnn::cpu::get_isa));
  m.impl("isa_supported", TORCH_BOX(&torchrnn::cpu::isa_supported));
  m.impl("set_isa", TORCH_BOX(&torchrnn::cpu::set_isa));
  m.impl("fma_peak", TORCH_BOX(&torchrnn::cpu::fma_peak));
  m.impl("read_bandwidth", TORCH_BOX(&torchrnn::cpu::read_bandwidth));
}
