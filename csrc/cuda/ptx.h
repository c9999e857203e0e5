// The device instructions that the cluster kernels are made of. nvcc gets inline PTX for sm_90 and later;
// with RNN_EMULATE a host compiler gets the same functions from cuda/ptx_host.h, so that the very sources of
// the kernels run in tests on a machine without a GPU.
//
// All addresses of shared memory are plain pointers into the caller's own CTA. Blocks have one dimension, and
// a cluster is of neighbours along x.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/half.h"

namespace torchrnn {
namespace ptx {

using cuda::Bf16;
using cuda::Half;

}  // namespace ptx
}  // namespace torchrnn

#ifdef RNN_EMULATE

#include "cuda/ptx_host.h"

#define RNN_DEVICE inline
#define RNN_KERNEL
#define RNN_LAUNCH_BOUNDS(threads)
#define RNN_UNROLL

#else

#define RNN_DEVICE __device__ __forceinline__
#define RNN_KERNEL __global__
// One CTA per SM, so that a thread may use all registers that there are.
#define RNN_LAUNCH_BOUNDS(threads) __launch_bounds__(threads, 1)
#define RNN_UNROLL _Pragma("unroll")

namespace torchrnn {
namespace ptx {

RNN_DEVICE int thread() { return threadIdx.x; }
RNN_DEVICE int block_x() { return blockIdx.x; }
RNN_DEVICE int block_y() { return blockIdx.y; }

RNN_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

RNN_DEVICE int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// The dynamic shared memory, aligned to 1024 bytes and at the same address in every CTA of a cluster.
RNN_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char torchrnn_shared_memory[];
  return torchrnn_shared_memory;
}

RNN_DEVICE uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

RNN_DEVICE void sync_threads() { __syncthreads(); }
RNN_DEVICE void sync_warp() { __syncwarp(); }

// x, of which a compiler knows nothing, so that what follows from it is computed where it stands and not kept
// in registers from before a loop.
RNN_DEVICE int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Asks L2 for what is at an address of global memory.
RNN_DEVICE void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

// What any thread of the cluster wrote before is seen by all after. One must stand before the first write to
// another CTA, which may not run yet, and one after the last, since the other CTA may run no longer.
RNN_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// A mbarrier is over a phase, and in the next one, once `arrivals` threads have arrived and as many bytes
// have come by store_async as were expected.
RNN_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

// Makes initialised mbarriers known to other CTAs' store_async; a sync_cluster must follow.
RNN_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and adds `bytes` to what this phase waits for.
RNN_DEVICE void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

RNN_DEVICE bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

RNN_DEVICE uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Waits for the end of the phase of this parity: the n-th phase of a barrier, counted from 0, has parity n
// & 1. Traps after two seconds, so that a lost message is an error and not a hang.
RNN_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  if (mbarrier_try_wait(barrier, parity)) return;
  const uint64_t start = nanoseconds();
  do {
#pragma unroll 1
    for (int i = 0; i < 64; ++i) {
      if (mbarrier_try_wait(barrier, parity)) return;
    }
  } while (nanoseconds() - start < 2000000000);
  __trap();
}

// The address in CTA `rank` of the cluster of what is at this place in the caller's.
RNN_DEVICE uint32_t remote_address(const void* local, int rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(local)), "r"(rank));
  return remote;
}

// Writes value some time later to this place in CTA `rank`, and counts its bytes on that CTA's barrier. The
// write is seen by those who have waited for that barrier.
RNN_DEVICE void store_async(void* local, int rank, const uint32_t (&value)[4], uint64_t* local_barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          remote_address(local, rank)),
      "r"(value[0]), "r"(value[1]), "r"(value[2]), "r"(value[3]), "r"(remote_address(local_barrier, rank))
      : "memory");
}

RNN_DEVICE void store_async(void* local, int rank, const uint32_t (&value)[2], uint64_t* local_barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                   remote_address(local, rank)),
               "r"(value[0]), "r"(value[1]), "r"(remote_address(local_barrier, rank))
               : "memory");
}

// Loads 8 x 8 matrices of 16-bit values from shared memory. Lane l gives the address of row l % 8 (16 bytes)
// of matrix l / 8; it gets in r[i] the values 2 * (l % 4) and the next of row l / 4 of matrix i.
RNN_DEVICE void load_matrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Two matrices. The addresses of lanes 16 and up are not used.
RNN_DEVICE void load_matrix(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// Transposes an 8 x 8 matrix of 16-bit values that the warp has as load_matrix gives it.
RNN_DEVICE uint32_t transpose_matrix(uint32_t a) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(a));
  return result;
}

// The value of another lane.
RNN_DEVICE uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(0xFFFFFFFF, value, lane); }

// Two values in a register, as fragments of matrices have them; rounding is to nearest even. These are single
// instructions, unlike the portable ones of cuda/half.h; a NaN becomes 0x7FFF.
template <typename T>
RNN_DEVICE uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// Rounded to TF32, of two equally near numbers to that further from zero.
RNN_DEVICE uint32_t tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

template <typename T>
RNN_DEVICE float low(uint32_t pair) {
  if constexpr (std::is_same_v<T, Bf16>) return __uint_as_float(pair << 16);
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(uint16_t(pair)));
  return value;
}

template <typename T>
RNN_DEVICE float high(uint32_t pair) {
  if constexpr (std::is_same_v<T, Bf16>) return __uint_as_float(pair & 0xFFFF0000);
  return low<T>(pair >> 16);
}

// d += a b for a [16, 16] and b [16, 8]. With r = lane / 4 and q = lane % 4 a lane has, pairs along k,
//   a: (r, 2q), (r + 8, 2q), (r, 2q + 8), (r + 8, 2q + 8)      as (row, first k)
//   b: (2q, r), (2q + 8, r)                                    as (first k, column)
//   d: (r, 2q), (r, 2q + 1), (r + 8, 2q), (r + 8, 2q + 1)      as (row, column)
// Of float, in TF32, a is [16, 8] and b [8, 8], with one number where there are pairs: halve all k.
template <typename T>
RNN_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<T, Bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace ptx
}  // namespace torchrnn

#endif
