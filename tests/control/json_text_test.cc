#include "src/control/json_text.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "src/control/memory_codec.h"
#include "src/core/hash.h"

namespace engram {
namespace {

TEST(TimeTest, ReadsWhatRfc3339Has) {
  struct Case {
    const char* text;
    int64_t seconds;
    int32_t nanos;
  };
  for (const Case& each : {Case{"1970-01-01T00:00:00Z", 0, 0}, Case{"1970-01-01t00:00:00z", 0, 0},
                           Case{"1969-12-31 23:59:59.5Z", -1, 500'000'000},
                           Case{"2009-02-13T23:31:30.123456789Z", 1'234'567'890, 123'456'789},
                           Case{"2009-02-14T01:01:30+01:30", 1'234'567'890, 0},
                           Case{"2009-02-13T22:31:30-01:00", 1'234'567'890, 0},
                           Case{"2016-12-31T23:59:60Z", 1'483'228'800, 0},
                           Case{"2000-02-29T00:00:00.000001Z", 951'782'400, 1'000},
                           Case{"0001-01-01T00:00:00Z", -62'135'596'800, 0},
                           Case{"9999-12-31T23:59:59Z", 253'402'300'799, 0}}) {
    const auto time = ReadTime(each.text);
    ASSERT_TRUE(time.has_value()) << each.text;
    EXPECT_EQ(time->seconds(), each.seconds) << each.text;
    EXPECT_EQ(time->nanos(), each.nanos) << each.text;
  }
}

TEST(TimeTest, RefusesWhatItHasNot) {
  for (const char* text : {"",
                           "now",
                           "1970-01-01",
                           "1970-01-01T00:00:00",
                           "1970-01-01T00:00:00Zx",
                           "1970-13-01T00:00:00Z",
                           "1970-00-01T00:00:00Z",
                           "1970-01-32T00:00:00Z",
                           "1970-02-29T00:00:00Z",
                           "1900-02-29T00:00:00Z",
                           "1970-01-01T24:00:00Z",
                           "1970-01-01T00:60:00Z",
                           "1970-01-01T00:00:61Z",
                           "1970-01-01T00:00:00.Z",
                           "1970-01-01T00:00:00.1234567890Z",
                           "1970-01-01T00:00:00+24:00",
                           "1970-01-01T00:00:00+00:60",
                           "1970-01-01T00:00:00+0000",
                           "1970-01-01T00:00:00 +00:00",
                           "70-01-01T00:00:00Z",
                           "+1970-01-01T00:00:00Z",
                           "1970-1-1T00:00:00Z",
                           "-001-01-01T00:00:00Z",
                           "1970-01-01T00:00:0\xc3\x80Z"}) {
    EXPECT_FALSE(ReadTime(text).has_value()) << text;
  }
}

TEST(TimeTest, WhatIsWrittenIsReadBack) {
  SplitMix64 random(1);
  for (int i = 0; i < 20'000; ++i) {
    int64_t unix_ns = static_cast<int64_t>(random.Next());
    if (i % 3 == 1) unix_ns -= unix_ns % 1'000'000'000;
    if (i % 3 == 2) unix_ns -= unix_ns % 1'000;
    // One second at either end of what 64 bits hold is beyond ToUnixNs.
    unix_ns = unix_ns / 1'000'000'000 == INT64_MAX / 1'000'000'000 ? 0 : unix_ns;
    unix_ns = unix_ns / 1'000'000'000 == INT64_MIN / 1'000'000'000 ? 0 : unix_ns;
    const std::string text = TimeText(unix_ns);
    const auto time = ReadTime(text);
    ASSERT_TRUE(time.has_value()) << text;
    ASSERT_EQ(ToUnixNs(*time), unix_ns) << text;
  }
  EXPECT_EQ(TimeText(0), "1970-01-01T00:00:00Z");
  EXPECT_EQ(TimeText(-1), "1969-12-31T23:59:59.999999999Z");
  EXPECT_EQ(TimeText(1'234'567'890'120'000'000), "2009-02-13T23:31:30.120Z");
}

// What any JSON reader makes of it.
nlohmann::json Parsed(const std::string& text) { return nlohmann::json::parse(text); }

TEST(JsonWriterTest, ObjectsListsAndCommas) {
  std::string text;
  JsonWriter json(&text);
  json.OpenObject();
  json.OpenList("empty");
  json.CloseList();
  json.OpenObject("within");
  json.CloseObject();
  json.Integer("most", UINT64_MAX);
  json.Flag("yes", true);
  json.OpenList("texts");
  json.Text("a");
  json.Text("b");
  json.CloseList();
  json.TextIfSet("nothing", "");
  json.Raw("raw", "[1,{}]");
  json.Number("half", 0.5F);
  json.CloseObject();
  EXPECT_EQ(text, R"({"empty":[],"within":{},"most":18446744073709551615,"yes":true,)"
                  R"("texts":["a","b"],"raw":[1,{}],"half":0.5})");
}

TEST(JsonWriterTest, TextsOfAnyBytesAreReadBack) {
  SplitMix64 random(2);
  for (int i = 0; i < 20'000; ++i) {
    std::string value;
    // Of few bytes, so that what belongs together in UTF-8 comes often.
    static constexpr unsigned char kBytes[] = {0,    1,    '"',  '\\', '\n', '/',  'a',  0x1f,
                                               0x7f, 0x80, 0xbf, 0xc2, 0xc0, 0xe2, 0x98, 0x82,
                                               0xed, 0xa0, 0xf0, 0x9f, 0x98, 0x80, 0xf4, 0xff};
    for (uint64_t left = random.Below(9); left > 0; --left) {
      value.push_back(static_cast<char>(kBytes[random.Below(std::size(kBytes))]));
    }
    std::string text;
    JsonWriter json(&text);
    json.OpenObject();
    json.Text("value", value);
    json.CloseObject();
    ASSERT_TRUE(nlohmann::json::accept(text)) << text;
    const auto read = Parsed(text)["value"].get<std::string>();
    if (Utf8Prefix(value) == value.size()) {
      ASSERT_EQ(read, value);
    } else {
      ASSERT_NE(read.find("\xEF\xBF\xBD"), std::string::npos);
    }
  }
}

TEST(JsonWriterTest, NumbersAreReadBackToTheBit) {
  SplitMix64 random(3);
  std::vector<float> values = {0.0F,
                               1.0F,
                               std::numeric_limits<float>::max(),
                               std::numeric_limits<float>::lowest(),
                               std::numeric_limits<float>::min(),
                               std::numeric_limits<float>::denorm_min()};
  while (values.size() < 20'000) {
    const auto bits = static_cast<uint32_t>(random.Next());
    float value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    // The other reader takes -0 for a whole number.
    if (std::isfinite(value) && value != 0) values.push_back(value);
  }
  std::string text;
  JsonWriter json(&text);
  json.OpenObject();
  json.Numbers("values", values);
  json.Number("nan", std::numeric_limits<float>::quiet_NaN());
  json.Number("infinity", -std::numeric_limits<float>::infinity());
  json.CloseObject();
  const nlohmann::json read = Parsed(text);
  EXPECT_TRUE(read["nan"].is_null());
  EXPECT_TRUE(read["infinity"].is_null());
  for (size_t i = 0; i < values.size(); ++i) {
    const auto value = static_cast<float>(read["values"][i].get<double>());
    ASSERT_EQ(std::memcmp(&value, &values[i], sizeof(value)), 0) << values[i];
  }
}

TEST(JsonWriterTest, Base64) {
  const std::pair<const char*, const char*> kCases[] = {{"", ""},
                                                        {"f", "Zg=="},
                                                        {"fo", "Zm8="},
                                                        {"foo", "Zm9v"},
                                                        {"foob", "Zm9vYg=="},
                                                        {"fooba", "Zm9vYmE="},
                                                        {"foobar", "Zm9vYmFy"},
                                                        {"\xff\xfe\xfd", "//79"}};
  for (const auto& [bytes, base64] : kCases) {
    std::string text;
    JsonWriter json(&text);
    json.OpenObject();
    json.Base64("b", bytes);
    json.CloseObject();
    EXPECT_EQ(text, std::string(R"({"b":")") + base64 + R"("})");
  }
}

}  // namespace
}  // namespace engram
