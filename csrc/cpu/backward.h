// The backward scan: step by step the gradients by the gates, each step's recurrent product and cell in one
// pass as in the forward scan; and every few hundred rows, while these are in the cache, the gradients by the
// weights and the input as large products.
//
// Over 400 lines for the reason of forward.h.
#pragma once

#include "cpu/forward.h"
#include "cpu/outer.h"
#include "cpu/weight_gradients.h"

namespace torchrnn {
inline namespace RNN_ISA {

// Where one row's values of one step are.
template <typename T>
struct BackwardRow {
  const T* tape;    // [kTape*H]
  const T* c_prev;  // [H]
  const T* h_prev;  // [R]
  const T* dy;      // [R] or null
  const T* dc_all;  // [H] or null
  T* dgates;        // [kGateGrads*H]
  T* carry_h;       // [R], gradient by this step's h from later steps other than through R
  T* carry_c;       // [H], gradient by this step's c from later steps
  T* dh;            // [R], projection: the whole gradient by this step's output
  T* aside;  // [H], the left-hand rows of the second product's weight gradient: r * h, or h before projection
  bool cut;  // nothing goes to the previous step
  // With masks only; null where there is none.
  const T* mask_h;       // [R], of this step
  const T* mask_c;       // [H], of this step
  const T* mask_h_prev;  // [R], of the previous step: h_prev is the output times it
  const T* mask_c_prev;  // [H]
  const T* y_prev;       // [R], the previous output
  // With layer normalisation only.
  T* dh_cell;  // [H], the gradient by the cell's output
  T* dnorm;    // [5*H], the gradients by the normalised sums and c
};

// Rows from which it pays to copy the weights into panels, whose rows lie side by side.
constexpr int64_t kCopyFrom = 24;

template <typename T, template <typename> class CellOf, typename Policy_>
struct Backward {
  using V = VecOf<T>;
  using C = CellOf<V>;
  using Policy = Policy_;
  static constexpr bool kVaried = Policy::kVaried, kNormed = Policy::kNormed;
  static constexpr int N = V::kSize;
  static constexpr int G = C::kGates;
  static constexpr int D = C::kGateGrads;
  static constexpr bool kTwoHalves = C::kHalves == 2;
  // Blocks of the gate gradients that go through the first recurrent product, and which gate is their first.
  static constexpr int kRecurrent = kTwoHalves ? 2 : G;
  static constexpr int kRotate = C::kInputGrads == 0 ? 0 : G - 1;
  using Matrix = ColumnMatrix<T>;

  struct State {
    Rows rows;
    Matrix recurrent, second, input;
    T* dgates;    // [chunk + 1, B, D*H], of step s at s % (chunk + 1), as the next two
    T* dh;        // [chunk + 1, B, R], projection only
    T* aside;     // [chunk + 1, B, H], GruResetBefore and projection only
    T* carried;   // [chunk + 1, B, R], mask_h only: the h that step s starts from
    T* dx;        // [T, B, I]; of direction 1 apart, to be added at the end
    T* carry_h;   // [B, R]
    T* carry_c;   // [B, H]
    T* dh_cell;   // [B, H], layer normalisation only, as the next one
    T* dnorm;     // [chunk + 1, B, 5*H]
    T* bias;      // [D*H], sums of the gate gradients
    T* peephole;  // [3*H], sums of gate gradients times c
    T* norm;      // [2, 5*H], sums for gain and shift
  };

  // What one thread needs for the part that it is at.
  struct Scratch {
    BackwardRow<T>* step;  // [rows of a slice]
    const T** left;        // [rows of a slice]
    T* acc;                // [kRowBlock, kWidth]
    WeightScratch<T> weights;
  };

  const BackwardParams<T>& q;
  const LayerParams<T>& p;
  T* zeros;
  int64_t chunk;  // steps whose gate gradients are held, until they have gone into the large products
  State state[kMaxDirections];
  const Plan plan;
  Schedule schedule;
  Phases last;       // the sum of the directions' dx
  Scratch* scratch;  // [threads]

  bool backwards(int d) const { return p.reverse || d == 1; }
  bool has_second() const { return kTwoHalves || p.projected; }
  bool needs_weights() const { return q.needs_weights; }
  int64_t at(int64_t t, int64_t b) const { return t * p.batch + b; }
  const T* tape(int d, int64_t t, int64_t b) const {
    return p.tape + (d * p.steps * p.batch + at(t, b)) * tape_size<C>(p);
  }
  const T* output(int d, int64_t t, int64_t b) const {
    if (C::kOutput >= 0) return tape(d, t, b) + C::kOutput * p.hidden;
    return p.y + at(t, b) * p.directions * p.outputs + d * p.outputs;
  }

  int64_t slot(int64_t s, int64_t b) const { return s % (chunk + 1) * p.batch + b; }
  T* dgates(int d, int64_t s, int64_t b) const { return state[d].dgates + slot(s, b) * D * p.hidden; }
  T* dh(int d, int64_t s, int64_t b) const { return state[d].dh + slot(s, b) * p.outputs; }
  T* aside(int d, int64_t s, int64_t b) const { return state[d].aside + slot(s, b) * p.hidden; }
  T* carried(int d, int64_t s, int64_t b) const { return state[d].carried + slot(s, b) * p.outputs; }
  T* dnorm(int d, int64_t s, int64_t b) const { return state[d].dnorm + slot(s, b) * 5 * p.hidden; }
  const T* mask_h(int d, int64_t t, int64_t b) const {
    return mask_row(p.mask_h, p.mask_h_steps, d, t, p.batch, b, p.outputs);
  }
  const T* mask_c(int d, int64_t t, int64_t b) const {
    return mask_row(p.mask_c, p.mask_c_steps, d, t, p.batch, b, p.hidden);
  }

  // A row's initial state.
  const T* initial(const T* states, int d, int64_t b, int64_t size) const {
    return states == nullptr ? zeros : states + (d * p.batch + b) * size;
  }

  // Takes all memory, so that nothing can fail once the team is at work.
  Backward(const BackwardParams<T>& params, int threads, Arena& arena)
      : q(params),
        p(params.layer),
        plan(threads, p.directions, p.batch, ceil_div(p.outputs, int64_t(Matrix::kWidth)),
             G * p.hidden * p.outputs * int64_t(sizeof(T))),
        schedule(plan, p.directions, threads, arena) {
    last.init(arena.template get<Phases::Part>(threads), threads, threads);
    const int64_t widest = max64(max64(p.inputs, D * p.hidden), p.outputs);
    zeros = arena.template get<T>(widest);
    for (int64_t k = 0; k < widest; ++k) zeros[k] = T(0);
    chunk = min64(p.steps, ceil_div(kOuterDepth, max64(p.batch, 1)));
    for (int d = 0; d < p.directions; ++d) prepare(d, arena);
    const int64_t rows = ceil_div(p.batch, plan.row_parts);
    scratch = arena.template get<Scratch>(threads);
    for (int i = 0; i < threads; ++i) {
      scratch[i] = {arena.template get<BackwardRow<T>>(rows),
                    arena.template get<const T*>(rows),
                    arena.template get<T>(kRowBlock * Matrix::kWidth),
                    {}};
      if (needs_weights())
        scratch[i].weights = WeightScratch<T>(min64(kOuterDepth, p.steps * p.batch),
                                              ceil_div(G * p.hidden, plan.slices()), arena);
    }
  }

  void prepare(int d, Arena& arena) {
    State& s = state[d];
    s = {};
    const int64_t H = p.hidden, rows = p.steps * p.batch;
    const auto& w = p.weights[d];
    s.rows = {p.steps,
              p.batch,
              p.lengths,
              p.resets,
              arena.template get<int64_t>(p.batch),
              arena.template get<int64_t>(p.steps)};
    s.rows.sort();
    const bool packs = rows >= kCopyFrom;
    const auto matrix = [&](const T* weight, int64_t columns, int64_t blocks, int64_t block_rows,
                            int64_t rotate) {
      Matrix m{weight,     columns, columns, blocks,
               block_rows, rotate,  nullptr, packs ? 0 : columns / Matrix::kWidth};
      m.packed = arena.template get<T>(m.packed_size());
      return m;
    };
    s.recurrent = matrix(w.weight_hh, p.outputs, kRecurrent, H, kRotate);
    if (kTwoHalves) s.second = matrix(w.weight_hh + 2 * H * H, H, 1, H, 0);
    if (p.projected) s.second = matrix(w.weight_hr, H, 1, p.outputs, 0);
    if (q.dx != nullptr) s.input = matrix(w.weight_ih, p.inputs, G, H, 0);
    const int64_t slots = (chunk + 1) * p.batch;
    s.dgates = arena.template get<T>(slots * D * H);
    if (p.projected) s.dh = arena.template get<T>(slots * p.outputs);
    if (has_second()) s.aside = arena.template get<T>(slots * H);
    if (kVaried && p.mask_h != nullptr) s.carried = arena.template get<T>(slots * p.outputs);
    s.dx = q.dx == nullptr || d == 0 ? q.dx : arena.template get<T>(rows * p.inputs);
    s.carry_h = arena.template get<T>(p.batch * p.outputs);
    s.carry_c = arena.template get<T>(p.batch * H);
    s.bias = arena.template get<T>(D * H);
    s.peephole = arena.template get<T>(3 * H);
    if (kNormed) {
      s.dh_cell = arena.template get<T>(p.batch * H);
      s.dnorm = arena.template get<T>(slots * 5 * H);
      s.norm = arena.template get<T>(10 * H);
      for (int64_t k = 0; k < 10 * H; ++k) s.norm[k] = T(0);
    }
    const auto fill = [](T* to, const T* from, int64_t count) {
      for (int64_t i = 0; i < count; ++i) to[i] = from == nullptr ? T(0) : from[i];
    };
    fill(s.carry_h, q.dh_n == nullptr ? nullptr : q.dh_n + d * p.batch * p.outputs, p.batch * p.outputs);
    fill(s.carry_c, q.dc_n == nullptr ? nullptr : q.dc_n + d * p.batch * H, p.batch * H);
    fill(s.bias, nullptr, D * H);
    fill(s.peephole, nullptr, 3 * H);
  }

  static int useful_threads(const LayerParams<T>& p, int threads) {
    const int64_t columns = ceil_div(p.hidden, int64_t(Matrix::kWidth));
    // The products after the scan can use more threads than the scan of one row.
    return int(min64(threads, max64(p.directions * p.batch * columns, ceil_div(p.steps, 4))));
  }

  // The stages of a step, each a phase of a group of rows.
  int64_t stages() const { return 1 + has_second() + kNormed; }
  int64_t chunks(int d) const { return ceil_div(state[d].rows.longest(), chunk); }
  // Stages of a direction: the packing; some steps of the scan and then the large products of these steps,
  // from the last steps to the first; the gradients by the initial states.
  int64_t turns(int d) const { return 2 + max64(1, chunks(d)); }
  Range steps(int d, int64_t turn) const {
    const int64_t end = state[d].rows.longest() - (turn - 1) * chunk;
    return {max64(0, end - chunk), end};
  }

  // One thread's work.
  void run(int id) {
    const FlushDenormals flush;
    Scratch& own = scratch[id];
    schedule.run(
        id, [&](int d) { return turns(d); },
        [&](int d, int64_t turn) {
          if (turn == 0) return int64_t(0);
          if (turn == turns(d) - 1) turn -= 1;
          return (state[d].rows.longest() - steps(d, turn).begin) * stages();
        },
        [&](int d, int64_t phase, const Slice& slice) { Part(*this, d, slice, own).run(phase); },
        [&](int d, int64_t turn, const Slice& slice) { between(d, turn, slice, own); });
    if (q.dx == nullptr) return;
    uint64_t took = 0;
    last.run(id, 1, &took,
             [&](int64_t, int part) { finish_dx(share(p.steps * p.batch, part, last.count())); });
  }

  void between(int d, int64_t turn, const Slice& slice, Scratch& own) {
    const State& s = state[d];
    if (turn == 0) {
      pack(s.recurrent, slice);
      if (has_second()) pack(s.second, slice);
      if (q.dx != nullptr) pack(s.input, slice);
    } else if (turn < turns(d) - 1) {
      const Range range = steps(d, turn);
      if (needs_weights()) WeightGradients<T, Backward>(*this, d, slice, own.weights).sum(range, turn > 1);
      if (q.dx != nullptr) input_gradients(d, slice, range, own.acc);
    } else {
      Part(*this, d, slice, own).first_states();
      if (needs_weights()) WeightGradients<T, Backward>(*this, d, slice, own.weights).store_vectors();
    }
  }

  static void pack(const Matrix& matrix, const Slice& slice) {
    const Range mine = share(matrix.panels(), slice.index(), slice.size());
    matrix.pack(mine.begin, mine.end);
  }

  // dx of some steps by one direction, a slice's share of their rows.
  void input_gradients(int d, const Slice& slice, Range range, T* acc) const {
    const State& own = state[d];
    const T* left[kRowBlock];
    T* out[kRowBlock];
    int64_t s = range.begin, i = slice.index();
    while (s < range.end) {
      int64_t count = 0;
      while (s < range.end && count < kRowBlock) {
        if (i >= own.rows.active[s]) {
          i -= own.rows.active[s], ++s;  // So that rows are shared evenly even if there is one per step.
          continue;
        }
        const int64_t b = own.rows.order[i];
        left[count] = dgates(d, s, b) + C::kInputGrads * p.hidden;
        out[count++] = own.dx + at(own.rows.time(b, s, backwards(d)), b) * p.inputs;
        i += slice.size();
      }
      for (int64_t j = 0; j < own.input.panels() && count > 0; ++j) {
        own.input.product(j, min64(j + 1, own.input.panels() - 1), count, left, acc, false);
        const int64_t n0 = j * Matrix::kWidth, width = min64(Matrix::kWidth, p.inputs - n0);
        for (int64_t r = 0; r < count; ++r)
          memcpy(out[r] + n0, acc + r * own.input.width(j), width * sizeof(T));
      }
    }
  }

  // Adds up the directions' dx for some of the T*B rows, and clears those past a row's length.
  void finish_dx(Range rows) const {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      T* to = q.dx + row * p.inputs;
      if (row / p.batch >= state[0].rows.length(row % p.batch)) {
        memset(to, 0, p.inputs * sizeof(T));
      } else if (p.directions == 2) {
        const T* from = state[1].dx + row * p.inputs;
        for (int64_t k = 0; k < p.inputs; ++k) to[k] += from[k];
      }
    }
  }

  // A slice of one direction in the hands of one thread.
  struct Part {
    Backward& f;
    const BackwardParams<T>& q;
    const LayerParams<T>& p;
    const State& state;
    const int d;
    const Slice slice;
    const bool back;
    const int64_t mine;  // rows
    BackwardRow<T>* const step;
    const T** const left;
    T* const acc;

    Part(Backward& backward, int direction, const Slice& slice_, const Scratch& scratch)
        : f(backward),
          q(backward.q),
          p(backward.p),
          state(backward.state[direction]),
          d(direction),
          slice(slice_),
          back(backward.backwards(direction)),
          mine(slice_.rows(backward.p.batch)),
          step(scratch.step),
          left(scratch.left),
          acc(scratch.acc) {}

    void run(int64_t phase) {
      const int64_t s = state.rows.longest() - 1 - phase / f.stages(), stage = phase % f.stages();
      const int64_t count = slice.rows(state.rows.active[s]);
      place(s, count);
      if (stage == 0) {
        product(state.recurrent, s, count,
                [&](int64_t i, V sum, int64_t unit, auto m) { first(i, sum, unit, m); });
      } else if (stage == 1 && f.has_second()) {
        place_second(count);
        product(state.second, s, count,
                [&](int64_t i, V sum, int64_t unit, auto m) { second(i, sum, unit, m); });
      } else if constexpr (kNormed) {
        for (int64_t i = slice.unit_part; i < count; i += slice.unit_parts) norm_row(step[i]);
      }
    }

    // Calls use(i, sums, unit, m) for each of the first `count` rows of step s and each vector of the
    // slice's columns.
    template <typename Use>
    RNN_FN void product(const Matrix& matrix, int64_t s, int64_t count, const Use& use) {
      const Sweep panels(slice.units(matrix.panels()), s);
      for (int64_t n = 0; n < panels.size(); ++n)
        for (int64_t i0 = 0; i0 < count; i0 += kRowBlock) {
          const int64_t j = panels[n], block = min64(kRowBlock, count - i0);
          matrix.product(j, i0 + block < count ? j : panels[n + 1], block, left + i0, acc, false);
          const int64_t width = matrix.width(j);
          for (int v = 0; v < width / N; ++v) {
            const int64_t unit = j * Matrix::kWidth + v * N;
            V::with_lanes(matrix.columns - unit, [&](auto m) {
              const T* sums = acc + v * N;
              for (int64_t i = i0; i < i0 + block; ++i, sums += width) use(i, V::load(sums), unit, m);
            });
          }
        }
    }

    // The gate gradients of step s through which its previous output had an effect, or zeros.
    const T* recurrent_row(int64_t b, int64_t s) const {
      if (s >= state.rows.length(b) || state.rows.cut(b, s, back)) return f.zeros;
      return f.dgates(d, s, b);
    }

    // Fills step[] and left[] for step s of the first `count` of the slice's rows.
    void place(int64_t s, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t b = state.rows.order[slice.row(i)], t = state.rows.time(b, s, back), at = f.at(t, b);
        const int64_t t_prev = s > 0 ? state.rows.time(b, s - 1, back) : 0;
        BackwardRow<T>& row = step[i];
        left[i] = recurrent_row(b, s + 1);
        row.cut = state.rows.cut(b, s, back);
        row.tape = f.tape(d, t, b);
        row.h_prev = row.cut ? f.zeros : s > 0 ? f.output(d, t_prev, b) : f.initial(p.h0, d, b, p.outputs);
        if (C::kMemory >= 0)
          row.c_prev = row.cut ? f.zeros
                       : s > 0 ? f.tape(d, t_prev, b) + C::kMemory * p.hidden
                               : f.initial(p.c0, d, b, p.hidden);
        row.dy = q.dy == nullptr ? nullptr : q.dy + t * q.dy_stride_t + b * q.dy_stride_b + d * p.outputs;
        row.dc_all = q.dc_all == nullptr ? nullptr : q.dc_all + (at * p.directions + d) * p.hidden;
        row.dgates = f.dgates(d, s, b);
        row.carry_h = state.carry_h + b * p.outputs;
        row.carry_c = state.carry_c + b * p.hidden;
        if (p.projected) row.dh = f.dh(d, s, b);
        if (f.has_second()) row.aside = f.aside(d, s, b);
        if constexpr (kVaried) {
          const bool follows = s > 0 && !row.cut;
          row.mask_h = f.mask_h(d, t, b), row.mask_c = f.mask_c(d, t, b);
          row.mask_h_prev = follows ? f.mask_h(d, t_prev, b) : nullptr;
          row.mask_c_prev = follows ? f.mask_c(d, t_prev, b) : nullptr;
          row.y_prev = row.h_prev;
          if (kNormed) row.dh_cell = state.dh_cell + b * p.hidden, row.dnorm = f.dnorm(d, s, b);
          if (row.mask_h_prev != nullptr) row.h_prev = f.carried(d, s, b);
        }
      }
    }

    void place_second(int64_t count) {
      for (int64_t i = 0; i < count; ++i) left[i] = kTwoHalves ? step[i].dgates + 2 * p.hidden : step[i].dh;
    }

    // sum = the next step's gate gradients through R.
    template <typename Lanes>
    RNN_FN void first(int64_t i, V sum, int64_t unit, Lanes m) {
      const BackwardRow<T>& row = step[i];
      V dh = sum + V::load(row.carry_h + unit, m);
      if constexpr (kVaried) {
        if (row.mask_h != nullptr) dh = dh * V::load(row.mask_h + unit, m);
        if (row.mask_h_prev != nullptr)
          (V::load(row.y_prev + unit, m) * V::load(row.mask_h_prev + unit, m))
              .store(const_cast<T*>(row.h_prev) + unit, m);
      }
      if (row.dy != nullptr) dh += V::load(row.dy + unit, m);
      if (kVaried && __builtin_isfinite(p.proj_clip))
        dh = where_within(V::load(row.tape + tape_clip<C>(p) + unit, m), V(p.proj_clip), dh);
      if constexpr (kTwoHalves) {
        const V z = V::load(row.tape + p.hidden + unit, m), n = V::load(row.tape + 2 * p.hidden + unit, m);
        V dz, dn;
        const Policy policy = policy_at<Policy, V>(p, d, unit, m);
        C::backward(policy, z, n, V::load(row.h_prev + unit, m), dh, dz, dn);
        dz.store(row.dgates + p.hidden + unit, m);
        dn.store(row.dgates + 2 * p.hidden + unit, m);
        (dh * z).store(row.carry_h + unit, m);
      } else if (p.projected) {
        dh.store(row.dh + unit, m);
        V(T(0)).store(row.carry_h + unit, m);
      } else {
        cell(row, dh, unit, m);
      }
    }

    template <typename Lanes>
    RNN_FN void second(int64_t i, V sum, int64_t unit, Lanes m) {
      const BackwardRow<T>& row = step[i];
      if constexpr (kTwoHalves) {
        const V r = V::load(row.tape + unit, m), h_prev = V::load(row.h_prev + unit, m);
        C::backward_reset(r, h_prev, sum).store(row.dgates + unit, m);
        (r * h_prev).store(row.aside + unit, m);
        const V carry = row.cut ? V(T(0)) : V::load(row.carry_h + unit, m) + sum * r;
        carry.store(row.carry_h + unit, m);
      } else {
        cell(row, sum, unit, m);
      }
    }

    template <typename Lanes>
    RNN_FN V c_prev(const BackwardRow<T>& row, int64_t unit, Lanes m) const {
      const V c = V::load(row.c_prev + unit, m);
      return kVaried && row.mask_c_prev != nullptr ? c * V::load(row.mask_c_prev + unit, m) : c;
    }

    // The gradient by the new c from later steps and from the caller.
    template <typename Lanes>
    RNN_FN V dc_next(const BackwardRow<T>& row, int64_t unit, Lanes m) const {
      V dc = V::load(row.carry_c + unit, m);
      if (kVaried && row.mask_c != nullptr) dc = dc * V::load(row.mask_c + unit, m);
      if (row.dc_all != nullptr) dc += V::load(row.dc_all + unit, m);
      return dc;
    }

    // The cell of a whole row with layer normalisation, from dh_cell.
    void norm_row(const BackwardRow<T>& row) {
      const int64_t H = p.hidden;
      const auto& w = p.weights[d];
      const T one(1), *scale = row.tape + (kNormedC + 1) * H, *c_normed = row.tape + kNormedC * H;
      const auto each = [&](const auto& use) {
        for (int64_t unit = 0; unit < H; unit += N)
          V::with_lanes(H - unit, [&](auto m) {
            const Policy policy = policy_at<Policy, V>(p, d, unit, m);
            const V c = c_prev(row, unit, m);
            use(policy, NormedGates<T, Policy>(p, d, policy, row.tape, c, unit, m), c, unit, m);
          });
      };
      each([&](const Policy& policy, auto gates, V, int64_t unit, auto m) {
        const V c = V::load(row.tape + C::kMemory * H + unit, m), dh = V::load(row.dh_cell + unit, m);
        V sum_o = gates.o_sum;
        policy.see_new(c, sum_o);
        const V o = sigmoid(sum_o), u = policy.activate(c), d_o = dh * u * o * (V(one) - o);
        V dc = dc_next(row, unit, m) + policy.through(u, dh * o);
        policy.seen_new(d_o, dc);
        const V unclipped = V::load(c_normed + unit, m) * V::load(w.norm_gain + 4 * H + unit, m) +
                            V::load(w.norm_shift + 4 * H + unit, m);
        d_o.store(row.dnorm + 3 * H + unit, m);
        policy.clipped(unclipped, dc).store(row.dnorm + 4 * H + unit, m);
        if (p.projected) (o * u).store(row.aside + unit, m);
      });
      // From here on carry_c is the gradient by the c that was normalised.
      Norm<T>::backward(row.dnorm + 4 * H, c_normed, w.norm_gain + 4 * H, scale[4], H, row.carry_c);
      each([&](const Policy& policy, auto gates, V c, int64_t unit, auto m) {
        const V dc = V::load(row.carry_c + unit, m), i = gates.i, f = gates.f, g = gates.g;
        const V di = dc * g * i * (V(one) - i), df = dc * c * f * (V(one) - f);
        di.store(row.dnorm + unit, m);
        df.store(row.dnorm + H + unit, m);
        policy.through(g, dc * i).store(row.dnorm + 2 * H + unit, m);
        V dc_prev = dc * f;
        policy.seen_old(di, df, dc_prev);
        (row.cut ? V(T(0)) : dc_prev).store(row.carry_c + unit, m);
        if (!p.projected) V(T(0)).store(row.carry_h + unit, m);
      });
      for (int g = 0; g < 4; ++g)
        Norm<T>::backward(row.dnorm + g * H, row.tape + g * H, w.norm_gain + g * H, scale[g], H,
                          row.dgates + g * H);
    }

    template <typename Lanes>
    RNN_FN void cell(const BackwardRow<T>& row, V dh, int64_t unit, Lanes m) {
      if constexpr (kNormed) {
        dh.store(row.dh_cell + unit, m);
      } else if constexpr (!kTwoHalves) {
        V tape[C::kTape], dgates[D];
#pragma GCC unroll 8
        for (int k = 0; k < C::kTape; ++k) tape[k] = V::load(row.tape + k * p.hidden + unit, m);
        typename C::State prev{V(T(0)), V(T(0))}, dnext{dh, V(T(0))};
        if (C::kReadsH) prev.h = V::load(row.h_prev + unit, m);
        if (C::kMemory >= 0) {
          prev.c = c_prev(row, unit, m);
          dnext.c = dc_next(row, unit, m);
        }
        const Policy policy = policy_at<Policy, V>(p, d, unit, m);
        typename C::State dprev = C::backward(policy, tape, prev, dnext, dgates);
#pragma GCC unroll 8
        for (int k = 0; k < D; ++k) dgates[k].store(row.dgates + k * p.hidden + unit, m);
        if (row.cut) dprev = {V(T(0)), V(T(0))};
        if (C::kMemory >= 0) dprev.c.store(row.carry_c + unit, m);
        if constexpr (C::kMemory >= 0) {
          if (p.projected) return C::output(policy, tape).store(row.aside + unit, m);
        }
        dprev.h.store(row.carry_h + unit, m);
      }
    }

    // Gradients by the initial states, after the whole scan.
    void first_states() {
      if (q.dc0 != nullptr) {
        const Range rows = share(p.batch, slice.index(), slice.size());
        memcpy(q.dc0 + (d * p.batch + rows.begin) * p.hidden, state.carry_c + rows.begin * p.hidden,
               (rows.end - rows.begin) * p.hidden * sizeof(T));
      }
      if (q.dh0 == nullptr) return;
      for (int64_t i = 0; i < mine; ++i) left[i] = recurrent_row(state.rows.order[slice.row(i)], 0);
      product(state.recurrent, 0, mine, [&](int64_t i, V sum, int64_t unit, auto m) {
        const int64_t b = state.rows.order[slice.row(i)];
        const V dh = sum + V::load(state.carry_h + b * p.outputs + unit, m);
        dh.store(q.dh0 + (d * p.batch + b) * p.outputs + unit, m);
      });
    }
  };
};

template <typename T, template <typename> class CellOf, typename Policy = Plain>
void run_backward(const BackwardParams<T>& p, int threads, cpu::RunTeam run_team) {
  using B = Backward<T, CellOf, Policy>;
  threads = B::useful_threads(p.layer, threads);
  Arena arena;
  B backward(p, threads, arena);
  run_team(threads, [](void* f, int id) { static_cast<B*>(f)->run(id); }, &backward);
}

}  // namespace RNN_ISA
}  // namespace torchrnn
