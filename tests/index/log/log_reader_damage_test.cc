// Logs that are damaged: one bit that turned is mended, more is an error that names its place.

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "index/log/log_reader.h"
#include "src/core/crc32c.h"
#include "src/core/log_files.h"
#include "tests/index/log/log_builder.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr uint32_t kHeaderBytes = kBlockHeaderBytes;

TEST(LogReaderDamageTest, AnySingleBitOfTheLastBlockIsMended) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddBlock(2);
  builder.AddBlock(2);
  const LogPosition last = builder.blocks().back();
  for (LogPosition at = last; at < builder.position(); at += kSanitized ? 11 : 1) {
    for (unsigned bit = 0; bit < 8; ++bit) {
      builder.Flip(at, bit);
      const ReadResult read = ReadLog(builder.files());
      ASSERT_EQ(read.error, "") << at << " " << bit;
      ASSERT_EQ(read.records, builder.texts()) << at << " " << bit;
      ASSERT_EQ(read.mended,
                (std::vector<MendedBit>{{SegmentName(1), uint64_t{OffsetOf(at)} * 8 + bit}}));
      ASSERT_EQ(read.end, builder.position());
      builder.Flip(at, bit);
    }
  }
}

TEST(LogReaderDamageTest, ASingleBitOfTheFirstBlockOfASegmentIsMended) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddBlock(2);
  builder.GoToNextSegment();
  const LogPosition last = builder.AddBlock(2);
  for (LogPosition at = last; at < builder.position(); at += 3) {
    const unsigned bit = static_cast<unsigned>(at % 8);
    builder.Flip(at, bit);
    const ReadResult read = ReadLog(builder.files());
    ASSERT_EQ(read.error, "");
    ASSERT_EQ(read.records, builder.texts());
    ASSERT_EQ(read.mended,
              (std::vector<MendedBit>{{SegmentName(2), uint64_t{OffsetOf(at)} * 8 + bit}}));
    builder.Flip(at, bit);
  }
}

TEST(LogReaderDamageTest, ManyBlocksWithASingleBitEachAreMended) {
  LogBuilder builder;
  builder.AddSegment(1);
  for (int i = 0; i < 30; ++i) builder.AddBlock(30);
  std::vector<MendedBit> expected;
  for (const LogPosition block : builder.blocks()) {
    const auto bit = static_cast<uint32_t>(builder.random().Below(kLogPageBytes * 8));
    builder.Flip(block + bit / 8, bit % 8);
    expected.push_back({SegmentName(SegmentOf(block)), uint64_t{OffsetOf(block)} * 8 + bit});
  }
  const ReadResult read = ReadLog(builder.files());
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.records, builder.texts());
  EXPECT_EQ(read.mended, expected);
}

TEST(LogReaderDamageTest, ASingleBitOfAHeaderPageIsMended) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddSegment(2);
  builder.AddBlock(2);
  builder.GoToNextSegment();
  builder.AddBlock(2);
  for (uint32_t bit = 0; bit < kLogPageBytes * 8; bit += bit < 400 ? 1 : 37) {
    for (const uint32_t number : {1u, 2u}) {
      builder.Flip(MakeLogPosition(number, bit / 8), bit % 8);
      const ReadResult read = ReadLog(builder.files());
      ASSERT_EQ(read.error, "");
      ASSERT_EQ(read.records, builder.texts());
      ASSERT_EQ(read.mended, (std::vector<MendedBit>{{SegmentName(number), bit}}));
      builder.Flip(MakeLogPosition(number, bit / 8), bit % 8);
    }
  }
}

// A flipped bit in what an earlier epoch left behind must not bring it back.
TEST(LogReaderDamageTest, AMendedBlockMustBeLiveToo) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.set_epoch(5);
  builder.AddBlock(1);
  const LogPosition end = builder.position();
  builder.set_epoch(4);
  builder.AddBlock(1, end);
  builder.Flip(end + 70, 3);
  const ReadResult read = ReadLog(builder.files());
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.end, end);
  EXPECT_TRUE(read.mended.empty());
}

// Bytes of a whole record, or of a header: more than can be mended.
TEST(LogReaderDamageTest, DamagedAcknowledgedRecordsAreAnError) {
  for (const uint32_t offset : {0u, kHeaderBytes + 30}) {
    for (const bool marker_in_next_segment : {false, true}) {
      LogBuilder builder;
      builder.AddSegment(1);
      builder.AddSegment(2);
      builder.AddBlock(3);
      const LogPosition bad = builder.AddBlock(3);
      builder.AddBlock(3, bad);  // begun before the second was durable
      if (marker_in_next_segment) builder.GoToNextSegment();
      const LogPosition marker = builder.AddBlock(0);
      for (int i = 0; i < 8; ++i) builder.Flip(bad + offset + 3 * static_cast<unsigned>(i), 2);
      const ReadResult read = ReadLog(builder.files());
      EXPECT_EQ(read.code, ErrorCode::kCorrupt);
      EXPECT_EQ(read.records, builder.FirstTexts(3));
      // A record is named by where it begins.
      const uint32_t named = OffsetOf(bad) + (offset == 0 ? 0 : kHeaderBytes);
      EXPECT_TRUE(Says(read.error, "log-000/segment-00000001.log, offset " + std::to_string(named) +
                                       ": acknowledged records are damaged"))
          << read.error;
      EXPECT_TRUE(Says(read.error, SegmentName(SegmentOf(marker)) + ", offset " +
                                       std::to_string(OffsetOf(marker))))
          << read.error;
      EXPECT_TRUE(Says(read.error, "restore a backup")) << read.error;
      ASSERT_TRUE(read.damage.has_value());
      EXPECT_EQ(read.damage->file, SegmentName(1));
      EXPECT_EQ(read.damage->offset, named);
      EXPECT_EQ(read.damage->resume, bad + kLogPageBytes) << "the third block is sound";
    }
  }
}

// The last block of the log, with nothing behind it that says that it was durable: it looks like a
// write that was cut off, and nothing but a single turned bit tells it from one.
TEST(LogReaderDamageTest, DamageThatNoLaterBlockProvesIsTheEnd) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddBlock(3);
  const LogPosition bad = builder.AddBlock(3);
  builder.AddBlock(3, bad);
  builder.Flip(bad + 100, 1);
  builder.Flip(bad + 101, 1);
  const ReadResult read = ReadLog(builder.files());
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.end, bad);
}

TEST(LogReaderDamageTest, DamageOfASegmentsFirstBlockIsNamedThere) {
  for (const uint32_t offset : {kHeaderBytes, 0u, 70u}) {
    LogBuilder builder;
    builder.AddSegment(1);
    builder.AddBlock(3);
    builder.GoToNextSegment();
    const LogPosition bad = builder.AddBlock(3);
    builder.AddBlock(0);
    builder.Flip(bad + offset, 1);
    builder.Flip(bad + offset + 1, 1);
    const ReadResult read = ReadLog(builder.files());
    EXPECT_TRUE(Says(read.error, "segment-00000002.log, offset " +
                                     std::to_string(kLogPageBytes + (offset == 0 ? 0 : 64))))
        << read.error;
  }
}

TEST(LogReaderDamageTest, PaddingThatIsNotZeroIsDamage) {
  LogBuilder builder;
  builder.AddSegment(1);
  const LogPosition bad = builder.AddBlock(1);
  builder.AddBlock(0);
  builder.At(bad + 4'000) = std::byte{0x42};
  const ReadResult read = ReadLog(builder.files());
  EXPECT_TRUE(Says(read.error, "offset " + std::to_string(kLogPageBytes + 4'000))) << read.error;
  EXPECT_TRUE(Says(read.error, "padding")) << read.error;
}

TEST(LogReaderDamageTest, AMissingSegmentIsAnError) {
  LogBuilder builder;
  builder.AddSegment(1);
  while (SegmentOf(builder.position()) < 4) builder.AddBlock(40);
  ASSERT_EQ(ReadLog(builder.files()).error, "");
  for (const uint32_t number : {2u, 3u}) {
    LogFiles files = builder.files();
    files.erase(SegmentName(number));
    const ReadResult read = ReadLog(files);
    EXPECT_EQ(read.code, ErrorCode::kCorrupt);
    EXPECT_TRUE(Says(read.error, SegmentName(number))) << read.error;
    EXPECT_TRUE(Says(read.error, "is missing")) << read.error;
    EXPECT_TRUE(Says(read.error, SegmentName(number + 1))) << read.error;
    ASSERT_TRUE(read.damage);
    EXPECT_EQ(read.damage->resume, MakeLogPosition(number + 1, kLogPageBytes));
  }
  // The first one can have been freed, the last one cannot be missed.
  for (const uint32_t number : {1u, 4u}) {
    LogFiles files = builder.files();
    files.erase(SegmentName(number));
    EXPECT_EQ(ReadLog(files).error, "");
  }
}

// More than a bit of the header: also that of the first segment, and where nothing says so but the
// blocks of the segment itself.
TEST(LogReaderDamageTest, ADamagedHeaderIsAnErrorWhereItsSegmentHoldsBlocks) {
  for (const uint32_t number : {1u, 2u, 3u, 4u}) {
    LogBuilder builder;
    builder.AddSegment(1);
    while (SegmentOf(builder.position()) < 4) builder.AddBlock(40);
    builder.AddSegment(5);
    builder.Flip(MakeLogPosition(number, 9), 1);
    builder.Flip(MakeLogPosition(number, 30), 1);
    ReadResult read = ReadLog(builder.files());
    EXPECT_EQ(read.code, ErrorCode::kCorrupt);
    EXPECT_TRUE(Says(read.error, "log-000/" + SegmentName(number) + ", offset 0")) << read.error;
    EXPECT_TRUE(Says(read.error, "has a header that does not match its CRC32C")) << read.error;
    read = ReadLog(builder.files(), MakeLogPosition(number, kLogPageBytes));
    EXPECT_TRUE(Says(read.error, SegmentName(number))) << read.error;
    EXPECT_TRUE(Says(read.error, "has a header that does not match its CRC32C")) << read.error;
  }
}

TEST(LogReaderDamageTest, ATruncatedSegmentIsAnErrorWhereItHoldsBlocks) {
  LogBuilder builder;
  builder.AddSegment(1);
  while (SegmentOf(builder.position()) < 2) builder.AddBlock(40);
  for (const size_t bytes : {kMinSegmentBytes - 1, kMinSegmentBytes - kLogPageBytes}) {
    for (const uint32_t number : {1u, 2u}) {
      LogFiles files = builder.files();
      files[SegmentName(number)].resize(bytes);
      const ReadResult read = ReadLog(files);
      EXPECT_EQ(read.code, ErrorCode::kCorrupt);
      EXPECT_TRUE(Says(read.error, SegmentName(number))) << read.error;
      EXPECT_TRUE(Says(read.error, "less than the 65536 bytes")) << read.error;
    }
  }
}

TEST(LogReaderDamageTest, SegmentsOfOthersAreErrors) {
  SegmentHeader header{.log = 0,
                       .number = 2,
                       .segment_bytes = kMinSegmentBytes,
                       .recycled = false,
                       .instance = kTestInstance};
  const auto error_with = [](const SegmentHeader& second, uint32_t version) {
    LogBuilder builder;
    builder.AddSegment(1);
    builder.AddSegment(2);
    builder.AddBlock(1);
    Bytes& page = builder.file(2);
    WriteSegmentHeader(second, page.data());
    if (version != kLogFormatVersion) {
      std::memcpy(page.data() + 12, &version, sizeof(version));
      const uint32_t crc =
          Crc32c(std::span(page).subspan(12, kLogPageBytes - 12), Crc32c(std::span(page).first(8)));
      std::memcpy(page.data() + 8, &crc, sizeof(crc));
    }
    const ReadResult read = ReadLog(builder.files());
    EXPECT_TRUE(Says(read.error, "log-000/segment-00000002.log")) << read.error;
    return read;
  };
  header.instance[0] = 9;
  EXPECT_TRUE(
      Says(error_with(header, kLogFormatVersion).error, "belongs to another data directory"));
  header.instance = kTestInstance;
  header.log = 3;
  EXPECT_TRUE(Says(error_with(header, kLogFormatVersion).error, "belongs to log 3, not 0"));
  header.log = 0;
  const ReadResult newer = error_with(header, kLogFormatVersion + 1);
  EXPECT_EQ(newer.code, ErrorCode::kUnavailable);
  EXPECT_TRUE(Says(newer.error, "log format version 3")) << newer.error;
  header.segment_bytes = kLogPageBytes;
  EXPECT_TRUE(Says(error_with(header, kLogFormatVersion).error, "field out of range"));
}

}  // namespace
}  // namespace engram
