// Recalls of many results, which come in stages, and recalls with a bound (index/recall_job.h).

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "src/core/attributes.h"
#include "tests/index/coded_space_rig.h"
#include "tests/index/latent_vector.h"
#include "tests/support/allocation_counter.h"

namespace engram {
namespace {

constexpr uint64_t kRows = 3'000;
constexpr uint32_t kFirst = 10;

struct Kind {
  const char* name;
  uint32_t dimension;  // from 256 on recalls walk by codes of one bit
  Traversal traversal;
  uint64_t unlinked;  // of kRows
};

class LongRecallTest : public testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    for (uint64_t id = 0; id < kRows - GetParam().unlinked; ++id) {
      ASSERT_NO_FATAL_FAILURE(rig_.Store(id, VectorOf(id)));
    }
    ASSERT_NO_FATAL_FAILURE(rig_.Settle());
    for (uint64_t id = kRows - GetParam().unlinked; id < kRows; ++id) {
      ASSERT_NO_FATAL_FAILURE(rig_.Store(id, VectorOf(id)));
    }
    for (uint64_t id = 5; id < kRows; id += 50) ASSERT_NO_FATAL_FAILURE(rig_.Remove(id));
  }
  static std::vector<float> VectorOf(uint64_t id) { return LatentVector(id, GetParam().dimension); }
  static std::vector<float> Query(uint64_t number) { return VectorOf(1'000'000 + number); }

  RecallAnswer Recall(const std::vector<float>& query, const RecallParams& params) {
    return RunRecall(rig_.space, &rig_.job, query, params);
  }
  // By L2, rising.
  std::vector<double> TrueDistances(const std::vector<float>& query) const {
    std::vector<double> distances;
    for (const auto& [id, vector] : rig_.vectors) {
      distances.push_back(ExactScore(Metric::kL2, vector, query));
    }
    std::ranges::sort(distances);
    return distances;
  }
  // Each is stored, and none comes twice.
  void ExpectSound(const RecallAnswer& answer) const {
    std::set<std::string> ids;
    for (const Hit& hit : answer.hits) {
      ASSERT_TRUE(rig_.vectors.contains(std::stoull(hit.id))) << hit.id;
      ASSERT_TRUE(ids.insert(hit.id).second) << hit.id << " came twice";
    }
  }
  static void ExpectOrdered(const RecallAnswer& answer, size_t begin, size_t end) {
    for (size_t i = begin + 1; i < end; ++i) {
      ASSERT_GE(answer.hits[i].score, answer.hits[i - 1].score) << i;
    }
  }
  // Of the nearest so many.
  static double ShareOf(const RecallAnswer& answer, const std::vector<double>& distances,
                        size_t begin, size_t end, size_t nearest) {
    const double bound = distances[nearest - 1] * (1 + 1e-5);
    size_t count = 0;
    for (size_t i = begin; i < end; ++i) {
      count += static_cast<size_t>(static_cast<double>(answer.hits[i].score) <= bound);
    }
    return static_cast<double>(count) / static_cast<double>(nearest);
  }

  CodedSpaceRig rig_{{.traversal = GetParam().traversal, .dimension = GetParam().dimension}};
};

TEST_P(LongRecallTest, TheFirstOnesComeAheadOfTheOthers) {
  double first = 0;
  double all = 0;
  constexpr uint64_t kQueries = 8;
  for (const uint32_t k : {300U, 1'000U}) {
    for (uint64_t number = 0; number < kQueries; ++number) {
      const std::vector<float> query = Query(number);
      const RecallAnswer answer = Recall(query, {.k = k, .first = kFirst});
      ASSERT_EQ(answer.hits.size(), k);
      ASSERT_EQ(answer.ends.front(), (std::pair{BatchEnd::kFirst, size_t{kFirst}}));
      ASSERT_EQ(answer.ends.back(), (std::pair{BatchEnd::kLast, size_t{k}}));
      ASSERT_EQ(
          std::ranges::count(answer.ends, BatchEnd::kFirst, &std::pair<BatchEnd, size_t>::first),
          1);
      ASSERT_NO_FATAL_FAILURE(ExpectSound(answer));
      ASSERT_NO_FATAL_FAILURE(ExpectOrdered(answer, 0, kFirst));
      ASSERT_NO_FATAL_FAILURE(ExpectOrdered(answer, kFirst, k));
      const std::vector<double> distances = TrueDistances(query);
      first += ShareOf(answer, distances, 0, kFirst, kFirst);
      all += ShareOf(answer, distances, 0, k, k);
    }
  }
  EXPECT_GE(first / (2 * kQueries), 0.95);
  EXPECT_GE(all / (2 * kQueries), 0.97);
}

TEST_P(LongRecallTest, SlicesOfOneDistanceGiveTheSameAsOneGo) {
  for (const bool bounded : {false, true}) {
    const std::vector<float> query = Query(3);
    const auto bound = static_cast<float>(TrueDistances(query)[700]);
    RecallParams params{.k = 2'000, .first = kFirst};
    if (bounded) params.bound = bound;
    const RecallAnswer whole = Recall(query, params);
    params.slice = 1;
    const RecallAnswer sliced = Recall(query, params);
    EXPECT_EQ(sliced.hits, whole.hits);
    EXPECT_GT(sliced.slices, whole.slices + 10);
  }
}

TEST_P(LongRecallTest, ABoundLeavesOutWhatIsBeyondIt) {
  for (const size_t within : {size_t{3}, size_t{40}, size_t{400}, size_t{1'500}}) {
    const std::vector<float> query = Query(within);
    const std::vector<double> distances = TrueDistances(query);
    const auto bound = static_cast<float>((distances[within - 1] + distances[within]) / 2);
    for (const uint32_t k : {100U, 2'500U}) {
      const RecallAnswer answer = Recall(query, {.k = k, .first = kFirst, .bound = bound});
      ASSERT_NO_FATAL_FAILURE(ExpectSound(answer));
      for (const Hit& hit : answer.hits) ASSERT_LE(hit.score, bound);
      const size_t wanted = std::min<size_t>(k, within);
      EXPECT_LE(answer.hits.size(), wanted);
      EXPECT_GE(static_cast<double>(answer.hits.size()), 0.93 * static_cast<double>(wanted))
          << within << " within the bound, k " << k;
      EXPECT_EQ(answer.ends.back().first, BatchEnd::kLast);
    }
  }
}

TEST_P(LongRecallTest, WhereNothingIsWithinTheBoundBothEndsAreSaidAllTheSame) {
  const RecallAnswer answer = Recall(Query(1), {.k = 1'000, .first = kFirst, .bound = -1.0F});
  EXPECT_TRUE(answer.hits.empty());
  ASSERT_EQ(answer.ends.size(), 2u);
  EXPECT_EQ(answer.ends[0].first, BatchEnd::kFirst);
  EXPECT_EQ(answer.ends[1].first, BatchEnd::kLast);
}

TEST_P(LongRecallTest, ShortOnesComeAtOnce) {
  const RecallAnswer answer = Recall(Query(1), {.k = kLongRecallFrom, .first = kFirst});
  EXPECT_EQ(answer.hits.size(), kLongRecallFrom);
  ASSERT_EQ(answer.ends.size(), 1u);
  EXPECT_EQ(answer.ends[0].first, BatchEnd::kLast);
}

TEST_P(LongRecallTest, NothingIsAllocated) {
  if (!AllocationsAreCounted()) GTEST_SKIP() << "a sanitizer has an allocator of its own";
  const std::vector<float> query = Query(2);
  RecallRequest request;
  request.dtype = VectorDtype::kF32;
  request.dimension = static_cast<uint16_t>(query.size());
  request.k = 2'000;
  request.first = kFirst;
  request.has_bound = true;
  request.bound = static_cast<float>(TrueDistances(query)[1'800]);
  std::vector<std::byte> slot(kResultSlotBytes);
  const auto* const vector = reinterpret_cast<const std::byte*>(query.data());
  const uint64_t before = AllocationCount();
  ASSERT_EQ(rig_.job.Begin(rig_.space, request, vector, 64), RefusalReason::kNone);
  do {
    while (!rig_.job.Search(256)) {
    }
  } while (!rig_.job.EmitBatch(slot));
  EXPECT_EQ(AllocationCount(), before);
}

INSTANTIATE_TEST_SUITE_P(Kinds, LongRecallTest,
                         testing::Values(Kind{"codes", 256, Traversal::kRabitq, 0},
                                         Kind{"codes_and_fresh", 256, Traversal::kRabitq, 700},
                                         Kind{"int8", 64, Traversal::kInt8, 0},
                                         Kind{"exact", 64, Traversal::kExact, 500},
                                         Kind{"nothing_linked", 64, Traversal::kRabitq, kRows}),
                         [](const auto& kind) { return std::string(kind.param.name); });

}  // namespace
}  // namespace engram
