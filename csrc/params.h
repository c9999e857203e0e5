// Plain structs between the ops files, which know torch, and the kernels, which know pointers. CPU and CUDA.
//
// T steps, B batch rows, D directions, I inputs, H hidden units, G gates of the cell, P projected outputs,
// R = P if there is a projection, else H. Strides are in elements; the last dimension of every array has
// stride 1. A null pointer means absent unless said otherwise.
#pragma once

#include <cstdint>

namespace torchrnn {

// The values are those of torchrnn/options.py.
enum class Cell : int64_t { kLstm = 0, kGru = 1, kGruResetBefore = 2, kRnn = 3, kLstmCoupled = 4 };
enum class Activation : int64_t { kTanh = 0, kRelu = 1, kSigmoid = 2, kIdentity = 3 };

constexpr int kMaxDirections = 2;

// Weights of one direction, or the gradients by them.
template <typename T>
struct DirectionWeights {
  T* weight_ih;   // [G*H, I]
  T* weight_hh;   // [G*H, R]
  T* bias_ih;     // [G*H]
  T* bias_hh;     // [G*H]
  T* weight_hr;   // [P, H]
  T* peephole;    // [3, H]; of kLstmCoupled the first row is not used
  T* norm_gain;   // [G+1, H]
  T* norm_shift;  // [G+1, H]
};

template <typename T>
struct LayerParams {
  Cell cell;
  Activation activation;
  int64_t steps, batch, inputs, hidden, outputs, directions;  // T, B, I, H, R, D
  bool reverse;    // direction 0 runs backwards; direction 1 always does
  bool projected;  // weight_hr is there

  const T* x;  // [T, B, I]
  int64_t x_stride_t, x_stride_b;
  DirectionWeights<const T> weights[kMaxDirections];
  const T* packed;         // all directions' weights as Kernels::pack lays them out, or null; then no others
  const T* h0;             // [D, B, R], contiguous; null is zeros
  const T* c0;             // [D, B, H], contiguous; null is zeros
  const int64_t* lengths;  // [B], each in 0..T; null is all T
  const bool* resets;      // [T, B], contiguous: no state crosses from step t-1 to t

  const T* mask_h;         // [D, mask_h_steps, B, R], contiguous: factor on the h that is carried on; or null
  const T* mask_c;         // [D, mask_c_steps, B, H], contiguous: likewise
  int64_t mask_h_steps;    // T, or 1 for a mask that all steps share
  int64_t mask_c_steps;    // likewise
  T cell_clip, proj_clip;  // infinity is no bound
  T norm_eps;

  // Outputs, contiguous; in a backward call y is an input, null for a cell whose tape holds h.
  T* y;      // [T, B, D*R], zero past a row's length
  T* c_all;  // [T, B, D*H], likewise; null if not wanted
  T* h_n;    // [D, B, R]
  T* c_n;    // [D, B, H]; null for a cell without c

  // [D, T, B, kTape*H], H + 5 more with layer normalisation and R more with proj_clip: what backward needs,
  // the last part being the projection before it is clipped. Zero past a row's length. Null in inference.
  T* tape;
};

template <typename T>
struct BackwardParams {
  LayerParams<T> layer;

  const T* dy;  // [T, B, D*R]; null is zeros, as below
  int64_t dy_stride_t, dy_stride_b;
  const T* dc_all;  // [T, B, D*H], contiguous
  const T* dh_n;    // [D, B, R], contiguous
  const T* dc_n;    // [D, B, H], contiguous

  // Results, contiguous; null if not wanted.
  T* dx;   // [T, B, I]
  T* dh0;  // [D, B, R]
  T* dc0;  // [D, B, H]
  DirectionWeights<T> dweights[kMaxDirections];
  bool needs_weights;  // whether dweights are wanted: an array of no numbers is a null pointer too
};

}  // namespace torchrnn
