#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <initializer_list>
#include <string>
#include <string_view>
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

// Processor time of the calling thread.
inline int64_t ThreadCpuNs() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

// Time-stamp counter: ticks at a fixed rate, near the processor's nominal clock.
inline uint64_t Ticks() { return __builtin_ia32_rdtsc(); }

// Reads --json and those named numbers, each followed by a value above 0; the values come in with
// their defaults. Anything else ends the program with its usage and status 2.
inline void ReadArguments(int argc, char** argv, bool* json,
                          std::initializer_list<std::pair<const char*, uint64_t*>> numbers) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const long value = i + 1 < argc ? std::strtol(argv[i + 1], nullptr, 10) : 0;
    const auto* named =
        std::ranges::find_if(numbers, [&](const auto& n) { return argument == n.first; });
    if (argument == "--json") {
      *json = true;
    } else if (named != numbers.end() && value > 0) {
      *named->second = static_cast<uint64_t>(value);
      ++i;
    } else {
      std::fprintf(stderr, "usage: %s [--json]", argv[0]);
      for (const auto& [name, unused] : numbers) std::fprintf(stderr, " [%s N]", name);
      std::fprintf(stderr, "\n");
      std::exit(2);
    }
  }
}

inline bool HasFlag(int argc, char** argv, const std::string& flag) {
  return std::any_of(argv + 1, argv + argc, [&](const char* arg) { return flag == arg; });
}

}  // namespace engram
