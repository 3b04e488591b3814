// As in index/distance.cc, so that its targets are all tested here.
#define HWY_WANT_AVX3_DL

#include "index/distance.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "src/core/observation.h"

namespace engram {
namespace {

constexpr Metric kMetrics[] = {Metric::kCosine, Metric::kInnerProduct, Metric::kL2};
constexpr Precision kPrecisions[] = {Precision::kF32, Precision::kBf16, Precision::kInt8};

// Rows side by side as a VectorStore has them, written by hand so that no fault of the encoder can
// hide one of a kernel. Before the first and behind the last row stand bytes that would spoil a
// kernel that reads beyond its rows: NaN as f32 and bf16, a large number as int8.
class Rows {
 public:
  static constexpr size_t kGuardBytes = 512;

  // The first row starts `line` cache lines into a page.
  Rows(Precision precision, size_t count, size_t dimension, size_t line)
      : precision_(precision),
        dimension_(dimension),
        padded_(PaddedDimension(precision, dimension)) {
    const size_t element = precision == Precision::kF32 ? 4 : precision == Precision::kBf16 ? 2 : 1;
    row_bytes_ = padded_ * element + (precision == Precision::kInt8 ? sizeof(Int8Trailer) : 0);
    memory_.assign(kPage + line * 64 + count * row_bytes_ + 2 * kGuardBytes, std::byte{0x7F});
    auto* const start = memory_.data() + kGuardBytes;
    first_ = start + (-reinterpret_cast<uintptr_t>(start) % kPage) + line * 64;
    std::memset(static_cast<void*>(first_), 0, count * row_bytes_);
    for (size_t row = 0; row < count && precision == Precision::kInt8; ++row) SetScale(row, 1);
  }

  std::byte* operator[](size_t row) { return first_ + row * row_bytes_; }
  size_t padded() const { return padded_; }
  size_t dimension() const { return dimension_; }

  double Get(size_t row, size_t i) {
    switch (precision_) {
      case Precision::kF32:
        return double{At<float>(row, i)};
      case Precision::kBf16:
        return double{std::bit_cast<float>(uint32_t{At<uint16_t>(row, i)} << 16)};
      default:
        return At<int8_t>(row, i) * TrailerOf(row).scale;
    }
  }
  // Stores the number, or what is left of it in this precision: bf16 is cut off, int8 takes the
  // whole number as it is, whatever the scale.
  void Set(size_t row, size_t i, float value) {
    switch (precision_) {
      case Precision::kF32:
        At<float>(row, i) = value;
        return;
      case Precision::kBf16:
        At<uint16_t>(row, i) = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
        return;
      default:
        At<int8_t>(row, i) = static_cast<int8_t>(value);
        SetScale(row, TrailerOf(row).scale);
    }
  }
  // The trailer that belongs to the row's numbers.
  void SetScale(size_t row, double scale) {
    Int8Trailer trailer = {};
    for (size_t i = 0; i < dimension_; ++i) {
      const int8_t number = At<int8_t>(row, i);
      trailer.sum += number;
      trailer.squares += number * number;
    }
    trailer.scale = scale;
    std::memcpy((*this)[row] + padded_, &trailer, sizeof(trailer));
  }
  Int8Trailer TrailerOf(size_t row) {
    Int8Trailer trailer;
    std::memcpy(&trailer, (*this)[row] + padded_, sizeof(trailer));
    return trailer;
  }

  void FillAtRandom(size_t row, std::mt19937* random) {
    std::normal_distribution<float> normal;
    std::uniform_int_distribution<int> whole(-127, 127);
    for (size_t i = 0; i < dimension_; ++i) {
      if (precision_ == Precision::kInt8) {
        At<int8_t>(row, i) = static_cast<int8_t>(whole(*random));
      } else {
        Set(row, i, normal(*random));
      }
    }
    if (precision_ == Precision::kInt8) SetScale(row, 0.001 + 0.01 * std::fabs(normal(*random)));
  }

 private:
  static constexpr size_t kPage = 4096;

  template <typename T>
  T& At(size_t row, size_t i) {
    return reinterpret_cast<T*>((*this)[row])[i];
  }

  Precision precision_;
  size_t dimension_;
  size_t padded_;
  size_t row_bytes_;
  std::vector<std::byte> memory_;
  std::byte* first_;
};

struct Oracle {
  double distance = 0;
  double magnitude = 0;  // sum of the terms' magnitudes: what the rounding error scales with
};
Oracle OracleDistance(Metric metric, Rows* rows, size_t a, size_t b) {
  Oracle oracle;
  double sum = 0;
  for (size_t i = 0; i < rows->dimension(); ++i) {
    const double left = rows->Get(a, i);
    const double right = rows->Get(b, i);
    const double term = metric == Metric::kL2 ? (left - right) * (left - right) : left * right;
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
  for (const size_t dimension : {255, 256, 300, 384, 768, 784, 1024, 1536, 4095, 4096}) {
    dimensions.push_back(dimension);
  }
  return dimensions;
}

std::string Name(Precision precision, Metric metric, size_t dimension) {
  return std::string(PrecisionName(precision)) + " " + std::string(MetricName(metric)) + " of " +
         std::to_string(dimension);
}

TEST_P(DistanceTest, AgreesWithDoublePrecision) {
  // Up to 1,024 additions in float follow each other where a register has one lane. A lost number
  // of 4,096 would be 80 times this.
  constexpr double kTolerance = 3e-6;
  std::mt19937 random(1);
  for (const Precision precision : kPrecisions) {
    for (const size_t dimension : Dimensions()) {
      Rows rows(precision, 3, dimension, random() % 64);
      for (size_t row = 0; row < 3; ++row) rows.FillAtRandom(row, &random);
      for (const Metric metric : kMetrics) {
        const DistanceFn distance = DistanceFunction(precision, metric);
        for (const auto& [a, b] : {std::pair(0, 1), {1, 2}, {0, 2}}) {
          const Oracle oracle = OracleDistance(metric, &rows, a, b);
          const float found = distance(rows[a], rows[b], rows.padded());
          ASSERT_NEAR(found, oracle.distance, kTolerance * (1 + oracle.magnitude))
              << Name(precision, metric, dimension);
          ASSERT_EQ(distance(rows[b], rows[a], rows.padded()), found)
              << "not symmetric: " << Name(precision, metric, dimension);
        }
      }
    }
  }
}

// Each number counts once, wherever it stands: a lane that is lost, or that meets another lane, is
// seen here even if its share of a long sum is small.
TEST_P(DistanceTest, EveryNumberCounts) {
  std::mt19937 random(2);
  for (const Precision precision : kPrecisions) {
    const DistanceFn distance = DistanceFunction(precision, Metric::kInnerProduct);
    for (const size_t dimension : {1, 65, 130, 300, 784}) {
      Rows rows(precision, 2, dimension, 0);
      for (size_t i = 0; i < dimension; ++i) rows.Set(1, i, static_cast<float>(i % 101) - 50.5F);
      for (size_t i = 0; i < dimension; ++i) {
        rows.Set(0, i, -3.0F);
        ASSERT_EQ(distance(rows[0], rows[1], rows.padded()), 3 * rows.Get(1, i))
            << Name(precision, Metric::kInnerProduct, dimension) << " at " << i;
        ASSERT_EQ(distance(rows[1], rows[0], rows.padded()), 3 * rows.Get(1, i))
            << Name(precision, Metric::kInnerProduct, dimension) << " at " << i;
        rows.Set(0, i, 0.0F);
      }
    }
  }
}

// All instruction sets make the same int32 sum, so that a distance can be told exactly.
TEST_P(DistanceTest, SumsOfInt8AreExact) {
  std::mt19937 random(3);
  const DistanceFn distance = DistanceFunction(Precision::kInt8, Metric::kInnerProduct);
  for (const size_t dimension : Dimensions()) {
    Rows rows(Precision::kInt8, 2, dimension, 1);
    for (int round = 0; round < 3; ++round) {
      for (const size_t row : {0, 1}) {
        rows.FillAtRandom(row, &random);
        rows.SetScale(row, 1);
      }
      int64_t sum = 0;
      for (size_t i = 0; i < dimension; ++i) {
        sum += static_cast<int64_t>(rows.Get(0, i) * rows.Get(1, i));
      }
      ASSERT_EQ(distance(rows[0], rows[1], rows.padded()), static_cast<float>(-sum)) << dimension;
    }
  }
}

// An instruction that saturates at 16 bits, or a product of unsigned by signed without its
// correction, fails on these.
TEST_P(DistanceTest, Int8AtItsLimits) {
  const DistanceFn distance = DistanceFunction(Precision::kInt8, Metric::kInnerProduct);
  for (const size_t dimension : {64, 100, 768, 4095, 4096}) {
    for (const float a : {-127.0F, -1.0F, 0.0F, 127.0F}) {
      for (const float b : {-127.0F, -1.0F, 0.0F, 127.0F}) {
        Rows rows(Precision::kInt8, 2, dimension, 0);
        for (size_t i = 0; i < dimension; ++i) {
          reinterpret_cast<int8_t*>(rows[0])[i] = static_cast<int8_t>(a);
          reinterpret_cast<int8_t*>(rows[1])[i] = static_cast<int8_t>(b);
        }
        for (const size_t row : {0, 1}) rows.SetScale(row, 1);
        EXPECT_EQ(distance(rows[0], rows[1], rows.padded()),
                  static_cast<float>(-double{a} * double{b} * static_cast<double>(dimension)));
      }
    }
  }
}

// Scales whose products leave float's range, where the distance itself may or may not.
TEST_P(DistanceTest, Int8ScalesBeyondFloat) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  Rows rows(Precision::kInt8, 2, 200, 0);
  for (size_t i = 0; i < 200; ++i) {
    rows.Set(0, i, 127);
    rows.Set(1, i, i % 2 == 0 ? 127.0F : -127.0F);
  }
  const auto distance = [&rows](Metric metric) {
    return DistanceFunction(Precision::kInt8, metric)(rows[0], rows[1], rows.padded());
  };
  for (const size_t row : {0, 1}) rows.SetScale(row, 2e36);
  EXPECT_EQ(distance(Metric::kInnerProduct), 0.0F);
  EXPECT_EQ(distance(Metric::kL2), kLargest);
  rows.Set(1, 1, 127);
  EXPECT_EQ(distance(Metric::kInnerProduct), -kLargest);
  rows.SetScale(0, -2e36);
  EXPECT_EQ(distance(Metric::kInnerProduct), kLargest);
  // 2 of 200 products are left: 2 * 127 * 127 = 32,258 times 1e-30 * 1e-10.
  rows.SetScale(0, 1e-30);
  rows.SetScale(1, 1e-10);
  EXPECT_FLOAT_EQ(distance(Metric::kInnerProduct), -3.2258e-36F);
  // float(1e-30)^2 is 0, though this sum is not.
  rows.SetScale(1, 1e-11);
  EXPECT_FLOAT_EQ(distance(Metric::kInnerProduct), -3.2258e-37F);
}

// Rounding must not make a squared distance negative, nor cost a small one its digits.
TEST_P(DistanceTest, L2IsNeverNegative) {
  std::mt19937 random(4);
  for (const Precision precision : kPrecisions) {
    const DistanceFn distance = DistanceFunction(precision, Metric::kL2);
    for (const size_t dimension : {1, 100, 768}) {
      for (int round = 0; round < 50; ++round) {
        Rows rows(precision, 2, dimension, 0);
        rows.FillAtRandom(0, &random);
        std::memcpy(rows[1], rows[0], static_cast<size_t>(rows[1] - rows[0]));
        const float self = distance(rows[0], rows[1], rows.padded());
        ASSERT_GE(self, 0.0F);
        ASSERT_LE(self,
                  precision == Precision::kInt8 ? 1e-12 * rows.TrailerOf(0).squared_norm() : 0);
        if (precision != Precision::kInt8) continue;
        // The same numbers, and scales that differ in their last bit.
        const double scale = rows.TrailerOf(0).scale;
        rows.SetScale(1, std::nextafter(scale, 1.0));
        ASSERT_GE(distance(rows[0], rows[1], rows.padded()), 0.0F);
        rows.SetScale(1, scale);
        // One number by one step.
        rows.Set(1, dimension - 1, rows.Get(1, dimension - 1) > 0 ? -1.0F : 1.0F);
        const Oracle oracle = OracleDistance(Metric::kL2, &rows, 0, 1);
        ASSERT_NEAR(distance(rows[0], rows[1], rows.padded()), oracle.distance,
                    1e-6 * oracle.distance);
      }
    }
  }
}

TEST_P(DistanceTest, KnowsTheMetrics) {
  for (const Precision precision : kPrecisions) {
    const float unit = precision == Precision::kInt8 ? 0.125F : 1.0F;
    Rows rows(precision, 2, 3, 1);
    rows.Set(0, 0, 1 / unit);
    rows.Set(1, 0, 0.5F / unit);
    rows.Set(1, 1, 0.75F / unit);
    for (const size_t row : {0, 1}) {
      if (precision == Precision::kInt8) rows.SetScale(row, double{unit});
    }
    const auto distance = [&](Metric metric) {
      return DistanceFunction(precision, metric)(rows[0], rows[1], rows.padded());
    };
    EXPECT_EQ(distance(Metric::kCosine), 0.5F);
    EXPECT_EQ(distance(Metric::kInnerProduct), -0.5F);
    EXPECT_EQ(distance(Metric::kL2), 0.8125F);
  }
}

// The pointer is kept for a space's life: it must be the kernel itself from the first call on, not
// Highway's entry that chooses one.
TEST_P(DistanceTest, TheFunctionIsTheSameBeforeAndAfterTheFirstCall) {
  for (const Precision precision : kPrecisions) {
    for (const Metric metric : kMetrics) {
      hwy::GetChosenTarget().DeInit();
      const DistanceFn first = DistanceFunction(precision, metric);
      Rows rows(precision, 2, 100, 1);
      first(rows[0], rows[1], rows.padded());
      EXPECT_EQ(first, DistanceFunction(precision, metric));
    }
  }
}

TEST_P(DistanceTest, SquaredNormNeedsNoAlignment) {
  Rows rows(Precision::kF32, 1, 200, 3);
  std::mt19937 random(5);
  rows.FillAtRandom(0, &random);
  const auto* v = reinterpret_cast<const float*>(rows[0]);
  for (size_t start = 0; start < 17; ++start) {
    for (size_t count = 0; count <= 130; ++count) {
      double expected = 0;
      for (size_t i = 0; i < count; ++i) expected += std::pow(double{v[start + i]}, 2);
      ASSERT_NEAR(SquaredNorm(v + start, count), expected, 1e-6 * (1 + expected))
          << "from " << start << " count " << count;
    }
  }
}

// A norm by float squares would be 0 below 1e-23 and infinite above 1e19.
TEST_P(DistanceTest, NormalisesTinyAndHugeValues) {
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  for (const double scale : {1e-42, 1e-38, 1e-30, 1e-10, 1.0, 1e10, 1e30, 3e37}) {
    for (const size_t dimension : {size_t{1}, size_t{3}, size_t{17}, size_t{768}, size_t{4096}}) {
      std::vector<float> v(dimension + 1, 42.0F);
      std::vector<double> exact(dimension);
      double norm = 0;
      for (size_t i = 0; i < dimension; ++i) {
        v[i] = static_cast<float>(double{normal(random)} * scale);
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

// A target that the kernels were not compiled for would quietly be tested as another one.
TEST(DistanceTargetsTest, EachHasKernelsOfItsOwn) {
  const std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  for (const Precision precision : kPrecisions) {
    for (const Metric metric : kMetrics) {
      std::set<DistanceFn> kernels;
      for (const int64_t target : targets) {
        hwy::SetSupportedTargetsForTest(target);
        kernels.insert(DistanceFunction(precision, metric));
      }
      EXPECT_EQ(kernels.size(), targets.size()) << Name(precision, metric, 0);
    }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(PaddedDimensionTest, IsWholeCacheLines) {
  struct Case {
    size_t dimension, f32, bf16, int8;
  };
  for (const Case& c :
       {Case{1, 16, 32, 64}, Case{16, 16, 32, 64}, Case{17, 32, 32, 64}, Case{32, 32, 32, 64},
        Case{33, 48, 64, 64}, Case{64, 64, 64, 64}, Case{65, 80, 96, 128}, Case{784, 784, 800, 832},
        Case{4095, 4096, 4096, 4096}, Case{4096, 4096, 4096, 4096}}) {
    EXPECT_EQ(PaddedDimension(Precision::kF32, c.dimension), c.f32);
    EXPECT_EQ(PaddedDimension(Precision::kBf16, c.dimension), c.bf16);
    EXPECT_EQ(PaddedDimension(Precision::kInt8, c.dimension), c.int8);
  }
}

}  // namespace
}  // namespace engram
