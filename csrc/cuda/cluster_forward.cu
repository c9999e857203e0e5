// The forward scan of the cluster path: one launch for all steps, with the recurrent weights in registers. A
// cluster owns kTile batch rows of one direction, each of its CTAs kUnits hidden units (cuda/maps.h). In a
// step
//   - each warp multiplies its part of the CTA's weights with h, which the CTA has in shared memory, and puts
//     the sums there too;
//   - the owner of two units of one batch row adds up their sums, goes through the cell, and sends the new h
//     to every CTA of the cluster, its own among them, which count the bytes.
// So there is one exchange and one barrier of the CTA per step, and no sum depends on the order of messages.
//
// Two buffers in turn suffice for h. A CTA sends the h of step s + 2 when it has that of step s + 1 from
// every warp of every CTA, each of which sent it after the barrier that follows the reading of h of step s.
// The sums need only one buffer: who writes those of step s + 1 has h of step s + 1 from all owners of its
// own CTA, which they sent after reading the sums of step s.

#include "cuda/cluster.h"
#include "cuda/cluster_launch.h"

namespace torchrnn {
namespace cuda {
namespace {

template <typename Cell, typename Io, typename B>
struct ForwardShared {
  using Split = ForwardSplit<Io, B, Cell::kGates>;
  static constexpr int kRows = Cell::kGates * B::kUnits;

  alignas(16) Io h[2][B::kHidden * kTile];        // operand_place
  float sums[Split::kDepthParts][kRows * kTile];  // partial_place
  float bias[kRows];                              // added to wx
  float bias_h[B::kUnits];                        // added to the recurrent sum, of a cell that has this
  uint64_t barriers[2];
};

// The state of two units in one batch row, from step to step. Registers are scarce beside the weights: what
// can be had again from shared memory or the parameters is not kept.
template <typename Cell, typename Io, typename B>
struct Owner {
  static constexpr int kGates = Cell::kGates;
  static constexpr bool kMemory = Cell::kMemory >= 0;
  using Shared = ForwardShared<Cell, Io, B>;

  const ForwardScan<float>& p;
  const Row row;
  const int warp, lane;
  const int unit;   // the first
  const int count;  // how many of the units are there
  float h[kOwned], c[kOwned];
  float input[kOwned][kGates];  // wx of the next step
  uint8_t cut;                  // of the next step: see Row
  const float* const wx;        // where the first unit is in a row

  RNN_DEVICE Owner(const ForwardScan<float>& scan, const DirectionForward<float>& w)
      : p(scan),
        row(scan, first_row<B>() + owned_batch(ptx::thread() % kLanes)),
        warp(ptx::thread() / kLanes),
        lane(ptx::thread() % kLanes),
        unit(ptx::cluster_rank() * B::kUnits + owned_unit(warp, lane)),
        count(row.b >= p.batch || warp >= B::kGroups || unit >= p.hidden ? 0
              : p.hidden - unit < kOwned                                 ? 1
                                                                         : kOwned),
        input{},
        cut(0),
        wx(w.wx + unit) {
    RNN_UNROLL
    for (int i = 0; i < kOwned; ++i) {
      const int64_t state = row.state() * p.hidden + unit + i;
      h[i] = i < count && p.h0 != nullptr ? p.h0[state] : 0;
      c[i] = i < count && kMemory && p.c0 != nullptr ? p.c0[state] : 0;
    }
  }

  // Whether there is a step t; times past the last one are negative.
  RNN_DEVICE bool is_step(int t) const { return t >= 0 && row.alive(t); }
  RNN_DEVICE const float* input_of(int t) const { return wx + start(row.at(t), kGates * p.hidden); }

  // Asks for what step t reads, while memory is further away than one step takes. The lanes that share a row
  // take a gate each.
  RNN_DEVICE void prefetch(int t) const {
    const int gate = lane % kQuad;
    if (count > 0 && gate < kGates && is_step(t)) ptx::prefetch(input_of(t) + gate * int(p.hidden));
  }

  // Begins to read what step t needs.
  RNN_DEVICE void load(int t) {
    const float* from = input_of(t);
    RNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate, from += p.hidden) {
      RNN_UNROLL
      for (int i = 0; i < kOwned; ++i)
        if (i < count && is_step(t)) input[i][gate] = from[i];
    }
  }

  // Goes through the cell at step t, to h and c. `after` is the time of the next step. A unit that is not
  // there has a state of zero, and keeps it.
  RNN_DEVICE void advance(const Shared& shared, int t, int after, float (&values)[kOwned][Cell::kTape]) {
    float x[kOwned][kGates], rh[kOwned][kGates];
    RNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      RNN_UNROLL
      for (int i = 0; i < kOwned; ++i) {
        const int own = owned_unit(warp, lane) + i, r = gate * B::kUnits + own;
        x[i][gate] = input[i][gate] + shared.bias[r];
        rh[i][gate] = shared.sums[0][partial_place(r, owned_batch(lane))];
        RNN_UNROLL
        for (int part = 1; part < Shared::Split::kDepthParts; ++part)
          rh[i][gate] += shared.sums[part][partial_place(r, owned_batch(lane))];
        if (gate == Cell::kHiddenBias) rh[i][gate] += shared.bias_h[own];
      }
    }
    load(after);
    RNN_UNROLL
    for (int i = 0; i < kOwned; ++i) {
      const typename Cell::State next = Cell::forward(Plain(), x[i], rh[i], {h[i], c[i]}, values[i]);
      if (row.alive(t)) h[i] = next.h, c[i] = next.c;
    }
  }

  // y at step t, and what backward wants to know of it.
  RNN_DEVICE void store(int t, const float (&h)[kOwned], const float (&values)[kOwned][Cell::kTape]) const {
    const uint32_t column = uint32_t(row.direction) * uint32_t(p.hidden) + uint32_t(unit);
    Io* to = static_cast<Io*>(p.y) + start(row.at(t), p.directions * p.hidden) + column;
    RNN_UNROLL
    for (int i = 0; i < kOwned; ++i)
      if (i < count) to[i] = to_output<Io>(row.alive(t) ? h[i] : 0);
    if (p.tape == nullptr || !row.alive(t)) return;
    float* kept = p.tape + start(row.in_tape(t), p.tape_size) + uint32_t(unit);
    RNN_UNROLL
    for (int k = 0; k < Cell::kTape; ++k, kept += p.hidden) {
      RNN_UNROLL
      for (int i = 0; i < kOwned; ++i)
        if (i < count) kept[i] = values[i][k];
    }
  }

  RNN_DEVICE void forget() {
    RNN_UNROLL
    for (int i = 0; i < kOwned; ++i) h[i] = c[i] = 0;
  }

  // Sends h to all that read it in the next step.
  RNN_DEVICE void send(Io* to, uint64_t* barrier) const {
    constexpr int kWords = kOwned / kWord<Io>;
    uint32_t own[kWords], chunk[4];
    to_words<Io>(h, own);
    const int first = first_sharer<Io>(lane);
    RNN_UNROLL
    for (int i = 0; i < 4; ++i) chunk[i] = ptx::shuffle(own[i % kWords], first + i / kWords);
    const int depth = ptx::cluster_rank() * B::kUnits + owned_unit(warp, first);
    RNN_UNROLL
    for (int i = 0; i < kDestinations<Io, B>; ++i) {
      const int rank = destination<Io>(lane, i);
      if (rank < B::kCluster)
        ptx::store_async(to + operand_place<Io>(depth, owned_batch(lane)), rank, chunk, barrier);
    }
  }

  RNN_DEVICE void finish() const {
    RNN_UNROLL
    for (int i = 0; i < kOwned; ++i) {
      if (i >= count) continue;
      const int64_t state = row.state() * p.hidden + unit + i;
      p.h_n[state] = h[i];
      if (kMemory) p.c_n[state] = c[i];
    }
  }
};

// The rows of weight_hh that this thread has a part of, zero in padding. Every address is that of a row and a
// constant.
template <typename B, int kGates, typename Io, typename S = ForwardSplit<Io, B, kGates>>
RNN_DEVICE void load_weights(Weights<S>& weights, const Io* weight_hh, int hidden) {
  const int warp = ptx::thread() / kLanes, lane = ptx::thread() % kLanes;
  const int first = S::depth_tile(warp, 0) * kMmaDepth<Io> + fragment_depth<Io>(lane, 0);
  RNN_UNROLL
  for (int i = 0; i < S::kRowTiles; ++i) {
    RNN_UNROLL
    for (int low = 0; low < 2; ++low) {
      const int r = S::row_tile(warp, i) * kMma + fragment_row(lane, low);
      const int unit = B::unit(r, ptx::cluster_rank());
      const Io* from = weight_hh + (int64_t(B::gate(r)) * hidden + unit) * hidden + first;
      const int count = unit < hidden ? hidden - first : 0;
      RNN_UNROLL
      for (int k = 0; k < S::kDepthTiles; ++k) {
        RNN_UNROLL
        for (int e = low; e < 4; e += 2) {
          const int depth = S::depth_tile(warp, k) * kMmaDepth<Io> + fragment_depth<Io>(lane, e) - first;
          weights[i][k][e] = load_word(from + depth, count - depth);
        }
      }
    }
  }
}

// What the first product reads: h0, zero where step t forgets it, in padding and in rows past the batch.
template <typename Io, typename B>
RNN_DEVICE void load_h0(const ForwardScan<float>& p, int t, Io* h) {
  for (int i = ptx::thread(); i < B::kHidden * kTile; i += B::kThreads) {
    const int batch = i / B::kHidden, depth = i % B::kHidden;
    const Row row(p, first_row<B>() + batch);
    float value = 0;
    if (row.b < p.batch && depth < p.hidden && p.h0 != nullptr && row.cut(t) == 0)
      value = p.h0[row.state() * p.hidden + depth];
    h[operand_place<Io>(depth, batch)] = to_operand<Io>(value);
  }
}

// Zeros for the units that are not there.
template <typename Cell, typename Io, typename B>
RNN_DEVICE void load_biases(ForwardShared<Cell, Io, B>& shared, const DirectionForward<float>& w,
                            int64_t hidden) {
  for (int r = ptx::thread(); r < shared.kRows; r += B::kThreads) {
    const int unit = B::unit(r, ptx::cluster_rank());
    const bool is = unit < hidden;
    shared.bias[r] = is && w.bias != nullptr ? w.bias[B::gate(r) * hidden + unit] : 0;
    if (r < B::kUnits) shared.bias_h[r] = is && w.bias_h != nullptr ? w.bias_h[unit] : 0;
  }
}

template <typename Cell, typename Io, typename B, typename P = Protocol>
RNN_KERNEL void RNN_LAUNCH_BOUNDS(B::kThreads) cluster_forward_kernel(const ForwardScan<float> p) {
  using Shared = ForwardShared<Cell, Io, B>;
  using Split = typename Shared::Split;
  Shared& shared = *reinterpret_cast<Shared*>(ptx::shared_memory());
  const Exchange<P> exchange{shared.barriers, kForwardBytes<Io, B>};
  exchange.open();

  // Not indexed, or the parameters would move to memory that can be.
  const DirectionForward<float> w = ptx::block_y() == 0 ? p.direction[0] : p.direction[1];
  Weights<Split> weights;
  load_weights<B, Cell::kGates>(weights, static_cast<const Io*>(w.weight_hh), int(p.hidden));
  load_biases(shared, w, p.hidden);

  const int steps = cluster_steps<B>(p);
  const bool back = p.reverse || ptx::block_y() == 1;
  // Times past the last step are negative.
  const auto time = [&](int s) { return s >= steps ? -1 : back ? steps - 1 - s : s; };
  Owner<Cell, Io, B> owner(p, w);
  const bool owns = owner.warp < B::kGroups;
  const auto cut = [&](int s) { return s < steps ? owner.row.cut(time(s)) : uint8_t(0); };
  if (steps > 0) {
    load_h0<Io, B>(p, time(0), shared.h[0]);
    owner.load(time(0));
    if (cut(0) != 0) owner.forget();
    owner.cut = cut(1);
  }
  ptx::sync_cluster();

  for (int s = 0; s < steps; ++s) {
    if (owns) owner.prefetch(time(s + kAhead));
    exchange.receive(s);
    float sums[Split::kRowTiles][4];
    multiply<Split>(weights, shared.h[P::buffer(s)], sums);
    RNN_UNROLL
    for (int i = 0; i < Split::kRowTiles; ++i) {
      RNN_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int r = Split::row_tile(owner.warp, i) * kMma + sum_row(owner.lane, e);
        shared.sums[Split::depth_part(owner.warp)][partial_place(r, sum_batch(owner.lane, e))] = sums[i][e];
      }
    }
    ptx::sync_threads();
    if (!owns) continue;
    float values[kOwned][Cell::kTape];
    owner.advance(shared, time(s), time(s + 1), values);
    const float h[kOwned] = {owner.h[0], owner.h[1]};
    if (owner.cut != 0) owner.forget();
    if (s + 1 < steps) owner.send(shared.h[P::buffer(s + 1)], shared.barriers + P::buffer(s + 1));
    owner.store(time(s), h, values);
    owner.cut = cut(s + 2);
  }

  for (int t = steps; t < p.steps; ++t) owner.store(t, {}, {});
  owner.finish();
  // A CTA may exit now: the last step has waited for all that is ever sent to it.
}

// Calls use(configuration, kernel) with the kernel that serves p.
template <typename Use>
auto with_kernel(const ForwardScan<float>& p, void* stream, const Use& use) {
  return with_types(p, [&]<typename Cell, typename Io, typename Serving>(Cell, Io, Serving) {
    using B = ForwardBucket<Serving, Cell::kGates>;
    constexpr int kBytes = sizeof(ForwardShared<Cell, Io, B>);
    static_assert(kBytes <= 48 << 10, "more shared memory must be asked for");
    return with_launch<B, cluster_forward_kernel<Cell, Io, B>>(p.batch, p.directions, kBytes, stream, use);
  });
}

}  // namespace

bool cluster_forward_fits(const ForwardScan<float>& p, int device) {
  return with_kernel(p, nullptr, Fits{device});
}

int cluster_forward(const ForwardScan<float>& p, void* stream) {
  return p.batch == 0 ? 0 : with_kernel(p, stream, Launch<ForwardScan<float>>{p});
}

}  // namespace cuda
}  // namespace torchrnn
