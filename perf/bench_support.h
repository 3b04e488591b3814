#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

// Shared by the programs of perf/.

namespace engram {

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
