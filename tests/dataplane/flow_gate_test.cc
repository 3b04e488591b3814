#include "dataplane/flow_gate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "src/core/clock.h"
#include "src/core/hash.h"

namespace engram {
namespace {

constexpr int64_t kNow = 5 * kNanosPerSecond;

// Takes it all as long as it may; how many frames that were.
int SendAll(FlowGate* gate, int64_t now_ns, int most = 1'000'000) {
  int sent = 0;
  for (; sent < most && gate->MaySend(now_ns); ++sent) gate->NoteSent(now_ns);
  return sent;
}
void Say(FlowGate* gate, FlowAction action, float rate = 0, int32_t buffer = 0) {
  gate->Take({.action = action, .buffer_remaining = buffer, .preferred_rate = rate}, kNow);
}

TEST(FlowGateTest, WhoSaysNothingGetsEverything) {
  FlowGate gate;
  EXPECT_FALSE(gate.is_paused());
  EXPECT_FALSE(gate.HoldsLong(kNow));
  EXPECT_EQ(gate.rate(), 0);
  EXPECT_EQ(SendAll(&gate, 0), 1'000'000);
}

TEST(FlowGateTest, PauseAndResume) {
  FlowGate gate;
  Say(&gate, FlowAction::kPause);
  Say(&gate, FlowAction::kPause);
  EXPECT_TRUE(gate.is_paused());
  EXPECT_TRUE(gate.HoldsLong(kNow));
  EXPECT_EQ(SendAll(&gate, INT64_MAX), 0);
  Say(&gate, FlowAction::kSpeedUp);
  EXPECT_TRUE(gate.is_paused()) << "only resume ends a pause";
  Say(&gate, FlowAction::kResume);
  EXPECT_FALSE(gate.is_paused());
  EXPECT_EQ(SendAll(&gate, kNow), 1'000'000);
}

TEST(FlowGateTest, ABufferTakesSoManyUntilTheNextWord) {
  FlowGate gate;
  Say(&gate, FlowAction::kBufferStatus, 0, 3);
  EXPECT_FALSE(gate.HoldsLong(kNow));
  EXPECT_EQ(SendAll(&gate, kNow), 3);
  EXPECT_TRUE(gate.HoldsLong(kNow));
  Say(&gate, FlowAction::kBufferStatus, 0, 2);
  Say(&gate, FlowAction::kBufferStatus, 0, 5);
  EXPECT_EQ(SendAll(&gate, kNow), 5) << "what it has room for, not what is added";
  for (const int32_t none : {0, -1, std::numeric_limits<int32_t>::min()}) {
    Say(&gate, FlowAction::kBufferStatus, 0, 9);
    Say(&gate, FlowAction::kBufferStatus, 0, none);
    EXPECT_EQ(SendAll(&gate, kNow), 0) << none;
  }
  Say(&gate, FlowAction::kSlowDown, 1e6F);
  EXPECT_EQ(SendAll(&gate, kNow), 0) << "still full";
  Say(&gate, FlowAction::kResume);
  EXPECT_EQ(SendAll(&gate, kNow), 100'000);
  Say(&gate, FlowAction::kBufferStatus, 0, 0);
  Say(&gate, FlowAction::kSpeedUp, 20);
  EXPECT_EQ(SendAll(&gate, kNow), 2);
}

TEST(FlowGateTest, RatesAreNamedHalvedAndDoubled) {
  FlowGate gate;
  Say(&gate, FlowAction::kSpeedUp);
  EXPECT_EQ(gate.rate(), 0) << "there is nothing above no bound";
  Say(&gate, FlowAction::kSlowDown);
  EXPECT_EQ(gate.rate(), 500);
  Say(&gate, FlowAction::kSlowDown);
  EXPECT_EQ(gate.rate(), 250);
  Say(&gate, FlowAction::kSpeedUp);
  EXPECT_EQ(gate.rate(), 500);
  Say(&gate, FlowAction::kResume);
  EXPECT_EQ(gate.rate(), 500) << "a pause has nothing to do with it";
  Say(&gate, FlowAction::kSlowDown, 1e-30F);
  EXPECT_EQ(gate.rate(), FlowGate::kLeastRate);
  for (int i = 0; i < 200; ++i) Say(&gate, FlowAction::kSlowDown);
  EXPECT_EQ(gate.rate(), FlowGate::kLeastRate) << "slower and slower is never without a bound";
  Say(&gate, FlowAction::kSpeedUp, 500'000);
  Say(&gate, FlowAction::kSpeedUp);
  EXPECT_EQ(gate.rate(), 1'000'000);
  Say(&gate, FlowAction::kSpeedUp);
  EXPECT_EQ(gate.rate(), 0);
  Say(&gate, FlowAction::kSpeedUp, std::numeric_limits<float>::max());
  EXPECT_GT(SendAll(&gate, kNow), 999'999);
  Say(&gate, FlowAction::kSpeedUp);
  EXPECT_EQ(gate.rate(), 0);
}

// 1. In no stretch of time more than the rate allows, and a tenth of a second's worth.
// 2. Whoever looks all the time gets nearly as much as the rate allows.
TEST(FlowGateTest, ARateIsKeptHoweverOneLooks) {
  SplitMix64 random(1);
  for (const float rate : {0.25F, 3.0F, 10.0F, 30.0F, 1'000.0F, 25'000.0F}) {
    SCOPED_TRACE(rate);
    FlowGate gate;
    Say(&gate, FlowAction::kSlowDown, rate);
    const double burst = std::max(1.0, rate / 10.0);
    std::vector<int64_t> sent;
    for (int64_t now = kNow; sent.size() < 3'000 && now < kNow + 4'000 * kNanosPerSecond;) {
      for (int i = SendAll(&gate, now); i > 0; --i) sent.push_back(now);
      const bool sleeps = random.Below(20) == 0;
      now += static_cast<int64_t>(
          random.Below(static_cast<uint64_t>((sleeps ? 40 : 0.4) * kNanosPerSecond / rate) + 1));
    }
    ASSERT_GT(sent.size(), 100u);
    for (size_t first = 0; first < sent.size(); ++first) {
      for (size_t last = first; last < std::min(sent.size(), first + 2'600); last += 1 + last / 9) {
        const double seconds = static_cast<double>(sent[last] - sent[first]) / kNanosPerSecond;
        ASSERT_LE(last - first + 1, burst + rate * seconds + 0.01) << first << " to " << last;
      }
    }
    Say(&gate, FlowAction::kSlowDown, rate);
    int64_t frames = 0;
    const int64_t step = static_cast<int64_t>(kNanosPerSecond / rate / 10);
    for (int i = 0; i < 1'000; ++i) frames += SendAll(&gate, kNow + i * step);
    EXPECT_GE(frames, 98);
    EXPECT_LE(static_cast<double>(frames), 100 + burst);
  }
}

TEST(FlowGateTest, WhatIsReadAheadIsKeptForAShortWhileOnly) {
  FlowGate gate;
  Say(&gate, FlowAction::kSlowDown, 1'000);
  EXPECT_EQ(SendAll(&gate, kNow), 100);
  EXPECT_FALSE(gate.MaySend(kNow));
  EXPECT_FALSE(gate.HoldsLong(kNow));
  Say(&gate, FlowAction::kSlowDown, 10);
  EXPECT_EQ(SendAll(&gate, kNow), 1);
  EXPECT_TRUE(gate.HoldsLong(kNow));
  EXPECT_FALSE(gate.HoldsLong(kNow + 96 * kNanosPerMilli));
  EXPECT_FALSE(gate.MaySend(kNow + 96 * kNanosPerMilli));
}

}  // namespace
}  // namespace engram
