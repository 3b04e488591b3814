// Memory that runs out while codes are learned, nodes are encoded and batches are linked: what was
// stored is found all the same, and once there is memory again the space goes on.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/coded_space_rig.h"
#include "tests/index/latent_vector.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr uint32_t kDimension = 96;
constexpr uint64_t kWaitForMore = 100;  // that a batch is worth while for
constexpr uint32_t kWholeEf = 2'000;    // more than there are nodes
constexpr HnswBuildParams kBuild{.M = 8, .M0 = 16, .ef_construction = 40};
constexpr CodedSpaceRig::Setup kSetup{
    .dimension = kDimension, .build = kBuild, .arena_bytes = size_t{128} << 20};

// Blocks of some sizes, to be given back: whatever is wanted then can be cut out of them.
class Hoard {
 public:
  explicit Hoard(ArenaHeap* heap) : heap_(heap) {
    for (size_t bytes = ArenaHeap::BlockBytes(1); bytes <= size_t{4} << 20; bytes *= 2) {
      const size_t count = bytes <= 256 ? 600 : bytes <= (size_t{128} << 10) ? 12 : 3;
      for (size_t i = 0; i < count; ++i) {
        std::byte* const block = heap->Allocate(bytes);
        if (block != nullptr) blocks_.emplace_back(block, bytes);
      }
    }
  }
  void GiveBack() {
    for (const auto& [block, bytes] : blocks_) heap_->Free(block, bytes);
    blocks_.clear();
  }

 private:
  ArenaHeap* heap_;
  std::vector<std::pair<std::byte*, size_t>> blocks_;
};

// How far a run has come without memory.
enum class Stage : uint8_t { kWithoutCodes, kBetweenBatches, kAllLinked };

class ShortMemoryTest : public testing::Test {
 protected:
  // Each is there and is the nearest to itself, and some queries get their ten nearest.
  static void ExpectAllFound(CodedSpaceRig* rig) {
    ASSERT_NO_FATAL_FAILURE(rig->ExpectSound());
    ASSERT_NO_FATAL_FAILURE(rig->ExpectAllThere());
    uint64_t turn = 0;
    std::vector<std::vector<float>> queries;
    for (const auto& [id, vector] : rig->vectors) {
      if (turn++ % 41 != 0) continue;
      queries.push_back(vector);
      const RecallAnswer answer =
          RunRecall(rig->space, &rig->job, vector, {.k = 1, .ef = kWholeEf});
      ASSERT_EQ(answer.reason, RefusalReason::kNone);
      ASSERT_EQ(answer.hits.size(), 1u);
      ASSERT_EQ(answer.hits[0].id, std::to_string(id));
    }
    ASSERT_EQ(rig->Recall(rig->NearestOf(std::move(queries)), kWholeEf), 1.0);
  }
  // Upkeep for as long as something happens, with upserts and deletes between, which may be
  // refused.
  void WorkWithout(CodedSpaceRig* rig, SplitMix64* random, uint64_t* next_id) {
    int idle = 0;
    const WalkCodes* const before = rig->space.walk_codes();
    for (int step = 0; step < 3'000 && idle < 3; ++step) {
      const bool was_encoding = SpaceTestPeer::IsEncoding(rig->space);
      idle = rig->upkeep.Step(20'000) ? 0 : idle + 1;
      const bool is_encoding = SpaceTestPeer::IsEncoding(rig->space);
      const bool has_renewed = rig->space.walk_codes() != before;
      gave_up_encoding_ += static_cast<int>(was_encoding && !is_encoding && !has_renewed);
      if (step % 50 != 7) continue;
      const uint64_t id = (*next_id)++;
      const RefusalReason reason = rig->TryStore(id, LatentVector(id, kDimension));
      ASSERT_TRUE(reason == RefusalReason::kNone || reason == RefusalReason::kMemoryFull);
      const uint64_t gone = random->Below(id);
      if (rig->vectors.contains(gone)) rig->Remove(gone);
      rig->space.SetHorizon(rig->stamp);
      ASSERT_NO_FATAL_FAILURE(rig->ExpectSound());
    }
  }
  static Stage StageOf(const CodedSpaceRig& rig) {
    if (rig.space.unlinked_count() < kWaitForMore) return Stage::kAllLinked;
    return rig.HasCodes() ? Stage::kBetweenBatches : Stage::kWithoutCodes;
  }
  static void ExpectGoesOn(CodedSpaceRig* rig, uint64_t* next_id) {
    for (int i = 0; i < 200; ++i, ++*next_id) {
      ASSERT_NO_FATAL_FAILURE(rig->Store(*next_id, LatentVector(*next_id, kDimension)));
    }
    ASSERT_NO_FATAL_FAILURE(rig->Settle());
    ASSERT_NO_FATAL_FAILURE(ExpectAllFound(rig));
  }

  int gave_up_encoding_ = 0;
};

// What is left grows from nothing, in steps of a half, to what all of it takes.
template <typename Run>
void ForEachShortage(Run&& run) {
  for (size_t left = 0; left <= size_t{24} << 20;
       left += std::max<size_t>(left / (kSanitized ? 1 : 2), 16'384)) {
    SCOPED_TRACE("bytes left: " + std::to_string(left));
    ASSERT_NO_FATAL_FAILURE(run(left));
  }
}

TEST_F(ShortMemoryTest, TheFirstCodesAndBatches) {
  std::map<Stage, int> stages;
  ForEachShortage([&](size_t left) {
    CodedSpaceRig rig(kSetup);
    SplitMix64 random(left + 1);
    uint64_t next_id = 0;
    for (; next_id < 700; ++next_id) {
      ASSERT_NO_FATAL_FAILURE(rig.Store(next_id, LatentVector(next_id, kDimension)));
    }
    Hoard hoard(&rig.memory.heap);
    rig.memory.LeaveOnly(left);
    ASSERT_NO_FATAL_FAILURE(WorkWithout(&rig, &random, &next_id));
    ++stages[StageOf(rig)];
    ASSERT_NO_FATAL_FAILURE(ExpectAllFound(&rig));
    hoard.GiveBack();
    ASSERT_NO_FATAL_FAILURE(ExpectGoesOn(&rig, &next_id));
  });
  EXPECT_GT(stages[Stage::kWithoutCodes], 0);
  EXPECT_GT(stages[Stage::kBetweenBatches], 0);
  EXPECT_GT(stages[Stage::kAllLinked], 0);
}

// Drift is measured, codes are learned anew, every node is encoded again beside its earlier code.
TEST_F(ShortMemoryTest, CodesThatAreLearnedAnew) {
  int kept = 0;
  int renewed = 0;
  ForEachShortage([&](size_t left) {
    CodedSpaceRig rig(kSetup);
    SplitMix64 random(left + 2);
    uint64_t next_id = 0;
    const auto store_until = [&](uint64_t end, float shift) {
      for (; next_id < end; ++next_id) {
        ASSERT_NO_FATAL_FAILURE(rig.Store(next_id, LatentVector(next_id, kDimension, shift)));
      }
    };
    constexpr uint64_t kFirst = 301;
    ASSERT_NO_FATAL_FAILURE(store_until(kFirst, 1));
    ASSERT_NO_FATAL_FAILURE(rig.Settle());
    const WalkCodes* const before = rig.space.walk_codes();
    ASSERT_NE(before, nullptr);
    // Linked before it is time to learn again, so that there is something to encode.
    ASSERT_NO_FATAL_FAILURE(store_until(4 * kFirst - 1, 0));
    ASSERT_NO_FATAL_FAILURE(rig.Settle());
    ASSERT_EQ(rig.space.walk_codes(), before);
    ASSERT_NO_FATAL_FAILURE(store_until(4 * kFirst + 50, 0));
    ASSERT_TRUE(rig.space.WantsCodes());
    Hoard hoard(&rig.memory.heap);
    rig.memory.LeaveOnly(left);
    ASSERT_NO_FATAL_FAILURE(WorkWithout(&rig, &random, &next_id));
    ++(rig.space.walk_codes() == before ? kept : renewed);
    ASSERT_TRUE(rig.HasCodes()) << "earlier ones stay where there is no memory for others";
    ASSERT_NO_FATAL_FAILURE(ExpectAllFound(&rig));
    hoard.GiveBack();
    ASSERT_NO_FATAL_FAILURE(ExpectGoesOn(&rig, &next_id));
  });
  EXPECT_GT(kept, 0);
  EXPECT_GT(gave_up_encoding_, 0);
  EXPECT_GT(renewed, 0);
}

// It does not wait until there are three times as many nodes.
TEST_F(ShortMemoryTest, LearningIsThoughtOfAgainWithAQuarterMore) {
  CodedSpaceRig rig(kSetup);
  SplitMix64 random(3);
  uint64_t next_id = 0;
  for (; next_id < 400; ++next_id) {
    ASSERT_NO_FATAL_FAILURE(rig.Store(next_id, LatentVector(next_id, kDimension)));
  }
  Hoard hoard(&rig.memory.heap);
  rig.memory.LeaveOnly(16'384);
  ASSERT_NO_FATAL_FAILURE(WorkWithout(&rig, &random, &next_id));
  ASSERT_FALSE(rig.HasCodes());
  ASSERT_FALSE(rig.space.WantsCodes());
  hoard.GiveBack();
  const uint64_t end = next_id + rig.space.live() / 4 + 1;
  for (; next_id < end; ++next_id) {
    ASSERT_NO_FATAL_FAILURE(rig.Store(next_id, LatentVector(next_id, kDimension)));
  }
  ASSERT_NO_FATAL_FAILURE(rig.Settle());
  EXPECT_TRUE(rig.HasCodes());
  ASSERT_NO_FATAL_FAILURE(ExpectAllFound(&rig));
}

// A space that is dropped gives everything back, whatever it was about.
TEST_F(ShortMemoryTest, AllIsGivenBackWhereverItEnds) {
  using IsThere = bool (*)(const Space& space, const SpaceUpkeep& upkeep);
  const std::array<IsThere, 4> stages{
      [](const Space& space, const SpaceUpkeep&) { return SpaceTestPeer::IsLearning(space); },
      [](const Space& space, const SpaceUpkeep&) { return SpaceTestPeer::IsEncoding(space); },
      [](const Space& space, const SpaceUpkeep& upkeep) {
        return space.walk_codes() != nullptr && upkeep.linker().active();
      },
      [](const Space& space, const SpaceUpkeep&) { return space.unlinked_count() == 0; }};
  for (const IsThere is_there : stages) {
    for (const int slices : {1, 2}) {
      TestHeap memory(size_t{64} << 20);
      ReaderEpochs epochs{1};
      SpaceOptions options = TestSpaceOptions(Metric::kL2, kDimension, kBuild);
      options.traversal = Traversal::kRabitq;
      options.graph_from = 300;
      {
        Space space("ends", options, &memory.heap, &epochs);
        SpaceUpkeep upkeep(&space, &memory.heap, kBuild);
        for (uint64_t id = 0; id < 400; ++id) {
          const std::string name = std::to_string(id);
          const std::vector<float> vector = LatentVector(id, kDimension);
          ObservationRef observation;
          observation.id = name;
          observation.dtype = VectorDtype::kF32;
          observation.dimension = kDimension;
          observation.vector = reinterpret_cast<const std::byte*>(vector.data());
          ASSERT_EQ(space.Upsert(observation, id + 1).reason, RefusalReason::kNone);
        }
        int there = 0;
        for (int slice = 0; slice < 20'000 && there < slices; ++slice) {
          upkeep.Step(200);
          there += static_cast<int>(is_there(space, upkeep));
        }
        ASSERT_EQ(there, slices);
      }
      EXPECT_EQ(memory.heap.live_bytes(), 0u);
    }
  }
}

}  // namespace
}  // namespace engram
