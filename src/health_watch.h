#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "index/log/segment_handoff.h"
#include "src/core/counters.h"

namespace engram {

// By shard: 1 while its log has no room for its next segment, or while its disk fails.
inline constexpr std::string_view kLogWithoutRoom = "log_without_room";
inline constexpr std::string_view kLogFailing = "log_failing";
// Of the core kControlCore: rounds that have failed since the last good one, and places of the logs
// that recalls or checkpoints have found damaged since the start.
inline constexpr std::string_view kControlCore = "control";
inline constexpr std::string_view kCheckpointsFailing = "checkpoints_failing";
inline constexpr std::string_view kDamagedPlaces = "damaged_places";

// What is wrong with the appliance as a whole, as counters: whoever tells its health reads these.
//
// Thread safety: the control plane's alone, but for the counters, which anyone may read.
class HealthWatch {
 public:
  explicit HealthWatch(uint16_t shards) : logs_(shards) {}
  HealthWatch(const HealthWatch&) = delete;
  HealthWatch& operator=(const HealthWatch&) = delete;

  // How a shard's log is: `errors` of its disk, and `commits`, since the start. What has failed is
  // written again, so it fails from an error until the next commit.
  void SeeLog(uint16_t shard, SegmentTrouble trouble, uint64_t errors, uint64_t commits);
  // Rounds since the start.
  void SeeCheckpoints(uint64_t completed, uint64_t failed);
  void SeeDamagedPlace() { damaged_places_.Add(1); }
  void AddCounters(CounterCatalogue* catalogue) const;

 private:
  struct Log {
    Counter without_room;
    Counter failing;
    bool writes_fail = false;
    uint64_t errors = 0;
    uint64_t commits = 0;  // when the last error was seen
  };
  std::vector<Log> logs_;  // by shard
  Counter checkpoints_failing_;
  Counter damaged_places_;
  uint64_t completed_ = 0;
  uint64_t failed_before_ = 0;  // when the last good one was seen
};

}  // namespace engram
