// As in index/distance.cc, so that its targets are all tested here.
#define HWY_WANT_AVX3_DL

#include "index/vector_format.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "index/distance.h"
#include "src/core/observation.h"

namespace engram {
namespace {

constexpr Metric kMetrics[] = {Metric::kCosine, Metric::kInnerProduct, Metric::kL2};
constexpr Precision kPrecisions[] = {Precision::kF32, Precision::kBf16, Precision::kInt8};
constexpr uint32_t kDimensions[] = {1,  2,   3,   7,   15,  16,  17,  31,   33,   63,   64,  65,
                                    99, 127, 128, 130, 300, 768, 784, 1024, 1536, 4095, 4096};
constexpr float kLargest = std::numeric_limits<float>::max();

// Rows of one format side by side; every byte that no row was written to is kUntouched, which is
// NaN as f32 and bf16.
class Rows {
 public:
  static constexpr std::byte kUntouched{0x7F};

  Rows(const VectorFormat& format, size_t count)
      : row_bytes_(format.row_bytes()), memory_(count * row_bytes_ + 192, kUntouched) {
    first_ = memory_.data() + (-reinterpret_cast<uintptr_t>(memory_.data()) % 64) + 64;
  }
  std::byte* operator[](size_t row) { return first_ + row * row_bytes_; }

 private:
  size_t row_bytes_;
  std::vector<std::byte> memory_;
  std::byte* first_;
};

// `dimension` floats, one float off any alignment, with NaN behind: what Encode must not read.
class Input {
 public:
  explicit Input(std::vector<float> values) : values_(std::move(values)) {
    values_.insert(values_.begin(), std::numeric_limits<float>::quiet_NaN());
    values_.resize(values_.size() + 16, std::numeric_limits<float>::quiet_NaN());
  }
  float* data() { return values_.data() + 1; }
  float operator[](size_t i) const { return values_[i + 1]; }

 private:
  std::vector<float> values_;
};

std::vector<float> Normal(uint32_t dimension, double scale, std::mt19937* random) {
  std::normal_distribution<double> normal;
  std::vector<float> values(dimension);
  for (float& value : values) {
    value = static_cast<float>(
        std::clamp(normal(*random) * scale, -double{kLargest}, double{kLargest}));
  }
  return values;
}

Input RandomInput(const VectorFormat& format, double scale, std::mt19937* random) {
  Input input(Normal(format.dimension(), scale, random));
  // Never a zero vector, and the largest number not always in the same place.
  input.data()[(*random)() % format.dimension()] = static_cast<float>(scale * 3);
  if (format.metric() == Metric::kCosine) NormaliseInPlace(input.data(), format.dimension());
  return input;
}

std::vector<float> Decoded(const VectorFormat& format, const std::byte* row) {
  std::vector<float> v(format.dimension());
  format.Decode(row, v.data());
  return v;
}

double LargestOf(const Input& input, uint32_t dimension) {
  double largest = 0;
  for (uint32_t i = 0; i < dimension; ++i) {
    largest = std::max(largest, std::fabs(double{input[i]}));
  }
  return largest;
}

Int8Trailer TrailerOf(const VectorFormat& format, const std::byte* row) {
  Int8Trailer trailer;
  std::memcpy(&trailer, row + format.padded_dimension(), sizeof(trailer));
  return trailer;
}

std::string Name(const VectorFormat& format) {
  return std::string(PrecisionName(format.precision())) + " " +
         std::string(MetricName(format.metric())) + " of " + std::to_string(format.dimension());
}

template <typename Body>
void ForEachFormat(const Body& body) {
  for (const Precision precision : kPrecisions) {
    for (const Metric metric : kMetrics) {
      for (const uint32_t dimension : kDimensions) {
        body(VectorFormat(precision, metric, dimension));
      }
    }
  }
}

// Runs each test once with every instruction set that this machine has.
class VectorFormatTest : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
  std::mt19937 random_{7};
};

TEST_P(VectorFormatTest, ARowIsWrittenWholeAndNoMore) {
  ForEachFormat([this](const VectorFormat& format) {
    const size_t element = format.precision() == Precision::kF32    ? 4
                           : format.precision() == Precision::kBf16 ? 2
                                                                    : 1;
    const size_t trailer = format.precision() == Precision::kInt8 ? sizeof(Int8Trailer) : 0;
    ASSERT_EQ(format.row_bytes() % (trailer == 0 ? 64 : kRowAlignment), 0u);
    ASSERT_EQ(format.row_bytes(), format.padded_dimension() * element + trailer);
    Rows rows(format, 3);
    Input input = RandomInput(format, 1, &random_);
    format.Encode(input.data(), rows[1]);
    const size_t numbers = format.dimension() * element;
    const auto padding = [&](size_t i) {
      return i >= numbers && i < format.padded_dimension() * element;
    };
    for (size_t i = 0; i < format.row_bytes(); ++i) {
      ASSERT_EQ(rows[0][i], Rows::kUntouched) << Name(format) << " before the row";
      ASSERT_EQ(rows[2][i], Rows::kUntouched) << Name(format) << " behind the row";
      if (!padding(i)) continue;
      ASSERT_EQ(rows[1][i], std::byte{0}) << Name(format) << " at " << i;
    }
    if (trailer != 0) {
      const Int8Trailer written = TrailerOf(format, rows[1]);
      int32_t sum = 0;
      int32_t squares = 0;
      for (size_t i = 0; i < format.dimension(); ++i) {
        const auto number = static_cast<int8_t>(rows[1][i]);
        sum += number;
        squares += number * number;
      }
      ASSERT_EQ(written.sum, sum) << Name(format);
      ASSERT_EQ(written.squares, squares) << Name(format);
    }
    // Over an older row, too.
    Rows fresh(format, 1);
    std::memset(static_cast<void*>(fresh[0]), 0, format.row_bytes());
    format.Encode(input.data(), fresh[0]);
    ASSERT_EQ(std::memcmp(fresh[0], rows[1], format.row_bytes()), 0) << Name(format);
  });
}

TEST_P(VectorFormatTest, F32IsKeptBitForBit) {
  const VectorFormat format(Precision::kF32, Metric::kL2, 6);
  const std::vector<float> v = {
      -0.0F, 1e-45F, -kLargest, kLargest, std::numeric_limits<float>::min(), 1.5F};
  Rows rows(format, 1);
  format.Encode(v.data(), rows[0]);
  const std::vector<float> decoded = Decoded(format, rows[0]);
  EXPECT_EQ(std::memcmp(decoded.data(), v.data(), v.size() * sizeof(float)), 0);
}

TEST_P(VectorFormatTest, Bf16RoundsToNearestTiesToEven) {
  struct Case {
    uint32_t f32;
    uint16_t bf16;
  };
  const std::vector<Case> cases = {
      {0x3F80'0000, 0x3F80},  // 1
      {0x3F80'7FFF, 0x3F80},  // below the tie
      {0x3F80'8000, 0x3F80},  // a tie, down to even
      {0x3F80'8001, 0x3F81},  // above it
      {0x3F81'8000, 0x3F82},  // a tie, up to even
      {0xBF80'8000, 0xBF80},  // the same below zero
      {0xBF80'8001, 0xBF81}, {0xBF81'8000, 0xBF82},
      {0x3FFF'FFFF, 0x4000},                         // carries into the exponent
      {0x0000'0000, 0x0000}, {0x8000'0000, 0x8000},  // -0
      {0x0000'0001, 0x0000},                         // the smallest denormal
      {0x0000'8000, 0x0000}, {0x0000'8001, 0x0001},  // denormals round like all others
      {0x007F'FFFF, 0x0080}, {0x7F7F'0000, 0x7F7F},  // the largest bf16
      {0x7F7F'7FFF, 0x7F7F}, {0x7F7F'8000, 0x7F7F},  // these would become infinite
      {0x7F7F'FFFF, 0x7F7F}, {0xFF7F'FFFF, 0xFF7F},
  };
  // Each case in every place of a row: whole registers and what is left over.
  for (const uint32_t dimension : {1U, 5U, 16U, 20U, 47U}) {
    const VectorFormat format(Precision::kBf16, Metric::kL2, dimension);
    for (size_t first = 0; first < cases.size(); ++first) {
      std::vector<float> v(dimension);
      for (uint32_t i = 0; i < dimension; ++i) {
        v[i] = std::bit_cast<float>(cases[(first + i) % cases.size()].f32);
      }
      Rows rows(format, 1);
      format.Encode(v.data(), rows[0]);
      const std::vector<float> decoded = Decoded(format, rows[0]);
      for (uint32_t i = 0; i < dimension; ++i) {
        const Case& expected = cases[(first + i) % cases.size()];
        uint16_t found;
        std::memcpy(&found, rows[0] + i * sizeof(found), sizeof(found));
        ASSERT_EQ(found, expected.bf16) << std::hex << expected.f32;
        ASSERT_EQ(std::bit_cast<uint32_t>(decoded[i]), uint32_t{expected.bf16} << 16);
      }
    }
  }
}

// Any float against its two neighbours among the bf16 numbers.
TEST_P(VectorFormatTest, Bf16IsTheNearest) {
  constexpr uint32_t kCount = 4096;
  const VectorFormat format(Precision::kBf16, Metric::kL2, kCount);
  for (int round = 0; round < 10; ++round) {
    std::vector<float> v(kCount);
    for (float& value : v) {
      do value = std::bit_cast<float>(static_cast<uint32_t>(random_()));
      while (!std::isfinite(value) || std::fabs(value) > 3.3e38F);
    }
    Rows rows(format, 1);
    format.Encode(v.data(), rows[0]);
    const std::vector<float> decoded = Decoded(format, rows[0]);
    for (uint32_t i = 0; i < kCount; ++i) {
      const uint32_t below = std::bit_cast<uint32_t>(v[i]) & 0xFFFF'0000;
      const double to_lower = std::fabs(double{v[i]} - double{std::bit_cast<float>(below)});
      const double to_upper =
          std::fabs(double{v[i]} - double{std::bit_cast<float>(below + 0x1'0000)});
      ASSERT_EQ(std::fabs(double{v[i]} - double{decoded[i]}), std::min(to_lower, to_upper)) << v[i];
    }
  }
}

// Half a step at most is lost, over the whole range of floats.
TEST_P(VectorFormatTest, Int8IsWithinHalfAStep) {
  for (const Metric metric : {Metric::kInnerProduct, Metric::kL2}) {
    for (const uint32_t dimension : kDimensions) {
      const VectorFormat format(Precision::kInt8, metric, dimension);
      for (const double scale : {2e-45, 1e-44, 1e-42, 1e-38, 1e-30, 1e-3, 1.0, 1e10, 1e30, 1e38}) {
        Input input = RandomInput(format, scale, &random_);
        const double step = LargestOf(input, dimension) / 127;
        Rows rows(format, 1);
        format.Encode(input.data(), rows[0]);
        const std::vector<float> decoded = Decoded(format, rows[0]);
        const Int8Trailer trailer = TrailerOf(format, rows[0]);
        int32_t sum = 0;
        int32_t largest = 0;
        double squared_norm = 0;
        for (uint32_t i = 0; i < dimension; ++i) {
          const auto number = static_cast<int8_t>(rows[0][i]);
          sum += number;
          largest = std::max(largest, std::abs(number));
          squared_norm += number * step * (number * step);
          ASSERT_LE(std::fabs(number * step - double{input[i]}), step * 0.5000001)
              << Name(format) << " scale " << scale << " at " << i;
          // Then rounded to float, for denormals to whole multiples of 1.4e-45.
          ASSERT_NEAR(decoded[i], number * step, 1e-7 * std::fabs(number * step) + 0.71e-45)
              << Name(format) << " scale " << scale << " at " << i;
        }
        ASSERT_EQ(largest, 127) << Name(format) << " scale " << scale;
        ASSERT_EQ(trailer.sum, sum) << Name(format);
        ASSERT_NEAR(trailer.scale / step, 1, 1e-12) << Name(format);
        ASSERT_NEAR(trailer.squared_norm() / squared_norm, 1, 1e-12) << Name(format);
      }
    }
  }
}

// Under cosine the stored vector has norm 1 again. With e the norm of the rounding errors, at most
// half a step times sqrt(dimension), its numbers are off by half a step and by e of themselves.
TEST_P(VectorFormatTest, Int8UnderCosineHasNormOne) {
  for (const uint32_t dimension : kDimensions) {
    const VectorFormat format(Precision::kInt8, Metric::kCosine, dimension);
    for (int round = 0; round < 10; ++round) {
      Input input = RandomInput(format, 1, &random_);
      const double step = LargestOf(input, dimension) / 127;
      const double e = step / 2 * std::sqrt(dimension);
      Rows rows(format, 1);
      format.Encode(input.data(), rows[0]);
      const std::vector<float> decoded = Decoded(format, rows[0]);
      double squared_norm = 0;
      for (uint32_t i = 0; i < dimension; ++i) {
        squared_norm += double{decoded[i]} * double{decoded[i]};
        ASSERT_NEAR(decoded[i], input[i], step / 2 + e * std::fabs(decoded[i]) + 1e-6)
            << Name(format);
      }
      ASSERT_NEAR(squared_norm, 1, 1e-6) << Name(format);
      ASSERT_NEAR(TrailerOf(format, rows[0]).squared_norm(), 1, 1e-12) << Name(format);
      ASSERT_NEAR(format.Distance(rows[0], rows[0]), 0, 1e-9) << Name(format);
    }
  }
}

TEST_P(VectorFormatTest, OneHot) {
  for (const Precision precision : kPrecisions) {
    for (const float value : {1.0F, -1.0F}) {
      const VectorFormat format(precision, Metric::kCosine, 130);
      Rows rows(format, 2);
      std::vector<float> other(130);
      other[7] = 1;
      format.Encode(other.data(), rows[1]);
      for (uint32_t hot = 0; hot < 130; ++hot) {
        std::vector<float> v(130);
        v[hot] = value;
        format.Encode(v.data(), rows[0]);
        EXPECT_EQ(Decoded(format, rows[0]), v);
        EXPECT_NEAR(format.Distance(rows[0], rows[0]), 0, 1e-12);
        EXPECT_NEAR(format.Distance(rows[0], rows[1]), hot == 7 ? 1 - value : 1, 1e-12);
      }
    }
  }
}

TEST_P(VectorFormatTest, AZeroVector) {
  for (const Precision precision : kPrecisions) {
    for (const Metric metric : {Metric::kInnerProduct, Metric::kL2}) {
      const VectorFormat format(precision, metric, 100);
      Rows rows(format, 2);
      std::vector<float> zero(100);
      zero[3] = -0.0F;
      std::vector<float> other(100, -2.0F);
      format.Encode(zero.data(), rows[0]);
      format.Encode(other.data(), rows[1]);
      for (const float value : Decoded(format, rows[0])) EXPECT_EQ(value, 0.0F);
      EXPECT_EQ(format.Distance(rows[0], rows[0]), 0.0F);
      EXPECT_EQ(format.Distance(rows[0], rows[1]), metric == Metric::kL2 ? 400.0F : 0.0F);
      if (precision == Precision::kInt8) {
        for (size_t i = 0; i < format.row_bytes(); ++i) ASSERT_EQ(rows[0][i], std::byte{0});
      }
    }
  }
}

TEST_P(VectorFormatTest, TheLargestFloatsStayFinite) {
  for (const uint32_t dimension : {1U, 100U, 4096U}) {
    const std::vector<float> plus(dimension, kLargest);
    const std::vector<float> minus(dimension, -kLargest);
    for (const Precision precision : kPrecisions) {
      for (const Metric metric : {Metric::kInnerProduct, Metric::kL2}) {
        const VectorFormat format(precision, metric, dimension);
        Rows rows(format, 2);
        format.Encode(plus.data(), rows[0]);
        format.Encode(minus.data(), rows[1]);
        for (const float value : Decoded(format, rows[0])) {
          ASSERT_TRUE(std::isfinite(value));
          ASSERT_GE(value, kLargest * 0.99F);
        }
        if (precision != Precision::kInt8) continue;
        EXPECT_EQ(Decoded(format, rows[1]), minus);
        EXPECT_EQ(format.Distance(rows[0], rows[1]), kLargest) << Name(format);
        EXPECT_EQ(format.Distance(rows[0], rows[0]), metric == Metric::kL2 ? 0 : -kLargest);
      }
    }
  }
}

// From floats to a distance and back, against double precision on what is stored.
TEST_P(VectorFormatTest, DistancesAreThoseOfWhatIsStored) {
  ForEachFormat([this](const VectorFormat& format) {
    for (const double scale : {1e-15, 1.0, 1e15}) {
      Rows rows(format, 2);
      for (const size_t row : {0, 1}) {
        Input input = RandomInput(format, scale, &random_);
        format.Encode(input.data(), rows[row]);
      }
      const std::vector<float> a = Decoded(format, rows[0]);
      const std::vector<float> b = Decoded(format, rows[1]);
      double sum = 0;
      double magnitude = 0;
      for (uint32_t i = 0; i < format.dimension(); ++i) {
        const double difference = double{a[i]} - double{b[i]};
        const bool l2 = format.metric() == Metric::kL2;
        sum += l2 ? difference * difference : double{a[i]} * double{b[i]};
        magnitude += double{a[i]} * double{a[i]} + double{b[i]} * double{b[i]};
      }
      const double expected = format.metric() == Metric::kL2       ? sum
                              : format.metric() == Metric::kCosine ? 1 - sum
                                                                   : -sum;
      const float found = format.Distance(rows[0], rows[1]);
      ASSERT_NEAR(found, expected, 3e-6 * magnitude) << Name(format) << " scale " << scale;
      ASSERT_EQ(format.Distance(rows[1], rows[0]), found) << Name(format) << " scale " << scale;
      if (format.metric() == Metric::kInnerProduct) continue;
      const double self = format.Distance(rows[0], rows[0]);
      // bf16 numbers are off by up to 2^-8 of themselves, their squares by twice that.
      const double lost = format.precision() == Precision::kBf16 ? 1.0 / 127 : 3e-6;
      ASSERT_NEAR(self, 0, format.metric() == Metric::kCosine ? lost : 1e-12 * magnitude)
          << Name(format) << " scale " << scale;
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Targets, VectorFormatTest,
                         testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         [](const testing::TestParamInfo<int64_t>& target) {
                           return std::string(hwy::TargetName(target.param));
                         });

// A row written by one machine may be read by another.
TEST(VectorFormatTargetsTest, AllWriteTheSameBytes) {
  const std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  ForEachFormat([&targets](const VectorFormat& format) {
    for (const double scale : {1e-42, 1.0, 1e37}) {
      std::mt19937 random(8);
      Input input = RandomInput(format, scale, &random);
      std::vector<std::byte> first;
      for (const int64_t target : targets) {
        hwy::SetSupportedTargetsForTest(target);
        hwy::GetChosenTarget().Update(hwy::SupportedTargets());
        Rows rows(format, 1);
        format.Encode(input.data(), rows[0]);
        std::vector<std::byte> bytes(rows[0], rows[0] + format.row_bytes());
        if (first.empty()) first = bytes;
        ASSERT_EQ(bytes, first) << Name(format) << " by " << hwy::TargetName(target);
      }
      hwy::SetSupportedTargetsForTest(0);
      hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    }
  });
}

}  // namespace
}  // namespace engram
