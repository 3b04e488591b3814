// Checks in slices of a space that goes on serving.

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/space_testing.h"
#include "tests/index/space_upkeep.h"

namespace engram {

// Breaks what only a fault would.
class SpaceTestPeer {
 public:
  static CommitStamp* EndOf(Space* space, NodeId node) { return &space->stamps_[node].end; }
  static void Miscount(Space* space) { ++space->live_; }
  static void ForgetId(Space* space, NodeId node) { space->nodes_[node].id_bytes ^= 1; }
};

namespace {

constexpr uint32_t kDimension = 8;

class SpaceCheckTest : public testing::Test {
 protected:
  SpaceCheckTest() : heap_(size_t{64} << 20), epochs_(1) {
    SpaceOptions options;
    options.metric = Metric::kL2;
    options.graph_from = 64;
    options.build = {.M = 4, .M0 = 8, .ef_construction = 12};
    space_ = std::make_unique<Space>("s", options, &heap_.heap, &epochs_);
  }
  void Store(int row) {
    const std::string id = std::to_string(row);
    const std::vector<float> vector = QuarterVector(&random_, kDimension);
    ObservationRef observation;
    observation.id = id;
    observation.dtype = VectorDtype::kF32;
    observation.dimension = kDimension;
    observation.vector = reinterpret_cast<const std::byte*>(vector.data());
    ASSERT_EQ(space_->Upsert(observation, ++stamp_).reason, RefusalReason::kNone);
  }
  // To the end, in slices of `nodes`; `between` after the first.
  Result<CheckOutcome> Check(size_t nodes, const std::function<void()>& between = {}) {
    Space::CheckState state{};
    int slices = 0;
    for (;;) {
      Result<CheckOutcome> outcome = space_->CheckSlice(nodes, &state);
      if (!outcome || *outcome != CheckOutcome::kMore) return outcome;
      if (++slices == 1 && between) between();
    }
  }

  SplitMix64 random_{3};
  TestHeap heap_;
  ReaderEpochs epochs_;
  std::unique_ptr<Space> space_;
  CommitStamp stamp_ = 1;
};

TEST_F(SpaceCheckTest, ASoundSpaceIsSoundInSlicesOfAnySize) {
  EXPECT_EQ(Check(1), CheckOutcome::kSound) << "with nothing in it";
  for (int row = 0; row < 300; ++row) Store(row);
  for (const size_t nodes : {1, 7, 299, 300, 1'000}) EXPECT_EQ(Check(nodes), CheckOutcome::kSound);
}

TEST_F(SpaceCheckTest, WhatChangesMeanwhileIsNoFault) {
  for (int row = 0; row < 300; ++row) Store(row);
  EXPECT_EQ(Check(50, [&] { Store(500); }), CheckOutcome::kChanged);
  EXPECT_EQ(Check(50, [&] { Store(3); }), CheckOutcome::kChanged) << "an update";
  EXPECT_EQ(Check(50, [&] { space_->Delete("7", ++stamp_, false); }), CheckOutcome::kChanged);
  EXPECT_EQ(Check(50), CheckOutcome::kSound);
}

TEST_F(SpaceCheckTest, WhatIsBrokenIsNamedWithItsNode) {
  for (int row = 0; row < 300; ++row) Store(row);
  *SpaceTestPeer::EndOf(space_.get(), 123) = 5;
  Result<CheckOutcome> outcome = Check(50);
  ASSERT_FALSE(outcome.has_value());
  EXPECT_EQ(outcome.error().message, "space s: live but ended (node 123)");
  *SpaceTestPeer::EndOf(space_.get(), 123) = kOpenStamp;
  SpaceTestPeer::ForgetId(space_.get(), 299);
  outcome = Check(50);
  ASSERT_FALSE(outcome.has_value());
  EXPECT_EQ(outcome.error().message, "space s: id not in the map (node 299)");
  SpaceTestPeer::ForgetId(space_.get(), 299);
  EXPECT_EQ(Check(50), CheckOutcome::kSound);
  SpaceTestPeer::Miscount(space_.get());
  outcome = Check(50);
  ASSERT_FALSE(outcome.has_value()) << "only the counts show it";
  EXPECT_NE(outcome.error().message.find("live count is off"), std::string::npos);
  EXPECT_EQ(Check(50, [&] { Store(900); }), CheckOutcome::kChanged);
}

TEST_F(SpaceCheckTest, ARandomStateGivesNoMoreThanAWrongVerdict) {
  for (int row = 0; row < 100; ++row) Store(row);
  for (int i = 0; i < 1'000; ++i) {
    Space::CheckState state;
    auto* bytes = reinterpret_cast<std::byte*>(&state);
    for (size_t b = 0; b < sizeof(state); ++b) bytes[b] = static_cast<std::byte>(random_.Next());
    (void)space_->CheckSlice(128, &state);
  }
  EXPECT_EQ(Check(10), CheckOutcome::kSound);
}

}  // namespace
}  // namespace engram
