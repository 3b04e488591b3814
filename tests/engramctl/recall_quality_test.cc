#include "tools/engramctl/recall_quality.h"

#include <gtest/gtest.h>

#include <vector>

namespace engram {
namespace {

using Rows = std::vector<ReturnedRow>;

uint32_t Hits(const Rows& returned, const std::vector<int32_t>& truth, uint32_t k,
              Metric metric = Metric::kCosine, std::optional<double> kth_score = std::nullopt) {
  return CountHits(returned, truth, k, metric, kth_score);
}

TEST(RecallQualityTest, CountsTheTrueNeighboursInAnyOrder) {
  EXPECT_EQ(Hits({{3, 0.7}, {1, 0.9}}, {1, 2, 3}, 3), 2u);
  EXPECT_EQ(Hits({}, {1, 2, 3}, 3), 0u);
  // Row 4 is the fourth neighbour: right for k = 4, not for k = 3.
  EXPECT_EQ(Hits({{1, 0.9}, {4, 0.6}}, {1, 2, 3, 4}, 3), 1u);
  EXPECT_EQ(Hits({{1, 0.9}, {4, 0.6}}, {1, 2, 3, 4}, 4), 2u);
}

TEST(RecallQualityTest, ARowCountsOnceAndIdsThatAreNoRowsNever) {
  EXPECT_EQ(Hits({{1, 0.9}, {1, 0.9}, {-1, 0.9}}, {1, 2, 3}, 3), 1u);
  EXPECT_EQ(Hits({{-1, 9.0}, {-1, 9.0}}, {1, 2}, 2, Metric::kCosine, 0.5), 0u);
}

TEST(RecallQualityTest, ATieWithAReturnedTrueNeighbourIsAHit) {
  // Rows 2 and 3 are equally near; the truth put row 3 outside the first two.
  EXPECT_EQ(Hits({{1, 0.9}, {2, 0.8}, {3, 0.8}}, {1, 2, 3}, 2), 2u);  // never more than k
  EXPECT_EQ(Hits({{2, 0.8}, {3, 0.8}}, {1, 2, 3}, 2), 2u);
  EXPECT_EQ(Hits({{2, 0.8}, {3, 0.8 * (1 - 5e-7)}}, {1, 2, 3}, 2), 2u);
  EXPECT_EQ(Hits({{2, 0.8}, {3, 0.8 * (1 - 5e-6)}}, {1, 2, 3}, 2), 1u);
}

TEST(RecallQualityTest, ATieThatTheTruthDoesNotHoldIsNotBelievedByScoreAlone) {
  EXPECT_EQ(Hits({{2, 0.8}, {9, 0.8}}, {1, 2, 3}, 2), 1u);
  EXPECT_EQ(Hits({{2, 0.8}, {3, 0.8}}, {1, 2}, 2), 1u);
}

TEST(RecallQualityTest, WithoutAReturnedTrueNeighbourThereIsNothingToTieWith) {
  EXPECT_EQ(Hits({{3, 0.8}, {4, 0.8}}, {1, 2, 3, 4}, 2), 0u);
}

TEST(RecallQualityTest, ByDistanceLowerIsNearer) {
  EXPECT_EQ(Hits({{2, 4.0}, {3, 4.0}}, {1, 2, 3}, 2, Metric::kL2), 2u);
  EXPECT_EQ(Hits({{2, 4.0}, {3, 4.1}}, {1, 2, 3}, 2, Metric::kL2), 1u);
  // The worst of the returned true neighbours is the bound, not the best.
  EXPECT_EQ(Hits({{1, 1.0}, {2, 4.0}, {4, 4.0}}, {1, 2, 3, 4}, 3, Metric::kL2), 3u);
}

TEST(RecallQualityTest, ExactScoresFindTiesThatTheTruthDoesNotHold) {
  EXPECT_EQ(Hits({{1, 0.9}, {9, 0.8}}, {1, 2}, 2, Metric::kCosine, 0.8), 2u);
  EXPECT_EQ(Hits({{1, 0.9}, {9, 0.7}}, {1, 2}, 2, Metric::kCosine, 0.8), 1u);
  EXPECT_EQ(Hits({{9, 0.0}}, {1, 2}, 2, Metric::kL2, 0.0), 1u);
}

TEST(RecallQualityTest, ExactScoreOfEachMetric) {
  const std::vector<float> a = {3, 4};
  const std::vector<float> b = {4, 3};
  EXPECT_DOUBLE_EQ(ExactScore(Metric::kInnerProduct, a, b), 24);
  EXPECT_DOUBLE_EQ(ExactScore(Metric::kL2, a, b), 2);
  EXPECT_DOUBLE_EQ(ExactScore(Metric::kCosine, a, b), 24.0 / 25);
  EXPECT_DOUBLE_EQ(ExactScore(Metric::kCosine, a, std::vector<float>{0, 0}), 0);
}

}  // namespace
}  // namespace engram
