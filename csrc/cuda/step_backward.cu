// The step path, backward: for each step a recurrent matrix product with the later step's gate gradients, and
// a kernel for the cell. The products for the gradients by inputs and weights come after the scan.
//
// Over 400 lines because the kernels of a step, which the cells choose among, are read best side by side.
//
// dh0 and dc0 hold the gradients by the state that is carried between steps, other than through the
// recurrent product, and those by the initial state in the end.

#include "cuda/step.h"

namespace torchrnn {
namespace cuda {
namespace {

template <typename Acc>
struct Buffers {
  Acc* sums;   // [B, R], gradients by h through the recurrent product
  Acc* inner;  // [B, H], through the second product: by h before the projection, by r * h; by h, normalised
  Acc* norms;  // [B, 5*H], by the normalised sums and c
  // Per row, summed over the steps: then the sums over rows have a fixed order.
  Acc* peephole;    // [B, 3*H]
  Acc* norm_gain;   // [B, 5*H]
  Acc* norm_shift;  // [B, 5*H]

  Buffers(const BackwardScan<Acc>& q, Workspace& workspace) {
    const auto& p = q.forward;
    const auto& w = q.direction[0];
    const int64_t units = p.batch * p.hidden, normed = w.norm_gain == nullptr ? 0 : 5 * units;
    sums = workspace.get<Acc>(p.batch * p.outputs);
    inner = workspace.get<Acc>(units);
    norms = workspace.get<Acc>(normed);
    peephole = workspace.get<Acc>(w.peephole == nullptr ? 0 : 3 * units);
    norm_gain = workspace.get<Acc>(normed), norm_shift = workspace.get<Acc>(normed);
  }
};

template <typename Io, typename Acc>
struct BackwardStep : Step<Acc> {
  BackwardScan<Acc> q;
  Buffers<Acc> buffers;
  int64_t later;  // the time of the step after, or -1

  RNN_FN const DirectionBackward<Acc>& w() const { return q.direction[this->d]; }
  RNN_FN Acc* carry_h(int64_t b) const { return q.dh0 + (this->d * this->p.batch + b) * this->p.outputs; }
  RNN_FN Acc* carry_c(int64_t b) const { return q.dc0 + (this->d * this->p.batch + b) * this->p.hidden; }

  RNN_FN int64_t row(int64_t b) const { return this->t * this->p.batch + b; }
  RNN_FN void gate_gradient(void* to, int64_t b, int64_t gate, int64_t u, Acc value) const {
    const int64_t gates = gates_of(this->p.cell);
    round_to(value, static_cast<Io*>(to)[(row(b) * gates + gate) * this->p.hidden + u]);
  }
  RNN_FN Acc h_prev(int64_t b, int64_t u) const {
    return widen(static_cast<const Io*>(w().h_prev)[row(b) * this->p.outputs + u]);
  }
  // The c that the step started from.
  RNN_FN Acc c_prev(int64_t b, int64_t u, int64_t place) const {
    const auto& p = this->p;
    if (this->cut(b)) return Acc(0);
    const int64_t before = this->time_before(this->t);
    if (this->follows(this->t, b))
      return this->tape(before, b)[place * p.hidden + u] * this->mask_c(before, b, u);
    return p.c0 == nullptr ? Acc(0) : p.c0[(this->d * p.batch + b) * p.hidden + u];
  }
  // The gradient by the new c.
  RNN_FN Acc dc_next(int64_t b, int64_t u) const {
    const Acc dc = carry_c(b)[u] * this->mask_c(this->t, b, u);
    if (q.dc_all == nullptr) return dc;
    return dc + widen(static_cast<const Io*>(q.dc_all)[this->output(this->t, b, this->p.hidden) + u]);
  }

  // The gradient by h that comes from the later steps.
  RNN_FN Acc from_later(int64_t b, int64_t u) const {
    const Acc carry = carry_h(b)[u];
    if (later < 0 || this->cut(later, b)) return carry;
    return carry + buffers.sums[b * this->p.outputs + u];
  }
  // And by the output of this step, before its clip.
  RNN_FN Acc output_gradient(int64_t b, int64_t u) const {
    Acc dh = from_later(b, u) * this->mask_h(this->t, b, u);
    if (q.dy != nullptr) {
      const int64_t at = this->t * q.dy_stride_t + b * q.dy_stride_b + this->d * this->p.outputs + u;
      dh += widen(static_cast<const Io*>(q.dy)[at]);
    }
    if (this->clips_output())
      dh = where_within(this->tape(this->t, b)[this->clip_place() + u], this->p.proj_clip, dh);
    return dh;
  }
  // A row that is past its length: gradients by its state pass, and nothing else has one.
  RNN_FN void rest(int64_t b, int64_t u) const {
    const Acc dh = from_later(b, u);
    carry_h(b)[u] = dh;
    if (w().dprojected != nullptr)
      round_to(Acc(0), static_cast<Io*>(w().dprojected)[row(b) * this->p.outputs + u]);
  }
  RNN_FN void rest_unit(int64_t b, int64_t u) const {
    const int64_t gates = gates_of(this->p.cell);
    for (int64_t g = 0; g < gates; ++g) {
      gate_gradient(w().dgates_x, b, g, u, Acc(0));
      if (w().dgates_h != nullptr) gate_gradient(w().dgates_h, b, g, u, Acc(0));
    }
    if (w().aside != nullptr) set_aside(b, u, Acc(0));
  }
  RNN_FN void set_aside(int64_t b, int64_t u, Acc value) const {
    round_to(value, static_cast<Io*>(w().aside)[row(b) * this->p.hidden + u]);
  }
};

// The gradients by the last state, and the rows' sums at zero.
template <typename Io, typename Acc>
struct Begin : BackwardStep<Io, Acc> {
  RNN_FN void operator()(int64_t i) const {
    const auto& p = this->p;
    const auto& q = this->q;
    const int64_t b = i / (p.outputs + p.hidden), at = i % (p.outputs + p.hidden), u = at - p.outputs;
    if (at < p.outputs) {
      this->carry_h(b)[at] = q.dh_n == nullptr ? Acc(0) : q.dh_n[(this->d * p.batch + b) * p.outputs + at];
      return;
    }
    if (q.dc0 != nullptr)
      this->carry_c(b)[u] = q.dc_n == nullptr ? Acc(0) : q.dc_n[(this->d * p.batch + b) * p.hidden + u];
    const auto& sums = this->buffers;
    if (this->w().peephole != nullptr)
      for (int k = 0; k < 3; ++k) sums.peephole[(b * 3 + k) * p.hidden + u] = Acc(0);
    if (this->w().norm_gain != nullptr)
      for (int k = 0; k < 5; ++k)
        sums.norm_gain[(b * 5 + k) * p.hidden + u] = sums.norm_shift[(b * 5 + k) * p.hidden + u] = Acc(0);
  }
};

// The h that each step's recurrent product read, for all steps at once.
template <typename Io, typename Acc>
struct Previous : BackwardStep<Io, Acc> {
  RNN_FN void operator()(int64_t i) const {
    const auto& p = this->p;
    const int64_t u = i % p.outputs, b = i / p.outputs % p.batch, t = i / p.outputs / p.batch;
    const int64_t before = this->time_before(t);
    Acc h(0);
    if (this->alive(t, b) && !this->cut(t, b)) {
      if (this->follows(t, b))
        h = output_before(before, b, u) * this->mask_h(before, b, u);
      else if (p.h0 != nullptr)
        h = p.h0[(this->d * p.batch + b) * p.outputs + u];
    }
    round_to(h, static_cast<Io*>(this->w().h_prev)[i]);
  }

  RNN_FN Acc output_before(int64_t before, int64_t b, int64_t u) const {
    const int place = kept_output(this->p.cell);
    if (place >= 0) return this->tape(before, b)[place * this->p.hidden + u];
    return widen(static_cast<const Io*>(this->p.y)[this->output(before, b, this->p.outputs) + u]);
  }
};

// A cell with one recurrent product, at one unit, from the gradient by its output.
template <template <typename> class CellOf_, typename Io, typename Acc>
RNN_FN void cell_gradient(const BackwardStep<Io, Acc>& step, int64_t b, int64_t u, Acc dh) {
  using C = CellOf_<Acc>;
  const auto& p = step.p;
  const Acc* kept = step.tape(step.t, b);
  Acc tape[C::kTape], d[C::kGateGrads];
  for (int k = 0; k < C::kTape; ++k) tape[k] = kept[k * p.hidden + u];
  typename C::State prev{Acc(0), Acc(0)}, dnext{dh, Acc(0)};
  if (C::kReadsH) prev.h = step.h_prev(b, u);
  if (C::kMemory >= 0) prev.c = step.c_prev(b, u, C::kMemory), dnext.c = step.dc_next(b, u);
  const Varied<Acc> policy = step.policy(u);
  typename C::State dprev = C::backward(policy, tape, prev, dnext, d);
  for (int g = 0; g < C::kGates; ++g) {
    step.gate_gradient(step.w().dgates_x, b, g, u, d[C::kInputGrads + g]);
    // By R h: the same, but for the GRU's n, whose gradient comes first.
    if constexpr (C::kInputGrads > 0)
      step.gate_gradient(step.w().dgates_h, b, g, u, d[g + 1 == C::kGates ? 0 : C::kInputGrads + g]);
  }
  if (step.cut(b)) dprev = {Acc(0), Acc(0)};
  if constexpr (C::kMemory >= 0) {
    step.carry_c(b)[u] = dprev.c;
    if (p.projected) step.set_aside(b, u, C::output(policy, tape));
    if (policy.peeps) {
      constexpr int i = C::kPeepholes[0], f = C::kPeepholes[1], o = C::kPeepholes[2];
      Acc* sums = step.buffers.peephole + b * 3 * p.hidden + u;
      if constexpr (i >= 0) sums[0] += d[i] * prev.c;
      sums[p.hidden] += d[f] * prev.c;
      sums[2 * p.hidden] += d[o] * tape[C::kMemory];
    }
  }
  if (!p.projected) step.carry_h(b)[u] = dprev.h;
}

template <template <typename> class CellOf_, typename Io, typename Acc>
struct CellStep : BackwardStep<Io, Acc> {
  RNN_FN void operator()(int64_t i) const {
    const int64_t b = i / this->p.hidden, u = i % this->p.hidden;
    if (this->p.projected) {  // The output's own gradient was taken through the projection.
      if (!this->alive(b)) return this->rest_unit(b, u);
      return cell_gradient<CellOf_, Io, Acc>(*this, b, u, this->buffers.inner[i]);
    }
    if (!this->alive(b)) {
      this->rest(b, u);
      return this->rest_unit(b, u);
    }
    cell_gradient<CellOf_, Io, Acc>(*this, b, u, this->output_gradient(b, u));
  }
};

// Before the projection's product, or before a normalised row: the gradient by the output.
template <typename Io, typename Acc>
struct OutputStep : BackwardStep<Io, Acc> {
  RNN_FN void operator()(int64_t i) const {
    const auto& p = this->p;
    const int64_t b = i / p.outputs, u = i % p.outputs;
    if (!this->alive(b)) return this->rest(b, u);
    const Acc dh = this->output_gradient(b, u);
    this->carry_h(b)[u] = Acc(0);
    if (p.projected)
      round_to(dh, static_cast<Io*>(this->w().dprojected)[this->row(b) * p.outputs + u]);
    else
      this->buffers.inner[i] = dh;
  }
};

// kGruResetBefore before the product with n's weights: the gradients by z and n.
template <typename Io, typename Acc>
struct UpdateStep : BackwardStep<Io, Acc> {
  RNN_FN void operator()(int64_t i) const {
    const auto& p = this->p;
    const int64_t b = i / p.hidden, u = i % p.hidden;
    if (!this->alive(b)) {
      this->rest(b, u);
      return this->rest_unit(b, u);
    }
    const Acc* tape = this->tape(this->t, b);
    const Acc z = tape[p.hidden + u], n = tape[2 * p.hidden + u], dh = this->output_gradient(b, u);
    Acc dz, dn;
    GruResetBefore<Acc>::backward(this->policy(u), z, n, this->h_prev(b, u), dh, dz, dn);
    this->gate_gradient(this->w().dgates_x, b, 1, u, dz);
    this->gate_gradient(this->w().dgates_x, b, 2, u, dn);
    this->carry_h(b)[u] = dh * z;
  }
};

// And after it: the gradient by r.
template <typename Io, typename Acc>
struct ResetStep : BackwardStep<Io, Acc> {
  RNN_FN void operator()(int64_t i) const {
    const auto& p = this->p;
    const int64_t b = i / p.hidden, u = i % p.hidden;
    if (!this->alive(b)) return;
    const Acc r = this->tape(this->t, b)[u], h_prev = this->h_prev(b, u), sum = this->buffers.inner[i];
    this->gate_gradient(this->w().dgates_x, b, 0, u, GruResetBefore<Acc>::backward_reset(r, h_prev, sum));
    this->set_aside(b, u, r * h_prev);
    Acc& carry = this->carry_h(b)[u];
    carry = this->cut(b) ? Acc(0) : carry + sum * r;
  }
};

// Layer normalisation: a whole row.
template <typename Io, typename Acc>
struct NormedStep : BackwardStep<Io, Acc> {
  // dx(u, value) from dn, the gradient by gain * normalised + shift; adds up those by gain and shift.
  template <typename Use>
  RNN_FN void through(Lanes lanes, int64_t b, int part, const Acc* normalised, Acc scale,
                      const Use& dx) const {
    const int64_t H = this->p.hidden, at = part * H;
    const Acc *dn = this->buffers.norms + b * 5 * H + at, *gain = this->w().norm_gain + at;
    Acc total(0), along(0);
    for (int64_t u = lanes.lane; u < H; u += lanes.count) {
      total += dn[u] * gain[u], along += dn[u] * gain[u] * normalised[u];
      this->buffers.norm_gain[b * 5 * H + at + u] += dn[u] * normalised[u];
      this->buffers.norm_shift[b * 5 * H + at + u] += dn[u];
    }
    const Acc mean = lanes.sum(total) / Acc(H), slope = lanes.sum(along) / Acc(H);
    for (int64_t u = lanes.lane; u < H; u += lanes.count)
      dx(u, (dn[u] * gain[u] - mean - normalised[u] * slope) * scale);
  }

  RNN_FN void operator()(int64_t b, Lanes lanes) const {
    const auto& p = this->p;
    const auto& w = this->w();
    const int64_t H = p.hidden;
    if (!this->alive(b)) {
      for (int64_t u = lanes.lane; u < H; u += lanes.count) this->rest_unit(b, u);
      return;
    }
    const Acc* tape = this->tape(this->t, b);
    const Acc *c_normed = tape + kNormedC * H, *scale = tape + (kNormedC + 1) * H;
    Acc* dn = this->buffers.norms + b * 5 * H;
    Acc* peephole = this->buffers.peephole + b * 3 * H;
    const auto sum = [&](int part, int64_t u, Acc normalised) {
      return normalised * w.norm_gain[part * H + u] + w.norm_shift[part * H + u];
    };
    for (int64_t u = lanes.lane; u < H; u += lanes.count) {
      const Varied<Acc> policy = this->policy(u);
      const Acc c = tape[Lstm<Acc>::kMemory * H + u], dh = this->buffers.inner[b * H + u];
      Acc sum_o = sum(3, u, tape[3 * H + u]);
      policy.see_new(c, sum_o);
      const Acc o = sigmoid(sum_o), out = policy.activate(c), d_o = dh * out * o * (Acc(1) - o);
      Acc dc = this->dc_next(b, u) + policy.through(out, dh * o);
      policy.seen_new(d_o, dc);
      dn[3 * H + u] = d_o;
      dn[4 * H + u] = policy.clipped(sum(4, u, c_normed[u]), dc);
      if (policy.peeps) peephole[2 * H + u] += d_o * c;
      if (p.projected) this->set_aside(b, u, o * out);
    }
    // From here on carry_c is the gradient by the c that was normalised.
    Acc* carry_c = this->carry_c(b);
    through(lanes, b, 4, c_normed, scale[4], [&](int64_t u, Acc dc) { carry_c[u] = dc; });
    for (int64_t u = lanes.lane; u < H; u += lanes.count) {
      const Varied<Acc> policy = this->policy(u);
      const Acc c_prev = this->c_prev(b, u, Lstm<Acc>::kMemory), dc = carry_c[u];
      Acc sum_i = sum(0, u, tape[u]), sum_f = sum(1, u, tape[H + u]);
      policy.see_old(c_prev, sum_i, sum_f);
      const Acc i = sigmoid(sum_i), f = sigmoid(sum_f), g = policy.activate(sum(2, u, tape[2 * H + u]));
      const Acc di = dc * g * i * (Acc(1) - i), df = dc * c_prev * f * (Acc(1) - f);
      dn[u] = di, dn[H + u] = df, dn[2 * H + u] = policy.through(g, dc * i);
      if (policy.peeps) peephole[u] += di * c_prev, peephole[H + u] += df * c_prev;
      Acc dc_prev = dc * f;
      policy.seen_old(di, df, dc_prev);
      carry_c[u] = this->cut(b) ? Acc(0) : dc_prev;
    }
    for (int g = 0; g < 4; ++g)
      through(lanes, b, g, tape + g * H, scale[g],
              [&](int64_t u, Acc value) { this->gate_gradient(w.dgates_x, b, g, u, value); });
  }
};

// What is left of the gradient by h0 after the last product.
template <typename Io, typename Acc>
struct End : BackwardStep<Io, Acc> {
  RNN_FN void operator()(int64_t i) const {
    const int64_t b = i / this->p.outputs, u = i % this->p.outputs;
    this->carry_h(b)[u] = this->from_later(b, u);
  }
};

// out[k] = the sum of rows[b, k] over the batch, in its order.
template <typename Acc>
struct SumRows {
  const Acc* rows;
  Acc* out;
  int64_t batch, columns;

  RNN_FN void operator()(int64_t k) const {
    Acc total(0);
    for (int64_t b = 0; b < batch; ++b) total += rows[b * columns + k];
    out[k] = total;
  }
};

template <typename Io, typename Acc>
struct Runner {
  const BackwardScan<Acc>& q;
  const ForwardScan<Acc>& p;
  const Blas& blas;
  void* stream;
  BackwardStep<Io, Acc> step;

  // out[B, n] = left[B, k] weights[k, n]
  void product(const Io* left, int64_t distance, int64_t k, const Io* weights, int64_t n, Acc* out) const {
    const Dtype sums = sizeof(Acc) == sizeof(double) ? Dtype::kFloat64 : Dtype::kFloat32;
    blas.gemm(blas.context, p.dtype, sums, false, false, p.batch, n, k, left, distance, weights, n, false,
              out, n);
  }

  // The later step's gate gradients through the recurrent weights.
  void recurrent_product() const {
    const auto& w = step.w();
    const int64_t rows = gates_of(p.cell) * p.hidden;
    const Io* gates = static_cast<const Io*>(w.dgates_h == nullptr ? w.dgates_x : w.dgates_h);
    const bool two_halves = p.cell == Cell::kGruResetBefore;  // Then n's is a product of its own.
    product(gates + step.later * p.batch * rows, rows, two_halves ? 2 * p.hidden : rows,
            static_cast<const Io*>(w.weight_hh), p.outputs, step.buffers.sums);
  }

  int cell() const {
    const auto& w = step.w();
    const int64_t H = p.hidden, R = p.outputs, count = p.batch * H;
    if (p.cell == Cell::kGruResetBefore) {
      if (const int error = for_each(count, UpdateStep<Io, Acc>{step}, stream)) return error;
      const Io* dn = static_cast<const Io*>(w.dgates_x) + step.t * p.batch * 3 * H + 2 * H;
      product(dn, 3 * H, H, static_cast<const Io*>(w.weight_hh) + 2 * H * R, H, step.buffers.inner);
      return for_each(count, ResetStep<Io, Acc>{step}, stream);
    }
    const bool normed = w.norm_gain != nullptr;
    if (p.projected || normed)
      if (const int error = for_each(p.batch * R, OutputStep<Io, Acc>{step}, stream)) return error;
    if (p.projected)
      product(static_cast<const Io*>(w.dprojected) + step.t * p.batch * R, R, R,
              static_cast<const Io*>(w.weight_hr), H, step.buffers.inner);
    if (normed) return for_each_row(p.batch, NormedStep<Io, Acc>{step}, stream);
    return with_cell(p.cell, [&]<template <typename> class C>(CellOf<C>) {
      return for_each(count, CellStep<C, Io, Acc>{step}, stream);
    });
  }

  int sum_rows(const Acc* rows, Acc* out, int64_t columns) const {
    if (out == nullptr) return 0;
    return for_each(columns, SumRows<Acc>{rows, out, p.batch, columns}, stream);
  }

  int run() {
    const bool back = step.back();
    if (const int error = for_each(p.batch * (p.outputs + p.hidden), Begin<Io, Acc>{step}, stream))
      return error;
    const int64_t all = p.steps * p.batch * p.outputs;
    if (const int error = for_each(all, Previous<Io, Acc>{step}, stream)) return error;
    for (int64_t s = p.steps - 1; s >= 0; --s) {
      step.t = back ? p.steps - 1 - s : s;
      if (step.later >= 0) recurrent_product();
      if (const int error = cell()) return error;
      step.later = step.t;
    }
    if (step.later >= 0) recurrent_product();
    if (const int error = for_each(p.batch * p.outputs, End<Io, Acc>{step}, stream)) return error;
    const auto& w = step.w();
    if (const int error = sum_rows(step.buffers.peephole, w.dpeephole, 3 * p.hidden)) return error;
    if (const int error = sum_rows(step.buffers.norm_gain, w.dnorm_gain, 5 * p.hidden)) return error;
    return sum_rows(step.buffers.norm_shift, w.dnorm_shift, 5 * p.hidden);
  }
};

}  // namespace

template <typename Acc>
int64_t step_workspace(const BackwardScan<Acc>& q) {
  Workspace counting{nullptr};
  Buffers<Acc>(q, counting);
  return counting.used;
}

template <typename Acc>
int step_backward(const BackwardScan<Acc>& q, const Blas& blas, void* workspace, void* stream) {
  return with_io<Acc>(q.forward.dtype, [&](auto io) {
    using Io = decltype(io);
    Workspace parts{static_cast<char*>(workspace)};
    const Buffers<Acc> buffers(q, parts);
    for (int d = 0; d < q.forward.directions; ++d) {
      Runner<Io, Acc> runner{q, q.forward, blas, stream, {{q.forward, d, 0}, q, buffers, -1}};
      if (const int error = runner.run()) return error;
    }
    return 0;
  });
}

template int64_t step_workspace(const BackwardScan<float>&);
template int64_t step_workspace(const BackwardScan<double>&);
template int step_backward(const BackwardScan<float>&, const Blas&, void*, void*);
template int step_backward(const BackwardScan<double>&, const Blas&, void*, void*);

}  // namespace cuda
}  // namespace torchrnn
