// The protocol of the cluster kernels alone, small and with numbers that show every lost or early message;
// and tests of the test: the same broken on purpose, which the emulator must notice.

#include <vector>

#include "cuda/ptx.h"
#include "named_tests.h"

namespace torchrnn {
namespace {

using namespace ptx;

int seeds = 50;

enum class Fault {
  kNone,
  kWait,          // one warp leaves out one wait
  kParity,        // waits for the phase before
  kArm,           // a barrier is used again without mbarrier_expect
  kOneBuffer,     // each step's values go over those of the last
  kFence,         // the barriers are not made known to the cluster
  kFirstBarrier,  // it is not waited until they are there
  kLastWait,      // CTAs exit before the last messages have come
  kReturn,        // one thread leaves early
  kSameValue      // a race without a consequence, for ThreadSanitizer
};

constexpr int kClusters = 2, kCtas = 2, kThreads = 64, kSteps = 12;
constexpr int kValues = kCtas * kThreads;

// The recurrence that a cluster runs: each value of a step is a hash (FNV-1a) of all of the last, so that one
// that is wrong makes all later ones wrong.
uint32_t next_value(const std::vector<uint32_t>& all, int cluster, int i) {
  uint32_t hash = uint32_t(cluster * kValues + i);
  for (const uint32_t value : all) hash = (hash ^ value) * 16777619;
  return hash;
}

struct Message {
  uint32_t masked, mask;  // apart, so that half a message would be seen
};

// Two buffers, and an mbarrier for each: every thread sends its value to every CTA, which waits until all are
// there. `out` is [kClusters, kValues], the values of the last step.
template <Fault fault>
void gather_all(uint32_t* out) {
  uint64_t* barriers = reinterpret_cast<uint64_t*>(shared_memory());       // [2]
  Message* messages = reinterpret_cast<Message*>(shared_memory() + 1024);  // [2, kValues]
  const int cluster = block_x() / kCtas, own = cluster_rank() * kThreads + thread();
  const auto buffer = [&](int t) { return messages + (fault == Fault::kOneBuffer ? 0 : t % 2) * kValues; };
  if (thread() == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&barriers[i], 1);
      mbarrier_expect(&barriers[i], sizeof(Message) * kValues);
    }
    if (fault != Fault::kFence) fence_mbarrier_init();
  }
  if (fault == Fault::kSameValue) messages[0].mask = 1;
  if (fault != Fault::kFirstBarrier) sync_cluster();
  std::vector<uint32_t> all(kValues);
  for (int t = 0; t < kSteps; ++t) {
    if (t > 0) {
      uint64_t* barrier = &barriers[t % 2];
      const uint32_t parity = (t - 1) / 2 % 2 ^ (fault == Fault::kParity);
      const bool left_out = fault == Fault::kWait && t == 5 && thread() >= 32;
      if (!left_out) mbarrier_wait(barrier, parity);
      if (thread() == 0 && fault != Fault::kArm) mbarrier_expect(barrier, sizeof(Message) * kValues);
      for (int j = 0; j < kValues; ++j) all[j] = buffer(t)[j].masked ^ buffer(t)[j].mask;
    }
    const uint32_t value = next_value(all, cluster, own);
    out[cluster * kValues + own] = value;
    if (fault == Fault::kReturn && t == 5 && thread() == 40) return;
    if (t == kSteps - 1 && fault != Fault::kLastWait) return;
    for (int rank = 0; rank < kCtas; ++rank) {
      store_async(buffer(t + 1) + own, rank, {~value, ~0u}, &barriers[(t + 1) % 2]);
    }
  }
}

// What is wrong with a run; nothing if it is right.
template <Fault fault>
std::string outcome(uint64_t seed) {
  std::vector<uint32_t> out(kClusters * kValues);
  try {
    emulator::launch(kClusters * kCtas, 1, kCtas, kThreads, 1024 + 2 * kValues * sizeof(Message), seed,
                     [&] { gather_all<fault>(out.data()); });
  } catch (const emulator::Error& error) {
    return error.what();
  }
  for (int cluster = 0; cluster < kClusters; ++cluster) {
    std::vector<uint32_t> last(kValues), next(kValues);
    for (int t = 0; t < kSteps; ++t) {
      for (int i = 0; i < kValues; ++i) next[i] = next_value(last, cluster, i);
      last = next;
    }
    for (int i = 0; i < kValues; ++i) {
      if (out[cluster * kValues + i] != last[i]) return "a wrong number";
    }
  }
  return "right";
}

// Prints one line for each seed.
template <Fault fault>
void run_seeds() {
  for (int seed = 0; seed < seeds; ++seed) printf("%s\n", outcome<fault>(seed).c_str());
}

constexpr NamedTest kTests[] = {
    {"none", run_seeds<Fault::kNone>},
    {"wait", run_seeds<Fault::kWait>},
    {"parity", run_seeds<Fault::kParity>},
    {"arm", run_seeds<Fault::kArm>},
    {"one_buffer", run_seeds<Fault::kOneBuffer>},
    {"fence", run_seeds<Fault::kFence>},
    {"first_barrier", run_seeds<Fault::kFirstBarrier>},
    {"last_wait", run_seeds<Fault::kLastWait>},
    {"return", run_seeds<Fault::kReturn>},
    {"same_value", run_seeds<Fault::kSameValue>},
};

}  // namespace
}  // namespace torchrnn

// The name of a fault, and how many seeds it is run with.
int main(int, char** arguments) {
  torchrnn::seeds = std::stoi(arguments[2]);
  return torchrnn::run_named(torchrnn::kTests, arguments[1]);
}
