// The backward scan of the cluster path: one launch for all steps, with the recurrent weights in registers. A
// cluster owns kTile batch rows of one direction, each of its CTAs kUnits hidden units (cuda/maps.h). A step,
// from the last to the first:
//   1. the owner of a state adds up the gradients by its h that all CTAs have sent, in a fixed order, goes
//      through the cell, and puts the gradients by its gates into shared memory;
//   2. each warp multiplies its part of the CTA's transposed weights with these, and sends the sums, parts of
//      the gradients by h of the step before, to the CTAs that own the units, which count the bytes.
// So there is one exchange and one barrier of the CTA per step, and no sum depends on the order of messages.
//
// Two buffers in turn suffice for what is received. A CTA sends in step s once it has all that was sent in
// step s - 1, and every CTA sent that after the barrier that follows its reading of the buffer which is now
// written. So it is with the gate gradients: who writes them in step s + 2 has what was sent in step s + 1 by
// CTAs that had everything from step s, which was sent after those of step s had been read.

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cuda/cluster.h"

namespace torchrnn {
namespace cuda {
namespace {

// The owners of states: a thread has one unit in kRows neighbouring batch rows, half a warp kSpan units, so
// that global memory is met in whole sectors, and the sums from one sender are a load without bank conflicts.
template <typename B>
struct Ownership {
  static constexpr int kSpan = 16, kRows = B::kUnits * kTile <= B::kThreads ? 1 : 2;
  static_assert(B::kUnits % kSpan == 0 && B::kUnits * kTile <= B::kThreads * kRows,
                "every state has an owner");

  RNN_FN static constexpr int unit(int thread) {
    return thread / kSpan / (kTile / kRows) * kSpan + thread % kSpan;
  }
  RNN_FN static constexpr int row(int thread, int n) { return thread / kSpan % (kTile / kRows) * kRows + n; }
};

// The place of a sum among those received, [sender][two batch rows][unit][row of the two], where a sender is
// a part of the depth in a CTA.
template <typename B>
RNN_FN constexpr int received_place(int sender, int unit, int row) {
  return ((sender * (kTile / 2) + row / 2) * B::kUnits + unit % B::kUnits) * 2 + row % 2;
}

template <typename Cell, typename Io, typename B>
struct BackwardShared {
  using Split = BackwardSplit<B, Cell::kGates>;
  static constexpr int kSenders = B::kCluster * Split::kDepthParts;
  static constexpr int kDgates = Cell::kGates * B::kUnits * kTile;

  alignas(16) Io dgates[2][kDgates];                // operand_place
  float received[2][kSenders * B::kUnits * kTile];  // received_place
  uint64_t barriers[2];
};

// What a cell reads of one step.
template <typename Cell>
struct Inputs {
  float tape[Cell::kTape];
  float h_prev, c_prev, dy, dc;
  bool cut;  // the state before it was forgotten
};

// The gradients by the states of one unit in kRows batch rows, from step to step.
template <typename Cell, typename Io, typename B>
struct Owner {
  static constexpr int kGates = Cell::kGates, kRows = Ownership<B>::kRows;
  static constexpr bool kMemory = Cell::kMemory >= 0;
  using Shared = BackwardShared<Cell, Io, B>;

  const BackwardScan<float>& q;
  const ForwardScan<float>& p;
  const DirectionBackward<float>& out;
  const int local, unit;  // in the CTA, and of all
  const Row first;
  int length[kRows];   // of each row; 0 if it is past the batch, or the unit past all
  bool linked[kRows];  // whether what the last step's product gives belongs to dh
  float dh[kRows], dc[kRows];
  Inputs<Cell> in[kRows];  // of the next step

  RNN_DEVICE Owner(const BackwardScan<float>& scan, const DirectionBackward<float>& direction)
      : q(scan),
        p(scan.forward),
        out(direction),
        local(Ownership<B>::unit(ptx::thread())),
        unit(B::unit(local, ptx::cluster_rank())),
        first(p, first_row<B>() + Ownership<B>::row(ptx::thread(), 0)) {
    RNN_UNROLL
    for (int n = 0; n < kRows; ++n) {
      length[n] = is(n) ? Row(p, first.b + n).length : 0;
      linked[n] = false;
      dh[n] = is(n) && q.dh_n != nullptr ? q.dh_n[state(n)] : 0;
      dc[n] = is(n) && kMemory && q.dc_n != nullptr ? q.dc_n[state(n)] : 0;
    }
  }

  RNN_DEVICE bool is(int n) const { return local < B::kUnits && unit < p.hidden && first.b + n < p.batch; }
  RNN_DEVICE Row row(int n) const {
    Row row = first;
    row.b += n, row.length = length[n];
    return row;
  }
  RNN_DEVICE int64_t state(int n) const { return (first.state() + n) * p.hidden + unit; }
  // In y and c_all.
  RNN_DEVICE int64_t output(int n, int t) const {
    return ((first.at(t) + n) * p.directions + first.direction) * p.hidden + unit;
  }
  RNN_DEVICE static float read(const void* from, int64_t i) { return widen(static_cast<const Io*>(from)[i]); }

  // Begins to read what step t needs: early, since memory is far.
  RNN_DEVICE void load(int t) {
    RNN_UNROLL
    for (int n = 0; n < kRows; ++n)
      if (t < length[n]) load(n, t, in[n]);
  }

  RNN_DEVICE void load(int n, int t, Inputs<Cell>& x) const {
    const int64_t tape = first.tape(t) + n * p.tape_size + unit, hidden = p.hidden;
    RNN_UNROLL
    for (int k = 0; k < Cell::kTape; ++k) x.tape[k] = p.tape[tape + k * hidden];
    const int64_t dy = t * q.dy_stride_t + (first.b + n) * q.dy_stride_b + first.direction * hidden + unit;
    x.dy = q.dy != nullptr ? read(q.dy, dy) : 0;
    x.dc = kMemory && q.dc_all != nullptr ? read(q.dc_all, output(n, t)) : 0;
    x.h_prev = x.c_prev = 0;
    x.cut = row(n).cut(t);
    if (x.cut) return;
    if (first.back ? t + 1 < length[n] : t > 0) {
      const int before = first.back ? t + 1 : t - 1;
      x.h_prev = read(p.y, output(n, before));
      if (kMemory) x.c_prev = p.tape[first.tape(before) + n * p.tape_size + unit + Cell::kMemory * hidden];
    } else {
      if (p.h0 != nullptr) x.h_prev = p.h0[state(n)];
      if (kMemory && p.c0 != nullptr) x.c_prev = p.c0[state(n)];
    }
  }

  // Adds up what the last step's product gave. Without a link it is no gradient of these rows, and not even
  // surely finite.
  RNN_DEVICE void add(const float* received) {
    if (!linked[0] && !linked[kRows - 1]) return;
    const float* from = received + received_place<B>(0, local, Ownership<B>::row(ptx::thread(), 0));
    float sums[kRows] = {};
    RNN_UNROLL
    for (int sender = 0; sender < Shared::kSenders; ++sender) {
      RNN_UNROLL
      for (int n = 0; n < kRows; ++n) sums[n] += from[sender * B::kUnits * kTile + n];
    }
    RNN_UNROLL
    for (int n = 0; n < kRows; ++n)
      if (linked[n]) dh[n] += sums[n];
  }

  // Goes through the cell at step t: from the gradients by the state after it to those by its gates and,
  // without what goes through R, by the state before it.
  RNN_DEVICE void step(int t, Io* dgates) {
    RNN_UNROLL
    for (int n = 0; n < kRows; ++n) {
      if (!is(n)) continue;
      float d[Cell::kGateGrads] = {}, h_prev = 0;
      const bool alive = t < length[n];
      linked[n] = alive && !in[n].cut;
      if (alive) {
        h_prev = in[n].h_prev;
        const typename Cell::State prev{h_prev, in[n].c_prev}, dnext{dh[n] + in[n].dy, dc[n] + in[n].dc};
        const typename Cell::State dprev = Cell::backward(Plain(), in[n].tape, prev, dnext, d);
        dh[n] = linked[n] ? dprev.h : 0;
        dc[n] = linked[n] ? dprev.c : 0;
      }
      store(n, t, h_prev, d);
      RNN_UNROLL
      for (int gate = 0; gate < kGates; ++gate) {
        const int place = operand_place(gate * B::kUnits + local, Ownership<B>::row(ptx::thread(), n));
        round_to(by_rh(d, gate), dgates[place]);
      }
    }
  }

  // What all steps that no row of the cluster has give.
  RNN_DEVICE void pad(int t) const {
    RNN_UNROLL
    for (int n = 0; n < kRows; ++n)
      if (is(n)) store(n, t, 0, {});
  }

  // The gradient by a gate's row of R h.
  RNN_DEVICE static float by_rh(const float (&d)[Cell::kGateGrads], int gate) {
    return d[(gate + Cell::kInputGrads) % kGates];
  }

  RNN_DEVICE void store(int n, int t, float h_prev, const float (&d)[Cell::kGateGrads]) const {
    const int64_t at = first.at(t) + n;
    round_to(h_prev, static_cast<Io*>(out.h_prev)[at * p.hidden + unit]);
    RNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      const int64_t to = (at * kGates + gate) * p.hidden + unit;
      round_to(d[gate + Cell::kInputGrads], static_cast<Io*>(out.dgates_x)[to]);
      if (Cell::kInputGrads != 0) round_to(by_rh(d, gate), static_cast<Io*>(out.dgates_h)[to]);
    }
  }

  RNN_DEVICE void finish() const {
    RNN_UNROLL
    for (int n = 0; n < kRows; ++n) {
      if (!is(n)) continue;
      q.dh0[state(n)] = dh[n];
      if (kMemory) q.dc0[state(n)] = dc[n];
    }
  }
};

// What this thread has of the transposed rows of weight_hh, zero in padding: pairs of columns, which the warp
// transposes to pairs of rows.
template <typename B, int kGates, typename Io, typename S = BackwardSplit<B, kGates>>
RNN_DEVICE void load_weights(Weights<S>& weights, const Io* weight_hh, int hidden) {
  const int warp = ptx::thread() / kLanes, lane = ptx::thread() % kLanes;
  RNN_UNROLL
  for (int k = 0; k < S::kDepthTiles; ++k) {
    RNN_UNROLL
    for (int e = 0; e < 4; e += 2) {
      const int r = S::depth_tile(warp, k) * kMma + fragment_row(lane, e / 2);
      const int unit = B::unit(r, ptx::cluster_rank());
      const int count = unit < hidden ? hidden : 0;
      const Io* from = weight_hh + (B::gate(r) * hidden + unit) * hidden;
      RNN_UNROLL
      for (int i = 0; i < S::kRowTiles; ++i) {
        RNN_UNROLL
        for (int low = 0; low < 2; ++low) {
          const int column = S::row_tile(warp, i) * kMma + fragment_depth(lane, 2 * low);
          const uint32_t even = column < count ? from[column].bits : 0;
          const uint32_t odd = column + 1 < count ? from[column + 1].bits : 0;
          weights[i][k][e + low] = ptx::transpose_matrix(even | odd << 16);
        }
      }
    }
  }
}

// Sends the sums of this warp to the owners of their units.
template <typename B, typename Split>
RNN_DEVICE void send(const float (&sums)[Split::kRowTiles][4], float* to, uint64_t* barrier) {
  const int warp = ptx::thread() / kLanes, lane = ptx::thread() % kLanes;
  const int sender = ptx::cluster_rank() * Split::kDepthParts + Split::depth_part(warp);
  RNN_UNROLL
  for (int i = 0; i < Split::kRowTiles; ++i) {
    RNN_UNROLL
    for (int e = 0; e < 4; e += 2) {
      const int unit = Split::row_tile(warp, i) * kMma + sum_row(lane, e);
      const uint32_t rows[2] = {bits_of(sums[i][e]), bits_of(sums[i][e + 1])};
      ptx::store_async(to + received_place<B>(sender, unit, sum_batch(lane, e)), owner<B>(unit), rows,
                       barrier);
    }
  }
}

template <typename Cell, typename Io, typename B, typename P = Protocol>
RNN_KERNEL void RNN_LAUNCH_BOUNDS(B::kThreads) cluster_backward_kernel(const BackwardScan<float> q) {
  using Shared = BackwardShared<Cell, Io, B>;
  using Split = typename Shared::Split;
  Shared& shared = *reinterpret_cast<Shared*>(ptx::shared_memory());
  const Exchange<P> exchange{shared.barriers, kBackwardBytes<B, Cell::kGates>};
  exchange.open();

  // Not indexed, or the parameters would move to memory that can be.
  const DirectionBackward<float> w = ptx::block_y() == 0 ? q.direction[0] : q.direction[1];
  Weights<Split> weights;
  load_weights<B, Cell::kGates>(weights, static_cast<const Io*>(w.weight_hh), int(q.forward.hidden));
  // What no state writes stays zero.
  for (int i = ptx::thread(); i < 2 * Shared::kDgates; i += B::kThreads)
    shared.dgates[i / Shared::kDgates][i % Shared::kDgates] = Io{0};
  ptx::sync_cluster();

  const int steps = cluster_steps<B>(q.forward);
  Owner<Cell, Io, B> owner(q, w);
  const auto time = [&](int s) { return owner.first.back ? s : steps - 1 - s; };
  if (steps > 0) owner.load(time(0));
  for (int s = 0; s < steps; ++s) {
    exchange.receive(s);
    owner.add(shared.received[P::buffer(s)]);
    Io* dgates = shared.dgates[s & 1];
    owner.step(time(s), dgates);
    ptx::sync_threads();
    if (s + 1 < steps) owner.load(time(s + 1));
    float sums[Split::kRowTiles][4];
    multiply<Split>(weights, dgates, sums);
    send<B, Split>(sums, shared.received[P::buffer(s + 1)], shared.barriers + P::buffer(s + 1));
  }
  exchange.receive(steps);  // After this nothing comes any more, so that the CTA may exit.
  owner.add(shared.received[P::buffer(steps)]);
  owner.finish();
  for (int t = steps; t < q.forward.steps; ++t) owner.pad(t);
}

}  // namespace

#ifdef __CUDACC__

namespace {

template <typename Cell, typename Io>
cudaError_t launch(const BackwardScan<float>& q, void* stream) {
  return with_bucket(q.forward.hidden, [&](auto bucket) {
    using B = decltype(bucket);
    constexpr int kBytes = sizeof(BackwardShared<Cell, Io, B>);
    static_assert(kBytes <= 48 << 10, "more shared memory must be asked for");
    const auto kernel = cluster_backward_kernel<Cell, Io, B>;
    return with_launch<B>(kernel, q.forward.batch, q.forward.directions, kBytes, stream,
                          [&](const cudaLaunchConfig_t& configuration) {
                            return cudaLaunchKernelEx(&configuration, kernel, q);
                          });
  });
}

}  // namespace

int cluster_backward(const BackwardScan<float>& q, void* stream) {
  if (q.forward.batch == 0) return cudaSuccess;
  const bool bf16 = q.forward.dtype == Dtype::kBfloat16;
  if (q.forward.cell == Cell::kGru)
    return bf16 ? launch<Gru<float>, Bf16>(q, stream) : launch<Gru<float>, Half>(q, stream);
  return bf16 ? launch<Lstm<float>, Bf16>(q, stream) : launch<Lstm<float>, Half>(q, stream);
}

#endif

}  // namespace cuda
}  // namespace torchrnn
