// A test program of many tests: it runs the one that its first argument names.
#pragma once

#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>

namespace torchrnn {

using NamedTest = std::pair<const char*, void (*)()>;

inline std::mt19937 random_bits(std::random_device{}());

inline void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// The exit status for main: 1 after a message if the test failed, 2 if there is none of that name.
template <size_t N>
int run_named(const NamedTest (&tests)[N], const std::string& wanted) {
  for (const auto& [name, test] : tests) {
    if (name != wanted) continue;
    try {
      test();
      return 0;
    } catch (const std::exception& error) {
      printf("%s\n", error.what());
      return 1;
    }
  }
  return 2;
}

}  // namespace torchrnn
