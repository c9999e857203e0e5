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

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cuda/cluster.h"

namespace torchrnn {
namespace cuda {
namespace {

template <typename Cell, typename B>
struct ForwardShared {
  using Split = ForwardSplit<B, Cell::kGates>;
  static constexpr int kRows = Cell::kGates * B::kUnits;

  alignas(16) uint16_t h[2][B::kHidden * kTile];  // operand_place
  float sums[Split::kDepthParts][kRows * kTile];  // partial_place
  float bias[kRows];                              // added to wx
  float bias_h[B::kUnits];                        // added to the recurrent sum, of a cell that has this
  uint64_t barriers[2];
};

// The state of two units in one batch row, from step to step. Registers are scarce beside the weights: what
// can be had again from shared memory or the parameters is not kept.
template <typename Cell, typename Io, typename B>
struct Owner {
  static constexpr int kGates = Cell::kGates, kOwned = 2;
  static constexpr bool kMemory = Cell::kMemory >= 0;
  using Shared = ForwardShared<Cell, B>;

  const ForwardScan<float>& p;
  const Row row;
  const int warp, lane;
  const int unit;   // the first
  const int count;  // how many of the units are there
  float h[kOwned], c[kOwned];
  float input[kGates][kOwned];  // wx of the next step
  bool cut;                     // whether the state is forgotten before the next step
  const float* wx;

  RNN_DEVICE Owner(const ForwardScan<float>& scan, const DirectionForward<float>& w)
      : p(scan),
        row(scan, first_row<B>() + owned_batch(ptx::thread() % kLanes)),
        warp(ptx::thread() / kLanes),
        lane(ptx::thread() % kLanes),
        unit(ptx::cluster_rank() * B::kUnits + owned_unit(warp, lane)),
        count(row.b >= p.batch || warp >= B::kChunks || unit >= p.hidden ? 0
              : p.hidden - unit < 2                                      ? 1
                                                                         : 2),
        input{},
        cut(false),
        wx(w.wx) {
    RNN_UNROLL
    for (int i = 0; i < kOwned; ++i) {
      const int64_t state = row.state() * p.hidden + unit + i;
      h[i] = i < count && p.h0 != nullptr ? p.h0[state] : 0;
      c[i] = i < count && kMemory && p.c0 != nullptr ? p.c0[state] : 0;
    }
  }

  // Begins to read what step t needs: early, since memory is far.
  RNN_DEVICE void load(int t, int i) {
    const float* from = wx + row.at(t) * kGates * p.hidden + unit + i;
    RNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate, from += p.hidden)
      if (i < count && row.alive(t)) input[gate][i] = *from;
  }

  // Goes through the cell at step t, to h and c. `after` is the time of the next step, negative if there is
  // none.
  RNN_DEVICE void advance(const Shared& shared, int t, int after) {
    RNN_UNROLL
    for (int i = 0; i < kOwned; ++i) {
      float x[kGates], rh[kGates], values[Cell::kTape];
      RNN_UNROLL
      for (int gate = 0; gate < kGates; ++gate) {
        const int r = gate * B::kUnits + owned_unit(warp, lane) + i;
        x[gate] = input[gate][i] + shared.bias[r];
        rh[gate] = gate == Cell::kHiddenBias ? shared.bias_h[owned_unit(warp, lane) + i] : 0;
        RNN_UNROLL
        for (int part = 0; part < Shared::Split::kDepthParts; ++part)
          rh[gate] += shared.sums[part][partial_place(r, owned_batch(lane))];
      }
      if (after >= 0) load(after, i);
      const typename Cell::State next = Cell::forward(Plain(), x, rh, {h[i], c[i]}, values);
      if (i >= count || !row.alive(t)) continue;
      h[i] = next.h, c[i] = next.c;
      if (p.tape == nullptr) continue;
      float* kept = p.tape + row.tape(t) + unit + i;
      RNN_UNROLL
      for (int k = 0; k < Cell::kTape; ++k, kept += p.hidden) *kept = values[k];
    }
  }

  // y at step t, of both units.
  RNN_DEVICE uint32_t output(int t) const { return row.alive(t) ? ptx::pack<Io>(h[0], h[1]) : 0; }
  RNN_DEVICE void store_output(int t, uint32_t pair) const {
    Io* y = static_cast<Io*>(p.y) + (row.at(t) * p.directions + row.direction) * p.hidden + unit;
    if (count > 0) y[0].bits = uint16_t(pair);
    if (count > 1) y[1].bits = uint16_t(pair >> 16);
  }

  RNN_DEVICE void forget() {
    RNN_UNROLL
    for (int i = 0; i < kOwned; ++i) h[i] = c[i] = 0;
  }

  // Sends h to all that read it in the next step.
  RNN_DEVICE void send(uint16_t* to, uint64_t* barrier) const {
    const uint32_t own = ptx::pack<Io>(h[0], h[1]);
    uint32_t chunk[kQuad];
    RNN_UNROLL
    for (int i = 0; i < kQuad; ++i) chunk[i] = ptx::shuffle(own, lane / kQuad * kQuad + i);
    const int depth = ptx::cluster_rank() * B::kUnits + warp * kChunk;
    RNN_UNROLL
    for (int i = 0; i < kDestinations<B>; ++i) {
      const int rank = destination(lane, i);
      if (rank < B::kCluster)
        ptx::store_async(to + operand_place(depth, owned_batch(lane)), rank, chunk, barrier);
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
template <typename B, int kGates, typename Io, typename S = ForwardSplit<B, kGates>>
RNN_DEVICE void load_weights(Weights<S>& weights, const Io* weight_hh, int hidden) {
  const int warp = ptx::thread() / kLanes, lane = ptx::thread() % kLanes;
  const int first = S::depth_tile(warp, 0) * kMma + fragment_depth(lane, 0);
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
          const int depth = S::depth_tile(warp, k) * kMma + fragment_depth(lane, e) - first;
          const uint32_t even = depth < count ? from[depth].bits : 0;
          const uint32_t odd = depth + 1 < count ? from[depth + 1].bits : 0;
          weights[i][k][e] = even | odd << 16;
        }
      }
    }
  }
}

// What the first product reads: h0, zero where step t forgets it, in padding and in rows past the batch.
template <typename Io, typename B>
RNN_DEVICE void load_h0(const ForwardScan<float>& p, int t, uint16_t* h) {
  for (int i = ptx::thread(); i < B::kHidden * kTile; i += B::kThreads) {
    const int batch = i / B::kHidden, depth = i % B::kHidden;
    const Row row(p, first_row<B>() + batch);
    float value = 0;
    if (row.b < p.batch && depth < p.hidden && p.h0 != nullptr && !row.cut(t))
      value = p.h0[row.state() * p.hidden + depth];
    h[operand_place(depth, batch)] = uint16_t(ptx::pack<Io>(value, 0));
  }
}

// Zeros for the units that are not there.
template <typename Cell, typename B>
RNN_DEVICE void load_biases(ForwardShared<Cell, B>& shared, const DirectionForward<float>& w,
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
  using Shared = ForwardShared<Cell, B>;
  using Split = typename Shared::Split;
  Shared& shared = *reinterpret_cast<Shared*>(ptx::shared_memory());
  const Exchange<P> exchange{shared.barriers, kForwardBytes<B>};
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
  const bool owns = owner.warp < B::kChunks;
  const auto cut = [&](int s) { return s < steps && owner.row.cut(time(s)); };
  if (steps > 0) {
    load_h0<Io, B>(p, time(0), shared.h[0]);
    owner.load(time(0), 0);
    owner.load(time(0), 1);
    if (cut(0)) owner.forget();
    owner.cut = cut(1);
  }
  ptx::sync_cluster();

  for (int s = 0; s < steps; ++s) {
    exchange.receive(s);
    float sums[Split::kRowTiles][4];
    multiply<Split>(weights, reinterpret_cast<const Io*>(shared.h[P::buffer(s)]), sums);
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
    owner.advance(shared, time(s), time(s + 1));
    const uint32_t y = owner.output(time(s));
    if (owner.cut) owner.forget();
    if (s + 1 < steps) owner.send(shared.h[P::buffer(s + 1)], shared.barriers + P::buffer(s + 1));
    owner.store_output(time(s), y);
    owner.cut = cut(s + 2);
  }

  for (int t = steps; t < p.steps; ++t) owner.store_output(t, 0);
  owner.finish();
  // A CTA may exit now: the last step has waited for all that is ever sent to it.
}

}  // namespace

#ifdef __CUDACC__

namespace {

// Calls use(configuration, kernel) with the kernel that serves p.
template <typename Cell, typename Io, typename Use>
cudaError_t with_kernel(const ForwardScan<float>& p, void* stream, const Use& use) {
  return with_bucket(p.hidden, [&](auto bucket) {
    using B = ForwardBucket<decltype(bucket), Cell::kGates>;
    constexpr int kBytes = sizeof(ForwardShared<Cell, B>);
    static_assert(kBytes <= 48 << 10, "more shared memory must be asked for");
    const auto kernel = cluster_forward_kernel<Cell, Io, B>;
    return with_launch<B>(
        kernel, p.batch, p.directions, kBytes, stream,
        [&](const cudaLaunchConfig_t& configuration) { return use(configuration, kernel); });
  });
}

template <typename Use>
cudaError_t with_kernel(const ForwardScan<float>& p, void* stream, const Use& use) {
  const bool bf16 = p.dtype == Dtype::kBfloat16;
  if (p.cell == Cell::kGru)
    return bf16 ? with_kernel<Gru<float>, Bf16>(p, stream, use)
                : with_kernel<Gru<float>, Half>(p, stream, use);
  return bf16 ? with_kernel<Lstm<float>, Bf16>(p, stream, use)
              : with_kernel<Lstm<float>, Half>(p, stream, use);
}

}  // namespace

const char* cluster_why_not(const ForwardScan<float>& p, int device) {
  if (p.cell != Cell::kLstm && p.cell != Cell::kGru) return "the cell is not lstm or gru";
  if (p.dtype != Dtype::kBfloat16 && p.dtype != Dtype::kFloat16)
    return "the dtype is not bfloat16 or float16";
  if (p.hidden > kClusterHidden) return "the hidden size is above 512";
  if (p.activation != Activation::kTanh) return "the activation is not tanh";
  if (p.projected) return "there is a projection";
  if (p.direction[0].peephole != nullptr) return "there are peepholes";
  if (p.direction[0].norm_gain != nullptr) return "there is layer normalisation";
  if (p.cell_clip * 0 == 0) return "the cell state is clipped";
  if (p.mask_h != nullptr || p.mask_c != nullptr) return "there are masks on the state";
  if (p.c_all != nullptr) return "every step's cell state is wanted";
  if (p.steps >= INT32_MAX) return "there are too many steps";
  int major = 0, clusters = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major < 9) return "the compute capability is below 9.0";
  if (p.batch == 0) return nullptr;  // Nothing will be launched.
  with_kernel(p, nullptr, [&](const cudaLaunchConfig_t& configuration, auto kernel) {
    return cudaOccupancyMaxActiveClusters(&clusters, kernel, &configuration);
  });
  cudaGetLastError();  // Or the next launch would seem to have failed.
  return clusters < 1 ? "a cluster does not fit the device" : nullptr;
}

int cluster_forward(const ForwardScan<float>& p, void* stream) {
  if (p.batch == 0) return cudaSuccess;
  return with_kernel(p, stream, [&](const cudaLaunchConfig_t& configuration, auto kernel) {
    return cudaLaunchKernelEx(&configuration, kernel, p);
  });
}

#endif

}  // namespace cuda
}  // namespace torchrnn
