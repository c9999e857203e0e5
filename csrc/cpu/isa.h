// The body of each instruction set's translation unit, included after RNN_ISA, RNN_VECTOR_BYTES and
// RNN_REGISTERS are defined and the compiler's target is set.

#include "cpu/backward.h"
#include "cpu/dropout.h"
#include "cpu/floors.h"
#include "cpu/forward.h"
#include "cpu/scan.h"

namespace torchrnn {
inline namespace RNN_ISA {

template <template <typename> class C>
struct CellType {};
template <typename P>
struct Type {};

// Calls use(cell, policy) with the types that a call needs. One row per cell: what ops.py calls it, and its
// maths.
template <typename T, typename Use>
auto with_cell(const LayerParams<T>& p, const Use& use) {
  const bool varied = is_varied(p);
  const auto either = [&](auto cell) {
    return varied ? use(cell, Type<Varied<VecOf<T>>>()) : use(cell, Type<Plain>());
  };
  switch (p.cell) {
    case Cell::kGru:
      return either(CellType<Gru>());
    case Cell::kGruResetBefore:
      return either(CellType<GruResetBefore>());
    case Cell::kRnn:
      if (!varied && p.activation == Activation::kRelu) return use(CellType<Rnn>(), Type<Relu>());
      return either(CellType<Rnn>());
    case Cell::kLstmCoupled:
      return use(CellType<LstmCoupled>(), Type<Varied<VecOf<T>>>());
    default:
      if (p.weights[0].norm_gain != nullptr) return use(CellType<Lstm>(), Type<Normed<VecOf<T>>>());
      return either(CellType<Lstm>());
  }
}

template <typename T>
void forward(const LayerParams<T>& p, int threads, cpu::RunTeam run_team) {
  const ZeroUpper end;
  with_cell(p, [&]<template <typename> class C, typename P>(CellType<C>, Type<P>) {
    run_forward<T, C, P>(p, threads, run_team);
  });
}

template <typename T>
int64_t pack(const LayerParams<T>& p, T* out) {
  const ZeroUpper end;
  return with_cell(p, [&]<template <typename> class C, typename P>(CellType<C>, Type<P>) {
    return Weights<T, C>::pack_all(p, out);
  });
}

template <typename T>
void backward(const BackwardParams<T>& p, int threads, cpu::RunTeam run_team) {
  const ZeroUpper end;
  with_cell(p.layer, [&]<template <typename> class C, typename P>(CellType<C>, Type<P>) {
    run_backward<T, C, P>(p, threads, run_team);
  });
}

}  // namespace RNN_ISA
}  // namespace torchrnn

#define RNN_KERNELS                                                                   \
  {torchrnn::RNN_ISA::forward<float>,       torchrnn::RNN_ISA::forward<double>,       \
   torchrnn::RNN_ISA::backward<float>,      torchrnn::RNN_ISA::backward<double>,      \
   torchrnn::RNN_ISA::pack<float>,          torchrnn::RNN_ISA::pack<double>,          \
   torchrnn::RNN_ISA::scan_forward<float>,  torchrnn::RNN_ISA::scan_forward<double>,  \
   torchrnn::RNN_ISA::scan_backward<float>, torchrnn::RNN_ISA::scan_backward<double>, \
   torchrnn::RNN_ISA::dropout<float>,       torchrnn::RNN_ISA::dropout<double>,       \
   torchrnn::RNN_ISA::multiply_add_loop,    torchrnn::RNN_ISA::read_loop}
