// Measures what decides the design of the cluster kernels, in the very instructions that they are made of,
// and prints one JSON object: times in nanoseconds per iteration, and how many clusters the device runs at
// once.
//
//   nvcc -std=c++20 -O3 -Icsrc -gencode arch=compute_90a,code=sm_90a gpu/probes.cu -o probes
//
// Every wait in a loop is bounded and ends in a trap, so that a mistake is an error and not a hang. An
// iteration costs the difference of a long and a short run, without what a launch costs. No torch here.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "cuda/ptx.h"

namespace torchrnn {
namespace {

constexpr int kLong = 2200, kShort = 200;  // Iterations.
constexpr int kRepeats = 5;
constexpr int kChunk = 16;  // Bytes of a store_async.
constexpr int kWarp = 32, kThreads = 256;
constexpr size_t kSharedBytes = 200 * 1024;  // A CTA's; so much leaves one CTA per multiprocessor.
constexpr int kClusters[] = {1, 2, 4, 8, 16};
constexpr uint32_t kUnwritten = 0xFFFFFFFF;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "probes: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);  // After a trap the context is lost.
}

RNN_KERNEL void cluster_barrier(int iterations) {
  for (int i = 0; i < iterations; ++i) ptx::sync_cluster();
}

// Each CTA sends `chunks` chunks to every CTA of its cluster, and the next round starts once all have come:
// buffers, barriers and order as in the forward kernel. Four threads share a chunk and send it to every
// fourth CTA. What is sent is the number of the round, which the reader checks. All warps send, so that none
// can fall two rounds behind.
RNN_KERNEL void all_gather(int iterations, int chunks) {
  const int rank = ptx::cluster_rank(), count = ptx::cluster_size(), thread = ptx::thread();
  const uint32_t bytes = count * chunks * kChunk;
  auto* barriers = reinterpret_cast<uint64_t*>(ptx::shared_memory());
  char* buffers = ptx::shared_memory() + 1024;
  const int chunk = thread / 4, quarter = thread % 4;
  if (thread == 0) {
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(&barriers[i], 1);
      ptx::mbarrier_expect(&barriers[i], bytes);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::sync_cluster();
  for (int t = 0; t < iterations; ++t) {
    const int now = t & 1, next = now ^ 1;
    if (t > 0) {
      ptx::mbarrier_wait(&barriers[now], ((t - 2 + now) >> 1) & 1);
      if (thread == 0) ptx::mbarrier_expect(&barriers[now], bytes);
    }
    uint32_t value[4] = {uint32_t(t), uint32_t(t), uint32_t(t), uint32_t(t)};
    if (chunk < chunks && t > 0) {
      const int from = (rank + chunk) % count;
      const char* read = buffers + (now * count * chunks + from * chunks + chunk) * kChunk;
      if (*reinterpret_cast<const volatile uint32_t*>(read) != uint32_t(t - 1)) __trap();
    }
    ptx::sync_warp();
    if (chunk < chunks && t < iterations - 1) {
      char* write = buffers + (next * count * chunks + rank * chunks + chunk) * kChunk;
      for (int to = quarter; to < count; to += 4) ptx::store_async(write, to, value, &barriers[next]);
    }
  }
  ptx::sync_cluster();
}

// A barrier of all CTAs through global memory. The launch is cooperative, so that all of them run.
RNN_KERNEL void grid_barrier(int iterations, unsigned* arrived) {
  for (int i = 1; i <= iterations; ++i) {
    ptx::sync_threads();
    if (ptx::thread() == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
      const uint64_t start = ptx::nanoseconds();
      for (unsigned seen = 0; seen < i * gridDim.x;) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
        if (ptx::nanoseconds() - start > 2000000000) __trap();
      }
    }
    ptx::sync_threads();
  }
}

// All CTAs tell each other `chunks` chunks through global memory, without a barrier: a chunk is its own flag,
// since it is written once, over bits that no chunk has. The next round starts once all have come.
RNN_KERNEL void global_gather(int iterations, int chunks, uint32_t* buffer) {
  const int all = gridDim.x * chunks;
  for (int t = 0; t < iterations; ++t) {
    uint32_t* round = buffer + size_t(t) * all * 4;
    if (ptx::thread() < chunks) {
      const uint32_t* to = round + (blockIdx.x * chunks + ptx::thread()) * 4;
      asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %1, %1, %1};" ::"l"(to), "r"(t) : "memory");
    }
    const uint64_t start = ptx::nanoseconds();
    for (int i = ptx::thread(); i < all; i += blockDim.x) {
      uint32_t a, b, c, d;
      do {
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                     : "l"(round + i * 4)
                     : "memory");
        if (ptx::nanoseconds() - start > 2000000000) __trap();
      } while (a == kUnwritten || b == kUnwritten || c == kUnwritten || d == kUnwritten);
      if (a != t || b != t || c != t || d != t) __trap();
    }
    ptx::sync_threads();
  }
}

// The products of one step of a large layer: 32 of m16n8k16 per warp on weights that stay in registers, the
// sums of one step being the operands of the next.
RNN_KERNEL void __launch_bounds__(kThreads, 1) resident_mma(int iterations, uint32_t seed, float* out) {
  constexpr int kTiles = 32, kSums = 4;
  uint32_t a[kTiles][4], b[2] = {seed, seed};
  for (int i = 0; i < kTiles; ++i) {
    for (int j = 0; j < 4; ++j) a[i][j] = seed * (i + 3 * j + ptx::thread());
  }
  float sum = 0;
  for (int t = 0; t < iterations; ++t) {
    float d[kSums][4] = {};
    RNN_UNROLL
    for (int i = 0; i < kTiles; ++i) ptx::mma<ptx::Bf16>(d[i % kSums], a[i], b);
    for (int i = 0; i < kSums; ++i) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
    b[0] = seed ^ (__float_as_uint(sum) & 1);
    ptx::sync_threads();
  }
  out[blockIdx.x * kThreads + ptx::thread()] = sum;
}

// How a kernel is launched: `grid` CTAs in clusters of `cluster`, or cooperatively.
struct Launch {
  int grid, cluster, threads;
  size_t shared = 0;
  bool cooperative = false;

  template <typename... Parameters>
  cudaError_t operator()(void (*kernel)(Parameters...), Parameters... parameters) const {
    cudaLaunchAttribute attributes[1];
    const cudaLaunchConfig_t config = configuration(attributes);
    allow(reinterpret_cast<const void*>(kernel));
    return cudaLaunchKernelEx(&config, kernel, parameters...);
  }

  void allow(const void* kernel) const {
    if (cluster > 8) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
            "large clusters");
    }
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
          "shared memory");
  }

  cudaLaunchConfig_t configuration(cudaLaunchAttribute* attribute) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.attrs = attribute;
    config.numAttrs = 1;
    if (cooperative) {
      attribute->id = cudaLaunchAttributeCooperative;
      attribute->val.cooperative = 1;
    } else {
      attribute->id = cudaLaunchAttributeClusterDimension;
      attribute->val.clusterDim.x = cluster;
      attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
    }
    return config;
  }
};

// Nanoseconds per iteration; `start` launches a run of so many iterations, for which `prepare` gets ready.
template <typename Start, typename Prepare>
double per_iteration(const char* what, Start start, Prepare prepare) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), what);
  check(cudaEventCreate(&end), what);
  const auto run = [&](int iterations) {
    float milliseconds = 0;
    check(prepare(), what);
    check(cudaEventRecord(begin), what);
    check(start(iterations), what);
    check(cudaEventRecord(end), what);
    check(cudaEventSynchronize(end), what);
    check(cudaEventElapsedTime(&milliseconds, begin, end), what);
    return milliseconds * 1e6;
  };
  run(kShort);  // Loads the kernel.
  std::vector<double> times;
  for (int i = 0; i < kRepeats; ++i) times.push_back((run(kLong) - run(kShort)) / (kLong - kShort));
  std::sort(times.begin(), times.end());
  return times[kRepeats / 2];
}

template <typename Start>
double per_iteration(const char* what, Start start) {
  return per_iteration(what, start, [] { return cudaSuccess; });
}

int max_clusters(int cluster) {
  const Launch launch{cluster, cluster, kThreads, kSharedBytes};
  cudaLaunchAttribute attributes[1];
  const cudaLaunchConfig_t config = launch.configuration(attributes);
  launch.allow(reinterpret_cast<const void*>(all_gather));
  int count = 0;
  check(cudaOccupancyMaxActiveClusters(&count, all_gather, &config), "max active clusters");
  return count;
}

// Prints what was measured under one name, at once: a later probe may fail.
void print(const char* name, const std::vector<std::pair<std::string, double>>& values) {
  const char* comma = "";
  std::printf("{\"%s\": {", name);
  for (const auto& [key, value] : values) {
    std::printf("%s\"%s\": %.6g", comma, key.c_str(), value);
    comma = ", ";
  }
  std::printf("}}\n");
  std::fflush(stdout);
}

void clusters() {
  std::vector<std::pair<std::string, double>> most, barriers, gathers[2];
  for (int cluster : kClusters) {
    const std::string name = std::to_string(cluster);
    most.emplace_back(name, max_clusters(cluster));
  }
  print("max active clusters of size, at 200 KB of shared memory", most);
  for (const auto& [name, count] : most) {
    const Launch launch{std::stoi(name), std::stoi(name), kThreads};
    if (count == 0 || launch.cluster == 1) continue;
    const auto start = [&](int n) { return launch(cluster_barrier, n); };
    barriers.emplace_back(name, per_iteration("cluster barrier", start));
  }
  print("cluster barrier, ns, of size", barriers);
  for (const auto& [name, count] : most) {
    if (count == 0) continue;
    const int cluster = std::stoi(name);
    for (int chunks : {4, 16, 32, 64}) {
      const size_t shared = 1024 + 2 * size_t(cluster) * chunks * kChunk;
      for (bool full : {false, true}) {
        const int together = full ? std::max(1, int(count) * 3 / 4) : 1;
        const Launch launch{together * cluster, cluster, std::max(kWarp, 4 * chunks), shared};
        const auto start = [&](int n) { return launch(all_gather, n, chunks); };
        gathers[full].emplace_back(name + "x" + std::to_string(chunks), per_iteration("all-gather", start));
      }
    }
  }
  print("all-gather, ns, size x chunks of 16 bytes, one cluster", gathers[0]);
  print("all-gather, ns, size x chunks of 16 bytes, three quarters of the device", gathers[1]);
}

void grids(int multiprocessors) {
  unsigned* arrived;
  float* sums;
  check(cudaMalloc(&arrived, sizeof *arrived), "memory");
  check(cudaMalloc(&sums, multiprocessors * kThreads * sizeof *sums), "memory");
  std::vector<std::pair<std::string, double>> barriers, gathers, products;
  for (int count : {16, 64, multiprocessors}) {
    const Launch launch{count, 1, kThreads, 0, true};
    const auto start = [&](int n) { return launch(grid_barrier, n, arrived); };
    const auto prepare = [&] { return cudaMemsetAsync(arrived, 0, sizeof *arrived); };
    barriers.emplace_back(std::to_string(count), per_iteration("grid barrier", start, prepare));
  }
  print("grid barrier, ns, of CTAs", barriers);
  for (int count : {2, 16, 64, 128}) {
    if (count > multiprocessors) continue;
    for (int chunks : {1, 8, 16, 32}) {
      const size_t bytes = size_t(kLong) * count * chunks * kChunk;
      uint32_t* buffer;
      check(cudaMalloc(&buffer, bytes), "memory");
      const Launch launch{count, 1, kThreads, 0, true};
      const auto start = [&](int n) { return launch(global_gather, n, chunks, buffer); };
      const auto prepare = [&] { return cudaMemsetAsync(buffer, 0xFF, bytes); };
      const std::string name = std::to_string(count) + "x" + std::to_string(chunks);
      gathers.emplace_back(name, per_iteration("gather through L2", start, prepare));
      check(cudaFree(buffer), "memory");
    }
  }
  print("gather through L2, ns, CTAs x chunks of 16 bytes", gathers);
  for (int count : {1, multiprocessors}) {
    const Launch launch{count, 1, kThreads};
    const auto start = [&](int n) { return launch(resident_mma, n, uint32_t{0}, sums); };
    products.emplace_back(std::to_string(count), per_iteration("products", start));
  }
  print("32 resident products in each of 8 warps, ns, of CTAs", products);
}

}  // namespace
}  // namespace torchrnn

int main() {
  using namespace torchrnn;
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  if (device.major < 9) {
    std::fprintf(stderr, "probes: clusters need compute capability 9.0, not %d.%d\n", device.major,
                 device.minor);
    return 1;
  }
  clusters();
  grids(device.multiProcessorCount);
  return 0;
}
