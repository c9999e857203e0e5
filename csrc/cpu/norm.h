// Layer normalisation inside an LSTM (Ba et al. 2016, arXiv:1607.06450): the sums of each gate and the new c
// are normalised over the hidden units. A row's cell therefore waits for all its sums; then one thread
// computes it whole.
#pragma once

#include "cells/lstm.h"
#include "cpu/tile.h"
#include "params.h"

namespace torchrnn {
inline namespace RNN_ISA {

// Marks the LSTM whose sums are normalised. All other variations are possible too.
template <typename T>
struct Normed : Varied<T> {
  static constexpr bool kNormed = true;
};

// Of a row with layer normalisation the tape holds the four normalised gate sums, the new c, the normalised c
// and the five inverse standard deviations, in this order.
constexpr int64_t kNormedC = 5;
constexpr int64_t tape_of_norm(int64_t hidden) { return hidden + 5; }

template <typename T>
struct Norm {
  using V = VecOf<T>;
  static constexpr int N = V::kSize;

  // Sum of use(k) over the values, by vectors and then what is left one by one.
  template <typename Use>
  RNN_FN static T sum(int64_t size, const Use& use) {
    V total(T(0));
    int64_t k = 0;
    for (; k + N <= size; k += N) total += use(k, [](const T* p) { return V::load(p); });
    T rest = total.sum();
    for (; k < size; ++k) rest += use(k, [](const T* p) { return *p; });
    return rest;
  }

  // out = (x - mean) / sqrt(variance + eps), both over the row; returns 1 / sqrt(...). out may be x.
  static T normalise(const T* x, int64_t size, T eps, T* out) {
    const T mean = sum(size, [&](int64_t k, auto load) { return load(x + k); }) / T(size);
    const T variance = sum(size,
                           [&](int64_t k, auto load) {
                             const auto centred = load(x + k) - decltype(load(x))(mean);
                             return centred * centred;
                           }) /
                       T(size);
    const T scale = T(1) / T(__builtin_sqrt(double(variance + eps)));
    for (int64_t k = 0; k < size; k += N)
      V::with_lanes(size - k, [&](auto m) { ((V::load(x + k, m) - V(mean)) * V(scale)).store(out + k, m); });
    return scale;
  }

  // dx from dn, the gradient by gain * normalised + shift.
  static void backward(const T* dn, const T* normalised, const T* gain, T scale, int64_t size, T* dx) {
    const T mean = sum(size, [&](int64_t k, auto load) { return load(dn + k) * load(gain + k); }) / T(size);
    const T along =
        sum(size,
            [&](int64_t k, auto load) { return load(dn + k) * load(gain + k) * load(normalised + k); }) /
        T(size);
    for (int64_t k = 0; k < size; k += N)
      V::with_lanes(size - k, [&](auto m) {
        const V d = V::load(dn + k, m) * V::load(gain + k, m);
        ((d - V(mean) - V::load(normalised + k, m) * V(along)) * V(scale)).store(dx + k, m);
      });
  }
};

// The normalised LSTM's gates at one vector of units, from their normalised sums.
template <typename T, typename Policy>
struct NormedGates {
  using V = VecOf<T>;
  V i, f, g, o_sum;

  template <typename Lanes>
  RNN_FN NormedGates(const LayerParams<T>& p, int d, const Policy& policy, const T* sums, V c_prev,
                     int64_t unit, Lanes m) {
    const auto sum = [&](int gate) {
      const int64_t at = gate * p.hidden + unit;
      return V::load(sums + at, m) * V::load(p.weights[d].norm_gain + at, m) +
             V::load(p.weights[d].norm_shift + at, m);
    };
    V sum_i = sum(0), sum_f = sum(1);
    policy.see_old(c_prev, sum_i, sum_f);
    i = sigmoid(sum_i), f = sigmoid(sum_f), g = policy.activate(sum(2)), o_sum = sum(3);
  }
};

}  // namespace RNN_ISA
}  // namespace torchrnn
