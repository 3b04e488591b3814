#include "index/distance.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "src/core/observation.h"

namespace engram {
namespace {

constexpr Metric kMetrics[] = {Metric::kCosine, Metric::kInnerProduct, Metric::kL2};

// Rows as a VectorStore has them; a guard of NaN behind the last would spoil a kernel that reads
// on.
class Rows {
 public:
  Rows(size_t count, size_t dimension, uint32_t seed)
      : dimension_(dimension), padded_(PaddedDimension(dimension)) {
    values_.assign(count * padded_ + 2 * kRowFloats, std::numeric_limits<float>::quiet_NaN());
    const auto address = reinterpret_cast<uintptr_t>(values_.data());
    first_ = values_.data() + (-address % 64) / sizeof(float);
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (size_t row = 0; row < count; ++row) {
      for (size_t i = 0; i < padded_; ++i) (*this)[row][i] = i < dimension ? normal(random) : 0.0F;
    }
  }
  float* operator[](size_t row) { return first_ + row * padded_; }
  size_t dimension() const { return dimension_; }
  size_t padded() const { return padded_; }

 private:
  size_t dimension_;
  size_t padded_;
  std::vector<float> values_;
  float* first_;
};

struct Oracle {
  double distance = 0;
  double magnitude = 0;  // sum of the terms' magnitudes: what the rounding error scales with
};
Oracle OracleDistance(Metric metric, const float* a, const float* b, size_t dimension) {
  Oracle oracle;
  double sum = 0;
  for (size_t i = 0; i < dimension; ++i) {
    const double difference = double{a[i]} - double{b[i]};
    const double term =
        metric == Metric::kL2 ? difference * difference : double{a[i]} * double{b[i]};
    sum += term;
    oracle.magnitude += std::fabs(term);
  }
  oracle.distance = metric == Metric::kL2 ? sum : metric == Metric::kCosine ? 1 - sum : -sum;
  return oracle;
}

// Runs each test once with every instruction set that this machine has.
class DistanceTest : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

std::vector<size_t> Dimensions() {
  std::vector<size_t> dimensions;
  for (size_t dimension = 1; dimension <= 130; ++dimension) dimensions.push_back(dimension);
  for (const size_t dimension : {384, 768, 784, 1000, 4096}) dimensions.push_back(dimension);
  return dimensions;
}

TEST_P(DistanceTest, AgreesWithDoublePrecision) {
  for (const Metric metric : kMetrics) {
    const DistanceFn distance = DistanceFunction(metric);
    for (const size_t dimension : Dimensions()) {
      Rows rows(2, dimension, static_cast<uint32_t>(dimension));
      const Oracle oracle = OracleDistance(metric, rows[0], rows[1], dimension);
      EXPECT_NEAR(distance(rows[0], rows[1], rows.padded()), oracle.distance,
                  1e-6 * (1 + oracle.magnitude))
          << MetricName(metric) << " of " << dimension;
    }
  }
}

TEST_P(DistanceTest, KnowsTheMetrics) {
  Rows rows(2, 3, 1);
  const float a[3] = {1, 0, 0};
  const float b[3] = {0.6F, 0.8F, 0};
  std::copy(a, a + 3, rows[0]);
  std::copy(b, b + 3, rows[1]);
  EXPECT_FLOAT_EQ(DistanceFunction(Metric::kCosine)(rows[0], rows[1], 16), 0.4F);
  EXPECT_FLOAT_EQ(DistanceFunction(Metric::kInnerProduct)(rows[0], rows[1], 16), -0.6F);
  EXPECT_FLOAT_EQ(DistanceFunction(Metric::kL2)(rows[0], rows[1], 16), 0.8F);
}

TEST_P(DistanceTest, SquaredNormNeedsNoAlignment) {
  Rows rows(1, 200, 3);
  for (size_t start = 0; start < 17; ++start) {
    for (size_t count = 0; count <= 130; ++count) {
      double expected = 0;
      for (size_t i = 0; i < count; ++i) expected += std::pow(double{rows[0][start + i]}, 2);
      ASSERT_NEAR(SquaredNorm(rows[0] + start, count), expected, 1e-6 * (1 + expected))
          << "from " << start << " count " << count;
    }
  }
}

// A norm by float squares would be 0 below 1e-23 and infinite above 1e19.
TEST_P(DistanceTest, NormalisesTinyAndHugeValues) {
  for (const double scale : {1e-42, 1e-38, 1e-30, 1e-10, 1.0, 1e10, 1e30, 3e37}) {
    for (const size_t dimension : {size_t{1}, size_t{3}, size_t{17}, size_t{768}, size_t{4096}}) {
      Rows reference(1, dimension, 5);
      std::vector<float> v(dimension + 1, 42.0F);
      std::vector<double> exact(dimension);
      double norm = 0;
      for (size_t i = 0; i < dimension; ++i) {
        v[i] = static_cast<float>(reference[0][i] * scale);
        exact[i] = double{v[i]};
        norm += exact[i] * exact[i];
      }
      norm = std::sqrt(norm);
      ASSERT_TRUE(NormaliseInPlace(v.data(), dimension)) << scale;
      for (size_t i = 0; i < dimension; ++i) {
        ASSERT_NEAR(v[i], exact[i] / norm, 1e-7) << "scale " << scale << " dimension " << dimension;
      }
      EXPECT_EQ(v[dimension], 42.0F) << "wrote beyond the vector";
    }
  }
}

TEST_P(DistanceTest, AZeroVectorHasNoDirection) {
  std::vector<float> v(100, 0.0F);
  v[3] = -0.0F;
  EXPECT_FALSE(NormaliseInPlace(v.data(), v.size()));
  for (const float value : v) EXPECT_EQ(value, 0.0F);
  v[99] = std::numeric_limits<float>::denorm_min();
  EXPECT_TRUE(NormaliseInPlace(v.data(), v.size()));
  EXPECT_EQ(v[99], 1.0F);
}

INSTANTIATE_TEST_SUITE_P(Targets, DistanceTest,
                         testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         [](const testing::TestParamInfo<int64_t>& target) {
                           return std::string(hwy::TargetName(target.param));
                         });

}  // namespace
}  // namespace engram
