#include "src/core/log_record.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "src/core/crc32c.h"
#include "src/core/hash.h"

namespace engram {
namespace {

using Bytes = std::vector<std::byte>;

constexpr LogAddress kAddress = MakeLogAddress(3, MakeLogPosition(7, 4'096 + 64));

Bytes Fill(size_t count, uint64_t seed) {
  SplitMix64 random(seed);
  Bytes bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.Next());
  return bytes;
}

Bytes Write(const LogRecord& record, LogAddress address = kAddress) {
  // Behind it lies what must not be written to.
  const size_t length = LogRecordBytes(record);
  Bytes bytes(length + 8, std::byte{0xEE});
  WriteLogRecord(record, address, bytes.data());
  for (size_t i = length; i < bytes.size(); ++i) EXPECT_EQ(bytes[i], std::byte{0xEE});
  return {bytes.begin(), bytes.end() - 8};
}

void ExpectSame(const LogRecord& read, const LogRecord& wrote) {
  EXPECT_EQ(read.kind, wrote.kind);
  EXPECT_EQ(read.dtype, wrote.dtype);
  EXPECT_EQ(read.payload_kind, wrote.payload_kind);
  EXPECT_EQ(read.skip_reason, wrote.skip_reason);
  EXPECT_EQ(read.dimension, wrote.dimension);
  EXPECT_EQ(read.scale, wrote.scale);
  EXPECT_EQ(read.confidence, wrote.confidence);
  EXPECT_EQ(read.stamp, wrote.stamp);
  EXPECT_EQ(read.session, wrote.session);
  EXPECT_EQ(read.sequence, wrote.sequence);
  EXPECT_EQ(read.when_ns, wrote.when_ns);
  EXPECT_EQ(read.space, wrote.space);
  EXPECT_EQ(read.id, wrote.id);
  EXPECT_TRUE(std::ranges::equal(read.vector, wrote.vector));
  EXPECT_TRUE(std::ranges::equal(read.attributes, wrote.attributes));
  EXPECT_TRUE(std::ranges::equal(read.payload, wrote.payload));
}

void ExpectRoundTrip(const LogRecord& wrote) {
  Bytes bytes = Write(wrote);
  ASSERT_EQ(bytes.size() % 8, 0u);
  // Bytes that follow make no difference.
  const size_t length = bytes.size();
  bytes.resize(length + 16, std::byte{0x55});
  LogRecord read;
  size_t read_bytes = 0;
  ASSERT_EQ(ParseLogRecord(bytes, kAddress, &read, &read_bytes), LogRecordFault::kNone);
  EXPECT_EQ(read_bytes, length);
  ExpectSame(read, wrote);
  LogRecord again;
  EXPECT_EQ(ReadLogRecord(bytes, &again), length);
  ExpectSame(again, wrote);
}

// One with something in each field.
struct Sample {
  std::string space = "docs";
  std::string id = "an id";
  Bytes vector = Fill(3 * 4, 1);
  Bytes payload = Fill(21, 2);
  std::string attributes = {};
  LogRecord Get() const {
    LogRecord record;
    record.kind = LogRecordKind::kUpsert;
    record.dtype = VectorDtype::kF32;
    record.payload_kind = PayloadKind::kMemory;
    record.skip_reason = RefusalReason::kBadId;
    record.dimension = 3;
    record.scale = 0.5F;
    record.confidence = 0.25F;
    record.stamp = 0x0123456789ABCDEF;
    record.session = SessionId(0xFEDCBA9876543210);
    record.sequence = UINT64_MAX;
    record.when_ns = std::numeric_limits<int64_t>::min();
    record.space = space;
    record.vector = vector;
    record.id = id;
    record.attributes = std::as_bytes(std::span(attributes));
    record.payload = payload;
    return record;
  }
};

TEST(LogRecordTest, EveryKindAndDtypeComesBack) {
  const Sample sample;
  for (const auto kind : {LogRecordKind::kUpsert, LogRecordKind::kDelete, LogRecordKind::kSkip,
                          LogRecordKind::kSuppress, LogRecordKind::kRestore, LogRecordKind::kSpace,
                          LogRecordKind::kDropSpace}) {
    LogRecord record = sample.Get();
    record.kind = kind;
    ExpectRoundTrip(record);
    EXPECT_EQ(IsObservation(kind),
              kind != LogRecordKind::kSpace && kind != LogRecordKind::kDropSpace);
  }
  for (const auto dtype :
       {VectorDtype::kF32, VectorDtype::kF16, VectorDtype::kBf16, VectorDtype::kInt8}) {
    for (const uint16_t dimension : {1, 2, 3, 7, 768, int{kMaxDimension}}) {
      LogRecord record = sample.Get();
      record.dtype = dtype;
      record.dimension = dimension;
      const Bytes vector = Fill(VectorBytes(dtype, dimension), dimension);
      record.vector = vector;
      ExpectRoundTrip(record);
    }
  }
}

TEST(LogRecordTest, LengthsFromNothingToTheGreatest) {
  Sample sample;
  for (const size_t space : {size_t{1}, size_t{2}, kMaxSpaceNameBytes}) {
    for (const size_t id : {size_t{0}, size_t{1}, kMaxIdBytes}) {
      for (const size_t payload : {size_t{0}, size_t{1}, size_t{7}, size_t{8}, kMaxPayloadBytes}) {
        for (const uint16_t dimension : {uint16_t{0}, uint16_t{kMaxDimension}}) {
          sample.space.assign(space, 's');
          sample.id.assign(id, '\0');
          sample.payload = Fill(payload, payload);
          sample.vector = Fill(size_t{dimension} * 4, 3);
          LogRecord record = sample.Get();
          record.dimension = dimension;
          record.dtype = dimension == 0 ? VectorDtype::kNone : VectorDtype::kF32;
          ExpectRoundTrip(record);
          ASSERT_LE(LogRecordBytes(record), kMaxLogRecordBytes);
        }
      }
    }
  }
  EXPECT_EQ(LogRecordBytes(64, 4'096 * 4, 256, 65'536, 4'096), kMaxLogRecordBytes);
}

std::string AttributesOf(size_t count, size_t value_bytes) {
  std::string bytes;
  for (size_t i = 0; i < count; ++i) {
    EXPECT_TRUE(AppendAttribute("k", std::string(value_bytes, 'v'), &bytes));
  }
  return bytes;
}

TEST(LogRecordTest, AttributesComeBackBetweenIdAndPayload) {
  Sample sample;
  for (const size_t payload : {size_t{0}, size_t{1}, size_t{8}, kMaxPayloadBytes}) {
    for (const std::string& attributes :
         {std::string(), AttributesOf(1, 0), AttributesOf(3, 5), AttributesOf(15, 255)}) {
      sample.payload = Fill(payload, payload);
      sample.attributes = attributes;
      ExpectRoundTrip(sample.Get());
    }
  }
  sample.attributes = AttributesOf(15, 255);
  sample.attributes += AttributesOf(1, kMaxAttributesBytes - sample.attributes.size() - 3);
  ASSERT_EQ(sample.attributes.size(), kMaxAttributesBytes);
  ExpectRoundTrip(sample.Get());
  sample.attributes = AttributesOf(1, 3);
  sample.payload = Fill(21, 2);
  const Bytes bytes = Write(sample.Get());
  EXPECT_EQ(std::to_integer<size_t>(bytes[62]), sample.attributes.size());
  EXPECT_EQ(std::memcmp(bytes.data() + 85, "\x01\x03kvvv", 6), 0);
  EXPECT_TRUE(std::equal(sample.payload.begin(), sample.payload.end(), bytes.begin() + 91));
}

// The CRC is right, and no writer of ours wrote them.
TEST(LogRecordTest, UnsoundAttributesAreRefused) {
  using namespace std::string_literals;
  Sample sample;
  for (const std::string& attributes : {"\x01"s, "\x01\x02kv"s, "\0\0"s, "\x41\0"s}) {
    sample.attributes = attributes;
    const Bytes bytes = Write(sample.Get());
    LogRecord record;
    EXPECT_EQ(ParseLogRecord(bytes, kAddress, &record, nullptr), LogRecordFault::kBadField);
  }
}

// What FORMAT.md says of the header, byte for byte: files outlive this code.
TEST(LogRecordTest, LiesAsTheFormatSays) {
  const Sample sample;
  const Bytes bytes = Write(sample.Get());
  const auto number = [&](size_t at, size_t count) {
    uint64_t value = 0;
    std::memcpy(&value, bytes.data() + at, count);
    return value;
  };
  EXPECT_EQ(number(0, 4), bytes.size());
  EXPECT_EQ(number(8, 8), 0x0123456789ABCDEFu);
  EXPECT_EQ(number(16, 8), 0xFEDCBA9876543210u);
  EXPECT_EQ(number(24, 8), UINT64_MAX);
  EXPECT_EQ(number(32, 8), uint64_t{1} << 63);
  EXPECT_EQ(number(40, 1), 1u);
  EXPECT_EQ(number(41, 1), 1u);
  EXPECT_EQ(number(42, 2), 3u);
  EXPECT_EQ(number(44, 2), 5u);
  EXPECT_EQ(number(46, 1), 4u);
  EXPECT_EQ(number(47, 1), 2u);
  EXPECT_EQ(number(48, 4), 21u);
  EXPECT_EQ(number(52, 4), std::bit_cast<uint32_t>(0.5F));
  EXPECT_EQ(number(56, 4), std::bit_cast<uint32_t>(0.25F));
  EXPECT_EQ(number(60, 2), 24u);
  EXPECT_EQ(number(62, 2), 0u);
  EXPECT_EQ(std::memcmp(bytes.data() + 64, "docs", 4), 0);
  EXPECT_TRUE(std::equal(sample.vector.begin(), sample.vector.end(), bytes.begin() + 68));
  EXPECT_EQ(std::memcmp(bytes.data() + 80, "an id", 5), 0);
  EXPECT_TRUE(std::equal(sample.payload.begin(), sample.payload.end(), bytes.begin() + 85));
  EXPECT_EQ(bytes.size(), 112u);
  for (size_t at = 106; at < 112; ++at) EXPECT_EQ(bytes[at], std::byte{0});
  Bytes covered(12);
  const LogAddress address = uint64_t{3} << 56 | ((uint64_t{7} << 32 | 4'160) >> 3);
  std::memcpy(covered.data(), &address, 8);
  std::memcpy(covered.data() + 8, bytes.data(), 4);
  covered.insert(covered.end(), bytes.begin() + 8, bytes.end());
  EXPECT_EQ(number(4, 4), Crc32c(covered));
}

TEST(LogRecordTest, ARecordElsewhereDoesNotPass) {
  const Sample sample;
  const Bytes bytes = Write(sample.Get());
  LogRecord record;
  for (unsigned bit = 0; bit < 64; ++bit) {
    EXPECT_EQ(ParseLogRecord(bytes, kAddress ^ uint64_t{1} << bit, &record, nullptr),
              LogRecordFault::kBadCrc);
  }
}

TEST(LogRecordTest, AnyCutOffRecordIsSeen) {
  const Sample sample;
  const Bytes bytes = Write(sample.Get());
  LogRecord record;
  for (size_t size = 0; size < bytes.size(); ++size) {
    const Bytes part(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(size));
    EXPECT_EQ(ParseLogRecord(part, kAddress, &record, nullptr), LogRecordFault::kTooShort);
  }
}

TEST(LogRecordTest, EveryFlippedBitIsSeenAndFound) {
  const Sample sample;
  const Bytes sound = Write(sample.Get());
  Bytes bytes = sound;
  bytes.resize(sound.size() + 4'096, std::byte{0x33});  // where a greater length may lead
  LogRecord record;
  for (uint64_t bit = 0; bit < 8 * sound.size(); ++bit) {
    const std::byte mask = std::byte{1} << (bit % 8);
    bytes[bit / 8] ^= mask;
    EXPECT_NE(ParseLogRecord(bytes, kAddress, &record, nullptr), LogRecordFault::kNone) << bit;
    EXPECT_EQ(FindFlippedBit(bytes, kAddress), bit);
    bytes[bit / 8] ^= mask;
  }
}

TEST(LogRecordTest, FlippedBitsOfTheGreatestRecordAreFound) {
  Sample sample;
  sample.space.assign(kMaxSpaceNameBytes, 's');
  sample.id.assign(kMaxIdBytes, 'i');
  sample.payload = Fill(kMaxPayloadBytes, 1);
  sample.attributes = AttributesOf(15, 255);
  sample.attributes += AttributesOf(1, kMaxAttributesBytes - sample.attributes.size() - 3);
  sample.vector = Fill(kMaxDimension * 4, 2);
  LogRecord record = sample.Get();
  record.dimension = kMaxDimension;
  Bytes bytes = Write(record);
  SplitMix64 random(1);
  for (int i = 0; i < 50; ++i) {
    const uint64_t bit = i == 0 ? 8 * bytes.size() - 1 : random.Below(8 * bytes.size());
    const std::byte mask = std::byte{1} << (bit % 8);
    bytes[bit / 8] ^= mask;
    EXPECT_EQ(FindFlippedBit(bytes, kAddress), bit);
    bytes[bit / 8] ^= mask;
  }
}

TEST(LogRecordTest, MoreThanABitIsNotMended) {
  const Sample sample;
  const Bytes sound = Write(sample.Get());
  SplitMix64 random(1);
  for (int i = 0; i < 2'000; ++i) {
    Bytes bytes = sound;
    // A sector's worth of other bytes, or two bits.
    if (i % 2 == 0) {
      const size_t from = random.Below(bytes.size() - 1);
      const size_t count = 2 + random.Below(std::min<size_t>(bytes.size() - from - 1, 60));
      for (size_t at = from; at < std::min(bytes.size(), from + count); ++at) {
        bytes[at] = ~bytes[at];
      }
    } else {
      const uint64_t first = random.Below(8 * bytes.size());
      const uint64_t second = (first + 1 + random.Below(8 * bytes.size() - 1)) % (8 * bytes.size());
      for (const uint64_t bit : {first, second}) bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    }
    LogRecord record;
    EXPECT_NE(ParseLogRecord(bytes, kAddress, &record, nullptr), LogRecordFault::kNone);
    EXPECT_FALSE(FindFlippedBit(bytes, kAddress).has_value()) << i;
  }
  EXPECT_FALSE(FindFlippedBit({}, kAddress).has_value());
  EXPECT_FALSE(FindFlippedBit(Bytes(63), kAddress).has_value());
  EXPECT_FALSE(FindFlippedBit(Bytes(4'096), kAddress).has_value());
}

// A record whose CRC is right and that says what cannot be.
TEST(LogRecordTest, FieldsOutOfRangeAreRefused) {
  const Sample sample;
  const auto fault_with = [&](size_t at, uint64_t value, size_t count) {
    Bytes bytes = Write(sample.Get());
    std::memcpy(bytes.data() + at, &value, count);
    Bytes covered(12);
    std::memcpy(covered.data(), &kAddress, 8);
    std::memcpy(covered.data() + 8, bytes.data(), 4);
    covered.insert(covered.end(), bytes.begin() + 8, bytes.end());
    const uint32_t crc = Crc32c(covered);
    std::memcpy(bytes.data() + 4, &crc, 4);
    LogRecord record;
    return ParseLogRecord(bytes, kAddress, &record, nullptr);
  };
  EXPECT_EQ(fault_with(62, kMaxAttributesBytes + 1, 2), LogRecordFault::kBadField);
  EXPECT_EQ(fault_with(60, 0xFFFF, 2), LogRecordFault::kNone) << "so are reasons";
  for (const uint64_t kind : {0, 6, 15, 18, 255}) {
    EXPECT_EQ(fault_with(40, kind, 1), LogRecordFault::kBadField) << kind;
  }
  for (const uint64_t dtype : {0, 2, 4, 5}) {
    EXPECT_EQ(fault_with(41, dtype, 1), LogRecordFault::kBadField) << dtype;
  }
  EXPECT_EQ(fault_with(42, 0, 2), LogRecordFault::kBadField);
  EXPECT_EQ(fault_with(42, kMaxDimension + 1, 2), LogRecordFault::kBadField);
  EXPECT_EQ(fault_with(44, kMaxIdBytes + 1, 2), LogRecordFault::kBadField);
  EXPECT_EQ(fault_with(46, 0, 1), LogRecordFault::kBadField);
  EXPECT_EQ(fault_with(46, kMaxSpaceNameBytes + 1, 1), LogRecordFault::kBadField);
  EXPECT_EQ(fault_with(47, 3, 1), LogRecordFault::kBadField);
  EXPECT_EQ(fault_with(48, kMaxPayloadBytes + 1, 4), LogRecordFault::kBadField);
  EXPECT_EQ(fault_with(48, 21 + 8, 4), LogRecordFault::kBadField) << "the parts make the length";
  for (const float scale :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    EXPECT_EQ(fault_with(52, std::bit_cast<uint32_t>(scale), 4), LogRecordFault::kBadField);
  }
  for (const float confidence : {-0.1F, 1.1F, std::numeric_limits<float>::quiet_NaN()}) {
    EXPECT_EQ(fault_with(56, std::bit_cast<uint32_t>(confidence), 4), LogRecordFault::kBadField);
  }
  for (const uint64_t length : {uint64_t{0}, uint64_t{56}, uint64_t{108}, kMaxLogRecordBytes + 8}) {
    EXPECT_EQ(fault_with(0, length, 4), LogRecordFault::kBadLength) << length;
  }
}

TEST(LogRecordTest, AddressesKeepLogAndPosition) {
  for (const uint16_t log : {uint16_t{0}, uint16_t{1}, uint16_t{255}}) {
    for (const LogPosition position :
         {MakeLogPosition(1, 4'096 + 64), MakeLogPosition(kMaxSegment, (1u << 30) - 8)}) {
      const LogAddress address = MakeLogAddress(log, position);
      EXPECT_EQ(LogOf(address), log);
      EXPECT_EQ(PositionOf(address), position);
      EXPECT_NE(address, kNoLogAddress);
    }
  }
}

}  // namespace
}  // namespace engram
