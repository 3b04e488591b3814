#include "src/core/refusal_reason.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <string_view>

namespace engram {
namespace {

// Two rows with one code would be one reason on the wire; a code beyond the array would write past
// the counters.
TEST(RefusalReasonTest, CodesAreUniqueAndBelowTheBound) {
  std::set<uint16_t> codes;
  for (const RefusalInfo& info : kRefusals) {
    const auto code = static_cast<uint16_t>(info.reason);
    EXPECT_NE(code, 0) << info.name << ": 0 means not refused";
    EXPECT_LT(code, kRefusalCodes) << info.name;
    EXPECT_TRUE(codes.insert(code).second) << info.name;
  }
  EXPECT_EQ(*codes.rbegin() + 1u, kRefusalCodes) << "the bound is larger than it need be";
}

TEST(RefusalReasonTest, NamesAreUniqueAndSnakeCase) {
  std::set<std::string_view> names;
  for (const RefusalInfo& info : kRefusals) {
    EXPECT_TRUE(names.insert(info.name).second) << info.name;
    ASSERT_FALSE(info.name.empty());
    EXPECT_TRUE(info.name.front() >= 'a' && info.name.front() <= 'z') << info.name;
    EXPECT_NE(info.name.back(), '_') << info.name;
    EXPECT_EQ(info.name.find("__"), std::string_view::npos) << info.name;
    EXPECT_TRUE(std::ranges::all_of(info.name, [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
    })) << info.name;
  }
  EXPECT_FALSE(names.contains("unknown")) << "taken by DescribeRefusal";
}

TEST(RefusalReasonTest, TextsSayOneSentenceEach) {
  std::set<std::string_view> texts;
  for (const RefusalInfo& info : kRefusals) {
    EXPECT_GE(info.text.size(), 10u) << info.name;
    EXPECT_NE(info.text.back(), '.') << info.name << ": texts are embedded in longer lines";
    EXPECT_TRUE(texts.insert(info.text).second) << info.name;
  }
}

TEST(RefusalReasonTest, DescribeIsTotal) {
  size_t known = 0;
  for (uint32_t code = 0; code <= UINT16_MAX; ++code) {
    const auto reason = static_cast<RefusalReason>(code);
    const RefusalInfo info = DescribeRefusal(reason);
    ASSERT_EQ(info.reason, reason);
    ASSERT_FALSE(info.name.empty());
    ASSERT_FALSE(info.text.empty());
    if (info.name != "unknown") ++known;
  }
  EXPECT_EQ(known, kRefusals.size());
}

// Written by hand a second time: a code that clients know must not change by an edit of the table.
TEST(RefusalReasonTest, CodesOnTheWireStayWhatTheyAre) {
  EXPECT_EQ(DescribeRefusal(static_cast<RefusalReason>(1)).name, "bad_magic");
  EXPECT_EQ(DescribeRefusal(static_cast<RefusalReason>(5)).name, "bad_crc");
  EXPECT_EQ(DescribeRefusal(static_cast<RefusalReason>(20)).name, "wrong_dimension");
  EXPECT_EQ(DescribeRefusal(static_cast<RefusalReason>(22)).name, "zero_vector");
  EXPECT_EQ(DescribeRefusal(static_cast<RefusalReason>(40)).name, "queue_full");
  EXPECT_EQ(DescribeRefusal(static_cast<RefusalReason>(47)).name, "quota_observations");
  EXPECT_EQ(DescribeRefusal(static_cast<RefusalReason>(48)).name, "quota_memory");
  EXPECT_EQ(DescribeRefusal(static_cast<RefusalReason>(60)).name, "sequence_gap");
  EXPECT_EQ(DescribeRefusal(static_cast<RefusalReason>(71)).name, "session_space_mismatch");
  EXPECT_EQ(DescribeRefusal(static_cast<RefusalReason>(73)).name, "merges_full");
  EXPECT_EQ(DescribeRefusal(static_cast<RefusalReason>(75)).name, "cancelled");
}

// kWaits promises that the same number may be sent again; kConsumes that it may not.
TEST(RefusalReasonTest, EffectsFollowTheKind) {
  for (const RefusalInfo& info : kRefusals) {
    const auto code = static_cast<uint16_t>(info.reason);
    RefusalEffect want = info.effect;  // 60 and above: as the table says
    if (code < 20) want = RefusalEffect::kCloses;
    if (code >= 20 && code < 40) want = RefusalEffect::kConsumes;
    if (code >= 40 && code < 60) want = RefusalEffect::kWaits;
    EXPECT_EQ(info.effect, want) << info.name;
  }
}

}  // namespace
}  // namespace engram
