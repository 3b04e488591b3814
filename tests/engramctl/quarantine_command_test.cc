// What `engramctl quarantine` says of records is all that they hold.

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "index/log/replay_guard.h"
#include "src/core/attributes.h"
#include "src/core/log_record.h"
#include "tests/support/scratch_directory.h"
#include "tools/engramctl/commands.h"

namespace engram {
namespace {

constexpr LogAddress kAddress = MakeLogAddress(3, MakeLogPosition(0x2a, 0x1f40));

class QuarantineCommandTest : public testing::Test {
 protected:
  void Keep(const std::string& id, const std::string& payload, const std::string& attributes = {}) {
    const std::vector<float> vector = {1, 2, 3};
    LogRecord record;
    record.dtype = VectorDtype::kF32;
    record.dimension = static_cast<uint16_t>(vector.size());
    record.stamp = 77;
    record.session = SessionId(5);
    record.space = "s";
    record.vector = std::as_bytes(std::span(vector));
    record.id = id;
    record.attributes = std::as_bytes(std::span(attributes));
    record.payload = std::as_bytes(std::span(payload));
    QuarantinedRecord kept{.address = kAddress,
                           .stamp = record.stamp,
                           .since_unix_ns = 123,
                           .crashes = 2,
                           .record = std::vector<std::byte>(LogRecordBytes(record))};
    WriteLogRecord(record, kAddress, kept.record.data());
    const std::string folder = folder_.path() + "/" + kQuarantineFolder;
    std::filesystem::create_directory(folder);
    const std::vector<std::byte> bytes = WriteQuarantined(kept);
    std::ofstream file(folder + "/" + QuarantineFileName(kAddress), std::ios::binary);
    file.write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
  }
  std::string Said(bool whole, bool json) const {
    testing::internal::CaptureStdout();
    EXPECT_EQ(RunQuarantine({.directory = folder_.path(), .json = json, .whole = whole}), kExitOk);
    return testing::internal::GetCapturedStdout();
  }
  nlohmann::json Dump() const { return nlohmann::json::parse(Said(true, false)); }

  ScratchDirectory folder_;
};

TEST_F(QuarantineCommandTest, AttributesAreThere) {
  std::string attributes;
  ASSERT_TRUE(AppendAttribute("source", "docs", &attributes));
  ASSERT_TRUE(AppendAttribute(kTagKey, "\xff", &attributes));
  Keep("id", "a payload", attributes);
  const auto wanted = nlohmann::json::parse(
      R"([{"key": "source", "value": "docs"}, {"key": "", "value_base64": "/w=="}])");
  EXPECT_EQ(Dump()["attributes"], wanted);
  EXPECT_EQ(Dump()["payload"], "a payload");
}

TEST_F(QuarantineCommandTest, TextIsText) {
  Keep("an id with \xc3\xa4", "a \"payload\"");
  EXPECT_EQ(Dump()["id"], "an id with \xc3\xa4");
  EXPECT_EQ(Dump()["payload"], "a \"payload\"");
  EXPECT_FALSE(Dump().contains("id_base64"));
  EXPECT_FALSE(Dump().contains("payload_base64"));
  EXPECT_NE(Said(false, false).find("id \"an id with \xc3\xa4\""), std::string::npos);
}

TEST_F(QuarantineCommandTest, OtherBytesAreBase64) {
  Keep("\xff\x01", std::string("\0\x80 \xfe", 4));
  EXPECT_EQ(Dump()["id_base64"], "/wE=");
  EXPECT_EQ(Dump()["payload_base64"], "AIAg/g==");
  EXPECT_FALSE(Dump().contains("id"));
  EXPECT_FALSE(Dump().contains("payload"));
  EXPECT_EQ(nlohmann::json::parse(Said(false, true))["id_base64"], "/wE=");
  EXPECT_NE(Said(false, false).find("id base64 /wE=,"), std::string::npos);
}

TEST_F(QuarantineCommandTest, ADumpHasNothingButJsonOnStandardOutput) {
  testing::internal::CaptureStderr();
  EXPECT_EQ(Said(true, false), "");
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "nothing is in quarantine\n");
  EXPECT_EQ(Said(false, false), "nothing is in quarantine\n");
  EXPECT_EQ(Said(false, true), "");
}

}  // namespace
}  // namespace engram
