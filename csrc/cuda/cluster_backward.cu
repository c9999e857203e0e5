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

#include <type_traits>

#include "cuda/cluster.h"
#include "cuda/cluster_launch.h"

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
  using Split = BackwardSplit<Io, B, Cell::kGates>;
  static constexpr int kSenders = B::kCluster * Split::kDepthParts;
  static constexpr int kDgates = Cell::kGates * B::kUnits * kTile;

  alignas(16) Io dgates[2][kDgates];                // operand_place
  float received[2][kSenders * B::kUnits * kTile];  // received_place
  uint64_t barriers[2];
};

// What a cell reads of one step, as memory has it: who converted a number would wait for it.
template <typename Cell, typename Io>
struct Inputs {
  // h comes from y, or from the tape.
  using Output = std::conditional_t < Cell::kOutput<0, Io, float>;

  float tape[Cell::kTape], c_prev;
  Output h_prev;
  Io dy, dc;
  uint8_t cut;  // see Row
};

// What a step gives to global memory, beside the h before it.
template <typename Cell>
struct Outputs {
  float d[Cell::kGateGrads];
};

// The gradients by the states of one unit in kRows batch rows, from step to step.
template <typename Cell, typename Io, typename B>
struct Owner {
  static constexpr int kGates = Cell::kGates, kRows = Ownership<B>::kRows;
  static constexpr bool kMemory = Cell::kMemory >= 0;
  using Shared = BackwardShared<Cell, Io, B>;

  const BackwardScan<float>& q;
  const ForwardScan<float>& p;
  const int local, unit;  // in the CTA, and of all
  const Row first;
  int length[kRows];   // of each row; 0 if it is past the batch, or the unit past all
  bool linked[kRows];  // whether what the last step's product gives belongs to dh
  float dh[kRows], dc[kRows];
  Inputs<Cell, Io> in[kRows];  // of the next step

  RNN_DEVICE explicit Owner(const BackwardScan<float>& scan)
      : q(scan),
        p(scan.forward),
        local(Ownership<B>::unit(ptx::thread())),
        unit(B::unit(local, ptx::cluster_rank())),
        first(p, first_row<B>() + Ownership<B>::row(ptx::thread(), 0)) {
    RNN_UNROLL
    for (int n = 0; n < kRows; ++n) {
      length[n] = is(n) ? Row(p, first.b + n).length : 0;
      linked[n] = false;
      dh[n] = is(n) && q.dh_n != nullptr ? q.dh_n[state(n)] : 0;
      dc[n] = is(n) && kMemory && q.dc_n != nullptr ? q.dc_n[state(n)] : 0;
      in[n] = {};
    }
  }

  RNN_DEVICE bool is(int n) const { return local < B::kUnits && unit < p.hidden && first.b + n < p.batch; }
  RNN_DEVICE Row row(int n) const {
    Row row = first;
    row.b += n, row.length = length[n];
    return row;
  }
  RNN_DEVICE int64_t state(int n) const { return (first.state() + n) * p.hidden + unit; }
  // Where row n and this unit are at step t: in y and c_all, in dy, and in the tape.
  RNN_DEVICE uint64_t in_y(int n, int t) const {
    return start(first.at(t) + n, p.directions * p.hidden) + column();
  }
  RNN_DEVICE uint64_t in_dy(int n, int t) const {
    return t * q.dy_stride_t + (first.b + n) * q.dy_stride_b + column();
  }
  RNN_DEVICE uint64_t in_tape(int n, int t) const {
    return start(first.in_tape(t) + n, p.tape_size) + uint32_t(unit);
  }
  RNN_DEVICE uint32_t column() const {
    return uint32_t(first.direction) * uint32_t(p.hidden) + uint32_t(unit);
  }

  // Asks for what step t reads, while memory is further away than one step takes. Eight neighbouring lanes,
  // whose units fill a sector of 32 bytes in each row of the tape, take a row each.
  RNN_DEVICE void prefetch(int t) const {
    constexpr int kY = Cell::kTape, kDy = Cell::kOutput < 0 ? kY + 1 : kY;  // y only if it is read
    const int part = ptx::thread() % 8;
    const void* const of = part < kY ? p.tape : part < kDy ? p.y : q.dy;
    RNN_UNROLL
    for (int n = 0; n < kRows; ++n) {
      const uint64_t at = part < kY    ? (in_tape(n, t) + start(part, p.hidden)) * sizeof(float)
                          : part < kDy ? in_y(n, t) * sizeof(Io)
                                       : in_dy(n, t) * sizeof(Io);
      if (part <= kDy && of != nullptr && t < length[n]) ptx::prefetch(static_cast<const char*>(of) + at);
    }
  }

  // Begins to read what step t needs.
  RNN_DEVICE void load(int t) {
    RNN_UNROLL
    for (int n = 0; n < kRows; ++n)
      if (t < length[n]) load(n, t, in[n]);
  }

  RNN_DEVICE void load(int n, int t, Inputs<Cell, Io>& x) const {
    const float* kept = p.tape + in_tape(n, t);
    RNN_UNROLL
    for (int k = 0; k < Cell::kTape; ++k, kept += p.hidden) x.tape[k] = *kept;
    if (q.dy != nullptr) x.dy = static_cast<const Io*>(q.dy)[in_dy(n, t)];
    if (kMemory && q.dc_all != nullptr) x.dc = static_cast<const Io*>(q.dc_all)[in_y(n, t)];
    x.cut = row(n).cut(t);
    if (first.back ? t + 1 < length[n] : t > 0) {
      const int before = first.back ? t + 1 : t - 1;
      if constexpr (Cell::kOutput < 0)
        x.h_prev = static_cast<const Io*>(p.y)[in_y(n, before)];
      else
        x.h_prev = p.tape[in_tape(n, before) + start(Cell::kOutput, p.hidden)];
      if constexpr (kMemory) x.c_prev = p.tape[in_tape(n, before) + start(Cell::kMemory, p.hidden)];
    } else {
      // The initial state is of Io, only wider.
      const int64_t from = (first.state() + n) * p.hidden + ptx::anew(unit);
      x.h_prev = to_output<typename Inputs<Cell, Io>::Output>(p.h0 != nullptr ? p.h0[from] : 0);
      if (kMemory) x.c_prev = p.c0 != nullptr ? p.c0[from] : 0;
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
  RNN_DEVICE void step(int t, Io* dgates, Outputs<Cell> (&results)[kRows]) {
    RNN_UNROLL
    for (int n = 0; n < kRows; ++n) {
      const Inputs<Cell, Io>& x = in[n];
      const bool alive = t < length[n];
      linked[n] = alive && x.cut == 0;
      // Also of steps that are not there: without branches the rows' instructions can be mixed.
      float d[Cell::kGateGrads];
      const typename Cell::State prev{linked[n] ? from_output(previous(x.h_prev)) : 0,
                                      linked[n] ? x.c_prev : 0};
      const typename Cell::State dnext{dh[n] + from_output(x.dy), dc[n] + from_output(x.dc)};
      const typename Cell::State dprev = Cell::backward(Plain(), x.tape, prev, dnext, d);
      if (alive) dh[n] = linked[n] ? dprev.h : 0, dc[n] = linked[n] ? dprev.c : 0;
      RNN_UNROLL
      for (int k = 0; k < Cell::kGateGrads; ++k) results[n].d[k] = alive ? d[k] : 0;
    }
    RNN_UNROLL
    for (int n = 0; n < kRows; ++n) {
      if (!is(n)) continue;
      RNN_UNROLL
      for (int gate = 0; gate < kGates; ++gate) {
        const int place = operand_place<Io>(gate * B::kUnits + local, Ownership<B>::row(ptx::thread(), n));
        dgates[place] = to_operand<Io>(by_rh(results[n].d, gate));
      }
    }
  }

  // The h before a step as the recurrence read it: rounded, whether y has it or the tape.
  RNN_DEVICE static Io previous(const typename Inputs<Cell, Io>::Output& h) {
    if constexpr (Cell::kOutput < 0)
      return h;
    else
      return to_output<Io>(h);
  }

  // The gradient by a gate's row of R h.
  RNN_DEVICE static float by_rh(const float (&d)[Cell::kGateGrads], int gate) {
    return d[(gate + Cell::kInputGrads) % kGates];
  }

  RNN_DEVICE void store(int t, const Outputs<Cell> (&results)[kRows]) const {
    const DirectionBackward<float> out = ptx::anew(first.direction) == 0 ? q.direction[0] : q.direction[1];
    RNN_UNROLL
    for (int n = 0; n < kRows; ++n) {
      if (!is(n)) continue;
      const uint32_t at = first.at(t) + n;
      static_cast<Io*>(out.h_prev)[start(at, p.hidden) + uint32_t(unit)] =
          linked[n] ? previous(in[n].h_prev) : Io{0};
      const uint64_t to = start(at, kGates * p.hidden) + uint32_t(unit);
      Io *dx = static_cast<Io*>(out.dgates_x) + to, *dh = static_cast<Io*>(out.dgates_h) + to;
      RNN_UNROLL
      for (int gate = 0; gate < kGates; ++gate, dx += p.hidden, dh += p.hidden) {
        *dx = to_output<Io>(results[n].d[gate + Cell::kInputGrads]);
        if (Cell::kInputGrads != 0) *dh = to_output<Io>(by_rh(results[n].d, gate));
      }
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

// What this thread has of the transposed rows of weight_hh, zero in padding. 16-bit numbers are read as pairs
// of columns, which the warp transposes to pairs of rows.
template <typename B, int kGates, typename Io, typename S = BackwardSplit<Io, B, kGates>>
RNN_DEVICE void load_weights(Weights<S>& weights, const Io* weight_hh, int hidden) {
  constexpr bool kPairs = kWord<Io> == 2;
  const int warp = ptx::thread() / kLanes, lane = ptx::thread() % kLanes;
  RNN_UNROLL
  for (int k = 0; k < S::kDepthTiles; ++k) {
    RNN_UNROLL
    for (int e = 0; e < 4; e += 2) {
      const int depth = kPairs ? fragment_row(lane, e / 2) : fragment_depth<Io>(lane, e);
      const int r = S::depth_tile(warp, k) * kMmaDepth<Io> + depth;
      const int unit = B::unit(r, ptx::cluster_rank());
      const int count = unit < hidden ? hidden : 0;
      const Io* from = weight_hh + (B::gate(r) * hidden + unit) * hidden;
      RNN_UNROLL
      for (int i = 0; i < S::kRowTiles; ++i) {
        RNN_UNROLL
        for (int low = 0; low < 2; ++low) {
          const int row = kPairs ? fragment_depth<Io>(lane, 2 * low) : fragment_row(lane, low);
          const int column = S::row_tile(warp, i) * kMma + row;
          const uint32_t word = load_word(from + column, count - column);
          weights[i][k][e + low] = kPairs ? ptx::transpose_matrix(word) : word;
        }
      }
    }
  }
}

// Sends the sums of this warp to the owners of their units.
template <typename B, typename Split>
RNN_DEVICE void send(const float (&sums)[Split::kRowTiles][4], float* to, uint64_t* barrier) {
  // More than 8 warps have no registers to keep the places in.
  const int own = ptx::thread() % kLanes, lane = B::kWarps > 8 ? ptx::anew(own) : own;
  const int warp = ptx::thread() / kLanes;
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
  const Exchange<P> exchange{shared.barriers, kBackwardBytes<Io, B, Cell::kGates>};
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
  Owner<Cell, Io, B> owner(q);
  const auto time = [&](int s) { return owner.first.back ? s : steps - 1 - s; };
  // No row links to the steps that none has.
  for (int t = steps; t < q.forward.steps; ++t) owner.store(t, {});
  if (steps > 0) owner.load(time(0));
  for (int s = 0; s < steps; ++s) {
    exchange.receive(s);
    owner.add(shared.received[P::buffer(s)]);
    Io* dgates = shared.dgates[s & 1];
    Outputs<Cell> results[Ownership<B>::kRows];
    owner.step(time(s), dgates, results);
    ptx::sync_threads();
    float sums[Split::kRowTiles][4];
    multiply<Split>(weights, dgates, sums);
    send<B, Split>(sums, shared.received[P::buffer(s + 1)], shared.barriers + P::buffer(s + 1));
    // What others do not wait for comes while the messages are under way.
    owner.store(time(s), results);
    if (s + 1 < steps) owner.load(time(s + 1));
    if (s + kAhead < steps) owner.prefetch(time(s + kAhead));
  }
  exchange.receive(steps);  // After this nothing comes any more, so that the CTA may exit.
  owner.add(shared.received[P::buffer(steps)]);
  owner.finish();
}

// Calls use(configuration, kernel) with the kernel that serves p.
template <typename Use>
auto with_kernel(const ForwardScan<float>& p, void* stream, const Use& use) {
  return with_types(p, [&]<typename Cell, typename Io, typename B>(Cell, Io, B) {
    constexpr int kBytes = sizeof(BackwardShared<Cell, Io, B>);
    static_assert(kBytes <= 48 << 10, "more shared memory must be asked for");
    return with_launch<B, cluster_backward_kernel<Cell, Io, B>>(p.batch, p.directions, kBytes, stream, use);
  });
}

}  // namespace

bool cluster_backward_fits(const ForwardScan<float>& p, int device) {
  return with_kernel(p, nullptr, Fits{device});
}

int cluster_backward(const BackwardScan<float>& q, void* stream) {
  return q.forward.batch == 0 ? 0 : with_kernel(q.forward, stream, Launch<BackwardScan<float>>{q});
}

}  // namespace cuda
}  // namespace torchrnn
