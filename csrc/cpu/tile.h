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

// Sums over lanes, of several vectors at a time: two of them become one, whose lanes hold neighbours' sums of
// the one and of the other, and so on. That takes three instructions a vector, one by one nine.
template <int half, typename T, int N, size_t... lane>
RNN_FN Vec<T, N> neighbour_sums(Vec<T, N> a, Vec<T, N> b, std::index_sequence<lane...>) {
  // Written so that the first shuffle is a blend.
  const auto here = __builtin_shufflevector(a.v, b.v, ((lane & half) != 0 ? N + lane : lane)...);
  const auto there =
      __builtin_shufflevector(a.v, b.v, ((lane & half) != 0 ? N + lane - half : lane + half)...);
  return Vec<T, N>::of(here + there);
}

// Lane l holds a part of the sum over v[l % M]; M is a power of two.
template <int M, typename T, int N>
RNN_FN Vec<T, N> partial_sums(const Vec<T, N>* v) {
  if constexpr (M == 1)
    return *v;
  else
    return neighbour_sums<M / 2>(partial_sums<M / 2>(v), partial_sums<M / 2>(v + M / 2),
                                 std::make_index_sequence<N>());
}

template <int M, typename T, int N>
RNN_FN Vec<T, N> whole_sums(Vec<T, N> x) {
  if constexpr (M < N)
    return whole_sums<2 * M>(neighbour_sums<M>(x, x, std::make_index_sequence<N>()));
  else
    return x;
}

// The largest power of two that is at most n.
constexpr int power_of_two_below(int n) { return n < 2 ? 1 : 2 * power_of_two_below(n / 2); }

// out[i] = the sum over the lanes of v[i], for M of them.
template <int M, typename T, int N>
RNN_FN void lane_sums(const Vec<T, N>* v, T* out) {
  constexpr int kAtOnce = power_of_two_below(M < N ? M : N);
  alignas(64) T sums[N];
  whole_sums<kAtOnce>(partial_sums<kAtOnce>(v)).store(sums);
  memcpy(out, sums, kAtOnce * sizeof(T));
  if constexpr (M > kAtOnce) lane_sums<M - kAtOnce>(v + kAtOnce, out + kAtOnce);
}

// Rows of a tile of dot products with 4 columns: as many sums as leave registers for what they are summed
// from.
constexpr int kDotRows = kRegisters >= 32 ? 4 : 3;

// acc[r][c] (+)= rows[r] . w[c], of a matrix [C, depth] as it lies: for so few rows that packing it would
// cost more than it saves.
template <typename T, int R, int C>
__attribute__((noinline)) void dot_tile(const T* const* rows, const T* w, int64_t depth, T* acc,
                                        int64_t acc_stride, bool accumulate) {
  using V = VecOf<T>;
  constexpr int N = V::kSize;
  V sum[R * C];
#pragma GCC unroll 32
  for (int i = 0; i < R * C; ++i) sum[i] = V(T(0));
  const auto add = [&](int64_t k, auto m) __attribute__((always_inline)) {
    V left[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) left[r] = in_register(V::load(rows[r] + k, m));
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const V right = in_register(V::load(w + c * depth + k, m));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r * C + c] += left[r] * right;
    }
  };
  int64_t k = 0;
  for (; k + N <= depth; k += N) add(k, AllLanes());
  if (k < depth) add(k, depth - k);
  T out[R * C];
  lane_sums<R * C>(sum, out);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      T* to = acc + r * acc_stride + c;
      *to = accumulate ? *to + out[r * C + c] : out[r * C + c];
    }
}

template <typename T, int C, int R = kDotRows>
RNN_FN void dot_tile_rows(int64_t count, const T* const* rows, const T* w, int64_t depth, T* acc,
                          int64_t acc_stride, bool accumulate) {
  if constexpr (R > 1)
    if (count < R) return dot_tile_rows<T, C, R - 1>(count, rows, w, depth, acc, acc_stride, accumulate);
  dot_tile<T, R, C>(rows, w, depth, acc, acc_stride, accumulate);
}

// The same for any numbers of rows and columns. All rows pass by a few columns, which stay in L1.
template <typename T, int C = 4>
void dot_product(int64_t count, const T* const* rows, const T* w, int64_t columns, int64_t depth, T* acc,
                 int64_t acc_stride, bool accumulate) {
  if constexpr (C == 4 && kRegisters >= 32)
    if (count <= 2) return dot_product<T, 8>(count, rows, w, columns, depth, acc, acc_stride, accumulate);
  constexpr int kRows = C == 8 ? 2 : kDotRows;
  const int64_t tiles = ceil_div(count, kRows), height = count / tiles, higher = count % tiles;
  int64_t c = 0;
  const auto pass = [&](auto tile) {
    int64_t r = 0;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t part = height + (i < higher);
      tile(part, rows + r, w + c * depth, acc + r * acc_stride + c);
      r += part;
    }
  };
  for (; c + C <= columns; c += C)
    pass([&](int64_t part, const T* const* left, const T* right, T* out) {
      dot_tile_rows<T, C, kRows>(part, left, right, depth, out, acc_stride, accumulate);
    });
  for (; c < columns; ++c)
    pass([&](int64_t part, const T* const* left, const T* right, T* out) {
      dot_tile_rows<T, 1, kRows>(part, left, right, depth, out, acc_stride, accumulate);
    });
}

// Rows from which packing a matrix pays within a call: it reads and writes all weights, and then saves of
// each row's product what summing over lanes takes, which is less the more there is to be summed before.
constexpr int64_t pack_from(int64_t depth) { return depth < 256 ? 8 + depth / 4 : 72; }

// One matrix whose rows are gates: [G*H, K] in the order of torch, read as panels of U vectors of units, all
// G gates of a unit in one panel, so that a tile holds all that a unit's cell needs.
template <typename T, int G, int U>
struct GateMatrix {
  static constexpr int kLanesPerVector = kLanes<T>;
  static constexpr int kUnits = U * kLanesPerVector;      // units per panel
  static constexpr int kWidth = G * U * kLanesPerVector;  // columns per panel: [U][G][lane]

  const T* weight;  // [G*H, K]
  int64_t hidden, depth;
  const T* zeros;     // [K]
  T* packed;          // [panels][K][kWidth], or null to multiply without packing
  int64_t first = 0;  // the panel that `packed` begins with

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
      pack_transposed(column, kWidth, depth, packed + (j - first) * depth * kWidth);
    }
  }

  // The same matrix with panel j alone packed, into `room`, if there is some.
  GateMatrix at_panel(int64_t j, T* room) const {
    GateMatrix result = *this;
    if (room != nullptr) {
      result.packed = room, result.first = j;
      result.pack(j, j + 1);
    }
    return result;
  }

  // acc[count][kWidth] (+)= rows times panel j; the next call is for panel `next`, if that is packed.
  void product(int64_t j, int64_t next, int64_t count, const T* const* rows, T* acc,
               bool accumulate = false) const {
    if (packed != nullptr)
      return panel_product<T, G * U>(count, rows, packed + (j - first) * depth * kWidth, depth, acc,
                                     accumulate, packed + (next - first) * depth * kWidth);
    for (int u = 0; u < U; ++u) {
      const int64_t unit = j * kUnits + u * kLanesPerVector, n = min64(hidden - unit, kLanesPerVector);
      for (int g = 0; g < G; ++g) {
        T* out = acc + (u * G + g) * kLanesPerVector;
        if (n > 0)
          dot_product(count, rows, weight + (g * hidden + unit) * depth, n, depth, out, kWidth, accumulate);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t c = max64(n, 0); c < kLanesPerVector; ++c) out[r * kWidth + c] = T(0);
      }
    }
  }
};

}  // namespace RNN_ISA
}  // namespace torchrnn
