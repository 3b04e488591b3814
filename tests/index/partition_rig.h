#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tests/index/shard_rig.h"

// What the tests of spaces of several partitions share.

namespace engram::partitions {

inline constexpr RefusalReason kNone = RefusalReason::kNone;
inline constexpr uint16_t kShards = 8;
inline constexpr size_t kNoShard = SIZE_MAX;
inline const std::string kSpace = "s";

inline Observation Upsert(const std::string& id, float x = 1, std::string payload = "") {
  return {.id = id, .vector = {x, 1}, .payload = std::move(payload)};
}
inline Observation Remove(const std::string& id) {
  return {.op = ObservationOp::kDelete, .id = id};
}
inline Observation Suppress(const std::string& id) {
  return {.op = ObservationOp::kSuppress, .id = id};
}
inline Observation Restore(const std::string& id) {
  return {.op = ObservationOp::kRestore, .id = id};
}
inline std::string IdAt(uint64_t i) { return "id" + std::to_string(i); }

inline ShardOptions Options(uint64_t grow_partition_at = 0, uint32_t max_forwards = 256) {
  ShardOptions options = ShardRig::SmallOptions();
  options.memory_limit_bytes = size_t{64} << 20;
  options.grow_partition_at = grow_partition_at;
  options.max_forwards = max_forwards;
  return options;
}

// Eight shards with one space of several partitions.
class PartitionRig : public ShardRig {
 public:
  explicit PartitionRig(uint16_t partitions, const ShardOptions& options = Options(),
                        uint16_t max_partitions = kShards, uint16_t producers = 1)
      : ShardRig(options, producers, 256, 16,
                 {.shards = kShards,
                  .partitions = partitions,
                  .max_partitions = max_partitions,
                  .peer_capacity = 4}) {
    MakeSpace(kSpace, Metric::kL2);
  }
  SpaceEntry& space() { return *entry(kSpace); }
  size_t OwnerOf(const std::string& id) {
    return space().ShardOf(PartitionOf(SpaceCatalogue::HashOfId(id), space().partitions())).value();
  }
  size_t ShardOfPartition(uint16_t partition) { return space().ShardOf(partition).value(); }
  // The i-th id that `shard` owns, or that some other one owns.
  std::string IdOwnedBy(size_t owner, int nth = 0) {
    for (uint64_t i = 0;; ++i) {
      if (OwnerOf(IdAt(i)) == owner && nth-- == 0) return IdAt(i);
    }
  }
  // An id of the partition once there are `partitions`.
  static std::string IdOfPartition(uint16_t partition, uint16_t partitions) {
    for (uint64_t i = 0;; ++i) {
      const uint64_t hash = SpaceCatalogue::HashOfId(IdAt(i));
      if (PartitionOf(hash, partitions) == partition) return IdAt(i);
    }
  }
  RigSession OpenAt(size_t home, size_t producer = 0, SessionId session = {}) {
    return Open(producer, /*origin=*/100 + producer, kSpace, {.session = session, .shard = home});
  }
  static RigSession AloneAt(size_t home) {
    RigSession nobody;
    nobody.shard = home;
    nobody.space = kSpace;
    nobody.origin = 1;
    return nobody;
  }
  // Every live version of `id`, by shard.
  std::map<size_t, StoredObservation> LiveOf(const std::string& id) {
    std::map<size_t, StoredObservation> found;
    for (size_t s = 0; s < kShards; ++s) {
      const Space* part = shards[s]->FindSpace(kSpace);
      if (part == nullptr) continue;
      if (const NodeId node = part->FindLive(id); node != kNoNode) found[s] = part->Get(node);
    }
    return found;
  }
  // The one shard that holds it; kNoShard: none or several.
  size_t HolderOf(const std::string& id) {
    const auto found = LiveOf(id);
    return found.size() == 1 ? found.begin()->first : kNoShard;
  }
  uint64_t CountHidden() {
    uint64_t count = 0;
    for (const auto& each : shards) {
      const Space* part = each->FindSpace(kSpace);
      if (part != nullptr) count += part->hidden();
    }
    return count;
  }
  // Without a session, from the shard `home`; whether there was one.
  bool Existed(size_t home, const Observation& observation) {
    const auto [completion, request] = ObserveAlone(AloneAt(home), observation);
    EXPECT_EQ(completion.reason, kNone);
    return request.existed;
  }
  std::string PayloadOf(const std::string& id) {
    const auto found = LiveOf(id);
    if (found.size() != 1) return "held " + std::to_string(found.size()) + " times";
    const auto payload = found.begin()->second.payload;
    return {reinterpret_cast<const char*>(payload.data()), payload.size()};
  }
  void ExpectSound() {
    for (const auto& each : shards) {
      const Result<void> sound = each->CheckInvariants();
      EXPECT_TRUE(sound.has_value()) << (sound ? "" : sound.error().message);
    }
  }
  // Once all is settled nothing is kept of what was superseded.
  void ExpectNothingLeft() {
    Settle();
    clock.AdvanceNs(10 * kNanosPerMilli);  // Past all that was stamped ahead of a clock set back.
    Settle();
    ExpectSound();
    for (const auto& each : shards) {
      EXPECT_EQ(each->counter(ShardCounter::kForwardsUnderWay).Read(), 0u);
      const Space* part = each->FindSpace(kSpace);
      if (part != nullptr) {
        EXPECT_FALSE(part->has_tombstones());
      }
    }
    for (size_t p = 0; p < 1; ++p) EXPECT_EQ(outstanding(p), 0u);
  }
  std::vector<uint64_t> AnsweredSequences() {
    std::vector<uint64_t> sequences;
    for (const auto& [producer, completion] : completions) {
      if (completion.kind == CompletionKind::kObserve) sequences.push_back(completion.sequence);
    }
    return sequences;
  }
  void PollAllBut(size_t which, int rounds = 8) {
    for (int i = 0; i < rounds; ++i) {
      clock.AdvanceNs(10'000);
      for (size_t s = 0; s < kShards; ++s) {
        if (s != which) PollShard(s);
      }
    }
  }
};

}  // namespace engram::partitions
