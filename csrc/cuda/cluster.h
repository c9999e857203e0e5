// What the two passes of the cluster path share: sizes, the rows of a cluster, the exchange, the product with
// weights in registers, and the launch. Index maps are in cuda/maps.h.
#pragma once

#include "cuda/half.h"
#include "cuda/maps.h"
#include "cuda/ptx.h"
#include "cuda/scan.h"

namespace torchrnn {
namespace cuda {

// The largest H.
constexpr int64_t kClusterHidden = 512;

// Calls use(bucket) with the smallest that holds H. An LSTM's weights take kHidden * kUnits / 16 / kWarps of
// a thread's registers: at most 128, so that as many are left (and 144 of ForwardBucket).
template <typename Use>
auto with_bucket(int64_t hidden, const Use& use) {
  if (hidden <= 64) return use(Bucket<64, 1, 8>());
  if (hidden <= 128) return use(Bucket<128, 2, 8>());
  if (hidden <= 256) return use(Bucket<256, 4, 8>());
  if (hidden <= 384) return use(Bucket<384, 8, 12>());
  return use(Bucket<512, 16, 8>());
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

  // Whether the state is forgotten before step t of this row. A reset at t parts t - 1 from t, so backwards
  // the mark is that of t + 1, the step before, if the row has one.
  RNN_DEVICE bool cut(int t) const {
    const int mark = back ? t + 1 : t;
    return p.resets != nullptr && mark < length && p.resets[mark * p.batch + b];
  }

  // The index of (t, b) in arrays [T, B] and of (d, b) in arrays [D, B]; where (d, t, b) begins in the tape.
  RNN_DEVICE int64_t at(int t) const { return t * p.batch + b; }
  RNN_DEVICE int64_t state() const { return direction * p.batch + b; }
  RNN_DEVICE int64_t tape(int t) const { return (direction * p.steps * p.batch + at(t)) * p.tape_size; }
};

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

// Set by a kernel that has waited in vain, before it traps.
#ifdef RNN_EMULATE
static uint32_t lost_message;
#else
static __device__ uint32_t lost_message;
#endif

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
    if (P::kWaits) ptx::mbarrier_wait(barrier, P::parity(step), &lost_message);
    if (P::kArmsAgain && ptx::thread() == 0) ptx::mbarrier_expect(barrier, bytes);
    ptx::sync_warp();  // What follows is for whole warps.
  }
};

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
    ptx::load_matrix(pair, operand + operand_row(lane, S::depth_tile(warp, k)));
    RNN_UNROLL
    for (int i = 0; i < S::kRowTiles; ++i) {
      ptx::mma<Io>(sums[i], weights[i][k], {pair[0], pair[1]});
      ptx::mma<Io>(odd[i], weights[i][k + 1], {pair[2], pair[3]});
    }
  }
  if constexpr (S::kDepthTiles % 2 != 0) {
    constexpr int kLast = S::kDepthTiles - 1;
    uint32_t last[2];
    ptx::load_matrix(last, operand + operand_row(lane % kMma, S::depth_tile(warp, kLast)));
    RNN_UNROLL
    for (int i = 0; i < S::kRowTiles; ++i) ptx::mma<Io>(sums[i], weights[i][kLast], last);
  }
  RNN_UNROLL
  for (int i = 0; i < S::kRowTiles; ++i) {
    RNN_UNROLL
    for (int e = 0; e < 4; ++e) sums[i][e] += odd[i][e];
  }
}

#ifdef __CUDACC__

// Calls use(configuration) with the launch of one cluster for each kTile rows and direction.
template <typename B, typename... Parameters, typename Use>
cudaError_t with_launch(void (*kernel)(Parameters...), int64_t batch, int64_t directions, int shared_bytes,
                        void* stream, const Use& use) {
  // Clusters of up to 8 CTAs are in every device's reach; for more one has to ask.
  if (B::kCluster > 8) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = B::kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = dim3(unsigned((batch + kTile - 1) / kTile * B::kCluster), unsigned(directions));
  configuration.blockDim = dim3(B::kThreads);
  configuration.dynamicSmemBytes = size_t(shared_bytes);
  configuration.stream = cudaStream_t(stream);
  configuration.attrs = &cluster;
  configuration.numAttrs = 1;
  return use(configuration);
}

#endif

}  // namespace cuda
}  // namespace torchrnn
