// How a layer's work is shared by a team of threads that run at the same time.
#pragma once

#include <sched.h>
#include <unistd.h>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <cstdint>

#include "cpu/tile.h"

namespace torchrnn {
inline namespace RNN_ISA {

// Waits a little by spinning, since a step takes microseconds, then yields: another process may need the core
// on which a member of the team is to arrive.
struct alignas(64) Barrier {
  int arrived = 0;
  int phase = 0;

  void wait(int size) {
    if (size == 1) return;
    const int before = __atomic_load_n(&phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&phase, before + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&phase, __ATOMIC_ACQUIRE) == before; ++spins) {
      if (spins < 4000) {
#ifdef __SSE2__
        _mm_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }
};

// Flushes denormals for the life of the object: they are worth nothing here and cost a hundred cycles each.
struct FlushDenormals {
#ifdef __SSE2__
  unsigned saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | 0x8040); }  // FTZ and DAZ
  ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

struct Range { int64_t begin, end; };

// Part `id` of `parts` about equal parts of 0..count-1.
RNN_FN Range share(int64_t count, int64_t id, int64_t parts) {
  return {count * id / parts, count * (id + 1) / parts};
}

// A range that is walked upwards at even steps and downwards at odd ones: when its data is larger than a
// cache, what was read last is still there and is read first.
struct Sweep {
  Range range;
  bool down;

  Sweep(Range range_, int64_t step) : range(range_), down(step % 2 == 1) {}
  int64_t size() const { return range.end - range.begin; }
  // The i-th index of the walk; past its end the last one, where the next walk begins.
  int64_t operator[](int64_t i) const {
    i = min64(i, size() - 1);
    return down ? range.end - 1 - i : range.begin + i;
  }
};

// One thread's part of a direction: every rows_step-th row from row_first on, and the units-th of unit_parts
// parts of the columns. Threads with the same rows form a group that meets at a barrier after each step.
struct Slice {
  int row_part, row_parts;
  int unit_part, unit_parts;

  int index() const { return row_part * unit_parts + unit_part; }
  int size() const { return row_parts * unit_parts; }
  // How many of the first `rows` rows are this thread's; its i-th is row_part + i * row_parts.
  int64_t rows(int64_t rows) const { return rows <= row_part ? 0 : ceil_div(rows - row_part, row_parts); }
  int64_t row(int64_t i) const { return row_part + i * row_parts; }
  Range units(int64_t panels) const { return share(panels, unit_part, unit_parts); }
};

// The size of a core's own cache; 1 MB where the system does not tell.
inline int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

// How a team of `size` shares `directions` directions: whole directions first, since they do not wait for
// each other, then rows or units.
struct Plan {
  int direction_parts, row_parts, unit_parts;

  // weight_bytes is what one direction reads at each step.
  Plan(int size, int64_t directions, int64_t batch, int64_t panels, int64_t weight_bytes) {
    direction_parts = directions == 2 && size % 2 == 0 ? 2 : 1;
    const int team = size / direction_parts;
    row_parts = 1, unit_parts = team;
    int64_t best = INT64_MAX;
    for (int parts = 1; parts <= team; ++parts) {
      if (team % parts != 0) continue;
      // Up to so many rows cost no more than one, since reading the weights is the work then: from L2, or
      // from what is behind it.
      const bool cached = weight_bytes / (team / parts) <= l2_bytes() / 2;
      const int64_t rows = ceil_div(batch, parts), columns = ceil_div(panels, team / parts);
      // Threads that share rows wait for each other, and for each other's outputs to come over.
      const int64_t sharing = parts == team ? 0 : 4 + rows * panels;
      const int64_t cost = max64(rows, cached ? 4 : 10) * columns * 16 + sharing;
      if (cost < best) best = cost, row_parts = parts, unit_parts = team / parts;
    }
  }

  int used() const { return direction_parts * row_parts * unit_parts; }
  int direction_part(int id) const { return id / (row_parts * unit_parts); }
  Slice slice(int id) const {
    const int i = id % (row_parts * unit_parts);
    return {i / unit_parts, row_parts, i % unit_parts, unit_parts};
  }
};

}  // namespace RNN_ISA
}  // namespace torchrnn
