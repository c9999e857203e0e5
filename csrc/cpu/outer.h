// Products for the backward pass: by weights as they lie, and sums of outer products over all rows of a
// sequence.
#pragma once

#include "cpu/team.h"
#include "cpu/tile.h"

namespace torchrnn {
inline namespace RNN_ISA {

// A matrix [K, columns] whose rows are the k of the product, read as panels of 4 vectors of columns. Its rows
// come in blocks of block_rows; block q of the product is block (q + rotate) % blocks of the matrix.
template <typename T>
struct ColumnMatrix {
  static constexpr int N = kLanes<T>;
  static constexpr int kWidth = 4 * N;

  const T* weight;  // [blocks * block_rows, stride], of which the first `columns` of each row
  int64_t columns, stride, blocks, block_rows, rotate;
  T* packed;             // panels from first_packed on, [panel][K][kWidth]
  int64_t first_packed;  // the panels before it are full, and multiplied as they are

  int64_t depth() const { return blocks * block_rows; }
  int64_t panels() const { return ceil_div(columns, kWidth); }
  int64_t packed_size() const { return (panels() - first_packed) * depth() * kWidth; }
  // The first row of block q of the product.
  const T* block(int64_t q) const { return weight + (q + rotate) % blocks * block_rows * stride; }
  const T* row(int64_t k) const { return block(k / block_rows) + k % block_rows * stride; }

  // Columns of a panel: the last one is half as wide if that is enough.
  static constexpr int64_t panel_width(int64_t left) { return left <= kWidth / 2 ? kWidth / 2 : kWidth; }
  int64_t width(int64_t j) const { return panel_width(columns - j * kWidth); }

  // The first n of `width` values, and zeros; all of kWidth with a copy of known size, which needs no call.
  static void copy_row(T* to, const T* from, int64_t n, int64_t width) {
    if (n == kWidth) {
      memcpy(to, from, kWidth * sizeof(T));
    } else {
      memcpy(to, from, n * sizeof(T));
      memset(to + n, 0, (width - n) * sizeof(T));
    }
  }

  void pack(int64_t begin, int64_t end) const {
    for (int64_t j = max64(begin, first_packed); j < end; ++j) {
      T* dst = packed + (j - first_packed) * depth() * kWidth;
      const int64_t n = min64(kWidth, columns - j * kWidth);
      for (int64_t k = 0; k < depth(); ++k, dst += width(j)) copy_row(dst, row(k) + j * kWidth, n, width(j));
    }
  }

  // acc[count][width(j)] (+)= rows times panel j; the next call is for panel `next`.
  void product(int64_t j, int64_t next, int64_t count, const T* const* rows, T* acc, bool accumulate) const {
    if (j >= first_packed) {
      const T* panel = packed + (j - first_packed) * depth() * kWidth;
      const T* next_panel = panel + (next - j) * depth() * kWidth;
      if (width(j) < kWidth)
        return panel_product<T, 2>(count, rows, panel, depth(), acc, accumulate, next_panel);
      return panel_product<T, 4>(count, rows, panel, depth(), acc, accumulate, next_panel);
    }
    for (int64_t q = 0; q < blocks; ++q)
      for (int64_t r = 0; r < count;) {
        const int64_t height = min64(count - r, tile_rows(4));
        fma_tile_rows<T, 4>(height, rows + r, q * block_rows, block(q) + j * kWidth, stride, block_rows,
                            acc + r * kWidth, kWidth, accumulate || q > 0);
        r += height;
      }
  }
};

// Rows summed at a time: their panel of 64 floats (128 KB) stays in L2 while the left side passes by, and the
// result is read and written once per this many rows.
constexpr int64_t kOuterDepth = 512;
constexpr int64_t kOuterTiles = 128;  // tiles of the left side packed at a time, 1.5 MB

// Memory of outer_sum for sums of at most `capacity` rows with up to `columns` of the left side: as little as
// will do, since fresh pages cost more than a short sum.
template <typename T>
struct OuterMemory {
  static constexpr int R = tile_rows(4), kWidth = 4 * kLanes<T>;

  int64_t capacity, columns;
  // Distance of two packed tiles of the left side: not a multiple of 4 KB, else all would fall into one set
  // of L1.
  int64_t left_stride = capacity * R + 64 / sizeof(T);
  int64_t tiles = max64(1, min64(kOuterTiles, ceil_div(columns, R)));
  T* data = nullptr;

  int64_t size() const { return tiles * left_stride + (capacity + R) * kWidth; }
  T* left() const { return data; }                         // [tile][k][R]
  T* right() const { return data + tiles * left_stride; }  // [k][kWidth]
  T* sums() const { return right() + capacity * kWidth; }  // [R][kWidth]
};

// Packs columns offset..offset+rows-1 of the left side, a few tiles at a time: more would be more pages than
// the processor can write to without looking them up anew.
template <typename T>
void pack_left(int64_t depth, const T* const* left, int64_t offset, int64_t rows,
               const OuterMemory<T>& memory) {
  constexpr int R = OuterMemory<T>::R;
  constexpr int64_t kTiles = 8;
  for (int64_t m0 = 0; m0 < rows; m0 += kTiles * R) {
    const int64_t m1 = min64(rows, m0 + kTiles * R);
    T* tiles = memory.left() + m0 / R * memory.left_stride;
    for (int64_t k = 0; k < depth; ++k) {
      const T* src = left[k] + offset;
      T* dst = tiles + k * R;
      int64_t m = m0;
      for (; m + R <= m1; m += R, dst += memory.left_stride) memcpy(dst, src + m, R * sizeof(T));
      if (m < m1) memcpy(dst, src + m, (m1 - m) * sizeof(T));
    }
  }
}

// out[m][n] (+)= sum over k of left[k][m] * right[k][n], for m in `range`, n in 0..columns-1, k in
// 0..depth-1.
template <typename T>
void outer_sum(int64_t depth, const T* const* left, int64_t left_offset, const T* const* right, Range range,
               int64_t columns, T* out, bool accumulate, const OuterMemory<T>& memory) {
  constexpr int R = OuterMemory<T>::R, kWidth = OuterMemory<T>::kWidth;
  T *left_pack = memory.left(), *right_pack = memory.right(), *acc = memory.sums();
  for (int64_t m0 = range.begin; m0 < range.end; m0 += memory.tiles * R) {
    const int64_t rows = min64(memory.tiles * R, range.end - m0);
    pack_left(depth, left, left_offset + m0, rows, memory);
    for (int64_t n0 = 0; n0 < columns; n0 += kWidth) {
      const int64_t width = min64(kWidth, columns - n0), panel = ColumnMatrix<T>::panel_width(width);
      for (int64_t k = 0; k < depth; ++k)
        ColumnMatrix<T>::copy_row(right_pack + k * panel, right[k] + n0, width, panel);
      for (int64_t m = 0; m < rows; m += R) {
        const int64_t height = min64(R, rows - m);
        const T* tile[R];
        for (int r = 0; r < R; ++r) tile[r] = left_pack + (m / R) * memory.left_stride + r;
        T* to = out + (m0 + m) * columns + n0;
        // A panel that is not full goes through acc, since its zeros must not be written.
        const bool full = width == panel;
        T* sums = full ? to : acc;
        const int64_t stride = full ? columns : panel;
        if (panel == kWidth)
          fma_tile_rows<T, 4, R>(height, tile, 0, right_pack, panel, depth, sums, stride, full && accumulate);
        else
          fma_tile_rows<T, 2, R, 0, R>(height, tile, 0, right_pack, panel, depth, sums, stride,
                                       full && accumulate);
        for (int64_t r = 0; r < height && !full; ++r)
          for (int64_t n = 0; n < width; ++n)
            to[r * columns + n] = acc[r * panel + n] + (accumulate ? to[r * columns + n] : T(0));
      }
    }
  }
}

}  // namespace RNN_ISA
}  // namespace torchrnn
