// The forward scan: input projection of a stretch of steps, then step by step the recurrent product and,
// while its tile is still in L1, the cell.
//
// What saturates: with many rows the multiply-add units; with one row the reading of weight_hh, which is why
// units are shared out so that each thread's part stays in its own L2.
//
// Over 400 lines because the stages of a step, which the cells choose among, are read best side by side.
#pragma once

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cpu/arena.h"
#include "cpu/kernels.h"
#include "cpu/norm.h"
#include "cpu/rows.h"
#include "cpu/team.h"
#include "cpu/tile.h"
#include "cpu/weights.h"

namespace torchrnn {
inline namespace RNN_ISA {

// Rows whose products are held at a time: 12 KB for a panel of 64 floats, which share L1 with two blocks of
// weights. A multiple of the heights of tiles.
constexpr int64_t kRowBlock = 48;

// Where one row's values of one step are.
template <typename T>
struct StepRow {
  const T* c_prev;  // [H]
  T* wx;            // [G*H], W x + b, in training the head of the row's tape; or b, if W x is in the product
  T* h;             // [H], the cell's output
  T* y;             // [R], the layer's output: h itself if there is no projection
  T* c;             // [H]
  T* tape;          // [kTape*H], and more, or null
  T* c_out;         // [H] in c_all, or null
  // With masks only.
  const T* mask_h;  // [R] or null
  const T* mask_c;  // [H] or null
  T* carried;       // [R], h times its mask
};

// Everything the slices of one direction share.
template <typename T>
struct ForwardState {
  Rows rows;
  T* zeros;
  T* wx;          // [chunk, B, G*H], inference only
  T* reset_h;     // [B, H], GruResetBefore: r * h
  T* update;      // [B, H], GruResetBefore in inference: z
  T* cell_out;    // [B, H], projection: h before it
  T* carried;     // [2, B, R], mask_h: of step s at s % 2
  int64_t chunk;  // steps whose input projection is made at a time
};

// The variations of a cell at one vector of hidden units.
template <typename Policy, typename V, typename T, typename Lanes>
RNN_FN Policy policy_at(const LayerParams<T>& p, int d, int64_t unit, Lanes m) {
  Policy policy{};
  if constexpr (Policy::kVaried) {
    const T* peephole = p.weights[d].peephole;
    policy.activation = p.activation;
    policy.peeps = peephole != nullptr;
    if (policy.peeps) {
      policy.peep_i = V::load(peephole + unit, m);
      policy.peep_f = V::load(peephole + p.hidden + unit, m);
      policy.peep_o = V::load(peephole + 2 * p.hidden + unit, m);
    }
    policy.clips = __builtin_isfinite(p.cell_clip);
    policy.bound = V(p.cell_clip);
  }
  return policy;
}

// Whether a call has a variation that only this policy knows.
template <typename T>
bool is_varied(const LayerParams<T>& p) {
  const bool known =
      p.activation == Activation::kTanh || (p.cell == Cell::kRnn && p.activation == Activation::kRelu);
  return !known || p.weights[0].peephole != nullptr || __builtin_isfinite(p.cell_clip) ||
         __builtin_isfinite(p.proj_clip) || p.mask_h != nullptr || p.mask_c != nullptr;
}

// Where in a row of the tape the projection before it is clipped is, and the size of the row.
template <typename C, typename T>
int64_t tape_clip(const LayerParams<T>& p) {
  return C::kTape * p.hidden + (p.weights[0].norm_gain == nullptr ? 0 : tape_of_norm(p.hidden));
}
template <typename C, typename T>
int64_t tape_size(const LayerParams<T>& p) {
  return tape_clip<C>(p) + (__builtin_isfinite(p.proj_clip) ? p.outputs : 0);
}

// One row's mask at time t, or null.
template <typename T>
RNN_FN const T* mask_row(const T* mask, int64_t steps, int64_t d, int64_t t, int64_t batch, int64_t b,
                         int64_t size) {
  return mask == nullptr ? nullptr : mask + ((d * steps + (steps == 1 ? 0 : t)) * batch + b) * size;
}

template <typename T, template <typename> class CellOf, typename Policy>
struct Forward {
  using V = VecOf<T>;
  using C = CellOf<V>;
  static constexpr bool kVaried = Policy::kVaried, kNormed = Policy::kNormed;
  static constexpr int N = V::kSize;
  static constexpr int G = C::kGates;
  using W = Weights<T, CellOf>;
  static constexpr bool kTwoHalves = W::kTwoHalves;
  static constexpr int kFirst = W::kFirst, U = W::U;
  using Recurrent = typename W::Recurrent;
  using Input = typename W::Input;
  using Second = typename W::Second;

  // What one thread needs for the part that it is at.
  struct Scratch {
    StepRow<T>* step;  // [rows of a slice]
    const T** left;    // [max(rows of a slice, kRowBlock)], rows of a product
    const T** inputs;  // [rows of a slice], rows of x
    T* acc;            // [kRowBlock, panel width]
    // Null unless a panel is packed just before its use: what is multiplied in one step only does not pay to
    // be written to memory and read again.
    T* input_panel;      // [I, panel width]
    T* recurrent_panel;  // [R, panel width]
  };

  const LayerParams<T>& p;
  W weights[kMaxDirections];
  ForwardState<T> state[kMaxDirections];
  int64_t turn;  // Of the calls that the calling thread makes: so even single steps sweep to and fro.
  const Plan plan;
  Schedule schedule;
  Scratch* scratch;  // [threads]

  bool backwards(int d) const { return p.reverse || d == 1; }
  bool has_second() const { return kTwoHalves || p.projected; }
  int64_t y_stride() const { return p.directions * p.outputs; }
  T* y(int d, int64_t t, int64_t b) const { return p.y + (t * p.batch + b) * y_stride() + d * p.outputs; }
  T* tape(int d, int64_t t, int64_t b) const {
    return p.tape + ((d * p.steps + t) * p.batch + b) * tape_size<C>(p);
  }
  const T* mask_h(int d, int64_t t, int64_t b) const {
    return mask_row(p.mask_h, p.mask_h_steps, d, t, p.batch, b, p.outputs);
  }

  // Takes all memory, so that nothing can fail once the team is at work.
  Forward(const LayerParams<T>& params, int threads, Arena& arena)
      : p(params),
        plan(threads, p.directions, p.batch, ceil_div(p.hidden, int64_t(Recurrent::kUnits)),
             G * p.hidden * p.outputs * int64_t(sizeof(T))),
        schedule(plan, p.directions, threads, arena) {
    static thread_local int64_t calls = 0;
    turn = calls++ % 2;
    const int64_t widest = max64(max64(p.inputs, p.hidden), p.outputs);
    T* zeros = arena.template get<T>(widest);
    // The part of the input projection that is ahead of the scan should still be in L2 when it is used, but
    // have rows enough to use each weight that it reads several times.
    const int64_t chunk_rows = max64(96, (512 * 1024) / max64(1, G * p.hidden * int64_t(sizeof(T))));
    const T* packed = p.packed;
    const int64_t all_rows = p.steps * p.batch;
    const bool by_panel = packed == nullptr && p.steps == 1 && kSameUnits && plan.row_parts == 1;
    for (int d = 0; d < p.directions; ++d) {
      W& w = weights[d];
      w = W(p, d, zeros);
      if (p.packed != nullptr) {
        packed += w.place(p, const_cast<T*>(packed), INT64_MAX);
      } else {
        w.place(p, arena.template get<T>(w.place(p, nullptr, all_rows, by_panel)), all_rows, by_panel);
        w.add_biases(p, d);
      }
      ForwardState<T>& s = state[d];
      s = {};
      s.rows = {p.steps,
                p.batch,
                p.lengths,
                p.resets,
                arena.template get<int64_t>(p.batch),
                arena.template get<int64_t>(p.steps)};
      s.rows.sort();
      s.zeros = zeros;
      s.chunk = min64(p.steps, ceil_div(chunk_rows, max64(p.batch, 1)));
      if (p.tape == nullptr) s.wx = arena.template get<T>(s.chunk * p.batch * G * p.hidden);
      if (kTwoHalves) s.reset_h = arena.template get<T>(p.batch * p.hidden);
      if (kTwoHalves && p.tape == nullptr) s.update = arena.template get<T>(p.batch * p.hidden);
      if (p.projected) s.cell_out = arena.template get<T>(p.batch * p.hidden);
      if (kVaried && p.mask_h != nullptr) s.carried = arena.template get<T>(2 * p.batch * p.outputs);
    }
    for (int64_t k = 0; k < widest; ++k) zeros[k] = T(0);
    const int64_t rows = ceil_div(p.batch, plan.row_parts);
    const auto panel = [&](int64_t depth, int64_t width) {
      return by_panel && all_rows >= pack_from(depth) ? arena.template get<T>(depth * width) : nullptr;
    };
    scratch = arena.template get<Scratch>(threads);
    for (int i = 0; i < threads; ++i)
      scratch[i] = {
          arena.template get<StepRow<T>>(rows), arena.template get<const T*>(max64(rows, kRowBlock)),
          arena.template get<const T*>(rows),   arena.template get<T>(kRowBlock * 4 * N),
          panel(p.inputs, Input::kWidth),       panel(p.outputs, Recurrent::kWidth)};
  }

  // How many threads have something to do.
  static int useful_threads(const LayerParams<T>& p, int threads) {
    return int(
        min64(threads, max64(1, p.directions * p.batch * ceil_div(p.hidden, int64_t(Recurrent::kUnits)))));
  }

  // The stages of a step, each a phase of a group of rows, and before them, for a few steps at a time, their
  // input projection, if it is not made panel by panel within the first.
  int64_t stages() const { return 1 + kNormed + has_second(); }
  static constexpr bool kSameUnits = int(Input::kUnits) == int(Recurrent::kUnits);  // in a panel
  bool is_fused(int d) const { return state[d].chunk == 1 && kSameUnits; }
  int64_t phases(int d) const {
    const int64_t steps = state[d].rows.longest();
    return steps * stages() + (is_fused(d) ? 0 : ceil_div(steps, state[d].chunk));
  }

  // One thread's work.
  void run(int id) {
    const FlushDenormals flush;
    Scratch& own = scratch[id];
    schedule.run(
        id, [](int) { return 2; }, [&](int d, int64_t stage) { return stage == 0 ? 0 : phases(d); },
        [&](int d, int64_t phase, const Slice& slice) { Part(*this, d, slice, own).run(phase); },
        [&](int d, int64_t stage, const Slice& slice) {
          Part part(*this, d, slice, own);
          stage == 0 ? part.prepare() : part.finish();
        });
  }

  // A slice of one direction in the hands of one thread.
  struct Part {
    const Forward& f;
    const LayerParams<T>& p;
    const W& weights;
    const ForwardState<T>& state;
    const int d;
    const Slice slice;
    const bool back;
    const int64_t mine;  // rows
    StepRow<T>* const step;
    const T** const left;
    const T** const inputs;
    T* const acc;
    T* const input_panel;
    T* const recurrent_panel;
    const bool fused;  // each panel's input projection is made just before its recurrent product
    const bool added;  // and that is added to it at once

    Part(const Forward& forward, int direction, const Slice& slice_, const Scratch& scratch)
        : f(forward),
          p(forward.p),
          weights(forward.weights[direction]),
          state(forward.state[direction]),
          d(direction),
          slice(slice_),
          back(forward.backwards(direction)),
          mine(slice_.rows(forward.p.batch)),
          step(scratch.step),
          left(scratch.left),
          inputs(scratch.inputs),
          acc(scratch.acc),
          input_panel(scratch.input_panel),
          recurrent_panel(scratch.recurrent_panel),
          fused(forward.is_fused(direction)),
          added(fused && !kNormed && C::kHiddenBias < 0) {}

    void run(int64_t phase) {
      const int64_t stages = f.stages(), period = state.chunk * stages + !fused;
      const int64_t first = phase / period * state.chunk, at = phase % period - !fused;
      if (at < 0) return project_inputs(first);
      const int64_t s = first + at / stages, stage = at % stages;
      const int64_t count = slice.rows(state.rows.active[s]);
      place(s, count);
      if (stage == 0) return first_half(s, count);
      if constexpr (kNormed)
        if (stage == 1) {
          for (int64_t i = slice.unit_part; i < count; i += slice.unit_parts) norm_row(step[i]);
          return;
        }
      second_half(s, count);
    }

    // Packs the slice's share of the weights, and fills c_n, which is the running c, for its own units, which
    // no other slice reads or writes.
    void prepare() {
      if (p.packed == nullptr) weights.pack(slice);
      if (C::kMemory < 0 || p.batch == 0) return;
      const Range units = own_units(weights.recurrent);
      for (int64_t i = 0; i < mine; ++i) {
        const int64_t at = (d * p.batch + state.rows.order[slice.row(i)]) * p.hidden;
        for (int64_t u = units.begin; u < units.end; ++u)
          p.c_n[at + u] = p.c0 == nullptr ? T(0) : p.c0[at + u];
      }
    }

    template <typename Matrix>
    Range own_units(const Matrix& matrix) const {
      const Range panels = slice.units(matrix.panels());
      return {min64(panels.begin * Matrix::kUnits, matrix.hidden),
              min64(panels.end * Matrix::kUnits, matrix.hidden)};
    }

    T* wx_row(int64_t s, int64_t b) const {
      if (p.tape != nullptr) return f.tape(d, state.rows.time(b, s, back), b);
      return state.wx + ((s % state.chunk) * p.batch + b) * G * p.hidden;
    }

    T* carried(int64_t s, int64_t b) const { return state.carried + (s % 2 * p.batch + b) * p.outputs; }

    const T* h_prev(int64_t b, int64_t s) const {
      if (state.rows.cut(b, s, back)) return state.zeros;
      if (s > 0 && kVaried && state.carried != nullptr) return carried(s - 1, b);
      if (s > 0) return f.y(d, state.rows.time(b, s - 1, back), b);
      return p.h0 == nullptr ? state.zeros : p.h0 + (d * p.batch + b) * p.outputs;
    }

    // wx = W x + b for the steps s, ..., s + chunk - 1 of the slice's rows and units.
    void project_inputs(int64_t begin) {
      const int64_t end = min64(begin + state.chunk, p.steps);
      T* out[kRowBlock];
      int64_t s = begin, i = 0, blocks = 0;
      while (s < end) {
        int64_t count = 0;
        for (; s < end && count < kRowBlock; ++i) {
          if (i == slice.rows(state.rows.active[s])) {
            i = -1, ++s;
            continue;
          }
          const int64_t b = state.rows.order[slice.row(i)];
          left[count] = p.x + state.rows.time(b, s, back) * p.x_stride_t + b * p.x_stride_b;
          out[count++] = wx_row(s, b);
        }
        const Sweep panels(slice.units(weights.input.panels()), blocks++);
        for (int64_t n = 0; n < panels.size() && count > 0; ++n)
          project_panel(weights.input, panels[n], panels[n + 1], count, left,
                        [&](int64_t r) { return out[r]; });
      }
    }

    // wx = W x + b for one panel of units and `count` rows of x, row r to out(r).
    template <typename Out>
    RNN_FN void project_panel(const Input& input, int64_t j, int64_t next, int64_t count,
                              const T* const* rows, const Out& out) {
      input.product(j, next, count, rows, acc);
      for (int v = 0; v < Input::kUnits / N; ++v) {
        const int64_t unit = j * Input::kUnits + v * N;
        V::with_lanes(p.hidden - unit, [&](auto m) {
          for (int64_t r = 0; r < count; ++r)
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g) {
              const V sum = V::load(acc + r * Input::kWidth + (v * G + g) * N);
              (sum + V::load(weights.bias_x + g * p.hidden + unit, m)).store(out(r) + g * p.hidden + unit, m);
            }
        });
      }
    }

    // Fills step[], left[] and inputs[] for step s of the first `count` of the slice's rows.
    void place(int64_t s, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t b = state.rows.order[slice.row(i)], t = state.rows.time(b, s, back);
        StepRow<T>& row = step[i];
        left[i] = h_prev(b, s);
        inputs[i] = p.x + t * p.x_stride_t + b * p.x_stride_b;
        row.y = f.y(d, t, b);
        row.h = p.projected ? state.cell_out + b * p.hidden : row.y;
        row.wx = added ? weights.bias_x : wx_row(s, b);
        row.tape = p.tape == nullptr ? nullptr : wx_row(s, b);
        if constexpr (kVaried) {
          row.mask_h = f.mask_h(d, t, b);
          row.mask_c = mask_row(p.mask_c, p.mask_c_steps, d, t, p.batch, b, p.hidden);
          if (row.mask_h != nullptr) row.carried = carried(s, b);
        }
        if (C::kMemory < 0) continue;
        row.c = p.c_n + (d * p.batch + b) * p.hidden;
        row.c_prev = state.rows.cut(b, s, back) ? state.zeros : row.c;
        row.c_out =
            p.c_all == nullptr ? nullptr : p.c_all + ((t * p.batch + b) * p.directions + d) * p.hidden;
      }
    }

    void first_half(int64_t s, int64_t count) {
      const Sweep panels(slice.units(weights.recurrent.panels()), s + f.turn);
      for (int64_t n = 0; n < panels.size(); ++n) {
        const int64_t j = panels[n], after = recurrent_panel == nullptr ? panels[n + 1] : j;
        const Input input = weights.input.at_panel(j, input_panel);
        const Recurrent matrix = weights.recurrent.at_panel(j, recurrent_panel);
        for (int64_t i0 = 0; i0 < count; i0 += kRowBlock) {
          const int64_t block = min64(kRowBlock, count - i0);
          if (added)
            input.product(j, j, block, inputs + i0, acc);
          else if (fused)
            project_panel(input, j, j, block, inputs + i0, [&](int64_t r) { return step[i0 + r].wx; });
          matrix.product(j, i0 + block < count ? j : after, block, left + i0, acc, added);
          for (int v = 0; v < U; ++v) {
            const int64_t unit = j * Recurrent::kUnits + v * N;
            V::with_lanes(p.hidden - unit, [&](auto m) {
              const Policy policy = policy_at<Policy, V>(p, d, unit, m);
              const T* sums = acc + v * kFirst * N;
              for (int64_t i = i0; i < i0 + block; ++i, sums += Recurrent::kWidth) {
                if constexpr (kNormed)
                  add_sums(i, sums, unit, m);
                else if constexpr (kTwoHalves)
                  reset_and_update(i, sums, unit, m);
                else
                  cell(policy, i, sums, unit, m);
              }
            });
          }
        }
      }
    }

    // The cell on one vector of units of row i, whose recurrent sums are sums[G][N].
    template <typename Lanes>
    RNN_FN void cell(const Policy& policy, int64_t i, const T* sums, int64_t unit, Lanes m) {
      const StepRow<T>& row = step[i];
      V wx[G], rh[G], tape[C::kTape];
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) {
        wx[g] = V::load(row.wx + g * p.hidden + unit, m);
        rh[g] = V::load(sums + g * N);
      }
      if constexpr (C::kHiddenBias >= 0) rh[C::kHiddenBias] += V::load(weights.bias_h + unit, m);
      typename C::State prev{V(T(0)), V(T(0))};
      if (C::kReadsH) prev.h = V::load(left[i] + unit, m);
      if (C::kMemory >= 0) prev.c = V::load(row.c_prev + unit, m);
      const typename C::State next = C::forward(policy, wx, rh, prev, tape);
      store_state(row, next.h, next.c, unit, m);
      if (row.tape == nullptr) return;
#pragma GCC unroll 8
      for (int k = 0; k < C::kTape; ++k) tape[k].store(row.tape + k * p.hidden + unit, m);
    }

    template <typename Lanes>
    RNN_FN void store_state(const StepRow<T>& row, V h, V c, int64_t unit, Lanes m) {
      h.store(row.h + unit, m);
      if (!p.projected) carry(row, h, unit, m);
      if (C::kMemory < 0) return;
      V carried_c = c;
      if (kVaried && row.mask_c != nullptr) carried_c = carried_c * V::load(row.mask_c + unit, m);
      carried_c.store(row.c + unit, m);
      if (row.c_out != nullptr) c.store(row.c_out + unit, m);
    }

    // wx += W h, for the rows that are normalised whole.
    template <typename Lanes>
    RNN_FN void add_sums(int64_t i, const T* sums, int64_t unit, Lanes m) {
      for (int g = 0; g < G; ++g) {
        T* to = step[i].wx + g * p.hidden + unit;
        (V::load(to, m) + V::load(sums + g * N)).store(to, m);
      }
    }

    // The cell of a whole row with layer normalisation; row.wx holds its sums, and then the normalised ones.
    void norm_row(const StepRow<T>& row) {
      const int64_t H = p.hidden;
      const auto& w = p.weights[d];
      // In inference the first gate's place is free for c by the time it is written.
      T* c_sum = row.tape == nullptr ? row.wx : row.tape + kNormedC * H;
      T scale[5];
      for (int g = 0; g < 4; ++g)
        scale[g] = Norm<T>::normalise(row.wx + g * H, H, p.norm_eps, row.wx + g * H);
      const auto each = [&](const auto& use) {
        for (int64_t unit = 0; unit < H; unit += N)
          V::with_lanes(H - unit, [&](auto m) { use(policy_at<Policy, V>(p, d, unit, m), unit, m); });
      };
      each([&](const Policy& policy, int64_t unit, auto m) {
        const V c_prev = V::load(row.c_prev + unit, m);
        const NormedGates<T, Policy> gates(p, d, policy, row.wx, c_prev, unit, m);
        (gates.f * c_prev + gates.i * gates.g).store(c_sum + unit, m);
      });
      scale[4] = Norm<T>::normalise(c_sum, H, p.norm_eps, c_sum);
      each([&](const Policy& policy, int64_t unit, auto m) {
        const int64_t o = 3 * H + unit;
        V sum_o = V::load(row.wx + o, m) * V::load(w.norm_gain + o, m) + V::load(w.norm_shift + o, m);
        const V c = policy.clip(V::load(c_sum + unit, m) * V::load(w.norm_gain + 4 * H + unit, m) +
                                V::load(w.norm_shift + 4 * H + unit, m));
        policy.see_new(c, sum_o);
        store_state(row, sigmoid(sum_o) * policy.activate(c), c, unit, m);
        if (row.tape != nullptr) c.store(row.tape + C::kMemory * H + unit, m);
      });
      if (row.tape != nullptr) memcpy(row.tape + (kNormedC + 1) * H, scale, sizeof scale);
    }

    // Hands an output on to the next step, if that is not to read it from y.
    template <typename Lanes>
    RNN_FN void carry(const StepRow<T>& row, V h, int64_t unit, Lanes m) {
      if constexpr (kVaried)
        if (row.mask_h != nullptr) (h * V::load(row.mask_h + unit, m)).store(row.carried + unit, m);
    }

    // GruResetBefore, first half: r and z, and r * h for the second product.
    template <typename Lanes>
    RNN_FN void reset_and_update(int64_t i, const T* sums, int64_t unit, Lanes m) {
      if constexpr (kTwoHalves) {
        const StepRow<T>& row = step[i];
        const int64_t b = state.rows.order[slice.row(i)];
        const V wx[2] = {V::load(row.wx + unit, m), V::load(row.wx + p.hidden + unit, m)};
        const V rh[2] = {V::load(sums), V::load(sums + N)};
        V r, z;
        C::gates(wx, rh, r, z);
        (r * V::load(left[i] + unit, m)).store(state.reset_h + b * p.hidden + unit, m);
        z.store((row.tape == nullptr ? state.update + b * p.hidden : row.tape + p.hidden) + unit, m);
        if (row.tape != nullptr) r.store(row.tape + unit, m);
      }
    }

    void second_half(int64_t s, int64_t count) {
      const Second& matrix = weights.second;
      const Sweep panels(slice.units(matrix.panels()), s);
      const T* source[kRowBlock];
      for (int64_t n = 0; n < panels.size(); ++n)
        for (int64_t i0 = 0; i0 < count; i0 += kRowBlock) {
          const int64_t j = panels[n], block = min64(kRowBlock, count - i0);
          for (int64_t i = 0; i < block; ++i) {
            const int64_t b = state.rows.order[slice.row(i0 + i)];
            source[i] = (kTwoHalves ? state.reset_h : state.cell_out) + b * p.hidden;
          }
          matrix.product(j, i0 + block < count ? j : panels[n + 1], block, source, acc);
          for (int v = 0; v < 4; ++v) {
            const int64_t unit = j * Second::kUnits + v * N;
            V::with_lanes(matrix.hidden - unit, [&](auto m) {
              Policy policy{};
              if constexpr (kTwoHalves) policy = policy_at<Policy, V>(p, d, unit, m);
              const T* sums = acc + v * N;
              for (int64_t i = i0; i < i0 + block; ++i, sums += Second::kWidth)
                second_output(policy, i, V::load(sums), unit, m);
            });
          }
        }
    }

    template <typename Lanes>
    RNN_FN void second_output(const Policy& policy, int64_t i, V sum, int64_t unit, Lanes m) {
      if constexpr (kTwoHalves) {
        const StepRow<T>& row = step[i];
        const int64_t b = state.rows.order[slice.row(i)];
        const T* update = row.tape == nullptr ? state.update + b * p.hidden : row.tape + p.hidden;
        const V n = C::candidate(policy, V::load(row.wx + 2 * p.hidden + unit, m), sum);
        const V h = C::output(V::load(update + unit, m), n, V::load(left[i] + unit, m));
        h.store(row.y + unit, m);
        carry(row, h, unit, m);
        if (row.tape == nullptr) return;
        n.store(row.tape + 2 * p.hidden + unit, m);
        h.store(row.tape + C::kOutput * p.hidden + unit, m);
      } else {
        const StepRow<T>& row = step[i];
        if (kVaried && __builtin_isfinite(p.proj_clip)) {
          if (row.tape != nullptr) sum.store(row.tape + tape_clip<C>(p) + unit, m);
          sum = at_most(at_least(sum, V(-p.proj_clip)), V(p.proj_clip));
        }
        sum.store(row.y + unit, m);
        carry(row, sum, unit, m);
      }
    }

    // Final states, and zeros past the end of each row.
    void finish() {
      for (int64_t i = slice.unit_part; i < mine; i += slice.unit_parts) {
        const int64_t b = state.rows.order[slice.row(i)], length = state.rows.length(b);
        const T* last = length > 0        ? f.y(d, state.rows.time(b, length - 1, back), b)
                        : p.h0 != nullptr ? p.h0 + (d * p.batch + b) * p.outputs
                                          : state.zeros;
        T* h_n = p.h_n + (d * p.batch + b) * p.outputs;
        if (h_n != last) memcpy(h_n, last, p.outputs * sizeof(T));  // A step of a cell has no y apart.
        if (kVaried && p.mask_h != nullptr && length > 0) {
          const T* mask = f.mask_h(d, state.rows.time(b, length - 1, back), b);
          for (int64_t k = 0; k < p.outputs; ++k) h_n[k] *= mask[k];
        }
        for (int64_t t = length; t < p.steps; ++t) {
          if (p.tape != nullptr) memset(f.tape(d, t, b), 0, tape_size<C>(p) * sizeof(T));
          memset(f.y(d, t, b), 0, p.outputs * sizeof(T));
          if (p.c_all != nullptr)
            memset(p.c_all + ((t * p.batch + b) * p.directions + d) * p.hidden, 0, p.hidden * sizeof(T));
        }
      }
    }
  };
};

template <typename T, template <typename> class CellOf, typename Policy = Plain>
void run_forward(const LayerParams<T>& p, int threads, cpu::RunTeam run_team) {
  using F = Forward<T, CellOf, Policy>;
  if (p.batch == 0) return;
  threads = F::useful_threads(p, threads);
  Arena arena;
  F forward(p, threads, arena);
  run_team(threads, [](void* f, int id) { static_cast<F*>(f)->run(id); }, &forward);
}

}  // namespace RNN_ISA
}  // namespace torchrnn
