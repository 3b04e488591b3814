#include "src/core/latency_histogram.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

namespace engram {
namespace {

TEST(LatencyHistogramTest, EmptyIsZero) {
  const LatencyHistogram histogram;
  EXPECT_EQ(histogram.Count(), 0u);
  EXPECT_EQ(histogram.QuantileNs(0.5), 0);
}

int64_t Alone(int64_t duration_ns) {
  LatencyHistogram histogram;
  histogram.Record(duration_ns);
  return histogram.QuantileNs(1.0);
}

TEST(LatencyHistogramTest, SmallValuesAreExact) {
  for (int64_t ns = 0; ns < 32; ++ns) EXPECT_EQ(Alone(ns), ns);
}

TEST(LatencyHistogramTest, Extremes) {
  EXPECT_EQ(Alone(-1), 0);
  EXPECT_EQ(Alone(INT64_MIN), 0);
  EXPECT_EQ(Alone(INT64_MAX), INT64_MAX);
}

// Around every power of two, where a bucket ends and the next begins.
TEST(LatencyHistogramTest, EveryBucketEdgeIsWithinOneStep) {
  for (int bit = 5; bit < 63; ++bit) {
    for (int64_t offset = -2; offset <= 2; ++offset) {
      const int64_t ns = (int64_t{1} << bit) + offset;
      const int64_t bound = Alone(ns);
      ASSERT_GE(bound, ns);
      ASSERT_LE(bound - ns, ns / 16) << ns;
    }
  }
}

TEST(LatencyHistogramTest, QuantilesAreWithinOneSixteenth) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    std::mt19937_64 random(seed);
    // Spread evenly over the powers of two from 1 ns to some 18 minutes.
    std::uniform_real_distribution<double> exponent(0, 40);
    std::vector<int64_t> exact(1 + random() % 5'000);
    LatencyHistogram histogram;
    for (int64_t& ns : exact) {
      ns = static_cast<int64_t>(std::exp2(exponent(random)));
      histogram.Record(ns);
    }
    std::ranges::sort(exact);
    ASSERT_EQ(histogram.Count(), exact.size());
    for (const double quantile : {0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0}) {
      const auto rank =
          static_cast<size_t>(std::ceil(quantile * static_cast<double>(exact.size())));
      const int64_t want = exact[std::max<size_t>(rank, 1) - 1];
      const int64_t got = histogram.QuantileNs(quantile);
      ASSERT_GE(got, want) << "seed " << seed << " quantile " << quantile;
      ASSERT_LE(got - want, want / 16) << "seed " << seed << " quantile " << quantile;
    }
  }
}

TEST(LatencyHistogramTest, MergeIsTheSameAsRecordingInOne) {
  std::mt19937_64 random(1);
  LatencyHistogram parts[2];
  LatencyHistogram whole;
  for (int i = 0; i < 10'000; ++i) {
    const auto ns = static_cast<int64_t>(random() >> (1 + random() % 60));
    parts[i % 2].Record(ns);
    whole.Record(ns);
  }
  LatencyHistogram merged;
  for (const LatencyHistogram& part : parts) merged.Merge(part);
  EXPECT_EQ(merged.Count(), whole.Count());
  for (int percent = 0; percent <= 100; ++percent) {
    EXPECT_EQ(merged.QuantileNs(percent / 100.0), whole.QuantileNs(percent / 100.0));
  }
}

}  // namespace
}  // namespace engram
