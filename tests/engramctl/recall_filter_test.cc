#include "tools/engramctl/recall_filter.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tests/core/attributes_model.h"

namespace engram {
namespace {

constexpr int64_t kSecond = 1'000'000'000;

using Texts = std::vector<std::string>;

FilterOptions Asked(const Texts& conditions, const Texts& exclusions = {},
                    const std::string& since = "", const std::string& until = "") {
  return {.conditions = conditions, .exclusions = exclusions, .since = since, .until = until};
}

ModelFilter FilterOf(const FilterOptions& options) {
  const Result<std::string> bytes = FilterBytes(options);
  EXPECT_TRUE(bytes.has_value()) << bytes.error().message;
  if (!bytes) return {};
  const auto view = std::as_bytes(std::span(*bytes));
  EXPECT_EQ(CheckFilter(view), RefusalReason::kNone);
  return ReadFilter(view);
}
std::string FaultOf(const FilterOptions& options) {
  const Result<std::string> bytes = FilterBytes(options);
  return bytes ? "none" : bytes.error().message;
}

TEST(ParseTimeTest, TakesRfc3339DatesAndSeconds) {
  const std::pair<const char*, int64_t> times[] = {
      {"1970-01-01T00:00:00Z", 0},
      {"2024-05-01T12:30:00Z", 1'714'566'600 * kSecond},
      {"2024-05-01t14:30:00+02:00", 1'714'566'600 * kSecond},
      {"2024-05-01 07:00:00-05:30", 1'714'566'600 * kSecond},
      {"2024-05-01T12:30:00.25z", 1'714'566'600 * kSecond + kSecond / 4},
      {"2024-05-01T12:30:00.1234567891Z", 1'714'566'600 * kSecond + 123'456'789},
      {"2024-05-01", 1'714'521'600 * kSecond},
      {"1969-12-31T23:59:59.5Z", -kSecond / 2},
      {"2000-02-29", 951'782'400 * kSecond},
      {"0", 0},
      {"1714566600", 1'714'566'600 * kSecond},
      {"1714566600.5", 1'714'566'600 * kSecond + kSecond / 2},
      {"-1.5", -kSecond - kSecond / 2}};
  for (const auto& [text, ns] : times) {
    const Result<int64_t> time = ParseTime(text);
    ASSERT_TRUE(time.has_value()) << text;
    EXPECT_EQ(*time, ns) << text;
  }
}

TEST(ParseTimeTest, NamesWhatIsNoTime) {
  for (const char* text : {"",
                           "now",
                           "-",
                           "--1",
                           "1.",
                           ".5",
                           "1e9",
                           "2024-5-1",
                           "2024-13-01",
                           "2023-02-29",
                           "2024-05-01T12:30:00",
                           "2024-05-01T24:00:00Z",
                           "2024-05-01T12:60:00Z",
                           "2024-05-01T12:30Z",
                           "2024-05-01T12:30:00+2",
                           "2024-05-01T12:30:00Z ",
                           "2024-05-01T",
                           "2024-05-01T12:30:00.Z",
                           "9999-01-01",
                           "1000-01-01",
                           "99999999999999999999",
                           "9223372037",
                           "2024-05-01T12:30:00+24:00"}) {
    const Result<int64_t> time = ParseTime(text);
    ASSERT_FALSE(time.has_value()) << text;
    EXPECT_NE(time.error().message.find("write one like"), std::string::npos);
  }
}

TEST(RecallFilterTest, NothingAskedForIsNoFilter) { EXPECT_EQ(*FilterBytes({}), ""); }

TEST(RecallFilterTest, AKeyGivenTwiceTakesAnyOfItsValues) {
  const Texts conditions{"source=docs",          "lang=de", "source=mail", "tag=red",
                         "where_location=a = b", "lang="};
  EXPECT_EQ(FilterOf(Asked(conditions)).clauses,
            (std::vector<ModelClause>{{false, "source", {"docs", "mail"}},
                                      {false, "lang", {"de", ""}},
                                      {false, "", {"red"}},
                                      {false, "where_location", {"a = b"}}}));
}

TEST(RecallFilterTest, WhatIsExcludedIsNoneOfItsValues) {
  EXPECT_EQ(
      FilterOf(Asked({"!source=docs", "source=mail"}, {"tag=old", "source=spam"})).clauses,
      (std::vector<ModelClause>{
          {false, "source", {"mail"}}, {true, "source", {"docs", "spam"}}, {true, "", {"old"}}}));
}

TEST(RecallFilterTest, TimesAreARange) {
  EXPECT_EQ(FilterOf(Asked({}, {}, "10")), (ModelFilter{.begin_ns = 10 * kSecond}));
  EXPECT_EQ(FilterOf(Asked({}, {}, "", "1970-01-02")), (ModelFilter{.end_ns = 86'400 * kSecond}));
  EXPECT_EQ(FilterOf(Asked({}, {}, "10", "20")),
            (ModelFilter{.begin_ns = 10 * kSecond, .end_ns = 20 * kSecond}));
  EXPECT_NE(FaultOf(Asked({}, {}, "20", "20")).find("--until is not after --since"),
            std::string::npos);
}

TEST(RecallFilterTest, WhatIsWrongIsNamedWithItsRemedy) {
  EXPECT_EQ(FaultOf(Asked({"source"})),
            "'source' is no KEY=VALUE; write one like source=docs or tag=red");
  EXPECT_EQ(FaultOf(Asked({"=docs"})),
            "'=docs' is no KEY=VALUE; write one like source=docs or tag=red");
  EXPECT_EQ(FaultOf(Asked({}, {"a b=c"})),
            "'a b=c' has no key before '='; write up to 64 printable characters without spaces");
  EXPECT_EQ(FaultOf(Asked({"tag="})), "'tag=' names no tag; write one like tag=red");
  EXPECT_NE(FaultOf(Asked({"k=" + std::string(256, 'v')})).find("has a value of 256"),
            std::string::npos);
  Texts many;
  for (int i = 0; i < 17; ++i) many.push_back("k" + std::to_string(i) + "=v");
  EXPECT_EQ(FaultOf(Asked(many)),
            "the filter is too large: at most 16 keys with 64 values in 4096 bytes");
  many.pop_back();
  EXPECT_EQ(FaultOf(Asked(many)), "none");
}

}  // namespace
}  // namespace engram
