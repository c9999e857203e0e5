// The body of each instruction set's translation unit, included after RNN_ISA, RNN_VECTOR_BYTES and
// RNN_REGISTERS are defined and the compiler's target is set.

#include "cpu/backward.h"
#include "cpu/floors.h"
#include "cpu/forward.h"

namespace torchrnn {
inline namespace RNN_ISA {

// One row per cell: what ops.py calls it, and its maths.
template <typename T>
void forward(const LayerParams<T>& p, int threads, cpu::RunTeam run_team) {
  switch (p.cell) {
    case Cell::kLstm:
      return run_forward<T, Lstm>(p, threads, run_team);
    case Cell::kGru:
      return run_forward<T, Gru>(p, threads, run_team);
    case Cell::kGruResetBefore:
      return run_forward<T, GruResetBefore>(p, threads, run_team);
    case Cell::kRnn:
      return p.activation == Activation::kRelu ? run_forward<T, RnnRelu>(p, threads, run_team)
                                               : run_forward<T, RnnTanh>(p, threads, run_team);
  }
}

template <typename T>
int64_t pack(const LayerParams<T>& p, T* out) {
  switch (p.cell) {
    case Cell::kLstm:
      return Weights<T, Lstm>::pack_all(p, out);
    case Cell::kGru:
      return Weights<T, Gru>::pack_all(p, out);
    case Cell::kGruResetBefore:
      return Weights<T, GruResetBefore>::pack_all(p, out);
    case Cell::kRnn:
      return Weights<T, RnnTanh>::pack_all(p, out);
  }
  return 0;
}

template <typename T>
void backward(const BackwardParams<T>& p, int threads, cpu::RunTeam run_team) {
  switch (p.layer.cell) {
    case Cell::kLstm:
      return run_backward<T, Lstm>(p, threads, run_team);
    case Cell::kGru:
      return run_backward<T, Gru>(p, threads, run_team);
    case Cell::kGruResetBefore:
      return run_backward<T, GruResetBefore>(p, threads, run_team);
    case Cell::kRnn:
      return p.layer.activation == Activation::kRelu ? run_backward<T, RnnRelu>(p, threads, run_team)
                                                     : run_backward<T, RnnTanh>(p, threads, run_team);
  }
}

}  // namespace RNN_ISA
}  // namespace torchrnn

#define RNN_KERNELS                                                           \
  {torchrnn::RNN_ISA::forward<float>,    torchrnn::RNN_ISA::forward<double>,  \
   torchrnn::RNN_ISA::backward<float>,   torchrnn::RNN_ISA::backward<double>, \
   torchrnn::RNN_ISA::pack<float>,       torchrnn::RNN_ISA::pack<double>,     \
   torchrnn::RNN_ISA::multiply_add_loop, torchrnn::RNN_ISA::read_loop}
