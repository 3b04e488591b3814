#include "perf/live_tags.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "perf/clustered_order.h"
#include "src/core/hash.h"
#include "tools/engramctl/recall_quality.h"

namespace engram {
namespace {

using Operation = RunbookStep::Operation;

constexpr uint32_t kDimension = 20;  // not a whole number of cache lines

VectorSet RandomRows(size_t count, uint64_t seed) {
  VectorSet rows = VectorSet::Zeros(count, kDimension);
  SplitMix64 random(seed);
  for (size_t row = 0; row < count; ++row) {
    for (float& value : rows.Row(row)) value = static_cast<float>(random.Below(2'001)) / 1e3F - 1;
  }
  return rows;
}

RunbookStep Insert(uint64_t first, uint64_t end) {
  return {Operation::kInsert, {first, end}, {}, 1};
}
RunbookStep Delete(uint64_t first, uint64_t end) {
  return {Operation::kDelete, {first, end}, {}, 2};
}
RunbookStep Replace(uint64_t tags, uint64_t ids, uint64_t count) {
  return {Operation::kReplace, {tags, tags + count}, {ids, ids + count}, 3};
}

TEST(LiveTagsTest, TagsKeepWhatTheyWereGivenLast) {
  const Runbook runbook{.file = "f.yaml", .part = "", .steps = {}};
  LiveTags live(100);
  ASSERT_TRUE(live.Take(runbook, Insert(0, 10)));
  const auto replaced = live.Take(runbook, Replace(2, 50, 3));
  ASSERT_TRUE(replaced);
  ASSERT_EQ(replaced->size(), 3u);
  EXPECT_EQ((*replaced)[1].tag, 3u);
  EXPECT_EQ((*replaced)[1].row, 51);
  const auto deleted = live.Take(runbook, Delete(4, 6));
  ASSERT_TRUE(deleted);
  EXPECT_EQ((*deleted)[0].row, kNoRow);
  EXPECT_EQ(live.live(), 8u);
  EXPECT_EQ(live.rows()[2], 50);
  EXPECT_EQ(live.rows()[4], kNoRow);
  EXPECT_EQ(live.rows()[6], 6);
  ASSERT_TRUE(live.Take(runbook, Insert(4, 5)));
  std::vector<uint32_t> order;
  for (const Mutation& put : live.InOrder()) order.push_back(put.tag);
  EXPECT_EQ(order, (std::vector<uint32_t>{0, 1, 6, 7, 8, 9, 2, 3, 4}));
}

TEST(LiveTagsTest, StepsThatDoNotFitAreRefusedWhole) {
  const Runbook runbook{.file = "f.yaml", .part = "", .steps = {}};
  LiveTags live(100);
  ASSERT_TRUE(live.Take(runbook, Insert(10, 20)));
  EXPECT_EQ(live.Take(runbook, Insert(5, 11)).error().message, "f.yaml:1: tag 10 lives already");
  EXPECT_EQ(live.Take(runbook, Delete(19, 21)).error().message, "f.yaml:2: tag 20 does not live");
  EXPECT_EQ(live.Take(runbook, Replace(9, 50, 2)).error().message, "f.yaml:3: tag 9 does not live");
  EXPECT_EQ(live.live(), 10u);
  EXPECT_EQ(live.rows()[5], kNoRow);
  EXPECT_EQ(live.rows()[19], 19);
}

// Against the plainest computation there is, with every third tag dead and others replaced.
TEST(LiveTruthsTest, TruthsAreThoseOfWhatLivesThen) {
  const VectorSet base = RandomRows(500, 1);
  const VectorSet queries = RandomRows(7, 2);
  for (const Metric metric : {Metric::kL2, Metric::kInnerProduct}) {
    LiveTruths truths(base, queries, metric, 10);
    std::vector<int32_t> rows(400, kNoRow);
    for (size_t living : {150u, 400u, 90u}) {
      for (size_t tag = 0; tag < rows.size(); ++tag) {
        rows[tag] = tag >= living || tag % 3 == 0 ? kNoRow : static_cast<int32_t>(tag);
        if (rows[tag] != kNoRow && tag % 5 == 0) rows[tag] += 100;
      }
      const LiveTruth truth = truths.Among(rows);
      for (size_t query = 0; query < queries.size(); ++query) {
        std::vector<std::pair<double, int32_t>> exact;
        for (size_t tag = 0; tag < rows.size(); ++tag) {
          if (rows[tag] == kNoRow) continue;
          const double score =
              ExactScore(metric, queries[query], base[static_cast<size_t>(rows[tag])]);
          exact.emplace_back(metric == Metric::kL2 ? score : -score, static_cast<int32_t>(tag));
        }
        std::ranges::sort(exact);
        std::vector<int32_t> expected;
        for (size_t place = 0; place < 10; ++place) expected.push_back(exact[place].second);
        const auto begin = truth.tags.begin() + static_cast<ptrdiff_t>(10 * query);
        EXPECT_EQ(std::vector<int32_t>(begin, begin + 10), expected);
        const LiveTruth one = truths.OfOne(query, rows);
        EXPECT_EQ(one.tags, expected);
        EXPECT_EQ(one.kth_scores[0], truth.kth_scores[query]);
      }
    }
  }
}

TEST(LiveTruthsTest, DeadTagsAreNoHitsAndTiesAre) {
  VectorSet base = VectorSet::Zeros(40, kDimension);
  for (size_t row = 0; row < base.size(); ++row) base.Row(row)[0] = static_cast<float>(row / 2);
  const VectorSet queries = VectorSet::Zeros(1, kDimension);
  std::vector<int32_t> rows(40);
  for (size_t tag = 0; tag < rows.size(); ++tag) rows[tag] = static_cast<int32_t>(tag);
  rows[0] = kNoRow;
  LiveTruths truths(base, queries, Metric::kL2, 2);
  const LiveTruth truth = truths.Among(rows);
  EXPECT_EQ(truth.tags, (std::vector<int32_t>{1, 2}));
  const auto judge = [&](std::vector<int64_t> returned) {
    return Judge(base, queries[0], Metric::kL2, rows, truth, 0, returned);
  };
  EXPECT_EQ(judge({1, 2}).hits, 2u);
  EXPECT_EQ(judge({1, 3}).hits, 2u) << "3 is as near as 2";
  EXPECT_EQ(judge({1, 4}).hits, 1u);
  EXPECT_EQ(judge({0, 1}).hits, 1u) << "0 is the nearest and does not live";
  EXPECT_EQ(judge({0, 1}).dead, 1u);
  EXPECT_EQ(judge({1, 1}).hits, 1u);
}

// Four clouds far apart, their rows dealt in turns, into stretches of other sizes than theirs.
TEST(ClusteredOrderTest, StretchesGetClustersAndKeepTheirLengths) {
  VectorSet rows = RandomRows(400, 3);
  for (size_t row = 0; row < rows.size(); ++row) rows.Row(row)[row % 4] += 100;
  const std::vector<size_t> starts = {0, 60, 160, 310};
  const std::vector<uint32_t> order = ClusteredOrder(rows, starts, 5);
  std::vector<uint32_t> sorted = order;
  std::ranges::sort(sorted);
  for (uint32_t row = 0; row < 400; ++row) ASSERT_EQ(sorted[row], row) << "each row once";
  size_t at_home = 0;
  for (size_t i = 0; i < starts.size(); ++i) {
    const size_t end = i + 1 < starts.size() ? starts[i + 1] : order.size();
    std::map<uint32_t, size_t> clouds;
    for (size_t at = starts[i]; at < end; ++at) ++clouds[order[at] % 4];
    at_home +=
        std::ranges::max_element(clouds, {}, &std::pair<const uint32_t, size_t>::second)->second;
  }
  EXPECT_GE(at_home, 320u) << "of 350 that fit; 310 where lengths are not kept";
  EXPECT_EQ(InOrder(rows, order)[17][3], rows[order[17]][3]);
}

}  // namespace
}  // namespace engram
