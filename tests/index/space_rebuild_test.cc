// A space that has all that is in its graph linked anew, while it goes on serving. Random programs
// with rebuilds in them: tests/index/space_programs_test.cc and, with saves,
// space_checkpoint_programs_test.cc; with readers on other threads: space_readers_test.cc.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "index/checkpoint/space_loader.h"
#include "index/checkpoint/space_saver.h"
#include "index/recall_job.h"
#include "index/space.h"
#include "src/core/commit_stamp.h"
#include "src/core/hash.h"
#include "src/core/reader_epochs.h"
#include "tests/index/cloud_vector.h"
#include "tests/index/space_testing.h"
#include "tests/index/space_upkeep.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr HnswBuildParams kBuild{.M = 12, .M0 = 24, .ef_construction = 80};
constexpr uint32_t kDimension = 24;
constexpr uint32_t kGraphFrom = 200;
constexpr uint32_t kEf = 16;
constexpr uint64_t kMost = 100;  // lifted at once
constexpr size_t kQueries = 200;
constexpr uint32_t kVectors = kSanitized ? 900 : 3'000;
constexpr double kNoise = kSanitized ? 0.01 : 0.003;  // of recall@10 from graph to graph

std::vector<float> VectorOf(uint64_t number, uint64_t version) {
  SplitMix64 noise(MixBits(version * 1'000'003 + number));
  const SplitMix64 centre(MixBits(noise.Below(kVectors / 100)));
  return CloudVector(centre, noise, kDimension, 0.7F);
}
std::string IdOf(uint64_t number) { return "id" + std::to_string(number); }

class SpaceRebuildTest : public testing::Test {
 protected:
  void Make(bool ends_by_age = false, const HnswBuildParams& linked_by = kBuild) {
    SpaceOptions options = TestSpaceOptions(Metric::kL2, kDimension, kBuild);
    options.graph_from = kGraphFrom;
    options.ends_by_age = ends_by_age;
    space_.emplace("rebuilt", options, &memory_.heap, &epochs_);
    LinkBy(linked_by);
  }
  void LinkBy(const HnswBuildParams& build) {
    upkeep_.reset();
    upkeep_.emplace(&*space_, &other_memory_.heap, build);
  }
  void Upsert(uint64_t number, uint64_t version = 1) {
    const std::string id = IdOf(number);
    const std::string payload = "payload of " + id + " at " + std::to_string(version);
    const std::vector<float> vector = VectorOf(number, version);
    ObservationRef observation;
    observation.id = id;
    observation.payload = BytesOf(payload);
    observation.dtype = VectorDtype::kF32;
    observation.dimension = kDimension;
    observation.vector = reinterpret_cast<const std::byte*>(vector.data());
    observation.when_ns = static_cast<int64_t>(number);
    observation.confidence = 0.5F;
    ASSERT_EQ(space_->Upsert(observation, ++stamp_).reason, RefusalReason::kNone);
    model_.entries()[id] = {vector, payload, observation.when_ns, 0.5F};
  }
  void Delete(uint64_t number) {
    ASSERT_TRUE(space_->Delete(IdOf(number), ++stamp_, false).existed);
    model_.entries().erase(IdOf(number));
  }
  void Fill(uint64_t count = kVectors) {
    for (uint64_t number = 0; number < count; ++number) {
      ASSERT_NO_FATAL_FAILURE(Upsert(number));
    }
  }
  // Until nothing can be done any more, with nothing that may be asked for of the past.
  void Rest() {
    space_->SetHorizon(space_->latest_stamp());
    upkeep_->Run();
    ASSERT_EQ(space_->unlinked_count(), 0u);
    ASSERT_NO_FATAL_FAILURE(ExpectSound());
  }
  void ExpectSound() {
    const Result<void> sound = space_->CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
  }
  RecallAnswer Recall(const std::vector<float>& query, RecallParams params) {
    RecallAnswer answer = RunRecall(*space_, &job_, query, params);
    EXPECT_EQ(answer.reason, RefusalReason::kNone);
    return answer;
  }
  double RecallAt10() {
    size_t found = 0;
    for (size_t i = 0; i < kQueries; ++i) {
      const std::vector<float> query = VectorOf(i, 0);
      found += model_.CountTrue(Recall(query, {.k = 10, .ef = kEf}).hits, query, 10);
    }
    return static_cast<double>(found) / (10 * kQueries);
  }
  // Some of them, with all that they have, by a recall that looks at everything.
  void ExpectAllThere(uint64_t step = 97) {
    uint64_t number = 0;
    for (const auto& [id, entry] : model_.entries()) {
      if (number++ % step != 0) continue;
      const RecallAnswer answer =
          Recall(entry.vector, {.k = 3, .ef = 2 * kVectors, .with_payload = true});
      ASSERT_NO_FATAL_FAILURE(model_.ExpectExact(answer.hits, entry.vector, 3, true)) << id;
    }
  }
  // Upkeep until `done` says so.
  template <typename Done>
  void StepUntil(Done&& done, uint32_t distances = 200) {
    for (int i = 0; i < 1'000'000 && !done(); ++i) upkeep_->Step(distances);
    ASSERT_TRUE(done());
  }
  TestHeap memory_{size_t{128} << 20};
  TestHeap other_memory_{size_t{64} << 20};
  ReaderEpochs epochs_{1};
  std::optional<Space> space_;
  std::optional<SpaceUpkeep> upkeep_;
  RecallJob job_{&other_memory_.heap};
  SpaceModel model_{Metric::kL2};
  CommitStamp stamp_ = 100;
};

// Links that were badly chosen, by too narrow searches and in a space that was replaced twice. If
// one of them were left, or chosen for the sake of another, it would show.
TEST_F(SpaceRebuildTest, ABadGraphBecomesAsGoodAsANewOne) {
  Make(false, {.M = 12, .M0 = 24, .ef_construction = 2});
  for (uint64_t version : {3u, 2u, 1u}) {
    for (uint64_t number = 0; number < kVectors; ++number) {
      ASSERT_NO_FATAL_FAILURE(Upsert(number, version));
      if (number % 50 == 0 && space_->has_graph()) {
        ASSERT_NO_FATAL_FAILURE(Rest());
      }
    }
  }
  ASSERT_NO_FATAL_FAILURE(Rest());
  const double bad = RecallAt10();
  LinkBy(kBuild);
  space_->BeginRebuild(kMost);
  ASSERT_NO_FATAL_FAILURE(Rest());
  ASSERT_FALSE(space_->is_rebuilding());
  const double rebuilt = RecallAt10();
  Make();
  ASSERT_NO_FATAL_FAILURE(Fill());
  ASSERT_NO_FATAL_FAILURE(Rest());
  const double fresh = RecallAt10();
  RecordProperty("recall_bad_rebuilt_fresh",
                 std::to_string(bad) + " " + std::to_string(rebuilt) + " " + std::to_string(fresh));
  EXPECT_LT(bad, fresh - 0.02) << "nothing is shown";
  EXPECT_GE(rebuilt, fresh - kNoise);
}

TEST_F(SpaceRebuildTest, EachIsLinkedAnewInItsPlaceWithAllThatItHas) {
  Make();
  ASSERT_NO_FATAL_FAILURE(Fill());
  ASSERT_NO_FATAL_FAILURE(Rest());
  std::map<std::string, NodeId> nodes;
  for (const auto& [id, entry] : model_.entries()) {
    nodes[id] = space_->FindLive(id);
  }
  const uint64_t bytes = memory_.heap.live_bytes();
  const uint64_t links = upkeep_->links();
  space_->BeginRebuild(kMost);
  uint64_t most_bytes = 0;
  for (int slice = 0; space_->is_rebuilding(); ++slice) {
    ASSERT_TRUE(upkeep_->Step(300)) << "it waits for nothing";
    most_bytes = std::max(most_bytes, memory_.heap.live_bytes());
    ASSERT_LE(space_->unlinked_count(), kMost);
    ASSERT_LE(space_->lifted(), kMost);
    if (slice % 64 == 0) {
      ASSERT_NO_FATAL_FAILURE(ExpectSound()) << "slice " << slice;
    }
  }
  EXPECT_EQ(space_->rebuild_left(), 0u);
  EXPECT_EQ(space_->relinked(), kVectors);
  EXPECT_EQ(upkeep_->links() - links, kVectors) << "each once";
  EXPECT_EQ(space_->linked(), kVectors);
  EXPECT_EQ(space_->node_count(), kVectors);
  // Places in the list of fresh nodes: two runs of it.
  EXPECT_LE(most_bytes, bytes + 64 * kMost);
  for (const auto& [id, node] : nodes) EXPECT_EQ(space_->FindLive(id), node) << id;
  ASSERT_NO_FATAL_FAILURE(ExpectAllThere(7));
}

// Between any slices, for a recall of usual breadth.
TEST_F(SpaceRebuildTest, RecallsFindAsMuchMeanwhile) {
  Make();
  ASSERT_NO_FATAL_FAILURE(Fill());
  ASSERT_NO_FATAL_FAILURE(Rest());
  const double before = RecallAt10();
  space_->BeginRebuild(kMost);
  size_t found = 0;
  size_t asked = 0;
  while (space_->is_rebuilding()) {
    for (int i = 0; i < 40; ++i) upkeep_->Step(200);
    const std::vector<float> query = VectorOf(asked++ % kQueries, 0);
    const RecallAnswer answer = Recall(query, {.k = 10, .ef = kEf});
    ASSERT_NO_FATAL_FAILURE(model_.ExpectSound(answer.hits, query, false));
    ASSERT_EQ(answer.hits.size(), 10u);
    found += model_.CountTrue(answer.hits, query, 10);
  }
  ASSERT_GT(asked, kVectors / 15) << "too short to say much";
  const double during = static_cast<double>(found) / static_cast<double>(10 * asked);
  RecordProperty("recall_before_during", std::to_string(before) + " " + std::to_string(during));
  EXPECT_GE(during, before - 2 * kNoise);
}

// Updates, deletes, suppresses and what comes newly, at each of its steps.
TEST_F(SpaceRebuildTest, ChangesMeanwhileHoldAndEndIt) {
  Make();
  ASSERT_NO_FATAL_FAILURE(Fill());
  ASSERT_NO_FATAL_FAILURE(Rest());
  space_->BeginRebuild(kMost);
  SplitMix64 random(11);
  std::set<uint64_t> suppressed;
  uint64_t next = kVectors;
  uint64_t ended_lifted = 0;
  while (space_->is_rebuilding()) {
    for (int i = 0; i < 20; ++i) upkeep_->Step(200);
    const uint64_t number = random.Below(kVectors);
    if (suppressed.contains(number) || !model_.entries().contains(IdOf(number))) continue;
    const uint64_t unlinked = space_->unlinked_count();
    switch (random.Below(5)) {
      case 0:
        ASSERT_NO_FATAL_FAILURE(Upsert(number, 5));
        break;
      case 1:
        ASSERT_NO_FATAL_FAILURE(Delete(number));
        ended_lifted += space_->unlinked_count() < unlinked ? 1 : 0;
        break;
      case 2:
        ASSERT_TRUE(space_->Suppress(IdOf(number), ++stamp_, false).existed);
        model_.entries().erase(IdOf(number));
        suppressed.insert(number);
        break;
      default:
        ASSERT_NO_FATAL_FAILURE(Upsert(next++, 6));
        break;
    }
    if (random.Below(4) == 0) space_->SetHorizon(stamp_);
    if (random.Below(50) == 0) {
      ASSERT_NO_FATAL_FAILURE(ExpectSound());
    }
    if (random.Below(200) == 0) {
      ASSERT_NO_FATAL_FAILURE(ExpectAllThere());
    }
  }
  EXPECT_GT(ended_lifted, 0u) << "nothing is shown";
  EXPECT_LT(space_->relinked(), kVectors);
  ASSERT_NO_FATAL_FAILURE(Rest());
  EXPECT_EQ(space_->live(), model_.entries().size());
  EXPECT_EQ(space_->hidden(), suppressed.size());
  for (const uint64_t number : suppressed) {
    ASSERT_TRUE(space_->Restore(IdOf(number), ++stamp_).existed);
  }
  ASSERT_NO_FATAL_FAILURE(Rest());
  EXPECT_EQ(space_->live(), model_.entries().size() + suppressed.size());
}

// The queue by age stays in order; what is on its way out of the graph ends as all else does.
TEST_F(SpaceRebuildTest, WhatIsTooOldEndsMeanwhile) {
  Make(/*ends_by_age=*/true);
  ASSERT_NO_FATAL_FAILURE(Fill());
  ASSERT_NO_FATAL_FAILURE(Rest());
  space_->BeginRebuild(kMost);
  uint64_t ended = 0;
  while (space_->is_rebuilding()) {
    for (int i = 0; i < 30; ++i) upkeep_->Step(200);
    ASSERT_EQ(space_->oldest_content(), 101 + ended) << "in the order in which they came";
    space_->EndOldest(++stamp_);
    model_.entries().erase(IdOf(ended++));
    if (ended % 50 == 0) {
      space_->SetHorizon(stamp_);
      ASSERT_NO_FATAL_FAILURE(ExpectSound());
    }
    // What is left of it would else wait for what the last one has ended.
    if (ended >= kVectors / 2) break;
  }
  ASSERT_NO_FATAL_FAILURE(Rest());
  EXPECT_FALSE(space_->is_rebuilding());
  EXPECT_EQ(space_->live(), kVectors - ended);
  ASSERT_NO_FATAL_FAILURE(ExpectAllThere());
}

// A version that a recall of the past may ask for is found there until it may no longer be asked
// for. Its links are of before, so the rebuild ends with it.
TEST_F(SpaceRebuildTest, ItEndsWhenWhatHadEndedMayGo) {
  Make();
  ASSERT_NO_FATAL_FAILURE(Fill());
  ASSERT_NO_FATAL_FAILURE(Rest());
  const SpaceModel then = model_;
  const CommitStamp snapshot = space_->latest_stamp();
  ASSERT_NO_FATAL_FAILURE(Upsert(7, 9));
  ASSERT_NO_FATAL_FAILURE(Delete(8));
  space_->BeginRebuild(kMost);
  upkeep_->Run();
  EXPECT_EQ(space_->unlinked_count(), 0u);
  EXPECT_TRUE(space_->is_rebuilding());
  EXPECT_EQ(space_->rebuild_left(), 2u);
  EXPECT_TRUE(space_->WaitsForHorizon());
  for (const uint64_t number : {7u, 8u}) {
    const std::vector<float> query = VectorOf(number, 1);
    const RecallAnswer answer =
        Recall(query, {.k = 3, .ef = kVectors, .with_payload = true, .snapshot = snapshot});
    ASSERT_NO_FATAL_FAILURE(then.ExpectExact(answer.hits, query, 3, true));
  }
  ASSERT_NO_FATAL_FAILURE(Rest());
  EXPECT_FALSE(space_->is_rebuilding());
  EXPECT_EQ(space_->retired(), 0u) << "two are too little for a sweep at rest, else";
}

// Who began before the batch was listed must find it in the graph; who began before it had left
// the graph may be on it.
TEST_F(SpaceRebuildTest, ReadersThatAreInsideAreWaitedFor) {
  Make();
  ASSERT_NO_FATAL_FAILURE(Fill());
  ASSERT_NO_FATAL_FAILURE(Rest());
  epochs_.Enter(0);
  space_->BeginRebuild(kMost);
  upkeep_->Run();
  EXPECT_EQ(space_->lifted(), kMost);
  EXPECT_EQ(upkeep_->sweeps(), 0u);
  EXPECT_EQ(space_->rebuild_left(), kVectors);
  ASSERT_NO_FATAL_FAILURE(ExpectSound());
  ASSERT_NO_FATAL_FAILURE(ExpectAllThere());
  epochs_.Leave(0);
  ASSERT_NO_FATAL_FAILURE(StepUntil([&] { return upkeep_->sweep().active(); }, 1));
  epochs_.Enter(0);
  upkeep_->Run();
  EXPECT_EQ(upkeep_->sweeps(), 1u);
  EXPECT_EQ(space_->lifted(), kMost);
  EXPECT_EQ(space_->rebuild_left(), kVectors);
  ASSERT_NO_FATAL_FAILURE(ExpectSound());
  ASSERT_NO_FATAL_FAILURE(ExpectAllThere());
  // What comes meanwhile need not wait.
  ASSERT_NO_FATAL_FAILURE(Upsert(kVectors));
  for (int i = 0; i < 10; ++i) upkeep_->Step(UINT32_MAX);
  EXPECT_EQ(space_->unlinked_count(), kMost);
  epochs_.Leave(0);
  ASSERT_NO_FATAL_FAILURE(Rest());
  EXPECT_FALSE(space_->is_rebuilding());
}

// A check in slices, as an operator has it made of a space that serves, does not take it for
// damage.
TEST_F(SpaceRebuildTest, ACheckMeanwhileFindsNothingWrong) {
  Make();
  ASSERT_NO_FATAL_FAILURE(Fill());
  ASSERT_NO_FATAL_FAILURE(Rest());
  space_->BeginRebuild(kMost);
  SplitMix64 random(5);
  int checks = 0;
  while (space_->is_rebuilding()) {
    Space::CheckState state;
    for (bool more = true; more;) {
      const auto outcome = space_->CheckSlice(1 + random.Below(kVectors / 2), &state);
      ASSERT_TRUE(outcome.has_value()) << outcome.error().message;
      more = *outcome == CheckOutcome::kMore;
      checks += more ? 0 : 1;
      for (uint64_t i = random.Below(400); i > 0; --i) upkeep_->Step(200);
    }
  }
  EXPECT_GT(checks, 3);
}

TEST_F(SpaceRebuildTest, WithoutAGraphThereIsNothingToDo) {
  Make();
  space_->BeginRebuild(kMost);
  upkeep_->Run();
  EXPECT_FALSE(space_->is_rebuilding());
  ASSERT_NO_FATAL_FAILURE(Fill(kGraphFrom));
  ASSERT_FALSE(space_->has_graph());
  space_->BeginRebuild(kMost);
  upkeep_->Run();
  EXPECT_FALSE(space_->is_rebuilding());
  EXPECT_EQ(space_->relinked(), 0u);
  ASSERT_NO_FATAL_FAILURE(ExpectAllThere(1));
}

// It goes on where memory is spent, or waits; nothing is lost, and everything is scanned that is
// not linked.
TEST_F(SpaceRebuildTest, SpentMemoryLosesNothing) {
  Make();
  ASSERT_NO_FATAL_FAILURE(Fill());
  ASSERT_NO_FATAL_FAILURE(Rest());
  space_->BeginRebuild(kMost);
  ASSERT_NO_FATAL_FAILURE(StepUntil([&] { return space_->relinked() >= kVectors / 3; }));
  memory_.LeaveOnly(0);
  std::vector<std::pair<std::byte*, size_t>> taken;
  for (size_t bytes = size_t{1} << 20; bytes >= 16; bytes /= 2) {
    while (std::byte* block = memory_.heap.Allocate(bytes)) taken.emplace_back(block, bytes);
  }
  for (int i = 0; i < 3'000; ++i) upkeep_->Step(200);
  ASSERT_NO_FATAL_FAILURE(ExpectSound());
  ASSERT_NO_FATAL_FAILURE(ExpectAllThere());
  for (const auto& [block, bytes] : taken) memory_.heap.Free(block, bytes);
  ASSERT_NO_FATAL_FAILURE(Rest());
  EXPECT_FALSE(space_->is_rebuilding());
  EXPECT_EQ(space_->relinked(), kVectors);
}

// Links go into a save until their node is swept out; after that it is linked at the load.
TEST_F(SpaceRebuildTest, ASaveHasTheLinksOfWhatIsInTheGraph) {
  Make();
  ASSERT_NO_FATAL_FAILURE(Fill());
  ASSERT_NO_FATAL_FAILURE(Rest());
  const auto linked_after_load = [this] {
    SpaceSaver saver(&other_memory_.heap);
    std::vector<std::byte> buffer(kMaxExtentBytes);
    std::vector<std::byte> bytes;
    EXPECT_TRUE(saver.Begin(&*space_, stamp_));
    while (!saver.done()) {
      const size_t written = saver.Step(buffer, 64);
      bytes.insert(bytes.end(), buffer.begin(), buffer.begin() + static_cast<ptrdiff_t>(written));
    }
    TestHeap memory(size_t{64} << 20);
    SpaceOptions options = TestSpaceOptions(Metric::kL2, kDimension, kBuild);
    options.graph_from = kGraphFrom;
    Space loaded("rebuilt", options, &memory.heap, &epochs_);
    SpaceLoader loader(&loaded);
    EXPECT_TRUE(loader.Take(bytes).has_value() && loader.Finish().has_value());
    EXPECT_EQ(loaded.live(), kVectors);
    return loaded.linked();
  };
  epochs_.Enter(0);
  space_->BeginRebuild(kMost);
  upkeep_->Run();
  ASSERT_EQ(space_->lifted(), kMost);
  EXPECT_EQ(linked_after_load(), kVectors);
  epochs_.Leave(0);
  ASSERT_NO_FATAL_FAILURE(StepUntil([&] { return upkeep_->sweep().active(); }, 1));
  epochs_.Enter(0);
  EXPECT_EQ(linked_after_load(), kVectors) << "as it is swept";
  upkeep_->Run();
  ASSERT_EQ(upkeep_->sweeps(), 1u);
  EXPECT_EQ(linked_after_load(), kVectors - kMost);
  epochs_.Leave(0);
  ASSERT_NO_FATAL_FAILURE(Rest());
}

// What a restart finds of a save that began or ended at any step: everything, and links for most.
TEST_F(SpaceRebuildTest, ASaveInItsMidstHasEverything) {
  Make();
  ASSERT_NO_FATAL_FAILURE(Fill());
  ASSERT_NO_FATAL_FAILURE(Rest());
  const double before = RecallAt10();
  SpaceSaver saver(&other_memory_.heap);
  std::vector<std::byte> buffer(kMaxExtentBytes);
  space_->BeginRebuild(kMost);
  int saves = 0;
  for (; space_->is_rebuilding(); ++saves) {
    for (int i = 0; i < 1 + saves * 7; ++i) upkeep_->Step(200);
    std::vector<std::byte> bytes;
    ASSERT_TRUE(saver.Begin(&*space_, stamp_));
    while (!saver.done()) {
      const size_t written = saver.Step(buffer, 64);
      bytes.insert(bytes.end(), buffer.begin(), buffer.begin() + static_cast<ptrdiff_t>(written));
      for (int i = 0; i < 30; ++i) upkeep_->Step(200);
    }
    TestHeap memory(size_t{64} << 20);
    SpaceOptions options = TestSpaceOptions(Metric::kL2, kDimension, kBuild);
    options.graph_from = kGraphFrom;
    Space loaded("rebuilt", options, &memory.heap, &epochs_);
    SpaceLoader loader(&loaded);
    ASSERT_TRUE(loader.Take(bytes).has_value());
    ASSERT_TRUE(loader.Finish().has_value());
    const Result<void> sound = loaded.CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
    ASSERT_EQ(loaded.live(), kVectors);
    EXPECT_GE(loaded.linked(), kVectors * 3 / 4);
    if (saves % 8 != 0) continue;
    SpaceUpkeep upkeep(&loaded, &memory.heap, kBuild);
    upkeep.Run();
    size_t found = 0;
    for (size_t i = 0; i < kQueries; ++i) {
      const std::vector<float> query = VectorOf(i, 0);
      found +=
          model_.CountTrue(RunRecall(loaded, &job_, query, {.k = 10, .ef = kEf}).hits, query, 10);
    }
    EXPECT_GE(static_cast<double>(found) / (10 * kQueries), before - 0.01) << "save " << saves;
  }
  EXPECT_GT(saves, 5);
}

}  // namespace
}  // namespace engram
