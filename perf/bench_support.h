#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "src/core/result.h"

// Shared by the programs of perf/.

namespace engram {

// What came out well; else says what went wrong and ends the program.
template <typename T>
T Must(Result<T> result) {
  if (!result) {
    std::fprintf(stderr, "%s\n", result.error().message.c_str());
    std::exit(1);
  }
  if constexpr (!std::is_void_v<T>) return *std::move(result);
}

inline double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Time-stamp counter: ticks at a fixed rate, near the processor's nominal clock.
inline uint64_t Ticks() { return __builtin_ia32_rdtsc(); }

inline bool HasFlag(int argc, char** argv, const std::string& flag) {
  return std::any_of(argv + 1, argv + argc, [&](const char* arg) { return flag == arg; });
}

}  // namespace engram
