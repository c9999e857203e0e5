#include "cuda/rows.h"

#include "cuda/half.h"
#include "cuda/launch.h"
#include "cuda/step.h"

namespace torchrnn {
namespace cuda {
namespace {

template <typename Io>
struct CopyUnpadded {
  Unpadded p;
  Io* out;

  RNN_FN void operator()(int64_t i) const {
    const int64_t k = i % p.inputs, b = i / p.inputs % p.batch, t = i / p.inputs / p.batch;
    if (p.lengths != nullptr && t >= p.lengths[b])
      out[i] = Io{};
    else
      out[i] = static_cast<const Io*>(p.x)[t * p.stride_t + b * p.stride_b + k];
  }
};

template <typename Io, typename Acc>
struct SumBiases {
  const Io *b_ih, *b_hh;
  int64_t rows, both;
  Acc* out;

  RNN_FN void operator()(int64_t k) const {
    out[k] = widen(b_ih[k]);
    if (k < both)
      out[k] += widen(b_hh[k]);
    else
      out[rows + k - both] = widen(b_hh[k]);
  }
};

}  // namespace

int copy_unpadded(const Unpadded& p, void* out, void* stream) {
  const int64_t count = p.steps * p.batch * p.inputs;
  if (p.dtype == Dtype::kFloat64)
    return for_each(count, CopyUnpadded<double>{p, static_cast<double*>(out)}, stream);
  return with_io<float>(p.dtype, [&](auto io) {
    using Io = decltype(io);
    return for_each(count, CopyUnpadded<Io>{p, static_cast<Io*>(out)}, stream);
  });
}

template <typename Acc>
int sum_biases(Dtype dtype, const void* b_ih, const void* b_hh, int64_t rows, int64_t both, Acc* out,
               void* stream) {
  return with_io<Acc>(dtype, [&](auto io) {
    using Io = decltype(io);
    const SumBiases<Io, Acc> use{static_cast<const Io*>(b_ih), static_cast<const Io*>(b_hh), rows, both, out};
    return for_each(rows, use, stream);
  });
}

template int sum_biases(Dtype, const void*, const void*, int64_t, int64_t, float*, void*);
template int sum_biases(Dtype, const void*, const void*, int64_t, int64_t, double*, void*);

}  // namespace cuda
}  // namespace torchrnn
