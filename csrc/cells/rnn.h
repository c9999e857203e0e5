// Simple recurrent cell (Elman 1990), one hidden unit, one step, with tanh or relu.
#pragma once

#include "cells/math.h"

namespace torchrnn {
inline namespace RNN_ISA {

template <typename T>
struct RnnTanh {
  static constexpr int kGates = 1;
  static constexpr int kTape = 1;  // the new h
  static constexpr int kMemory = -1;
  static constexpr int kHalves = 1;
  static constexpr int kHiddenBias = -1;
  static constexpr bool kReadsH = false;
  static constexpr int kGateGrads = 1;
  static constexpr int kInputGrads = 0;

  struct State { T h, c; };

  // wx = W x + b_ih + b_hh, rh = R h.
  RNN_FN static State forward(const T (&wx)[kGates], const T (&rh)[kGates], State prev, T (&tape)[kTape]) {
    tape[0] = tanh_(wx[0] + rh[0]);
    return {tape[0], prev.c};
  }

  RNN_FN static State backward(const T (&tape)[kTape], State, State dnext, T (&d)[kGateGrads]) {
    d[0] = dnext.h * (T(1) - tape[0] * tape[0]);
    return {T(0), dnext.c};
  }
};

template <typename T>
struct RnnRelu : RnnTanh<T> {
  using typename RnnTanh<T>::State;
  using RnnTanh<T>::kGates, RnnTanh<T>::kTape, RnnTanh<T>::kGateGrads;

  RNN_FN static State forward(const T (&wx)[kGates], const T (&rh)[kGates], State prev, T (&tape)[kTape]) {
    tape[0] = relu(wx[0] + rh[0]);
    return {tape[0], prev.c};
  }

  RNN_FN static State backward(const T (&tape)[kTape], State, State dnext, T (&d)[kGateGrads]) {
    d[0] = relu_grad(tape[0], dnext.h);
    return {T(0), dnext.c};
  }
};

}  // namespace RNN_ISA
}  // namespace torchrnn
