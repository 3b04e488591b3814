#include "src/checkpoint_manifest.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "src/core/clock.h"
#include "src/core/crc32c.h"
#include "src/core/log_files.h"
#include "src/core/simulated_disk.h"

namespace engram {
namespace {

CheckpointManifest Sample() {
  CheckpointManifest manifest;
  manifest.round = 42;
  manifest.logs = {{.from = 0x1'0000'2000, .epoch = 3, .file_bytes = 123'456},
                   {.from = 0, .epoch = 0, .file_bytes = 176},
                   {.from = UINT64_MAX, .epoch = UINT32_MAX, .file_bytes = UINT64_MAX}};
  manifest.kept = {{.log = 3, .from = 0x7'0000'1000}, {.log = 254, .from = 0x1000}};
  return manifest;
}

// `lines` with the checksum that belongs to them.
std::string Signed(const std::string& lines) {
  char crc[32];
  std::snprintf(crc, sizeof(crc), "crc32c %08x\n",
                Crc32c(std::as_bytes(std::span(lines.data(), lines.size()))));
  return lines + crc;
}

constexpr std::string_view kHead = "engram checkpoint\nversion 2\n";
constexpr std::string_view kLog0 = "log 0 from 0000000000001000 epoch 2 file_bytes 176\n";
constexpr std::string_view kLog1 = "log 1 from 0000000000002000 epoch 3 file_bytes 184\n";

std::string Text(std::string_view head, std::string_view counts, std::string_view rest) {
  return Signed(std::string(head) + std::string(counts) + std::string(rest));
}

TEST(CheckpointManifestTest, IsReadAsItWasPrinted) {
  const CheckpointManifest manifest = Sample();
  EXPECT_EQ(ParseManifest(PrintManifest(manifest)), manifest);
  CheckpointManifest least;
  least.logs = {{}};
  EXPECT_EQ(ParseManifest(PrintManifest(least)), least);
  CheckpointManifest most;
  most.round = UINT32_MAX;
  most.logs.resize(kVaultLog);
  EXPECT_EQ(ParseManifest(PrintManifest(most)), most);
}

// A daemon of tomorrow reads what this one wrote: the text is fixed.
TEST(CheckpointManifestTest, HasThisText) {
  CheckpointManifest manifest;
  manifest.round = 7;
  manifest.logs = {{.from = 0x1000, .epoch = 2, .file_bytes = 176},
                   {.from = 0x2000, .epoch = 3, .file_bytes = 184}};
  manifest.kept = {{.log = 2, .from = 0x3'0000'1000}};
  EXPECT_EQ(PrintManifest(manifest),
            Text(kHead, "round 7\nshards 2\n",
                 std::string(kLog0) + std::string(kLog1) + "kept 2 from 0000000300001000\n"));
}

TEST(CheckpointManifestTest, EveryFlippedBitIsRefused) {
  const std::string whole = PrintManifest(Sample());
  for (size_t bit = 0; bit < whole.size() * 8; ++bit) {
    std::string text = whole;
    text[bit / 8] = static_cast<char>(text[bit / 8] ^ (1 << (bit % 8)));
    EXPECT_EQ(ParseManifest(text), std::nullopt) << "bit " << bit << ":\n" << text;
  }
}

TEST(CheckpointManifestTest, WhatIsCutOffOrGoesOnIsRefused) {
  const std::string whole = PrintManifest(Sample());
  for (size_t bytes = 0; bytes < whole.size(); ++bytes) {
    EXPECT_EQ(ParseManifest(whole.substr(0, bytes)), std::nullopt) << bytes << " bytes";
    if (bytes > 0) {
      EXPECT_EQ(ParseManifest(whole.substr(bytes)), std::nullopt) << "from " << bytes;
    }
  }
  for (const char* more : {" ", "\n", "x", "gone 1\n"}) {
    EXPECT_EQ(ParseManifest(whole + more), std::nullopt) << more;
  }
  EXPECT_EQ(ParseManifest(whole + whole), std::nullopt);
}

// With a checksum that fits: what the grammar alone refuses.
TEST(CheckpointManifestTest, KeepsToOrderAndBounds) {
  const std::string logs = std::string(kLog0) + std::string(kLog1);
  ASSERT_TRUE(ParseManifest(Text(kHead, "round 7\nshards 2\n", logs)));
  const std::string bad[] = {
      Text("engram checkpoint\nversion 1\n", "round 7\nshards 2\n", logs),
      Text("engram checkpoint\nversion 3\n", "round 7\nshards 2\n", logs),
      Text("engram checkpoint\nversion 20\n", "round 7\nshards 2\n", logs),
      Text(kHead, "shards 2\nround 7\n", logs),
      Text(kHead, "round 7\nshards 1\n", logs),
      Text(kHead, "round 7\nshards 3\n", logs),
      Text(kHead, "round 7\nshards 0\n", ""),
      Text(kHead, "round 7\nshards 256\n", logs),
      Text(kHead, "round 4294967296\nshards 2\n", logs),
      Text(kHead, "round -1\nshards 2\n", logs),
      Text(kHead, "round \nshards 2\n", logs),
      Text(kHead, "round 7\nshards 2\n", std::string(kLog1) + std::string(kLog0)),
      Text(kHead, "round 7\nshards 2\n", std::string(kLog0) + std::string(kLog0)),
      Text(kHead, "round 7\nshards 2\n", logs + "kept 1 from 0000000000001000\n"),
      Text(kHead, "round 7\nshards 2\n", logs + "kept 255 from 0000000000001000\n"),
      Text(kHead, "round 7\nshards 2\n", logs + "kept 2\n"),
      Text(kHead, "round 7\nshards 2\n",
           logs + "kept 3 from 0000000000001000\nkept 2 from 0000000000001000\n"),
      Text(kHead, "round 7\nshards 2\n", logs + "more\n"),
      Text(kHead, "round 7\nshards 1\n", "log 0 from 10000000000000000 epoch 2 file_bytes 176\n"),
      Text(kHead, "round 7\nshards 1\n",
           "log 0 from 0000000000001000 epoch 4294967296 file_bytes 176\n"),
      Text(kHead, "round 7\nshards 1\n",
           "log 0 from 0000000000001000 epoch 2 file_bytes 18446744073709551616\n"),
  };
  for (const std::string& text : bad) EXPECT_EQ(ParseManifest(text), std::nullopt) << text;
}

class ManifestFileTest : public testing::Test {
 protected:
  SimulatedClock clock_;
  SimulatedDisk medium_{&clock_, 1};
};

TEST_F(ManifestFileTest, IsOneFileOrNone) {
  const auto disk = medium_.Open("root");
  const auto none = ReadManifest(*disk);
  ASSERT_TRUE(none) << none.error().message;
  EXPECT_FALSE(*none);
  ASSERT_TRUE(WriteManifest(*disk, Sample()));
  const auto read = ReadManifest(*disk);
  ASSERT_TRUE(read) << read.error().message;
  EXPECT_EQ(*read, Sample());
}

TEST_F(ManifestFileTest, ADamagedOneIsCorruptByName) {
  const auto disk = medium_.Open("root");
  ASSERT_TRUE(WriteManifest(*disk, Sample()));
  for (const uint64_t bit : {0, 301, 777}) {
    medium_.FlipBit("root", kCheckpointManifestName, bit);
    const auto read = ReadManifest(*disk);
    ASSERT_FALSE(read);
    EXPECT_EQ(read.error().code, ErrorCode::kCorrupt);
    EXPECT_NE(read.error().message.find("root/CHECKPOINT"), std::string::npos)
        << read.error().message;
    medium_.FlipBit("root", kCheckpointManifestName, bit);
  }
}

TEST_F(ManifestFileTest, AnotherVersionIsNoDamage) {
  const auto disk = medium_.Open("root");
  for (const char* version : {"1", "3"}) {
    const std::string text = Text("engram checkpoint\nversion " + std::string(version) + "\n",
                                  "round 7\nshards 1\n", kLog0);
    ASSERT_TRUE(ReplaceFile(*disk, kCheckpointManifestName,
                            std::as_bytes(std::span(text.data(), text.size()))));
    const auto read = ReadManifest(*disk);
    ASSERT_FALSE(read);
    EXPECT_EQ(read.error().code, ErrorCode::kUnavailable);
    EXPECT_NE(read.error().message.find("version " + std::string(version)), std::string::npos);
    EXPECT_NE(read.error().message.find("version 2"), std::string::npos) << read.error().message;
  }
}

TEST_F(ManifestFileTest, WhatCannotBeReadIsNotTakenForNone) {
  const auto disk = medium_.Open("root");
  ASSERT_TRUE(WriteManifest(*disk, Sample()));
  medium_.SetFaults({.read_error_probability = 1});
  EXPECT_FALSE(ReadManifest(*disk));
}

// After a power cut at any moment of the second one's way to the disk it is the first or the
// second, and the second once WriteManifest has said so.
TEST(ManifestCrashTest, IsTheOldOneOrTheNewOne) {
  CheckpointManifest second = Sample();
  second.round = 43;
  int olds = 0;
  int news = 0;
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    SimulatedClock clock;
    SimulatedDisk medium(&clock, seed);
    {
      const auto disk = medium.Open("root");
      ASSERT_TRUE(WriteManifest(*disk, Sample()));
      medium.SetFaults({.write_error_probability = 0.3, .flush_error_probability = 0.3});
      const bool written = WriteManifest(*disk, second).has_value();
      medium.SetFaults({});
      medium.Crash();
      const auto after = medium.Open("root");
      const auto read = ReadManifest(*after);
      ASSERT_TRUE(read) << read.error().message;
      ASSERT_TRUE(*read);
      EXPECT_TRUE(**read == Sample() || **read == second) << seed;
      if (written) {
        EXPECT_EQ(**read, second) << seed;
      }
      ++((**read == second) ? news : olds);
    }
  }
  EXPECT_GT(olds, 0);
  EXPECT_GT(news, 0);
}

}  // namespace
}  // namespace engram
