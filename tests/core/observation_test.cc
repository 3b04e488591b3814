#include "src/core/observation.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>

namespace engram {
namespace {

TEST(ObservationTest, MetricNamesGoBothWays) {
  EXPECT_EQ(MetricOfName("cosine"), Metric::kCosine);
  EXPECT_EQ(MetricOfName("ip"), Metric::kInnerProduct);
  EXPECT_EQ(MetricOfName("l2"), Metric::kL2);
  for (const Metric metric : {Metric::kCosine, Metric::kInnerProduct, Metric::kL2}) {
    EXPECT_EQ(MetricOfName(MetricName(metric)), metric);
  }
}

TEST(ObservationTest, OtherMetricNamesAreUnspecified) {
  for (const std::string_view name : {"", "unspecified", "Cosine", "cosine ", "l22", "dot"}) {
    EXPECT_EQ(MetricOfName(name), Metric::kUnspecified) << name;
  }
  // A value from a hostile frame.
  EXPECT_EQ(MetricName(static_cast<Metric>(200)), "unspecified");
}

// The values are stored and sent.
static_assert(static_cast<int>(Metric::kCosine) == 1 && static_cast<int>(Metric::kL2) == 3);
static_assert(static_cast<int>(ObservationOp::kUpsert) == 1);
static_assert(static_cast<int>(ObservationOp::kDelete) == 2);
static_assert(static_cast<int>(Priority::kNormal) == 0 && static_cast<int>(Priority::kHigh) == 1);

TEST(ObservationTest, SpaceNameLengths) {
  EXPECT_FALSE(IsValidSpaceName(""));
  EXPECT_TRUE(IsValidSpaceName("a"));
  EXPECT_TRUE(IsValidSpaceName(std::string(64, 'z')));
  EXPECT_FALSE(IsValidSpaceName(std::string(65, 'z')));
}

// All 256 bytes, first, middle and last: names become file names and metric labels.
TEST(ObservationTest, SpaceNameCharacters) {
  const std::string_view allowed = "abcdefghijklmnopqrstuvwxyz0123456789_-";
  for (int c = 0; c < 256; ++c) {
    const auto character = static_cast<char>(c);
    const bool want = allowed.find(character) != std::string_view::npos;
    for (const size_t position : {0u, 1u, 2u}) {
      std::string name = "aaa";
      name[position] = character;
      EXPECT_EQ(IsValidSpaceName(name), want) << c << " at " << position;
    }
  }
}

TEST(ObservationTest, PadTo8) {
  EXPECT_EQ(PadTo8(0), 0u);
  EXPECT_EQ(PadTo8(1), 8u);
  EXPECT_EQ(PadTo8(8), 8u);
  EXPECT_EQ(PadTo8(9), 16u);
}

}  // namespace
}  // namespace engram
