#include "src/health_watch.h"

#include <gtest/gtest.h>

#include <string_view>

namespace engram {
namespace {

class HealthWatchTest : public testing::Test {
 protected:
  HealthWatchTest() { watch_.AddCounters(&counters_); }
  uint64_t Told(std::string_view core, std::string_view name) const {
    for (const CounterView& each : counters_) {
      if (each.core == core && each.name == name) return each.counter->Read();
    }
    return UINT64_MAX;
  }

  HealthWatch watch_{2};
  CounterCatalogue counters_;
};

TEST_F(HealthWatchTest, ALogsTroubleIsItsOwnAndEnds) {
  watch_.SeeLog(1, SegmentTrouble::kDiskFull, 0, 0);
  EXPECT_EQ(Told("shard1", kLogWithoutRoom), 1u);
  EXPECT_EQ(Told("shard1", kLogFailing), 0u);
  EXPECT_EQ(Told("shard0", kLogWithoutRoom), 0u);
  watch_.SeeLog(1, SegmentTrouble::kFailing, 0, 0);
  EXPECT_EQ(Told("shard1", kLogWithoutRoom), 0u);
  EXPECT_EQ(Told("shard1", kLogFailing), 1u);
  watch_.SeeLog(1, SegmentTrouble::kNone, 0, 0);
  EXPECT_EQ(Told("shard1", kLogFailing), 0u);
}

TEST_F(HealthWatchTest, WritesFailUntilTheNextCommit) {
  watch_.SeeLog(0, SegmentTrouble::kNone, 0, 7);
  EXPECT_EQ(Told("shard0", kLogFailing), 0u);
  watch_.SeeLog(0, SegmentTrouble::kNone, 1, 9);
  EXPECT_EQ(Told("shard0", kLogFailing), 1u);
  watch_.SeeLog(0, SegmentTrouble::kNone, 1, 9);
  EXPECT_EQ(Told("shard0", kLogFailing), 1u) << "nothing has been written since";
  watch_.SeeLog(0, SegmentTrouble::kNone, 2, 10);
  EXPECT_EQ(Told("shard0", kLogFailing), 1u) << "one came through and one did not";
  watch_.SeeLog(0, SegmentTrouble::kNone, 2, 11);
  EXPECT_EQ(Told("shard0", kLogFailing), 0u);
}

TEST_F(HealthWatchTest, CheckpointsFailUntilAGoodOne) {
  watch_.SeeCheckpoints(3, 0);
  EXPECT_EQ(Told(kControlCore, kCheckpointsFailing), 0u);
  watch_.SeeCheckpoints(3, 2);
  EXPECT_EQ(Told(kControlCore, kCheckpointsFailing), 2u);
  watch_.SeeCheckpoints(4, 2);
  EXPECT_EQ(Told(kControlCore, kCheckpointsFailing), 0u);
  watch_.SeeCheckpoints(4, 3);
  EXPECT_EQ(Told(kControlCore, kCheckpointsFailing), 1u);
}

TEST_F(HealthWatchTest, DamagedPlacesAreCounted) {
  watch_.SeeDamagedPlace();
  watch_.SeeDamagedPlace();
  EXPECT_EQ(Told(kControlCore, kDamagedPlaces), 2u);
}

}  // namespace
}  // namespace engram
