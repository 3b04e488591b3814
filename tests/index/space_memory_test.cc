// A space and its memory: refusals where it runs out leave everything as it was, and what has ended
// gives its place back.

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "src/core/attributes.h"
#include "src/core/hash.h"
#include "src/core/memory_kinds.h"
#include "tests/index/latent_vector.h"
#include "tests/index/space_rig.h"
#include "tests/index/space_upkeep.h"

namespace engram {
namespace {

// Memory runs out at a different place in each run: rows, nodes, lists, ids, text.
TEST(SpaceMemoryTest, ARefusalForMemoryLeavesEverythingAsItWas) {
  for (size_t left = 0; left < 24'000; left += left < 4'000 ? 64 : 900) {
    SpaceRig rig(Metric::kL2, 0, size_t{2} << 20);
    rig.memory.LeaveOnly(left);
    SplitMix64 random(left);
    int refused = 0;
    for (int step = 0; step < 250; ++step) {
      const std::string id = RandomId(&random, 60);
      const std::vector<float> vector = QuarterVector(&random, 5);
      if (random.Below(4) == 0) {
        rig.Delete(id);
        continue;
      }
      const RefusalReason reason =
          rig.Upsert(id, VectorDtype::kF32, vector, RandomPayload(&random), step, 1);
      if (reason == RefusalReason::kNone) continue;
      ASSERT_EQ(reason, RefusalReason::kMemoryFull);
      ++refused;
      ASSERT_NO_FATAL_FAILURE(rig.ExpectSound()) << left << " bytes, step " << step;
      if (rig.space->dimension() != 0) {
        ASSERT_NO_FATAL_FAILURE(rig.ExpectExactRecall(vector, 100, VectorDtype::kF32))
            << left << " bytes, step " << step;
      }
    }
    ASSERT_GT(refused, 0) << left << " bytes";
    ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
    rig.space.reset();
    ASSERT_EQ(rig.memory.heap.live_bytes(), 0u);
  }
}

TEST(SpaceMemoryTest, LinkingWithoutMemoryChangesNothingAndGoesOnLater) {
  SpaceRig rig(Metric::kL2, 4, size_t{8} << 20);
  SplitMix64 random(3);
  for (uint32_t i = 0; i <= Space::kGraphFrom; ++i) {
    ASSERT_EQ(rig.Upsert(std::to_string(i), VectorDtype::kF32, QuarterVector(&random, 4)),
              RefusalReason::kNone);
  }
  // Everything is taken, then the large blocks are given back.
  std::vector<std::byte*> hoard;
  for (;;) {
    std::byte* block = rig.memory.heap.Allocate(size_t{512} << 10);
    if (block == nullptr) break;
    hoard.push_back(block);
  }
  rig.memory.LeaveOnly(0);
  std::vector<std::pair<std::byte*, size_t>> small;
  for (size_t bytes = size_t{256} << 10; bytes > 0; bytes /= 2) {
    while (std::byte* block = rig.memory.heap.Allocate(bytes)) small.emplace_back(block, bytes);
  }
  rig.taken_by_others = rig.memory.heap.live_bytes() - rig.space->resident_bytes();
  ASSERT_FALSE(rig.Link(UINT32_MAX));
  ASSERT_FALSE(rig.linker.active());
  ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  ASSERT_NO_FATAL_FAILURE(rig.ExpectExactRecall(QuarterVector(&random, 4), 10, VectorDtype::kF32));
  for (std::byte* block : hoard) rig.memory.heap.Free(block, size_t{512} << 10);
  rig.taken_by_others -= hoard.size() * (size_t{512} << 10);
  for (uint32_t i = 0; i <= Space::kGraphFrom; ++i) rig.Link(UINT32_MAX);
  EXPECT_EQ(rig.space->unlinked_count(), 0u) << "large blocks are cut";
  ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  EXPECT_EQ(rig.space->live(), Space::kGraphFrom + 1);
  rig.space.reset();
  for (const auto& [block, bytes] : small) rig.memory.heap.Free(block, bytes);
  EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
}

// With several homes each refusal may come where the tombstone, too, wants memory.
TEST(SpaceMemoryTest, MemoryMayRunOutWithSeveralHomes) {
  uint64_t refused_deletes = 0;
  for (size_t left = 0; left < 24'000; left += left < 6'000 ? 96 : 1'100) {
    SpaceRig rig(Metric::kL2, 0, size_t{2} << 20);
    rig.memory.LeaveOnly(left);
    SplitMix64 random(left);
    for (int step = 0; step < 300; ++step) {
      const std::string id = "id" + std::to_string(random.Below(40));
      // Some come late.
      const CommitStamp stamp = random.Below(4) == 0 ? rig.stamp - random.Below(50) : ++rig.stamp;
      StoreOutcome outcome;
      if (random.Below(2) == 0) {
        outcome = rig.space->Delete(id, stamp, true);
        refused_deletes += static_cast<uint64_t>(outcome.reason == RefusalReason::kMemoryFull);
      } else {
        outcome = UpsertNumber(rig.space.get(), id, static_cast<float>(step), stamp, true);
      }
      const Result<void> sound = rig.space->CheckInvariants();
      ASSERT_TRUE(sound.has_value()) << sound.error().message << ", " << left << " bytes";
      if (step % 60 == 59) {
        rig.space->SetHorizon(rig.stamp - 60);
        rig.space->ForgetTombstones(rig.stamp - 60);
        rig.space->NextToLink();
        rig.space->Reclaim(100);
      }
    }
    rig.space.reset();
    ASSERT_EQ(rig.memory.heap.live_bytes(), 0u);
  }
  EXPECT_GT(refused_deletes, 0u);
}

// While nothing but ended nodes waits for the horizon the list is not turned over and over.
TEST(SpaceMemoryTest, NothingIsDoneWhileEndedNodesWaitForTheHorizon) {
  SpaceOptions options = TestSpaceOptions(Metric::kL2, 1, kLightBuild);
  options.graph_from = 0;
  SpaceRig rig(options, size_t{8} << 20);
  rig.keep = 1'000;
  ASSERT_NO_FATAL_FAILURE(rig.StoreNumbers("id", 10));
  for (int i = 0; i < 10; ++i) ASSERT_TRUE(rig.Delete("id" + std::to_string(i)));
  const size_t before = rig.memory.heap.live_bytes();
  const std::byte* const unused = rig.memory.arena.Allocate(kCacheLineBytes, kCacheLineBytes);
  for (int i = 0; i < 1'000; ++i) ASSERT_EQ(rig.space->NextToLink(), kNoNode);
  EXPECT_EQ(rig.memory.heap.live_bytes(), before);
  EXPECT_EQ(rig.memory.arena.Allocate(kCacheLineBytes, kCacheLineBytes), unused + kCacheLineBytes)
      << "no run of the list was made";
  rig.space->SetHorizon(rig.stamp);
  EXPECT_EQ(rig.space->NextToLink(), kNoNode);
  rig.space->Reclaim(100);
  EXPECT_EQ(rig.space->retired(), 0u);
}

// Ended nodes between live ones give their places back also where nothing new is stored.
TEST(SpaceMemoryTest, ScatteredDeletesOfASmallSpaceGiveTheirMemoryBack) {
  SpaceRig rig(Metric::kL2, 1, size_t{8} << 20);
  ASSERT_NO_FATAL_FAILURE(rig.StoreNumbers("", 1'000));
  rig.keep = 150;
  for (int i = 5; i < 1'000; i += 5) ASSERT_TRUE(rig.Delete(std::to_string(i)));
  EXPECT_EQ(rig.space->NextToLink(), kNoNode);
  rig.space->Reclaim(1'000);
  EXPECT_EQ(rig.space->retired(), 199u) << "some of them may still be asked for";
  rig.space->SetHorizon(rig.stamp);
  EXPECT_EQ(rig.space->NextToLink(), kNoNode);
  rig.space->Reclaim(1'000);
  EXPECT_EQ(rig.space->retired(), 0u);
  // A few are not worth it.
  for (int i = 1; i < 50; i += 5) ASSERT_TRUE(rig.Delete(std::to_string(i)));
  EXPECT_EQ(rig.space->NextToLink(), kNoNode);
  rig.space->Reclaim(1'000);
  EXPECT_EQ(rig.space->retired(), 10u);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  ASSERT_NO_FATAL_FAILURE(rig.ExpectExactRecall({77}, 30, VectorDtype::kF32));
}

TEST(SpaceMemoryTest, AFullMemoryTakesAsManyAsAreDeletedWhereverTheyLie) {
  for (const int every : {1, 7, 100}) {
    SpaceRig rig(Metric::kL2, 1, size_t{2} << 20);
    int stored = 0;
    while (rig.Upsert(std::to_string(stored), VectorDtype::kF32, {static_cast<float>(stored)},
                      std::string(300, 'p')) == RefusalReason::kNone) {
      ++stored;
    }
    ASSERT_FALSE(rig.space->has_graph());
    int deleted = 0;
    for (int i = stored - 1; i > 100 && deleted < 30; i -= every) {
      ASSERT_TRUE(rig.Delete(std::to_string(i)));
      ++deleted;
    }
    EXPECT_EQ(rig.space->NextToLink(), kNoNode);
    rig.space->Reclaim(1'000);
    EXPECT_EQ(rig.space->retired(), 0u);
    for (int i = 0; i < deleted; ++i) {
      ASSERT_EQ(rig.Upsert("new" + std::to_string(i), VectorDtype::kF32, {-1.0F - i},
                           std::string(300, 'p')),
                RefusalReason::kNone)
          << i << " of " << deleted;
    }
    ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
    ASSERT_NO_FATAL_FAILURE(rig.ExpectExactRecall({0}, 60, VectorDtype::kF32));
  }
}

// A hundred tombstones and a hundred ended nodes in front of a live one: taken in several calls.
TEST(SpaceMemoryTest, UpkeepIsBoundedAndGoesOn) {
  SpaceOptions options = TestSpaceOptions(Metric::kL2, 1, kLightBuild);
  options.graph_from = 50;
  SpaceRig rig(options, size_t{8} << 20);
  rig.keep = 1'000;
  ASSERT_NO_FATAL_FAILURE(rig.StoreNumbers("gone", 100));
  for (int i = 0; i < 100; ++i) {
    EXPECT_TRUE(rig.space->Delete("gone" + std::to_string(i), ++rig.stamp, true).existed);
  }
  rig.model.entries().clear();
  rig.Upsert("stays", VectorDtype::kF32, {1});
  EXPECT_EQ(rig.space->NextToLink(), kNoNode) << "64 were passed over";
  EXPECT_EQ(rig.space->NextToLink(), rig.space->FindLive("stays"))
      << "which the others wait behind";
  ASSERT_NO_FATAL_FAILURE(rig.ExpectExactRecall({0}, 5, VectorDtype::kF32));
  rig.space->ForgetTombstones(rig.stamp);
  EXPECT_TRUE(rig.space->has_tombstones());
  rig.space->ForgetTombstones(rig.stamp);
  EXPECT_FALSE(rig.space->has_tombstones());
  rig.LinkAll();
  EXPECT_EQ(rig.space->retired(), 100u);
  rig.space->SetHorizon(rig.stamp);
  rig.space->NextToLink();
  rig.space->NextToLink();
  rig.space->Reclaim(1'000);
  EXPECT_EQ(rig.space->retired(), 0u);
  ASSERT_TRUE(rig.space->CheckInvariants().has_value());
}

// Memory by kind is what the heap has handed out, to the byte, whatever a space is about.
class SpaceMemoryKindsTest : public testing::TestWithParam<std::pair<Precision, Traversal>> {
 protected:
  static constexpr uint32_t kDimension = 80;
  static constexpr HnswBuildParams kBuild{.M = 8, .M0 = 16, .ef_construction = 40};

  static SpaceOptions Options() {
    SpaceOptions options = TestSpaceOptions(Metric::kL2, kDimension, kBuild);
    options.precision = GetParam().first;
    options.traversal = GetParam().second;
    options.graph_from = 300;
    options.list_from = 100;
    options.ends_by_age = true;
    options.homes = 2;
    options.filter_keys = {"colour"};
    return options;
  }
  void Upsert(uint64_t id) {
    const std::string name = "observation-" + std::to_string(id);
    const std::vector<float> vector = LatentVector(id, kDimension);
    std::string attributes;
    ASSERT_TRUE(AppendAttribute("colour", id % 3 == 0 ? "red" : "green", &attributes));
    if (id % 2 == 0) {
      ASSERT_TRUE(AppendAttribute(kTagKey, name, &attributes));
    }
    const std::string payload(id % 100, 'x');
    ObservationRef observation;
    observation.id = name;
    observation.payload = BytesOf(payload);
    observation.dtype = VectorDtype::kF32;
    observation.dimension = kDimension;
    observation.vector = reinterpret_cast<const std::byte*>(vector.data());
    observation.when_ns = static_cast<int64_t>(id * 77 % 1'000);
    observation.attributes = BytesOf(attributes);
    ASSERT_EQ(space_->Upsert(observation, ++stamp_, true).reason, RefusalReason::kNone);
  }
  void ExpectBooksAgree() const {
    ASSERT_EQ(SumOf(space_->memory()), memory_.heap.live_bytes());
    ASSERT_EQ(space_->resident_bytes(), memory_.heap.live_bytes());
  }
  uint64_t Of(MemoryKind kind) const { return space_->memory()[static_cast<size_t>(kind)]; }

  TestHeap memory_{size_t{128} << 20};
  ReaderEpochs epochs_{1};
  std::unique_ptr<Space> space_ =
      std::make_unique<Space>("kinds", Options(), &memory_.heap, &epochs_);
  CommitStamp stamp_ = 0;
};

TEST_P(SpaceMemoryKindsTest, KindsAreAllThatTheHeapHasHandedOut) {
  ASSERT_NO_FATAL_FAILURE(ExpectBooksAgree());
  for (uint64_t id = 0; id < 900; ++id) {
    ASSERT_NO_FATAL_FAILURE(Upsert(id));
    ASSERT_NO_FATAL_FAILURE(ExpectBooksAgree());
    if (id % 7 == 0) {
      const std::string gone = "observation-" + std::to_string(id / 2);
      if (id % 2 == 0) {
        space_->Delete(gone, ++stamp_, true);
      } else {
        space_->Suppress(gone, ++stamp_, true);
      }
      ASSERT_NO_FATAL_FAILURE(ExpectBooksAgree());
    }
    if (id % 100 != 99) continue;
    space_->SetHorizon(stamp_);
    space_->ForgetTombstones(stamp_ / 2);
    // What upkeep takes for itself is given back before the books are compared.
    SpaceUpkeep(space_.get(), &memory_.heap, kBuild).Run();
    ASSERT_NO_FATAL_FAILURE(ExpectBooksAgree());
  }
  ASSERT_GT(space_->linked(), 500u);
  const bool has_codes = space_->walk_codes() != nullptr;
  EXPECT_EQ(has_codes, GetParam().second == Traversal::kRabitq);
  const uint64_t nodes = space_->node_count();
  EXPECT_GE(Of(MemoryKind::kRows), nodes * kDimension);
  EXPECT_EQ(Of(MemoryKind::kCodes) > nodes * kDimension / 8, has_codes);
  EXPECT_EQ(Of(MemoryKind::kLists) > nodes * kDimension / 8, has_codes);
  EXPECT_GE(Of(MemoryKind::kLinks), nodes * kBuild.M0 * sizeof(NodeId));
  EXPECT_GE(Of(MemoryKind::kIds), nodes * 16);
  for (const MemoryKind kind :
       {MemoryKind::kWaiting, MemoryKind::kRecords, MemoryKind::kStamps, MemoryKind::kFilters}) {
    EXPECT_GT(Of(kind), 0u) << kMemoryKindNames[static_cast<size_t>(kind)];
  }
  // Codes that are learned, lists that are filled: between two slices of it.
  {
    SpaceUpkeep upkeep(space_.get(), &memory_.heap, kBuild);
    for (uint64_t id = 900; id < 3'000; ++id) {
      ASSERT_NO_FATAL_FAILURE(Upsert(id));
      upkeep.Step(500);
    }
  }
  ASSERT_NO_FATAL_FAILURE(ExpectBooksAgree());
  space_.reset();
  EXPECT_EQ(memory_.heap.live_bytes(), 0u);
}

std::string NameOfForm(const testing::TestParamInfo<SpaceMemoryKindsTest::ParamType>& form) {
  constexpr std::array kTraversals = {"int8", "exact", "rabitq"};
  return std::string(PrecisionName(form.param.first)) + "_" +
         kTraversals[static_cast<size_t>(form.param.second)];
}

INSTANTIATE_TEST_SUITE_P(Forms, SpaceMemoryKindsTest,
                         testing::Values(std::pair{Precision::kF32, Traversal::kRabitq},
                                         std::pair{Precision::kBf16, Traversal::kRabitq},
                                         std::pair{Precision::kInt8, Traversal::kRabitq},
                                         std::pair{Precision::kF32, Traversal::kExact},
                                         std::pair{Precision::kBf16, Traversal::kInt8},
                                         std::pair{Precision::kInt8, Traversal::kInt8}),
                         NameOfForm);

}  // namespace
}  // namespace engram
