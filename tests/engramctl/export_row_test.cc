#include "tools/engramctl/export_row.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <nlohmann/json.hpp>

#include "src/core/hash.h"

namespace engram {
namespace {

TEST(ExportRowTest, TextIsValidUtf8WithoutControls) {
  for (const char* text : {"", "a", "tab\t line\n return\r", "caf\xc3\xa9", "\xf0\x9f\x8c\xb3",
                           "\xed\x9f\xbf", "\xee\x80\x80", "\xf4\x8f\xbf\xbf", "\xc2\xa0"}) {
    EXPECT_TRUE(IsPlainText(text)) << text;
  }
  for (const char* bytes : {"\x01", "\x1b[31m", "\x7f", "\xc2\x85", "\x80", "\xc3", "\xc0\xaf",
                            "\xc1\xbf", "\xe0\x80\x80", "\xed\xa0\x80", "\xf0\x80\x80\x80",
                            "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xe2\x82", "a\xff"}) {
    EXPECT_FALSE(IsPlainText(bytes)) << bytes;
  }
  EXPECT_FALSE(IsPlainText(std::string_view("\0", 1)));
}

// RFC 4648, section 10.
TEST(ExportRowTest, Base64IsThatOfTheRfc) {
  const std::pair<const char*, const char*> examples[] = {{"", ""},
                                                          {"f", "Zg=="},
                                                          {"fo", "Zm8="},
                                                          {"foo", "Zm9v"},
                                                          {"foob", "Zm9vYg=="},
                                                          {"fooba", "Zm9vYmE="},
                                                          {"foobar", "Zm9vYmFy"}};
  for (const auto& [bytes, text] : examples) EXPECT_EQ(Base64(bytes), text);
  EXPECT_EQ(Base64("\xff\xfe\xfb"), "//77");
}

TEST(ExportRowTest, EveryFloatComesBackByWayOfADouble) {
  SplitMix64 random(5);
  RecallHit hit;
  hit.id = "x";
  for (int i = 0; i < 200'000; ++i) {
    const float value = std::bit_cast<float>(static_cast<uint32_t>(random.Next()));
    if (std::isfinite(value)) hit.vector.push_back(value);
  }
  for (const float value : {0.0f, -0.0f, 1.0f, -1.0f, 16'777'216.0f, 1e-45f, 3.4028235e38f}) {
    hit.vector.push_back(value);
  }
  const auto row = nlohmann::json::parse(JsonLineOf(hit));
  ASSERT_EQ(row["vector"].size(), hit.vector.size());
  for (size_t i = 0; i < hit.vector.size(); ++i) {
    const auto back = static_cast<float>(row["vector"][i].get<double>());
    ASSERT_EQ(std::bit_cast<uint32_t>(back), std::bit_cast<uint32_t>(hit.vector[i])) << i;
  }
}

TEST(ExportRowTest, BytesThatAreNoTextHaveANameOfTheirOwn) {
  RecallHit hit;
  hit.id = "a\"b";
  hit.confidence = 0.5F;
  hit.when_ns = -7;
  hit.stamp = 9;
  EXPECT_EQ(JsonLineOf(hit),
            R"({"id":"a\"b","vector":[],"when_ns":-7,"confidence":0.5,"stamp":9,"payload":""})");
  hit.id = "\xff";
  hit.payload = "\x01";
  const auto row = nlohmann::json::parse(JsonLineOf(hit));
  EXPECT_EQ(row["id_base64"], "/w==");
  EXPECT_EQ(row["payload_base64"], "AQ==");
  EXPECT_FALSE(row.contains("id") || row.contains("payload"));
  EXPECT_EQ(IdLineOf("7"), "\"7\"");
  EXPECT_EQ(IdLineOf("\xff"), R"({"id_base64":"/w=="})");
}

TEST(SeenIdsTest, KnowsEachAgain) {
  SeenIds seen;
  for (int i = 0; i < 100'000; ++i) ASSERT_TRUE(seen.Add(std::to_string(i))) << i;
  for (int i = 0; i < 100'000; ++i) ASSERT_FALSE(seen.Add(std::to_string(i))) << i;
  EXPECT_EQ(seen.size(), 100'000u);
}

}  // namespace
}  // namespace engram
