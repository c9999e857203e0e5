// The last part of the backward pass: gradients by the weights and biases, as sums of outer products over all
// rows and steps.
#pragma once

#include "cpu/outer.h"

namespace torchrnn {
inline namespace RNN_ISA {

// Left and right rows of the weight gradients, of kOuterDepth row-steps at a time.
template <typename T>
struct WeightRows {
  int64_t count;
  const T *dgates[kOuterDepth], *x[kOuterDepth], *h_prev[kOuterDepth], *dh[kOuterDepth], *aside[kOuterDepth];
  // With peepholes, and with layer normalisation, only. gates are what the peepholes were added to.
  const T *c[kOuterDepth], *c_prev[kOuterDepth], *mask_c_prev[kOuterDepth], *gates[kOuterDepth];
  const T *tape[kOuterDepth], *dnorm[kOuterDepth];
};

// What one thread needs for them.
template <typename T>
struct WeightScratch {
  OuterMemory<T> memory{};
  WeightRows<T>* rows = nullptr;

  WeightScratch() = default;
  WeightScratch(int64_t depth, int64_t columns, Arena& arena)
      : memory{depth, columns}, rows(arena.template get<WeightRows<T>>(1)) {
    memory.data = arena.template get<T>(memory.size());
  }
};

// A slice of one direction of `B`, a Backward, in the hands of one thread.
template <typename T, typename B>
struct WeightGradients {
  using Block = WeightRows<T>;

  B& f;
  const int d;
  const Slice slice;
  const BackwardParams<T>& q;
  const LayerParams<T>& p;
  const typename B::State& state;
  const bool back;
  const OuterMemory<T>& memory;
  Block& block;
  bool accumulate = false;

  WeightGradients(B& backward, int direction, const Slice& slice_, const WeightScratch<T>& scratch)
      : f(backward),
        d(direction),
        slice(slice_),
        q(backward.q),
        p(backward.p),
        state(backward.state[direction]),
        back(backward.backwards(direction)),
        memory(scratch.memory),
        block(*scratch.rows) {}

  // Sums over some steps; to be added to what is there, or the first ones.
  void sum(Range steps, bool adds) {
    accumulate = adds;
    int64_t s = steps.begin, i = 0;
    while (s < steps.end || !accumulate) {  // Without any rows the sums are still to be set to zero.
      block.count = 0;
      while (s < steps.end && block.count < kOuterDepth) {
        if (i == state.rows.active[s]) {
          i = 0, ++s;
          continue;
        }
        add_row(state.rows.order[i++], s);
      }
      if (block.count == 0 && accumulate) return;
      outer_sums(block, memory);
      bias_sums(block);
      if constexpr (B::kVaried && B::C::kMemory >= 0) peephole_sums(block);
      if constexpr (B::kNormed) norm_sums(block);
      accumulate = true;
    }
  }

  void add_row(int64_t b, int64_t s) {
    const int64_t t = state.rows.time(b, s, back), k = block.count++;
    block.dgates[k] = f.dgates(d, s, b);
    block.x[k] = p.x + t * p.x_stride_t + b * p.x_stride_b;
    const bool cut = state.rows.cut(b, s, back);
    const int64_t t_prev = s > 0 ? state.rows.time(b, s - 1, back) : 0;
    block.h_prev[k] = cut     ? f.zeros
                      : s > 0 ? state.carried != nullptr ? f.carried(d, s, b) : f.output(d, t_prev, b)
                              : f.initial(p.h0, d, b, p.outputs);
    if (B::kVaried && p.weights[d].peephole != nullptr) {
      const int64_t c_at = B::C::kMemory * p.hidden;
      block.c[k] = f.tape(d, t, b) + c_at;
      block.c_prev[k] = cut ? f.zeros : s > 0 ? f.tape(d, t_prev, b) + c_at : f.initial(p.c0, d, b, p.hidden);
      block.mask_c_prev[k] = s > 0 && !cut ? f.mask_c(d, t_prev, b) : nullptr;
      block.gates[k] = B::kNormed ? f.dnorm(d, s, b) : block.dgates[k];
    }
    if (B::kNormed) block.tape[k] = f.tape(d, t, b), block.dnorm[k] = f.dnorm(d, s, b);
    if (p.projected) block.dh[k] = f.dh(d, s, b);
    if (f.has_second()) block.aside[k] = f.aside(d, s, b);
  }

  void outer_sums(const Block& block, const OuterMemory<T>& memory) const {
    const int64_t H = p.hidden;
    const auto& dw = q.dweights[d];
    // Rows [offset, offset + count) of the left side against the right side.
    const auto sum = [&](const T* const* lhs, int64_t offset, int64_t count, const T* const* rhs,
                         int64_t columns, T* out) {
      outer_sum(block.count, lhs, offset, rhs, share(count, slice.index(), slice.size()), columns, out,
                accumulate, memory);
    };
    sum(block.dgates, B::C::kInputGrads * H, B::G * H, block.x, p.inputs, dw.weight_ih);
    if constexpr (B::kTwoHalves) {
      sum(block.dgates, 0, 2 * H, block.h_prev, H, dw.weight_hh);
      sum(block.dgates, 2 * H, H, block.aside, H, dw.weight_hh + 2 * H * H);
    } else if constexpr (B::kRotate > 0) {
      sum(block.dgates, 0, H, block.h_prev, p.outputs, dw.weight_hh + B::kRotate * H * p.outputs);
      sum(block.dgates, H, B::kRotate * H, block.h_prev, p.outputs, dw.weight_hh);
    } else {
      sum(block.dgates, 0, B::G * H, block.h_prev, p.outputs, dw.weight_hh);
    }
    if (p.projected) sum(block.dh, 0, p.outputs, block.aside, H, dw.weight_hr);
  }

  void bias_sums(const Block& block) const {
    if (q.dweights[d].bias_ih == nullptr) return;
    // By a few rows at a time: one long sum would round more than torch does.
    constexpr int64_t kRows = 32;
    const Range columns = share(B::D * p.hidden, slice.index(), slice.size());
    for (int64_t k0 = 0; k0 < block.count; k0 += kRows)
      for (int64_t m = columns.begin; m < columns.end; m += B::N) {
        const int64_t n = min64(B::N, columns.end - m);
        typename B::V sum(T(0));
        for (int64_t k = k0; k < min64(k0 + kRows, block.count); ++k)
          sum += B::V::load(block.dgates[k] + m, n);
        (B::V::load(state.bias + m, n) + sum).store(state.bias + m, n);
      }
  }

  // Gradients by the peepholes, of rows i and f by the old c and of o by the new one; by few rows as above.
  void peephole_sums(const Block& block) const {
    if (q.dweights[d].peephole == nullptr) return;
    constexpr int64_t kRows = 32;
    using V = typename B::V;
    const int64_t H = p.hidden;
    const Range columns = share(H, slice.index(), slice.size());
    for (int64_t k0 = 0; k0 < block.count; k0 += kRows)
      for (int64_t m = columns.begin; m < columns.end; m += B::N) {
        const int64_t n = min64(B::N, columns.end - m);
        V sum[3] = {V(T(0)), V(T(0)), V(T(0))};
        for (int64_t k = k0; k < min64(k0 + kRows, block.count); ++k) {
          V c_prev = V::load(block.c_prev[k] + m, n);
          if (block.mask_c_prev[k] != nullptr) c_prev = c_prev * V::load(block.mask_c_prev[k] + m, n);
          for (int g = 0; g < 3; ++g)
            if (const int gate = B::C::kPeepholes[g]; gate >= 0)
              sum[g] +=
                  V::load(block.gates[k] + gate * H + m, n) * (g == 2 ? V::load(block.c[k] + m, n) : c_prev);
        }
        for (int g = 0; g < 3; ++g)
          (V::load(state.peephole + g * H + m, n) + sum[g]).store(state.peephole + g * H + m, n);
      }
  }

  // Gradients by gain and shift of the layer normalisation; by few rows as above.
  void norm_sums(const Block& block) const {
    constexpr int64_t kRows = 32;
    using V = typename B::V;
    const int64_t H = p.hidden;
    const Range columns = share(H, slice.index(), slice.size());
    for (int64_t k0 = 0; k0 < block.count; k0 += kRows)
      for (int g = 0; g < 5; ++g)
        for (int64_t m = columns.begin; m < columns.end; m += B::N) {
          const int64_t n = min64(B::N, columns.end - m), from = (g < 4 ? g : kNormedC) * H + m;
          V gain(T(0)), shift(T(0));
          for (int64_t k = k0; k < min64(k0 + kRows, block.count); ++k) {
            const V dn = V::load(block.dnorm[k] + g * H + m, n);
            gain += dn * V::load(block.tape[k] + from, n), shift += dn;
          }
          T* to = state.norm + g * H + m;
          (V::load(to, n) + gain).store(to, n);
          (V::load(to + 5 * H, n) + shift).store(to + 5 * H, n);
        }
  }

  // After the last sums, of all slices: each has its columns of state.bias and state.peephole.
  void store_vectors() const {
    const auto& dw = q.dweights[d];
    if (slice.index() != 0) return;
    const int64_t H = p.hidden;
    if (B::kVaried && dw.peephole != nullptr) memcpy(dw.peephole, state.peephole, 3 * H * sizeof(T));
    if (B::kNormed && dw.norm_gain != nullptr) {
      memcpy(dw.norm_gain, state.norm, 5 * H * sizeof(T));
      memcpy(dw.norm_shift, state.norm + 5 * H, 5 * H * sizeof(T));
    }
    if (dw.bias_ih == nullptr) return;
    memcpy(dw.bias_ih, state.bias + B::C::kInputGrads * H, B::G * H * sizeof(T));
    memcpy(dw.bias_hh + B::kRotate * H, state.bias, (B::G - B::kRotate) * H * sizeof(T));
    memcpy(dw.bias_hh, state.bias + (B::G - B::kRotate) * H, B::kRotate * H * sizeof(T));
  }
};

}  // namespace RNN_ISA
}  // namespace torchrnn
