#include "src/core/clock.h"

#include <gtest/gtest.h>

#include <ctime>

namespace engram {
namespace {

TEST(SystemClockTest, MonotonicNeverGoesBack) {
  SystemClock clock;
  int64_t last_ns = clock.MonotonicNs();
  for (int i = 0; i < 10'000; ++i) {
    const int64_t now_ns = clock.MonotonicNs();
    ASSERT_GE(now_ns, last_ns);
    last_ns = now_ns;
  }
}

// Catches seconds taken for nanoseconds, and the two clocks exchanged.
TEST(SystemClockTest, WallIsNanosecondsSince1970) {
  SystemClock clock;
  const std::time_t before_s = std::time(nullptr);
  const int64_t now_s = clock.WallNs() / kNanosPerSecond;
  const std::time_t after_s = std::time(nullptr);
  // time() may lag behind clock_gettime by a timer tick.
  EXPECT_GE(now_s, before_s);
  EXPECT_LE(now_s, after_s + 1);
}

TEST(SystemClockTest, MonotonicAgreesWithTheKernel) {
  SystemClock clock;
  timespec before{};
  timespec after{};
  clock_gettime(CLOCK_MONOTONIC, &before);
  const int64_t now_ns = clock.MonotonicNs();
  clock_gettime(CLOCK_MONOTONIC, &after);
  EXPECT_GE(now_ns, before.tv_sec * kNanosPerSecond + before.tv_nsec);
  EXPECT_LE(now_ns, after.tv_sec * kNanosPerSecond + after.tv_nsec);
}

TEST(SimulatedClockTest, MovesOnlyWhenStepped) {
  SimulatedClock clock(5);
  EXPECT_EQ(clock.MonotonicNs(), 5);
  EXPECT_EQ(clock.MonotonicNs(), 5);
  const int64_t wall_ns = clock.WallNs();
  clock.AdvanceNs(7);
  EXPECT_EQ(clock.MonotonicNs(), 12);
  EXPECT_EQ(clock.WallNs(), wall_ns + 7);
  clock.AdvanceNs(0);
  EXPECT_EQ(clock.MonotonicNs(), 12);
}

TEST(SimulatedClockDeathTest, RefusesToGoBack) {
  SimulatedClock clock;
  EXPECT_DEATH(clock.AdvanceNs(-1), "time does not go back");
}

}  // namespace
}  // namespace engram
