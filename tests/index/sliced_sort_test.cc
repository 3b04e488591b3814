#include "index/sliced_sort.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "src/core/hash.h"

namespace engram {
namespace {

constexpr size_t kMost = 20'000;

using Draw = std::function<float(SplitMix64*)>;

struct Kind {
  const char* name;
  Draw draw;
};

float Uniform(SplitMix64* random) {
  return static_cast<float>(random->Below(1'000'000)) / 500'000 - 1;
}

class SlicedSortTest : public testing::TestWithParam<Kind> {};

TEST_P(SlicedSortTest, TheOrderIsThatOfASort) {
  SplitMix64 random(7);
  SlicedSort sort(kMost);
  for (const size_t count : {size_t{0}, size_t{1}, size_t{2}, size_t{300}, size_t{5'000}, kMost}) {
    std::vector<NeighbourKey> keys(count);
    for (NeighbourKey& key : keys) {
      key = KeyOf(GetParam().draw(&random), static_cast<NodeId>(random.Next()));
    }
    std::vector<NeighbourKey> wanted = keys;
    std::ranges::sort(wanted);
    sort.Begin(keys);
    uint64_t work = 0;
    while (!sort.Step(&work)) {
    }
    ASSERT_EQ(keys, wanted);
    EXPECT_GE(work, count) << "sorting counts as work";
  }
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, SlicedSortTest,
    testing::Values(
        Kind{"uniform", Uniform}, Kind{"equal", [](SplitMix64*) { return 0.25F; }},
        Kind{"negative", [](SplitMix64* random) { return Uniform(random) - 7; }},
        Kind{"few_values", [](SplitMix64* random) { return static_cast<float>(random->Below(3)); }},
        Kind{
            "one_far",
            [](SplitMix64* random) { return random->Below(1'000) == 0 ? 1e30F : Uniform(random); }},
        Kind{"hair_apart",
             [](SplitMix64* random) { return 1e-40F * static_cast<float>(random->Below(50)); }},
        Kind{"no_numbers",
             [](SplitMix64* random) {
               const float nan = std::numeric_limits<float>::quiet_NaN();
               const uint64_t what = random->Below(10);
               return what == 0 ? -nan : what == 1 ? nan : Uniform(random);
             }},
        Kind{"infinite",
             [](SplitMix64* random) {
               const uint64_t what = random->Below(10);
               return what == 0 ? -HUGE_VALF : what == 1 ? HUGE_VALF : Uniform(random);
             }}),
    [](const auto& kind) { return std::string(kind.param.name); });

// Else a core would be away from all else for as long as all of it takes.
TEST(SlicedSortSlicesTest, NoSliceIsLong) {
  SplitMix64 random(9);
  SlicedSort sort(kMost);
  std::vector<NeighbourKey> keys(kMost);
  for (NeighbourKey& key : keys) key = KeyOf(Uniform(&random), static_cast<NodeId>(random.Next()));
  sort.Begin(keys);
  for (bool done = false; !done;) {
    uint64_t work = 0;
    done = sort.Step(&work);
    ASSERT_LE(work, 1'024u);
  }
}

}  // namespace
}  // namespace engram
