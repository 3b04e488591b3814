#include "index/id_map.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/space_testing.h"

namespace engram {
namespace {

enum class Hashes { kRandom, kSequential, kEqualTags, kEqualUpperBits, kEqualLowerBits };

uint64_t HashOf(Hashes hashes, uint64_t key) {
  switch (hashes) {
    case Hashes::kSequential:
      return key << 32;
    case Hashes::kEqualTags:  // Four tags; the map sees no more than the upper half of a hash.
      return (key % 4) * 0x40000001 << 32 | MixBits(key) >> 32;
    case Hashes::kEqualUpperBits:
      return uint64_t{0xABCDEF} << 40 | (key % 256) << 32;
    case Hashes::kEqualLowerBits:  // All want the same place in whatever segment they are in.
      return (MixBits(key) >> 52) << 52 | uint64_t{5} << 32;
    case Hashes::kRandom:
      break;
  }
  return MixBits(key);
}

// Keys are numbers, nodes name their key by a table: as ids are named by a space's nodes.
class Keys {
 public:
  Keys(Hashes hashes, IdMap* map) : hashes_(hashes), map_(map) {}

  NodeId Find(uint64_t key) const {
    return map_->Find(HashOf(hashes_, key), [&](NodeId node) { return key_of_[node] == key; });
  }
  bool Insert(uint64_t key) {
    key_of_.push_back(key);
    const auto node = static_cast<NodeId>(key_of_.size() - 1);
    if (!map_->Insert(HashOf(hashes_, key), node)) return false;
    model_[key] = node;
    return true;
  }
  void Replace(uint64_t key) {
    key_of_.push_back(key);
    const auto node = static_cast<NodeId>(key_of_.size() - 1);
    map_->Replace(HashOf(hashes_, key), model_.at(key), node);
    model_[key] = node;
  }
  void Erase(uint64_t key) {
    map_->Erase(HashOf(hashes_, key), model_.at(key));
    model_.erase(key);
  }
  bool Has(uint64_t key) const { return model_.contains(key); }
  uint64_t Any() const { return model_.begin()->first; }
  size_t size() const { return model_.size(); }

  void ExpectFound(uint64_t key) const {
    const auto entry = model_.find(key);
    ASSERT_EQ(Find(key), entry == model_.end() ? kNoNode : entry->second) << "key " << key;
  }
  void ExpectAllFound(uint64_t keys) const {
    ASSERT_EQ(map_->size(), model_.size());
    for (uint64_t key = 0; key < keys; ++key) ASSERT_NO_FATAL_FAILURE(ExpectFound(key));
  }

 private:
  Hashes hashes_;
  IdMap* map_;
  std::vector<uint64_t> key_of_;
  std::unordered_map<uint64_t, NodeId> model_;
};

class IdMapPropertyTest : public testing::TestWithParam<Hashes> {};

TEST_P(IdMapPropertyTest, AgreesWithUnorderedMapOverRandomPrograms) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    TestHeap memory(size_t{512} << 20);
    {
      IdMap map(&memory.heap);
      Keys keys(GetParam(), &map);
      SplitMix64 random(seed);
      constexpr uint64_t kKeys = 1'500;
      ASSERT_NO_FATAL_FAILURE(keys.ExpectAllFound(10));  // An empty map finds nothing.
      for (int step = 0; step < 12'000; ++step) {
        const uint64_t key = random.Below(kKeys);
        // Mostly inserts in the first and third quarter, mostly erasures in the others.
        const bool filling = step / 3'000 % 2 == 0;
        if (!keys.Has(key)) {
          if (random.Below(10) < (filling ? 9 : 2)) {
            ASSERT_TRUE(keys.Insert(key));
          }
        } else if (random.Below(10) < (filling ? 2 : 9)) {
          keys.Erase(key);
        } else {
          keys.Replace(key);
        }
        ASSERT_NO_FATAL_FAILURE(keys.ExpectFound(key)) << "step " << step;
        ASSERT_NO_FATAL_FAILURE(keys.ExpectFound(random.Below(kKeys))) << "step " << step;
        if (step % 1'500 == 0) {
          ASSERT_NO_FATAL_FAILURE(keys.ExpectAllFound(kKeys)) << "step " << step;
        }
      }
      ASSERT_NO_FATAL_FAILURE(keys.ExpectAllFound(kKeys));
      map.Release();
      EXPECT_EQ(map.size(), 0u);
      EXPECT_EQ(memory.heap.live_bytes(), 0u) << "Release gives every block back";
      EXPECT_EQ(keys.Find(1), kNoNode);
      ASSERT_TRUE(map.Insert(HashOf(GetParam(), 1), 0));  // It may be used again.
    }
    EXPECT_EQ(memory.heap.live_bytes(), 0u) << "and so does the destructor";
  }
}

std::string NameOf(const testing::TestParamInfo<Hashes>& param) {
  constexpr const char* kNames[] = {"Random", "Sequential", "EqualTags", "EqualUpperBits",
                                    "EqualLowerBits"};
  return kNames[static_cast<int>(param.param)];
}

INSTANTIATE_TEST_SUITE_P(Hashes, IdMapPropertyTest,
                         testing::Values(Hashes::kRandom, Hashes::kSequential, Hashes::kEqualTags,
                                         Hashes::kEqualUpperBits, Hashes::kEqualLowerBits),
                         NameOf);

// Two keys may have the same node only in a map that is used for something else than a space; an
// erasure by hash must still take the right one.
TEST(IdMapTest, EntriesOfOneNodeAreToldApartByTheirHash) {
  TestHeap memory(size_t{8} << 20);
  IdMap map(&memory.heap);
  const uint64_t first = uint64_t{3} << 32;
  const uint64_t second = uint64_t{4} << 32;
  ASSERT_TRUE(map.Insert(first, 7));
  ASSERT_TRUE(map.Insert(second, 7));
  const auto any = [](NodeId) { return true; };
  map.Replace(second, 7, 8);
  EXPECT_EQ(map.Find(first, any), 7u);
  EXPECT_EQ(map.Find(second, any), 8u);
  map.Replace(second, 8, 7);
  // A key that probes past the first entry.
  const uint64_t third = (uint64_t{1} << 63) | first;
  ASSERT_TRUE(map.Insert(third, 7));
  map.Erase(third, 7);
  EXPECT_EQ(map.Find(first, any), 7u);
  EXPECT_EQ(map.Find(second, any), 7u);
  EXPECT_EQ(map.Find(third, any), kNoNode);
}

// A table that is rehashed as a whole would double its memory in one insert.
TEST(IdMapTest, NoInsertMovesMoreThanOneSegmentWhileItGrowsTo200000) {
  TestHeap memory(size_t{256} << 20);
  IdMap map(&memory.heap);
  Keys keys(Hashes::kRandom, &map);
  constexpr uint64_t kKeys = 200'000;
  constexpr size_t kSegmentBytes = 512 * 8 + 1024;  // Of the heap's class, header included.
  size_t before = 0;
  size_t directory_bytes = 0;  // Doubles by copying: 8 bytes a segment.
  for (uint64_t key = 0; key < kKeys; ++key) {
    ASSERT_TRUE(keys.Insert(key));
    const size_t now = memory.heap.live_bytes();
    const size_t grown = now > before ? now - before : 0;
    directory_bytes = std::max<size_t>(64, 8 * std::bit_ceil(4 * (key / 192 + 1)));
    ASSERT_LE(grown, 2 * kSegmentBytes + directory_bytes) << "at " << key;
    before = now;
  }
  ASSERT_NO_FATAL_FAILURE(keys.ExpectAllFound(kKeys));
  EXPECT_LE(memory.heap.live_bytes(), kKeys * 24) << "8 bytes an entry, half full or better";
  for (uint64_t key = 0; key < kKeys; key += 2) keys.Erase(key);
  ASSERT_NO_FATAL_FAILURE(keys.ExpectAllFound(kKeys));
  map.Release();
  EXPECT_EQ(memory.heap.live_bytes(), 0u);
}

TEST(IdMapTest, AnInsertThatFindsNoMemoryChangesNothing) {
  for (const Hashes hashes : {Hashes::kRandom, Hashes::kSequential, Hashes::kEqualTags}) {
    for (size_t left = 0; left < 60'000; left = left < 12'000 ? left + 160 : left + 3'000) {
      TestHeap memory(size_t{2} << 20);
      memory.LeaveOnly(left);
      IdMap map(&memory.heap);
      Keys keys(hashes, &map);
      uint64_t key = 0;
      while (keys.Insert(key)) ++key;
      ASSERT_LT(key, 20'000u);
      ASSERT_NO_FATAL_FAILURE(keys.ExpectAllFound(key + 1)) << left << " bytes";
      ASSERT_FALSE(keys.Insert(key));
      ASSERT_NO_FATAL_FAILURE(keys.ExpectAllFound(key + 1)) << left << " bytes";
      if (key > 0) {  // What it has can be replaced, erased, and taken in again.
        keys.Replace(key / 2);
        keys.Erase(key - 1);
        ASSERT_NO_FATAL_FAILURE(keys.ExpectAllFound(key + 1)) << left << " bytes";
        ASSERT_TRUE(keys.Insert(key - 1));
        ASSERT_NO_FATAL_FAILURE(keys.ExpectAllFound(key + 1)) << left << " bytes";
      }
      map.Release();
      ASSERT_EQ(memory.heap.live_bytes(), 0u) << left << " bytes";
    }
  }
}

TEST(IdMapDeathTest, ReplacingOrErasingWhatIsNotThereIsABug) {
  TestHeap memory(size_t{8} << 20);
  IdMap map(&memory.heap);
  EXPECT_DEATH(map.Erase(1, 1), "the entry is in the map");
  ASSERT_TRUE(map.Insert(uint64_t{9} << 32, 1));
  EXPECT_DEATH(map.Erase(uint64_t{9} << 32, 2), "the entry is in the map");
  EXPECT_DEATH(map.Replace(uint64_t{9} << 32, 2, 3), "the entry is in the map");
}

}  // namespace
}  // namespace engram
