#include "src/core/attributes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/hash.h"
#include "tests/core/attributes_model.h"

namespace engram {
namespace {

// Both say the same of the bytes: whether they are sound, and what they say.
void ExpectAttributesAgree(const std::string& bytes) {
  const Exact exact(bytes);
  const auto model = ParseModelAttributes(bytes);
  const RefusalReason reason = CheckAttributes(exact.get());
  ASSERT_EQ(reason, model ? RefusalReason::kNone : RefusalReason::kBadAttributes);
  if (model) {
    EXPECT_EQ(ReadAttributes(exact.get()), *model);
  }
}
void ExpectFiltersAgree(const std::string& bytes) {
  const Exact exact(bytes);
  const auto model = ParseModelFilter(bytes);
  const RefusalReason reason = CheckFilter(exact.get());
  ASSERT_EQ(reason, model ? RefusalReason::kNone : RefusalReason::kBadFilter);
  if (model) {
    EXPECT_EQ(ReadFilter(exact.get()), *model);
  }
}

RefusalReason CheckOf(const std::string& attributes) {
  ExpectAttributesAgree(attributes);
  return CheckAttributes(Exact(attributes).get());
}
RefusalReason FilterCheckOf(const std::string& filter) {
  ExpectFiltersAgree(filter);
  return CheckFilter(Exact(filter).get());
}

std::string Letters(size_t count, char letter = 'x') { return std::string(count, letter); }

TEST(AttributesTest, KeysThatEverySpaceHas) {
  EXPECT_TRUE(kTagKey.empty());
  for (const std::string_view key : {kTagKey, kWhoKey, kWhereKey, kMemoryTypeKey}) {
    EXPECT_TRUE(IsBuiltInFilterKey(key)) << key;
  }
  for (const std::string_view key : {"tag", "Who", "where", "memory_typ", "source"}) {
    EXPECT_FALSE(IsBuiltInFilterKey(key)) << key;
  }
}

TEST(AttributesTest, AFilterKeyIsPrintableWithoutAnEqualsSign) {
  EXPECT_TRUE(IsValidFilterKey("source"));
  EXPECT_TRUE(IsValidFilterKey("!~"));
  EXPECT_TRUE(IsValidFilterKey(Letters(64)));
  EXPECT_FALSE(IsValidFilterKey(""));
  EXPECT_FALSE(IsValidFilterKey(Letters(65)));
  for (int c = -128; c < 128; ++c) {
    const std::string key = {'k', static_cast<char>(c)};
    EXPECT_EQ(IsValidFilterKey(key), c > ' ' && c <= '~' && c != '=') << c;
  }
}

TEST(AttributesTest, LieAsTheGrammarSays) {
  std::string bytes;
  ASSERT_TRUE(AppendAttribute("source", "docs", &bytes));
  ASSERT_TRUE(AppendAttribute(kTagKey, "red", &bytes));
  ASSERT_TRUE(AppendAttribute("who", "", &bytes));
  using namespace std::string_literals;
  EXPECT_EQ(bytes, "\x06\x04sourcedocs\x00\x03red\x03\x00who"s);
  EXPECT_EQ(ReadAttributes(Exact(bytes).get()),
            (ModelAttributes{{"source", "docs"}, {"", "red"}, {"who", ""}}));
}

TEST(AttributesTest, NoneAreSound) {
  EXPECT_EQ(CheckAttributes({}), RefusalReason::kNone);
  EXPECT_TRUE(ReadAttributes({}).empty());
}

TEST(AttributesTest, EveryBoundHoldsToItsLastByte) {
  EXPECT_EQ(CheckOf(WriteModelAttribute(Letters(64), Letters(255))), RefusalReason::kNone);
  EXPECT_EQ(CheckOf(WriteModelAttribute(Letters(65), "v")), RefusalReason::kBadAttributes);
  EXPECT_EQ(CheckOf(WriteModelAttribute("k", "")), RefusalReason::kNone);
  EXPECT_EQ(CheckOf(WriteModelAttribute("", "")), RefusalReason::kBadAttributes);
  EXPECT_EQ(CheckOf(WriteModelAttribute("", "t")), RefusalReason::kNone);
  std::string many;
  for (int i = 0; i < 64; ++i) many += WriteModelAttribute("k", "v");
  EXPECT_EQ(CheckOf(many), RefusalReason::kNone);
  EXPECT_EQ(CheckOf(many + WriteModelAttribute("k", "v")), RefusalReason::kBadAttributes);
  std::string large;
  while (large.size() + 258 <= 4'096) large += WriteModelAttribute("k", Letters(255));
  const size_t left = 4'096 - large.size();
  EXPECT_EQ(CheckOf(large + WriteModelAttribute("k", Letters(left - 3))), RefusalReason::kNone);
  EXPECT_EQ(CheckOf(large + WriteModelAttribute("k", Letters(left - 2))),
            RefusalReason::kBadAttributes);
}

TEST(AttributesTest, AppendRefusesWhatWouldNotPassAndLeavesTheRest) {
  std::string bytes;
  ASSERT_TRUE(AppendAttribute("k", "v", &bytes));
  const std::string before = bytes;
  EXPECT_FALSE(AppendAttribute(Letters(65), "v", &bytes));
  EXPECT_FALSE(AppendAttribute(Letters(256), "v", &bytes));
  EXPECT_FALSE(AppendAttribute("k", Letters(256), &bytes));
  EXPECT_FALSE(AppendAttribute("", "", &bytes));
  EXPECT_EQ(bytes, before);
  size_t count = 1;
  while (AppendAttribute("k", "v", &bytes)) ++count;
  EXPECT_EQ(count, 64u);
  EXPECT_EQ(bytes.size(), 64u * 4);
  std::string large;
  while (AppendAttribute("k", Letters(255), &large)) {
  }
  EXPECT_EQ(large.size(), 4'096u / 258 * 258);
}

TEST(AttributesTest, AnyCutInAnAttributeIsSeen) {
  const std::string one = WriteModelAttribute("key", "value");
  for (size_t bytes = 0; bytes <= 2 * one.size(); ++bytes) {
    const RefusalReason reason = CheckOf((one + one).substr(0, bytes));
    EXPECT_EQ(reason == RefusalReason::kNone, bytes % one.size() == 0) << bytes;
  }
}

TEST(FilterTest, LiesAsTheGrammarSays) {
  FilterWriter writer;
  EXPECT_TRUE(writer.empty());
  EXPECT_EQ(writer.Bytes(), "");
  writer.SetTimes({.begin_ns = 1, .end_ns = 0x0203});
  const std::array<std::string_view, 2> any{"docs", ""};
  const std::array<std::string_view, 1> none{"red"};
  ASSERT_TRUE(writer.Require("source", any));
  ASSERT_TRUE(writer.Exclude(kTagKey, none));
  EXPECT_FALSE(writer.empty());
  using namespace std::string_literals;
  EXPECT_EQ(writer.Bytes(),
            "\x01\0\0\0\0\0\0\0\x03\x02\0\0\0\0\0\0"
            "\0\x06\x02\0source\x04"
            "docs\0"
            "\x01\0\x01\0\x03red"s);
  EXPECT_EQ(ReadFilter(Exact(writer.Bytes()).get()),
            (ModelFilter{1, 0x0203, {{false, "source", {"docs", ""}}, {true, "", {"red"}}}}));
}

TEST(FilterTest, NoBytesAreNoFilter) {
  EXPECT_EQ(CheckFilter({}), RefusalReason::kNone);
  FilterReader reader({});
  EXPECT_TRUE(reader.times().is_all());
  FilterClause clause;
  EXPECT_FALSE(reader.Next(&clause));
}

TEST(FilterTest, TimesAloneAreAFilter) {
  FilterWriter writer;
  writer.SetTimes({.begin_ns = -5});
  EXPECT_FALSE(writer.empty());
  EXPECT_EQ(FilterCheckOf(writer.Bytes()), RefusalReason::kNone);
  EXPECT_EQ(ReadFilter(Exact(writer.Bytes()).get()), (ModelFilter{.begin_ns = -5}));
  for (size_t bytes = 1; bytes < 16; ++bytes) {
    EXPECT_EQ(FilterCheckOf(writer.Bytes().substr(0, bytes)), RefusalReason::kBadFilter) << bytes;
  }
}

TEST(FilterTest, ATimeRangeIsHalfOpenAndItsGreatestEndIsNone) {
  const TimeRange range{.begin_ns = 10, .end_ns = 20};
  EXPECT_FALSE(range.Has(9));
  EXPECT_TRUE(range.Has(10));
  EXPECT_TRUE(range.Has(19));
  EXPECT_FALSE(range.Has(20));
  EXPECT_FALSE(range.is_all());
  const TimeRange all;
  EXPECT_TRUE(all.is_all());
  EXPECT_TRUE(all.Has(INT64_MIN));
  EXPECT_TRUE(all.Has(INT64_MAX));
  EXPECT_FALSE((TimeRange{.begin_ns = 20, .end_ns = 10}.Has(15)));
}

std::string FilterOf(const std::vector<ModelClause>& clauses) {
  return WriteModelFilter({.begin_ns = 0, .end_ns = 1, .clauses = clauses});
}

TEST(FilterTest, EveryBoundHoldsToItsLastByte) {
  const ModelClause one{false, "k", {"v"}};
  EXPECT_EQ(FilterCheckOf(FilterOf(std::vector(16, one))), RefusalReason::kNone);
  EXPECT_EQ(FilterCheckOf(FilterOf(std::vector(17, one))), RefusalReason::kBadFilter);
  const ModelClause most{false, "k", std::vector<std::string>(64, "v")};
  EXPECT_EQ(FilterCheckOf(FilterOf({most})), RefusalReason::kNone);
  EXPECT_EQ(FilterCheckOf(FilterOf({most, one})), RefusalReason::kBadFilter);
  EXPECT_EQ(FilterCheckOf(FilterOf({{true, "k", std::vector<std::string>(65, "v")}})),
            RefusalReason::kBadFilter);
  EXPECT_EQ(FilterCheckOf(FilterOf({{true, "k", {}}})), RefusalReason::kBadFilter);
  EXPECT_EQ(FilterCheckOf(FilterOf({{false, Letters(64), {Letters(255)}}})), RefusalReason::kNone);
  EXPECT_EQ(FilterCheckOf(FilterOf({{false, Letters(65), {"v"}}})), RefusalReason::kBadFilter);
  EXPECT_EQ(FilterCheckOf(FilterOf({{false, "", {""}}})), RefusalReason::kBadFilter);
  EXPECT_EQ(FilterCheckOf(FilterOf({{false, "k", {""}}})), RefusalReason::kNone);
  ModelClause large{false, "k", std::vector<std::string>(15, Letters(255))};
  const size_t left = 4'096 - FilterOf({large}).size();
  ASSERT_LE(left - 1, 255u);
  large.values.push_back(Letters(left - 1));
  EXPECT_EQ(FilterCheckOf(FilterOf({large})), RefusalReason::kNone);
  large.values.back() += 'x';
  EXPECT_EQ(FilterCheckOf(FilterOf({large})), RefusalReason::kBadFilter);
}

TEST(FilterTest, UnknownFlagsAreRefusedAndTheZeroIsIgnored) {
  std::string bytes = FilterOf({{false, "k", {"v"}}});
  for (int flags = 0; flags < 256; ++flags) {
    bytes[16] = static_cast<char>(flags);
    EXPECT_EQ(FilterCheckOf(bytes) == RefusalReason::kNone, flags <= 1) << flags;
  }
  bytes[16] = 1;
  bytes[19] = 'z';
  EXPECT_EQ(FilterCheckOf(bytes), RefusalReason::kNone);
}

TEST(FilterTest, AnyCutInAClauseIsSeen) {
  const std::string one = WriteModelClause({true, "key", {"value", "", "other"}});
  const std::string times = FilterOf({});
  for (size_t bytes = 0; bytes <= 2 * one.size(); ++bytes) {
    const RefusalReason reason = FilterCheckOf(times + (one + one).substr(0, bytes));
    EXPECT_EQ(reason == RefusalReason::kNone, bytes % one.size() == 0) << bytes;
  }
}

TEST(FilterTest, TheWriterRefusesWhatWouldNotPassAndKeepsTheRest) {
  FilterWriter writer;
  const std::array<std::string_view, 1> v{"v"};
  ASSERT_TRUE(writer.Require("k", v));
  const std::string before = writer.Bytes();
  const std::string long_text = Letters(256);
  const std::array<std::string_view, 2> too_long{"v", long_text};
  const std::array<std::string_view, 1> nothing{""};
  EXPECT_FALSE(writer.Require("k", too_long));
  EXPECT_FALSE(writer.Exclude("k", {}));
  EXPECT_FALSE(writer.Require("", nothing));
  EXPECT_FALSE(writer.Require(Letters(65), v));
  EXPECT_FALSE(writer.Require(Letters(256), v));
  EXPECT_FALSE(writer.Require("k", std::vector<std::string_view>(64, "v")));
  EXPECT_EQ(writer.Bytes(), before);
  for (int i = 1; i < 16; ++i) EXPECT_TRUE(writer.Exclude("k", v));
  EXPECT_FALSE(writer.Exclude("k", v));
  EXPECT_EQ(CheckFilter(Exact(writer.Bytes()).get()), RefusalReason::kNone);
  FilterWriter large;
  const std::string value = Letters(255);
  const std::array<std::string_view, 1> values{value};
  size_t clauses = 0;
  while (large.Require("k", values)) ++clauses;
  EXPECT_EQ(clauses, (4'096u - 16) / (4 + 1 + 256));
}

// Texts whose lengths lie at the bounds as often as between them.
std::string AnyText(SplitMix64& random, size_t bound) {
  constexpr std::array<size_t, 6> kLengths{0, 1, 2, 63, 64, 65};
  size_t bytes = random.Below(4) == 0 ? kLengths[random.Below(kLengths.size())] : random.Below(12);
  if (random.Below(40) == 0) bytes = bound - random.Below(2);
  std::string text(std::min<size_t>(bytes, 255), '\0');
  for (char& letter : text) letter = static_cast<char>(random.Next());
  return text;
}
// Bytes over others, cuts, and parts doubled.
void Damage(SplitMix64& random, std::string* bytes) {
  if (bytes->empty()) return;
  const size_t at = random.Below(bytes->size());
  switch (random.Below(4)) {
    case 0:
      (*bytes)[at] = static_cast<char>(random.Next());
      return;
    case 1:
      (*bytes)[at] = static_cast<char>((*bytes)[at] + static_cast<char>(random.Below(3)) - 1);
      return;
    case 2:
      bytes->resize(at);
      return;
    default:
      bytes->insert(at, bytes->substr(at, 1 + random.Below(40)));
  }
}

TEST(AttributesTest, AgreeWithTheModelOnAnyBytes) {
  SplitMix64 random(1);
  size_t sound = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::string bytes;
    std::string appended;
    const size_t count = random.Below(random.Below(20) == 0 ? 70 : 6);
    bool all_appended = true;
    for (size_t i = 0; i < count; ++i) {
      const std::string key = AnyText(random, 65);
      const std::string value = AnyText(random, 255);
      bytes += WriteModelAttribute(key, value);
      all_appended = AppendAttribute(key, value, &appended) && all_appended;
    }
    ASSERT_EQ(all_appended, ParseModelAttributes(bytes).has_value());
    ASSERT_EQ(CheckAttributes(Exact(appended).get()), RefusalReason::kNone);
    if (all_appended) {
      ASSERT_EQ(appended, bytes);
    }
    for (size_t edits = random.Below(4); edits > 0; --edits) Damage(random, &bytes);
    ASSERT_NO_FATAL_FAILURE(ExpectAttributesAgree(bytes));
    sound += ParseModelAttributes(bytes).has_value() ? 1 : 0;
  }
  EXPECT_GT(sound, 5'000u) << "hardly any were sound";
  EXPECT_LT(sound, 15'000u) << "hardly any were not";
}

ModelClause AnyClause(SplitMix64& random) {
  ModelClause clause{.excludes = random.Below(2) == 0, .key = AnyText(random, 65)};
  const size_t values = random.Below(random.Below(30) == 0 ? 80 : 5);
  for (size_t i = 0; i < values; ++i) clause.values.push_back(AnyText(random, 255));
  return clause;
}

TEST(FilterTest, AgreesWithTheModelOnAnyBytes) {
  SplitMix64 random(1);
  size_t sound = 0;
  for (int round = 0; round < 20'000; ++round) {
    ModelFilter filter{.begin_ns = static_cast<int64_t>(random.Next()),
                       .end_ns = static_cast<int64_t>(random.Next())};
    FilterWriter writer;
    writer.SetTimes({.begin_ns = filter.begin_ns, .end_ns = filter.end_ns});
    bool all_written = true;
    const size_t count = random.Below(random.Below(20) == 0 ? 18 : 4);
    for (size_t i = 0; i < count; ++i) {
      filter.clauses.push_back(AnyClause(random));
      const ModelClause& clause = filter.clauses.back();
      const std::vector<std::string_view> values(clause.values.begin(), clause.values.end());
      all_written = (clause.excludes ? writer.Exclude(clause.key, values)
                                     : writer.Require(clause.key, values)) &&
                    all_written;
    }
    std::string bytes = WriteModelFilter(filter);
    ASSERT_EQ(all_written, ParseModelFilter(bytes).has_value());
    ASSERT_EQ(CheckFilter(Exact(writer.Bytes()).get()), RefusalReason::kNone);
    if (all_written) {
      ASSERT_EQ(writer.Bytes(), bytes);
    }
    for (size_t edits = random.Below(4); edits > 0; --edits) Damage(random, &bytes);
    ASSERT_NO_FATAL_FAILURE(ExpectFiltersAgree(bytes));
    sound += ParseModelFilter(bytes).has_value() ? 1 : 0;
  }
  EXPECT_GT(sound, 5'000u) << "hardly any were sound";
  EXPECT_LT(sound, 15'000u) << "hardly any were not";
}

}  // namespace
}  // namespace engram
