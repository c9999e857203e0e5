// The baseline of the platform: SSE2 on x86-64, NEON on aarch64; 16-byte vectors.
#define RNN_ISA generic
#define RNN_VECTOR_BYTES 16
#ifdef __aarch64__
#define RNN_REGISTERS 32
#else
#define RNN_REGISTERS 16
#endif

#include "cpu/isa.h"

namespace torchrnn {
namespace cpu {

const Kernels kGenericKernels = RNN_KERNELS;

}  // namespace cpu
}  // namespace torchrnn
