// Vec<T, N>: N values of T in a SIMD register, by the vector extension of GCC and Clang. Host only.
//
// The functions are written out instead of left to the autovectoriser, which takes the GRU but not the LSTM.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cells/math.h"

namespace torchrnn {
inline namespace RNN_ISA {

// Out of line: inlined, the copy of an unknown size would crowd the loop that never takes it.
__attribute__((noinline, cold)) inline void copy_part(void* to, const void* from, size_t bytes) {
  memcpy(to, from, bytes);
}

// In place of a number of lanes: all of them, known when compiling. Loops over rows have their own code for
// it, since with a second case behind every load and store GCC keeps the values in memory.
struct AllLanes {};

template <typename T>
struct VecConstants;

// kRound is 1.5 * 2^(mantissa bits): adding it rounds to an integer, whose value is then in the low bits.
template <>
struct VecConstants<float> {
  using Int = int32_t;
  static constexpr float kRound = 12582912.0f, kLog2e = 1.44269504f, kLn2Hi = 0.693359375f,
                         kLn2Lo = -2.12194440e-4f;
  static constexpr int kMantissa = 23;
  static constexpr Int kOne = 0x3f800000, kSign = Int(0x80000000);
  // Beyond these, sigmoid and tanh are 0 or 1 to working precision, and 2^n is still finite.
  static constexpr float kSigmoidMax = 87.0f, kTanhMax = 20.0f;
  static constexpr int kDegree = 7;  // (ln 2 / 2)^8 / 8! <= 5.2e-9: below a tenth of an ulp.
};

template <>
struct VecConstants<double> {
  using Int = int64_t;
  static constexpr double kRound = 6755399441055744.0, kLog2e = 1.4426950408889634074,
                          kLn2Hi = 0.693147180369123816490, kLn2Lo = 1.90821492927058770002e-10;
  static constexpr int kMantissa = 52;
  static constexpr Int kOne = 0x3ff0000000000000, kSign = Int(0x8000000000000000);
  static constexpr double kSigmoidMax = 700.0, kTanhMax = 44.0;
  static constexpr int kDegree = 13;  // (ln 2 / 2)^14 / 14! <= 4.1e-18.
};

template <typename T, int N>
struct Vec {
  using Element = T;
  using Int = typename VecConstants<T>::Int;
  static constexpr int kSize = N;
  typedef T Raw __attribute__((vector_size(N * sizeof(T))));
  typedef T Unaligned __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
  typedef Int IntRaw __attribute__((vector_size(N * sizeof(T))));

  Raw v;

  RNN_FN Vec() {}
  RNN_FN Vec(T x) : v(Raw{} + x) {}
  // Not a constructor: GCC takes the vector type for T itself while the template is not instantiated.
  RNN_FN static Vec of(Raw raw) {
    Vec vec;
    vec.v = raw;
    return vec;
  }

  RNN_FN static Vec load(const T* p) { return of(*reinterpret_cast<const Unaligned*>(p)); }

  // *p in all lanes. GCC makes a scalar load and a shuffle of it, which takes a slot from the multiply-adds;
  // the instruction that loads and broadcasts does not.
  RNN_FN static Vec broadcast(const T* p) {
#ifdef __x86_64__
    if constexpr (N * sizeof(T) >= 32) {
      Raw raw;
      if constexpr (sizeof(T) == sizeof(float))
        asm("vbroadcastss %1, %0" : "=v"(raw) : "m"(*p));
      else
        asm("vbroadcastsd %1, %0" : "=v"(raw) : "m"(*p));
      return of(raw);
    }
#endif
    return Vec(*p);
  }

  RNN_FN void store(T* p) const { *reinterpret_cast<Unaligned*>(p) = v; }

  RNN_FN static Vec load(const T* p, AllLanes) { return load(p); }
  RNN_FN void store(T* p, AllLanes) const { store(p); }

  // Calls use with the number of lanes that are among the next n values: AllLanes if n >= N.
  template <typename Use>
  RNN_FN static void with_lanes(int64_t n, const Use& use) {
    if (n >= N)
      use(AllLanes());
    else if (n > 0)
      use(n);
  }

  // The first n values in units of 4 bytes, as the mask of AVX-512's moves.
  RNN_FN static uint16_t mask(int64_t n) { return uint16_t((1u << (n * (sizeof(T) / 4))) - 1); }

  // The first n values only, 0 <= n <= N; the rest reads as 0 and is not written.
  RNN_FN static Vec load(const T* p, int64_t n) {
    if (__builtin_expect(n == N, 1)) return load(p);
#ifdef __x86_64__
    if constexpr (N * sizeof(T) == 64) {
      Raw masked;
      asm("vmovups %1, %0%{%2%}%{z%}"
          : "=v"(masked)
          : "m"(*reinterpret_cast<const Unaligned*>(p)), "Yk"(mask(n)));
      return of(masked);
    }
#endif
    Raw raw{};
    copy_part(&raw, p, n * sizeof(T));
    return of(raw);
  }
  RNN_FN void store(T* p, int64_t n) const {
    if (__builtin_expect(n == N, 1)) return store(p);
#ifdef __x86_64__
    if constexpr (N * sizeof(T) == 64) {
      asm("vmovups %1, %0%{%2%}" : "+m"(*reinterpret_cast<Unaligned*>(p)) : "v"(v), "Yk"(mask(n)));
      return;
    }
#endif
    const Raw raw = v;
    copy_part(p, &raw, n * sizeof(T));
  }

  RNN_FN friend Vec operator+(Vec a, Vec b) { return of(a.v + b.v); }
  RNN_FN friend Vec operator-(Vec a, Vec b) { return of(a.v - b.v); }
  RNN_FN friend Vec operator*(Vec a, Vec b) { return of(a.v * b.v); }
  RNN_FN friend Vec operator/(Vec a, Vec b) { return of(a.v / b.v); }
  RNN_FN friend Vec operator-(Vec a) { return of(-a.v); }
  RNN_FN Vec& operator+=(Vec b) {
    v += b.v;
    return *this;
  }

  // By halves: a chain of N additions would be what a short dot product waits for.
  RNN_FN T sum() const {
    if constexpr (N == 1) {
      return v[0];
    } else {
      Vec<T, N / 2> low, high;
      memcpy(&low.v, &v, sizeof low.v);
      memcpy(&high.v, reinterpret_cast<const char*>(&v) + sizeof low.v, sizeof high.v);
      return (low + high).sum();
    }
  }
};

// The same vector, which the compiler is not to read from memory again for each use.
template <typename T, int N>
RNN_FN Vec<T, N> in_register(Vec<T, N> x) {
#ifdef __x86_64__
  if constexpr (N * sizeof(T) >= 16) asm("" : "+v"(x.v));
#endif
  return x;
}

// Swaps the lanes with the bit `half` of the low vector with those without it of the high one.
template <int half, typename T, int N, size_t... lane>
RNN_FN void swap_halves(Vec<T, N>& low, Vec<T, N>& high, std::index_sequence<lane...>) {
  const auto a = low.v, b = high.v;
  low.v = __builtin_shufflevector(a, b, ((lane & half) != 0 ? N + lane - half : lane)...);
  high.v = __builtin_shufflevector(a, b, ((lane & half) != 0 ? N + lane : lane + half)...);
}

// block[i][j] = block[j][i]: each round exchanges one bit of the two indices.
template <int half = 1, typename T, int N>
RNN_FN void transpose(Vec<T, N> (&block)[N]) {
  if constexpr (half < N) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      if ((i & half) == 0) swap_halves<half>(block[i], block[i + half], std::make_index_sequence<N>());
    transpose<2 * half>(block);
  }
}

// The smaller, the larger of x and bound; a NaN x stays one. GCC makes two instructions of the comparison.
template <typename T, int N>
RNN_FN Vec<T, N> at_most(Vec<T, N> x, Vec<T, N> bound) {
#ifdef __x86_64__
  if constexpr (sizeof(T) == sizeof(float) && N * sizeof(T) >= 32) {
    asm("vminps %1, %2, %0" : "=v"(x.v) : "v"(x.v), "v"(bound.v));
    return x;
  }
#endif
  x.v = x.v > bound.v ? bound.v : x.v;
  return x;
}

template <typename T, int N>
RNN_FN Vec<T, N> at_least(Vec<T, N> x, Vec<T, N> bound) {
#ifdef __x86_64__
  if constexpr (sizeof(T) == sizeof(float) && N * sizeof(T) >= 32) {
    asm("vmaxps %1, %2, %0" : "=v"(x.v) : "v"(x.v), "v"(bound.v));
    return x;
  }
#endif
  x.v = x.v < bound.v ? bound.v : x.v;
  return x;
}

// exp(y) = scale + scale * p with scale = 2^n, n = round(y / ln 2), and p = exp(r) - 1 by its Taylor series
// in r = y - n ln 2: kept apart so that exp(y) - 1 loses nothing. ln 2 in two parts makes r exact to working
// precision, with fused multiply-adds and without.
template <typename T, int N>
RNN_FN void exp_parts(Vec<T, N> y, Vec<T, N>& scale, Vec<T, N>& p) {
  using K = VecConstants<T>;
  using V = Vec<T, N>;
  const V rounded = y * V(K::kLog2e) + V(K::kRound);
  const V n = rounded - V(K::kRound);
  const V r = (y - n * V(K::kLn2Hi)) - n * V(K::kLn2Lo);
  typename V::IntRaw bits;
  memcpy(&bits, &rounded.v, sizeof bits);
  bits = (bits << K::kMantissa) + K::kOne;
  memcpy(&scale.v, &bits, sizeof bits);
  T factorial = 1;
  for (int i = 2; i <= K::kDegree; ++i) factorial *= T(i);
  V q(T(1) / factorial);
#pragma GCC unroll 16
  for (int i = K::kDegree; i > 1; --i) {
    factorial /= T(i);
    q = q * r + V(T(1) / factorial);
  }
  p = r * q;
}

template <typename T, int N>
RNN_FN Vec<T, N> sigmoid(Vec<T, N> x) {
  using V = Vec<T, N>;
  const V most(VecConstants<T>::kSigmoidMax);
  V scale, p;
  exp_parts(-at_least(at_most(x, most), -most), scale, p);
  const V one(T(1));
  return one / ((one + scale) + scale * p);
}

// tanh |x| is m / (m + 2) with m = e^2|x| - 1, which keeps all digits of the smallest x; from 1/2 on it is
// computed as 1 - 2 / (m + 2), which is exact to half an ulp near 1, where gradients multiply by 1 - tanh^2.
template <typename T, int N>
RNN_FN Vec<T, N> tanh_(Vec<T, N> x) {
  using V = Vec<T, N>;
  using K = VecConstants<T>;
  const typename V::Raw zero{};
  const V one(T(1)), two(T(2));
  typename V::IntRaw bits, sign;
  memcpy(&bits, &x.v, sizeof bits);
  sign = bits & K::kSign;
  bits ^= sign;
  V magnitude, scale, p;
  memcpy(&magnitude.v, &bits, sizeof bits);
  magnitude = at_most(magnitude, V(K::kTanhMax));
  exp_parts(magnitude + magnitude, scale, p);
  const V minus1 = (scale - one) + scale * p;
  const auto small = magnitude.v < V(T(0.5)).v;
  V numerator, offset;
  numerator.v = small ? minus1.v : -two.v;
  offset.v = small ? zero : one.v;
  V result = numerator / (minus1 + two) + offset;
  memcpy(&bits, &result.v, sizeof bits);
  bits |= sign;
  memcpy(&result.v, &bits, sizeof bits);
  return result;
}

template <typename T, int N>
RNN_FN Vec<T, N> relu(Vec<T, N> x) {
  const typename Vec<T, N>::Raw zero{};
  x.v = x.v < zero ? zero : x.v;
  return x;
}

template <typename T, int N>
RNN_FN Vec<T, N> where_within(Vec<T, N> x, Vec<T, N> bound, Vec<T, N> d) {
  const typename Vec<T, N>::Raw zero{};
  d.v = x.v <= bound.v ? d.v : zero;
  d.v = x.v >= -bound.v ? d.v : zero;
  return d;
}

template <typename T, int N>
RNN_FN Vec<T, N> relu_grad(Vec<T, N> y, Vec<T, N> dy) {
  const typename Vec<T, N>::Raw zero{};
  dy.v = y.v > zero ? dy.v : zero;
  return dy;
}

}  // namespace RNN_ISA
}  // namespace torchrnn
