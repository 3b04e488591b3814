#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "index/hnsw_linker.h"
#include "index/hnsw_sweep.h"
#include "index/recall_job.h"
#include "index/space.h"
#include "src/core/commit_stamp.h"
#include "src/core/hash.h"
#include "src/core/reader_epochs.h"
#include "tests/index/space_testing.h"

// One space with its model beside it.

namespace engram {

// A light graph: these tests are about what is in it, not about how good it is.
inline constexpr HnswBuildParams kLightBuild{.M = 8, .M0 = 16, .ef_construction = 40};

// Stores an observation of one number, of which nothing else matters.
inline StoreOutcome UpsertNumber(Space* space, const std::string& id, float number,
                                 CommitStamp stamp, bool several_homes = false) {
  ObservationRef observation;
  observation.id = id;
  observation.dtype = VectorDtype::kF32;
  observation.dimension = 1;
  observation.vector = reinterpret_cast<const std::byte*>(&number);
  return space->Upsert(observation, stamp, several_homes);
}

// A space beside its model. Linker and recall take their memory from elsewhere, so that the heap's
// books are the space's.
class SpaceRig {
 public:
  SpaceRig(Metric metric, uint32_t dimension, size_t arena_bytes)
      : SpaceRig(TestSpaceOptions(metric, dimension, kLightBuild, 77), arena_bytes) {}
  SpaceRig(const SpaceOptions& options, size_t arena_bytes)
      : memory(arena_bytes),
        other_memory(size_t{64} << 20),
        space(std::make_unique<Space>("rig", options, &memory.heap, &epochs)),
        model(options.metric),
        linker(&other_memory.heap, kLightBuild),
        sweep(&other_memory.heap, kLightBuild),
        job(&other_memory.heap) {}

  RefusalReason Upsert(const std::string& id, VectorDtype dtype, const std::vector<float>& vector,
                       const std::string& payload = "", int64_t when_ns = 1,
                       float confidence = 0.5F) {
    const std::vector<std::byte> bytes = EncodeVector(dtype, vector);
    const bool was_there = model.entries().contains(id);
    const auto [reason, existed, later, node] =
        space->Upsert({.id = id,
                       .payload = BytesOf(payload),
                       .payload_kind = PayloadKind::kOpaque,
                       .dtype = dtype,
                       .dimension = static_cast<uint32_t>(vector.size()),
                       .scale = kQuarterScale,
                       .vector = bytes.data(),
                       .when_ns = when_ns,
                       .confidence = confidence},
                      ++stamp);
    space->SetHorizon(stamp - std::min(stamp, keep));
    if (reason == RefusalReason::kNone) {
      EXPECT_EQ(existed, was_there) << id;
      model.entries()[id] = {vector, payload, when_ns, confidence};
    }
    return reason;
  }
  // As many, each with its number behind `prefix` as its id and as its vector.
  void StoreNumbers(const std::string& prefix, int count) {
    for (int i = 0; i < count; ++i) {
      ASSERT_EQ(Upsert(prefix + std::to_string(i), VectorDtype::kF32, {static_cast<float>(i)}),
                RefusalReason::kNone);
    }
  }
  bool Delete(const std::string& id) {
    const bool was_there = model.entries().erase(id) > 0;
    EXPECT_EQ(space->Delete(id, ++stamp, false).existed, was_there) << id;
    space->SetHorizon(stamp - std::min(stamp, keep));
    return was_there;
  }

  // One slice of upkeep, as the shard does it; begins the next node or sweep where none is under
  // way. False when there is nothing to do.
  bool Link(uint32_t distances) {
    if (!linker.active() && !sweep.active()) space->Reclaim(64);
    if (!linker.active() && !sweep.active() && space->WantsSweep()) space->BeginSweep(&sweep);
    if (sweep.active() && (sweep.repairing_tree() || !linker.active())) {
      if (sweep.Step(distances)) space->FinishSweep(sweep);
      return true;
    }
    if (!linker.active()) {
      const NodeId node = space->NextToLink();
      if (node == kNoNode || !space->BeginLinking(&linker, node)) return false;
    }
    if (linker.Step(distances)) space->FinishLinking(linker.node());
    return true;
  }
  void LinkAll() {
    while (Link(UINT32_MAX)) {
    }
  }
  // Id of the live node that is being linked; empty when there is none.
  std::string LinkingId() const {
    if (!linker.active()) return "";
    const std::string id(space->Get(linker.node()).id);
    return space->FindLive(id) == linker.node() ? id : "";
  }

  RecallAnswer Recall(const std::vector<float>& query, const RecallParams& params) {
    return RunRecall(*space, &job, query, params);
  }
  void ExpectExactRecall(const std::vector<float>& query, uint32_t k, VectorDtype dtype) {
    const RecallAnswer answer = Recall(query, {.k = k, .with_payload = true, .dtype = dtype});
    ASSERT_EQ(answer.reason, RefusalReason::kNone);
    ASSERT_NO_FATAL_FAILURE(model.ExpectExact(answer.hits, query, k, true));
  }
  void ExpectSound() const {
    const Result<void> sound = space->CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
    ASSERT_EQ(space->live(), model.entries().size());
    ASSERT_EQ(space->linked() + space->unlinked_count(), space->live());
    ASSERT_EQ(space->resident_bytes() + taken_by_others, memory.heap.live_bytes());
  }
  // Of the only id, which UpsertNumber stores: its number at a snapshot, or now; -1: it is not
  // there.
  float NumberAt(CommitStamp snapshot) {
    const RecallAnswer answer = Recall({0}, {.k = 5, .with_vector = true, .snapshot = snapshot});
    EXPECT_LE(answer.hits.size(), 1u);
    return answer.hits.empty() ? -1.0F : answer.hits[0].vector[0];
  }
  std::string AnyId(SplitMix64* random) const {
    return std::next(model.entries().begin(),
                     static_cast<ptrdiff_t>(random->Below(model.entries().size())))
        ->first;
  }

  size_t taken_by_others = 0;  // of the heap
  TestHeap memory;
  TestHeap other_memory;
  ReaderEpochs epochs{1};
  std::unique_ptr<Space> space;
  SpaceModel model;
  HnswLinker linker;
  HnswSweep sweep;
  RecallJob job;
  CommitStamp stamp = 1'000;
  CommitStamp keep = 0;  // of the past, for snapshots
};

inline std::string RandomId(SplitMix64* random, uint64_t ids) {
  const uint64_t number = random->Below(ids);
  std::string id = "id" + std::to_string(number);
  if (number % 17 == 0) id.resize(kMaxIdBytes, 'x');
  if (number % 19 == 0) id[0] = '\0';
  return id;
}

inline VectorDtype RandomDtype(SplitMix64* random) {
  return static_cast<VectorDtype>(1 + random->Below(4));
}

inline std::string RandomPayload(SplitMix64* random) {
  const uint64_t kind = random->Below(10);
  return std::string(kind < 3   ? 0
                     : kind < 9 ? random->Below(60)
                                : random->Below(3'000),
                     static_cast<char>('a' + random->Below(26)));
}

// One id with one number, in stamps of the test's choice.
class OneId {
 public:
  explicit OneId(bool several_homes = true)
      : rig_(Metric::kL2, 1, size_t{8} << 20), several_homes_(several_homes) {}
  StoreOutcome Upsert(float value, CommitStamp stamp) {
    return Checked(UpsertNumber(rig_.space.get(), "a", value, stamp, several_homes_));
  }
  StoreOutcome Delete(CommitStamp stamp) {
    return Checked(rig_.space->Delete("a", stamp, several_homes_));
  }
  StoreOutcome Yield(CommitStamp stamp) { return Checked(rig_.space->Yield("a", stamp)); }
  StoreOutcome Suppress(CommitStamp stamp) {
    return Checked(rig_.space->Suppress("a", stamp, several_homes_));
  }
  StoreOutcome Restore(CommitStamp stamp) { return Checked(rig_.space->Restore("a", stamp)); }
  // The values from each of these stamps on, -1 for none; and now the last one.
  void ExpectLives(const std::map<CommitStamp, float>& lives) {
    for (auto from = lives.begin(); from != lives.end(); ++from) {
      EXPECT_EQ(rig_.NumberAt(from->first), from->second) << from->first;
      const auto next = std::next(from);
      if (next != lives.end()) {
        EXPECT_EQ(rig_.NumberAt(next->first - 1), from->second) << next->first - 1;
      }
    }
    EXPECT_EQ(rig_.NumberAt(kNoStamp), lives.rbegin()->second) << "now";
    EXPECT_EQ(rig_.space->FindLive("a") != kNoNode, lives.rbegin()->second != -1);
  }

 private:
  StoreOutcome Checked(StoreOutcome outcome) {
    EXPECT_EQ(outcome.reason, RefusalReason::kNone);
    const Result<void> sound = rig_.space->CheckInvariants();
    EXPECT_TRUE(sound.has_value()) << sound.error().message;
    return outcome;
  }

  SpaceRig rig_;
  const bool several_homes_;
};

inline void ExpectDid(const StoreOutcome& outcome, bool existed, CommitStamp later = kNoStamp) {
  EXPECT_EQ(outcome.existed, existed);
  EXPECT_EQ(outcome.later, later);
}

}  // namespace engram
