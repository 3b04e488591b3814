#include "index/log/log_verifier.h"

#include <gtest/gtest.h>
#include <malloc.h>

#include <algorithm>
#include <string>
#include <vector>

#include "src/core/log_files.h"
#include "tests/index/log/log_builder.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

LogReport Verify(const LogFiles& files, LogPosition replay_from = 0, bool needs = false) {
  MemoryDisk disk(&files);
  auto report = VerifyLog(disk, 0, kTestInstance, replay_from, needs);
  EXPECT_TRUE(report.has_value()) << report.error().message;
  CHECK(disk.open_files() == 0 && disk.in_flight() == 0, "everything is closed again");
  return report.has_value() ? *std::move(report) : LogReport{};
}

// Three segments: two with blocks of several sizes, markers among them, one prepared ahead.
LogBuilder SmallLog() {
  LogBuilder builder;
  builder.AddSegment(1);
  // The first one is left before its end, so that there are zeros.
  for (size_t i = 0; OffsetOf(builder.position()) < 9 * kLogPageBytes; ++i) {
    builder.AddBlock(i % 3 == 2 ? 0 : 20 * (i % 4));
  }
  builder.GoToNextSegment();
  builder.set_epoch(2);
  for (size_t i = 0; OffsetOf(builder.position()) < 9 * kLogPageBytes; ++i) {
    builder.AddBlock(i % 3 == 0 ? 0 : 20 * (i % 4));
  }
  builder.AddBlock(0);
  builder.AddSegment(3);
  return builder;
}

// A start would refuse, so this is damage; a log that nobody needs may be empty there.
TEST(LogVerifierTest, TheSegmentThatIsReplayedFirstHasToBeThere) {
  LogBuilder builder = SmallLog();
  const LogPosition from = MakeLogPosition(4, kLogPageBytes);
  EXPECT_TRUE(Verify(builder.files(), from).sound());
  const LogReport report = Verify(builder.files(), from, true);
  ASSERT_EQ(report.damages.size(), 1u);
  EXPECT_EQ(report.damages[0].file, SegmentName(4));
  EXPECT_TRUE(Says(report.damages[0].text, "missing"));
  EXPECT_TRUE(Verify(builder.files(), MakeLogPosition(2, kLogPageBytes), true).sound());
  EXPECT_TRUE(Verify(builder.files(), 0, true).sound());
}

TEST(LogVerifierTest, CountsWhatIsThere) {
  LogBuilder builder = SmallLog();
  const LogReport report = Verify(builder.files());
  EXPECT_TRUE(report.sound());
  EXPECT_TRUE(report.rests.empty() && report.unfinished.empty());
  EXPECT_EQ(report.segments, 3u);
  EXPECT_EQ(report.blocks, builder.blocks().size());
  EXPECT_EQ(report.records, builder.texts().size());
  EXPECT_EQ(report.first_stamp, 1u);
  EXPECT_EQ(report.last_stamp, builder.texts().size());
  EXPECT_EQ(report.last_epoch, 2u);
  EXPECT_EQ(report.end, builder.position());
  EXPECT_EQ(report.sessions, 3u);
  EXPECT_EQ(report.records_of_space.size(), 3u);
  uint64_t of_kinds = 0;
  for (const uint64_t count : report.records_of_kind) of_kinds += count;
  EXPECT_EQ(of_kinds, report.records);
  EXPECT_GT(report.records_of_kind[static_cast<size_t>(LogRecordKind::kUpsert)], 20u);
}

// The report of one turned bit names its byte.
::testing::AssertionResult Names(const LogReport& report, const std::string& file, uint64_t bit) {
  if (report.sound()) return ::testing::AssertionFailure() << "nothing was seen";
  if (report.mended.size() + report.damages.size() != 1) {
    return ::testing::AssertionFailure() << "more was seen than there is";
  }
  if (!report.mended.empty()) {
    if (report.mended[0] == MendedBit{file, bit}) return ::testing::AssertionSuccess();
    return ::testing::AssertionFailure() << report.mended[0].file << " " << report.mended[0].bit;
  }
  const LogFinding& damage = report.damages[0];
  if (damage.file == file && damage.offset == bit / 8) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << damage.file << " " << damage.offset << " " << damage.text;
}

// Turns every `step`th bit of all files, and back.
void FlipBits(LogBuilder& builder, uint64_t step) {
  // A million readers are made: their memory need not go to the kernel and come back each time.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 32 << 20);
  const uint64_t records = builder.texts().size();
  for (auto& [name, bytes] : builder.files()) {
    for (uint64_t bit = 0; bit < 8 * bytes.size(); bit += step) {
      const std::byte mask = std::byte{1} << (bit % 8);
      bytes[bit / 8] ^= mask;
      const LogReport report = Verify(builder.files());
      ASSERT_TRUE(Names(report, name, bit)) << name << " bit " << bit;
      ASSERT_EQ(report.records, records) << name << " bit " << bit;
      bytes[bit / 8] ^= mask;
    }
  }
}

// Each bit of each file: seen, and named with file and offset; and no record is lost for it.
TEST(LogVerifierTest, EveryFlippedBitIsSeen) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddBlock(2);
  builder.AddBlock(0);
  builder.AddBlock(40);
  builder.GoToNextSegment();
  builder.AddBlock(1);
  builder.AddBlock(3);
  FlipBits(builder, kSanitized ? 47 : 1);
}

// The same with more blocks and a segment ahead.
TEST(LogVerifierTest, FlippedBitsOfASmallLogAreSeen) {
  LogBuilder builder = SmallLog();
  FlipBits(builder, kSanitized ? 1'009 : 101);
}

// The same by chance in segments of several chunks.
TEST(LogVerifierTest, FlippedBitsOfALargeLogAreSeen) {
  LogBuilder builder(10u << 20);
  builder.AddSegment(1);
  uint64_t stamp = 0;
  while (SegmentOf(builder.position()) < 3) {
    std::vector<OwnedRecord> records;
    for (size_t i = builder.random().Below(80); i > 0; --i) {
      records.push_back(RandomRecord(builder.random(), ++stamp, 65'536));
    }
    builder.AddBlock(records);
  }
  for (int i = 0; i < (kSanitized ? 10 : 60); ++i) {
    const auto number = static_cast<uint32_t>(1 + builder.random().Below(3));
    Bytes& bytes = builder.file(number);
    const uint64_t bit = builder.random().Below(8 * bytes.size());
    const std::byte mask = std::byte{1} << (bit % 8);
    bytes[bit / 8] ^= mask;
    const LogReport report = Verify(builder.files());
    ASSERT_TRUE(Names(report, SegmentName(number), bit)) << number << " bit " << bit;
    ASSERT_EQ(report.records, stamp);
    bytes[bit / 8] ^= mask;
  }
}

TEST(LogVerifierTest, GoesOnBehindDamage) {
  LogBuilder builder;
  builder.AddSegment(1);
  for (int i = 0; i < 60; ++i) builder.AddBlock(30);
  ASSERT_GE(SegmentOf(builder.position()), 3u);
  // Two blocks, the second one in another segment.
  const LogPosition first = builder.blocks()[5];
  const LogPosition second = builder.blocks()[40];
  ASSERT_NE(SegmentOf(first), SegmentOf(second));
  for (const LogPosition bad : {first, second}) {
    builder.At(bad + 200) ^= std::byte{0x18};
  }
  const LogReport report = Verify(builder.files());
  ASSERT_EQ(report.damages.size(), 2u);
  EXPECT_EQ(report.damages[0].file, SegmentName(SegmentOf(first)));
  EXPECT_EQ(report.damages[0].offset / kLogPageBytes, OffsetOf(first) / kLogPageBytes);
  EXPECT_EQ(report.damages[1].file, SegmentName(SegmentOf(second)));
  EXPECT_EQ(report.records, 58u * 30u);
  EXPECT_EQ(report.end, builder.position());
}

TEST(LogVerifierTest, GoesOnBehindAMissingSegment) {
  LogBuilder builder;
  builder.AddSegment(1);
  while (SegmentOf(builder.position()) < 4) builder.AddBlock(30);
  builder.files().erase(SegmentName(2));
  const LogReport report = Verify(builder.files());
  ASSERT_EQ(report.damages.size(), 1u);
  EXPECT_EQ(report.damages[0].file, SegmentName(2));
  EXPECT_TRUE(Says(report.damages[0].text, "is missing"));
  EXPECT_EQ(report.end, builder.position());
  EXPECT_EQ(report.segments, 3u);
}

// Before the position from where the log is replayed any segment may have been freed; from there on
// none may be missing.
TEST(LogVerifierTest, GapsBeforeWhatIsReplayedAreNoDamage) {
  LogBuilder builder;
  builder.AddSegment(1);
  while (SegmentOf(builder.position()) < 8) builder.AddBlock(30);
  const LogReport whole = Verify(builder.files());
  for (const uint32_t number : {2, 3, 5}) builder.files().erase(SegmentName(number));
  const LogPosition from = MakeLogPosition(6, kLogPageBytes);
  const LogReport report = Verify(builder.files(), from);
  EXPECT_TRUE(report.sound());
  EXPECT_TRUE(report.rests.empty());
  EXPECT_EQ(report.segments, 5u);
  EXPECT_EQ(report.end, builder.position());
  EXPECT_LT(report.records, whole.records);
  EXPECT_FALSE(Verify(builder.files(), MakeLogPosition(5, kLogPageBytes)).sound());
  EXPECT_FALSE(Verify(builder.files()).sound());
  // Every bit of what stands between gaps.
  const uint64_t step = kSanitized ? 100'003 : 10'007;
  for (const uint32_t number : {1, 4}) {
    Bytes& bytes = builder.file(number);
    for (uint64_t bit = number; bit < 8 * bytes.size(); bit += step) {
      const std::byte mask = std::byte{1} << (bit % 8);
      bytes[bit / 8] ^= mask;
      ASSERT_TRUE(Names(Verify(builder.files(), from), SegmentName(number), bit))
          << number << " bit " << bit;
      bytes[bit / 8] ^= mask;
    }
  }
  // The last block before a gap was acknowledged, as those behind the gap were.
  for (const LogPosition block : builder.blocks()) {
    const auto next = std::ranges::upper_bound(builder.blocks(), block);
    if (SegmentOf(block) != 4 || SegmentOf(*next) != 5) continue;
    builder.Flip(block + 100, 1);
    builder.Flip(block + 300, 2);
    const LogReport damaged = Verify(builder.files(), from);
    ASSERT_EQ(damaged.damages.size(), 1u);
    EXPECT_EQ(damaged.damages[0].file, SegmentName(4));
    EXPECT_EQ(damaged.damages[0].offset, OffsetOf(block));
  }
}

// The power failed when one was about to be used again: it has its new header, under its old name.
TEST(LogVerifierTest, OneThatWasAboutToBeUsedAgainIsAGap) {
  LogBuilder builder;
  builder.AddSegment(1);
  while (SegmentOf(builder.position()) < 5) builder.AddBlock(30);
  Bytes& bytes = builder.file(2);
  WriteSegmentHeader({.log = 0,
                      .number = 7,
                      .segment_bytes = static_cast<uint32_t>(bytes.size()),
                      .recycled = true,
                      .instance = kTestInstance},
                     bytes.data());
  const LogReport report = Verify(builder.files(), MakeLogPosition(4, kLogPageBytes));
  EXPECT_TRUE(report.sound());
  ASSERT_EQ(report.unfinished.size(), 1u);
  EXPECT_EQ(report.unfinished[0].file, SegmentName(2));
}

TEST(LogVerifierTest, TheFirstSegmentMayBeAnyOne) {
  LogBuilder builder;
  builder.AddSegment(1);
  while (SegmentOf(builder.position()) < 3) builder.AddBlock(30);
  builder.files().erase(SegmentName(1));
  EXPECT_TRUE(Verify(builder.files()).sound());
}

TEST(LogVerifierTest, WhatACrashLeftBehindIsNoDamage) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddBlock(2);
  const LogPosition end = builder.position();
  // A block without its first sector, behind it one that is whole.
  builder.AddBlock(30, end);
  std::fill_n(builder.file(1).begin() + OffsetOf(end), 512, std::byte{0});
  const LogPosition whole = builder.AddBlock(1, end);
  const LogReport report = Verify(builder.files());
  EXPECT_TRUE(report.sound());
  ASSERT_EQ(report.rests.size(), 1u);
  EXPECT_EQ(report.rests[0].offset, OffsetOf(end) + 512u);
  EXPECT_EQ(report.rests[0].offset + report.rests[0].bytes, OffsetOf(whole) + 512u);
  EXPECT_EQ(report.end, end);
  // A recycled segment is full of such things.
  LogBuilder recycled;
  recycled.AddSegment(1, true);
  recycled.AddBlock(2);
  const LogReport other = Verify(recycled.files());
  EXPECT_TRUE(other.sound());
  EXPECT_TRUE(other.rests.empty());
}

TEST(LogVerifierTest, TellsUnfinishedAndTooLongSegments) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddBlock(2);
  builder.files()[SegmentName(2)] = Bytes(kLogPageBytes);
  LogReport report = Verify(builder.files());
  EXPECT_TRUE(report.sound());
  ASSERT_EQ(report.unfinished.size(), 1u);
  EXPECT_EQ(report.unfinished[0].file, SegmentName(2));
  builder.file(1).resize(kMinSegmentBytes + 1);
  report = Verify(builder.files());
  ASSERT_EQ(report.damages.size(), 1u);
  EXPECT_EQ(report.damages[0].offset, kMinSegmentBytes);
}

}  // namespace
}  // namespace engram
