// What a recall that walks the graph sees while nodes come and go around it: exactly what lived at
// its snapshot, in all of its places.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "index/recall_job.h"
#include "index/space.h"
#include "src/core/commit_stamp.h"
#include "src/core/hash.h"
#include "src/core/reader_epochs.h"
#include "tests/index/coded_space_rig.h"
#include "tests/index/latent_vector.h"
#include "tests/index/space_testing.h"

namespace engram {
namespace {

constexpr uint32_t kDimension = 80;
constexpr uint64_t kNodes = 400;
constexpr uint64_t kLater = 150;
using Numbers = std::set<uint64_t>;

struct Case {
  const char* name;
  Traversal traversal;
};

class SpaceVisibilityTest : public testing::TestWithParam<Case> {
 protected:
  SpaceVisibilityTest()
      : rig_({.traversal = GetParam().traversal, .dimension = kDimension, .graph_from = 100}),
        job_(&rig_.other_memory.heap) {}

  void StoreSome(uint64_t from, uint64_t count) {
    for (uint64_t number = from; number < from + count; ++number) {
      ASSERT_NO_FATAL_FAILURE(rig_.Store(number, LatentVector(number, kDimension)));
    }
  }
  // All that is stored, in a graph.
  void StoreAndSettle() {
    ASSERT_NO_FATAL_FAILURE(StoreSome(0, kNodes));
    ASSERT_NO_FATAL_FAILURE(rig_.Settle());
    ASSERT_EQ(rig_.HasCodes(), GetParam().traversal == Traversal::kRabitq);
  }
  Numbers Live() const {
    Numbers live;
    for (const auto& [number, vector] : rig_.vectors) live.insert(number);
    return live;
  }

  // With as many places as `wanted`, so that one that is taken by something else is missed.
  void Begin(size_t wanted, CommitStamp snapshot) {
    const std::vector<float> query = LatentVector(kQuery, kDimension);
    RecallRequest request;
    request.dtype = VectorDtype::kF32;
    request.dimension = kDimension;
    request.k = static_cast<uint32_t>(wanted);
    request.ef = request.k;
    request.snapshot = snapshot;
    ASSERT_EQ(job_.Begin(rig_.space, request, reinterpret_cast<const std::byte*>(query.data()), 1),
              RefusalReason::kNone);
  }
  // Slices of the scan and the first ones of the walk.
  void BeginWalk() {
    for (int i = 0; i < 4; ++i) ASSERT_FALSE(job_.Search(1));
  }
  Numbers Finish() {
    while (!job_.Search(1)) {
    }
    std::vector<Hit> hits;
    for (bool last = false; !last;) {
      std::vector<std::byte> slot(job_.NextBatchBytes(kResultSlotBytes));
      last = job_.EmitBatch(slot);
      ReadBatch(slot.data(), &hits);
    }
    Numbers numbers;
    for (const Hit& hit : hits) numbers.insert(std::stoull(hit.id));
    EXPECT_EQ(numbers.size(), hits.size()) << "a hit came twice";
    return numbers;
  }

  static constexpr uint64_t kQuery = 1'000'000;
  CodedSpaceRig rig_;
  RecallJob job_;
};

TEST_P(SpaceVisibilityTest, WhatIsLinkedDuringAWalkTakesNoPlace) {
  ASSERT_NO_FATAL_FAILURE(StoreAndSettle());
  const Numbers before = Live();
  {
    const ReaderGuard guard(&rig_.epochs, 0);
    ASSERT_NO_FATAL_FAILURE(Begin(kNodes, kNoStamp));
    ASSERT_NO_FATAL_FAILURE(BeginWalk());
    ASSERT_NO_FATAL_FAILURE(StoreSome(kNodes, kLater));
    rig_.upkeep.Run();
    ASSERT_EQ(rig_.space.unlinked_count(), 0u);
    EXPECT_EQ(Finish(), before);
  }
  const ReaderGuard guard(&rig_.epochs, 0);
  ASSERT_NO_FATAL_FAILURE(Begin(kNodes + kLater, kNoStamp));
  EXPECT_EQ(Finish(), Live()) << "who comes later sees them";
}

TEST_P(SpaceVisibilityTest, WhatEndsDuringAWalkIsSeenAndWhatEndedBeforeIsNot) {
  ASSERT_NO_FATAL_FAILURE(StoreAndSettle());
  const ReaderGuard guard(&rig_.epochs, 0);
  for (uint64_t number = 0; number < kNodes; number += 10) {
    ASSERT_NO_FATAL_FAILURE(rig_.Remove(number));
  }
  const Numbers before = Live();
  ASSERT_NO_FATAL_FAILURE(Begin(before.size(), kNoStamp));
  ASSERT_NO_FATAL_FAILURE(BeginWalk());
  for (uint64_t number = 1; number < kNodes; number += 10) {
    ASSERT_NO_FATAL_FAILURE(rig_.Remove(number));
  }
  EXPECT_EQ(Finish(), before);
  ASSERT_NO_FATAL_FAILURE(Begin(kNodes, kNoStamp));
  EXPECT_EQ(Finish(), Live());
}

TEST_P(SpaceVisibilityTest, ASnapshotIsSeenThroughAllThatWasLinkedSince) {
  ASSERT_NO_FATAL_FAILURE(StoreAndSettle());
  const CommitStamp snapshot = rig_.stamp;
  const Numbers before = Live();
  for (uint64_t number = 0; number < kNodes; number += 3) {
    ASSERT_NO_FATAL_FAILURE(rig_.Remove(number));
  }
  ASSERT_NO_FATAL_FAILURE(StoreSome(kNodes, kLater));
  rig_.upkeep.Run();
  ASSERT_EQ(rig_.space.unlinked_count(), 0u);
  const ReaderGuard guard(&rig_.epochs, 0);
  ASSERT_NO_FATAL_FAILURE(Begin(before.size(), snapshot));
  EXPECT_EQ(Finish(), before);
  ASSERT_NO_FATAL_FAILURE(Begin(Live().size(), kNoStamp));
  EXPECT_EQ(Finish(), Live());
}

// A place that was given back has what it says of the next node, not of the one before.
TEST_P(SpaceVisibilityTest, WhatIsStoredInAPlaceThatWasGivenBackIsSeen) {
  ASSERT_NO_FATAL_FAILURE(StoreAndSettle());
  for (int round = 0; round < 3; ++round) {
    for (uint64_t number = 0; number < kNodes; number += 2) {
      ASSERT_NO_FATAL_FAILURE(rig_.Remove(number));
    }
    ASSERT_NO_FATAL_FAILURE(rig_.Settle());
    for (uint64_t number = 0; number < kNodes; number += 2) {
      ASSERT_NO_FATAL_FAILURE(rig_.Store(number, LatentVector(number + 7, kDimension)));
    }
    ASSERT_NO_FATAL_FAILURE(rig_.Settle());
    const ReaderGuard guard(&rig_.epochs, 0);
    ASSERT_NO_FATAL_FAILURE(Begin(kNodes, kNoStamp));
    EXPECT_EQ(Finish(), Live());
  }
  EXPECT_LT(rig_.space.node_count(), 2 * kNodes) << "places are used again";
}

INSTANTIATE_TEST_SUITE_P(Walks, SpaceVisibilityTest,
                         testing::Values(Case{"Codes", Traversal::kInt8},
                                         Case{"ExactAlone", Traversal::kExact},
                                         Case{"Rabitq", Traversal::kRabitq}),
                         [](const auto& param) { return std::string(param.param.name); });

}  // namespace
}  // namespace engram
