// Tests of the instructions of csrc/cuda/ptx_host.h against plain models, and of what csrc/cuda/emulator.h
// says to misuse.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <vector>

#include "named_tests.h"
#include "ptx_check.cu"

namespace torchrnn {
namespace {

using namespace ptx;
using emulator::launch;

float random_float() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(random_bits); }

// One warp, with as many bytes of shared memory.
void on_a_warp(const std::function<void()>& kernel, size_t shared_bytes = 0) {
  launch(1, 1, 1, 32, shared_bytes, random_bits(), kernel);
}

struct Format { int mantissa, least_exponent, bias; };
template <typename T>
constexpr Format kFormat = {};
template <>
constexpr Format kFormat<Bf16> = {7, -126, 127};
template <>
constexpr Format kFormat<Half> = {10, -14, 15};

// The value of half precision bits, from the definition of the format.
template <typename T>
double decode(uint32_t bits) {
  const Format f = kFormat<T>;
  const int exponent = (bits & 0x7FFF) >> f.mantissa;
  const double fraction = std::ldexp(bits & ((1 << f.mantissa) - 1), -f.mantissa);
  double value =
      std::ldexp(exponent == 0 ? fraction : 1 + fraction, std::max(exponent - f.bias, f.least_exponent));
  if (exponent == 2 * f.bias + 1) value = fraction == 0 ? INFINITY : NAN;
  return bits & 0x8000 ? -value : value;
}

// x rounded to the spacing of numbers of its size; nearbyint rounds halves to even.
template <typename T>
double rounded(double x) {
  const Format f = kFormat<T>;
  if (x == 0 || !std::isfinite(x)) return x;
  const double spacing = std::ldexp(1, std::max(std::ilogb(x), f.least_exponent) - f.mantissa);
  const double result = std::nearbyint(x / spacing) * spacing;
  return std::fabs(result) < std::ldexp(1, f.bias + 1) ? result : std::copysign(INFINITY, x);
}

bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

template <typename T>
void check_rounding(float x) {
  const uint32_t pair = pack<T>(x, -x);
  require(same(decode<T>(pair & 0xFFFF), rounded<T>(x)), "rounding of " + std::to_string(x));
  require(same(decode<T>(pair >> 16), rounded<T>(-x)), "rounding of the second of a pair");
}

template <typename T>
void conversions_of() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double value = decode<T>(bits);
    require(same(low<T>(bits | 0x12340000), value), "low of " + std::to_string(bits));
    require(same(high<T>(bits << 16 | 0x1234), value), "high of " + std::to_string(bits));
    const float x = float(value), next = float(decode<T>((bits + 1) & 0x7FFF));
    for (const float point : {x, (std::fabs(x) + next) / 2}) {
      check_rounding<T>(point);
      check_rounding<T>(std::nextafter(point, 0.0f));
      check_rounding<T>(std::nextafter(point, INFINITY));
    }
  }
  for (int i = 0; i < 100000; ++i) {
    const uint32_t bits = random_bits();
    float x;
    memcpy(&x, &bits, sizeof x);
    check_rounding<T>(x);
    check_rounding<T>(random_float());
  }
}

// Ten bits of mantissa and the exponents of float, those of subnormal numbers too.
void check_tf32(float x) {
  const double spacing = std::ldexp(1, std::max(x == 0 ? -126 : std::ilogb(x), -126) - 10);
  double wanted = std::round(x / spacing) * spacing;  // Halves go away from zero.
  if (std::fabs(wanted) >= std::ldexp(1, 128)) wanted = std::copysign(INFINITY, x);
  require(same(cuda::of_bits(tf32(x)), std::isfinite(x) ? wanted : x), "TF32 of " + std::to_string(x));
}

void conversions() {
  conversions_of<Bf16>();
  conversions_of<Half>();
  for (const float x : {0.0f, 1.0f, 1e-40f, FLT_MIN, FLT_MAX, INFINITY, NAN}) {
    check_tf32(x);
    check_tf32(-x);
  }
  for (int i = 0; i < 100000; ++i) {
    const uint32_t bits = random_bits();
    check_tf32(cuda::of_bits(bits));
    check_tf32(cuda::of_bits((bits & ~0x1fffu) + 0x1000));  // half way between two
    check_tf32(random_float());
  }
}

// Element indices as in PTX ISA, "Matrix fragments for mma.m16n8k16": i counts the halves of all registers.
template <typename T>
void mma_of() {
  float a[16][16], b[16][8], c[16][8], sum[16][8], got[16][8];
  const auto fill = [](float& x) { x = low<T>(pack<T>(random_float(), 0)); };
  for (auto& row : a) std::for_each(std::begin(row), std::end(row), fill);
  for (auto& row : b) std::for_each(std::begin(row), std::end(row), fill);
  for (auto& row : c) std::for_each(std::begin(row), std::end(row), fill);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      double total = c[m][n];
      for (int k = 0; k < 16; ++k) total += double(a[m][k]) * b[k][n];
      sum[m][n] = float(total);
    }
  }
  on_a_warp([&] {
    const int group = thread() / 4, in_group = thread() % 4;
    float elements[8], d[4];
    uint32_t left[4], right[2];
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      elements[i] = a[row][in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)];
    }
    for (int i = 0; i < 4; ++i) left[i] = pack<T>(elements[2 * i], elements[2 * i + 1]);
    for (int i = 0; i < 4; ++i) elements[i] = b[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group];
    for (int i = 0; i < 2; ++i) right[i] = pack<T>(elements[2 * i], elements[2 * i + 1]);
    for (int i = 0; i < 4; ++i) d[i] = c[i < 2 ? group : group + 8][in_group * 2 + (i & 1)];
    mma<T>(d, left, right);
    for (int i = 0; i < 4; ++i) got[i < 2 ? group : group + 8][in_group * 2 + (i & 1)] = d[i];
  });
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) require(std::fabs(got[m][n] - sum[m][n]) < 1e-5f, "an element of mma");
  }
}

// As in PTX ISA, "Matrix fragments for mma.m16n8k8", for .tf32. The bits that TF32 has not are not read.
void mma_of_tf32() {
  float a[16][8], b[8][8], c[16][8], got[16][8];
  const auto fill = [](float& x) { x = cuda::of_bits(tf32(random_float())); };
  for (auto& row : a) std::for_each(std::begin(row), std::end(row), fill);
  for (auto& row : b) std::for_each(std::begin(row), std::end(row), fill);
  for (auto& row : c) std::for_each(std::begin(row), std::end(row), fill);
  on_a_warp([&] {
    const int group = thread() / 4, in_group = thread() % 4;
    float d[4];
    uint32_t left[4], right[2];
    for (int i = 0; i < 4; ++i) {
      const float element = a[i == 0 || i == 2 ? group : group + 8][i < 2 ? in_group : in_group + 4];
      left[i] = cuda::bits_of(element) | 0x1abc;
    }
    for (int i = 0; i < 2; ++i) right[i] = cuda::bits_of(b[i == 0 ? in_group : in_group + 4][group]) | 0x1def;
    for (int i = 0; i < 4; ++i) d[i] = c[i < 2 ? group : group + 8][in_group * 2 + (i & 1)];
    mma<float>(d, left, right);
    for (int i = 0; i < 4; ++i) got[i < 2 ? group : group + 8][in_group * 2 + (i & 1)] = d[i];
  });
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      double sum = c[m][n];
      for (int k = 0; k < 8; ++k) sum += double(a[m][k]) * b[k][n];
      require(std::fabs(got[m][n] - sum) < 1e-5, "an element of mma in TF32");
    }
  }
}

void matrix_product() {
  for (int i = 0; i < 20; ++i) {
    mma_of<Bf16>();
    mma_of<Half>();
    mma_of_tf32();
  }
}

template <int N>
void load_matrix_of() {
  // Row i of all matrices lies at place[i]; what it holds tells where it belongs.
  std::vector<int> place(32);
  for (int i = 0; i < 32; ++i) place[i] = i;
  std::shuffle(place.begin(), place.end(), random_bits);
  uint32_t got[32][N];
  on_a_warp(
      [&] {
        uint16_t* memory = reinterpret_cast<uint16_t*>(shared_memory());
        for (int k = 0; k < 8; ++k) memory[place[thread()] * 8 + k] = uint16_t(thread() * 8 + k);
        sync_warp();
        // Only the first 8 N lanes' addresses count.
        load_matrix(got[thread()], thread() < 8 * N ? memory + place[thread()] * 8 : nullptr);
      },
      1024);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < N; ++i) {
      const uint32_t first = (i * 8 + lane / 4) * 8 + lane % 4 * 2;
      require(got[lane][i] == (first | (first + 1) << 16), "a pair of load_matrix");
    }
  }
}

void matrix_moves() {
  load_matrix_of<4>();
  load_matrix_of<2>();
  uint32_t transposed[32], shuffled[32];
  int from[32];
  for (int& lane : from) lane = int(random_bits() % 32);
  on_a_warp([&] {
    const uint32_t first = thread() / 4 * 8 + thread() % 4 * 2;  // row * 8 + column
    transposed[thread()] = transpose_matrix(first | (first + 1) << 16);
    shuffled[thread()] = shuffle(uint32_t(thread()) * 7, from[thread()]);
  });
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t row = lane / 4, column = lane % 4 * 2;
    require(transposed[lane] == ((column * 8 + row) | ((column + 1) * 8 + row) << 16), "transpose_matrix");
    require(shuffled[lane] == uint32_t(from[lane]) * 7, "shuffle");
  }
}

// The kernel that nvcc compiles: every function there is here too.
void whole_kernel() {
  std::vector<float> in(257), out(2 * 64 * 256);
  for (float& x : in) x = random_float();
  launch(4, 2, 2, 256, 16 * 1024, random_bits(), [&] { ptx_check<Half>(in.data(), out.data()); });
  const std::vector<float> first = out;
  launch(4, 2, 2, 256, 16 * 1024, random_bits(), [&] { ptx_check<Half>(in.data(), out.data()); });
  require(first == out && out[5] != 0, "another order gives another result");
}

void places() {
  std::vector<int> seen(6 * 3 * 64);
  launch(6, 3, 3, 64, 100, random_bits(), [&] {
    require(cluster_size() == 3 && cluster_rank() == block_x() % 3, "rank");
    require(reinterpret_cast<uintptr_t>(shared_memory()) % 1024 == 0, "alignment of shared memory");
    ++seen[(block_y() * 6 + block_x()) * 64 + thread()];
  });
  require(seen == std::vector<int>(6 * 3 * 64, 1), "each thread runs once");
}

// What one thread wrote all read after the barrier, for the three kinds of barriers.
void barriers() {
  for (int seed = 0; seed < 50; ++seed) {
    int of_cluster[5] = {}, of_cta[2] = {}, of_warp[4] = {};
    launch(2, 1, 2, 64, 0, seed, [&] {
      const int warp = cluster_rank() * 2 + thread() / 32;
      for (int i = 1; i < 5; ++i) {
        if (thread() % 32 == i) of_warp[warp] = i;
        sync_warp();
        require(of_warp[warp] == i, "sync_warp");
        if (thread() == 60 - i) of_cta[cluster_rank()] = i;
        sync_threads();
        require(of_cta[cluster_rank()] == i, "sync_threads");
        if (cluster_rank() == i % 2 && thread() == i) of_cluster[i] = i;
        sync_cluster();
        require(of_cluster[i] == i, "sync_cluster");
      }
    });
  }
}

uint64_t* barrier_at(size_t offset) { return reinterpret_cast<uint64_t*>(shared_memory() + offset); }

// A phase is over after all arrivals and all bytes, in whichever order they come.
void phases() {
  for (int seed = 0; seed < 50; ++seed) {
    uint32_t arrived = 0;
    launch(1, 1, 1, 64, 1024, seed, [&] {
      uint64_t* barrier = barrier_at(0);
      uint32_t* message = reinterpret_cast<uint32_t*>(shared_memory() + 64);
      if (thread() == 0) {
        mbarrier_init(barrier, 3);
        fence_mbarrier_init();
      }
      sync_threads();
      for (uint32_t phase = 0; phase < 4; ++phase) {
        if (thread() == 40) store_async(message, 0, {phase, ~phase}, barrier);
        if (thread() < 3) {
          ++arrived;
          mbarrier_expect(barrier, thread() == 1 ? 8 : 0);
        }
        mbarrier_wait(barrier, phase & 1);
        require(arrived == 3 * (phase + 1), "a phase ends before the last arrival");
        require(message[0] == phase && message[1] == ~phase, "a phase ends before the message");
        sync_threads();
      }
    });
  }
}

// Prints what the emulator says to a kernel.
void noticed(const std::function<void()>& kernel) {
  try {
    launch(2, 1, 2, 64, 4096, random_bits(), kernel);
    printf("\n");
  } catch (const emulator::Error& error) {
    printf("%s\n", error.what());
  }
}

void lanes_apart() {
  noticed([] {
    if (thread() % 32 < 16) {
      transpose_matrix(1);
    } else {
      shuffle(1, 0);
    }
  });
}

void no_such_rank() {
  noticed([] { store_async(shared_memory(), 2, {1, 2}, barrier_at(0)); });
}

void out_of_bounds() {
  noticed([] { store_async(shared_memory() + 4096, 0, {1, 2}, barrier_at(0)); });
}

void misaligned() {
  noticed([] { store_async(shared_memory() + 8, 0, {1, 2, 3, 4}, barrier_at(0)); });
}

void overwritten() {
  noticed([] {
    if (thread() != 0) return;
    mbarrier_init(barrier_at(8), 1);
    *barrier_at(8) = 0;
    mbarrier_expect(barrier_at(8), 8);
  });
}

void arrived_twice() {
  noticed([] {
    if (thread() != 0) return;
    mbarrier_init(barrier_at(0), 1);
    mbarrier_expect(barrier_at(0), 8);
    mbarrier_expect(barrier_at(0), 8);
  });
}

constexpr NamedTest kTests[] = {
    {"conversions", conversions},
    {"matrix_product", matrix_product},
    {"matrix_moves", matrix_moves},
    {"whole_kernel", whole_kernel},
    {"places", places},
    {"barriers", barriers},
    {"phases", phases},
    {"lanes_apart", lanes_apart},
    {"no_such_rank", no_such_rank},
    {"out_of_bounds", out_of_bounds},
    {"misaligned", misaligned},
    {"overwritten", overwritten},
    {"arrived_twice", arrived_twice},
};

}  // namespace
}  // namespace torchrnn

int main(int, char** arguments) { return torchrnn::run_named(torchrnn::kTests, arguments[1]); }
