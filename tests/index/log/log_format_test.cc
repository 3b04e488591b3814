#include "index/log/log_format.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "src/core/crc32c.h"
#include "src/core/log_files.h"
#include "tests/index/log/log_builder.h"

namespace engram {
namespace {

constexpr LogPosition kPosition = MakeLogPosition(5, 3 * kLogPageBytes);

uint64_t NumberAt(std::span<const std::byte> bytes, size_t at, size_t count) {
  uint64_t value = 0;
  std::memcpy(&value, bytes.data() + at, count);
  return value;
}

// Makes the CRC at bytes 4 to 7 of a block's header right again.
void SealBlock(Bytes& block) {
  const std::span<const std::byte> header = std::span(block).first(kBlockHeaderBytes);
  const uint32_t crc = Crc32c(header.subspan(8), Crc32c(header.first(4)));
  std::memcpy(block.data() + 4, &crc, sizeof(crc));
}

Bytes SampleBlock(size_t records, uint64_t seed = 1) {
  SplitMix64 random(seed);
  std::vector<OwnedRecord> owned;
  for (size_t i = 0; i < records; ++i) owned.push_back(RandomRecord(random, i));
  return MakeBlock({.log = 2,
                    .position = kPosition,
                    .previous = kPosition - 7,
                    .durable = kPosition - 9,
                    .epoch = 77},
                   owned);
}

BlockCheck Check(std::span<const std::byte> block, BlockHeader* header = nullptr) {
  BlockHeader other;
  return CheckBlock(block, 2, kPosition, kTestInstance, header != nullptr ? header : &other);
}
std::optional<uint64_t> Find(std::span<const std::byte> block) {
  return FindFlippedBitOfBlock(block, 2, kPosition, kTestInstance);
}

TEST(LogFormatTest, NamesOfSegments) {
  EXPECT_EQ(SegmentName(42), "segment-0000002a.log");
  EXPECT_EQ(SegmentName(kMaxSegment), "segment-07ffffff.log");
  for (const uint32_t number : {1u, 42u, kMaxSegment}) {
    EXPECT_EQ(SegmentNumber(SegmentName(number)), number);
  }
  for (const std::string_view name :
       {"", "segment-0000002A.log", "segment-2a.log", "segment-0000002a.log.new",
        "segment-+000002a.log", "segment-0000 02a.log", "xsegment-0000002a.log", "LOCK"}) {
    EXPECT_FALSE(SegmentNumber(name).has_value()) << name;
  }
}

TEST(LogFormatTest, SegmentHeadersComeBackAndLieAsTheFormatSays) {
  const SegmentHeader wrote{.log = 0x1234,
                            .number = 0x0A0B0C,
                            .segment_bytes = 0x00500000,
                            .recycled = true,
                            .instance = kTestInstance};
  Bytes page(kLogPageBytes, std::byte{0xEE});
  WriteSegmentHeader(wrote, page.data());
  SegmentHeader read;
  EXPECT_EQ(ParseSegmentHeader(page, &read), "");
  EXPECT_EQ(read, wrote);
  EXPECT_EQ(SegmentHeaderVersion(page), kLogFormatVersion);
  EXPECT_EQ(std::memcmp(page.data(), "EGRMLOG1", 8), 0);
  EXPECT_EQ(NumberAt(page, 8, 4),
            Crc32c(std::span(page).subspan(12), Crc32c(std::span(page).first(8))));
  EXPECT_EQ(NumberAt(page, 12, 4), kLogFormatVersion);
  EXPECT_EQ(NumberAt(page, 16, 4), 0x0A0B0Cu);
  EXPECT_EQ(NumberAt(page, 20, 4), 0x00500000u);
  EXPECT_EQ(NumberAt(page, 24, 2), 0x1234u);
  EXPECT_EQ(NumberAt(page, 26, 1), 1u);
  EXPECT_EQ(std::memcmp(page.data() + 32, kTestInstance.data(), 8), 0);
  EXPECT_TRUE(std::all_of(page.begin() + 40, page.end(),
                          [](std::byte byte) { return byte == std::byte{0}; }));
}

TEST(LogFormatTest, EveryFlippedBitOfASegmentHeaderIsSeenAndFound) {
  Bytes page(kLogPageBytes);
  WriteSegmentHeader({.log = 3, .number = 9, .segment_bytes = kMinSegmentBytes}, page.data());
  EXPECT_FALSE(FindFlippedBitOfSegmentHeader(page).has_value());
  for (uint64_t bit = 0; bit < 8 * kLogPageBytes; ++bit) {
    const std::byte mask = std::byte{1} << (bit % 8);
    page[bit / 8] ^= mask;
    SegmentHeader header;
    ASSERT_NE(ParseSegmentHeader(page, &header), "") << bit;
    ASSERT_EQ(FindFlippedBitOfSegmentHeader(page), bit);
    page[bit / 8] ^= mask;
  }
  page[100] = std::byte{1};
  page[200] = std::byte{1};
  EXPECT_FALSE(FindFlippedBitOfSegmentHeader(page).has_value());
  EXPECT_FALSE(FindFlippedBitOfSegmentHeader(Bytes(kLogPageBytes)).has_value());
  EXPECT_FALSE(FindFlippedBitOfSegmentHeader(Bytes(100)).has_value());
}

TEST(LogFormatTest, SegmentHeadersOutOfRangeAreRefused) {
  const auto why = [](uint32_t number, uint32_t bytes) {
    Bytes page(kLogPageBytes);
    WriteSegmentHeader({.number = number, .segment_bytes = bytes}, page.data());
    SegmentHeader header;
    return ParseSegmentHeader(page, &header);
  };
  EXPECT_EQ(why(1, kMinSegmentBytes), "");
  EXPECT_EQ(why(kMaxSegment, kMaxSegmentBytes), "");
  EXPECT_NE(why(0, kMinSegmentBytes), "");
  EXPECT_NE(why(kMaxSegment + 1, kMinSegmentBytes), "");
  EXPECT_NE(why(1, kMinSegmentBytes - kLogPageBytes), "");
  EXPECT_NE(why(1, kMinSegmentBytes + 512), "");
  EXPECT_NE(why(1, kMaxSegmentBytes + kLogPageBytes), "");
}

TEST(LogFormatTest, BlocksComeBackAndLieAsTheFormatSays) {
  for (const size_t records : {0u, 1u, 2u, 100u}) {
    const Bytes block = SampleBlock(records);
    BlockHeader header;
    const BlockCheck check = Check(block, &header);
    ASSERT_EQ(check.fault, BlockFault::kNone) << records;
    EXPECT_EQ(header.log, 2);
    EXPECT_EQ(header.position, kPosition);
    EXPECT_EQ(header.previous, kPosition - 7);
    EXPECT_EQ(header.durable, kPosition - 9);
    EXPECT_EQ(header.epoch, 77u);
    EXPECT_EQ(header.block_bytes, block.size());
    EXPECT_EQ(header.record_count, records);
    EXPECT_EQ(header.instance, kTestInstance);
    EXPECT_EQ(std::memcmp(block.data(), "EBLK", 4), 0);
    EXPECT_EQ(NumberAt(block, 8, 8), kPosition);
    EXPECT_EQ(NumberAt(block, 16, 8), kPosition - 7);
    EXPECT_EQ(NumberAt(block, 24, 8), kPosition - 9);
    EXPECT_EQ(NumberAt(block, 32, 4), 77u);
    EXPECT_EQ(NumberAt(block, 36, 4), block.size());
    EXPECT_EQ(NumberAt(block, 40, 4), header.record_bytes);
    EXPECT_EQ(NumberAt(block, 44, 4), records);
    EXPECT_EQ(NumberAt(block, 48, 2), 2u);
    EXPECT_EQ(NumberAt(block, 50, 6), 0u);
    EXPECT_EQ(std::memcmp(block.data() + 56, kTestInstance.data(), 8), 0);
    Bytes sealed = block;
    SealBlock(sealed);
    EXPECT_EQ(sealed, block) << "the CRC is of all but itself";
    size_t visited = 0;
    ForEachRecord(block, header, [&](const LogRecord& record, LogAddress address, size_t bytes) {
      EXPECT_EQ(record.stamp, visited++);
      EXPECT_EQ(LogOf(address), 2);
      EXPECT_LE(PositionOf(address) + bytes, kPosition + block.size());
    });
    EXPECT_EQ(visited, records);
  }
}

TEST(LogFormatTest, ABlockMustBeWhereItSaysAndWhose) {
  const Bytes block = SampleBlock(3);
  BlockHeader header;
  EXPECT_EQ(CheckBlock(block, 3, kPosition, kTestInstance, &header).fault, BlockFault::kElsewhere);
  EXPECT_EQ(CheckBlock(block, 2, kPosition + kLogPageBytes, kTestInstance, &header).fault,
            BlockFault::kElsewhere);
  LogInstance other = kTestInstance;
  other[0] ^= 1;
  EXPECT_EQ(CheckBlock(block, 2, kPosition, other, &header).fault, BlockFault::kElsewhere);
}

TEST(LogFormatTest, EveryFlippedBitOfABlockIsSeenAndFound) {
  for (const size_t records : {0u, 3u, 40u}) {
    Bytes block = SampleBlock(records);
    block.resize(block.size() + 2 * kLogPageBytes, std::byte{0x77});  // what lies behind it
    const size_t bytes = block.size() - 2 * kLogPageBytes;
    EXPECT_FALSE(Find(block).has_value()) << "nothing is wrong";
    for (uint64_t bit = 0; bit < 8 * bytes; bit += bit < 8 * 1'000 ? 1 : 7) {
      const std::byte mask = std::byte{1} << (bit % 8);
      block[bit / 8] ^= mask;
      const BlockCheck check = Check(block);
      ASSERT_NE(check.fault, BlockFault::kNone) << bit;
      // A record is named by where it begins.
      ASSERT_LE(check.offset, bit / 8);
      ASSERT_EQ(Find(block), bit) << records;
      block[bit / 8] ^= mask;
    }
  }
}

TEST(LogFormatTest, MoreThanABitOfABlockIsNotMended) {
  const Bytes sound = SampleBlock(30);
  SplitMix64 random(1);
  for (int i = 0; i < 1'000; ++i) {
    Bytes block = sound;
    const uint64_t first = random.Below(8 * block.size());
    const uint64_t second = (first + 1 + random.Below(8 * block.size() - 1)) % (8 * block.size());
    for (const uint64_t bit : {first, second}) block[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_NE(Check(block).fault, BlockFault::kNone);
    EXPECT_FALSE(Find(block).has_value());
  }
  // Sectors that a torn write left out, over zeros.
  for (uint64_t sectors = 1; sectors < 16; ++sectors) {
    Bytes block = sound;
    for (size_t i = 0; i < block.size() / 512; ++i) {
      if ((sectors >> i & 1) != 0)
        std::fill_n(block.begin() + static_cast<ptrdiff_t>(i * 512), 512, std::byte{0});
    }
    EXPECT_NE(Check(block).fault, BlockFault::kNone);
    EXPECT_FALSE(Find(block).has_value());
  }
  EXPECT_FALSE(Find({}).has_value());
  EXPECT_FALSE(Find(Bytes(63)).has_value());
  EXPECT_FALSE(Find(Bytes(kLogPageBytes)).has_value());
}

TEST(LogFormatTest, PaddingIsZero) {
  Bytes block = SampleBlock(2);
  block.back() = std::byte{3};
  const BlockCheck check = Check(block);
  EXPECT_EQ(check.fault, BlockFault::kBadPadding);
  EXPECT_EQ(check.offset, block.size() - 1);
}

// Headers whose CRC is right and that say what cannot be.
TEST(LogFormatTest, NumbersThatDoNotFitAreRefused) {
  const auto check_with = [](size_t at, uint32_t value) {
    Bytes block = SampleBlock(3);
    std::memcpy(block.data() + at, &value, sizeof(value));
    SealBlock(block);
    EXPECT_FALSE(Find(block).has_value());
    return Check(block);
  };
  for (const uint32_t bytes :
       {0u, 64u, kLogPageBytes - 1, kLogPageBytes + 512, kMaxBlockBytes * 2}) {
    EXPECT_EQ(check_with(36, bytes).fault, BlockFault::kBadHeader) << bytes;
  }
  EXPECT_EQ(check_with(36, 2 * kLogPageBytes).fault, BlockFault::kTooShort);
  EXPECT_EQ(check_with(40, kLogPageBytes - 63).fault, BlockFault::kBadHeader);
  EXPECT_EQ(check_with(40, 8).fault, BlockFault::kBadRecord);
  EXPECT_EQ(check_with(44, 2).fault, BlockFault::kBadRecord) << "bytes that no record takes";
  EXPECT_EQ(check_with(44, 4).fault, BlockFault::kBadRecord) << "fewer records than it says";
  EXPECT_EQ(check_with(44, UINT32_MAX).fault, BlockFault::kBadRecord);
}

}  // namespace
}  // namespace engram
