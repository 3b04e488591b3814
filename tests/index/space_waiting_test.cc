// What waits in lists while the codes that it is looked for by are replaced: each list is looked in
// by the codes that it has.

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "index/space.h"
#include "index/waiting_probe.h"
#include "tests/index/coded_space_rig.h"
#include "tests/index/latent_vector.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr uint32_t kDimension = 96;
constexpr uint64_t kFirst = 301;
constexpr uint64_t kLinked = 4 * kFirst - 1;  // one fewer than codes are learned anew with
// So many members are looked at with this ef: less than half of what waits.
constexpr uint32_t kEf = 10;
constexpr uint64_t kWaiting = 3'000;

class SpaceWaitingTest : public testing::Test {
 protected:
  SpaceWaitingTest() : rig_({.dimension = kDimension, .list_from = 0}) {}

  void StoreUpTo(uint64_t count, float shift) {
    for (; stored_ < count; ++stored_) {
      ASSERT_NO_FATAL_FAILURE(rig_.Store(stored_, LatentVector(stored_, kDimension, shift)));
      while (rig_.space.WantsListing()) ASSERT_GT(rig_.space.ListSome(), 0u);
    }
  }
  // Linked with codes of what came first; what waits lies elsewhere.
  void Begin() {
    ASSERT_NO_FATAL_FAILURE(StoreUpTo(kFirst, 0));
    ASSERT_NO_FATAL_FAILURE(rig_.Settle());
    ASSERT_TRUE(rig_.HasCodes());
    ASSERT_NO_FATAL_FAILURE(StoreUpTo(kLinked - 1, 1));
    ASSERT_NO_FATAL_FAILURE(rig_.Settle());
    ASSERT_NO_FATAL_FAILURE(StoreUpTo(kLinked + kWaiting, 1));
    ASSERT_TRUE(rig_.space.WantsCodes());
    ASSERT_EQ(rig_.space.waiting(), kWaiting + 1);
  }
  TrueNearest Queries() const {
    std::vector<std::vector<float>> queries;
    for (uint64_t i = 0; i < (kSanitized ? 30 : 100); ++i) {
      queries.push_back(LatentVector(1'000'000 + i, kDimension, 1));
    }
    return rig_.NearestOf(queries);
  }

  CodedSpaceRig rig_;
  uint64_t stored_ = 0;
};

// Would catch lists that are looked in by codes that they do not have yet, or no longer.
TEST_F(SpaceWaitingTest, IsFoundAsWellWhileCodesAreReplaced) {
  ASSERT_NO_FATAL_FAILURE(Begin());
  const TrueNearest truth = Queries();
  const WalkCodes* const before = rig_.space.walk_codes();
  const uint64_t members = rig_.job.work().vectors;
  const double then = rig_.Recall(truth, kEf);
  EXPECT_LT(rig_.job.work().vectors - members, truth.queries().size() * kWaiting * 3 / 4)
      << "a part of what waits is looked at";
  EXPECT_GE(then, 0.8);
  int recoding = 0;
  for (int slice = 0; rig_.space.walk_codes() == before || SpaceTestPeer::IsRecoding(rig_.space);
       ++slice) {
    ASSERT_LT(slice, 100'000);
    rig_.upkeep.Step(200);
    if (!SpaceTestPeer::IsRecoding(rig_.space)) continue;
    ASSERT_EQ(rig_.space.waiting(), kWaiting + 1);
    ASSERT_GE(rig_.Recall(truth, kEf), then - 0.05) << "after " << recoding << " slices";
    ++recoding;
  }
  EXPECT_GE(recoding, 10);
  EXPECT_NE(rig_.space.walk_codes(), before);
  EXPECT_GE(rig_.Recall(truth, kEf), then - 0.05) << "by the codes that came";
  ASSERT_NO_FATAL_FAILURE(rig_.Settle());
}

// Would catch a probe that finds less than the graph will, and one whose cost grows with a backlog.
TEST(WaitingProbeTest, LooksAtMoreTheMoreWaitButNotInProportion) {
  constexpr uint32_t kUsualEf = 128;
  const auto share = [](uint64_t waiting) {
    return WaitingProbe::MembersFor(kUsualEf, waiting) / static_cast<float>(waiting);
  };
  EXPECT_GE(share(12'000), 1.0F);
  EXPECT_GE(share(42'000), 0.4F);
  EXPECT_GE(share(95'000), 0.4F);
  EXPECT_GE(share(189'000), 0.25F);
  EXPECT_GE(share(494'000), 0.095F);
  EXPECT_LE(share(500'000), 0.1F);
  EXPECT_LE(share(4'000'000), 0.03F);
  float before = 0;
  for (uint64_t waiting = 1; waiting < 5'000'000; waiting += waiting / 8 + 1) {
    const float members = WaitingProbe::MembersFor(kUsualEf, waiting);
    EXPECT_GE(members, before) << waiting;
    EXPECT_FLOAT_EQ(WaitingProbe::MembersFor(2 * kUsualEf, waiting), 2 * members);
    before = members;
  }
}

}  // namespace
}  // namespace engram
