#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/sanitized.h"

// What the suites of random programs share: which seeds they run, and that these still come to what
// they are there for.

namespace engram {

inline uint64_t FromEnvironment(const std::string& name, uint64_t otherwise) {
  const char* text = std::getenv(name.c_str());
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

// Of the usual suite. A sanitizer takes its time.
constexpr uint64_t UsualSeeds(uint64_t seeds, uint64_t with_sanitizer) {
  return kSanitized ? with_sanitizer : seeds;
}

// PREFIX_SEED=n runs the program of that seed alone; PREFIX_SEEDS=n so many, from PREFIX_FIRST on.
struct Seeds {
  uint64_t first = 1;
  uint64_t count = 0;
  bool alone = false;  // a person looks at this one
  std::string prefix = {};

  static Seeds FromPrefix(const std::string& prefix, uint64_t usual) {
    const uint64_t one = FromEnvironment(prefix + "_SEED", 0);
    if (one != 0) return {.first = one, .count = 1, .alone = true, .prefix = prefix};
    return {.first = FromEnvironment(prefix + "_FIRST", 1),
            .count = FromEnvironment(prefix + "_SEEDS", usual),
            .prefix = prefix};
  }
  uint64_t end() const { return first + count; }
  // Runs the program of one seed after the other; the first that fails is named.
  template <typename Run>
  void ForEach(Run&& run) const {
    for (uint64_t seed = first; seed < end(); ++seed) {
      run(seed);
      ASSERT_FALSE(testing::Test::HasFailure()) << "again: " << prefix << "_SEED=" << seed;
    }
  }
};

// Prints how often the programs came to each of these, and fails where `enough` seeds never did.
inline void ExpectAllHappened(const std::vector<std::pair<std::string, uint64_t>>& counts,
                              bool enough) {
  for (const auto& [name, count] : counts) {
    std::printf("%s %llu\n", name.c_str(), static_cast<unsigned long long>(count));
    if (enough) {
      EXPECT_GT(count, 0u) << name << ": the programs no longer come to that";
    }
  }
}

}  // namespace engram
