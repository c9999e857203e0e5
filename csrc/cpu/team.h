// How a layer's work is shared by a team of threads.
#pragma once

#include <sched.h>
#include <time.h>
#include <unistd.h>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <cstdint>

#include "cpu/arena.h"
#include "cpu/kernels.h"
#include "cpu/tile.h"
#include "params.h"

namespace torchrnn {
inline namespace RNN_ISA {

// Ends vector code: the caller's SSE code would be slow beside registers whose upper parts are in use.
// Compilers do this by themselves, but GCC 12 at times also in a function that returns a vector, whose upper
// part is then zero; so setup.py forbids it, and all that other files or threads call holds one of these.
struct ZeroUpper {
#if RNN_VECTOR_BYTES >= 32
  ~ZeroUpper() { _mm256_zeroupper(); }
#else
  ~ZeroUpper() {}
#endif
};

// Flushes denormals for the life of the object: they are worth nothing here and cost a hundred cycles each.
struct FlushDenormals : ZeroUpper {
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

// A part of a direction: of the rows every row_parts-th from row_part on, and of the columns the unit_part-th
// of unit_parts parts. Slices with the same rows form a group, which waits for each other after each step.
struct Slice {
  int row_part, row_parts;
  int unit_part, unit_parts;

  int index() const { return row_part * unit_parts + unit_part; }
  int size() const { return row_parts * unit_parts; }
  // How many of the first `rows` rows are in this slice; its i-th is row_part + i * row_parts.
  int64_t rows(int64_t rows) const { return rows <= row_part ? 0 : ceil_div(rows - row_part, row_parts); }
  int64_t row(int64_t i) const { return row_part + i * row_parts; }
  Range units(int64_t panels) const { return share(panels, unit_part, unit_parts); }
};

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
      const bool cached = weight_bytes / (team / parts) <= cpu::l2_bytes() / 2;
      const int64_t rows = ceil_div(batch, parts), columns = ceil_div(panels, team / parts);
      // Threads that share rows wait for each other, and for each other's outputs to come over.
      const int64_t sharing = parts == team ? 0 : 4 + rows * panels;
      const int64_t cost = max64(rows, cached ? 4 : 10) * columns * 16 + sharing;
      if (cost < best) best = cost, row_parts = parts, unit_parts = team / parts;
    }
  }

  int slices() const { return row_parts * unit_parts; }
  int used() const { return direction_parts * slices(); }
  Slice slice(int index) const { return {index / unit_parts, row_parts, index % unit_parts, unit_parts}; }
};

// A clock for durations of microseconds.
inline uint64_t ticks() {
#ifdef __SSE2__
  return __rdtsc();
#else
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return uint64_t(now.tv_sec) * 1000000000 + uint64_t(now.tv_nsec);
#endif
}

// Work that has phases, each of some parts. The parts of a phase can be done in any order and at the same
// time, once the phase before is finished.
//
// A part has an owner, who does it in each phase, so that what it reads is in its cache. But it is done by
// who claims it first: another member does so when it has waited for the owner for as long as its own part
// took, and in later phases at once, until the owner is back. So nobody waits for a thread that has lost its
// core for longer than it takes to do without; only a part that was begun there must be waited for.
class Phases {
 public:
  struct alignas(64) Part {
    int64_t claimed;  // phases in which somebody has claimed it
    int absent;       // whether its owner was late in the last one
  };

  // For a team of `size` members.
  void init(Part* parts, int count, int size) {
    parts_ = parts, count_ = count, alone_ = size == 1, done_ = 0;
    for (int i = 0; i < count; ++i) parts_[i] = {0, 0};
  }

  int count() const { return count_; }

  // Helps until `end` phases are finished, as the owner of a part or, if own is -1, of none. *took is how
  // long the member's last part took. Calls work(phase, part).
  template <typename Work>
  void run(int own, int64_t end, uint64_t* took, const Work& work) {
    if (alone_) {
      for (; done_ < end * count_; ++done_) work(done_ / count_, int(done_ % count_));
      return;
    }
    int64_t phase = __atomic_load_n(&done_, __ATOMIC_ACQUIRE) / count_;
    for (; phase < end; ++phase) {
      uint64_t since = ticks();
      if (own >= 0 && claim(own, phase)) {
        if (__atomic_load_n(&parts_[own].absent, __ATOMIC_RELAXED) != 0)
          __atomic_store_n(&parts_[own].absent, 0, __ATOMIC_RELAXED);
        finish(phase, own, work);
        const uint64_t now = ticks();
        *took = now - since, since = now;
      }
      while (!finished(phase)) {
        const bool late = ticks() - since > *took;
        for (int part = 0; part < count_; ++part)
          if (part != own && (late || __atomic_load_n(&parts_[part].absent, __ATOMIC_RELAXED) != 0) &&
              claim(part, phase)) {
            __atomic_store_n(&parts_[part].absent, 1, __ATOMIC_RELAXED);
            finish(phase, part, work);
          }
        // What is waited for now has been begun. If it takes long, another may need this core to end it.
        late ? leave_core() : pause();
      }
    }
  }

 private:
  bool finished(int64_t phase) const {
    return __atomic_load_n(&done_, __ATOMIC_ACQUIRE) >= (phase + 1) * count_;
  }
  bool claim(int part, int64_t phase) {
    int64_t before = phase;
    int64_t* claimed = &parts_[part].claimed;
    return __atomic_load_n(claimed, __ATOMIC_RELAXED) == phase &&
           __atomic_compare_exchange_n(claimed, &before, phase + 1, false, __ATOMIC_ACQUIRE,
                                       __ATOMIC_RELAXED);
  }
  template <typename Work>
  void finish(int64_t phase, int part, const Work& work) {
    work(phase, part);
    __atomic_add_fetch(&done_, 1, __ATOMIC_ACQ_REL);
  }
  static void leave_core() { sched_yield(); }
  static void pause() {
#ifdef __SSE2__
    _mm_pause();
#endif
  }

  Part* parts_;
  int count_;
  bool alone_;
  alignas(64) int64_t done_;  // parts, of all phases
};

// Calls use(i) for i in 0..count-1, each once, in the members of a team: who is free takes the next ones.
class Shares {
 public:
  explicit Shares(int64_t count) : count_(count) {}

  template <typename Use>
  void take(int64_t at_once, const Use& use) {
    while (true) {
      const int64_t begin = __atomic_fetch_add(&next_, at_once, __ATOMIC_RELAXED);
      if (begin >= count_) return;
      use(Range{begin, min64(begin + at_once, count_)});
    }
  }

 private:
  const int64_t count_;
  int64_t next_ = 0;
};

// The work of a layer: each direction goes through stages; in one, all its groups of rows go through phases
// of their own, without waiting for each other, and then the direction through one phase, whose parts are its
// slices.
class Schedule {
  // How long a member waits before it has done a part itself, about 10 us.
  static constexpr uint64_t kFirstTurn = 20000;

 public:
  Schedule(const Plan& plan, int64_t directions, int size, Arena& arena)
      : plan_(plan), directions_(int(directions)) {
    const auto parts = [&](int count) { return arena.template get<Phases::Part>(count); };
    for (int d = 0; d < directions_; ++d) {
      together_[d].init(parts(plan.slices()), plan.slices(), size);
      groups_[d] = arena.template get<Phases>(plan.row_parts);
      for (int row = 0; row < plan.row_parts; ++row)
        groups_[d][row].init(parts(plan.unit_parts), plan.unit_parts, size);
    }
  }

  // What member `id` does, and for those who are not there. A direction has stages(d) stages, and after one
  // of them its groups have gone through group_end(d, stage) phases. Calls group(d, phase, slice) and
  // direction(d, stage, slice).
  template <typename Stages, typename GroupEnd, typename Group, typename Direction>
  void run(int id, const Stages& stages, const GroupEnd& group_end, const Group& group,
           const Direction& direction) {
    const int mine = id < plan_.used() ? id / plan_.slices() : -1;
    uint64_t took = kFirstTurn;
    const auto go_through = [&](int d, const Slice* own) {
      for (int64_t stage = 0; stage < stages(d); ++stage) {
        const int64_t end = group_end(d, stage);
        for (int i = 0; i < plan_.row_parts; ++i) {
          const int row = own == nullptr ? i : (own->row_part + i) % plan_.row_parts;
          groups_[d][row].run(own != nullptr && i == 0 ? own->unit_part : -1, end, &took,
                              [&](int64_t phase, int unit) {
                                group(d, phase, Slice{row, plan_.row_parts, unit, plan_.unit_parts});
                              });
        }
        together_[d].run(own == nullptr ? -1 : own->index(), stage + 1, &took,
                         [&](int64_t s, int index) { direction(d, s, plan_.slice(index)); });
      }
    };
    const Slice own = plan_.slice(id % plan_.slices());
    if (mine >= 0)
      for (int d = mine; d < directions_; d += plan_.direction_parts) go_through(d, &own);
    for (int d = 0; d < directions_; ++d)
      if (mine < 0 || d % plan_.direction_parts != mine) go_through(d, nullptr);
  }

 private:
  const Plan plan_;
  const int directions_;
  Phases together_[kMaxDirections];
  Phases* groups_[kMaxDirections];
};

}  // namespace RNN_ISA
}  // namespace torchrnn
