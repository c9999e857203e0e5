// Protocols of the cluster path that are wrong, for tests of the tests.
#pragma once

#include "cuda/cluster.h"

namespace torchrnn {
namespace cuda {

// Ways to break the protocol, each of which must be found.
struct NoWait : Protocol { static constexpr bool kWaits = false; };
struct NotArmedAgain : Protocol { static constexpr bool kArmsAgain = false; };
struct WrongParity : Protocol {
  static constexpr uint32_t parity(int64_t step) { return Protocol::parity(step) ^ 1; }
};
struct OneBuffer : Protocol {
  static constexpr int buffer(int64_t) { return 0; }
  static constexpr uint32_t parity(int64_t step) { return uint32_t((step - 1) & 1); }
};

}  // namespace cuda
}  // namespace torchrnn
