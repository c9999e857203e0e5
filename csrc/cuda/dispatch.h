// Which path a call runs on: the table, and the search in it. The ops ask at each call, so that compiled and
// exported programs choose by the device and the sizes that they meet; torchrnn.explain asks the same here
// (module.cpp).
//
// The first row that a call lies within decides, and every call lies within the last one. A row of the
// cluster path counts only where that path serves the call: else the search goes on. No table is asked for a
// path that is forced.
//
// No torch and no CUDA headers here: host compilers read it too.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <span>
#include <utility>

#include "cuda/scan.h"

namespace torchrnn {
namespace cuda {

// The values are those of torchrnn/cuda.py.
enum class Path : int { kAuto = 0, kStep = 1, kCluster = 2 };

// What a call can have beside weights and states.
enum class Variation {
  kLengths,
  kResets,
  kActivation,  // another one than tanh
  kPeephole,
  kCellClip,
  kProjection,
  kProjClip,
  kNorm,
  kMasks,
};

// Both ends are within.
struct Range {
  int64_t first = 0, last = std::numeric_limits<int64_t>::max();

  constexpr bool has(int64_t number) const { return first <= number && number <= last; }
};

// Values of an enum.
template <typename Item>
struct Set {
  uint32_t bits = 0;

  constexpr Set(std::initializer_list<Item> items) {
    for (const Item item : items) bits |= uint32_t(1) << int(item);
  }
  static constexpr Set all() {
    Set set{};
    set.bits = ~uint32_t(0);
    return set;
  }
  constexpr bool has(Item item) const { return bits >> int(item) & 1; }
};

// A path, and the calls that it is chosen for: those that lie within all of these ranges and sets.
struct PathRow {
  Path path;
  const char* why;        // a few words for torchrnn.explain
  Range capability = {};  // 10 * major + minor
  Set<Dtype> dtypes = Set<Dtype>::all();
  Set<Cell> cells = Set<Cell>::all();
  Range hidden = {}, batch = {}, steps = {};
  Set<Variation> variations = Set<Variation>::all();  // those that a call may have, but need not

  // Whether calls with this dtype can lie within, on a device of this capability.
  constexpr bool admits(int of_device, Dtype dtype) const {
    return capability.has(of_device) && dtypes.has(dtype);
  }

  template <typename Acc>
  bool has(const ForwardScan<Acc>& p, int of_device) const {
    const auto& w = p.direction[0];
    const std::pair<Variation, bool> call[] = {
        {Variation::kLengths, p.lengths != nullptr},
        {Variation::kResets, p.resets != nullptr},
        {Variation::kActivation, p.activation != Activation::kTanh},
        {Variation::kPeephole, w.peephole != nullptr},
        {Variation::kCellClip, p.cell_clip < std::numeric_limits<Acc>::infinity()},
        {Variation::kProjection, p.projected},
        {Variation::kProjClip, p.proj_clip < std::numeric_limits<Acc>::infinity()},
        {Variation::kNorm, w.norm_gain != nullptr},
        {Variation::kMasks, p.mask_h != nullptr || p.mask_c != nullptr},
    };
    for (const auto& [variation, there] : call)
      if (there && !variations.has(variation)) return false;
    return admits(of_device, p.dtype) && cells.has(p.cell) && hidden.has(p.hidden) && batch.has(p.batch) &&
           steps.has(p.steps);
  }
};

// One more row goes before the last, such as
//   {.path = Path::kCluster, .why = "it is faster by bench/results/NAME", .capability = {90, 121},
//    .dtypes = {Dtype::kBfloat16, Dtype::kFloat16}, .cells = {Cell::kLstm, Cell::kGru}, .hidden = {64, 512},
//    .batch = {1, 64}, .steps = {16}},
inline constexpr PathRow kTable[] = {
    {.path = Path::kStep, .why = "it serves every call, and no committed result shows a faster path"},
};
static_assert(std::end(kTable)[-1].path == Path::kStep);

struct Choice {
  Path path;
  const char* why;
  const char* why_not;  // null, or why the path, which is forced, does not serve the call
};

// The compute capability of a device as 10 * major + minor; 0 if there is no such device.
int compute_capability(int device);

// The path of a call: the one that is forced, else that of the table.
template <typename Acc>
Choice choose(const ForwardScan<Acc>& p, int device, Path forced, std::span<const PathRow> table = kTable) {
  const int capability = compute_capability(device);
  const auto why_not_cluster = [&] {
    if constexpr (sizeof(Acc) == sizeof(float)) return cluster_why_not(p, device, capability);
    return "the dtype is float64";
  };
  if (forced != Path::kAuto)
    return {forced, "it is forced", forced == Path::kCluster ? why_not_cluster() : nullptr};
  for (const PathRow& row : table)
    if (row.has(p, capability) && (row.path == Path::kStep || why_not_cluster() == nullptr))
      return {row.path, row.why, nullptr};
  return {table.back().path, table.back().why, nullptr};
}

}  // namespace cuda
}  // namespace torchrnn
