// Which rows are at work at which step, and where their previous state is.
//
// A row counts its own steps s = 0, 1, ..., in the order in which its direction runs: backwards, s = 0 is the
// row's last step. Rows are sorted by falling length, so the rows at work at any s are the first ones.
#pragma once

#include "cpu/tile.h"
#include "params.h"

namespace torchrnn {
inline namespace RNN_ISA {

struct Rows {
  int64_t steps, batch;
  const int64_t* lengths;  // null is all T
  const bool* resets;      // null is none
  int64_t* order;          // [B], caller's memory: the row at each place
  int64_t* active;         // [T], caller's memory: rows at work at s

  void sort() {
    // Counting sort: active[s] is the number of rows longer than s, which is where rows of length s begin.
    for (int64_t s = 0; s < steps; ++s) active[s] = 0;
    for (int64_t b = 0; b < batch; ++b)
      if (length(b) > 0) ++active[length(b) - 1];
    for (int64_t s = steps - 2; s >= 0; --s) active[s] += active[s + 1];
    if (lengths == nullptr) {
      for (int64_t b = 0; b < batch; ++b) order[b] = b;
      return;
    }
    int64_t place = 0;
    for (int64_t length_wanted = steps; length_wanted >= 0; --length_wanted) {
      const int64_t longer = length_wanted == steps ? 0 : active[length_wanted];
      const int64_t all = length_wanted == 0 ? batch : active[length_wanted - 1];
      if (longer == all) continue;
      for (int64_t b = 0; b < batch; ++b)
        if (length(b) == length_wanted) order[place++] = b;
    }
  }

  // Steps at which any row is at work.
  int64_t longest() const {
    int64_t s = steps;
    while (s > 0 && active[s - 1] == 0) --s;
    return s;
  }

  int64_t length(int64_t b) const { return lengths == nullptr ? steps : lengths[b]; }
  int64_t time(int64_t b, int64_t s, bool backwards) const { return backwards ? length(b) - 1 - s : s; }

  // Whether the state must be forgotten before step s of row b. Backwards the mark between the two steps is
  // the one of the later step, and the first step has none.
  bool cut(int64_t b, int64_t s, bool backwards) const {
    if (resets == nullptr || (backwards && s == 0)) return false;
    return resets[time(b, s, backwards) * batch + b + (backwards ? batch : 0)];
  }
};

}  // namespace RNN_ISA
}  // namespace torchrnn
