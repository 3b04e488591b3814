#include "src/health_watch.h"

#include <string>

namespace engram {

void HealthWatch::SeeLog(uint16_t shard, SegmentTrouble trouble, uint64_t errors,
                         uint64_t commits) {
  Log& log = logs_[shard];
  if (errors != log.errors) {
    log.errors = errors;
    log.commits = commits;
    log.writes_fail = true;
  } else if (commits != log.commits) {
    log.writes_fail = false;
  }
  log.without_room.Set(trouble == SegmentTrouble::kDiskFull ? 1 : 0);
  log.failing.Set(trouble == SegmentTrouble::kFailing || log.writes_fail ? 1 : 0);
}

void HealthWatch::SeeCheckpoints(uint64_t completed, uint64_t failed) {
  if (completed != completed_) {
    completed_ = completed;
    failed_before_ = failed;
  }
  checkpoints_failing_.Set(failed - failed_before_);
}

void HealthWatch::AddCounters(CounterCatalogue* catalogue) const {
  for (size_t s = 0; s < logs_.size(); ++s) {
    const std::string shard = "shard" + std::to_string(s);
    catalogue->push_back({shard, kLogWithoutRoom, &logs_[s].without_room});
    catalogue->push_back({shard, kLogFailing, &logs_[s].failing});
  }
  const std::string control(kControlCore);
  catalogue->push_back({control, kCheckpointsFailing, &checkpoints_failing_});
  catalogue->push_back({control, kDamagedPlaces, &damaged_places_});
}

}  // namespace engram
