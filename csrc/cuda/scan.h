// Plain structs and functions between csrc/cuda/ops.cpp, which knows torch, and the CUDA kernels, which know
// pointers. No torch and no CUDA headers here: host compilers read it too.
//
// A layer on CUDA is three stages: one matrix product over all steps for the inputs, the scan over time, and
// in the backward pass the matrix products for the gradients by inputs and weights. What stands here is the
// scan. There are two ways to run it, with the same inputs and results: a matrix product and one kernel per
// step (step.cu: every cell, variation, dtype and size), and one kernel for all steps (cluster_*.cu).
//
// T steps, B batch rows, D directions, H hidden units, G gates of the cell, P projected outputs, R = P if
// there is a projection, else H. io is the dtype of the caller's tensors; Acc is float, or double where io is
// float64. Everything is contiguous unless said otherwise. A null pointer means absent.
#pragma once

#include <cstdint>

#include "params.h"

namespace torchrnn {
namespace cuda {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2, kFloat16 = 3 };

// Matrix products on the caller's stream, row-major: c[m, n] = op(a) op(b), plus c if `accumulates`. a is
// [m, k] or, transposed, [k, m]; b is [k, n] or, transposed, [n, k]; ld* are the distances of rows. The sum
// has the precision of Acc; c is of dtype `out`.
struct Blas {
  void* context;
  void (*gemm)(void* context, Dtype in, Dtype out, bool transposed_a, bool transposed_b, int64_t m, int64_t n,
               int64_t k, const void* a, int64_t lda, const void* b, int64_t ldb, bool accumulates, void* c,
               int64_t ldc);
};

// One direction's arrays.
template <typename Acc>
struct DirectionForward {
  const void* weight_hh;  // [G*H, R], io
  const void* weight_hr;  // [P, H], io
  const Acc* bias;        // [G*H], what is added to wx: b_ih, and b_hh where it does not meet a reset gate
  const Acc* bias_h;      // [H], kGru only: b_hn, which is added to the recurrent sum
  const Acc* peephole;    // [3, H]
  const Acc* norm_gain;   // [G+1, H]
  const Acc* norm_shift;  // [G+1, H]
  const Acc* wx;          // [T, B, G*H]: W x, without bias. Never read past a row's length.
};

template <typename Acc>
struct ForwardScan {
  Cell cell;
  Activation activation;
  Dtype dtype;
  int64_t steps, batch, hidden, outputs, directions;  // T, B, H, R, D
  bool reverse;                                       // direction 0 runs backwards; direction 1 always does
  bool projected;                                     // weight_hr is there
  bool tf32;                                          // products of float32 may be rounded to TF32
  Acc cell_clip, proj_clip;                           // infinity is no bound
  Acc norm_eps;

  DirectionForward<Acc> direction[kMaxDirections];
  const Acc* h0;                       // [D, B, R]; null is zeros
  const Acc* c0;                       // [D, B, H]; null is zeros
  const int64_t* lengths;              // [B], each in 0..T; null is all T
  const bool* resets;                  // [T, B]: no state crosses from step t-1 to t
  const Acc* mask_h;                   // [D, mask_h_steps, B, R]
  const Acc* mask_c;                   // [D, mask_c_steps, B, H]
  int64_t mask_h_steps, mask_c_steps;  // T, or 1 for a mask that all steps share

  // Outputs.
  void* y;      // [T, B, D*R], io, zero past a row's length
  void* c_all;  // [T, B, D*H], io, likewise; null if not wanted
  Acc* h_n;     // [D, B, R]
  Acc* c_n;     // [D, B, H]; null for a cell without c
  // [D, T, B, S]: kTape*H values as the cell has them, then H + 5 with layer normalisation (the normalised c
  // and the five scales) and R with proj_clip (the projection before it is clipped). What is past a row's
  // length is never read. Null in inference.
  Acc* tape;
  int64_t tape_size;  // S
};

template <typename Acc>
struct DirectionBackward {
  const void* weight_hh;  // as in forward
  const void* weight_hr;
  const Acc* peephole;
  const Acc* norm_gain;
  const Acc* norm_shift;
  // Results for the products after the scan, all zero past a row's length.
  void* dgates_x;    // [T, B, G*H], io: gradients by W x
  void* dgates_h;    // [T, B, G*H], io: gradients by R h. For kGru only; else null, they are the same
  void* h_prev;      // [T, B, R], io: the h that each step's recurrent product read, zero where it was cut
  void* aside;       // [T, B, H], io: kGruResetBefore: r * h; projected: h before the projection; else null
  void* dprojected;  // [T, B, R], io: gradients by the projected output, before the clip; else null
  Acc* dpeephole;    // [3, H]; null if not wanted
  Acc* dnorm_gain;   // [G+1, H]
  Acc* dnorm_shift;  // [G+1, H]
};

template <typename Acc>
struct BackwardScan {
  ForwardScan<Acc> forward;  // y, tape and the inputs but wx are inputs here; wx, bias and the states null

  DirectionBackward<Acc> direction[kMaxDirections];
  const void* dy;  // [T, B, D*R], io; null is zeros, as below
  int64_t dy_stride_t, dy_stride_b;
  const void* dc_all;  // [T, B, D*H], io
  const Acc* dh_n;     // [D, B, R]
  const Acc* dc_n;     // [D, B, H]

  Acc* dh0;  // [D, B, R], always written
  Acc* dc0;  // [D, B, H]; null for a cell without c
};

// The step path. `workspace` is device memory of at least step_workspace bytes. Returns a CUDA error code.
template <typename Acc>
int64_t step_workspace(const ForwardScan<Acc>& p);
template <typename Acc>
int64_t step_workspace(const BackwardScan<Acc>& p);
template <typename Acc>
int step_forward(const ForwardScan<Acc>& p, const Blas& blas, void* workspace, void* stream);
template <typename Acc>
int step_backward(const BackwardScan<Acc>& p, const Blas& blas, void* workspace, void* stream);

// The cluster path (sm_90 and later): LSTM and GRU without variations but lengths and resets; bfloat16 and
// float16 with H up to 512, and float32 as TF32 up to 256. cluster_why_not returns null, or in a few words
// why a call is not served; *_fits whether a device has room for the kernels that would serve it.
const char* cluster_why_not(const ForwardScan<float>& p, int device, int capability);
bool cluster_forward_fits(const ForwardScan<float>& p, int device);
bool cluster_backward_fits(const ForwardScan<float>& p, int device);
int cluster_forward(const ForwardScan<float>& p, void* stream);
int cluster_backward(const BackwardScan<float>& p, void* stream);

}  // namespace cuda
}  // namespace torchrnn
