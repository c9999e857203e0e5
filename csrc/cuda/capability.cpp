#include <cuda_runtime_api.h>

#include "cuda/dispatch.h"
#include "cuda/per_device.h"

namespace torchrnn {
namespace cuda {

int compute_capability(int device) {
  static PerDevice known;
  return known(device, [&] {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
      return 10 * major + minor;
    cudaGetLastError();  // Or the next launch would seem to have failed.
    return 0;
  });
}

}  // namespace cuda
}  // namespace torchrnn
