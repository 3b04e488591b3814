// As in index/rabitq_format.cc, so that its targets are all tested here.
#define HWY_WANT_AVX3_DL

#include "index/rabitq_format.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "index/distance.h"
#include "index/random_rotation.h"
#include "src/core/arena_heap.h"
#include "src/core/huge_page_arena.h"
#include "src/core/observation.h"
#include "tests/index/real_vectors.h"
#include "tests/support/allocation_counter.h"

namespace engram {
namespace {

constexpr Metric kMetrics[] = {Metric::kCosine, Metric::kInnerProduct, Metric::kL2};
// Codes of every kind of last part: 1 to 8 words, with and without whole lines before them.
constexpr uint32_t kDimensions[] = {1,   2,    64,   65,   128,  129,  192,  200,  256, 257,
                                    320, 384,  385,  448,  512,  513,  640,  704,  768, 784,
                                    960, 1000, 1024, 1100, 1152, 1216, 1536, 3000, 4096};
constexpr uint64_t kSeed = 11;
constexpr float kLargest = std::numeric_limits<float>::max();

using Values = std::vector<float>;

Values Normal(uint32_t dimension, double scale, std::mt19937* random) {
  std::normal_distribution<double> normal;
  Values values(dimension);
  for (float& value : values) {
    value = static_cast<float>(
        std::clamp(normal(*random) * scale, -double{kLargest}, double{kLargest}));
  }
  return values;
}

Values RandomVector(Metric metric, uint32_t dimension, std::mt19937* random) {
  Values values = Normal(dimension, 1, random);
  if (metric == Metric::kCosine) NormaliseInPlace(values.data(), dimension);
  return values;
}

double ExactDistance(Metric metric, const Values& a, const Values& b) {
  double dot = 0;
  double squared = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    dot += double{a[i]} * double{b[i]};
    squared += (double{a[i]} - double{b[i]}) * (double{a[i]} - double{b[i]});
  }
  return metric == Metric::kL2 ? squared : metric == Metric::kCosine ? 1 - dot : -dot;
}

// Rows or queries side by side, every byte that was not written a NaN.
class Blocks {
 public:
  Blocks(size_t bytes, size_t count)
      : bytes_(bytes), memory_(bytes * count + 192, std::byte{0x7F}) {
    first_ = memory_.data() + (-reinterpret_cast<uintptr_t>(memory_.data()) % 64) + 64;
  }
  std::byte* operator[](size_t i) { return first_ + i * bytes_; }

 private:
  size_t bytes_;
  std::vector<std::byte> memory_;
  std::byte* first_;
};

struct RowFactors {
  float A, F, ones;
};
RowFactors FactorsOf(const RabitqFormat& format, const std::byte* row) {
  RowFactors factors;
  std::memcpy(&factors, row + format.bits() / 8, sizeof(factors));
  return factors;
}
bool BitOf(const std::byte* row, size_t i) {
  return (row[i / 8] >> (i % 8) & std::byte{1}) != std::byte{0};
}

// A format and what it should make of a vector, worked out in double from the rotated residual.
class Rig {
 public:
  Rig(Metric metric, uint32_t dimension, Values centroid)
      : metric_(metric), centroid_(std::move(centroid)), rotation_(dimension, kSeed) {
    Result<HugePageArena> arena = HugePageArena::Create(
        {.reserve_bytes = size_t{2} << 20, .huge_pages = HugePagePolicy::kOff});
    arena_ = std::make_unique<HugePageArena>(std::move(*arena));
    heap_ = std::make_unique<ArenaHeap>(arena_.get());
    format_ = RabitqFormat::Create(metric, dimension, centroid_.data(), kSeed, heap_.get());
  }
  Rig(Metric metric, uint32_t dimension, std::mt19937* random)
      : Rig(metric, dimension,
            Normal(dimension, metric == Metric::kCosine ? 0.3 / std::sqrt(dimension) : 0.3,
                   random)) {}

  const RabitqFormat& format() const { return *format_; }
  const Values& centroid() const { return centroid_; }

  std::vector<double> RotatedResidual(const Values& v) const {
    alignas(64) float rotated[kMaxDimension];
    Values residual(v.size());
    for (size_t i = 0; i < v.size(); ++i) residual[i] = v[i] - centroid_[i];
    rotation_.Rotate(residual.data(), rotated);
    return {rotated, rotated + rotation_.rotated_dimension()};
  }
  RowFactors OracleFactors(const Values& v) const {
    double squares = 0;
    double magnitudes = 0;
    double ones = 0;
    for (const double r : RotatedResidual(v)) {
      squares += r * r;
      magnitudes += std::fabs(r);
      ones += r > 0 ? 1 : 0;
    }
    const double slope = magnitudes > 0 ? squares / magnitudes : 0;
    double by_centroid = 0;
    for (size_t i = 0; i < v.size(); ++i) {
      by_centroid += (double{v[i]} - double{centroid_[i]}) * double{centroid_[i]};
    }
    const auto make = [ones](double constant, double factor) {
      return RowFactors{static_cast<float>(constant), static_cast<float>(factor),
                        static_cast<float>(ones)};
    };
    if (metric_ == Metric::kL2) return make(squares, -2 * slope);
    if (metric_ == Metric::kCosine) return make(squares / 2, -slope);
    return make(-by_centroid, -slope);
  }
  double OracleOffset(const Values& q) const {
    double squares = 0;
    double by_centroid = 0;
    for (size_t i = 0; i < q.size(); ++i) {
      const double residual = double{q[i]} - double{centroid_[i]};
      squares += residual * residual;
      by_centroid += double{q[i]} * double{centroid_[i]};
    }
    if (metric_ == Metric::kL2) return squares;
    return metric_ == Metric::kCosine ? squares / 2 : -by_centroid;
  }
  // s as 4 bits have it.
  std::vector<double> OracleQuantised(const Values& q) const {
    std::vector<double> s = RotatedResidual(q);
    const auto [low, high] = std::minmax_element(s.begin(), s.end());
    const double from = *low;
    const double step = (*high - *low) / 15;
    for (double& value : s) value = from + step * std::nearbyint((value - from) / step);
    return s;
  }
  static double SignedSum(const std::byte* row, const std::vector<double>& s) {
    double sum = 0;
    for (size_t i = 0; i < s.size(); ++i) sum += BitOf(row, i) ? s[i] : -s[i];
    return sum;
  }

 private:
  Metric metric_;
  Values centroid_;
  RandomRotation rotation_;
  std::unique_ptr<HugePageArena> arena_;
  std::unique_ptr<ArenaHeap> heap_;
  RabitqFormat* format_ = nullptr;
};

std::string Name(Metric metric, uint32_t dimension) {
  return std::string(MetricName(metric)) + " of " + std::to_string(dimension);
}

// Runs each test once with every instruction set that this machine has.
class RabitqFormatTest : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

TEST_P(RabitqFormatTest, ARowIsSignsAndFactors) {
  std::mt19937 random(1);
  for (const Metric metric : kMetrics) {
    for (const uint32_t dimension : kDimensions) {
      Rig rig(metric, dimension, &random);
      const RabitqFormat& format = rig.format();
      ASSERT_EQ(format.bits(), (dimension + 63) / 64 * 64);
      ASSERT_EQ(format.row_bytes() % 64, 0U);
      ASSERT_LT(format.row_bytes(), format.bits() / 8 + sizeof(RowFactors) + 64);
      Blocks rows(format.row_bytes(), 2);
      // One float off any alignment, with NaN behind: what Encode must not read.
      const Values v = RandomVector(metric, dimension, &random);
      Values input(dimension + 17, std::numeric_limits<float>::quiet_NaN());
      std::copy(v.begin(), v.end(), input.begin() + 1);
      format.Encode(input.data() + 1, rows[0]);
      const std::vector<double> r = rig.RotatedResidual(v);
      for (size_t i = 0; i < format.bits(); ++i) {
        ASSERT_EQ(BitOf(rows[0], i), r[i] > 0) << Name(metric, dimension) << " bit " << i;
      }
      const RowFactors found = FactorsOf(format, rows[0]);
      const RowFactors oracle = rig.OracleFactors(v);
      ASSERT_NEAR(found.A, oracle.A, 1e-5 * (1 + std::fabs(oracle.A))) << Name(metric, dimension);
      ASSERT_NEAR(found.F, oracle.F, 1e-5 * std::fabs(oracle.F)) << Name(metric, dimension);
      ASSERT_EQ(found.ones, oracle.ones) << Name(metric, dimension);
      for (size_t i = format.bits() / 8 + sizeof(RowFactors); i < format.row_bytes(); ++i) {
        ASSERT_EQ(rows[0][i], std::byte{0}) << Name(metric, dimension) << " at " << i;
      }
      ASSERT_EQ(rows[1][0], std::byte{0x7F}) << "wrote beyond the row";
    }
  }
}

// Each bit of a code meets its own number of the query, with the weight of each plane: a lane, a
// plane or a part of a code that is lost or met twice is seen here.
TEST_P(RabitqFormatTest, EveryBitMeetsItsNumber) {
  std::mt19937 random(2);
  for (const uint32_t dimension : kDimensions) {
    Rig rig(Metric::kL2, dimension, &random);
    const RabitqFormat& format = rig.format();
    const Values q = RandomVector(Metric::kL2, dimension, &random);
    Blocks queries(format.query_bytes(), 2);
    format.EncodeQuery(q.data(), queries[0]);
    ASSERT_EQ(queries[1][0], std::byte{0x7F}) << "wrote beyond the query";
    const std::vector<double> s = rig.OracleQuantised(q);
    const double sum = std::accumulate(s.begin(), s.end(), 0.0);
    const double offset = rig.OracleOffset(q);
    double magnitude = offset;
    for (const double value : s) magnitude += std::fabs(value);
    Blocks rows(format.row_bytes(), 1);
    std::memset(rows[0], 0, format.row_bytes());
    const size_t step = dimension > 1000 ? 7 : 1;
    for (size_t i = 0; i < format.bits(); i += step) {
      const RowFactors factors = {0, 1, 1};
      std::memcpy(rows[0] + format.bits() / 8, &factors, sizeof(factors));
      rows[0][i / 8] = std::byte{1} << (i % 8);
      const float found = format.distance()(queries[0], rows[0], format.bits());
      // A wrong number would be off by a step, 1/15 of some 6.
      ASSERT_NEAR(found, offset + 2 * s[i] - sum, 2e-6 * magnitude) << dimension << " bit " << i;
      rows[0][i / 8] = std::byte{0};
    }
  }
}

TEST_P(RabitqFormatTest, EstimatesByItsFormula) {
  std::mt19937 random(3);
  for (const Metric metric : kMetrics) {
    for (const uint32_t dimension : kDimensions) {
      // Of one number all that comes out is alike, so that a tie may be rounded either way.
      if (dimension < 64) continue;
      Rig rig(metric, dimension, &random);
      const RabitqFormat& format = rig.format();
      Blocks rows(format.row_bytes(), 1);
      Blocks queries(format.query_bytes(), 1);
      const Values x = RandomVector(metric, dimension, &random);
      const Values q = RandomVector(metric, dimension, &random);
      format.Encode(x.data(), rows[0]);
      format.EncodeQuery(q.data(), queries[0]);
      const RowFactors factors = rig.OracleFactors(x);
      const std::vector<double> s = rig.OracleQuantised(q);
      double magnitude = std::fabs(factors.A) + std::fabs(rig.OracleOffset(q));
      for (const double value : s) magnitude += std::fabs(double{factors.F} * value);
      const double expected =
          factors.A + rig.OracleOffset(q) + factors.F * Rig::SignedSum(rows[0], s);
      ASSERT_NEAR(format.distance()(queries[0], rows[0], format.bits()), expected, 1e-5 * magnitude)
          << Name(metric, dimension);
    }
  }
}

TEST_P(RabitqFormatTest, ManyRowsGiveTheSameBitsAsOne) {
  std::mt19937 random(4);
  for (const uint32_t dimension : kDimensions) {
    Rig rig(Metric::kL2, dimension, &random);
    const RabitqFormat& format = rig.format();
    constexpr size_t kRows = 35;
    Blocks rows(format.row_bytes(), kRows);
    Blocks queries(format.query_bytes(), 1);
    std::vector<const std::byte*> pointers;
    for (size_t i = 0; i < kRows; ++i) {
      format.Encode(RandomVector(Metric::kL2, dimension, &random).data(), rows[i]);
      pointers.push_back(rows[i]);
    }
    // All ones and all zeros, so that sums are at their limits.
    std::memset(rows[3], 0xFF, format.bits() / 8);
    std::memset(rows[4], 0, format.bits() / 8);
    std::shuffle(pointers.begin(), pointers.end(), random);
    format.EncodeQuery(RandomVector(Metric::kL2, dimension, &random).data(), queries[0]);
    for (size_t count = 0; count <= kRows; ++count) {
      std::vector<float> found(count + 1, 42.0F);
      format.distances()(queries[0], pointers.data(), count, format.bits(), found.data());
      for (size_t i = 0; i < count; ++i) {
        ASSERT_EQ(found[i], format.distance()(queries[0], pointers[i], format.bits()))
            << dimension << " row " << i << " of " << count;
      }
      ASSERT_EQ(found[count], 42.0F) << "wrote beyond the last";
    }
  }
}

// A query whose numbers are all the largest but one, and a code of ones: every sum at its limit.
TEST_P(RabitqFormatTest, SumsAtTheirLimits) {
  for (const uint32_t dimension : {768U, 4096U}) {
    const Rig rig(Metric::kL2, dimension, Values(dimension, 0.0F));
    const RabitqFormat& format = rig.format();
    // The query that is rotated to (-1, 1, 1, ...): the rotation's transpose, row by row.
    const RandomRotation rotation(dimension, kSeed);
    Values q(dimension);
    alignas(64) float rotated[kMaxDimension];
    for (uint32_t i = 0; i < dimension; ++i) {
      Values unit(dimension, 0.0F);
      unit[i] = 1;
      rotation.Rotate(unit.data(), rotated);
      q[i] = static_cast<float>(std::accumulate(rotated, rotated + dimension, 0.0) -
                                2 * double{rotated[0]});
    }
    Blocks queries(format.query_bytes(), 1);
    Blocks rows(format.row_bytes(), 1);
    format.EncodeQuery(q.data(), queries[0]);
    std::memset(rows[0], 0, format.row_bytes());
    std::memset(rows[0], 0xFF, format.bits() / 8);
    const RowFactors factors = {0, 1, static_cast<float>(dimension)};
    std::memcpy(rows[0] + format.bits() / 8, &factors, sizeof(factors));
    const std::byte* pointers[8];
    std::fill(std::begin(pointers), std::end(pointers), rows[0]);
    float found[8];
    format.distances()(queries[0], pointers, 8, format.bits(), found);
    for (const float estimate : found) {
      // offset = |q|^2 = dimension; the sum is dimension - 2.
      EXPECT_NEAR(estimate, 2.0 * dimension - 2, 1e-4 * dimension);
      EXPECT_EQ(estimate, format.distance()(queries[0], rows[0], format.bits()));
    }
  }
}

TEST_P(RabitqFormatTest, IsUnbiasedAndAsCloseAsThePaperSays) {
  std::mt19937 random(5);
  for (const Metric metric : kMetrics) {
    for (const uint32_t dimension : {128U, 384U, 768U, 1024U}) {
      Rig rig(metric, dimension, &random);
      const RabitqFormat& format = rig.format();
      Blocks rows(format.row_bytes(), 1);
      Blocks queries(format.query_bytes(), 1);
      double errors = 0;
      double squares = 0;
      constexpr int kPairs = 1000;
      for (int pair = 0; pair < kPairs; ++pair) {
        // Pairs from far to near, as a search meets them.
        const Values x = RandomVector(metric, dimension, &random);
        const Values other = RandomVector(metric, dimension, &random);
        Values q(dimension);
        const float near = static_cast<float>(pair % 4) / 4;
        for (uint32_t i = 0; i < dimension; ++i) q[i] = near * x[i] + (1 - near) * other[i];
        if (metric == Metric::kCosine) NormaliseInPlace(q.data(), dimension);
        format.Encode(x.data(), rows[0]);
        format.EncodeQuery(q.data(), queries[0]);
        double x_norm = 0;
        double q_norm = 0;
        for (const double r : rig.RotatedResidual(x)) x_norm += r * r;
        for (const double s : rig.RotatedResidual(q)) q_norm += s * s;
        const double unit =
            std::sqrt(x_norm * q_norm / dimension) * (metric == Metric::kL2 ? 2 : 1);
        const double error =
            (format.distance()(queries[0], rows[0], format.bits()) - ExactDistance(metric, x, q)) /
            unit;
        ASSERT_LT(std::fabs(error), 4.5) << Name(metric, dimension);
        errors += error;
        squares += error * error;
      }
      EXPECT_LT(std::sqrt(squares / kPairs), 0.85) << Name(metric, dimension);
      EXPECT_NEAR(errors / kPairs, 0, 0.1) << Name(metric, dimension);
    }
  }
}

// A vector times a power of two has the same code, and every product of two four times that power:
// nothing is lost on the way, however large or small the vectors are.
TEST_P(RabitqFormatTest, KnowsTheScaleOfItsVectors) {
  std::mt19937 random(7);
  for (const Metric metric : {Metric::kInnerProduct, Metric::kL2}) {
    for (const uint32_t dimension : {3U, 768U}) {
      const Values centroid = Normal(dimension, 0.3, &random);
      const Values x = RandomVector(metric, dimension, &random);
      const Values q = RandomVector(metric, dimension, &random);
      float expected = 0;
      for (const int exponent : {0, -61, -40, -1, 1, 40, 57}) {
        const auto scaled = [exponent](Values v) {
          for (float& value : v) value = std::ldexp(value, exponent);
          return v;
        };
        const Rig rig(metric, dimension, scaled(centroid));
        const RabitqFormat& format = rig.format();
        Blocks rows(format.row_bytes(), 1);
        Blocks queries(format.query_bytes(), 1);
        format.Encode(scaled(x).data(), rows[0]);
        format.EncodeQuery(scaled(q).data(), queries[0]);
        const float found = format.distance()(queries[0], rows[0], format.bits());
        if (exponent == 0) expected = found;
        // Below 2^-126 a float has fewer digits.
        ASSERT_NEAR(std::ldexp(double{found}, -2 * exponent), expected, 1e-5 * std::fabs(expected))
            << Name(metric, dimension) << " by 2^" << exponent;
      }
    }
  }
}

// Whatever is stored and whatever is asked, an estimate is a number. Vectors that are alike have
// like estimates.
TEST_P(RabitqFormatTest, DegenerateVectorsGiveNumbers) {
  std::mt19937 random(8);
  for (const Metric metric : kMetrics) {
    for (const uint32_t dimension : {1U, 64U, 100U, 4096U}) {
      std::vector<Values> vectors;
      vectors.emplace_back(dimension, 0.0F);
      vectors.emplace_back(dimension, kLargest);
      vectors.emplace_back(dimension, -kLargest);
      vectors.emplace_back(dimension, 1.0F);
      vectors.emplace_back(dimension, std::numeric_limits<float>::denorm_min());
      vectors.push_back(Normal(dimension, 1e38, &random));
      vectors.push_back(Normal(dimension, 1e-41, &random));
      vectors.push_back(Normal(dimension, 1, &random));
      for (size_t j = 0; j < 3; ++j) {
        vectors.emplace_back(dimension, 0.0F);
        vectors.back()[dimension - 1] = j == 0 ? kLargest : j == 1 ? 1e-45F : 1;
      }
      if (metric == Metric::kCosine) {
        for (Values& v : vectors) NormaliseInPlace(v.data(), dimension);
      }
      for (const Values& centroid : vectors) {
        const Rig rig(metric, dimension, centroid);
        const RabitqFormat& format = rig.format();
        Blocks rows(format.row_bytes(), vectors.size());
        Blocks queries(format.query_bytes(), 1);
        std::vector<const std::byte*> pointers;
        for (size_t i = 0; i < vectors.size(); ++i) {
          format.Encode(vectors[i].data(), rows[i]);
          pointers.push_back(rows[i]);
          const RowFactors factors = FactorsOf(format, rows[i]);
          ASSERT_TRUE(std::isfinite(factors.A) && std::isfinite(factors.F));
          if (&vectors[i] == &centroid) {
            ASSERT_EQ(factors.F, 0.0F);
          }
        }
        for (const Values& q : vectors) {
          format.EncodeQuery(q.data(), queries[0]);
          std::vector<float> found(vectors.size());
          format.distances()(queries[0], pointers.data(), found.size(), format.bits(),
                             found.data());
          for (size_t i = 0; i < found.size(); ++i) {
            ASSERT_TRUE(std::isfinite(found[i])) << Name(metric, dimension);
            ASSERT_EQ(found[i], format.distance()(queries[0], rows[i], format.bits()));
          }
        }
      }
    }
  }
}

// The centroid itself: no direction, and its distance is known exactly.
TEST_P(RabitqFormatTest, TheCentroidIsExact) {
  std::mt19937 random(9);
  for (const Metric metric : kMetrics) {
    Values centroid = RandomVector(metric, 100, &random);
    const Rig rig(metric, 100, centroid);
    const RabitqFormat& format = rig.format();
    const Values q = RandomVector(metric, 100, &random);
    Blocks rows(format.row_bytes(), 1);
    Blocks queries(format.query_bytes(), 2);
    format.Encode(centroid.data(), rows[0]);
    format.EncodeQuery(q.data(), queries[0]);
    EXPECT_NEAR(format.distance()(queries[0], rows[0], format.bits()),
                ExactDistance(metric, centroid, q), 1e-4);
    format.EncodeQuery(centroid.data(), queries[1]);
    EXPECT_NEAR(format.distance()(queries[1], rows[0], format.bits()),
                ExactDistance(metric, centroid, centroid), 1e-4);
  }
}

// Codes that one machine wrote are read by another; the factors agree to rounding.
TEST_P(RabitqFormatTest, AgreesWithTheOtherTargets) {
  std::mt19937 random(10);
  for (const uint32_t dimension : kDimensions) {
    Rig rig(Metric::kL2, dimension, &random);
    const Values x = RandomVector(Metric::kL2, dimension, &random);
    const Values q = RandomVector(Metric::kL2, dimension, &random);
    Blocks rows(rig.format().row_bytes(), 2);
    Blocks queries(rig.format().query_bytes(), 2);
    rig.format().Encode(x.data(), rows[0]);
    rig.format().EncodeQuery(q.data(), queries[0]);
    const float found = rig.format().distance()(queries[0], rows[0], rig.format().bits());
    for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
      hwy::SetSupportedTargetsForTest(target);
      Rig other(Metric::kL2, dimension, rig.centroid());
      other.format().Encode(x.data(), rows[1]);
      other.format().EncodeQuery(q.data(), queries[1]);
      ASSERT_EQ(std::memcmp(rows[0], rows[1], other.format().bits() / 8), 0) << dimension;
      const float there = other.format().distance()(queries[1], rows[1], other.format().bits());
      ASSERT_NEAR(there, found, 1e-5 * (1 + std::fabs(found))) << dimension;
      // The same bytes by the other kernel.
      ASSERT_NEAR(other.format().distance()(queries[0], rows[0], other.format().bits()), found,
                  1e-6 * (1 + std::fabs(found)))
          << dimension;
    }
    hwy::SetSupportedTargetsForTest(GetParam());
  }
}

// The true ten nearest of 2,000 images are among the forty that look nearest.
TEST_P(RabitqFormatTest, KeepsTheOrderOfRealVectors) {
  TestVectors data;
  TestVectors queries;
  const std::string missing = LoadFashionMnist(2000, 20, &data, &queries);
  if (!missing.empty()) GTEST_SKIP() << missing;
  for (const Metric metric : kMetrics) {
    if (metric == Metric::kCosine) {
      for (TestVectors* vectors : {&data, &queries}) {
        for (size_t i = 0; i < vectors->size(); ++i) {
          NormaliseInPlace(&vectors->values[i * vectors->dimension], vectors->dimension);
        }
      }
    }
    const auto vector = [](const TestVectors& from, size_t i) {
      return Values(from[i].begin(), from[i].end());
    };
    Values centroid(data.dimension, 0.0F);
    for (size_t i = 0; i < data.size(); ++i) {
      for (size_t j = 0; j < data.dimension; ++j) {
        centroid[j] += data[i][j] / static_cast<float>(data.size());
      }
    }
    const Rig rig(metric, data.dimension, centroid);
    const RabitqFormat& format = rig.format();
    Blocks rows(format.row_bytes(), data.size());
    Blocks query(format.query_bytes(), 1);
    std::vector<const std::byte*> pointers;
    for (size_t i = 0; i < data.size(); ++i) {
      format.Encode(data[i].data(), rows[i]);
      pointers.push_back(rows[i]);
    }
    size_t kept = 0;
    for (size_t j = 0; j < queries.size(); ++j) {
      format.EncodeQuery(queries[j].data(), query[0]);
      std::vector<float> estimates(data.size());
      format.distances()(query[0], pointers.data(), data.size(), format.bits(), estimates.data());
      std::vector<std::pair<double, size_t>> near;
      std::vector<std::pair<double, size_t>> looks_near;
      for (size_t i = 0; i < data.size(); ++i) {
        near.emplace_back(ExactDistance(metric, vector(data, i), vector(queries, j)), i);
        looks_near.emplace_back(estimates[i], i);
      }
      std::partial_sort(near.begin(), near.begin() + 10, near.end());
      std::partial_sort(looks_near.begin(), looks_near.begin() + 40, looks_near.end());
      for (size_t k = 0; k < 10; ++k) {
        kept += static_cast<size_t>(
            std::any_of(looks_near.begin(), looks_near.begin() + 40,
                        [&](const auto& candidate) { return candidate.second == near[k].second; }));
      }
    }
    EXPECT_GT(static_cast<double>(kept) / static_cast<double>(10 * queries.size()), 0.93)
        << MetricName(metric);
  }
}

TEST_P(RabitqFormatTest, AllocatesNothing) {
  if (!AllocationsAreCounted()) GTEST_SKIP() << "a sanitizer counts allocations itself";
  std::mt19937 random(11);
  Rig rig(Metric::kCosine, 768, &random);
  const RabitqFormat& format = rig.format();
  const Values v = RandomVector(Metric::kCosine, 768, &random);
  Blocks rows(format.row_bytes(), 1);
  Blocks queries(format.query_bytes(), 1);
  const std::byte* pointers[] = {rows[0], rows[0], rows[0]};
  float found[3];
  const uint64_t before = AllocationCount();
  format.Encode(v.data(), rows[0]);
  format.EncodeQuery(v.data(), queries[0]);
  format.distances()(queries[0], pointers, 3, format.bits(), found);
  EXPECT_EQ(AllocationCount(), before);
}

INSTANTIATE_TEST_SUITE_P(Targets, RabitqFormatTest,
                         testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         [](const testing::TestParamInfo<int64_t>& target) {
                           return std::string(hwy::TargetName(target.param));
                         });

// A target that the kernels were not compiled for would quietly be tested as another one.
TEST(RabitqTargetsTest, EachHasKernelsOfItsOwn) {
  const std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  std::set<DistanceFn> one;
  std::set<DistancesFn> many;
  for (const int64_t target : targets) {
    hwy::SetSupportedTargetsForTest(target);
    const Rig rig(Metric::kL2, 64, Values(64, 0.0F));
    one.insert(rig.format().distance());
    many.insert(rig.format().distances());
  }
  EXPECT_EQ(one.size(), targets.size());
  EXPECT_EQ(many.size(), targets.size());
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(RabitqMemoryTest, TakesOneBlockAndGivesItBack) {
  Result<HugePageArena> arena =
      HugePageArena::Create({.reserve_bytes = size_t{2} << 20, .huge_pages = HugePagePolicy::kOff});
  ArenaHeap heap(&*arena);
  const Values centroid(4096, 0.5F);
  std::vector<RabitqFormat*> formats;
  while (true) {
    RabitqFormat* const format = RabitqFormat::Create(Metric::kL2, 4096, centroid.data(), 1, &heap);
    if (format == nullptr) break;
    EXPECT_EQ(format->centroid()[4095], 0.5F);
    formats.push_back(format);
  }
  EXPECT_GT(formats.size(), 50U);
  for (RabitqFormat* const format : formats) RabitqFormat::Destroy(format, &heap);
  RabitqFormat::Destroy(nullptr, &heap);
  EXPECT_EQ(heap.live_bytes(), 0U);
}

}  // namespace
}  // namespace engram
