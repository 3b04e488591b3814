#include "index/learning_schedule.h"

#include <gtest/gtest.h>

#include <cstdint>

namespace engram {
namespace {

constexpr uint64_t kLive = 8'000;

TEST(LearningScheduleTest, BeginsAtOnceAndAgainWithThreeTimesAsMany) {
  LearningSchedule when;
  EXPECT_TRUE(when.IsTime(0));
  when.Begin(10'000, kLive, 4'096);
  when.End(10'000, kLive, true);
  EXPECT_FALSE(when.IsTime(33'999));
  EXPECT_TRUE(when.IsTime(34'000));
  when.Begin(34'000, 10, 4'096);
  EXPECT_FALSE(when.IsTime(34'000 + 4'095));
  EXPECT_TRUE(when.IsTime(34'000 + 4'096)) << "however few live";
  EXPECT_EQ(when.begun(), 2u);
}

TEST(LearningScheduleTest, WithoutMemoryItIsThoughtOfAgainWithAQuarterMore) {
  LearningSchedule when;
  when.Begin(10'000, kLive, 4'096);
  when.Fail(10'000, kLive);
  EXPECT_FALSE(when.IsTime(11'999));
  EXPECT_TRUE(when.IsTime(12'000));
  // Never at once, or nothing would ever be linked.
  when.Begin(12'000, 0, 0);
  when.Fail(12'000, 0);
  EXPECT_FALSE(when.IsTime(12'000));
  EXPECT_TRUE(when.IsTime(12'001));
}

TEST(LearningScheduleTest, ADoubtIsHeardAtOnce) {
  LearningSchedule when;
  when.Begin(10'000, kLive, 4'096);
  when.End(10'000, kLive, true);
  EXPECT_TRUE(when.Doubt(10'100));
  EXPECT_TRUE(when.is_doubted());
  EXPECT_TRUE(when.IsTime(10'100));
  when.Begin(10'100, kLive, 4'096);
  EXPECT_TRUE(when.is_doubted()) << "until it ends";
  when.End(10'100, kLive, true);
  EXPECT_FALSE(when.is_doubted());
  EXPECT_FALSE(when.IsTime(10'100 + 3 * kLive - 1));
}

// Each learning that shows nothing lets twice as much go by until the next.
TEST(LearningScheduleTest, DoubtsThatWereWrongAreHeardEverLater) {
  LearningSchedule when;
  uint64_t taken = 10'000;
  when.Begin(taken, kLive, 4'096);
  uint64_t before = 0;
  for (int doubt = 0; doubt < 20; ++doubt) {
    uint64_t waited = 0;
    while (!when.Doubt(taken + waited)) waited += kLive / 8;
    if (doubt > 0) {
      EXPECT_EQ(waited, doubt == 1 ? kLive / 4 : 2 * before);
    }
    before = waited;
    taken += waited;
    when.Begin(taken, kLive, 4'096);
    when.End(taken, kLive, false);
  }
  // What comes in time anyway does not wait for it.
  when.Begin(taken, kLive, 4'096);
  EXPECT_TRUE(when.IsTime(taken + 3 * kLive));
  // One that was right makes the next one heard soon.
  while (!when.Doubt(taken)) taken += kLive;
  when.Begin(taken, kLive, 4'096);
  when.End(taken, kLive, true);
  EXPECT_FALSE(when.Doubt(taken + kLive / 8 - 1));
  EXPECT_TRUE(when.Doubt(taken + kLive / 8));
}

TEST(LearningScheduleTest, WhatWasNotDoubtedSaysNothingOfDoubts) {
  LearningSchedule when;
  for (uint64_t taken = 0; taken < 100'000; taken += 10'000) {
    when.Begin(taken, kLive, 4'096);
    when.End(taken, kLive, false);
  }
  EXPECT_TRUE(when.Doubt(90'000));
}

}  // namespace
}  // namespace engram
