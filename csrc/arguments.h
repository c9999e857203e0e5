// What the ops files of the devices share: the arguments of the layer ops as torch hands them over, their
// sizes, and the checks that hold for every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "checks.h"
#include "params.h"

namespace torchrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

// What the layer ops have in common, in the order of their schemas in torchrnn/ops.py.
struct Arguments {
  const Tensor& x;
  const Tensors &weight_ih, &weight_hh, &bias_ih, &bias_hh, &weight_hr, &peephole, &norm_gain, &norm_shift;
  const MaybeTensor &h0, &c0, &lengths, &resets, &mask_h, &mask_c, &zoneout_h, &zoneout_c;
  int64_t cell, activation;
  std::optional<double> cell_clip, proj_clip;
  double norm_eps;
  bool reverse;
  // Of CUDA alone: whether products of float32 may be rounded to TF32, and the path that is asked for, with
  // the codes of torchrnn/cuda.py.
  bool tf32;
  int64_t path;
};

// The same as parameters of an op, and from them the struct.
#define RNN_PARAMETERS                                                                                     \
  const Tensor &x, const Tensors &weight_ih, const Tensors &weight_hh, const Tensors &bias_ih,             \
      const Tensors &bias_hh, const Tensors &weight_hr, const Tensors &peephole, const Tensors &norm_gain, \
      const Tensors &norm_shift, const MaybeTensor &h0, const MaybeTensor &c0, const MaybeTensor &lengths, \
      const MaybeTensor &resets, const MaybeTensor &mask_h, const MaybeTensor &mask_c,                     \
      const MaybeTensor &zoneout_h, const MaybeTensor &zoneout_c, int64_t cell, int64_t activation,        \
      std::optional<double> cell_clip, std::optional<double> proj_clip, double norm_eps, bool reverse,     \
      bool tf32, int64_t path
#define RNN_ARGUMENTS                                                                                       \
  Arguments {                                                                                               \
    x, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm_gain, norm_shift, h0, c0, lengths, \
        resets, mask_h, mask_c, zoneout_h, zoneout_c, cell, activation, cell_clip, proj_clip, norm_eps,     \
        reverse, tf32, path                                                                                 \
  }

// The values are those of torchrnn/options.py.
struct CellInfo {
  int64_t gates, tape;
  bool memory;
};

inline CellInfo cell_info(int64_t cell) {
  switch (Cell(cell)) {
    case Cell::kLstm:
      return {4, 5, true};
    case Cell::kGru:
      return {3, 4, false};
    case Cell::kGruResetBefore:
      return {3, 3, false};
    case Cell::kRnn:
      return {1, 1, false};
    case Cell::kLstmCoupled:
      return {3, 4, true};
  }
  STD_TORCH_CHECK(false, "cell ", cell, " is not known");
}

// A bound as the kernels have it: infinity is none, also one beyond all numbers of the dtype.
template <typename T>
T bound(const std::optional<double>& value) {
  return value.has_value() ? T(*value) : std::numeric_limits<T>::infinity();
}

inline void check_sequences(const MaybeTensor& lengths, const MaybeTensor& resets, int64_t steps,
                            int64_t batch) {
  if (lengths.has_value()) RNN_CHECK_SHAPE(*lengths, batch);
  if (resets.has_value()) RNN_CHECK_SHAPE(*resets, steps, batch);
}

struct Sizes { int64_t steps, batch, inputs, hidden, outputs, directions; };

// Returns T, B, I, H, R and D; raises if an argument does not fit them, or if no kernel serves it: one that
// ignored it would be wrong in silence.
inline Sizes checked_sizes(const Arguments& a) {
  const CellInfo info = cell_info(a.cell);
  const int64_t directions = a.weight_hh.size();
  STD_TORCH_CHECK(directions >= 1 && directions <= kMaxDirections, "1 or 2 directions are needed");
  STD_TORCH_CHECK(a.x.dim() == 3, "x has a wrong shape");
  const int64_t rows = a.weight_hh[0].size(0), hidden = rows / info.gates, outputs = a.weight_hh[0].size(1);
  const Sizes s{a.x.size(0), a.x.size(1), a.x.size(2), hidden, outputs, directions};
  for (int64_t d = 0; d < directions; ++d) {
    RNN_CHECK_SHAPE(a.weight_ih.at(d), info.gates * hidden, s.inputs);
    RNN_CHECK_SHAPE(a.weight_hh[d], info.gates * hidden, outputs);
    if (!a.bias_ih.empty()) RNN_CHECK_SHAPE(a.bias_ih.at(d), info.gates * hidden);
    if (!a.bias_ih.empty()) RNN_CHECK_SHAPE(a.bias_hh.at(d), info.gates * hidden);
    if (!a.weight_hr.empty()) RNN_CHECK_SHAPE(a.weight_hr.at(d), outputs, hidden);
    if (!a.peephole.empty()) RNN_CHECK_SHAPE(a.peephole.at(d), 3, hidden);
    if (!a.norm_gain.empty()) {
      RNN_CHECK_SHAPE(a.norm_gain.at(d), info.gates + 1, hidden);
      RNN_CHECK_SHAPE(a.norm_shift.at(d), info.gates + 1, hidden);
      STD_TORCH_CHECK(Cell(a.cell) == Cell::kLstm, "no kernel serves layer normalisation of this cell");
    }
  }
  if (a.h0.has_value()) RNN_CHECK_SHAPE(*a.h0, directions, s.batch, outputs);
  if (a.c0.has_value()) RNN_CHECK_SHAPE(*a.c0, directions, s.batch, hidden);
  check_sequences(a.lengths, a.resets, s.steps, s.batch);
  const auto check_mask = [&](const MaybeTensor& mask, int64_t size) {
    if (mask.has_value()) RNN_CHECK_SHAPE(*mask, directions, mask->size(1) == 1 ? 1 : s.steps, s.batch, size);
  };
  check_mask(a.mask_h, outputs), check_mask(a.mask_c, hidden);
  STD_TORCH_CHECK(!a.zoneout_h.has_value() && !a.zoneout_c.has_value(), "no kernel serves zoneout");
  return s;
}

// Values per row and step of the tape, as params.h has them. P is the parameter struct of a device.
template <typename P>
int64_t tape_size(const Arguments& a, const P& p) {
  return cell_info(a.cell).tape * p.hidden + (a.norm_gain.empty() ? 0 : p.hidden + 5) +
         (std::isfinite(p.proj_clip) ? p.outputs : 0);
}

}  // namespace torchrnn
