// How the cluster path's kernels are started, and whether a device has room for them. With RNN_EMULATE the
// device is the emulated one, and a stream is the seed of what happens on it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/maps.h"
#include "cuda/per_device.h"

#ifdef RNN_EMULATE
#include "cuda/emulator.h"
#endif

namespace torchrnn {
namespace cuda {

#ifdef RNN_EMULATE

struct Configuration {
  int ctas, directions, cluster, threads, shared_bytes;
  uint64_t seed;
};

#else

using Configuration = cudaLaunchConfig_t;

#endif

// Calls use(configuration, kernel) with the launch of one cluster for each kTile rows and direction. `kernel`
// has a type of its own for each kernel, and gives that when it is called.
template <typename B, auto kKernel, typename Use>
auto with_launch(int64_t batch, int64_t directions, int shared_bytes, void* stream, const Use& use) {
  const int64_t ctas = (batch + kTile - 1) / kTile * B::kCluster;
#ifdef RNN_EMULATE
  const Configuration configuration{int(ctas),   int(directions), B::kCluster,
                                    B::kThreads, shared_bytes,    reinterpret_cast<uint64_t>(stream)};
#else
  // Clusters of up to 8 CTAs are in every device's reach; for more one has to ask. A device that has none so
  // large says so when it is asked for room, or for the launch.
  if (B::kCluster > 8)
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                         cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = B::kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  Configuration configuration = {};
  configuration.gridDim = dim3(unsigned(ctas), unsigned(directions));
  configuration.blockDim = dim3(B::kThreads);
  configuration.dynamicSmemBytes = size_t(shared_bytes);
  configuration.stream = cudaStream_t(stream);
  configuration.attrs = &cluster;
  configuration.numAttrs = 1;
#endif
  return use(configuration, std::integral_constant<decltype(kKernel), kKernel>());
}

// Uses of with_launch: whether a device has room for a cluster, and the launch, which returns CUDA's error
// code.
struct Fits {
  int device;

  template <typename Kernel>
  bool operator()(const Configuration& configuration, Kernel kernel) const {
#ifdef RNN_EMULATE
    (void)configuration, (void)kernel;
    return true;
#else
    constexpr int kYes = 1, kNo = 2;
    static PerDevice known;  // One for each kernel.
    const int answer = known(device, [&] {
      int clusters = 0;
      const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel(), &configuration);
      cudaGetLastError();  // Or the next launch would seem to have failed.
      return error != cudaSuccess ? 0 : clusters > 0 ? kYes : kNo;
    });
    return answer == kYes;
#endif
  }
};

template <typename Parameters>
struct Launch {
  const Parameters& parameters;

  template <typename Kernel>
  int operator()(const Configuration& configuration, Kernel kernel) const {
#ifdef RNN_EMULATE
    const Configuration& c = configuration;
    emulator::launch(c.ctas, c.directions, c.cluster, c.threads, size_t(c.shared_bytes), c.seed,
                     [&] { kernel()(parameters); });
    return 0;
#else
    return cudaLaunchKernelEx(&configuration, kernel(), parameters);
#endif
  }
};

}  // namespace cuda
}  // namespace torchrnn
