// Instantiates every cell on the device. It is compiled by `make cuda-check` and linked into nothing: the
// cells are shared with CUDA, and must stay free of what only a host compiler takes.

#include "cells/elementwise.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "params.h"
#include "scan_params.h"

namespace torchrnn {

template <typename T>
__device__ Varied<T> varied(const T* in) {
  return {Activation(in[0] > 0), true, true, in[1], in[2], in[3], in[4]};
}

template <typename Cell, typename T>
__global__ void cell_check(const T* in, T* out) {
  const Varied<T> policy = varied(in);
  T wx[Cell::kGates], rh[Cell::kGates], tape[Cell::kTape], d[Cell::kGateGrads];
  for (int g = 0; g < Cell::kGates; ++g) wx[g] = in[g], rh[g] = in[Cell::kGates + g];
  const typename Cell::State prev{in[0], in[1]};
  const typename Cell::State next = Cell::forward(policy, wx, rh, prev, tape);
  const typename Cell::State dprev = Cell::backward(policy, tape, prev, next, d);
  out[0] = next.h + next.c + dprev.h + dprev.c;
  for (int g = 0; g < Cell::kGateGrads; ++g) out[1 + g] = d[g];
}

template <typename T>
__global__ void reset_before_check(const T* in, T* out) {
  using Cell = GruResetBefore<T>;
  const Plain policy;
  const T wx[2] = {in[0], in[1]}, rh[2] = {in[2], in[3]};
  T r, z, dz, dn;
  Cell::gates(wx, rh, r, z);
  const T n = Cell::candidate(policy, in[4], r * in[5]);
  Cell::backward(policy, z, n, in[5], Cell::output(z, n, in[5]), dz, dn);
  out[0] = dz, out[1] = dn, out[2] = Cell::backward_reset(r, in[5], dn);
}

template <template <typename, typename> class CellOf, typename Act, typename T>
__global__ void elementwise_check(const T* in, T* out) {
  using Cell = CellOf<T, Act>;
  constexpr int G = Cell::kGates;
  T wx[G], u[G], d[G], du[G] = {};
  for (int g = 0; g < G; ++g) wx[g] = in[g], u[g] = in[G + g];
  const elementwise::State<T> prev{in[0], in[1]};
  const elementwise::State<T> next = Cell::forward(wx, u, prev);
  const elementwise::State<T> dprev = Cell::backward(wx, u, prev, next.h, next, d, du);
  out[0] = next.h + next.c + dprev.h + dprev.c;
  for (int g = 0; g < G; ++g) out[1 + g] = d[g] + du[g];
}

template __global__ void cell_check<Lstm<float>>(const float*, float*);
template __global__ void cell_check<Lstm<double>>(const double*, double*);
template __global__ void cell_check<LstmCoupled<float>>(const float*, float*);
template __global__ void cell_check<LstmCoupled<double>>(const double*, double*);
template __global__ void cell_check<Gru<float>>(const float*, float*);
template __global__ void cell_check<Gru<double>>(const double*, double*);
template __global__ void cell_check<Rnn<float>>(const float*, float*);
template __global__ void cell_check<Rnn<double>>(const double*, double*);
template __global__ void reset_before_check(const float*, float*);
template __global__ void reset_before_check(const double*, double*);
template __global__ void elementwise_check<elementwise::IndRnn, elementwise::Tanh>(const float*, float*);
template __global__ void elementwise_check<elementwise::IndRnn, elementwise::Relu>(const double*, double*);
template __global__ void elementwise_check<elementwise::IndyGru, elementwise::Sigmoid>(const float*, float*);
template __global__ void elementwise_check<elementwise::IndyGru, elementwise::Tanh>(const double*, double*);
template __global__ void elementwise_check<elementwise::IndyLstm, elementwise::Tanh>(const float*, float*);
template __global__ void elementwise_check<elementwise::IndyLstm, elementwise::Relu>(const double*, double*);
template __global__ void elementwise_check<elementwise::Sru, elementwise::Tanh>(const float*, float*);
template __global__ void elementwise_check<elementwise::Sru, elementwise::Identity>(const double*, double*);

// The parameters of a layer go to a kernel by value.
static_assert(sizeof(LayerParams<float>) < 4096, "kernel parameters are limited to 4 KB");
static_assert(sizeof(ScanBackwardParams<float>) < 4096, "kernel parameters are limited to 4 KB");

}  // namespace torchrnn
