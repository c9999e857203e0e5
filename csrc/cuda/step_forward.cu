// The step path, forward: for each step a recurrent matrix product and a kernel for the cell.
//
// State: h and c are kept in the accumulators' dtype in h_n and c_n, which hold the last step's in the end;
// h_in is what the next product reads, rounded, and zero in rows whose state is forgotten before it.

#include "cuda/step.h"

namespace torchrnn {
namespace cuda {
namespace {

template <typename Io, typename Acc>
struct Buffers {
  Io* h_in;    // [B, R]
  Acc* sums;   // [B, G*H], the recurrent products
  Io* inner;   // [B, H]: r * h of kGruResetBefore, or h before the projection
  Acc* outer;  // [B, R], projected

  Buffers(const ForwardScan<Acc>& p, Workspace& workspace)
      : h_in(workspace.get<Io>(p.batch * p.outputs)),
        sums(workspace.get<Acc>(p.batch * gates_of(p.cell) * p.hidden)),
        inner(workspace.get<Io>(p.batch * p.hidden)),
        outer(workspace.get<Acc>(p.projected ? p.batch * p.outputs : 0)) {}
};

template <typename Io, typename Acc>
struct ForwardStep : Step<Acc> {
  Buffers<Io, Acc> buffers;
  int64_t next;  // the time of the step after, or -1

  RNN_FN Acc* h() const { return this->p.h_n + this->d * this->p.batch * this->p.outputs; }
  RNN_FN Acc* c() const { return this->p.c_n + this->d * this->p.batch * this->p.hidden; }

  // What the next product reads of unit u.
  RNN_FN void hand_on(int64_t b, int64_t u) const {
    if (next < 0) return;
    const int64_t i = b * this->p.outputs + u;
    round_to(this->cut(next, b) ? Acc(0) : h()[i], buffers.h_in[i]);
  }

  RNN_FN void emit(int64_t b, int64_t u, Acc value) const {
    const int64_t i = b * this->p.outputs + u;
    round_to(value, static_cast<Io*>(this->p.y)[this->output(this->t, b, this->p.outputs) + u]);
    h()[i] = value * this->mask_h(this->t, b, u);
    hand_on(b, u);
  }

  // A row that is past its length: its state stays.
  RNN_FN void rest(int64_t b, int64_t u) const {
    round_to(Acc(0), static_cast<Io*>(this->p.y)[this->output(this->t, b, this->p.outputs) + u]);
    hand_on(b, u);
  }

  RNN_FN void store_c(int64_t b, int64_t u, bool alive, Acc value) const {
    const auto& p = this->p;
    if (alive) c()[b * p.hidden + u] = value * this->mask_c(this->t, b, u);
    if (p.c_all != nullptr)
      round_to(alive ? value : Acc(0), static_cast<Io*>(p.c_all)[this->output(this->t, b, p.hidden) + u]);
  }

  // W x + bias of a gate.
  RNN_FN Acc input(int64_t b, int64_t gate, int64_t u) const {
    const auto& w = this->p.direction[this->d];
    const int64_t at = gate * this->p.hidden + u;
    const Acc wx = w.wx[this->gates_row(b, gates()) + at];
    return w.bias == nullptr ? wx : wx + w.bias[at];
  }
  RNN_FN Acc& sum(int64_t b, int64_t gate, int64_t u) const {
    return buffers.sums[(b * gates() + gate) * this->p.hidden + u];
  }
  RNN_FN int64_t gates() const { return gates_of(this->p.cell); }
};

// The states before the first step.
template <typename Io, typename Acc>
struct Begin : ForwardStep<Io, Acc> {
  RNN_FN void operator()(int64_t i) const {
    const auto& p = this->p;
    const int64_t b = i / (p.outputs + p.hidden), u = i % (p.outputs + p.hidden);
    if (u < p.outputs) {
      const int64_t at = b * p.outputs + u;
      this->h()[at] = p.h0 == nullptr ? Acc(0) : p.h0[this->d * p.batch * p.outputs + at];
      this->hand_on(b, u);
    } else if (p.c_n != nullptr) {
      const int64_t at = b * p.hidden + u - p.outputs;
      this->c()[at] = p.c0 == nullptr ? Acc(0) : p.c0[this->d * p.batch * p.hidden + at];
    }
  }
};

// A cell with one recurrent product, at one unit.
template <template <typename> class CellOf_, typename Io, typename Acc>
struct CellStep : ForwardStep<Io, Acc> {
  RNN_FN void operator()(int64_t i) const {
    using C = CellOf_<Acc>;
    const auto& p = this->p;
    const int64_t b = i / p.hidden, u = i % p.hidden;
    const bool alive = this->alive(b), cut = this->cut(b);
    typename C::State next{Acc(0), Acc(0)};
    if (alive) {
      Acc wx[C::kGates], rh[C::kGates], tape[C::kTape];
      for (int g = 0; g < C::kGates; ++g) wx[g] = this->input(b, g, u), rh[g] = this->sum(b, g, u);
      const Acc* bias_h = p.direction[this->d].bias_h;
      if constexpr (C::kHiddenBias >= 0) rh[C::kHiddenBias] += bias_h == nullptr ? Acc(0) : bias_h[u];
      typename C::State prev{Acc(0), Acc(0)};
      if (C::kReadsH && !cut) prev.h = this->h()[i];
      if (C::kMemory >= 0 && !cut) prev.c = this->c()[i];
      next = C::forward(this->policy(u), wx, rh, prev, tape);
      if (Acc* kept = this->tape(this->t, b))
        for (int k = 0; k < C::kTape; ++k) kept[k * p.hidden + u] = tape[k];
    }
    if (C::kMemory >= 0) this->store_c(b, u, alive, next.c);
    if (p.projected)
      round_to(next.h, this->buffers.inner[i]);
    else if (alive)
      this->emit(b, u, next.h);
    else
      this->rest(b, u);
  }
};

// Layer normalisation: a whole row, since its sums are normalised over the units.
template <typename Io, typename Acc>
struct NormedStep : ForwardStep<Io, Acc> {
  // out = (x - mean) / sqrt(variance + eps); returns 1 / sqrt(...). out may be x.
  RNN_FN Acc normalise(Lanes lanes, const Acc* x, Acc* out) const {
    // In double, since small sums that cancel are divided by their own spread.
    double total = 0, squares = 0;
    const double size(this->p.hidden);
    for (int64_t u = lanes.lane; u < this->p.hidden; u += lanes.count) total += x[u];
    const Acc mean = lanes.sum(total) / size;
    for (int64_t u = lanes.lane; u < this->p.hidden; u += lanes.count)
      squares += (x[u] - mean) * (x[u] - mean);
    const Acc scale = Acc(1) / Acc(sqrt(double(lanes.sum(squares) / size + this->p.norm_eps)));
    for (int64_t u = lanes.lane; u < this->p.hidden; u += lanes.count) out[u] = (x[u] - mean) * scale;
    return scale;
  }

  RNN_FN void operator()(int64_t b, Lanes lanes) const {
    const auto& p = this->p;
    const auto& w = p.direction[this->d];
    const int64_t H = p.hidden;
    if (!this->alive(b)) {
      for (int64_t u = lanes.lane; u < H; u += lanes.count) {
        this->store_c(b, u, false, Acc(0));
        if (p.projected)
          round_to(Acc(0), this->buffers.inner[b * H + u]);
        else
          this->rest(b, u);
      }
      return;
    }
    const bool cut = this->cut(b);
    Acc* sums = this->buffers.sums + b * 4 * H;
    Acc* tape = this->tape(this->t, b);
    Acc* normed = tape == nullptr ? sums : tape;
    // In inference the first gate's place is free by the time c is there.
    Acc* c_sums = tape == nullptr ? sums : tape + kNormedC * H;
    Acc scale[5];
    for (int g = 0; g < 4; ++g) {
      for (int64_t u = lanes.lane; u < H; u += lanes.count) sums[g * H + u] += this->input(b, g, u);
      scale[g] = normalise(lanes, sums + g * H, normed + g * H);
    }
    for (int64_t u = lanes.lane; u < H; u += lanes.count) {
      const Varied<Acc> policy = this->policy(u);
      const Acc c_prev = cut ? Acc(0) : this->c()[b * H + u];
      Acc sum_i = scaled(w, normed[u], u), sum_f = scaled(w, normed[H + u], H + u);
      policy.see_old(c_prev, sum_i, sum_f);
      const Acc g = policy.activate(scaled(w, normed[2 * H + u], 2 * H + u));
      c_sums[u] = sigmoid(sum_f) * c_prev + sigmoid(sum_i) * g;
    }
    scale[4] = normalise(lanes, c_sums, c_sums);
    for (int64_t u = lanes.lane; u < H; u += lanes.count) {
      const Varied<Acc> policy = this->policy(u);
      const Acc c = policy.clip(scaled(w, c_sums[u], 4 * H + u));
      Acc sum_o = scaled(w, normed[3 * H + u], 3 * H + u);
      policy.see_new(c, sum_o);
      const Acc h = sigmoid(sum_o) * policy.activate(c);
      this->store_c(b, u, true, c);
      if (p.projected)
        round_to(h, this->buffers.inner[b * H + u]);
      else
        this->emit(b, u, h);
      if (tape != nullptr) tape[Lstm<Acc>::kMemory * H + u] = c;
    }
    if (tape != nullptr && lanes.lane == 0)
      for (int k = 0; k < 5; ++k) tape[(kNormedC + 1) * H + k] = scale[k];
  }
};

// The output after its projection.
template <typename Io, typename Acc>
struct ProjectedStep : ForwardStep<Io, Acc> {
  RNN_FN void operator()(int64_t i) const {
    const auto& p = this->p;
    const int64_t b = i / p.outputs, u = i % p.outputs;
    if (!this->alive(b)) return this->rest(b, u);
    Acc value = this->buffers.outer[i];
    if (this->clips_output()) {
      if (Acc* kept = this->tape(this->t, b)) kept[this->clip_place() + u] = value;
      value = at_most(at_least(value, -p.proj_clip), p.proj_clip);
    }
    this->emit(b, u, value);
  }
};

// kGruResetBefore between its two products: r * h for the second one. z waits in place of its sum.
template <typename Io, typename Acc>
struct ResetStep : ForwardStep<Io, Acc> {
  RNN_FN void operator()(int64_t i) const {
    const auto& p = this->p;
    const int64_t b = i / p.hidden, u = i % p.hidden;
    if (!this->alive(b)) return round_to(Acc(0), this->buffers.inner[i]);
    const Acc wx[2] = {this->input(b, 0, u), this->input(b, 1, u)};
    const Acc rh[2] = {this->sum(b, 0, u), this->sum(b, 1, u)};
    Acc r, z;
    GruResetBefore<Acc>::gates(wx, rh, r, z);
    round_to(this->cut(b) ? Acc(0) : r * this->h()[i], this->buffers.inner[i]);
    this->sum(b, 1, u) = z;
    if (Acc* tape = this->tape(this->t, b)) tape[u] = r, tape[p.hidden + u] = z;
  }
};

// And after them.
template <typename Io, typename Acc>
struct UpdateStep : ForwardStep<Io, Acc> {
  RNN_FN void operator()(int64_t i) const {
    using C = GruResetBefore<Acc>;
    const auto& p = this->p;
    const int64_t b = i / p.hidden, u = i % p.hidden;
    if (!this->alive(b)) return this->rest(b, u);
    const Acc n = C::candidate(this->policy(u), this->input(b, 2, u), this->sum(b, 2, u));
    const Acc h = C::output(this->sum(b, 1, u), n, this->cut(b) ? Acc(0) : this->h()[i]);
    if (Acc* tape = this->tape(this->t, b)) tape[2 * p.hidden + u] = n, tape[C::kOutput * p.hidden + u] = h;
    this->emit(b, u, h);
  }
};

template <typename Io, typename Acc>
struct Runner {
  const ForwardScan<Acc>& p;
  const Blas& blas;
  void* stream;
  ForwardStep<Io, Acc> step;

  // out[B, n] = left[B, k] weights[n, k]'
  void product(const Io* left, int64_t k, const Io* weights, int64_t n, Acc* out, int64_t distance) const {
    const Dtype sums = sizeof(Acc) == sizeof(double) ? Dtype::kFloat64 : Dtype::kFloat32;
    blas.gemm(blas.context, p.dtype, sums, false, true, p.batch, n, k, left, k, weights, k, false, out,
              distance);
  }

  int cell() const {
    const auto& w = p.direction[step.d];
    const int64_t H = p.hidden, R = p.outputs, rows = gates_of(p.cell) * H, count = p.batch * H;
    const Io* weight_hh = static_cast<const Io*>(w.weight_hh);
    const auto& b = step.buffers;
    if (p.cell == Cell::kGruResetBefore) {
      product(b.h_in, R, weight_hh, 2 * H, b.sums, rows);
      if (const int error = for_each(count, ResetStep<Io, Acc>{step}, stream)) return error;
      product(b.inner, H, weight_hh + 2 * H * R, H, b.sums + 2 * H, rows);
      return for_each(count, UpdateStep<Io, Acc>{step}, stream);
    }
    product(b.h_in, R, weight_hh, rows, b.sums, rows);
    if (w.norm_gain != nullptr) return for_each_row(p.batch, NormedStep<Io, Acc>{step}, stream);
    return with_cell(p.cell, [&]<template <typename> class C>(CellOf<C>) {
      return for_each(count, CellStep<C, Io, Acc>{step}, stream);
    });
  }

  int run() {
    const bool back = step.back();
    step.next = back ? p.steps - 1 : 0;
    if (const int error = for_each(p.batch * (p.outputs + p.hidden), Begin<Io, Acc>{step}, stream))
      return error;
    for (int64_t s = 0; s < p.steps; ++s) {
      step.t = back ? p.steps - 1 - s : s;
      step.next = s + 1 == p.steps ? -1 : step.t + (back ? -1 : 1);
      if (const int error = cell()) return error;
      if (!p.projected) continue;
      const Io* weight_hr = static_cast<const Io*>(p.direction[step.d].weight_hr);
      product(step.buffers.inner, p.hidden, weight_hr, p.outputs, step.buffers.outer, p.outputs);
      if (const int error = for_each(p.batch * p.outputs, ProjectedStep<Io, Acc>{step}, stream)) return error;
    }
    return 0;
  }
};

}  // namespace

template <typename Acc>
int64_t step_workspace(const ForwardScan<Acc>& p) {
  Workspace counting{nullptr};
  with_io<Acc>(p.dtype, [&](auto io) {
    Buffers<decltype(io), Acc>(p, counting);
    return 0;
  });
  return counting.used;
}

template <typename Acc>
int step_forward(const ForwardScan<Acc>& p, const Blas& blas, void* workspace, void* stream) {
  if (p.batch == 0) return 0;
  return with_io<Acc>(p.dtype, [&](auto io) {
    using Io = decltype(io);
    Workspace parts{static_cast<char*>(workspace)};
    const Buffers<Io, Acc> buffers(p, parts);
    for (int d = 0; d < p.directions; ++d) {
      Runner<Io, Acc> runner{p, blas, stream, {{p, d, 0}, buffers, -1}};
      if (const int error = runner.run()) return error;
    }
    return 0;
  });
}

template int64_t step_workspace(const ForwardScan<float>&);
template int64_t step_workspace(const ForwardScan<double>&);
template int step_forward(const ForwardScan<float>&, const Blas&, void*, void*);
template int step_forward(const ForwardScan<double>&, const Blas&, void*, void*);

}  // namespace cuda
}  // namespace torchrnn
