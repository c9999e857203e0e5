// The half-precision numbers as kernels store them, and their conversion to float and back. Integer
// arithmetic, so that host and device round alike and no vendor header is needed.
#pragma once

#include <cstdint>
#include <cstring>

#include "cells/math.h"

namespace torchrnn {
namespace cuda {

struct Bf16 { uint16_t bits; };
struct Half { uint16_t bits; };

RNN_FN uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

RNN_FN float of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

RNN_FN float widen(float x) { return x; }
RNN_FN double widen(double x) { return x; }
RNN_FN float widen(Bf16 x) { return of_bits(uint32_t(x.bits) << 16); }

RNN_FN float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return of_bits(sign | 0x7f800000 | (magnitude << 13));  // infinity, NaN
  // The exponent is off by 112; the multiplication also makes subnormal numbers right.
  return of_bits(sign | bits_of(of_bits(magnitude << 13) * of_bits(0x77800000)));
}

// To the nearest, of two equally near ones the even. A NaN stays one.
RNN_FN void round_to(float x, float& out) { out = x; }
RNN_FN void round_to(double x, double& out) { out = x; }

RNN_FN void round_to(float x, Bf16& out) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000)
    out.bits = uint16_t(bits >> 16 | 0x40);
  else
    out.bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

RNN_FN void round_to(float x, Half& out) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // from 65520 on
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: added to 1/2, whose last place is 2^-24, it is rounded
    half = bits_of(of_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out.bits = uint16_t(sign | half);
}

}  // namespace cuda
}  // namespace torchrnn
