#include "dataplane/shard_router.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

namespace engram {
namespace {

constexpr int kSpaces = 10'000;

std::string NameOf(int i) { return "space-" + std::to_string(i); }

// Where a space lives is stored in effect: the shard that holds it is not asked again. So a change
// of the hash would lose every space at the next start.
TEST(ShardRouterTest, HomesAreFixedForever) {
  struct Home {
    const char* space;
    uint16_t of_2;
    uint16_t of_3;
    uint16_t of_16;
    uint16_t of_1000;
  };
  // clang-format off
  constexpr Home kHomes[] = {
      {"default", 0, 0, 0, 89},
      {"a", 0, 0, 15, 848},
      {"docs", 1, 1, 15, 209},
      {"eightchr", 0, 2, 5, 689},
      {"nine-char", 0, 2, 14, 928},
      {"space-0", 1, 1, 10, 959},
      {"space-1", 0, 0, 0, 899},
      {"space-9999", 1, 1, 11, 998},
      {"tenant_42-agent_7", 1, 1, 10, 122},
      {"0000000000000000000000000000000000000000000000000000000000000000", 0, 0, 4, 415},
  };
  // clang-format on
  for (const Home& home : kHomes) {
    EXPECT_EQ(ShardRouter(2).HomeOf(home.space).value(), home.of_2) << home.space;
    EXPECT_EQ(ShardRouter(3).HomeOf(home.space).value(), home.of_3) << home.space;
    EXPECT_EQ(ShardRouter(16).HomeOf(home.space).value(), home.of_16) << home.space;
    EXPECT_EQ(ShardRouter(1000).HomeOf(home.space).value(), home.of_1000) << home.space;
  }
}

TEST(ShardRouterTest, OneShardHasAll) {
  for (int i = 0; i < 100; ++i) EXPECT_EQ(ShardRouter(1).HomeOf(NameOf(i)), ShardId(0));
}

TEST(ShardRouterTest, AnAddedShardTakesItsShareAndNothingElseMoves) {
  for (const uint16_t shards : {1, 2, 3, 7, 15, 31}) {
    const ShardRouter before(shards);
    const ShardRouter after(static_cast<uint16_t>(shards + 1));
    int moved = 0;
    for (int i = 0; i < kSpaces; ++i) {
      const ShardId old_home = before.HomeOf(NameOf(i));
      const ShardId new_home = after.HomeOf(NameOf(i));
      if (old_home == new_home) continue;
      ++moved;
      EXPECT_EQ(new_home, ShardId(shards));
    }
    // A binomial of 10,000 draws of 1 / (shards + 1): six standard deviations either side.
    const double share = 1.0 / (shards + 1);
    const double spread = 6 * std::sqrt(kSpaces * share * (1 - share));
    EXPECT_NEAR(moved, kSpaces * share, spread) << shards;
  }
}

TEST(ShardRouterTest, ShardsAreBalanced) {
  for (const uint16_t shards : {2, 5, 16, 64}) {
    const ShardRouter router(shards);
    std::vector<int> spaces(shards);
    for (int i = 0; i < kSpaces; ++i) ++spaces[router.HomeOf(NameOf(i)).value()];
    const double share = 1.0 / shards;
    const double spread = 6 * std::sqrt(kSpaces * share * (1 - share));
    for (const int count : spaces) EXPECT_NEAR(count, kSpaces * share, spread) << shards;
  }
}

}  // namespace
}  // namespace engram
