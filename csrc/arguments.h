// What the ops files of the devices share: the arguments of the layer ops as torch hands them over, their
// sizes, and the checks that hold for every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "checks.h"
#include "params.h"

namespace torchrnn {

using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

// What a direction is made of, in the order of DirectionWeights and of torchrnn/reference.py.
enum class Part { kWeightIh, kWeightHh, kBiasIh, kBiasHh, kWeightHr, kPeephole, kNormGain, kNormShift };
constexpr std::array kAllParts = {Part::kWeightIh, Part::kWeightHh, Part::kBiasIh,   Part::kBiasHh,
                                  Part::kWeightHr, Part::kPeephole, Part::kNormGain, Part::kNormShift};
constexpr const char* kPartNames[] = {"weight_ih", "weight_hh", "bias_ih",   "bias_hh",
                                      "weight_hr", "peephole",  "norm_gain", "norm_shift"};
// Where in DirectionWeights a part is.
template <typename T>
constexpr T* DirectionWeights<T>::* kPartFields[] = {
    &DirectionWeights<T>::weight_ih, &DirectionWeights<T>::weight_hh, &DirectionWeights<T>::bias_ih,
    &DirectionWeights<T>::bias_hh,   &DirectionWeights<T>::weight_hr, &DirectionWeights<T>::peephole,
    &DirectionWeights<T>::norm_gain, &DirectionWeights<T>::norm_shift};

// Which parts a layer has beside weight_ih and weight_hh.
struct Parts {
  bool bias, projection, peephole, norm;

  bool has(Part part) const {
    switch (part) {
      case Part::kBiasIh:
      case Part::kBiasHh:
        return bias;
      case Part::kWeightHr:
        return projection;
      case Part::kPeephole:
        return peephole;
      case Part::kNormGain:
      case Part::kNormShift:
        return norm;
      default:
        return true;
    }
  }
  int64_t count() const { return 2 + 2 * bias + projection + peephole + 2 * norm; }
};

inline const MaybeTensor kAbsent;

// What the layer ops have in common, in the order of their schemas in torchrnn/ops.py.
struct Arguments {
  const Tensor& x;
  const Tensors& weights;  // direction by direction, of each those parts that the layer has
  const MaybeTensor &h0 = kAbsent, &c0 = kAbsent, &lengths = kAbsent, &resets = kAbsent, &mask_h = kAbsent,
                    &mask_c = kAbsent;
  int64_t cell, activation = 0;
  Parts parts;
  std::optional<double> cell_clip = {}, proj_clip = {};
  double norm_eps = 0;
  bool reverse = false;
  // Of CUDA alone: whether products of float32 may be rounded to TF32, and the path that is asked for, with
  // the codes of torchrnn/cuda.py.
  bool tf32 = false;
  int64_t path = 0;
  bool all_states = false;  // whether the c of every step is wanted

  int64_t directions() const { return int64_t(weights.size()) / parts.count(); }
  // A part of direction d, or null.
  const Tensor* part(Part part, int64_t d) const {
    if (!parts.has(part)) return nullptr;
    int64_t at = d * parts.count();
    for (int i = 0; i < int(part); ++i) at += parts.has(kAllParts[i]);
    return &weights[at];
  }
};

// The same as parameters of an op, and from them the struct.
#define RNN_PARAMETERS                                                                            \
  const Tensor &x, const Tensors &weights, const MaybeTensor &h0, const MaybeTensor &c0,          \
      const MaybeTensor &lengths, const MaybeTensor &resets, const MaybeTensor &mask_h,           \
      const MaybeTensor &mask_c, int64_t cell, int64_t activation, bool bias, bool projection,    \
      bool peephole, bool norm, std::optional<double> cell_clip, std::optional<double> proj_clip, \
      double norm_eps, bool reverse, bool tf32, int64_t path, bool all_states
#define RNN_ARGUMENTS                                                                                       \
  Arguments {                                                                                               \
    x, weights, h0, c0, lengths, resets, mask_h, mask_c, cell, activation,                                  \
        {bias, projection, peephole, norm}, cell_clip, proj_clip, norm_eps, reverse, tf32, path, all_states \
  }

// The values are those of torchrnn/options.py.
struct CellInfo {
  int64_t gates, tape;
  bool memory;
  bool keeps_output;  // Backward reads h from the tape, and needs no y.
};

inline CellInfo cell_info(int64_t cell) {
  switch (Cell(cell)) {
    case Cell::kLstm:
      return {4, 5, true, false};
    case Cell::kGru:
      return {3, 5, false, true};
    case Cell::kGruResetBefore:
      return {3, 4, false, true};
    case Cell::kRnn:
      return {1, 1, false, true};
    case Cell::kLstmCoupled:
      return {3, 4, true, false};
  }
  STD_TORCH_CHECK(false, "cell ", cell, " is not known");
}

// A bound as the kernels have it: infinity is none, also one beyond all numbers of the dtype.
template <typename T>
T bound(const std::optional<double>& value) {
  return value.has_value() ? T(*value) : std::numeric_limits<T>::infinity();
}

inline void check_lengths(const Tensor& lengths, int64_t batch, const Kind& x) {
  check_shape("lengths", lengths, {batch});
  const ScalarType dtype = lengths.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int, "lengths must be int64 or int32");
  check_device("lengths", lengths, x);
}

inline void check_resets(const Tensor& resets, int64_t steps, int64_t batch, const Kind& x) {
  check_shape("resets", resets, {steps, batch});
  STD_TORCH_CHECK(resets.scalar_type() == ScalarType::Bool, "resets must be bool");
  check_device("resets", resets, x);
}

// Raises unless a tensor that may be absent has a shape, and x's dtype and device.
inline void check_maybe(const char* name, const MaybeTensor& tensor, std::initializer_list<int64_t> shape,
                        const Kind& x) {
  if (!tensor.has_value()) return;
  check_shape(name, *tensor, shape);
  check_like(name, *tensor, x);
}

inline void check_activation(int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(Activation::kIdentity), "activation ", activation,
                  " is not known");
}

struct Sizes { int64_t steps, batch, inputs, hidden, outputs, directions; };

// Raises unless the layer's numbers of parts and directions, and x, can be; returns D.
inline int64_t checked_directions(const Tensor& x, const Tensors& weights, const Parts& parts) {
  check_floating("x", x);
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) >= 1, "x must be [T, B, I] with at least 1 step");
  check_memory("x", x);
  const int64_t count = parts.count(), directions = int64_t(weights.size()) / count;
  STD_TORCH_CHECK(
      directions >= 1 && directions <= kMaxDirections && directions * count == int64_t(weights.size()),
      "weights must hold ", count, " tensors for each of 1 or 2 directions, got ", weights.size());
  return directions;
}

// Returns T, B, I, H, R and D. Raises if an argument does not fit them, its dtype or device is not x's, or no
// kernel serves it: one that ignored it would be wrong in silence, and one that believed it could read and
// write anywhere.
inline Sizes checked_sizes(const Arguments& a) {
  const CellInfo info = cell_info(a.cell);
  check_activation(a.activation);
  STD_TORCH_CHECK(a.path >= 0 && a.path <= 2, "path ", a.path, " is not known");
  const int64_t directions = checked_directions(a.x, a.weights, a.parts);
  const Kind x(a.x);
  const Tensor& first = *a.part(Part::kWeightHh, 0);
  STD_TORCH_CHECK(first.dim() == 2 && first.size(0) % info.gates == 0,
                  "weight_hh must be [G*H, R] with G=", info.gates);
  const Sizes s{a.x.size(0), a.x.size(1), a.x.size(2), first.size(0) / info.gates, first.size(1), directions};
  const int64_t rows = info.gates * s.hidden;
  STD_TORCH_CHECK(a.parts.projection || s.outputs == s.hidden,
                  "weight_hh must be [G*H, H] without a projection");
  STD_TORCH_CHECK(info.memory || !(a.parts.projection || a.parts.peephole || a.c0.has_value() ||
                                   a.mask_c.has_value() || a.cell_clip.has_value()),
                  "weight_hr, peephole, c0, mask_c and cell_clip are for cells with memory");
  STD_TORCH_CHECK(a.parts.projection || !a.proj_clip.has_value(), "proj_clip needs weight_hr");
  STD_TORCH_CHECK(!a.parts.norm || Cell(a.cell) == Cell::kLstm,
                  "no kernel serves layer normalisation of this cell");
  const int64_t shapes[][2] = {{rows, s.inputs},      {rows, s.outputs}, {rows, -1},    {rows, -1},
                               {s.outputs, s.hidden}, {3, s.hidden},     {5, s.hidden}, {5, s.hidden}};
  size_t at = 0;
  for (int64_t d = 0; d < directions; ++d)
    for (const Part part : kAllParts) {
      if (!a.parts.has(part)) continue;
      const int64_t* shape = shapes[int(part)];
      const Tensor& tensor = a.weights[at++];
      check_shape(kPartNames[int(part)], tensor, shape, shape[1] < 0 ? 1 : 2);
      check_like(kPartNames[int(part)], tensor, x);
    }
  check_maybe("h0", a.h0, {directions, s.batch, s.outputs}, x);
  check_maybe("c0", a.c0, {directions, s.batch, s.hidden}, x);
  if (a.lengths.has_value()) check_lengths(*a.lengths, s.batch, x);
  if (a.resets.has_value()) check_resets(*a.resets, s.steps, s.batch, x);
  // A mask has T steps, or one for all.
  const auto mask_steps = [&](const MaybeTensor& mask) {
    return mask.has_value() && mask->dim() == 4 && mask->size(1) == 1 ? 1 : s.steps;
  };
  check_maybe("mask_h", a.mask_h, {directions, mask_steps(a.mask_h), s.batch, s.outputs}, x);
  check_maybe("mask_c", a.mask_c, {directions, mask_steps(a.mask_c), s.batch, s.hidden}, x);
  const auto check_bound = [](const char* name, double value) {
    STD_TORCH_CHECK(value >= 0, name, " must be at least 0, got ", value);  // Also refuses NaN.
  };
  if (a.cell_clip.has_value()) check_bound("cell_clip", *a.cell_clip);
  if (a.proj_clip.has_value()) check_bound("proj_clip", *a.proj_clip);
  check_bound("norm_eps", a.norm_eps);
  return s;
}

// Values per row and step of the tape, as params.h has them. P is the parameter struct of a device.
template <typename P>
int64_t tape_size(const Arguments& a, const P& p) {
  return cell_info(a.cell).tape * p.hidden + (a.parts.norm ? p.hidden + 5 : 0) +
         (std::isfinite(p.proj_clip) ? p.outputs : 0);
}

// The gradients that layer_backward is given, with the sizes of what they belong to.
inline void check_gradients(const Arguments& a, const Sizes& s, const MaybeTensor& dy,
                            const MaybeTensor& dc_all, const MaybeTensor& dh_n, const MaybeTensor& dc_n) {
  const bool memory = cell_info(a.cell).memory;
  STD_TORCH_CHECK(memory || (!dc_all.has_value() && !dc_n.has_value()),
                  "dc_all and dc_n are for cells with memory");
  const Kind x(a.x);
  check_maybe("dy", dy, {s.steps, s.batch, s.directions * s.outputs}, x);
  check_maybe("dc_all", dc_all, {s.steps, s.batch, s.directions * s.hidden}, x);
  check_maybe("dh_n", dh_n, {s.directions, s.batch, s.outputs}, x);
  check_maybe("dc_n", dc_n, {s.directions, s.batch, s.hidden}, x);
}

// What forward left for layer_backward: y where the cell's backward pass reads it, and the tape.
inline void check_kept(const Arguments& a, const Sizes& s, const MaybeTensor& y, const Tensor& tape,
                       int64_t tape_size, ScalarType wide) {
  STD_TORCH_CHECK(y.has_value() || cell_info(a.cell).keeps_output, "y is needed for this cell");
  const Kind x(a.x);
  check_maybe("y", y, {s.steps, s.batch, s.directions * s.outputs}, x);
  check_shape("tape", tape, {s.directions, s.steps, s.batch, tape_size});
  STD_TORCH_CHECK(tape.scalar_type() == wide, "tape has a wrong dtype");
  check_device("tape", tape, x);
}

}  // namespace torchrnn
