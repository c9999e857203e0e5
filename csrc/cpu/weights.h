// One direction's weights as the forward kernels read them.
#pragma once

#include "cpu/team.h"
#include "cpu/tile.h"
#include "params.h"

namespace torchrnn {
inline namespace RNN_ISA {

template <typename T, template <typename> class CellOf>
struct Weights {
  using C = CellOf<VecOf<T>>;
  static constexpr int G = C::kGates;
  static constexpr bool kTwoHalves = C::kHalves == 2;
  static constexpr int kFirst = kTwoHalves ? 2 : G;  // gates of the first recurrent product
  static constexpr int U = G == 1 ? 4 : kTwoHalves ? 2 : 1;
  using Recurrent = GateMatrix<T, kFirst, U>;
  using Input = GateMatrix<T, G, G == 1 ? 4 : 1>;
  using Second = GateMatrix<T, 1, 4>;  // the candidate of GruResetBefore, or the projection

  Input input;
  Recurrent recurrent;
  Second second;
  T* bias_x;  // [G*H]: b_ih, and b_hh where the cell adds it before the nonlinearity
  T* bias_h;  // [H]: b_hh of the candidate of Gru, 0 without biases; null for the other cells

  // Points to the weights of p as they are; `zeros` has as many as a row of any of them.
  Weights(const LayerParams<T>& p, int d, const T* zeros)
      : input{p.weights[d].weight_ih, p.hidden, p.inputs, zeros, nullptr},
        recurrent{p.weights[d].weight_hh, p.hidden, p.outputs, zeros, nullptr},
        second{nullptr, 0, 0, zeros, nullptr} {
    const auto& w = p.weights[d];
    // Null while packed weights are being read.
    const T* candidate = w.weight_hh == nullptr ? nullptr : w.weight_hh + 2 * p.hidden * p.hidden;
    if (kTwoHalves) second = {candidate, p.hidden, p.hidden, zeros, nullptr};
    if (p.projected) second = {w.weight_hr, p.outputs, p.hidden, zeros, nullptr};
  }
  Weights() = default;

  // Gives the parts their places in `memory` and returns the size of all. A matrix has one if packing it pays
  // for a call with so many rows; of the matrices of units if they are not packed panel by panel.
  int64_t place(const LayerParams<T>& p, T* memory, int64_t rows, bool by_panel = false) {
    constexpr int64_t kLine = 64 / sizeof(T);
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      T* part = memory + used;
      used += ceil_div(count, kLine) * kLine;
      return part;
    };
    bias_x = take(G * p.hidden);
    bias_h = C::kHiddenBias >= 0 ? take(p.hidden) : nullptr;
    const auto place_matrix = [&](auto& matrix) {
      if (rows >= pack_from(matrix.depth)) matrix.packed = take(matrix.packed_size());
    };
    if (!by_panel) place_matrix(input);
    if (!by_panel) place_matrix(recurrent);
    if (second.hidden > 0) place_matrix(second);
    return used;
  }

  void add_biases(const LayerParams<T>& p, int d) const {
    const auto& w = p.weights[d];
    for (int64_t i = 0; i < G * p.hidden; ++i) {
      const bool apart = C::kHiddenBias >= 0 && i / p.hidden == C::kHiddenBias;
      bias_x[i] = w.bias_ih == nullptr ? T(0) : apart ? w.bias_ih[i] : w.bias_ih[i] + w.bias_hh[i];
    }
    for (int64_t i = 0; bias_h != nullptr && i < p.hidden; ++i)
      bias_h[i] = w.bias_hh == nullptr ? T(0) : w.bias_hh[C::kHiddenBias * p.hidden + i];
  }

  // Packs one thread's share: what it will read itself, as far as one does, so that it is in its own cache.
  void pack(const Slice& slice) const {
    const auto part = [&](int64_t panels) {
      const Range mine = slice.units(panels);
      const Range sub = share(mine.end - mine.begin, slice.row_part, slice.row_parts);
      return Range{mine.begin + sub.begin, mine.begin + sub.end};
    };
    const Range in = part(input.panels()), re = part(recurrent.panels());
    input.pack(in.begin, in.end);
    recurrent.pack(re.begin, re.end);
    if (second.hidden == 0) return;
    const Range se = part(second.panels());
    second.pack(se.begin, se.end);
  }

  // Packs all directions, one after the other, unless `out` is null; returns the size.
  static int64_t pack_all(const LayerParams<T>& p, T* out) {
    const int64_t widest = max64(max64(p.inputs, p.hidden), p.outputs);
    T* zeros = static_cast<T*>(calloc(widest, sizeof(T)));
    if (zeros == nullptr) throw std::bad_alloc();
    int64_t size = 0;
    for (int d = 0; d < p.directions; ++d) {
      Weights w(p, d, zeros);
      const int64_t mine = w.place(p, out == nullptr ? nullptr : out + size, INT64_MAX);
      size += mine;
      if (out == nullptr) continue;
      w.add_biases(p, d);
      w.pack({0, 1, 0, 1});
    }
    free(zeros);
    return size;
  }
};

}  // namespace RNN_ISA
}  // namespace torchrnn
