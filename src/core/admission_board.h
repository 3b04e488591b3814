#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "src/core/ids.h"
#include "src/core/seqlock.h"

namespace engram {

// How much of what it can take a shard, or all of them together, has before it (WIRE.md). Each is
// entered at its threshold and left below half of the capacity only, so that it does not flap.
enum class LoadState : uint8_t {
  kNormal,
  kGrowing,       // from 50 % on: batches grow
  kBackpressure,  // from 80 % on: clients that want to know are told
  kOverloaded,    // from 90 % on: what comes beyond a fair share is refused
};

// What admission allows, as the controller published it last.
struct AdmissionLimits {
  LoadState state = LoadState::kNormal;
  float pressure = 0;           // the part of the capacity that is taken, 0 to 1
  uint32_t queue_depth = 0;     // observations that wait for the shard or in it
  uint32_t queue_capacity = 0;  // of these, what it settles in time
  uint32_t retry_after_ms = 1;  // until half of the capacity is free, at the rate of late
  uint32_t batch = 0;           // observations that a shard takes at once
  float settled_per_second = 0;
};

// Where the controller publishes limits and cores read them, without waiting for each other.
//
// Thread safety: one writer; any number of readers.
class AdmissionBoard {
 public:
  explicit AdmissionBoard(uint16_t shards)
      : shards_(shards),
        limits_(std::make_unique<Seqlock<AdmissionLimits>[]>(size_t{shards} + 1)) {}

  void Publish(ShardId shard, const AdmissionLimits& limits) {
    limits_[shard.value()].Store(limits);
  }
  void PublishGlobal(const AdmissionLimits& limits) { limits_[shards_].Store(limits); }
  AdmissionLimits Read(ShardId shard) const { return limits_[shard.value()].Load(); }
  AdmissionLimits ReadGlobal() const { return limits_[shards_].Load(); }

  uint16_t shards() const { return shards_; }

 private:
  const uint16_t shards_;
  const std::unique_ptr<Seqlock<AdmissionLimits>[]> limits_;  // by shard, then that of all
};

}  // namespace engram
