// Cells whose units do not see each other: the recurrent weights are vectors u, or there are none. One unit,
// one step. IndRNN: Li et al. 2018, arXiv:1803.04831. IndyLSTM and IndyGRU: Gonnet & Deselaers 2019,
// arXiv:1903.08023. SRU: Lei et al. 2017, arXiv:1709.02755, whose highway input has its own product here, as
// in TensorFlow.
//
// The order of gates is TensorFlow's. backward computes the gates anew from wx, which autograd keeps anyway,
// and the previous state: a tape of them would be as large as wx.
#pragma once

#include "cells/math.h"

namespace torchrnn {
inline namespace RNN_ISA {
namespace elementwise {

// Activations: the value, and the gradient by the argument from the value y and the gradient by it.
struct Tanh {
  template <typename T>
  RNN_FN static T value(T x) {
    return tanh_(x);
  }
  template <typename T>
  RNN_FN static T gradient(T y, T dy) {
    return dy * (T(1) - y * y);
  }
};

struct Relu {
  template <typename T>
  RNN_FN static T value(T x) {
    return relu(x);
  }
  template <typename T>
  RNN_FN static T gradient(T y, T dy) {
    return relu_grad(y, dy);
  }
};

struct Sigmoid {
  template <typename T>
  RNN_FN static T value(T x) {
    return sigmoid(x);
  }
  template <typename T>
  RNN_FN static T gradient(T y, T dy) {
    return dy * y * (T(1) - y);
  }
};

struct Identity {
  template <typename T>
  RNN_FN static T value(T x) {
    return x;
  }
  template <typename T>
  RNN_FN static T gradient(T, T dy) {
    return dy;
  }
};

// What each cell has:
// kGates      blocks of wx, and of u
// kCarriesH   whether h goes on to the next step (and u is read), kCarriesC whether there is a c that does
// forward     from wx, u and the previous state to the new h, which is the output, and c
// backward    from the gradients by the new state to those by the sums (d), by this step's part of u (du)
// and,
//             returned, by the previous state; `h` is the new h
template <typename T>
struct State {
  T h, c;
};

template <typename T, typename Act>
struct IndRnn {
  static constexpr int kGates = 1;
  static constexpr bool kCarriesH = true, kCarriesC = false;

  RNN_FN static State<T> forward(const T (&wx)[kGates], const T (&u)[kGates], State<T> prev) {
    return {Act::value(wx[0] + u[0] * prev.h), prev.c};
  }

  RNN_FN static State<T> backward(const T (&)[kGates], const T (&u)[kGates], State<T> prev, T h,
                                  State<T> dnext, T (&d)[kGates], T (&du)[kGates]) {
    d[0] = Act::gradient(h, dnext.h);
    du[0] = d[0] * prev.h;
    return {d[0] * u[0], dnext.c};
  }
};

template <typename T, typename Act>
struct IndyGru {
  static constexpr int kGates = 3;  // r, z, n; z keeps the old state
  static constexpr bool kCarriesH = true, kCarriesC = false;

  RNN_FN static State<T> forward(const T (&wx)[kGates], const T (&u)[kGates], State<T> prev) {
    const T r = sigmoid(wx[0] + u[0] * prev.h);
    const T z = sigmoid(wx[1] + u[1] * prev.h);
    const T n = Act::value(wx[2] + u[2] * (r * prev.h));
    return {n + z * (prev.h - n), prev.c};
  }

  RNN_FN static State<T> backward(const T (&wx)[kGates], const T (&u)[kGates], State<T> prev, T,
                                  State<T> dnext, T (&d)[kGates], T (&du)[kGates]) {
    const T one(1);
    const T r = sigmoid(wx[0] + u[0] * prev.h);
    const T z = sigmoid(wx[1] + u[1] * prev.h);
    const T rh = r * prev.h;
    const T n = Act::value(wx[2] + u[2] * rh);
    d[2] = Act::gradient(n, dnext.h * (one - z));
    d[1] = dnext.h * (prev.h - n) * z * (one - z);
    const T drh = d[2] * u[2];
    d[0] = drh * rh * (one - r);
    du[0] = d[0] * prev.h, du[1] = d[1] * prev.h, du[2] = d[2] * rh;
    return {dnext.h * z + drh * r + d[0] * u[0] + d[1] * u[1], dnext.c};
  }
};

template <typename T, typename Act>
struct IndyLstm {
  static constexpr int kGates = 4;  // i, g, f, o; g is the candidate
  static constexpr bool kCarriesH = true, kCarriesC = true;

  RNN_FN static State<T> forward(const T (&wx)[kGates], const T (&u)[kGates], State<T> prev) {
    const T i = sigmoid(wx[0] + u[0] * prev.h);
    const T g = Act::value(wx[1] + u[1] * prev.h);
    const T f = sigmoid(wx[2] + u[2] * prev.h);
    const T o = sigmoid(wx[3] + u[3] * prev.h);
    const T c = f * prev.c + i * g;
    return {o * Act::value(c), c};
  }

  RNN_FN static State<T> backward(const T (&wx)[kGates], const T (&u)[kGates], State<T> prev, T,
                                  State<T> dnext, T (&d)[kGates], T (&du)[kGates]) {
    const T one(1);
    const T i = sigmoid(wx[0] + u[0] * prev.h);
    const T g = Act::value(wx[1] + u[1] * prev.h);
    const T f = sigmoid(wx[2] + u[2] * prev.h);
    const T o = sigmoid(wx[3] + u[3] * prev.h);
    const T a = Act::value(f * prev.c + i * g);
    const T dc = dnext.c + Act::gradient(a, dnext.h * o);
    d[0] = dc * g * i * (one - i);
    d[1] = Act::gradient(g, dc * i);
    d[2] = dc * prev.c * f * (one - f);
    d[3] = dnext.h * a * o * (one - o);
    T dh = d[0] * u[0];
    du[0] = d[0] * prev.h;
    for (int k = 1; k < kGates; ++k) dh = dh + d[k] * u[k], du[k] = d[k] * prev.h;
    return {dh, dc * f};
  }
};

// Reads no h, so that u and du stay untouched.
template <typename T, typename Act>
struct Sru {
  static constexpr int kGates = 4;  // x~, f, r and the highway's x
  static constexpr bool kCarriesH = false, kCarriesC = true;

  RNN_FN static State<T> forward(const T (&wx)[kGates], const T (&)[kGates], State<T> prev) {
    const T f = sigmoid(wx[1]), r = sigmoid(wx[2]);
    const T c = wx[0] + f * (prev.c - wx[0]);
    return {wx[3] + r * (Act::value(c) - wx[3]), c};
  }

  RNN_FN static State<T> backward(const T (&wx)[kGates], const T (&)[kGates], State<T> prev, T,
                                  State<T> dnext, T (&d)[kGates], T (&)[kGates]) {
    const T one(1);
    const T f = sigmoid(wx[1]), r = sigmoid(wx[2]);
    const T a = Act::value(wx[0] + f * (prev.c - wx[0]));
    const T dc = dnext.c + Act::gradient(a, dnext.h * r);
    d[0] = dc * (one - f);
    d[1] = dc * (prev.c - wx[0]) * f * (one - f);
    d[2] = dnext.h * (a - wx[3]) * r * (one - r);
    d[3] = dnext.h * (one - r);
    return {T(0), dc * f};
  }
};

}  // namespace elementwise
}  // namespace RNN_ISA
}  // namespace torchrnn
