#include "index/estimate_agreement.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <set>
#include <vector>

#include "index/hnsw_search.h"
#include "src/core/hash.h"

namespace engram {
namespace {

constexpr size_t kCandidates = 66;

// What one node's candidates are estimated at and truly are.
struct Candidates {
  std::vector<float> estimates;
  std::vector<NeighbourKey> keys;

  void Add(float estimate, float distance) {
    estimates.push_back(estimate);
    keys.push_back(KeyOf(distance, static_cast<NodeId>(keys.size())));
  }
  float Displacement() const { return EstimateAgreement::Displacement(estimates, keys); }
};

float Unit(SplitMix64* random) { return static_cast<float>(random->Below(1 << 20)) / (1 << 20); }

// In any order; distances between -1 and 1, as they may be of inner products.
Candidates Drawn(uint64_t seed, float error, size_t count = kCandidates) {
  SplitMix64 random(seed);
  Candidates drawn;
  for (size_t i = 0; i < count; ++i) {
    const float distance = 2 * Unit(&random) - 1;
    drawn.Add(distance + error * (Unit(&random) - 0.5F), distance);
  }
  return drawn;
}
float MeanDisplacement(float error, size_t count = kCandidates) {
  float sum = 0;
  for (uint64_t seed = 0; seed < 200; ++seed) sum += Drawn(seed, error, count).Displacement();
  return sum / 200;
}
void Add(EstimateAgreement* agreement, NodeId node, const Candidates& candidates) {
  agreement->Add(node, candidates.estimates, candidates.keys);
}

TEST(EstimateAgreementTest, IsNothingWhereEstimatesHaveTheRightOrder) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    EXPECT_EQ(Drawn(seed, 0).Displacement(), 0) << seed;
    EXPECT_EQ(Drawn(seed, 0, 96).Displacement(), 0) << seed;
  }
}

TEST(EstimateAgreementTest, IsAHalfWhereEstimatesTellNothingAndOneWhereTheyAreWrong) {
  for (const size_t count : {48, 66, 96}) {
    EXPECT_NEAR(MeanDisplacement(1e6F, count), 0.5, 0.02) << count;
    EXPECT_NEAR(MeanDisplacement(1, count), MeanDisplacement(1, 66), 0.02) << count;
    Candidates wrong;
    for (size_t i = 0; i < count; ++i) {
      wrong.Add(-static_cast<float>(i), static_cast<float>(i));
    }
    EXPECT_FLOAT_EQ(wrong.Displacement(), 1) << count;
  }
  EXPECT_LT(MeanDisplacement(0.1F), 0.02);
  EXPECT_LT(MeanDisplacement(0.5F), MeanDisplacement(1) - 0.02F);
}

// Equal vectors are equally near, whichever are taken for the nearest; equal codes tell nothing.
TEST(EstimateAgreementTest, OfEqualDistancesThoseCountThatLookNearest) {
  SplitMix64 random(3);
  Candidates same_place;
  for (size_t i = 0; i < kCandidates; ++i) same_place.Add(Unit(&random), 1);
  EXPECT_EQ(same_place.Displacement(), 0);
  Candidates five_nearer;
  for (size_t i = 0; i < kCandidates; ++i) {
    five_nearer.Add(static_cast<float>(i), i < 61 ? 1.0F : 0.5F);
  }
  // Ranks 0 to 4, and 61 to 65.
  EXPECT_FLOAT_EQ(five_nearer.Displacement(), (325.0F / 10 - 4.5F) / 56);
  Candidates same_code;
  for (size_t i = 0; i < kCandidates; ++i) same_code.Add(7, static_cast<float>(i));
  EXPECT_FLOAT_EQ(same_code.Displacement(), 0.5);
}

TEST(EstimateAgreementTest, FewCandidatesTellNothing) {
  EstimateAgreement agreement;
  const Candidates few = Drawn(1, 1e6F, EstimateAgreement::kFewest - 1);
  EXPECT_EQ(few.Displacement(), 0);
  for (NodeId node = 0; node < 200; ++node) Add(&agreement, node, few);
  // Where some of them are on their way out estimates and distances are not of the same.
  Candidates uneven = Drawn(1, 1e6F);
  uneven.keys.pop_back();
  for (NodeId node = 0; node < 200; ++node) Add(&agreement, node, uneven);
  EXPECT_FALSE(agreement.IsDoubtful());
  EXPECT_EQ(agreement.mean(), 0);
  // Nor do they speak against what others tell.
  for (NodeId node = 0; node < 100; ++node) Add(&agreement, node, Drawn(node, 1e6F));
  EXPECT_TRUE(agreement.IsDoubtful());
  const float mean = agreement.mean();
  for (NodeId node = 0; node < 200; ++node) Add(&agreement, node, few);
  EXPECT_EQ(agreement.mean(), mean);
}

TEST(EstimateAgreementTest, DoubtComesWithSomeNodesAndNotWithAFew) {
  EstimateAgreement agreement;
  uint64_t seed = 0;
  for (; seed < 1'000; ++seed) {
    Add(&agreement, 0, Drawn(seed, 0.3F));
    EXPECT_FALSE(agreement.IsDoubtful());
  }
  EXPECT_EQ(agreement.disagreed().size(), 0u);
  // One in ten: a few that lie badly.
  for (; seed < 2'000; ++seed) {
    Add(&agreement, 1, Drawn(seed, seed % 10 == 0 ? 1e6F : 0.3F));
    EXPECT_FALSE(agreement.IsDoubtful()) << seed;
  }
  uint32_t useless = 0;
  NodeId node = 100;
  while (!agreement.IsDoubtful() && node < 200) {
    const Candidates drawn = Drawn(++seed, 1e6F);
    useless += static_cast<uint32_t>(drawn.Displacement() > EstimateAgreement::kUseless);
    Add(&agreement, node++, drawn);
  }
  EXPECT_LE(node, 100 + EstimateAgreement::kWindow);
  EXPECT_GE(node, 105u);
  EXPECT_GE(useless, (node - 100) / 2);
  const std::set<NodeId> disagreed(agreement.disagreed().begin(), agreement.disagreed().end());
  EXPECT_EQ(disagreed.size(), EstimateAgreement::kRemembered);
  EXPECT_GE(*disagreed.begin(), 100u) << "the last ones";
  agreement.Clear();
  EXPECT_FALSE(agreement.IsDoubtful());
  EXPECT_EQ(agreement.disagreed().size(), 0u);
}

TEST(EstimateAgreementTest, ItTakesAWindowToDoubtAtFirst) {
  EstimateAgreement agreement;
  for (NodeId node = 1; node <= EstimateAgreement::kWindow; ++node) {
    EXPECT_FALSE(agreement.IsDoubtful()) << node;
    Add(&agreement, node, Drawn(node, 1e6F));
  }
  EXPECT_TRUE(agreement.IsDoubtful());
}

}  // namespace
}  // namespace engram
