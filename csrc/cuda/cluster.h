// What the two passes of the cluster path share: sizes, the rows of a cluster, the exchange, the product with
// weights in registers. Index maps are in cuda/maps.h.
#pragma once

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cuda/half.h"
#include "cuda/maps.h"
#include "cuda/ptx.h"
#include "cuda/scan.h"

namespace torchrnn {
namespace cuda {

// The largest H: see cuda/cluster_rules.cpp.
template <typename Io>
constexpr int64_t kLargest = sizeof(Io) == sizeof(float) ? 256 : 512;

// Calls use(bucket) with the smallest that holds H. An LSTM's weights take kHidden * kUnits * sizeof(Io) / 32
// / kWarps of a thread's registers: at most 128, so that as many are left (and 144 of ForwardBucket).
template <typename Io, typename Use>
auto with_bucket(int64_t hidden, const Use& use) {
  if (hidden <= 64) return use(Bucket<64, 1, 8>());
  if (hidden <= 128) return use(Bucket<128, 2, 8>());
  if constexpr (sizeof(Io) == sizeof(float)) {
    return use(Bucket<256, 8, 8>());
  } else {
    if (hidden <= 256) return use(Bucket<256, 4, 8>());
    if (hidden <= 384) return use(Bucket<384, 8, 12>());
    return use(Bucket<512, 16, 8>());
  }
}

// Calls use(number) with one of the type that operands have.
template <typename Use>
auto with_operands(Dtype dtype, const Use& use) {
  if (dtype == Dtype::kBfloat16) return use(Bf16());
  if (dtype == Dtype::kFloat16) return use(Half());
  return use(float());
}

// Calls use(cell, number, bucket) with those of a call.
template <typename Use>
auto with_types(const ForwardScan<float>& p, const Use& use) {
  return with_operands(p.dtype, [&](auto number) {
    return with_bucket<decltype(number)>(p.hidden, [&](auto bucket) {
      return p.cell == Cell::kGru ? use(Gru<float>(), number, bucket) : use(Lstm<float>(), number, bucket);
    });
  });
}

// One batch row in the direction of this CTA.
struct Row {
  const ForwardScan<float>& p;
  int b;
  int length;  // 0 for a row past the batch
  int direction;
  bool back;

  RNN_DEVICE Row(const ForwardScan<float>& scan, int64_t row)
      : p(scan), b(int(row)), direction(ptx::block_y()), back(scan.reverse || direction == 1) {
    length = int(b >= p.batch ? 0 : p.lengths == nullptr ? p.steps : p.lengths[b]);
  }

  RNN_DEVICE bool alive(int t) const { return t < length; }

  // Not zero if the state is forgotten before step t of this row. A reset at t parts t - 1 from t, so
  // backwards the mark is that of t + 1, the step before, if the row has one. It is the byte as memory has
  // it: to make a bool of it would be to wait for it.
  RNN_DEVICE uint8_t cut(int t) const {
    const int mark = back ? t + 1 : t;
    if (p.resets == nullptr || mark >= length) return 0;
    return reinterpret_cast<const uint8_t*>(p.resets)[at(mark)];
  }

  // The index of (t, b) in arrays [T, B], of (d, t, b) in arrays [D, T, B] and of (d, b) in arrays [D, B]. T
  // * B is below 2^31, and unsigned numbers are multiplied to 64 bits in one instruction.
  RNN_DEVICE uint32_t at(int t) const { return uint32_t(t) * uint32_t(p.batch) + uint32_t(b); }
  RNN_DEVICE uint32_t in_tape(int t) const {
    return (direction == 0 ? 0 : uint32_t(p.steps) * uint32_t(p.batch)) + at(t);
  }
  RNN_DEVICE int64_t state() const { return direction * p.batch + b; }
};

// Where a row begins in an array of rows with `size` numbers.
RNN_DEVICE uint64_t start(uint32_t row, int64_t size) { return uint64_t(row) * uint32_t(size); }

// The first batch row of this cluster.
template <typename B>
RNN_DEVICE int64_t first_row() {
  return int64_t(ptx::block_x() / B::kCluster) * kTile;
}

// The steps that any row of the cluster has: the same in all its CTAs.
template <typename B>
RNN_DEVICE int cluster_steps(const ForwardScan<float>& p) {
  int most = 0;
  for (int i = 0; i < kTile; ++i) {
    const int length = Row(p, first_row<B>() + i).length;
    most = length > most ? length : most;
  }
  return most;
}

// Steps between a prefetch to L2 and the load. DRAM is about a step away.
constexpr int kAhead = 4;

// Two barriers, one for each buffer that others write to. `bytes` come to a buffer in each phase.
template <typename P>
struct Exchange {
  uint64_t* const barriers;
  const uint32_t bytes;

  // The caller's whole cluster must meet before anybody sends.
  RNN_DEVICE void open() const {
    if (ptx::thread() != 0) return;
    for (int i = 0; i < 2; ++i) ptx::mbarrier_init(barriers + i, 1);
    ptx::fence_mbarrier_init();
    for (int i = 0; i < 2; ++i) ptx::mbarrier_expect(barriers + i, bytes);
  }

  // Waits for what step `step` reads; the first reads nothing that was sent.
  RNN_DEVICE void receive(int step) const {
    if (step == 0) return;
    uint64_t* barrier = barriers + P::buffer(step);
    if (P::kWaits) ptx::mbarrier_wait(barrier, P::parity(step));
    if (P::kArmsAgain && ptx::thread() == 0) ptx::mbarrier_expect(barrier, bytes);
    ptx::sync_warp();  // What follows is for whole warps.
  }
};

// Two numbers that neighbour in depth, rounded as operands are, in the registers of an operand.
template <typename Io>
RNN_DEVICE void to_words(const float (&pair)[2], uint32_t (&words)[2 / kWord<Io>]) {
  if constexpr (std::is_same_v<Io, float>) {
    words[0] = ptx::tf32(pair[0]), words[1] = ptx::tf32(pair[1]);
  } else {
    words[0] = ptx::pack<Io>(pair[0], pair[1]);
  }
}

// One number as the caller's tensors have it, from that, and as operands have it.
template <typename Io>
RNN_DEVICE Io to_output(float x) {
  if constexpr (std::is_same_v<Io, float>) {
    return x;
  } else {
    return Io{uint16_t(ptx::pack<Io>(x, 0))};
  }
}
template <typename Io>
RNN_DEVICE float from_output(Io x) {
  if constexpr (std::is_same_v<Io, float>) {
    return x;
  } else {
    return ptx::low<Io>(x.bits);
  }
}
template <typename Io>
RNN_DEVICE Io to_operand(float x) {
  if constexpr (std::is_same_v<Io, float>) {
    return of_bits(ptx::tf32(x));
  } else {
    return to_output<Io>(x);
  }
}

// A register of an operand, from numbers of which `count` are there: zeros beyond.
template <typename Io>
RNN_DEVICE uint32_t load_word(const Io* from, int count) {
  if constexpr (std::is_same_v<Io, float>) {
    return count > 0 ? ptx::tf32(*from) : 0;
  } else {
    const uint32_t even = count > 0 ? from[0].bits : 0;
    const uint32_t odd = count > 1 ? from[1].bits : 0;
    return even | odd << 16;
  }
}

// A thread's part of the weights: registers [row tile][depth tile][4].
template <typename S>
using Weights = uint32_t[S::kRowTiles][S::kDepthTiles][4];

// sums = weights * operand for this warp's part of the rows and of the depth. Even and odd tiles of the depth
// have sums of their own, so that twice as many mma are under way.
template <typename S, typename Io>
RNN_DEVICE void multiply(const Weights<S>& weights, const Io* operand, float (&sums)[S::kRowTiles][4]) {
  const int warp = ptx::thread() / kLanes, lane = ptx::thread() % kLanes;
  float odd[S::kRowTiles][4] = {};
  RNN_UNROLL
  for (int i = 0; i < S::kRowTiles; ++i) {
    RNN_UNROLL
    for (int e = 0; e < 4; ++e) sums[i][e] = 0;
  }
  RNN_UNROLL
  for (int k = 0; k + 1 < S::kDepthTiles; k += 2) {
    uint32_t pair[4];
    ptx::load_matrix(pair, operand + operand_row<Io>(lane, S::depth_tile(warp, k)));
    RNN_UNROLL
    for (int i = 0; i < S::kRowTiles; ++i) {
      ptx::mma<Io>(sums[i], weights[i][k], {pair[0], pair[1]});
      ptx::mma<Io>(odd[i], weights[i][k + 1], {pair[2], pair[3]});
    }
  }
  if constexpr (S::kDepthTiles % 2 != 0) {
    constexpr int kLast = S::kDepthTiles - 1;
    uint32_t last[2];
    ptx::load_matrix(last, operand + operand_row<Io>(lane % 16, S::depth_tile(warp, kLast)));
    RNN_UNROLL
    for (int i = 0; i < S::kRowTiles; ++i) ptx::mma<Io>(sums[i], weights[i][kLast], last);
  }
  RNN_UNROLL
  for (int i = 0; i < S::kRowTiles; ++i) {
    RNN_UNROLL
    for (int e = 0; e < 4; ++e) sums[i][e] += odd[i][e];
  }
}

}  // namespace cuda
}  // namespace torchrnn
