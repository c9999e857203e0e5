// Dropout: random numbers by Philox4x32-10 and the product with them. torchrnn/dropout.py says which number
// meets which element.
#include "cuda/dropout.h"

#include "cuda/half.h"
#include "cuda/launch.h"
#include "cuda/step.h"

namespace torchrnn {
namespace cuda {
namespace {

constexpr int64_t kGroup = 32, kCounters = 8;  // Elements and counters of a group.

// One counter: two elements in each half of its group.
template <typename Io, typename Acc>
struct Drop {
  Dropout p;

  RNN_FN void operator()(int64_t counter) const {
    const uint64_t seed = uint64_t(*p.seed);
    uint32_t word[4] = {uint32_t(counter), uint32_t(uint64_t(counter) >> 32), 0, 0};
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t(word[0]) * 0xD2511F53u, product1 = uint64_t(word[2]) * 0xCD9E8D57u;
      word[0] = uint32_t(product1 >> 32) ^ word[1] ^ key0, word[1] = uint32_t(product1);
      word[2] = uint32_t(product0 >> 32) ^ word[3] ^ key1, word[3] = uint32_t(product0);
      key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    const int64_t begin = counter / kCounters * kGroup + counter % kCounters * 2;
    for (int w = 0; w < 4; ++w) {
      const int64_t i = begin + w / 2 * (kGroup / 2) + w % 2;
      if (i >= p.count) continue;
      const Acc x = widen(static_cast<const Io*>(p.x)[p.one ? 0 : i]);
      round_to(x * (word[w] >= p.threshold ? Acc(p.scale) : Acc(0)), static_cast<Io*>(p.y)[i]);
    }
  }
};

template <typename Acc>
int run(const Dropout& p, void* stream) {
  const int64_t counters = (p.count + kGroup - 1) / kGroup * kCounters;
  return with_io<Acc>(p.dtype,
                      [&](auto io) { return for_each(counters, Drop<decltype(io), Acc>{p}, stream); });
}

}  // namespace

int run_dropout(const Dropout& p, void* stream) {
  return p.dtype == Dtype::kFloat64 ? run<double>(p, stream) : run<float>(p, stream);
}

}  // namespace cuda
}  // namespace torchrnn
