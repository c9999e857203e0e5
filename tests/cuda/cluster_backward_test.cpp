// Runs the backward kernel of the cluster path on the emulated device: cluster_backward_test IN OUT SEED
// FAULT. tests/test_cuda_backward.py writes IN, numbers and arrays as they are read below, and judges OUT.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "cuda/cluster_backward.cu"
#include "faults.h"

namespace torchrnn {
namespace cuda {
namespace {

// Everything that goes into a call and comes out of it.
struct Case {
  std::ifstream in;
  std::vector<std::vector<char>> arrays;  // those read
  std::vector<std::vector<char>> results;

  int64_t number() {
    int64_t value = 0;
    in.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
  }

  // Null if it is empty.
  template <typename T>
  const T* array() {
    arrays.emplace_back(size_t(number()));
    in.read(arrays.back().data(), std::streamsize(arrays.back().size()));
    if (!in) throw std::runtime_error("the input is too short");
    return arrays.back().empty() ? nullptr : reinterpret_cast<const T*>(arrays.back().data());
  }

  // NaN until it is written.
  template <typename T>
  T* result(int64_t count) {
    results.emplace_back(size_t(count) * sizeof(T), char(0xFF));
    return reinterpret_cast<T*>(results.back().data());
  }
};

template <typename Cell, typename Io, typename B, typename P>
void run(const BackwardScan<float>& q, uint64_t seed) {
  const int grid = int((q.forward.batch + kTile - 1) / kTile) * B::kCluster;
  emulator::launch(grid, int(q.forward.directions), B::kCluster, B::kThreads,
                   sizeof(BackwardShared<Cell, Io, B>), seed,
                   [&] { cluster_backward_kernel<Cell, Io, B, P>(q); });
}

// The kernel that serves the call; or, since emulation takes long, one with a small cluster of two. Of these
// there are both kinds of Ownership, and one and two parts of the depth.
template <typename Cell, typename Io>
void run(const BackwardScan<float>& q, bool pair, const std::string& fault, uint64_t seed) {
  if (!pair) {
    cluster_backward(q, reinterpret_cast<void*>(seed));
    return;
  }
  if (q.forward.hidden > 64) return run<Cell, Io, Bucket<96, 2, 6>, Protocol>(q, seed);
  if (q.forward.hidden > 32) return run<Cell, Io, Bucket<64, 2, 8>, Protocol>(q, seed);
  using B = Bucket<32, 2, 2>;
  if constexpr (std::is_same_v<Cell, Lstm<float>> && std::is_same_v<Io, Half>) {
    if (fault == "no_wait") return run<Cell, Io, B, NoWait>(q, seed);
    if (fault == "not_armed_again") return run<Cell, Io, B, NotArmedAgain>(q, seed);
    if (fault == "wrong_parity") return run<Cell, Io, B, WrongParity>(q, seed);
    if (fault == "one_buffer") return run<Cell, Io, B, OneBuffer>(q, seed);
  }
  return run<Cell, Io, B, Protocol>(q, seed);
}

template <typename Cell, typename Io>
void run(Case& c, BackwardScan<float>& q, const std::string& fault, uint64_t seed) {
  ForwardScan<float>& p = q.forward;
  p.reverse = c.number() != 0;
  const bool pair = c.number() != 0;
  p.steps = c.number(), p.batch = c.number(), p.hidden = c.number(), p.directions = c.number();
  q.dy_stride_t = c.number(), q.dy_stride_b = c.number();
  p.outputs = p.hidden;
  p.tape_size = Cell::kTape * p.hidden;
  for (int64_t d = 0; d < p.directions; ++d) q.direction[d].weight_hh = c.array<Io>();
  p.y = const_cast<Io*>(c.array<Io>());
  p.tape = const_cast<float*>(c.array<float>());
  p.h0 = c.array<float>(), p.c0 = c.array<float>();
  p.lengths = c.array<int64_t>(), p.resets = c.array<bool>();
  q.dy = c.array<Io>(), q.dc_all = c.array<Io>();
  q.dh_n = c.array<float>(), q.dc_n = c.array<float>();

  const int64_t states = p.batch * p.hidden, all = p.steps * states;
  c.results.reserve(3 * size_t(p.directions) + 2);
  for (int64_t d = 0; d < p.directions; ++d) {
    q.direction[d].dgates_x = c.result<Io>(Cell::kGates * all);
    if (Cell::kInputGrads != 0) q.direction[d].dgates_h = c.result<Io>(Cell::kGates * all);
    q.direction[d].h_prev = c.result<Io>(all);
  }
  q.dh0 = c.result<float>(p.directions * states);
  if (Cell::kMemory >= 0) q.dc0 = c.result<float>(p.directions * states);
  run<Cell, Io>(q, pair, fault, seed);
}

// Every state of every bucket has one owner, and every sum that is received a place of its own.
template <typename Io, typename B, int kGates>
void check_maps() {
  constexpr int kSenders = BackwardSplit<Io, B, kGates>::kDepthParts * B::kCluster;
  std::vector<int> owners(B::kUnits * kTile), places(kSenders * B::kUnits * kTile);
  for (int thread = 0; thread < B::kThreads; ++thread) {
    if (Ownership<B>::unit(thread) >= B::kUnits) continue;
    for (int n = 0; n < Ownership<B>::kRows; ++n)
      ++owners.at(size_t(Ownership<B>::unit(thread) * kTile + Ownership<B>::row(thread, n)));
  }
  for (int sender = 0; sender < kSenders; ++sender) {
    for (int unit = 0; unit < B::kUnits; ++unit)
      for (int row = 0; row < kTile; ++row) ++places.at(size_t(received_place<B>(sender, unit, row)));
  }
  for (const int count : owners)
    if (count != 1) throw std::runtime_error("a state has none or several owners");
  for (const int count : places)
    if (count != 1) throw std::runtime_error("two sums have one place");
}

template <typename Io>
void check_all_maps() {
  for (const int64_t hidden : {64, 128, 256, 384, 512})
    if (hidden <= kLargest<Io>)
      with_bucket<Io>(hidden, [](auto bucket) {
        check_maps<Io, decltype(bucket), 3>();
        check_maps<Io, decltype(bucket), 4>();
      });
}

void run(const char* in, const char* out, uint64_t seed, const std::string& fault) {
  check_all_maps<Half>();
  check_all_maps<float>();
  Case c{std::ifstream(in, std::ios::binary), {}, {}};
  BackwardScan<float> q{};
  q.forward.cell = c.number() != 0 ? Cell::kGru : Cell::kLstm;
  q.forward.dtype = Dtype(c.number());
  with_operands(q.forward.dtype, [&](auto number) {
    using Io = decltype(number);
    q.forward.cell == Cell::kGru ? run<Gru<float>, Io>(c, q, fault, seed)
                                 : run<Lstm<float>, Io>(c, q, fault, seed);
  });
  std::ofstream file(out, std::ios::binary);
  for (const auto& result : c.results) file.write(result.data(), std::streamsize(result.size()));
}

}  // namespace
}  // namespace cuda
}  // namespace torchrnn

int main(int, char** arguments) {
  try {
    torchrnn::cuda::run(arguments[1], arguments[2], std::stoull(arguments[3]), arguments[4]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
