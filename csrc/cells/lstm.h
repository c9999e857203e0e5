// LSTM, one hidden unit, one step (Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000).
#pragma once

#include "cells/policies.h"

namespace torchrnn {
inline namespace RNN_ISA {

template <typename T>
struct Lstm {
  static constexpr int kGates = 4;        // i, f, g, o: the row blocks of weight_ih and weight_hh
  static constexpr int kTape = 5;         // i, f, g, o after their activation, and the new c
  static constexpr int kMemory = 4;       // where in the tape the new c is; -1 for a cell without c
  static constexpr int kOutput = -1;      // where in the tape the new h is; -1 if backward reads it from y
  static constexpr int kHalves = 1;       // recurrent products that wait for each other
  static constexpr int kHiddenBias = -1;  // gate whose b_hh is added to rh, not to wx; -1 for none
  static constexpr bool kReadsH = false;  // whether the maths reads the previous h other than through R
  static constexpr int kGateGrads = 4;    // gradients by wx are those by rh: both i, f, g, o
  static constexpr int kInputGrads = 0;   // where in the gate gradients those by wx begin
  // The gate gradients that the rows i, f, o of the peepholes meet; -1 for none.
  static constexpr int kPeepholes[3] = {0, 1, 3};

  // Carried to the next step.
  struct State { T h, c; };

  // wx = W x + b_ih + b_hh, rh = R h.
  template <typename Policy>
  RNN_FN static State forward(const Policy& policy, const T (&wx)[kGates], const T (&rh)[kGates], State prev,
                              T (&tape)[kTape]) {
    T sum_i = wx[0] + rh[0], sum_f = wx[1] + rh[1], sum_o = wx[3] + rh[3];
    policy.see_old(prev.c, sum_i, sum_f);
    const T i = sigmoid(sum_i);
    const T f = sigmoid(sum_f);
    const T g = policy.activate(wx[2] + rh[2]);
    const T c = policy.clip(f * prev.c + i * g);
    policy.see_new(c, sum_o);
    const T o = sigmoid(sum_o);
    tape[0] = i, tape[1] = f, tape[2] = g, tape[3] = o, tape[4] = c;
    return {o * policy.activate(c), c};
  }

  // The new h, from the tape.
  template <typename Policy>
  RNN_FN static T output(const Policy& policy, const T (&tape)[kTape]) {
    return tape[3] * policy.activate(tape[4]);
  }

  // From the gradients by the new state to those by the gate sums (d) and, returned, by the previous state
  // except what goes through R.
  template <typename Policy>
  RNN_FN static State backward(const Policy& policy, const T (&tape)[kTape], State prev, State dnext,
                               T (&d)[kGateGrads]) {
    const T one(1);
    const T i = tape[0], f = tape[1], g = tape[2], o = tape[3];
    const T u = policy.activate(tape[4]);
    d[3] = dnext.h * u * o * (one - o);
    T dc = dnext.c + policy.through(u, dnext.h * o);
    policy.seen_new(d[3], dc);
    dc = policy.clipped(f * prev.c + i * g, dc);
    d[0] = dc * g * i * (one - i);
    d[1] = dc * prev.c * f * (one - f);
    d[2] = policy.through(g, dc * i);
    T dc_prev = dc * f;
    policy.seen_old(d[0], d[1], dc_prev);
    return {T(0), dc_prev};
  }
};

// The LSTM whose input gate is 1 - f (Greff et al. 2015, arXiv:1503.04069, "CIFG").
template <typename T>
struct LstmCoupled {
  static constexpr int kGates = 3;  // f, g, o
  static constexpr int kTape = 4;   // f, g, o after their activation, and the new c
  static constexpr int kMemory = 3;
  static constexpr int kOutput = -1;
  static constexpr int kHalves = 1;
  static constexpr int kHiddenBias = -1;
  static constexpr bool kReadsH = false;
  static constexpr int kGateGrads = 3;
  static constexpr int kInputGrads = 0;
  static constexpr int kPeepholes[3] = {-1, 0, 2};

  struct State { T h, c; };

  template <typename Policy>
  RNN_FN static State forward(const Policy& policy, const T (&wx)[kGates], const T (&rh)[kGates], State prev,
                              T (&tape)[kTape]) {
    T none(0), sum_f = wx[0] + rh[0], sum_o = wx[2] + rh[2];
    policy.see_old(prev.c, none, sum_f);
    const T f = sigmoid(sum_f);
    const T g = policy.activate(wx[1] + rh[1]);
    const T c = policy.clip(f * prev.c + (T(1) - f) * g);
    policy.see_new(c, sum_o);
    const T o = sigmoid(sum_o);
    tape[0] = f, tape[1] = g, tape[2] = o, tape[3] = c;
    return {o * policy.activate(c), c};
  }

  template <typename Policy>
  RNN_FN static T output(const Policy& policy, const T (&tape)[kTape]) {
    return tape[2] * policy.activate(tape[3]);
  }

  template <typename Policy>
  RNN_FN static State backward(const Policy& policy, const T (&tape)[kTape], State prev, State dnext,
                               T (&d)[kGateGrads]) {
    const T one(1);
    const T f = tape[0], g = tape[1], o = tape[2];
    const T u = policy.activate(tape[3]);
    d[2] = dnext.h * u * o * (one - o);
    T dc = dnext.c + policy.through(u, dnext.h * o);
    policy.seen_new(d[2], dc);
    dc = policy.clipped(f * prev.c + (one - f) * g, dc);
    d[0] = dc * (prev.c - g) * f * (one - f);
    d[1] = policy.through(g, dc * (one - f));
    T dc_prev = dc * f;
    policy.seen_old(T(0), d[0], dc_prev);
    return {T(0), dc_prev};
  }
};

}  // namespace RNN_ISA
}  // namespace torchrnn
