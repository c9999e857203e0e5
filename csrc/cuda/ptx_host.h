// The functions of cuda/ptx.h, which describes them, on the emulator. A last parameter, which callers leave
// out, is where in the kernel the call stands.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/emulator.h"
#include "cuda/half.h"

namespace torchrnn {
namespace ptx {

using emulator::Site;
using emulator::watch::Off;

inline int thread() {
  const Off off;
  return emulator::cluster->self().thread;
}

inline int block_x() {
  const Off off;
  return emulator::cluster->self().cta->x;
}

inline int block_y() {
  const Off off;
  return emulator::cluster->self().cta->y;
}

inline int cluster_rank() {
  const Off off;
  return emulator::cluster->self().cta->rank;
}

inline int cluster_size() {
  const Off off;
  return int(emulator::cluster->size());
}

inline char* shared_memory() {
  const Off off;
  return emulator::cluster->self().cta->memory.get();
}

inline int anew(int x) { return x; }

// Only the address must be one that can be read.
inline void prefetch(const void* address) { *static_cast<const volatile char*>(address); }

inline void sync_threads(Site site = Site::current()) {
  const Off off;
  emulator::cluster->meet(emulator::cluster->own_cta(), "sync_threads", site, [] {});
}

inline void sync_warp(Site site = Site::current()) {
  const Off off;
  emulator::cluster->meet(emulator::cluster->own_warp(), "sync_warp", site, [] {});
}

inline void sync_cluster(Site site = Site::current()) {
  const Off off;
  emulator::cluster->meet(emulator::cluster->all(), "sync_cluster", site, [] {});
}

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  const Off off;
  emulator::cluster->init(barrier, arrivals);
}

inline void fence_mbarrier_init() {
  const Off off;
  emulator::cluster->fence();
}

inline void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  const Off off;
  emulator::cluster->yield_sometimes();
  emulator::cluster->expect(barrier, bytes);
}

// A wait without end is a deadlock here, which the emulator reports.
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site = Site::current()) {
  const Off off;
  emulator::cluster->wait(barrier, parity, site);
}

template <size_t N>
void store_async(void* local, int rank, const uint32_t (&value)[N], uint64_t* local_barrier) {
  static_assert(N == 2 || N == 4);
  const Off off;
  emulator::cluster->yield_sometimes();
  emulator::cluster->send(local, rank, value, N, local_barrier);
}

// What all lanes of the caller's warp do together: `together` gets every lane's operand, and runs once.
template <typename Operand, typename Together>
void warp_wide(const char* what, const Site& site, Operand& operand, Together together) {
  const Off off;
  emulator::Meeting& warp = emulator::cluster->own_warp();
  warp.operands[emulator::cluster->self().lane()] = &operand;
  emulator::cluster->meet(warp, what, site, [&] {
    Operand* lanes[emulator::kLanes];
    for (int lane = 0; lane < emulator::kLanes; ++lane)
      lanes[lane] = static_cast<Operand*>(warp.operands[lane]);
    together(lanes);
  });
}

template <size_t N>
void load_matrix(uint32_t (&r)[N], const void* row, Site site = Site::current()) {
  static_assert(N == 2 || N == 4);
  struct Operand {
    uint32_t row[4];
    uint32_t (&r)[N];
  } operand{{}, r};
  if (thread() % emulator::kLanes < int(8 * N)) {
    {
      const Off off;
      emulator::cluster->offset(row, 16);
    }
    memcpy(operand.row, row, 16);  // each lane its own, so that a race is seen as one
  }
  warp_wide(N == 2 ? "load_matrix x2" : "load_matrix x4", site, operand, [](Operand** lanes) {
    for (int lane = 0; lane < emulator::kLanes; ++lane) {
      for (size_t i = 0; i < N; ++i) lanes[lane]->r[i] = lanes[8 * i + lane / 4]->row[lane % 4];
    }
  });
}

inline uint32_t transpose_matrix(uint32_t a, Site site = Site::current()) {
  struct Operand { uint32_t a, result; } operand{a, 0};
  warp_wide("transpose_matrix", site, operand, [](Operand** lanes) {
    const auto element = [&](int row, int column) {
      return lanes[row * 4 + column / 2]->a >> (column % 2 * 16) & 0xFFFF;
    };
    for (int lane = 0; lane < emulator::kLanes; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      lanes[lane]->result = element(column, row) | element(column + 1, row) << 16;
    }
  });
  return operand.result;
}

inline uint32_t shuffle(uint32_t value, int lane, Site site = Site::current()) {
  struct Operand {
    uint32_t value, result;
    int from;
  } operand{value, 0, lane};
  warp_wide("shuffle", site, operand, [](Operand** lanes) {
    for (int i = 0; i < emulator::kLanes; ++i) {
      lanes[i]->result = lanes[lanes[i]->from % emulator::kLanes]->value;
    }
  });
  return operand.result;
}

template <typename T>
uint32_t pack(float low, float high) {
  T pair[2];
  cuda::round_to(low, pair[0]);
  cuda::round_to(high, pair[1]);
  return pair[0].bits | uint32_t(pair[1].bits) << 16;
}

inline uint32_t tf32(float x) {
  const uint32_t bits = cuda::bits_of(x);
  if ((bits & 0x7f800000) == 0x7f800000) return x != x ? 0x7fffffff : bits;
  return (bits + 0x1000) & ~0x1fffu;
}

template <typename T>
float low(uint32_t pair) {
  return cuda::widen(T{uint16_t(pair)});
}

template <typename T>
float high(uint32_t pair) {
  return cuda::widen(T{uint16_t(pair >> 16)});
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  struct Operand {
    float (&d)[4];
    const uint32_t (&a)[4];
    const uint32_t (&b)[2];
  } operand{d, a, b};
  warp_wide("mma", site, operand, [](Operand** lanes) {
    constexpr int kWord = std::is_same_v<T, float> ? 1 : 2, kDepth = 8 * kWord;
    float left[16][kDepth], right[8][kDepth];  // a, and b transposed
    const auto split = [](uint32_t word, float* to) {
      if constexpr (kWord == 1)
        to[0] = cuda::of_bits(word & ~0x1fffu);  // A device ignores what TF32 has not.
      else
        to[0] = low<T>(word), to[1] = high<T>(word);
    };
    for (int lane = 0; lane < emulator::kLanes; ++lane) {
      const int r = lane / 4, q = lane % 4;
      for (int i = 0; i < 4; ++i) split(lanes[lane]->a[i], &left[r + i % 2 * 8][(q + i / 2 * 4) * kWord]);
      for (int i = 0; i < 2; ++i) split(lanes[lane]->b[i], &right[r][(q + i * 4) * kWord]);
    }
    for (int lane = 0; lane < emulator::kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float& sum = lanes[lane]->d[i];
        for (int k = 0; k < kDepth; ++k) sum += left[row][k] * right[column][k];
      }
    }
  });
}

}  // namespace ptx
}  // namespace torchrnn
