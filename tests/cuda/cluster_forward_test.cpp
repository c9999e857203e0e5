// The forward kernel of the cluster path on the emulated device, as a library that tests/test_cuda_forward.py
// loads and judges.

#include <string>

#include "cuda/cluster_forward.cu"
#include "faults.h"

namespace torchrnn {
namespace cuda {
namespace {

struct Run {
  const ForwardScan<float>& p;
  bool pair;  // a cluster of two where one CTA would do
  std::string fault;
  uint64_t seed;

  template <typename Cell, typename Io, typename B, typename P>
  void launch() const {
    const int grid = int((p.batch + kTile - 1) / kTile) * B::kCluster;
    emulator::launch(grid, int(p.directions), B::kCluster, B::kThreads, sizeof(ForwardShared<Cell, Io, B>),
                     seed, [&] { cluster_forward_kernel<Cell, Io, B, P>(p); });
  }

  template <typename Cell, typename Io>
  void with_io() const {
    using Pair = Bucket<64, 2, 4>;
    if constexpr (std::is_same_v<Cell, Lstm<float>> && std::is_same_v<Io, Half>) {
      if (fault == "no_wait") return launch<Cell, Io, Pair, NoWait>();
      if (fault == "not_armed_again") return launch<Cell, Io, Pair, NotArmedAgain>();
      if (fault == "wrong_parity") return launch<Cell, Io, Pair, WrongParity>();
      if (fault == "one_buffer") return launch<Cell, Io, Pair, OneBuffer>();
    }
    if (pair) return launch<Cell, Io, Pair, Protocol>();
    cluster_forward(p, reinterpret_cast<void*>(seed));
  }

  template <typename Cell>
  void with_cell() const {
    with_operands(p.dtype, [&](auto number) { with_io<Cell, decltype(number)>(); });
  }
};

}  // namespace
}  // namespace cuda
}  // namespace torchrnn

// Runs the scan that `numbers` and `arrays` describe, in the order in which they are read here. Returns what
// the emulator found wrong, or an empty text.
extern "C" const char* run_cluster_forward(const int64_t* numbers, void* const* arrays, uint64_t seed,
                                           const char* fault) {
  using namespace torchrnn;
  using namespace torchrnn::cuda;
  const auto next = [&](auto*& array) {
    array = static_cast<std::remove_reference_t<decltype(array)>>(*arrays++);
  };
  ForwardScan<float> p{};
  p.cell = *numbers++ ? Cell::kGru : Cell::kLstm;
  p.dtype = Dtype(*numbers++);
  p.reverse = *numbers++;
  const bool pair = *numbers++;
  p.steps = *numbers++, p.batch = *numbers++, p.hidden = *numbers++, p.directions = *numbers++;
  p.outputs = p.hidden;
  for (int64_t d = 0; d < p.directions; ++d) {
    auto& w = p.direction[d];
    next(w.weight_hh), next(w.bias), next(w.bias_h), next(w.wx);
  }
  next(p.h0), next(p.c0), next(p.lengths), next(p.resets);
  next(p.y), next(p.tape), next(p.h_n), next(p.c_n);
  static std::string message;
  message.clear();
  try {
    const Run run{p, pair, fault, seed};
    if (p.cell == Cell::kGru) {
      p.tape_size = Gru<float>::kTape * p.hidden;
      run.with_cell<Gru<float>>();
    } else {
      p.tape_size = Lstm<float>::kTape * p.hidden;
      run.with_cell<Lstm<float>>();
    }
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
