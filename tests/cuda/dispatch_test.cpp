// The choice of a path, by the table of csrc/cuda/dispatch.h and by others, on devices that are made up.
// Built as a library with csrc/cuda/module.cpp it is that module, for a device that serves no call of the
// cluster path.

#include "cuda/dispatch.h"

#include <sstream>

#include "cuda/per_device.h"
#include "named_tests.h"

namespace torchrnn {
namespace cuda {

// The number of a device is its capability.
int compute_capability(int device) { return device; }

bool cluster_serves = false;

// Says of what it was asked.
const char* cluster_why_not(const ForwardScan<float>& p, int device, int capability) {
  std::ostringstream out;
  out << "cell " << int(p.cell) << ", activation " << int(p.activation) << ", dtype " << int(p.dtype)
      << ", T " << p.steps << ", B " << p.batch << ", H " << p.hidden << ", D " << p.directions
      << ", projected " << p.projected << ", clipped " << (p.cell_clip * 0 == 0 || p.proj_clip * 0 == 0)
      << ", tf32 " << p.tf32 << ", device " << device << ", capability " << capability;
  static std::string text;
  text = out.str();
  return cluster_serves ? nullptr : text.c_str();
}

namespace {

constexpr PathRow kNarrow[] = {
    {.path = Path::kStep, .why = "it is old", .capability = {80, 89}},
    {.path = Path::kCluster,
     .why = "it is narrow",
     .capability = {90, 103},
     .dtypes = {Dtype::kBfloat16, Dtype::kFloat16},
     .cells = {Cell::kLstm, Cell::kGru},
     .hidden = {64, 512},
     .batch = {2, 64},
     .steps = {16},
     .variations = {Variation::kLengths, Variation::kResets}},
    {.path = Path::kStep, .why = "it is the last"},
};

// A call and its device, which lie within the narrow row.
struct Call {
  ForwardScan<float> p{};
  int device = 90;

  Call() {
    cluster_serves = true;
    p.dtype = Dtype::kBfloat16, p.cell = Cell::kGru;
    p.hidden = 128, p.batch = 8, p.steps = 100;
    p.cell_clip = p.proj_clip = std::numeric_limits<float>::infinity();
  }
};

void require_choice(const Choice& choice, Path path, const std::string& why, const std::string& of) {
  require(choice.path == path && choice.why == why, of + ": " + choice.why);
  require(choice.why_not == nullptr, of + " is not served");
}

const float kNumbers[1] = {};
const int64_t kLengths[1] = {};
const bool kResets[1] = {};

// Each variation, alone in a call.
constexpr struct {
  const char* name;
  void (*add)(ForwardScan<float>& p);
} kVariations[] = {
    {"lengths", [](auto& p) { p.lengths = kLengths; }},
    {"resets", [](auto& p) { p.resets = kResets; }},
    {"activation", [](auto& p) { p.activation = Activation::kRelu; }},
    {"peephole", [](auto& p) { p.direction[0].peephole = kNumbers; }},
    {"cell_clip", [](auto& p) { p.cell_clip = 1; }},
    {"projection", [](auto& p) { p.projected = true; }},
    {"proj_clip", [](auto& p) { p.proj_clip = 1; }},
    {"norm", [](auto& p) { p.direction[0].norm_gain = kNumbers; }},
    {"mask_h", [](auto& p) { p.mask_h = kNumbers; }},
    {"mask_c", [](auto& p) { p.mask_c = kNumbers; }},
};
constexpr int kServed = 2;  // The first ones are in the narrow row.

// The step path serves every call by the table that is in use.
void table() {
  Call call;
  for (const int device : {0, 75, 90, 121})
    for (const int dtype : {0, 1, 2, 3})
      for (const int cell : {0, 1, 2, 3, 4})
        for (const int64_t size : {0, 1, 128, 1000000}) {
          call.p.dtype = Dtype(dtype), call.p.cell = Cell(cell);
          call.p.hidden = call.p.batch = call.p.steps = size;
          const Choice choice = choose(call.p, device, Path::kAuto);
          require_choice(choice, Path::kStep, kTable[0].why, "a call");
        }
  for (const auto& [name, add] : kVariations) add(call.p);
  require_choice(choose(call.p, 90, Path::kAuto), Path::kStep, kTable[0].why, "a call with all variations");
  for (const PathRow& row : kTable)
    require(row.path == Path::kStep || row.path == Path::kCluster, "a row has no path");
}

// Every bound of the narrow row, from both sides.
void bounds() {
  const auto expect = [](const char* of, bool within, const auto& change) {
    Call call;
    change(call);
    require_choice(choose(call.p, call.device, Path::kAuto, kNarrow), within ? Path::kCluster : Path::kStep,
                   within ? "it is narrow" : "it is the last", of);
  };
  expect("the call", true, [](Call&) {});
  for (const int64_t n : {63, 64, 512, 513})
    expect("hidden", n >= 64 && n <= 512, [&](Call& call) { call.p.hidden = n; });
  for (const int64_t n : {1, 2, 64, 65})
    expect("batch", n >= 2 && n <= 64, [&](Call& call) { call.p.batch = n; });
  for (const int64_t n : {15, 16, 1 << 30}) expect("steps", n >= 16, [&](Call& call) { call.p.steps = n; });
  for (const int n : {79, 90, 103, 104})
    expect("capability", n >= 90 && n <= 103, [&](Call& call) { call.device = n; });
  for (const int n : {0, 2, 3}) expect("dtype", n >= 2, [&](Call& call) { call.p.dtype = Dtype(n); });
  for (const int n : {0, 1, 2, 3, 4}) expect("cell", n <= 1, [&](Call& call) { call.p.cell = Cell(n); });
  int i = 0;
  for (const auto& [name, add] : kVariations) expect(name, i++ < kServed, [&](Call& call) { add(call.p); });
  expect("lengths and resets", true, [](Call& call) { call.p.lengths = kLengths, call.p.resets = kResets; });
  expect("lengths and a peephole", false,
         [](Call& call) { call.p.lengths = kLengths, call.p.direction[0].peephole = kNumbers; });
}

// A row without variations is for calls that have none.
void plain() {
  const PathRow rows[] = {{.path = Path::kCluster, .why = "it is plain", .variations = {}}, kNarrow[2]};
  require_choice(choose(Call().p, 90, Path::kAuto, rows), Path::kCluster, "it is plain", "the call");
  for (const auto& [name, add] : kVariations) {
    Call call;
    add(call.p);
    require_choice(choose(call.p, 90, Path::kAuto, rows), Path::kStep, "it is the last", name);
  }
}

void first_row() {
  const Call call;
  for (const int device : {80, 89})
    require_choice(choose(call.p, device, Path::kAuto, kNarrow), Path::kStep, "it is old", "an old device");
  const PathRow rows[] = {{.path = Path::kStep, .why = "it is the first"}, kNarrow[1], kNarrow[2]};
  require_choice(choose(call.p, 90, Path::kAuto, rows), Path::kStep, "it is the first", "the call");
}

// The search goes on where the cluster path does not serve the call.
void not_served() {
  const Call call;
  cluster_serves = false;
  require_choice(choose(call.p, 90, Path::kAuto, kNarrow), Path::kStep, "it is the last", "the call");
  const PathRow rows[] = {
      kNarrow[1], {.path = Path::kStep, .why = "it is next", .hidden = {128, 128}}, kNarrow[2]};
  require_choice(choose(call.p, 90, Path::kAuto, rows), Path::kStep, "it is next", "the call");

  ForwardScan<double> wide{};
  wide.cell_clip = wide.proj_clip = std::numeric_limits<double>::infinity();
  cluster_serves = true;
  const PathRow any[] = {{.path = Path::kCluster, .why = "it is wide"}, kNarrow[2]};
  require_choice(choose(call.p, 90, Path::kAuto, any), Path::kCluster, "it is wide", "the call");
  require_choice(choose(wide, 90, Path::kAuto, any), Path::kStep, "it is the last", "float64");
  require(choose(wide, 90, Path::kCluster).why_not == std::string("the dtype is float64"), "float64");
}

void forced() {
  Call call;
  require_choice(choose(call.p, 90, Path::kStep, kNarrow), Path::kStep, "it is forced", "step");
  call.p.hidden = 1;
  require_choice(choose(call.p, 90, Path::kCluster, kNarrow), Path::kCluster, "it is forced", "cluster");
  cluster_serves = false;
  require_choice(choose(call.p, 90, Path::kStep, kNarrow), Path::kStep, "it is forced", "step");
  const Choice choice = choose(call.p, 90, Path::kCluster, kNarrow);
  require(choice.path == Path::kCluster && choice.why_not != nullptr, "the table may not help");
}

// What is known before the sizes are.
void admits() {
  const PathRow& row = kNarrow[1];
  for (const int n : {89, 90, 103, 104})
    require(row.admits(n, Dtype::kFloat16) == (n >= 90 && n <= 103), "the capability does not count");
  for (const int n : {0, 1, 2, 3}) require(row.admits(90, Dtype(n)) == (n >= 2), "the dtype does not count");
  require(!PathRow{.path = Path::kStep, .why = "", .dtypes = {}}.admits(90, Dtype::kFloat32),
          "{} is not none");
}

void per_device() {
  PerDevice known;
  int asked = 0, answer = 0;
  const auto ask = [&](int device) { return known(device, [&] { return ++asked, answer; }); };
  require(ask(0) == 0 && asked == 1, "the device was not asked");
  answer = 90;
  require(ask(0) == 90 && asked == 2, "an answer of 0 was kept");
  answer = 80;
  require(ask(0) == 90 && asked == 2, "the device was asked again");
  require(ask(1) == 80 && ask(1) == 80 && ask(0) == 90 && asked == 3, "devices share an answer");
  for (const int device : {-1, 127, 128, 1 << 30}) require(ask(device) == 80, "a device has no answer");
}

constexpr NamedTest kTests[] = {
    {"table", table},           {"bounds", bounds}, {"plain", plain},   {"first_row", first_row},
    {"not_served", not_served}, {"forced", forced}, {"admits", admits}, {"per_device", per_device},
};

}  // namespace
}  // namespace cuda
}  // namespace torchrnn

int main(int, char** arguments) { return torchrnn::run_named(torchrnn::cuda::kTests, arguments[1]); }
