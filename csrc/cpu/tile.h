// Register tiles: the products that everything on the CPU is made of.
//
// A panel holds C vectors of N columns of a matrix, packed as [K][C][N]; a tile is R rows times one panel,
// summed in R*C registers. Rows of the left side are given by pointers, so that they may lie anywhere. The
// order of every sum follows from the sizes alone, so results repeat to the bit.
#pragma once

#include "cells/vec.h"

namespace torchrnn {
inline namespace RNN_ISA {

constexpr int kRegisters = RNN_REGISTERS;
template <typename T>
constexpr int kLanes = RNN_VECTOR_BYTES / sizeof(T);
template <typename T>
using VecOf = Vec<T, kLanes<T>>;

// Rows of a tile of C vectors: as many sums as hide the latency of the multiply-adds and leave registers for
// C weights and a broadcast value (or, with 16 registers and C = 4, for R broadcast values and a weight).
constexpr int tile_rows(int C) { return (kRegisters >= 32 ? 24 : 12) / C; }

// A panel is walked in blocks of this many k: while the tiles pass over one block (16 KB for C = 4), the next
// one is fetched into L1 beside it, so that it may come from L2 or L3. A single tile has nothing to hide the
// fetching behind and takes longer blocks. Blocks are summed apart and then added, which rounds less than one
// long sum does.
constexpr int64_t kDepthBlock = 64, kDepthBlockOfOneTile = 512;

RNN_FN int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
RNN_FN int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
RNN_FN int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// acc[r][c] (+)= sum over k of rows[r][(k0 + k) * kStep] * w[k * w_stride + c*N ...]. Fetches kFetch cache
// lines per k from `next` on into L1. kStep is a constant because with it the rows share one index register:
// the additions to one register per row would take slots from the multiply-adds.
template <typename T, int R, int C, int kStep, int kFetch>
__attribute__((noinline)) void fma_tile(const T* const* rows, int64_t k0, const T* w, int64_t w_stride,
                                        int64_t depth, T* acc, int64_t acc_stride, bool accumulate,
                                        const char* next) {
  using V = VecOf<T>;
  constexpr int N = V::kSize;
  V sum[R][C];
  const T* a[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    a[r] = rows[r] + k0 * kStep;
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sum[r][c] = V(T(0));
  }
  int64_t k = 0;
  // Few sums leave the multiply-add units waiting for each other: two of each then, one for every other k.
  if constexpr (R * C < 8) {
    V odd[R][C];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) odd[r][c] = V(T(0));
    for (; k + 2 <= depth; k += 2) {
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        const V w0 = V::load(w + c * N), w1 = V::load(w + w_stride + c * N);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          sum[r][c] += V::broadcast(a[r] + k * kStep) * w0;
          odd[r][c] += V::broadcast(a[r] + (k + 1) * kStep) * w1;
        }
      }
      w += 2 * w_stride;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[r][c] += odd[r][c];
  }
  for (; k < depth; ++k) {
#pragma GCC unroll 16
    for (int i = 0; i < kFetch; ++i) __builtin_prefetch(next + i * 64);
    if constexpr (kFetch > 0) next += kFetch * 64;
    if constexpr (R * C + C + 1 <= kRegisters) {
      V right[C];
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) right[c] = V::load(w + c * N);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const V left = V::broadcast(a[r] + k * kStep);
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) sum[r][c] += left * right[c];
      }
    } else {
      V left[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) left[r] = V::broadcast(a[r] + k * kStep);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        const V right = V::load(w + c * N);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[r][c] += left[r] * right;
      }
    }
    w += w_stride;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      T* out = acc + r * acc_stride + c * N;
      if (accumulate) sum[r][c] += V::load(out);
      sum[r][c].store(out);
    }
}

// fma_tile for a number of rows known at run time, 1 <= rows <= tile_rows(C).
template <typename T, int C, int kStep = 1, int kFetch = 0, int R = tile_rows(C)>
RNN_FN void fma_tile_rows(int64_t count, const T* const* rows, int64_t k0, const T* w, int64_t w_stride,
                          int64_t depth, T* acc, int64_t acc_stride, bool accumulate,
                          const char* next = nullptr) {
  if constexpr (R > 1)
    if (count < R)
      return fma_tile_rows<T, C, kStep, kFetch, R - 1>(count, rows, k0, w, w_stride, depth, acc, acc_stride,
                                                       accumulate, next);
  fma_tile<T, R, C, kStep, kFetch>(rows, k0, w, w_stride, depth, acc, acc_stride, accumulate, next);
}

// acc[count][C*N] (+)= rows times a panel, in tiles of about equal height, blocked over k. `next` is the
// panel that will be read after this one.
template <typename T, int C>
void panel_product(int64_t count, const T* const* rows, const T* panel, int64_t depth, T* acc,
                   bool accumulate, const T* next) {
  constexpr int64_t kWidth = C * kLanes<T>;
  const int64_t tiles = ceil_div(count, tile_rows(C)), height = count / tiles, higher = count % tiles;
  const int64_t block = tiles == 1 ? kDepthBlockOfOneTile : kDepthBlock;
  // A block has C lines per k (fewer with shorter vectors), which the first tiles fetch among them.
  const int64_t fetching = tiles == 1 ? 0 : tiles >= C ? C : (C + 1) / 2;
  for (int64_t k0 = 0; k0 < depth || k0 == 0; k0 += block) {
    const int64_t k = min64(block, depth - k0);
    const T* w = panel + k0 * kWidth;
    const bool add = accumulate || k0 > 0;
    const char* fetch = reinterpret_cast<const char*>(k0 + k < depth ? w + k * kWidth : next);
    const T* const* left = rows;
    T* out = acc;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t r = height + (tile < higher);
      if (tile >= fetching) {
        fma_tile_rows<T, C>(r, left, k0, w, kWidth, k, out, kWidth, add);
      } else if (tiles >= C) {
        fma_tile_rows<T, C, 1, 1>(r, left, k0, w, kWidth, k, out, kWidth, add, fetch);
        fetch += k * 64;
      } else {
        fma_tile_rows<T, C, 1, 2>(r, left, k0, w, kWidth, k, out, kWidth, add, fetch);
        fetch += k * 128;
      }
      left += r, out += r * kWidth;
    }
  }
}

// dst[k][n] = columns[n][k]: packs weights whose rows are the columns of a panel, in square blocks of a
// vector of vectors. width is a multiple of the vector.
template <typename T>
void pack_transposed(const T* const* columns, int64_t width, int64_t depth, T* dst) {
  using V = VecOf<T>;
  constexpr int N = V::kSize;
  for (int64_t n = 0; n < width; n += N)
    for (int64_t k = 0; k < depth; k += N) {
      const int64_t m = min64(N, depth - k);
      V block[N];
      for (int i = 0; i < N; ++i) block[i] = V::load(columns[n + i] + k, m);
      transpose(block);
      for (int64_t i = 0; i < m; ++i) block[i].store(dst + (k + i) * width + n);
    }
}

// acc[r][n] = rows[r] . columns[n] without packing, for so few rows that packing would cost more than it
// saves. Columns that are `zeros` are padding; if the first of kColumns is, so are the others.
template <typename T, int R, int kColumns>
__attribute__((noinline)) void dot_tile(const T* const* rows, const T* const* columns, const T* zeros,
                                        int64_t width, int64_t depth, T* acc) {
  using V = VecOf<T>;
  constexpr int N = V::kSize;
  for (int64_t n = 0; n < width; n += kColumns) {
    if (columns[n] == zeros) {
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < kColumns; ++c) acc[r * width + n + c] = T(0);
      continue;
    }
    V sum[R][kColumns];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) sum[r][c] = V(T(0));
    for (int64_t k = 0; k < depth; k += N) {
      const int64_t m = min64(N, depth - k);
      V left[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) left[r] = V::load(rows[r] + k, m);
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) {
        const V right = V::load(columns[n + c] + k, m);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[r][c] += left[r] * right;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kColumns; ++c) acc[r * width + n + c] = sum[r][c].sum();
  }
}

// One matrix whose rows are gates: [G*H, K] in the order of torch, read as panels of U vectors of units, all
// G gates of a unit in one panel, so that a tile holds all that a unit's cell needs.
template <typename T, int G, int U>
struct GateMatrix {
  static constexpr int kLanesPerVector = kLanes<T>;
  static constexpr int kUnits = U * kLanesPerVector;      // units per panel
  static constexpr int kWidth = G * U * kLanesPerVector;  // columns per panel: [U][G][lane]

  const T* weight;  // [G*H, K]
  int64_t hidden, depth;
  const T* zeros;  // [K]
  T* packed;       // panels() * K * kWidth values, or null to multiply without packing

  int64_t panels() const { return ceil_div(hidden, kUnits); }
  int64_t packed_size() const { return panels() * depth * kWidth; }

  void columns(int64_t j, const T** out) const {
    for (int u = 0; u < U; ++u)
      for (int g = 0; g < G; ++g)
        for (int lane = 0; lane < kLanesPerVector; ++lane) {
          const int64_t unit = j * kUnits + u * kLanesPerVector + lane;
          *out++ = unit < hidden ? weight + (g * hidden + unit) * depth : zeros;
        }
  }

  void pack(int64_t begin, int64_t end) const {
    if (packed == nullptr) return;
    const T* column[kWidth];
    for (int64_t j = begin; j < end; ++j) {
      columns(j, column);
      pack_transposed(column, kWidth, depth, packed + j * depth * kWidth);
    }
  }

  // acc[count][kWidth] = rows times panel j; the next call is for panel `next`. Packed, it can also add.
  void product(int64_t j, int64_t next, int64_t count, const T* const* rows, T* acc,
               bool accumulate = false) const {
    if (packed != nullptr)
      return panel_product<T, G * U>(count, rows, packed + j * depth * kWidth, depth, acc, accumulate,
                                     packed + next * depth * kWidth);
    const T* column[kWidth];
    columns(j, column);
    int64_t r = 0;
    constexpr int kColumns = kWidth % 4 == 0 ? 4 : 2;
    for (; r + 4 <= count; r += 4)
      dot_tile<T, 4, kColumns>(rows + r, column, zeros, kWidth, depth, acc + r * kWidth);
    for (; r < count; ++r) dot_tile<T, 1, kColumns>(rows + r, column, zeros, kWidth, depth, acc + r * kWidth);
  }
};

}  // namespace RNN_ISA
}  // namespace torchrnn
