#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "src/core/log_files.h"
#include "src/core/space_catalogue.h"
#include "tests/sim/durable_rig.h"

// Rounds of checkpoints, and the recoveries from them, that a test steps itself.

namespace engram {

// One space on a machine that a test steps itself.
class CheckpointSteps : public testing::Test {
 protected:
  explicit CheckpointSteps(uint16_t shards = 1) : rig_(7) {
    setup_ = DurableRig::SmallSetup();
    setup_.shards = shards;
    setup_.max_partitions = shards;
    setup_.checkpointer.retention.free_after_ns = kNanosPerMilli;
    setup_.checkpointer.retention.rewrite_bytes_per_second = uint64_t{1} << 30;
    SpaceSettings settings;
    settings.metric = Metric::kL2;
    settings.durability = Durability::kFsync;
    settings.partitions = shards;
    setup_.spaces = {{"space", settings}};
  }

  // Why it does not start; empty: it does.
  std::string Start() {
    if (auto started = rig_.Start(setup_); !started) return started.error().message;
    return rig_.Recover();
  }
  std::string StartAgain() {
    rig_.Kill();
    return Start();
  }
  void Poll() {
    rig_.shards->Poll();
    rig_.store->Poll();
  }
  void PollCheckpointer() {
    rig_.checkpointer->Poll([this](const Note& note) { notes_.push_back(note.text); });
  }
  // Whether it succeeds.
  bool Checkpoint() {
    rig_.checkpointer->Request();
    return EndCheckpoint();
  }
  // Nothing is forgotten from here on, and whatever comes is replayed.
  void BeginCheckpoint() {
    rig_.checkpointer->Request();
    PollCheckpointer();
    Poll();
    for (uint16_t s = 0; s < setup_.shards; ++s) {
      ASSERT_EQ(rig_.store->checkpoint(s).noted.load(), rig_.store->checkpoint(s).note.load());
      ASSERT_GT(rig_.store->checkpoint(s).noted.load(), rig_.store->checkpoint(s).ended.load());
    }
  }
  bool EndCheckpoint() {
    const uint64_t before = rig_.checkpointer->completed();
    for (int i = 0; i < 100'000 && rig_.checkpointer->busy(); ++i) {
      Poll();
      PollCheckpointer();
    }
    return rig_.checkpointer->completed() > before;
  }
  // Nothing is taken over and nothing waits to be freed any more, but for who reads.
  void Settle() {
    for (int i = 0; i < 5'000; ++i) {
      Poll();
      PollCheckpointer();
    }
    EXPECT_FALSE(rig_.checkpointer->retention().is_taking_over());
  }
  StoredObservation Stored(const std::string& id) const {
    for (const auto& shard : rig_.shards->shards) {
      const Space* part = shard->FindSpace("space");
      const NodeId node = part == nullptr ? kNoNode : part->FindLive(id);
      if (node != kNoNode) return part->Get(node);
    }
    return {};
  }
  bool IsThere(LogSegment segment) {
    return rig_.medium.ContentOf(LogFolder(segment.log), SegmentName(segment.number)).has_value();
  }
  // `id` alone lives in its segment, which is not replayed any more; `other` has filled the rest.
  LogSegment LeaveAlone(const std::string& id, const std::string& other) {
    Store(id, "payload of " + id);
    for (int i = 0; i < 20; ++i) Store(other, std::to_string(i) + std::string(30'000, 'x'));
    EXPECT_TRUE(Checkpoint());
    Settle();
    return SegmentAt(Stored(id).origin);
  }
  RigSession Alone(size_t shard) const {
    RigSession nobody;
    nobody.origin = 1;
    nobody.space = "space";
    nobody.shard = shard;
    return nobody;
  }
  static Observation Upsert(const std::string& id, const std::string& payload) {
    return {.op = ObservationOp::kUpsert, .id = id, .vector = {1, 2, 3, 4}, .payload = payload};
  }
  // Until it is taken.
  void Store(const std::string& id, const std::string& payload, size_t shard = 0) {
    for (int i = 0; i < 1'000; ++i) {
      const auto [completion, request] =
          rig_.shards->ObserveAlone(Alone(shard), Upsert(id, payload));
      if (completion.reason == RefusalReason::kNone) return;
      for (int n = 0; n < 20; ++n) Poll();
    }
    ADD_FAILURE() << id << " is not taken";
  }
  std::string PayloadOf(const std::string& id) const {
    for (const auto& shard : rig_.shards->shards) {
      const Space* part = shard->FindSpace("space");
      const NodeId node = part == nullptr ? kNoNode : part->FindLive(id);
      if (node == kNoNode) continue;
      return rig_.PayloadOf(part->Get(node)).value_or("unreadable");
    }
    return "";
  }
  size_t CountSegments(uint16_t log) {
    const auto disk = rig_.medium.Open(LogFolder(log));
    return static_cast<size_t>(std::ranges::count_if(
        *disk->List(), [](const auto& entry) { return SegmentNumber(entry.name).has_value(); }));
  }

  DurableRig rig_;
  DurableSetup setup_;
  std::vector<std::string> notes_;
};

class TwoShardSteps : public CheckpointSteps {
 protected:
  TwoShardSteps() : CheckpointSteps(2) {}
  // An id that the shard owns.
  std::string IdOf(uint16_t shard) {
    for (int i = 0;; ++i) {
      const std::string id = "id" + std::to_string(i);
      const SpaceEntry& entry = *rig_.shards->entry("space");
      const uint16_t partition = PartitionOf(SpaceCatalogue::HashOfId(id), 2);
      if (entry.ShardOf(partition) == ShardId(shard)) return id;
    }
  }
};

}  // namespace engram
