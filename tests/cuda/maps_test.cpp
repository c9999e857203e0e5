// Goes through all arguments of csrc/cuda/maps.h, for every size of the cluster kernels and of their tests:
// what must be held, computed or sent once is, and by those who use it.

#include <vector>

#include "cuda/cluster.h"
#include "named_tests.h"

namespace torchrnn {
namespace cuda {
namespace {

// How often each of `size` things was met.
struct Tally {
  std::vector<int> counts;

  explicit Tally(int size) : counts(size_t(size)) {}
  void meet(int i) { ++counts.at(size_t(i)); }
  void require_all(int times, const char* what) const {
    for (const int count : counts) require(count == times, what);
  }
};

// Calls use.template operator()<Io, B, kGates>() for all sizes and cells, with both sizes of numbers.
template <typename Io, typename Use>
void for_each_size_of(const Use& use) {
  const auto both = [&]<typename B>(B) {
    use.template operator()<Io, B, 3>();
    use.template operator()<Io, B, 4>();
    if constexpr (!std::is_same_v<B, ForwardBucket<B, 4>>)
      use.template operator()<Io, ForwardBucket<B, 4>, 4>();
  };
  for (const int64_t hidden : {64, 128, 256, 384, 512})
    if (hidden <= kLargest<Io>) with_bucket<Io>(hidden, both);
  both(Bucket<64, 2, 4>());
}
template <typename Use>
void for_each_size(const Use& use) {
  for_each_size_of<Half>(use);
  for_each_size_of<float>(use);
}

template <typename Use>
void for_each_lane(int warps, const Use& use) {
  for (int warp = 0; warp < warps; ++warp)
    for (int lane = 0; lane < kLanes; ++lane) use(warp, lane);
}

template <typename Io>
void check_buckets() {
  int least = 0;
  for (int hidden = 1; hidden <= kLargest<Io>; ++hidden) {
    const int size = with_bucket<Io>(hidden, [](auto bucket) { return decltype(bucket)::kHidden; });
    require(size >= hidden && size >= least, "a bucket is too small");
    if (size > least) require(hidden == least + 1, "a smaller bucket would do");
    least = size;
  }
}

void buckets() {
  check_buckets<Half>();
  check_buckets<float>();
}

// Each weight is in one place of one register of one lane of the cluster; and each row of one CTA, taken over
// all CTAs, is one gate of one unit.
template <typename Io, typename B, typename S>
void check_weights(int rows, int depth) {
  Tally weights(rows * depth);
  for_each_lane(B::kWarps, [&](int warp, int lane) {
    for (int i = 0; i < S::kRowTiles; ++i)
      for (int k = 0; k < S::kDepthTiles; ++k)
        for (int e = 0; e < 4; ++e) {
          const int row = S::row_tile(warp, i) * kMma + fragment_row(lane, e);
          const int first = S::depth_tile(warp, k) * kMmaDepth<Io> + fragment_depth<Io>(lane, e);
          for (int i = 0; i < kWord<Io>; ++i) weights.meet(row * depth + first + i);
        }
  });
  weights.require_all(1, "a weight is held by none or several");
}

void weights() {
  for_each_size([]<typename Io, typename B, int kGates>() {
    constexpr int kRows = kGates * B::kUnits;
    using Forward = ForwardSplit<Io, B, kGates>;
    using Backward = BackwardSplit<Io, B, kGates>;
    check_weights<Io, B, Forward>(kRows, B::kHidden);
    check_weights<Io, B, Backward>(B::kHidden, kRows);
    Tally rows(kGates * B::kHidden);
    for (int rank = 0; rank < B::kCluster; ++rank)
      for (int row = 0; row < kRows; ++row) rows.meet(B::gate(row) * B::kHidden + B::unit(row, rank));
    rows.require_all(1, "a gate of a unit belongs to none or several CTAs");
    require(Forward::kRowTiles * Forward::kDepthTiles * 4 <= 144 &&
                Backward::kRowTiles * Backward::kDepthTiles * 4 <= 144,
            "the weights leave too few registers");
  });
}

// load_matrix gives each lane the part of the operand that the mma wants there: registers 0 and 1 those of
// its tile, 2 and 3 those of the next.
void operand() {
  for_each_size([]<typename Io, typename B, int kGates>() {
    for (const int depth : {B::kHidden, kGates * B::kUnits}) {
      Tally places(depth * kTile);
      for (int k = 0; k < depth; ++k)
        for (int batch = 0; batch < kTile; ++batch) places.meet(operand_place<Io>(k, batch));
      places.require_all(1, "values of the operand share a place");
      for (int tile = 0; tile + 1 < depth / kMmaDepth<Io>; tile += 2)
        for (int lane = 0; lane < kLanes; ++lane)
          for (int matrix = 0; matrix < 4; ++matrix) {
            const int from = operand_row<Io>(8 * matrix + lane / kQuad, tile) + lane % kQuad * kWord<Io>;
            const int half = matrix % 2 * kMmaDepth<Io> / 2;
            const int wanted = (tile + matrix / 2) * kMmaDepth<Io> + half + lane % kQuad * kWord<Io>;
            for (int i = 0; i < kWord<Io>; ++i)
              require(from + i == operand_place<Io>(wanted + i, lane / kQuad),
                      "load_matrix gives another value");
          }
    }
  });
}

// Each sum of each part of the depth has one place. The lanes which write a register, and those which read
// one gate of their first or second unit, meet all banks.
void sums() {
  for_each_size([]<typename Io, typename B, int kGates>() {
    using S = ForwardSplit<Io, B, kGates>;
    constexpr int kRows = kGates * B::kUnits;
    Tally written(S::kDepthParts * kRows * kTile);
    for (int warp = 0; warp < B::kWarps; ++warp)
      for (int i = 0; i < S::kRowTiles; ++i)
        for (int e = 0; e < 4; ++e) {
          // Two registers along the batch are one store of 8 bytes, or two to every other bank.
          Tally banks(64);
          for (int lane = 0; lane < kLanes; ++lane) {
            const int row = S::row_tile(warp, i) * kMma + sum_row(lane, e);
            const int place = partial_place(row, sum_batch(lane, e));
            written.meet(S::depth_part(warp) * kRows * kTile + place);
            banks.meet(place % 64);
          }
          for (const int count : banks.counts) require(count <= 1, "a bank is met twice in a write");
        }
    written.require_all(1, "sums share a place");
    for (int warp = 0; warp < B::kGroups; ++warp)
      for (int row = 0; row < kRows; row += B::kUnits)
        for (int i = 0; i < kOwned; ++i) {
          Tally banks(32);
          for (int lane = 0; lane < kLanes; ++lane)
            banks.meet(partial_place(row + owned_unit(warp, lane) + i, owned_batch(lane)) % 32);
          banks.require_all(1, "a bank is met twice in a read");
        }
  });
}

// Each unit of each batch row has one owner; and what the owners send comes once to each place of h in every
// CTA, as many bytes as are waited for.
void owners() {
  for_each_size([]<typename Io, typename B, int kGates>() {
    Tally states(B::kUnits * kTile), sent(B::kCluster * B::kHidden * kTile);
    uint32_t bytes = 0;
    for_each_lane(B::kGroups, [&](int warp, int lane) {
      for (int i = 0; i < kOwned; ++i) states.meet((owned_unit(warp, lane) + i) * kTile + owned_batch(lane));
      // The numbers of a chunk come from the lanes that share it, in this order.
      const int first = first_sharer<Io>(lane), chunk = owned_unit(warp, first);
      require(chunk % kChunk<Io> == 0 && chunk + (lane - first) * kOwned == owned_unit(warp, lane),
              "a number is not where it is sent to");
      require(owned_batch(lane) == owned_batch(first), "a chunk has several batch rows");
    });
    states.require_all(1, "a state has none or several owners");
    for (int from = 0; from < B::kCluster; ++from)
      for_each_lane(B::kGroups, [&](int warp, int lane) {
        for (int i = 0; i < kDestinations<Io, B>; ++i) {
          const int to = destination<Io>(lane, i);
          if (to >= B::kCluster) continue;
          const int unit = from * B::kUnits + owned_unit(warp, first_sharer<Io>(lane));
          const int place = operand_place<Io>(unit, owned_batch(lane));
          for (int u = 0; u < kChunk<Io>; ++u) sent.meet(to * B::kHidden * kTile + place + u);
          if (to == 0) bytes += kChunk<Io> * sizeof(Io);
        }
      });
    sent.require_all(1, "a state does not come once to each CTA");
    require((bytes == kForwardBytes<Io, B>), "other bytes come than are waited for");
  });
}

// Backward each CTA gets from each part of the depth in each CTA its own units' sums.
void backward_sums() {
  for_each_size([]<typename Io, typename B, int kGates>() {
    using S = BackwardSplit<Io, B, kGates>;
    std::vector<uint32_t> bytes(B::kCluster);
    for_each_lane(B::kWarps, [&](int warp, int lane) {
      for (int i = 0; i < S::kRowTiles; ++i)
        for (int e = 0; e < 4; ++e)
          bytes.at(size_t(owner<B>(S::row_tile(warp, i) * kMma + sum_row(lane, e)))) += sizeof(float);
    });
    for (const uint32_t each : bytes)
      require((each * B::kCluster == kBackwardBytes<Io, B, kGates>), "other bytes come than are waited for");
  });
}

// Batch rows of a launch: each is in one cluster, which a grid of whole tiles covers.
void batch_tails() {
  for (int batch = 1; batch <= 3 * kTile; ++batch) {
    Tally rows((batch + kTile - 1) / kTile * kTile);
    for (int tile = 0; tile < (batch + kTile - 1) / kTile; ++tile)
      for (int lane = 0; lane < kLanes; lane += kQuad) rows.meet(tile * kTile + owned_batch(lane));
    rows.require_all(1, "a batch row is in none or several clusters");
    require(int(rows.counts.size()) - batch < kTile, "a cluster has no row");
  }
}

// The waits on each barrier have the parities 0, 1, 0, ... and the two barriers take turns.
void parities() {
  uint32_t waits[2] = {0, 0};
  for (int64_t step = 1; step < 100; ++step) {
    require(Protocol::buffer(step) == step % 2, "the buffers do not take turns");
    require(Protocol::parity(step) == (waits[step % 2]++ & 1), "a wait has the wrong parity");
  }
}

constexpr NamedTest kTests[] = {
    {"buckets", buckets},         {"weights", weights},
    {"operand", operand},         {"sums", sums},
    {"owners", owners},           {"backward_sums", backward_sums},
    {"batch_tails", batch_tails}, {"parities", parities},
};

}  // namespace
}  // namespace cuda
}  // namespace torchrnn

int main(int, char** arguments) { return torchrnn::run_named(torchrnn::cuda::kTests, arguments[1]); }
