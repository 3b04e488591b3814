#include "src/control/admission_controller.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "src/core/hash.h"

namespace engram {
namespace {

// Shards whose depth and rate the test sets.
class AdmissionTest : public testing::Test {
 protected:
  struct TestShard {
    Counter pushed;
    Counter settled;
    Counter backlog;
    Counter backlog_limit;
  };

  void Start(uint16_t shards, const AdmissionOptions& options = {}) {
    options_ = options;
    board_ = std::make_unique<AdmissionBoard>(shards);
    std::vector<ShardGauges> gauges;
    for (uint16_t s = 0; s < shards; ++s) {
      shards_.push_back(std::make_unique<TestShard>());
      TestShard& shard = *shards_.back();
      gauges.push_back({.pushed = {&shard.pushed},
                        .settled = &shard.settled,
                        .backlog = &shard.backlog,
                        .backlog_limit = &shard.backlog_limit});
    }
    controller_ =
        std::make_unique<AdmissionController>(options, &clock_, std::move(gauges), board_.get());
  }

  // One period in which the shard settles at `rate` a second and has `depth` at its end.
  AdmissionLimits Step(uint16_t s, double rate, uint64_t depth) {
    const double seconds = static_cast<double>(options_.period_ns) / kNanosPerSecond;
    TestShard& shard = *shards_[s];
    shard.settled.Add(static_cast<uint64_t>(std::llround(rate * seconds)));
    shard.pushed.Set(shard.settled.Read() + depth);
    clock_.AdvanceNs(options_.period_ns);
    EXPECT_EQ(controller_->Poll(), 1);
    return board_->Read(ShardId(s));
  }
  AdmissionLimits StepFor(uint16_t s, double rate, uint64_t depth, int periods) {
    AdmissionLimits limits;
    for (int i = 0; i < periods; ++i) limits = Step(s, rate, depth);
    return limits;
  }

  AdmissionOptions options_;
  SimulatedClock clock_;
  std::vector<std::unique_ptr<TestShard>> shards_;
  std::unique_ptr<AdmissionBoard> board_;
  std::unique_ptr<AdmissionController> controller_;
};

TEST_F(AdmissionTest, BeforeTheFirstSampleAllIsCalm) {
  Start(2);
  const AdmissionLimits limits = board_->Read(ShardId(1));
  EXPECT_EQ(limits.state, LoadState::kNormal);
  EXPECT_EQ(limits.queue_capacity, options_.least_capacity);
  EXPECT_EQ(limits.batch, options_.least_batch);
  EXPECT_EQ(controller_->Poll(), 0) << "a period has not passed";
}

TEST_F(AdmissionTest, StatesAreEnteredAtTheirThresholdsAndLeftBelowHalf) {
  Start(1);
  const auto at = [&](uint64_t depth) { return Step(0, 0, depth).state; };
  EXPECT_EQ(at(511), LoadState::kNormal);
  EXPECT_EQ(at(512), LoadState::kGrowing);
  EXPECT_EQ(at(819), LoadState::kGrowing);
  EXPECT_EQ(at(820), LoadState::kBackpressure);
  EXPECT_EQ(at(600), LoadState::kBackpressure);
  EXPECT_EQ(at(921), LoadState::kBackpressure);
  EXPECT_EQ(at(922), LoadState::kOverloaded);
  EXPECT_EQ(at(513), LoadState::kOverloaded);
  EXPECT_EQ(at(511), LoadState::kNormal);
  EXPECT_EQ(at(5'000), LoadState::kOverloaded);
  EXPECT_EQ(board_->Read(ShardId(0)).pressure, 1);
}

// Depths around a threshold do not make the state go to and fro.
TEST_F(AdmissionTest, NothingFlaps) {
  Start(1);
  CounterCatalogue counters;
  controller_->AddCounters("control", &counters);
  SplitMix64 random(3);
  for (int i = 0; i < 1'000; ++i) Step(0, 0, 780 + random.Next() % 80);
  for (const CounterView& counter : counters) {
    if (counter.name == "backpressure_activations") EXPECT_EQ(counter.counter->Read(), 1u);
    if (counter.name == "overload_activations") EXPECT_EQ(counter.counter->Read(), 0u);
  }
}

TEST_F(AdmissionTest, CapacityIsWhatIsSettledInTime) {
  Start(1);
  EXPECT_NEAR(StepFor(0, 60'000, 100, 400).queue_capacity, 3'000, 3);
  // Idle, or with less to do than it can: it can as much as before.
  EXPECT_NEAR(StepFor(0, 1'000, 0, 400).queue_capacity, 3'000, 3);
  // Busy all the time, it cannot any more.
  EXPECT_NEAR(StepFor(0, 30'000, 100, 400).queue_capacity, 1'500, 3);
  EXPECT_EQ(StepFor(0, 100, 100, 400).queue_capacity, options_.least_capacity);
  EXPECT_EQ(StepFor(0, 1'000'000, 100, 400).queue_capacity, options_.most_capacity);
}

TEST_F(AdmissionTest, RetryAfterIsWhenHalfIsFree) {
  Start(1);
  EXPECT_EQ(StepFor(0, 40'000, 900, 400).retry_after_ms, 1u);
  // 2,000 fit; 1,000 above the half take 25 ms.
  EXPECT_NEAR(Step(0, 40'000, 2'000).retry_after_ms, 25, 1);
  EXPECT_NEAR(Step(0, 40'000, 9'000).retry_after_ms, 200, 2);
  EXPECT_EQ(StepFor(0, 0, 9'000, 2'000).retry_after_ms, 5'000u) << "it stands still";
}

TEST_F(AdmissionTest, BatchesGrowWithThePressure) {
  Start(1);
  uint32_t before = 0;
  for (uint64_t depth = 0; depth <= 1'024; depth += 32) {
    const uint32_t batch = Step(0, 0, depth).batch;
    EXPECT_GE(batch, before);
    before = batch;
    if (depth <= 512) EXPECT_EQ(batch, options_.least_batch);
    if (depth >= 922) EXPECT_EQ(batch, options_.most_batch);
  }
}

TEST_F(AdmissionTest, WhatWaitsToBeLinkedCountsToo) {
  Start(1);
  shards_[0]->backlog_limit.Set(1'000'000);
  shards_[0]->backlog.Set(850'000);
  const AdmissionLimits limits = Step(0, 0, 10);
  EXPECT_EQ(limits.state, LoadState::kBackpressure);
  EXPECT_NEAR(limits.pressure, 0.85, 1e-6);
  shards_[0]->backlog.Set(100'000);
  EXPECT_EQ(Step(0, 0, 10).state, LoadState::kNormal);
}

TEST_F(AdmissionTest, OneFullShardIsNotAllOfThem) {
  Start(4);
  EXPECT_EQ(Step(0, 0, 1'024).state, LoadState::kOverloaded);
  AdmissionLimits all = board_->ReadGlobal();
  EXPECT_EQ(all.state, LoadState::kNormal);
  EXPECT_EQ(all.queue_depth, 1'024u);
  EXPECT_EQ(all.queue_capacity, 4'096u);
  for (uint16_t s = 1; s < 4; ++s) Step(s, 0, 1'000);
  all = board_->ReadGlobal();
  EXPECT_EQ(all.state, LoadState::kOverloaded);
  EXPECT_NEAR(all.pressure, 4'024.0 / 4'096, 1e-3);
}

// A source of twice the capacity that stops where it is refused, and goes on where it is not: what
// is settled stays at the capacity, the depth within bounds, and all is normal soon after it ends.
TEST_F(AdmissionTest, AnOverloadIsHeldAtTheCapacity) {
  Start(1);
  constexpr double kRate = 25'000;
  const double seconds = static_cast<double>(options_.period_ns) / kNanosPerSecond;
  double depth = 0;
  double settled = 0;
  const auto run = [&](double offered, int periods) {
    uint64_t deepest = 0;
    for (int i = 0; i < periods; ++i) {
      if (board_->Read(ShardId(0)).state != LoadState::kOverloaded) depth += offered * seconds;
      const double done = std::min(depth, kRate * seconds);
      depth -= done;
      settled += done;
      deepest = std::max(deepest, static_cast<uint64_t>(depth));
      shards_[0]->settled.Set(static_cast<uint64_t>(settled));
      shards_[0]->pushed.Set(static_cast<uint64_t>(settled + depth));
      clock_.AdvanceNs(options_.period_ns);
      controller_->Poll();
    }
    return deepest;
  };
  run(kRate / 2, 1'000);
  const double before = settled;
  const uint64_t deepest = run(2 * kRate, 2'000);
  EXPECT_NEAR((settled - before) / (2'000 * seconds), kRate, 0.02 * kRate);
  EXPECT_LT(deepest, 1.2 * kRate * 0.05);
  run(kRate / 2, 100);
  EXPECT_EQ(board_->Read(ShardId(0)).state, LoadState::kNormal);
}

}  // namespace
}  // namespace engram
