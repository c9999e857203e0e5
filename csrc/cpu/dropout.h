// Dropout: random numbers and the product with them in one pass.
#pragma once

#include "cpu/kernels.h"
#include "cpu/team.h"

namespace torchrnn {
inline namespace RNN_ISA {

// Counters side by side, each a 32-bit number in the low half of its lane: the multiplication that gives all
// 64 bits reads only those, and what is above need never be cleared.
typedef uint64_t Counters __attribute__((vector_size(RNN_VECTOR_BYTES)));
constexpr int kCounters = RNN_VECTOR_BYTES / sizeof(uint64_t);

RNN_FN Counters product(Counters a, Counters b) {
#if defined(__x86_64__) && RNN_VECTOR_BYTES == 64
  // Without the mask, of all lanes, GCC 12 warns of a variable in its own header.
  return Counters(_mm512_maskz_mul_epu32(0xff, __m512i(a), __m512i(b)));
#elif defined(__x86_64__) && RNN_VECTOR_BYTES == 32
  return Counters(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif defined(__SSE2__)
  return Counters(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
  constexpr uint64_t kLow = 0xffffffff;
  return (a & kLow) * (b & kLow);
#endif
}

constexpr int kRounds = 10;

// What is added in each round, in all lanes.
struct RoundKeys {
  Counters even[kRounds], odd[kRounds];

  explicit RoundKeys(uint64_t seed) {
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
      even[round] = Counters{} + key0, odd[round] = Counters{} + key1;
      key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
  }
};

// Chains of rounds side by side: one alone would wait for its multiplications.
constexpr int kChains = 2;

// The four words of Philox4x32-10, for the counters from `first` on in each chain.
RNN_FN void philox(const uint64_t (&first)[kChains], const RoundKeys& keys, Counters (&word)[4][kChains]) {
  Counters(&c0)[kChains] = word[0], (&c1)[kChains] = word[1], (&c2)[kChains] = word[2],
  (&c3)[kChains] = word[3];
#pragma GCC unroll 4
  for (int i = 0; i < kChains; ++i) {
    c0[i] = Counters{} + first[i];
#pragma GCC unroll 8
    for (int lane = 0; lane < kCounters; ++lane) c0[i][lane] += lane;
    c1[i] = c0[i] >> 32, c2[i] = c3[i] = Counters{};
  }
#pragma GCC unroll 10
  for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      const Counters product0 = product(c0[i], Counters{} + 0xD2511F53u);
      const Counters product1 = product(c2[i], Counters{} + 0xCD9E8D57u);
      c0[i] = (product1 >> 32) ^ c1[i] ^ keys.even[round], c1[i] = product1;
      c2[i] = (product0 >> 32) ^ c3[i] ^ keys.odd[round], c3[i] = product0;
    }
  }
}

// As torchrnn/dropout.py has it: group g is made of the counters from 8 g on.
constexpr int64_t kGroupCounters = 8, kGroup = 4 * kGroupCounters;
constexpr int64_t kBlock = kChains * kGroup;

// y = x times the factors, for a block of groups: in each, first words 0 and 1 of all counters, then 2 and 3.
template <typename T>
RNN_FN void drop_block(const DropoutParams<T>& p, const RoundKeys& keys, int64_t block, const T* x, T* y) {
  typedef uint32_t Words __attribute__((vector_size(RNN_VECTOR_BYTES)));
  typedef T Values __attribute__((vector_size(2 * kCounters * sizeof(T)), aligned(alignof(T)), may_alias));
  for (int64_t counter = 0; counter < kGroupCounters; counter += kCounters) {
    uint64_t first[kChains];
    for (int i = 0; i < kChains; ++i) first[i] = (block * kChains + i) * kGroupCounters + counter;
    Counters word[4][kChains];
    philox(first, keys, word);
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
#pragma GCC unroll 2
      for (int w = 0; w < 4; w += 2) {
        const int64_t at = i * kGroup + w * kGroupCounters + 2 * counter;
        const Words random = Words((word[w][i] & 0xffffffff) | word[w + 1][i] << 32);
        const Values kept = __builtin_convertvector(random >= p.threshold ? Words{} + 1 : Words{}, Values);
        *reinterpret_cast<Values*>(y + at) = *reinterpret_cast<const Values*>(x + at) * (kept * p.scale);
      }
    }
  }
}

template <typename T>
void dropout(const DropoutParams<T>& p, int threads, cpu::RunTeam run_team) {
  constexpr int64_t kAtOnce = 64;
  Shares blocks(ceil_div(p.count, kBlock));
  const auto work = [&] {
    const ZeroUpper end;
    const RoundKeys keys(p.seed);
    T part[kBlock], result[kBlock];
    for (T& x : part) x = p.one ? *p.x : T(0);
    blocks.take(kAtOnce, [&](Range range) {
      for (int64_t block = range.begin; block < range.end; ++block) {
        const int64_t begin = block * kBlock, n = p.count - begin;
        if (n >= kBlock) {
          drop_block(p, keys, block, p.one ? part : p.x + begin, p.y + begin);
        } else {
          if (!p.one) memcpy(part, p.x + begin, n * sizeof(T));
          drop_block(p, keys, block, part, result);
          memcpy(p.y + begin, result, n * sizeof(T));
        }
      }
    });
  };
  run_team(
      threads, [](void* context, int) { (*static_cast<decltype(work)*>(context))(); },
      const_cast<void*>(static_cast<const void*>(&work)));
}

}  // namespace RNN_ISA
}  // namespace torchrnn
