// Plain structs of the scan op, as params.h has those of the layers.
//
// T steps, B batch rows, U units, G gates of the cell. Everything is contiguous except wx and dy, whose last
// dimension has stride 1. A null pointer means absent unless said otherwise.
#pragma once

#include "params.h"

namespace torchrnn {

// Recurrences without a recurrent product; the values are those of torchrnn/scan.py.
enum class ScanCell : int64_t { kIndRnn = 0, kIndyGru = 1, kIndyLstm = 2, kSru = 3 };

template <typename T>
struct ScanParams {
  ScanCell cell;
  Activation activation;
  int64_t steps, batch, units;  // T, B, U
  bool reverse;                 // from each row's last step to its first

  const T* wx;  // [T, B, G*U]: the sums W x + b
  int64_t wx_stride_t, wx_stride_b;
  const T* u;              // [G*U], what h is multiplied by in each sum; null for a cell that does not read h
  const T* h0;             // [B, U]; null is zeros
  const T* c0;             // [B, U]; null is zeros
  const int64_t* lengths;  // [B], each in 0..T; null is all T
  const T* mask_h;         // [T or 1, B, U], factors on the state that is carried on; null is ones
  const T* mask_c;         // likewise
  int64_t mask_h_stride_t, mask_c_stride_t;  // 0 for a mask that all steps share

  // Outputs; in a backward call y and tape are inputs and the others null.
  T* y;     // [T, B, U], zero past a row's length
  T* h_n;   // [B, U]; null for a cell that does not carry h
  T* c_n;   // [B, U]; null for a cell without c
  T* tape;  // [T, B, U]: the c of each step, before its mask. Null in inference and for a cell without c.
};

template <typename T>
struct ScanBackwardParams {
  ScanParams<T> scan;

  const T* dy;  // [T, B, U]; null is zeros, as below
  int64_t dy_stride_t, dy_stride_b;
  const T* dh_n;  // [B, U]
  const T* dc_n;  // [B, U]

  // Results.
  T* dwx;  // [T, B, G*U], zero past a row's length
  T* du;   // [G*U]; null if not wanted
  T* dh0;  // [B, U]; null for a cell that does not carry h
  T* dc0;  // [B, U]; null for a cell without c

  T* du_rows;  // [B, G*U], memory for du by each row
};

}  // namespace torchrnn
