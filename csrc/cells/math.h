// Scalar functions of the cells, for the CPU and for CUDA. cells/vec.h has the same names for SIMD values.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define RNN_FN __host__ __device__ __forceinline__
#else
#define RNN_FN inline __attribute__((always_inline))
#endif

// Every kernel translation unit names its own inner namespace, one per instruction set, so that the linker
// cannot merge two builds of one template and hand AVX-512 code to a machine without it.
#ifndef RNN_ISA
#define RNN_ISA scalar
#endif

namespace torchrnn {
inline namespace RNN_ISA {

RNN_FN float tanh_(float x) { return tanhf(x); }
RNN_FN double tanh_(double x) { return tanh(x); }
RNN_FN float sigmoid(float x) {
#ifdef __CUDA_ARCH__
  // One instruction with an error of 1 ulp. The division would branch, around each gate of a step.
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + expf(-x)));
  return y;
#else
  return 1.0f / (1.0f + expf(-x));
#endif
}
RNN_FN double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// max(x, 0) that lets NaN through.
RNN_FN float relu(float x) { return x < 0.0f ? 0.0f : x; }
RNN_FN double relu(double x) { return x < 0.0 ? 0.0 : x; }

// The smaller, the larger of x and bound; a NaN x stays one.
RNN_FN float at_most(float x, float bound) { return x > bound ? bound : x; }
RNN_FN double at_most(double x, double bound) { return x > bound ? bound : x; }
RNN_FN float at_least(float x, float bound) { return x < bound ? bound : x; }
RNN_FN double at_least(double x, double bound) { return x < bound ? bound : x; }

// d where |x| <= bound, else 0: the gradient through a clip.
RNN_FN float where_within(float x, float bound, float d) { return x <= bound && x >= -bound ? d : 0.0f; }
RNN_FN double where_within(double x, double bound, double d) { return x <= bound && x >= -bound ? d : 0.0; }

// dy where y > 0, else 0: the derivative of relu at 0 is 0.
RNN_FN float relu_grad(float y, float dy) { return y > 0.0f ? dy : 0.0f; }
RNN_FN double relu_grad(double y, double dy) { return y > 0.0 ? dy : 0.0; }

}  // namespace RNN_ISA
}  // namespace torchrnn
