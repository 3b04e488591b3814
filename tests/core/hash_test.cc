#include "src/core/hash.h"

#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace engram {
namespace {

// The published sequence for seed 0: a change would change every simulation and every table that
// was placed by hash.
TEST(SplitMix64Test, FollowsTheReference) {
  SplitMix64 random(0);
  EXPECT_EQ(random.Next(), 0xE220A8397B1DCDAFu);
  EXPECT_EQ(random.Next(), 0x6E789E6AA1B965F4u);
  EXPECT_EQ(random.Next(), 0x06C45D188009454Fu);
}

TEST(SplitMix64Test, BelowReachesAllAndStaysBelow) {
  SplitMix64 random(1);
  std::set<uint64_t> seen;
  for (int i = 0; i < 1'000; ++i) seen.insert(random.Below(10));
  EXPECT_EQ(seen.size(), 10u);
  EXPECT_EQ(*seen.rbegin(), 9u);
  EXPECT_EQ(random.Below(1), 0u);
}

// Each bit of the input turns about half of the output's bits.
TEST(MixBitsTest, SpreadsEveryBit) {
  SplitMix64 random(2);
  for (int bit = 0; bit < 64; ++bit) {
    int turned = 0;
    for (int i = 0; i < 64; ++i) {
      const uint64_t value = random.Next();
      turned += std::popcount(MixBits(value) ^ MixBits(value ^ (uint64_t{1} << bit)));
    }
    EXPECT_GT(turned, 64 * 28) << bit;
    EXPECT_LT(turned, 64 * 36) << bit;
  }
}

// Lengths around the 8-byte step, zeros at the end, and single bytes: none may be left out.
TEST(HashStringTest, EveryByteAndTheLengthCount) {
  std::set<uint64_t> hashes;
  size_t strings = 0;
  for (size_t length = 0; length <= 40; ++length) {
    hashes.insert(HashString(std::string(length, '\0'), 1));
    ++strings;
    for (size_t at = 0; at < length; ++at) {
      std::string text(length, '\0');
      text[at] = 'x';
      hashes.insert(HashString(text, 1));
      ++strings;
    }
  }
  EXPECT_EQ(hashes.size(), strings);
}

TEST(HashStringTest, TheSeedCounts) {
  EXPECT_EQ(HashString("memory", 5), HashString("memory", 5));
  EXPECT_NE(HashString("memory", 5), HashString("memory", 6));
}

// Reads exactly the string: AddressSanitizer watches the end of the allocation.
TEST(HashStringTest, DoesNotReadPastTheEnd) {
  for (size_t length = 0; length <= 32; ++length) {
    const std::vector<char> text(length, 'a');
    EXPECT_EQ(HashString(std::string_view(text.data(), length), 3),
              HashString(std::string(length, 'a'), 3));
  }
}

}  // namespace
}  // namespace engram
