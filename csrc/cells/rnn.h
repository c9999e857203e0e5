// Simple recurrent cell (Elman 1990), one hidden unit, one step.
#pragma once

#include "cells/policies.h"

namespace torchrnn {
inline namespace RNN_ISA {

template <typename T>
struct Rnn {
  static constexpr int kGates = 1;
  static constexpr int kTape = 1;  // the new h
  static constexpr int kMemory = -1;
  static constexpr int kOutput = 0;
  static constexpr int kHalves = 1;
  static constexpr int kHiddenBias = -1;
  static constexpr bool kReadsH = false;
  static constexpr int kGateGrads = 1;
  static constexpr int kInputGrads = 0;

  struct State { T h, c; };

  // wx = W x + b_ih + b_hh, rh = R h.
  template <typename Policy>
  RNN_FN static State forward(const Policy& policy, const T (&wx)[kGates], const T (&rh)[kGates], State prev,
                              T (&tape)[kTape]) {
    tape[0] = policy.activate(wx[0] + rh[0]);
    return {tape[0], prev.c};
  }

  template <typename Policy>
  RNN_FN static State backward(const Policy& policy, const T (&tape)[kTape], State, State dnext,
                               T (&d)[kGateGrads]) {
    d[0] = policy.through(tape[0], dnext.h);
    return {T(0), dnext.c};
  }
};

}  // namespace RNN_ISA
}  // namespace torchrnn
