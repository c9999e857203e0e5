// Who holds, computes and sends what in the cluster kernels, as functions of thread, register and rank: tests
// go through all arguments of each.
//
// A cluster runs one direction of kTile batch rows. Each of its CTAs owns kUnits hidden units: the rows of
// the recurrent weights that belong to them, gate by gate, live in its registers for the whole call.
//
//   forward   rows: the gate rows of the CTA (gate * kUnits + unit)   depth: all hidden units
//   backward  rows: all hidden units                                  depth: the gate rows of the CTA
//
// Forward the CTAs give each other h, so that each has all of it; backward each CTA gives every other its
// part of the sums for that one's units.
//
// Operands are of the caller's dtype Io: Bf16, Half, or float, which is rounded to TF32. An mma has 32 bytes
// of depth whatever that is, and its fragments the same bytes; only the count of numbers in them differs.
#pragma once

#include <cstdint>

#include "cells/math.h"

namespace torchrnn {
namespace cuda {

constexpr int kTile = 8;    // batch rows of a cluster: the columns of an mma
constexpr int kGroup = 8;   // hidden units whose states one warp owns
constexpr int kQuad = 4;    // lanes that have one row of the fragments, or one batch row of a group
constexpr int kMma = 16;    // rows of an mma
constexpr int kLanes = 32;  // of a warp

// Numbers in a register, in 16 bytes (the chunks that are loaded and sent), and in the depth of an mma.
template <typename Io>
constexpr int kWord = 4 / sizeof(Io);
template <typename Io>
constexpr int kChunk = 16 / sizeof(Io);
template <typename Io>
constexpr int kMmaDepth = 32 / sizeof(Io);

// A size of the kernels: H is padded to kHidden with weights of zero.
template <int kHidden_, int kCluster_, int kWarps_>
struct Bucket {
  static constexpr int kHidden = kHidden_;
  static constexpr int kCluster = kCluster_;  // CTAs
  static constexpr int kWarps = kWarps_;      // of a CTA
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kUnits = kHidden / kCluster;
  static constexpr int kGroups = kUnits / kGroup;
  static_assert(kHidden % kMma == 0 && kUnits % kGroup == 0 && kGroups * kCluster * kGroup == kHidden);
  static_assert(kGroups <= kWarps, "each group of units has a warp of its own");

  // Gate rows, and what they are rows of.
  RNN_FN static constexpr int gate(int row) { return row / kUnits; }
  RNN_FN static constexpr int unit(int row, int rank) { return rank * kUnits + row % kUnits; }
};

// The bucket of the forward kernel. Where there are more than 8 warps, that is for the sake of GRUs, whose
// rows need a multiple of 3; an LSTM's forward pass would rather have more registers for each thread.
template <typename B, int kGates>
using ForwardBucket = Bucket<B::kHidden, B::kCluster, (kGates == 4 && B::kWarps > 8) ? 8 : B::kWarps>;

// The product of [kRows, kDepth] by [kDepth, kTile], shared by the warps: parts of the rows, and where there
// are fewer of these than warps, parts of the depth, whose sums are to be added. A warp has at least
// kLeastTiles tiles of rows, so that its mma need not wait for one another.
template <typename Io, int kRows, int kDepth, int kWarps, int kLeastTiles>
struct Split {
  static constexpr int kAllRowTiles = kRows / kMma, kAllDepthTiles = kDepth / kMmaDepth<Io>;
  RNN_FN static constexpr int row_parts() {
    int parts = kWarps;
    while (parts > 1 &&
           (kWarps % parts != 0 || kAllRowTiles % parts != 0 || kAllRowTiles / parts < kLeastTiles))
      --parts;
    return parts;
  }
  static constexpr int kRowParts = row_parts(), kDepthParts = kWarps / kRowParts;
  static constexpr int kRowTiles = kAllRowTiles / kRowParts, kDepthTiles = kAllDepthTiles / kDepthParts;
  static_assert(kRows % kMma == 0 && kDepth % kMmaDepth<Io> == 0 && kAllDepthTiles % kDepthParts == 0);

  // The i-th tile of a warp. The warps of a depth part are neighbours.
  RNN_FN static constexpr int row_tile(int warp, int i) { return warp % kRowParts * kRowTiles + i; }
  RNN_FN static constexpr int depth_part(int warp) { return warp / kRowParts; }
  RNN_FN static constexpr int depth_tile(int warp, int i) { return depth_part(warp) * kDepthTiles + i; }
};

template <typename Io, typename B, int kGates>
using ForwardSplit = Split<Io, kGates * B::kUnits, B::kHidden, B::kWarps, 2>;
template <typename Io, typename B, int kGates>
using BackwardSplit = Split<Io, B::kHidden, kGates * B::kUnits, B::kWarps, 1>;

// Operand a of an mma: register e of a lane has (row, depth), and above that the next of the depth if two
// numbers fit.
RNN_FN constexpr int fragment_row(int lane, int e) { return lane / kQuad + 8 * (e & 1); }
template <typename Io>
RNN_FN constexpr int fragment_depth(int lane, int e) {
  return (lane % kQuad + kQuad * (e >> 1)) * kWord<Io>;
}

// The sums of an mma: register e of a lane has (row, batch row).
RNN_FN constexpr int sum_row(int lane, int e) { return lane / kQuad + 8 * (e >> 1); }
RNN_FN constexpr int sum_batch(int lane, int e) { return lane % kQuad * 2 + (e & 1); }

// Operand b, [kDepth, kTile], lies in shared memory as chunks of the depth, and in a chunk by batch row.
template <typename Io>
RNN_FN constexpr int operand_place(int depth, int batch) {
  return (depth / kChunk<Io> * kTile + batch) * kChunk<Io> + depth % kChunk<Io>;
}
// Where the row begins whose address a lane gives to load_matrix. The four matrices are the registers of
// depth tile `tile` and the next one, two for each.
template <typename Io>
RNN_FN constexpr int operand_row(int lane, int tile) {
  return operand_place<Io>((2 * tile + lane / 8) * kChunk<Io>, lane % 8);
}

// Sums of the gate rows in shared memory. Of eight rows the even ones come first, so that both the lanes
// which write (sum_row, sum_batch) and those which read (the owners below) meet all 32 banks.
RNN_FN constexpr int partial_place(int row, int batch) {
  return (row / 8 * 8 + row % 8 / 2 + row % 2 * 4) * kTile + batch;
}

// The owner of a state: a warp has the group of its own number, a lane one batch row and of that two units.
constexpr int kOwned = 2;
RNN_FN constexpr int owned_batch(int lane) { return lane / kQuad; }
RNN_FN constexpr int owned_unit(int warp, int lane) { return warp * kGroup + lane % kQuad * kOwned; }

// Neighbouring lanes own a chunk, and tell each other its numbers. Then each sends it to every kSharers-th
// CTA of the cluster, the own one among them; destinations past the cluster are none.
template <typename Io>
constexpr int kSharers = kChunk<Io> / kOwned;
template <typename Io>
RNN_FN constexpr int first_sharer(int lane) {
  return lane / kSharers<Io> * kSharers<Io>;
}
template <typename Io, typename B>
constexpr int kDestinations = (B::kCluster + kSharers<Io> - 1) / kSharers<Io>;
template <typename Io>
RNN_FN constexpr int destination(int lane, int i) {
  return i * kSharers<Io> + lane % kSharers<Io>;
}

// The CTA that owns a unit: where backward a sum goes to.
template <typename B>
RNN_FN constexpr int owner(int unit) {
  return unit / B::kUnits;
}

// Bytes that come to every CTA in a step.
template <typename Io, typename B>
constexpr uint32_t kForwardBytes = B::kHidden * kTile * sizeof(Io);
template <typename Io, typename B, int kGates>
constexpr uint32_t kBackwardBytes =
    BackwardSplit<Io, B, kGates>::kDepthParts * B::kHidden * kTile * sizeof(float);

// What lets two buffers and one barrier for each serve all steps. The protocol is a type so that tests can
// break it and see that this is found.
//
// Step s waits, from s = 1 on, for what came into buffer s % 2. The n-th wait on a barrier has parity n % 2,
// and step s is the (s - 1) / 2-th on its own. Who waited arms the barrier for the next phase at once; what
// belongs to that phase is sent only after the sender has got something from here that was sent later than
// that.
struct Protocol {
  RNN_FN static constexpr int buffer(int64_t step) { return int(step & 1); }
  RNN_FN static constexpr uint32_t parity(int64_t step) { return uint32_t((step - 1) >> 1 & 1); }
  static constexpr bool kArmsAgain = true;
  static constexpr bool kWaits = true;
};

}  // namespace cuda
}  // namespace torchrnn
