// Which calls the cluster path serves.

#include "cuda/scan.h"

namespace torchrnn {
namespace cuda {

const char* cluster_why_not(const ForwardScan<float>& p, int device, int capability) {
  if (p.cell != Cell::kLstm && p.cell != Cell::kGru) return "the cell is not lstm or gru";
  if (p.dtype == Dtype::kFloat64) return "the dtype is float64";
  if (p.dtype == Dtype::kFloat32 && !p.tf32) return "the dtype is float32 and TF32 is not allowed";
  if (p.dtype == Dtype::kFloat32 && p.hidden > 256) return "the hidden size is above 256";
  if (p.hidden > 512) return "the hidden size is above 512";
  if (p.activation != Activation::kTanh) return "the activation is not tanh";
  if (p.projected) return "there is a projection";
  if (p.direction[0].peephole != nullptr) return "there are peepholes";
  if (p.direction[0].norm_gain != nullptr) return "there is layer normalisation";
  if (p.cell_clip * 0 == 0) return "the cell state is clipped";
  if (p.mask_h != nullptr || p.mask_c != nullptr) return "there are masks on the state";
  if (p.c_all != nullptr) return "every step's cell state is wanted";
  if (p.steps > INT32_MAX / 2) return "there are too many steps";
  if (capability < 90) return "the compute capability is below 9.0";
  if (p.batch == 0) return nullptr;  // Nothing will be launched.
  // Who keeps a tape will want to go back.
  if (!cluster_forward_fits(p, device) || (p.tape != nullptr && !cluster_backward_fits(p, device)))
    return "a cluster does not fit the device";
  return nullptr;
}

}  // namespace cuda
}  // namespace torchrnn
