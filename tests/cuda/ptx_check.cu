// A kernel with every wrapper of cuda/ptx.h, for both half types and TF32. It is compiled, not run: ptxas
// must accept each instruction.

#include "cuda/ptx.h"

namespace torchrnn {

template <typename T>
RNN_KERNEL void RNN_LAUNCH_BOUNDS(256) ptx_check(const float* in, float* out) {
  using namespace ptx;
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared_memory());
  char* rows = shared_memory() + 1024;
  if (thread() == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_expect(barrier, 256 * 24);
  }
  sync_cluster();
  prefetch(in + thread());
  const uint32_t pair = pack<T>(in[thread()], in[thread() + 1]);
  const uint32_t four[4] = {pair, transpose_matrix(pair), shuffle(pair, thread() % 32 ^ 1), 0};
  const uint32_t two[2] = {pair, pair + 1};
  const int to = (cluster_rank() + 1) % cluster_size();
  store_async(rows + thread() * 16, to, four, barrier);
  store_async(rows + 4096 + thread() * 8, to, two, barrier);
  mbarrier_wait(barrier, 0);
  sync_warp();
  uint32_t a[4], b[2];
  float d[4] = {in[0], in[1], in[2], in[3]};
  load_matrix(a, rows + thread() % 32 * 16);
  load_matrix(b, rows + thread() % 16 * 16);
  RNN_UNROLL
  for (int k = 0; k < 2; ++k) mma<T>(d, a, b);
  a[0] = tf32(d[0]);
  mma<float>(d, a, b);
  sync_threads();
  out[(block_y() * 64 + block_x()) * 256 + thread()] =
      d[0] + d[1] + d[2] + d[3] + low<T>(a[0]) + high<T>(a[0]);
  sync_cluster();
}

template RNN_KERNEL void ptx_check<ptx::Bf16>(const float* in, float* out);
template RNN_KERNEL void ptx_check<ptx::Half>(const float* in, float* out);

}  // namespace torchrnn
