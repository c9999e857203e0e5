// AVX-512 as of Skylake-SP, 64-byte vectors.
#ifdef __x86_64__

#define RNN_ISA avx512
#define RNN_VECTOR_BYTES 64
#define RNN_REGISTERS 32

// Before the target is set: what these declare is shared with other files and must stay baseline code.
#include <immintrin.h>
#include <sched.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <utility>

#include "cpu/kernels.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")
#endif

#include "cpu/isa.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace torchrnn {
namespace cpu {

const Kernels kAvx512Kernels = RNN_KERNELS;

}  // namespace cpu
}  // namespace torchrnn

#endif
