#include "index/checkpoint/checkpoint_file.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "src/core/clock.h"
#include "src/core/hash.h"
#include "src/core/simulated_disk.h"

namespace engram {
namespace {

constexpr const char* kFolder = "log-000";
constexpr uint64_t kPartBytes = uint64_t{4} << 20;  // that a reader reads at a time

std::vector<std::byte> Extent(ExtentKind kind, size_t body_bytes, uint8_t fill) {
  std::vector<std::byte> extent(sizeof(ExtentHeader) + (body_bytes + 7) / 8 * 8);
  std::memset(extent.data() + sizeof(ExtentHeader), fill, body_bytes);
  const size_t bytes = SealShardExtent(kind, fill, body_bytes, extent.data());
  EXPECT_EQ(bytes, extent.size());
  return extent;
}

TEST(CheckpointNameTest, IsReadAsItWasPrinted) {
  EXPECT_EQ(CheckpointName(42), "checkpoint-0000002a");
  for (const uint32_t round : {0u, 1u, 42u, 0xABCDEFu, UINT32_MAX}) {
    EXPECT_EQ(CheckpointRound(CheckpointName(round)), round);
  }
  for (const char* name :
       {"", "checkpoint-", "checkpoint-2a", "checkpoint-0000002A", "checkpoint-0000002g",
        "checkpoint-+000002a", "checkpoint-0x00002a", "checkpoint-0000002a.new",
        "checkpoint-00000002a", "Checkpoint-0000002a", "segment-0000002a"}) {
    EXPECT_EQ(CheckpointRound(name), std::nullopt) << name;
  }
}

TEST(ShardExtentTest, EveryFlippedBitAndEveryOtherLengthIsRefused) {
  const std::vector<std::byte> whole = Extent(kSessionsExtent, 61, 7);
  ExtentHeader header;
  const auto body = OpenShardExtent(whole, &header);
  ASSERT_TRUE(body);
  EXPECT_EQ(header.kind, kSessionsExtent);
  EXPECT_EQ(header.count, 7u);
  EXPECT_EQ(body->size(), 64u);
  EXPECT_EQ((*body)[60], std::byte{7});
  EXPECT_EQ((*body)[61], std::byte{0});
  for (size_t bit = 0; bit < whole.size() * 8; ++bit) {
    std::vector<std::byte> flipped = whole;
    flipped[bit / 8] ^= std::byte{static_cast<uint8_t>(1u << (bit % 8))};
    EXPECT_FALSE(OpenShardExtent(flipped, &header)) << bit;
  }
  for (size_t bytes = 0; bytes < whole.size(); ++bytes) {
    EXPECT_FALSE(OpenShardExtent(std::span(whole).first(bytes), &header)) << bytes;
  }
  std::vector<std::byte> longer = whole;
  longer.resize(whole.size() + 8);
  EXPECT_FALSE(OpenShardExtent(longer, &header));
}

class CheckpointReaderTest : public testing::Test {
 protected:
  CheckpointReaderTest() : disk_(medium_.Open(kFolder)) {}

  void Write(const std::string& name, std::span<const std::byte> content) {
    if (disk_ == nullptr) disk_ = medium_.Open(kFolder);
    const auto file = disk_->Open(name, OpenMode::kCreate, Caching::kBuffered);
    ASSERT_TRUE(file);
    ASSERT_TRUE(disk_->Write(file->id, 0, content, 0));
    Await(1);
    ASSERT_TRUE(disk_->Flush(file->id, 0));
    Await(1);
    disk_->Close(file->id);
  }
  void Await(size_t ends) {
    DiskCompletion end;
    while (ends > 0) {
      disk_->Wait(kNanosPerSecond);
      const size_t count = disk_->Poll({&end, 1});
      if (count > 0) {
        EXPECT_EQ(end.error, 0);
      }
      ends -= count;
    }
  }

  struct Outcome {
    std::vector<std::pair<uint64_t, size_t>> extents;  // offset, bytes
    std::optional<Error> error;
    std::string place;  // in the end
  };
  // Reads all of it, and compares with `content`.
  Outcome ReadAll(const std::string& name, uint64_t bytes, std::span<const std::byte> content) {
    Outcome outcome;
    CheckpointReader reader(disk_.get());
    if (auto opened = reader.Open(name, bytes); !opened) {
      outcome.error = opened.error();
      return outcome;
    }
    EXPECT_EQ(reader.bytes(), bytes);
    for (int waits = 0; waits < 1'000;) {
      std::span<const std::byte> extent;
      const auto step = reader.Next(&extent);
      outcome.place = reader.Place();
      if (!step) {
        outcome.error = step.error();
        return outcome;
      }
      if (*step == CheckpointReader::Step::kEnd) return outcome;
      if (*step == CheckpointReader::Step::kPending) {
        disk_->Wait(kNanosPerSecond);
        ++waits;
        continue;
      }
      const uint64_t at = reader.offset();
      EXPECT_LE(at + extent.size(), content.size());
      EXPECT_EQ(std::memcmp(extent.data(), content.data() + at, extent.size()), 0) << at;
      outcome.extents.emplace_back(at, extent.size());
    }
    ADD_FAILURE() << "reading does not end";
    return outcome;
  }

  // Of several parts; extents of many lengths, the largest included, lie across their borders.
  static std::vector<std::byte> LongFile(uint64_t least_bytes, uint64_t seed,
                                         std::vector<std::pair<uint64_t, size_t>>* extents) {
    SplitMix64 random(seed);
    std::vector<std::byte> content;
    while (content.size() < least_bytes) {
      const size_t most = kMaxExtentBytes - sizeof(ExtentHeader);
      size_t body = random.Below(3) == 0 ? random.Below(200) : random.Below(most + 1);
      if (random.Below(10) == 0) body = most;
      const auto extent = Extent(kSessionsExtent, body, static_cast<uint8_t>(random.Below(256)));
      extents->emplace_back(content.size(), extent.size());
      content.insert(content.end(), extent.begin(), extent.end());
    }
    return content;
  }

  SimulatedClock clock_;
  SimulatedDisk medium_{&clock_, 1};
  std::unique_ptr<Disk> disk_;
};

TEST_F(CheckpointReaderTest, ExtentsAcrossItsPartsAreWhole) {
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    std::vector<std::pair<uint64_t, size_t>> extents;
    const auto content = LongFile(3 * kPartBytes + seed * 300'000, seed, &extents);
    const std::string name = CheckpointName(static_cast<uint32_t>(seed));
    Write(name, content);
    const Outcome outcome = ReadAll(name, content.size(), content);
    EXPECT_FALSE(outcome.error) << outcome.error->message;
    EXPECT_EQ(outcome.extents, extents);
  }
}

// A header, or the first byte of an extent, at each place around a border.
TEST_F(CheckpointReaderTest, ABorderMayBeAnywhereInAHeader) {
  for (uint64_t before = 0; before <= 2 * sizeof(ExtentHeader); before += 8) {
    std::vector<std::byte> content;
    std::vector<std::pair<uint64_t, size_t>> extents;
    const auto add = [&](size_t body) {
      const auto extent = Extent(kSpaceListExtent, body, 3);
      extents.emplace_back(content.size(), extent.size());
      content.insert(content.end(), extent.begin(), extent.end());
    };
    const uint64_t until = kPartBytes + sizeof(ExtentHeader) - before;
    while (until - content.size() > 2 * uint64_t{kMaxExtentBytes}) add(200'000);
    while (content.size() < until) {
      const uint64_t left = until - content.size();
      const uint64_t bytes = left > kMaxExtentBytes ? left / 2 / 8 * 8 : left;
      add(bytes - sizeof(ExtentHeader));
    }
    ASSERT_EQ(content.size(), until);
    add(100);
    add(0);
    Write("checkpoint-00000001", content);
    const Outcome outcome = ReadAll("checkpoint-00000001", content.size(), content);
    EXPECT_FALSE(outcome.error) << outcome.error->message;
    EXPECT_EQ(outcome.extents, extents) << before;
  }
}

// The reader never hands out less than a whole extent, and names where the broken one begins.
TEST_F(CheckpointReaderTest, AFileMayEndAnywhere) {
  std::vector<std::byte> content;
  std::vector<std::pair<uint64_t, size_t>> extents;
  for (const size_t body : {24, 16, 100, 0}) {
    const auto extent = Extent(kSessionsExtent, body, 9);
    extents.emplace_back(content.size(), extent.size());
    content.insert(content.end(), extent.begin(), extent.end());
  }
  Write("checkpoint-00000001", content);
  for (size_t bytes = 0; bytes <= content.size(); ++bytes) {
    const Outcome outcome = ReadAll("checkpoint-00000001", bytes, content);
    std::vector<std::pair<uint64_t, size_t>> whole;
    for (const auto& extent : extents) {
      if (extent.first + extent.second <= bytes) whole.push_back(extent);
    }
    EXPECT_EQ(outcome.extents, whole) << bytes;
    const uint64_t end = whole.empty() ? 0 : whole.back().first + whole.back().second;
    EXPECT_EQ(outcome.error.has_value(), end != bytes) << bytes;
    if (!outcome.error) continue;
    EXPECT_EQ(outcome.error->code, ErrorCode::kCorrupt);
    const std::string place = "log-000/checkpoint-00000001 at offset " + std::to_string(end) + ":";
    EXPECT_NE(outcome.error->message.find(place), std::string::npos) << outcome.error->message;
  }
}

TEST_F(CheckpointReaderTest, AFileThatIsShorterThanTheManifestSaysIsCorrupt) {
  const auto content = Extent(kShardExtent, 24, 1);
  Write("checkpoint-00000001", content);
  const Outcome outcome = ReadAll("checkpoint-00000001", content.size() + 1, content);
  ASSERT_TRUE(outcome.error);
  EXPECT_EQ(outcome.error->code, ErrorCode::kCorrupt);
  EXPECT_NE(outcome.error->message.find("log-000/checkpoint-00000001"), std::string::npos);
  const Outcome missing = ReadAll("checkpoint-00000002", 8, content);
  ASSERT_TRUE(missing.error);
  EXPECT_NE(missing.error->message.find("log-000/checkpoint-00000002"), std::string::npos);
}

// The saver pads the last page; what is there does not matter.
TEST_F(CheckpointReaderTest, WhatIsBeyondTheManifestsBytesIsNotRead) {
  auto content = Extent(kShardExtent, 24, 1);
  const size_t bytes = content.size();
  content.resize(4096, std::byte{0xFF});
  Write("checkpoint-00000001", content);
  const Outcome outcome = ReadAll("checkpoint-00000001", bytes, content);
  EXPECT_FALSE(outcome.error);
  EXPECT_EQ(outcome.extents.size(), 1u);
}

TEST_F(CheckpointReaderTest, AnEmptyFileHasNoExtents) {
  Write("checkpoint-00000001", {});
  const Outcome outcome = ReadAll("checkpoint-00000001", 0, {});
  EXPECT_FALSE(outcome.error);
  EXPECT_TRUE(outcome.extents.empty());
  EXPECT_EQ(outcome.place, "log-000/checkpoint-00000001 at offset 0");
}

// Whatever the reader hands out after a flip, either it refuses, or the extent's own checksum does.
TEST_F(CheckpointReaderTest, NoFlippedBitGoesByUnnoticed) {
  std::vector<std::byte> content;
  for (const size_t body : {24, 48}) {
    const auto extent = Extent(kSessionsExtent, body, 9);
    content.insert(content.end(), extent.begin(), extent.end());
  }
  Write("checkpoint-00000001", content);
  for (uint64_t bit = 0; bit < content.size() * 8; ++bit) {
    medium_.FlipBit(kFolder, "checkpoint-00000001", bit);
    CheckpointReader reader(disk_.get());
    ASSERT_TRUE(reader.Open("checkpoint-00000001", content.size()));
    bool noticed = false;
    for (int n = 0; n < 100 && !noticed; ++n) {
      std::span<const std::byte> extent;
      const auto step = reader.Next(&extent);
      ExtentHeader header;
      if (!step) {
        noticed = true;
        EXPECT_EQ(step.error().code, ErrorCode::kCorrupt);
        const std::string place = bit / 8 < 64 ? "at offset 0:" : "at offset ";
        EXPECT_NE(step.error().message.find(place), std::string::npos) << step.error().message;
      } else if (*step == CheckpointReader::Step::kPending) {
        disk_->Wait(kNanosPerSecond);
      } else if (*step == CheckpointReader::Step::kEnd) {
        break;
      } else {
        noticed = !OpenShardExtent(extent, &header);
      }
    }
    EXPECT_TRUE(noticed) << "bit " << bit;
    medium_.FlipBit(kFolder, "checkpoint-00000001", bit);
  }
}

TEST_F(CheckpointReaderTest, AReadErrorIsReportedByName) {
  std::vector<std::pair<uint64_t, size_t>> extents;
  const auto content = LongFile(2 * kPartBytes, 5, &extents);
  Write("checkpoint-00000001", content);
  medium_.SetFaults({.read_error_probability = 1});
  const Outcome outcome = ReadAll("checkpoint-00000001", content.size(), content);
  ASSERT_TRUE(outcome.error);
  EXPECT_NE(outcome.error->code, ErrorCode::kCorrupt);
  EXPECT_NE(outcome.error->message.find("log-000/checkpoint-00000001"), std::string::npos);
  EXPECT_EQ(disk_->in_flight(), 0u) << "the reader waits for what it began";
}

// What it has begun reads into its memory: it must not end before that.
TEST_F(CheckpointReaderTest, EndsInTheMidstOfReading) {
  std::vector<std::pair<uint64_t, size_t>> extents;
  const auto content = LongFile(3 * kPartBytes, 6, &extents);
  Write("checkpoint-00000001", content);
  for (size_t take = 0; take < extents.size(); take += 9) {
    CheckpointReader reader(disk_.get());
    ASSERT_TRUE(reader.Open("checkpoint-00000001", content.size()));
    for (size_t taken = 0; taken < take;) {
      std::span<const std::byte> extent;
      const auto step = reader.Next(&extent);
      ASSERT_TRUE(step);
      if (*step == CheckpointReader::Step::kPending) disk_->Wait(kNanosPerSecond);
      taken += *step == CheckpointReader::Step::kExtent ? 1 : 0;
    }
  }
  EXPECT_EQ(disk_->in_flight(), 0u);
}

}  // namespace
}  // namespace engram
