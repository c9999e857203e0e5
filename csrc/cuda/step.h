// What the two passes of the step path share: where a step's values are, and which rows it concerns.
#pragma once

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cuda/half.h"
#include "cuda/launch.h"
#include "cuda/scan.h"

namespace torchrnn {
namespace cuda {

// Of a row with layer normalisation the tape holds the four normalised gate sums, the new c, the normalised c
// and the five inverse standard deviations, in this order.
constexpr int64_t kNormedC = 5;

// One step of one direction.
template <typename Acc>
struct Step {
  ForwardScan<Acc> p;
  int d;
  int64_t t;

  RNN_FN bool back() const { return d == 1 || p.reverse; }
  RNN_FN bool alive(int64_t time, int64_t b) const { return p.lengths == nullptr || time < p.lengths[b]; }
  RNN_FN bool alive(int64_t b) const { return alive(t, b); }

  // Whether the state is forgotten before the step at `time` is computed. A reset at t parts t-1 from t, so
  // backwards the mark is that of t+1, the step before, if the row has one.
  RNN_FN bool cut(int64_t time, int64_t b) const {
    if (p.resets == nullptr) return false;
    const int64_t mark = back() ? time + 1 : time;
    return mark < p.steps && (!back() || alive(mark, b)) && p.resets[mark * p.batch + b];
  }
  RNN_FN bool cut(int64_t b) const { return cut(t, b); }

  // The time of the step before; whether the row has one.
  RNN_FN int64_t time_before(int64_t time) const { return back() ? time + 1 : time - 1; }
  RNN_FN bool follows(int64_t time, int64_t b) const {
    const int64_t before = time_before(time);
    return before >= 0 && before < p.steps && alive(before, b);
  }

  RNN_FN int64_t gates_row(int64_t b, int64_t gates) const { return (t * p.batch + b) * gates * p.hidden; }
  RNN_FN Acc* tape(int64_t time, int64_t b) const {
    return p.tape == nullptr ? nullptr : p.tape + ((d * p.steps + time) * p.batch + b) * p.tape_size;
  }
  RNN_FN int64_t output(int64_t time, int64_t b, int64_t size) const {
    return ((time * p.batch + b) * p.directions + d) * size;
  }

  // Factors on the carried state.
  RNN_FN Acc mask(const Acc* mask, int64_t steps, int64_t size, int64_t time, int64_t b, int64_t u) const {
    return mask == nullptr ? Acc(1) : mask[((d * steps + (steps == 1 ? 0 : time)) * p.batch + b) * size + u];
  }
  RNN_FN Acc mask_h(int64_t time, int64_t b, int64_t u) const {
    return mask(p.mask_h, p.mask_h_steps, p.outputs, time, b, u);
  }
  RNN_FN Acc mask_c(int64_t time, int64_t b, int64_t u) const {
    return mask(p.mask_c, p.mask_c_steps, p.hidden, time, b, u);
  }

  RNN_FN Varied<Acc> policy(int64_t u) const {
    const Acc* peephole = p.direction[d].peephole;
    const bool peeps = peephole != nullptr;
    return {p.activation,
            peeps,
            bounded(p.cell_clip),
            peeps ? peephole[u] : Acc(0),
            peeps ? peephole[p.hidden + u] : Acc(0),
            peeps ? peephole[2 * p.hidden + u] : Acc(0),
            p.cell_clip};
  }

  RNN_FN static bool bounded(Acc bound) { return bound * 0 == 0; }  // not infinite
  RNN_FN bool clips_output() const { return p.projected && bounded(p.proj_clip); }
  // Where in the tape the projection before its clip is.
  RNN_FN int64_t clip_place() const { return p.tape_size - p.outputs; }
};

// The sums of a gate from what was normalised.
template <typename Acc>
RNN_FN Acc scaled(const DirectionForward<Acc>& w, Acc normalised, int64_t at) {
  return normalised * w.norm_gain[at] + w.norm_shift[at];
}

// Calls use(cell) with the cell's type, for those whose step has one recurrent product.
template <template <typename> class C>
struct CellOf {};

template <typename Use>
int with_cell(Cell cell, const Use& use) {
  switch (cell) {
    case Cell::kGru:
      return use(CellOf<Gru>());
    case Cell::kRnn:
      return use(CellOf<Rnn>());
    case Cell::kLstmCoupled:
      return use(CellOf<LstmCoupled>());
    default:
      return use(CellOf<Lstm>());
  }
}

// Calls use(number) with a number of the dtype that Acc sums.
template <typename Acc, typename Use>
int with_io(Dtype dtype, const Use& use) {
  if constexpr (sizeof(Acc) == sizeof(double)) {
    return use(double());
  } else {
    if (dtype == Dtype::kBfloat16) return use(Bf16());
    if (dtype == Dtype::kFloat16) return use(Half());
    return use(float());
  }
}

// Where in a row of the tape the new h is; -1 if backward reads it from y.
RNN_FN int kept_output(Cell cell) {
  if (cell == Cell::kGru) return Gru<float>::kOutput;
  if (cell == Cell::kGruResetBefore) return GruResetBefore<float>::kOutput;
  return cell == Cell::kRnn ? Rnn<float>::kOutput : -1;
}

RNN_FN int64_t gates_of(Cell cell) { return cell == Cell::kLstm ? 4 : cell == Cell::kRnn ? 1 : 3; }

// Hands out aligned parts of the workspace; with a null base it only counts.
struct Workspace {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* get(int64_t count) {
    constexpr int64_t kAlign = 256;
    T* part = reinterpret_cast<T*>(base == nullptr ? nullptr : base + used);
    used += (count * int64_t(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
    return part;
  }
};

}  // namespace cuda
}  // namespace torchrnn
