// What an instruction set's build of the CPU kernels offers to ops.cpp.
#pragma once

#include "dropout_params.h"
#include "params.h"
#include "scan_params.h"

namespace torchrnn {
namespace cpu {

// In the order of ISAS in torchrnn/_native.py.
enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };
constexpr int kIsaCount = 3;

// Calls task(context, id) once for each id in 0..threads-1 and returns when all are done. They run at the
// same time as far as there are threads for them, but one may also begin when others have ended: a task must
// not wait for what another has not begun.
using Task = void (*)(void* context, int id);
using RunTeam = void (*)(int threads, Task task, void* context);

// The size of a core's own cache; 1 MB where the system does not tell.
int64_t l2_bytes();

struct Kernels {
  void (*forward_f32)(const LayerParams<float>&, int threads, RunTeam);
  void (*forward_f64)(const LayerParams<double>&, int threads, RunTeam);
  void (*backward_f32)(const BackwardParams<float>&, int threads, RunTeam);
  void (*backward_f64)(const BackwardParams<double>&, int threads, RunTeam);
  // Lays the weights out as LayerParams::packed wants them, unless `out` is null; returns their number.
  int64_t (*pack_f32)(const LayerParams<float>&, float* out);
  int64_t (*pack_f64)(const LayerParams<double>&, double* out);
  void (*scan_f32)(const ScanParams<float>&, int threads, RunTeam);
  void (*scan_f64)(const ScanParams<double>&, int threads, RunTeam);
  void (*scan_backward_f32)(const ScanBackwardParams<float>&, int threads, RunTeam);
  void (*scan_backward_f64)(const ScanBackwardParams<double>&, int threads, RunTeam);
  void (*dropout_f32)(const DropoutParams<float>&, int threads, RunTeam);
  void (*dropout_f64)(const DropoutParams<double>&, int threads, RunTeam);
  // Floors that bench measures against. iterations of a loop of independent multiply-adds; returns their
  // number.
  double (*multiply_add_loop)(int64_t iterations);
  // Reads count floats, times over; returns their sum so that the loop is not dropped.
  float (*read_loop)(const float* data, int64_t count, int64_t times);
};

extern const Kernels kGenericKernels;
#ifdef __x86_64__
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace cpu
}  // namespace torchrnn
