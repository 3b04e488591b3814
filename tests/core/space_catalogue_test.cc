#include "src/core/space_catalogue.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace engram {
namespace {

constexpr int kSpaces = 10'000;

std::string NameOf(int i) { return "space-" + std::to_string(i); }
ShardId HomeOf(std::string_view space, uint16_t shards) {
  return SpaceCatalogue::RankShards(space, shards, 1)[0];
}
SpaceSettings Defaults(uint16_t partitions) {
  SpaceSettings settings;
  settings.partitions = partitions;
  return settings;
}

// ---------------------------------------------------------------------------------------------
// Where a space lives

// Where a space lives is stored in effect: the shard that holds it is not asked again. So a change
// of the hash would lose every space at the next start.
TEST(RankShardsTest, HomesAreFixedForever) {
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
    EXPECT_EQ(HomeOf(home.space, 2).value(), home.of_2) << home.space;
    EXPECT_EQ(HomeOf(home.space, 3).value(), home.of_3) << home.space;
    EXPECT_EQ(HomeOf(home.space, 16).value(), home.of_16) << home.space;
    EXPECT_EQ(HomeOf(home.space, 1000).value(), home.of_1000) << home.space;
  }
}

TEST(RankShardsTest, OneShardHasAll) {
  for (int i = 0; i < 100; ++i) EXPECT_EQ(HomeOf(NameOf(i), 1), ShardId(0));
}

TEST(RankShardsTest, AnAddedShardTakesItsShareAndNothingElseMoves) {
  for (const uint16_t shards : {1, 2, 3, 7, 15, 31}) {
    int moved = 0;
    for (int i = 0; i < kSpaces; ++i) {
      const ShardId old_home = HomeOf(NameOf(i), shards);
      const ShardId new_home = HomeOf(NameOf(i), static_cast<uint16_t>(shards + 1));
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

TEST(RankShardsTest, EveryPartitionIsBalancedOverTheShards) {
  for (const uint16_t shards : {2, 5, 16, 64}) {
    const uint16_t ranked = std::min<uint16_t>(shards, 4);
    std::vector<std::vector<int>> spaces(ranked, std::vector<int>(shards));
    for (int i = 0; i < kSpaces; ++i) {
      const auto ranking = SpaceCatalogue::RankShards(NameOf(i), shards, ranked);
      for (uint16_t p = 0; p < ranked; ++p) ++spaces[p][ranking[p].value()];
    }
    const double share = 1.0 / shards;
    const double spread = 6 * std::sqrt(kSpaces * share * (1 - share));
    for (uint16_t p = 0; p < ranked; ++p) {
      for (const int count : spaces[p]) EXPECT_NEAR(count, kSpaces * share, spread) << shards;
    }
  }
}

TEST(RankShardsTest, ARankingHasEachShardOnceAndBeginsTheSameHoweverLong) {
  for (int i = 0; i < 200; ++i) {
    const auto all = SpaceCatalogue::RankShards(NameOf(i), 16, 16);
    std::set<uint16_t> seen;
    for (const ShardId shard : all) seen.insert(shard.value());
    EXPECT_EQ(seen.size(), 16u);
    EXPECT_EQ(*seen.rbegin(), 15u);
    const auto some = SpaceCatalogue::RankShards(NameOf(i), 16, 5);
    EXPECT_EQ(some, std::vector(all.begin(), all.begin() + 5));
  }
}

// ---------------------------------------------------------------------------------------------
// Which partition has an id

// Stored in effect, as homes are.
TEST(PartitionOfTest, PartitionsOfIdsAreFixedForever) {
  EXPECT_EQ(SpaceCatalogue::HashOfId("a"), 0x12DA7D60DA745B7Bu);
  EXPECT_EQ(SpaceCatalogue::HashOfId("id-1"), 0xD26FFB802F621035u);
  EXPECT_EQ(PartitionOf(0x0000'0005'FFFF'FFFF, 4), 1);
  EXPECT_EQ(PartitionOf(0xFFFF'FFFF'0000'0000, 256), 255);
}

TEST(PartitionOfTest, IdsAreBalancedAndAnIdMovesToOnePlaceAtMost) {
  for (const uint16_t partitions : {1, 2, 3, 4, 8, 32}) {
    std::vector<int> ids(partitions);
    for (int i = 0; i < kSpaces; ++i) {
      const uint64_t hash = SpaceCatalogue::HashOfId("id-" + std::to_string(i));
      const uint16_t partition = PartitionOf(hash, partitions);
      ++ids[partition];
      const uint16_t grown = PartitionOf(hash, static_cast<uint16_t>(2 * partitions));
      EXPECT_TRUE(grown == partition || grown == partition + partitions);
    }
    const double share = 1.0 / partitions;
    const double spread = 6 * std::sqrt(kSpaces * share * (1 - share));
    for (const int count : ids) EXPECT_NEAR(count, kSpaces * share, spread) << partitions;
  }
}

// ---------------------------------------------------------------------------------------------
// The catalogue

TEST(SpaceCatalogueTest, ASpaceIsWhatWasSaidOfItOrTheDefault) {
  SpaceCatalogue catalogue(
      10, 8, 4,
      {.metric = Metric::kL2, .precision = Precision::kBf16, .dimension = 0, .partitions = 2});
  EXPECT_EQ(catalogue.Find("docs"), nullptr);
  SpaceEntry* docs = catalogue.Configure("docs", {.metric = Metric::kInnerProduct,
                                                  .precision = Precision::kInt8,
                                                  .dimension = 768,
                                                  .partitions = 4});
  ASSERT_NE(docs, nullptr);
  EXPECT_EQ(docs->name(), "docs");
  EXPECT_EQ(docs->metric(), Metric::kInnerProduct);
  EXPECT_EQ(docs->precision(), Precision::kInt8);
  EXPECT_EQ(docs->dimension(), 768);
  EXPECT_EQ(docs->partitions(), 4);
  EXPECT_EQ(docs->first_partitions(), 4);
  EXPECT_EQ(docs->max_partitions(), 4);
  SpaceEntry* open = catalogue.Configure("open", {});
  EXPECT_EQ(open->metric(), Metric::kL2);
  EXPECT_EQ(open->precision(), Precision::kBf16);
  EXPECT_EQ(open->partitions(), 2);
  SpaceEntry* made = catalogue.FindOrAdd("made", Metric::kCosine);
  EXPECT_EQ(made->metric(), Metric::kCosine);
  EXPECT_EQ(made->precision(), Precision::kBf16);
  EXPECT_EQ(made->dimension(), 0);
  EXPECT_EQ(catalogue.FindOrAdd("plain", Metric::kUnspecified)->metric(), Metric::kL2);
  // Known ones are found as they are.
  EXPECT_EQ(catalogue.FindOrAdd("docs", Metric::kL2), docs);
  EXPECT_EQ(docs->metric(), Metric::kInnerProduct);
  EXPECT_EQ(catalogue.Find("docs"), docs);
  EXPECT_EQ(catalogue.Find("doc"), nullptr);
  EXPECT_EQ(catalogue.Find("docs2"), nullptr);
  EXPECT_EQ(catalogue.size(), 4u);
  for (uint32_t i = 0; i < 4; ++i) EXPECT_EQ(catalogue.At(i)->index(), i);
  EXPECT_EQ(catalogue.At(0), docs);
}

TEST(SpaceCatalogueTest, GapsOfTheDefaultsAreCosineF32AndOnePartition) {
  SpaceCatalogue catalogue(2, 3, 3, {});
  const SpaceEntry* entry = catalogue.FindOrAdd("a", Metric::kUnspecified);
  EXPECT_EQ(entry->metric(), Metric::kCosine);
  EXPECT_EQ(entry->precision(), Precision::kF32);
  EXPECT_EQ(entry->dimension(), 0);
  EXPECT_EQ(entry->partitions(), 1);
}

std::vector<std::string> KeysOf(std::span<const std::string> keys) {
  return {keys.begin(), keys.end()};
}
std::shared_ptr<const std::vector<std::string>> Keys(std::vector<std::string> keys) {
  return std::make_shared<const std::vector<std::string>>(std::move(keys));
}

TEST(SpaceCatalogueTest, FilterKeysAreThoseOfTheSpaceOrTheDefault) {
  const std::vector<std::string> usual{"source", "category"};
  SpaceCatalogue silent(4, 1, 1, SpaceSettings());
  EXPECT_EQ(KeysOf(silent.FilterKeysOf("docs")), usual);
  EXPECT_EQ(KeysOf(silent.Configure("docs", {})->filter_keys()), usual);

  SpaceSettings defaults;
  defaults.filter_keys = Keys({"author"});
  SpaceCatalogue catalogue(4, 1, 1, defaults);
  SpaceSettings own;
  own.filter_keys = Keys({"lang", "topic"});
  SpaceSettings none;
  none.filter_keys = Keys({});
  SpaceEntry* films = catalogue.Configure("films", own);
  EXPECT_EQ(KeysOf(films->filter_keys()), (std::vector<std::string>{"lang", "topic"}));
  EXPECT_TRUE(catalogue.Configure("plain", none)->filter_keys().empty());
  SpaceEntry* made = catalogue.FindOrAdd("made", Metric::kL2);
  EXPECT_EQ(KeysOf(made->filter_keys()), std::vector<std::string>{"author"});
  EXPECT_EQ(KeysOf(catalogue.FilterKeysOf("films")), KeysOf(films->filter_keys()));
  EXPECT_EQ(KeysOf(catalogue.FilterKeysOf("nobody")), std::vector<std::string>{"author"});
  // A drop changes none of it.
  catalogue.EndIncarnation(films, 1'000);
  catalogue.EndIncarnation(made, 1'000);
  EXPECT_EQ(KeysOf(films->filter_keys()), (std::vector<std::string>{"lang", "topic"}));
  EXPECT_EQ(KeysOf(catalogue.FindOrAdd("made", Metric::kCosine)->filter_keys()),
            std::vector<std::string>{"author"});
}

TEST(SpaceCatalogueTest, PartitionsLiveWhereTheRankingSays) {
  SpaceCatalogue catalogue(100, 8, 5, Defaults(2));
  for (int i = 0; i < 100; ++i) {
    const SpaceEntry* entry = catalogue.FindOrAdd(NameOf(i), Metric::kL2);
    const auto ranking = SpaceCatalogue::RankShards(NameOf(i), 8, 5);
    for (uint16_t p = 0; p < 5; ++p) EXPECT_EQ(entry->ShardOf(p), ranking[p]);
    EXPECT_EQ(catalogue.FirstShard(NameOf(i)), ranking[0]);
  }
}

TEST(SpaceCatalogueTest, AFullTableTakesNoMoreAndStillFinds) {
  for (const uint32_t max_spaces : {1, 3, 64, 1000}) {
    SpaceCatalogue catalogue(max_spaces, 2, 1, {}, 77);
    for (uint32_t i = 0; i < max_spaces; ++i) {
      ASSERT_NE(catalogue.FindOrAdd(NameOf(static_cast<int>(i)), Metric::kL2), nullptr);
    }
    EXPECT_EQ(catalogue.FindOrAdd("one-more", Metric::kL2), nullptr);
    EXPECT_EQ(catalogue.Configure("and-another", {}), nullptr);
    EXPECT_EQ(catalogue.Find("one-more"), nullptr);
    EXPECT_EQ(catalogue.size(), max_spaces);
    for (uint32_t i = 0; i < max_spaces; ++i) {
      const SpaceEntry* entry = catalogue.FindOrAdd(NameOf(static_cast<int>(i)), Metric::kL2);
      ASSERT_NE(entry, nullptr);
      EXPECT_EQ(entry->index(), i);
      EXPECT_EQ(entry->name(), NameOf(static_cast<int>(i)));
    }
  }
}

TEST(SpaceCatalogueTest, ASpaceGrowsByDoublingUpToItsLimit) {
  SpaceCatalogue catalogue(2, 8, 7, {});
  SpaceEntry* entry = catalogue.FindOrAdd("a", Metric::kL2);
  EXPECT_FALSE(entry->Grow(2)) << "it has one";
  EXPECT_TRUE(entry->Grow(1));
  EXPECT_FALSE(entry->Grow(1)) << "someone else did it first";
  EXPECT_EQ(entry->partitions(), 2);
  EXPECT_TRUE(entry->Grow(2));
  EXPECT_FALSE(entry->Grow(4)) << "8 are more than 7";
  EXPECT_EQ(entry->partitions(), 4);
  EXPECT_EQ(entry->first_partitions(), 1);
  EXPECT_EQ(catalogue.FindOrAdd("b", Metric::kL2)->partitions(), 1) << "that was another space";
}

TEST(SpaceCatalogueTest, SessionsAreDealtOverThePartitionsInTurn) {
  SpaceCatalogue catalogue(2, 8, 8, Defaults(2));
  SpaceEntry* a = catalogue.FindOrAdd("a", Metric::kL2);
  SpaceEntry* b = catalogue.FindOrAdd("b", Metric::kL2);
  // Spaces whose sessions come by turns do not keep each other to one partition.
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(a->NextHome(), a->ShardOf(static_cast<uint16_t>(i % 2)));
    EXPECT_EQ(b->NextHome(), b->ShardOf(static_cast<uint16_t>(i % 2)));
  }
  ASSERT_TRUE(a->Grow(2));
  std::set<uint16_t> homes;
  for (int i = 0; i < 4; ++i) homes.insert(a->NextHome().value());
  EXPECT_EQ(homes.size(), 4u);
}

TEST(SpaceCatalogueTest, TheDimensionIsSettledOnce) {
  SpaceCatalogue catalogue(2, 1, 1, {});
  SpaceEntry* entry = catalogue.FindOrAdd("a", Metric::kL2);
  EXPECT_TRUE(entry->FixDimension(3));
  EXPECT_TRUE(entry->FixDimension(3));
  EXPECT_FALSE(entry->FixDimension(4));
  EXPECT_EQ(entry->dimension(), 3);
  EXPECT_DEATH((void)entry->FixDimension(0), "open");
}

TEST(SpaceCatalogueDeathTest, MistakesOfOurOwnAreCaught) {
  SpaceCatalogue catalogue(2, 2, 2, {});
  (void)catalogue.Configure("a", {});
  EXPECT_DEATH((void)catalogue.Configure("a", {}), "once");
  EXPECT_DEATH((void)catalogue.Configure("b", Defaults(3)), "more partitions");
  EXPECT_DEATH((void)catalogue.FindOrAdd("NotAName", Metric::kL2), "checked before");
  EXPECT_DEATH((void)catalogue.At(1), "no such space");
  EXPECT_DEATH(SpaceCatalogue(2, 2, 3, {}), "one partition");
}

// ---------------------------------------------------------------------------------------------
// Many cores

// Each of the names is added by several threads at once while others look: all get one entry, whole
// at once.
TEST(SpaceCatalogueThreadTest, AllThreadsGetTheSameEntriesWhileOthersAdd) {
  constexpr int kNames = 1500;
  constexpr uint32_t kRoom = 1000;
  constexpr int kThreads = 4;
  SpaceCatalogue catalogue(kRoom, 8, 8, Defaults(2), 5);
  std::vector<std::vector<SpaceEntry*>> found(kThreads, std::vector<SpaceEntry*>(kNames));
  std::atomic<bool> begun{false};
  std::atomic<int> adding{kThreads};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      while (!begun.load()) std::this_thread::yield();
      for (int i = 0; i < kNames; ++i) {
        // Two go upwards, two from the middle.
        const int name = (i + (t % 2) * kNames / 2) % kNames;
        found[static_cast<size_t>(t)][static_cast<size_t>(name)] =
            catalogue.FindOrAdd(NameOf(name), Metric::kL2);
      }
      adding.fetch_sub(1);
    });
  }
  begun.store(true);
  do {
    for (int i = 0; i < kNames; ++i) {
      const SpaceEntry* entry = catalogue.Find(NameOf(i));
      if (entry == nullptr) continue;
      ASSERT_EQ(entry->name(), NameOf(i));
      ASSERT_EQ(entry->metric(), Metric::kL2);
      ASSERT_EQ(entry->partitions(), 2);
      ASSERT_EQ(entry->max_partitions(), 8);
      ASSERT_EQ(catalogue.At(entry->index()), entry);
    }
    const uint32_t size = catalogue.size();
    if (size == 0) continue;
    const SpaceEntry* last = catalogue.At(size - 1);
    ASSERT_NE(last->ShardOf(0), last->ShardOf(1));
  } while (adding.load() > 0);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(catalogue.size(), kRoom);
  std::set<SpaceEntry*> entries;
  for (int i = 0; i < kNames; ++i) {
    SpaceEntry* entry = catalogue.Find(NameOf(i));
    if (entry != nullptr) entries.insert(entry);
    for (const auto& of_thread : found) EXPECT_EQ(of_thread[static_cast<size_t>(i)], entry);
  }
  EXPECT_EQ(entries.size(), kRoom);
}

// Two threads in step, so that both miss a name and then add it.
TEST(SpaceCatalogueThreadTest, ANameThatTwoAddAtOnceIsAddedOnce) {
  constexpr int kNames = 10'000;
  SpaceCatalogue catalogue(kNames, 8, 8, {});
  std::atomic<int> arrived{0};
  std::vector<std::vector<SpaceEntry*>> found(2, std::vector<SpaceEntry*>(kNames));
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kNames; ++i) {
        const std::string name = NameOf(i);
        arrived.fetch_add(1);
        for (int spins = 0; arrived.load() < 2 * (i + 1); ++spins) {
          if (spins > 1000) std::this_thread::yield();
        }
        found[t][static_cast<size_t>(i)] = catalogue.FindOrAdd(name, Metric::kL2);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(found[0], found[1]);
  EXPECT_EQ(catalogue.size(), static_cast<uint32_t>(kNames));
}

TEST(SpaceCatalogueThreadTest, OneOfSeveralDimensionsAndOneGrowthWin) {
  constexpr int kThreads = 4;
  SpaceCatalogue catalogue(200, 8, 8, {});
  for (int round = 0; round < 200; ++round) {
    SpaceEntry* entry = catalogue.FindOrAdd(NameOf(round), Metric::kL2);
    std::atomic<int> fixed{0};
    std::atomic<int> grown{0};
    std::atomic<uint16_t> winner{0};
    std::vector<std::thread> threads;
    for (uint16_t t = 1; t <= kThreads; ++t) {
      threads.emplace_back([&, t] {
        if (entry->FixDimension(t)) {
          fixed.fetch_add(1);
          winner.store(t);
        }
        if (entry->Grow(1)) grown.fetch_add(1);
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(fixed.load(), 1);
    EXPECT_EQ(entry->dimension(), winner.load());
    EXPECT_EQ(grown.load(), 1);
    EXPECT_EQ(entry->partitions(), 2);
  }
}

}  // namespace
}  // namespace engram
