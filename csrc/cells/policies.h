// Variations of the cells: what a cell asks of its policy at the places where variants differ. T is the
// cell's value type.
#pragma once

#include "cells/math.h"
#include "params.h"

namespace torchrnn {
inline namespace RNN_ISA {

// No variation: tanh, no peepholes, no bound on the memory.
struct Plain {
  static constexpr bool kVaried = false;
  static constexpr bool kNormed = false;  // with layer normalisation, see cpu/norm.h

  template <typename T>
  RNN_FN T activate(T x) const {
    return tanh_(x);
  }
  // The gradient through the activation, from its value y.
  template <typename T>
  RNN_FN T through(T y, T dy) const {
    return dy * (T(1) - y * y);
  }
  // Peepholes (Gers & Schmidhuber 2000): the gates i and f see the old c, the gate o the new one.
  template <typename T>
  RNN_FN void see_old(T, T&, T&) const {}
  template <typename T>
  RNN_FN void see_new(T, T&) const {}
  // And back: what the gates' gradients add to those of the old and the new c.
  template <typename T>
  RNN_FN void seen_old(T, T, T&) const {}
  template <typename T>
  RNN_FN void seen_new(T, T&) const {}
  // The bound on c, and the gradient through it.
  template <typename T>
  RNN_FN T clip(T c) const {
    return c;
  }
  template <typename T>
  RNN_FN T clipped(T, T d) const {
    return d;
  }
};

struct Relu : Plain {
  template <typename T>
  RNN_FN T activate(T x) const {
    return relu(x);
  }
  template <typename T>
  RNN_FN T through(T y, T dy) const {
    return relu_grad(y, dy);
  }
};

// All of them, chosen at run time.
template <typename T>
struct Varied {
  static constexpr bool kVaried = true;
  static constexpr bool kNormed = false;

  Activation activation;
  bool peeps, clips;
  T peep_i, peep_f, peep_o;
  T bound;

  RNN_FN T activate(T x) const {
    switch (activation) {
      case Activation::kRelu:
        return relu(x);
      case Activation::kSigmoid:
        return sigmoid(x);
      case Activation::kIdentity:
        return x;
      default:
        return tanh_(x);
    }
  }
  RNN_FN T through(T y, T dy) const {
    switch (activation) {
      case Activation::kRelu:
        return relu_grad(y, dy);
      case Activation::kSigmoid:
        return dy * y * (T(1) - y);
      case Activation::kIdentity:
        return dy;
      default:
        return dy * (T(1) - y * y);
    }
  }
  // Without peepholes nothing is added, not even 0 times an infinite c.
  RNN_FN void see_old(T c, T& i, T& f) const {
    if (peeps) i += peep_i * c, f += peep_f * c;
  }
  RNN_FN void see_new(T c, T& o) const {
    if (peeps) o += peep_o * c;
  }
  RNN_FN void seen_old(T di, T df, T& dc) const {
    if (peeps) dc += di * peep_i + df * peep_f;
  }
  RNN_FN void seen_new(T d_o, T& dc) const {
    if (peeps) dc += d_o * peep_o;
  }
  RNN_FN T clip(T c) const { return clips ? at_most(at_least(c, -bound), bound) : c; }
  // c is the value before it was clipped; a gradient passes where that was at the bound.
  RNN_FN T clipped(T c, T d) const { return clips ? where_within(c, bound, d) : d; }
};

}  // namespace RNN_ISA
}  // namespace torchrnn
