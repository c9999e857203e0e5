// GRU, one hidden unit, one step: reset after the matmul (cuDNN, torch.nn) and before it (Cho et al. 2014,
// arXiv:1406.1078, eq. 5-8; TensorFlow). z keeps the old state in both.
#pragma once

#include "cells/policies.h"

namespace torchrnn {
inline namespace RNN_ISA {

template <typename T>
struct Gru {
  static constexpr int kGates = 3;  // r, z, n: the row blocks of weight_ih and weight_hh
  // r, z, n after their activation, rhn = (R h + b_hh)_n before the reset, and the new h.
  static constexpr int kTape = 5;
  static constexpr int kMemory = -1;
  static constexpr int kOutput = 4;
  static constexpr int kHalves = 1;
  static constexpr int kHiddenBias = 2;
  static constexpr bool kReadsH = true;
  static constexpr int kGateGrads = 4;  // rhn, r, z, n: by rh are the first three, by wx the last three
  static constexpr int kInputGrads = 1;

  struct State { T h, c; };

  // wx = W x + b_ih, and b_hh too in r and z; rh = R h, and b_hh too in n.
  template <typename Policy>
  RNN_FN static State forward(const Policy& policy, const T (&wx)[kGates], const T (&rh)[kGates], State prev,
                              T (&tape)[kTape]) {
    const T r = sigmoid(wx[0] + rh[0]);
    const T z = sigmoid(wx[1] + rh[1]);
    const T n = policy.activate(wx[2] + r * rh[2]);
    const T h = n + z * (prev.h - n);
    tape[0] = r, tape[1] = z, tape[2] = n, tape[3] = rh[2], tape[4] = h;
    return {h, prev.c};
  }

  template <typename Policy>
  RNN_FN static State backward(const Policy& policy, const T (&tape)[kTape], State prev, State dnext,
                               T (&d)[kGateGrads]) {
    const T one(1);
    const T r = tape[0], z = tape[1], n = tape[2], rhn = tape[3];
    const T dn = policy.through(n, dnext.h * (one - z));
    d[0] = dn * r;
    d[1] = dn * rhn * r * (one - r);
    d[2] = dnext.h * (prev.h - n) * z * (one - z);
    d[3] = dn;
    return {dnext.h * z, dnext.c};
  }
};

// Reset before the matmul: n's recurrent product is that of r * h, known only after all r of the row. So a
// step has two halves, and each half its own recurrent product.
template <typename T>
struct GruResetBefore {
  static constexpr int kGates = 3;  // r, z, n
  static constexpr int kTape = 4;   // r, z, n after their activation, and the new h
  static constexpr int kMemory = -1;
  static constexpr int kOutput = 3;
  static constexpr int kHalves = 2;
  static constexpr int kHiddenBias = -1;
  static constexpr bool kReadsH = true;
  static constexpr int kGateGrads = 3;
  static constexpr int kInputGrads = 0;

  // wx and rh hold the sums of r and z; rh of the second half is R_n (r * h).
  RNN_FN static void gates(const T (&wx)[2], const T (&rh)[2], T& r, T& z) {
    r = sigmoid(wx[0] + rh[0]);
    z = sigmoid(wx[1] + rh[1]);
  }
  template <typename Policy>
  RNN_FN static T candidate(const Policy& policy, T wx, T rh) {
    return policy.activate(wx + rh);
  }
  RNN_FN static T output(T z, T n, T h_prev) { return n + z * (h_prev - n); }

  // First half: gradients by the sums of z and n. Second half, with q = R_n' dn: by the sum of r.
  template <typename Policy>
  RNN_FN static void backward(const Policy& policy, T z, T n, T h_prev, T dh, T& dz, T& dn) {
    const T one(1);
    dz = dh * (h_prev - n) * z * (one - z);
    dn = policy.through(n, dh * (one - z));
  }
  RNN_FN static T backward_reset(T r, T h_prev, T q) { return q * h_prev * r * (T(1) - r); }
};

}  // namespace RNN_ISA
}  // namespace torchrnn
