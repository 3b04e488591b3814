// As in index/random_rotation.cc, so that its targets are all tested here.
#define HWY_WANT_AVX3_DL

#include "index/random_rotation.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace engram {
namespace {

constexpr uint32_t kDimensions[] = {1,   2,   3,   63,  64,   65,   100,  128, 192,
                                    384, 768, 784, 960, 1000, 1024, 1536, 4096};

struct alignas(64) Rotated {
  // As a kernel must not count on what was there before.
  Rotated() { std::fill(std::begin(values), std::end(values), NAN); }
  float values[kMaxDimension];
  float operator[](size_t i) const { return values[i]; }
};

// Not by value: 16 KiB.
std::unique_ptr<Rotated> Rotate(const RandomRotation& rotation, const std::vector<float>& v) {
  // One float off any alignment, with NaN behind: what must not be read.
  std::vector<float> input(v.size() + 17, std::numeric_limits<float>::quiet_NaN());
  std::copy(v.begin(), v.end(), input.begin() + 1);
  auto rotated = std::make_unique<Rotated>();
  rotation.Rotate(input.data() + 1, rotated->values);
  return rotated;
}

std::vector<float> Normal(uint32_t dimension, std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(dimension);
  for (float& value : values) value = normal(*random);
  return values;
}

template <typename A, typename B>
double Dot(const A& a, const B& b, size_t count) {
  double sum = 0;
  for (size_t i = 0; i < count; ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

// Runs each test once with every instruction set that this machine has.
class RandomRotationTest : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

TEST_P(RandomRotationTest, KeepsNormsAndInnerProducts) {
  std::mt19937 random(1);
  for (const uint32_t dimension : kDimensions) {
    const RandomRotation rotation(dimension, 5);
    const size_t n = rotation.rotated_dimension();
    ASSERT_EQ(n, (dimension + 63) / 64 * 64);
    for (int round = 0; round < 3; ++round) {
      const std::vector<float> a = Normal(dimension, &random);
      const std::vector<float> b = Normal(dimension, &random);
      const auto rotated_a = Rotate(rotation, a);
      const auto rotated_b = Rotate(rotation, b);
      const double norm = std::sqrt(Dot(a, a, dimension) * Dot(b, b, dimension));
      ASSERT_NEAR(Dot(*rotated_a, *rotated_a, n), Dot(a, a, dimension), 1e-5 * Dot(a, a, dimension))
          << dimension;
      ASSERT_NEAR(Dot(*rotated_a, *rotated_b, n), Dot(a, b, dimension), 1e-5 * norm) << dimension;
    }
  }
}

// What a hot dimension becomes: as even as independent normal values are, wherever it stands. A
// stretch of coordinates that the transforms leave out, or that only one of them reaches, fails.
TEST_P(RandomRotationTest, SpreadsEachCoordinateOverAll) {
  for (const uint32_t dimension : kDimensions) {
    const RandomRotation rotation(dimension, 6);
    const size_t n = rotation.rotated_dimension();
    const auto root = std::sqrt(static_cast<double>(n));
    const uint32_t step = std::max(1U, dimension / 97);
    for (uint32_t hot = 0; hot < dimension; hot += step) {
      std::vector<float> v(dimension, 0.0F);
      v[hot] = 1;
      const auto rotated = Rotate(rotation, v);
      double largest = 0;
      double magnitudes = 0;
      double quarters[4] = {};
      for (size_t i = 0; i < n; ++i) {
        const double value = std::fabs(double{(*rotated)[i]});
        largest = std::max(largest, value);
        magnitudes += value;
        quarters[i * 4 / n] += value * value;
      }
      // Of normal values: sqrt(2 / pi) = 0.80 in the mean, and the largest of 4,096 at 3.7.
      ASSERT_LT(largest * root, 5.7) << dimension << " hot " << hot;
      ASSERT_GT(magnitudes / root, 0.7) << dimension << " hot " << hot;
      // Five standard deviations and more of what n / 4 normal values have together.
      for (const double share : quarters) {
        ASSERT_NEAR(share, 0.25, std::sqrt(10.0 / static_cast<double>(n)))
            << dimension << " hot " << hot;
      }
    }
  }
}

// The mean of all coordinates at once would be one hot coordinate, were there no random signs.
TEST_P(RandomRotationTest, SpreadsWhatATransformAloneWouldGather) {
  for (const uint32_t dimension : kDimensions) {
    if (dimension < 63) continue;
    const RandomRotation rotation(dimension, 7);
    const size_t n = rotation.rotated_dimension();
    for (size_t stride = 1; stride <= 64; stride *= 2) {
      std::vector<float> v(dimension);
      for (uint32_t i = 0; i < dimension; ++i) v[i] = (i / stride) % 2 == 0 ? 1.0F : -1.0F;
      const auto rotated = Rotate(rotation, v);
      double largest = 0;
      for (size_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(double{(*rotated)[i]}));
      const double norm = std::sqrt(static_cast<double>(dimension));
      ASSERT_LT(largest / norm * std::sqrt(static_cast<double>(n)), 5.7) << dimension;
    }
  }
}

TEST_P(RandomRotationTest, SeedsMakeDifferentRotations) {
  std::mt19937 random(2);
  for (const uint32_t dimension : kDimensions) {
    const std::vector<float> v = Normal(dimension, &random);
    const size_t n = RandomRotation::RotatedDimension(dimension);
    const auto first = Rotate(RandomRotation(dimension, 1), v);
    const auto again = Rotate(RandomRotation(dimension, 1), v);
    const auto other = Rotate(RandomRotation(dimension, 2), v);
    EXPECT_EQ(std::memcmp(first->values, again->values, n * sizeof(float)), 0) << dimension;
    // Independent directions: an inner product of about 1 / sqrt(n).
    EXPECT_LT(std::fabs(Dot(*first, *other, n)) / Dot(v, v, dimension),
              5 / std::sqrt(static_cast<double>(n)))
        << dimension;
  }
}

// Codes that one machine wrote are read by another.
TEST_P(RandomRotationTest, GivesTheSameBitsOnEveryTarget) {
  std::mt19937 random(3);
  for (const uint32_t dimension : kDimensions) {
    const std::vector<float> v = Normal(dimension, &random);
    const RandomRotation rotation(dimension, 8);
    const auto here = Rotate(rotation, v);
    for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
      hwy::SetSupportedTargetsForTest(target);
      const auto there = Rotate(rotation, v);
      EXPECT_EQ(
          std::memcmp(here->values, there->values, rotation.rotated_dimension() * sizeof(float)), 0)
          << dimension << " on " << hwy::TargetName(target);
    }
    hwy::SetSupportedTargetsForTest(GetParam());
  }
}

TEST_P(RandomRotationTest, InPlaceIsTheSame) {
  std::mt19937 random(4);
  for (const uint32_t dimension : {63U, 100U, 768U}) {
    const std::vector<float> v = Normal(dimension, &random);
    const RandomRotation rotation(dimension, 9);
    const auto apart = Rotate(rotation, v);
    Rotated in_place;
    std::fill_n(in_place.values, rotation.rotated_dimension(), 0.0F);
    std::copy(v.begin(), v.end(), in_place.values);
    rotation.RotateInPlace(in_place.values);
    EXPECT_EQ(
        std::memcmp(in_place.values, apart->values, rotation.rotated_dimension() * sizeof(float)),
        0);
    // Nothing behind the rotated vector is written.
    EXPECT_TRUE(std::isnan(in_place[rotation.rotated_dimension()]));
    EXPECT_TRUE(std::isnan((*apart)[rotation.rotated_dimension()]));
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, RandomRotationTest,
                         testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         [](const testing::TestParamInfo<int64_t>& target) {
                           return std::string(hwy::TargetName(target.param));
                         });

}  // namespace
}  // namespace engram
