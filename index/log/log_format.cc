#include "index/log/log_format.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <vector>

#include "src/core/crc32c.h"

namespace engram {

namespace {

constexpr uint64_t kSegmentMagic = 0x31474F4C4D524745;  // "EGRMLOG1"
constexpr uint32_t kBlockMagic = 0x4B4C4245;            // "EBLK"

// The first bytes of a segment's header page; zeros follow.
struct SegmentPage {
  uint64_t magic;
  uint32_t crc;
  uint32_t version;
  uint32_t number;
  uint32_t segment_bytes;
  uint16_t log;
  uint8_t recycled;
  uint8_t vault;
  uint8_t reserved[4];
  LogInstance instance;
  uint32_t record_bytes;
  uint32_t record_count;
};
static_assert(sizeof(SegmentPage) == 48);

struct BlockPage {
  uint32_t magic;
  uint32_t crc;
  uint64_t position;
  uint64_t previous;
  uint64_t durable;
  uint32_t epoch;
  uint32_t block_bytes;
  uint32_t record_bytes;
  uint32_t record_count;
  uint16_t log;
  uint8_t reserved[6];
  LogInstance instance;
};
static_assert(sizeof(BlockPage) == kBlockHeaderBytes);

// Of all bytes but those of the CRC itself.
uint32_t CrcAround(std::span<const std::byte> bytes, size_t crc_offset) {
  const uint32_t before = Crc32c(bytes.first(crc_offset));
  return Crc32c(bytes.subspan(crc_offset + sizeof(uint32_t)), before);
}

// bytes.size() where all are zero.
size_t FirstNonZero(std::span<const std::byte> bytes) {
  size_t at = 0;
  for (uint64_t eight = 0; at + sizeof(eight) <= bytes.size(); at += sizeof(eight)) {
    std::memcpy(&eight, bytes.data() + at, sizeof(eight));
    if (eight != 0) break;
  }
  while (at < bytes.size() && bytes[at] == std::byte{0}) ++at;
  return at;
}

void FlipBit(std::span<std::byte> bytes, uint64_t bit) {
  bytes[bit / 8] ^= std::byte{1} << (bit % 8);
}

}  // namespace

void WriteSegmentHeader(const SegmentHeader& header, std::byte* to) {
  std::memset(to, 0, kLogPageBytes);
  SegmentPage page{};
  page.magic = kSegmentMagic;
  page.version = kLogFormatVersion;
  page.number = header.number;
  page.segment_bytes = header.segment_bytes;
  page.log = header.log;
  page.recycled = header.recycled ? 1 : 0;
  page.instance = header.instance;
  page.vault = header.vault ? 1 : 0;
  page.record_bytes = header.record_bytes;
  page.record_count = header.record_count;
  std::memcpy(to, &page, sizeof(page));
  page.crc = CrcAround({to, kLogPageBytes}, offsetof(SegmentPage, crc));
  std::memcpy(to, &page, sizeof(page));
}

std::optional<uint32_t> SegmentHeaderVersion(std::span<const std::byte> page) {
  if (page.size() < kLogPageBytes) return std::nullopt;
  SegmentPage fields;
  std::memcpy(&fields, page.data(), sizeof(fields));
  if (fields.magic != kSegmentMagic ||
      CrcAround(page.first(kLogPageBytes), offsetof(SegmentPage, crc)) != fields.crc) {
    return std::nullopt;
  }
  return fields.version;
}

std::optional<uint64_t> FindFlippedBitOfSegmentHeader(std::span<const std::byte> page) {
  constexpr size_t kCrcAt = offsetof(SegmentPage, crc);
  constexpr size_t kCrcBytes = sizeof(SegmentPage::crc);
  if (page.size() < kLogPageBytes) return std::nullopt;
  SegmentPage fields;
  std::memcpy(&fields, page.data(), sizeof(fields));
  const uint32_t change = CrcAround(page.first(kLogPageBytes), kCrcAt) ^ fields.crc;
  uint64_t bit = 0;
  if (change == 0) return std::nullopt;
  if (std::has_single_bit(change)) {
    bit = 8 * kCrcAt + static_cast<uint64_t>(std::countr_zero(change));
  } else {
    const auto covered = FindBitOfCrcChange(change, kLogPageBytes - kCrcBytes);
    if (!covered) return std::nullopt;
    bit = *covered < 8 * kCrcAt ? *covered : *covered + 8 * kCrcBytes;
  }
  std::array<std::byte, kLogPageBytes> mended;
  std::ranges::copy(page.first(kLogPageBytes), mended.begin());
  FlipBit(mended, bit);
  return SegmentHeaderVersion(mended) ? std::optional(bit) : std::nullopt;
}

std::string ParseSegmentHeader(std::span<const std::byte> bytes, SegmentHeader* header) {
  if (bytes.size() < kLogPageBytes) return "is shorter than a segment's header";
  SegmentPage page;
  std::memcpy(&page, bytes.data(), sizeof(page));
  if (page.magic != kSegmentMagic) return "does not begin as a log's segment does";
  if (CrcAround(bytes.first(kLogPageBytes), offsetof(SegmentPage, crc)) != page.crc) {
    return "has a header that does not match its CRC32C";
  }
  if (page.version != kLogFormatVersion) {
    return "is of log format version " + std::to_string(page.version) + "; this program reads " +
           std::to_string(kLogFormatVersion);
  }
  const uint32_t least_bytes = page.vault == 1 ? 2 * kLogPageBytes : kMinSegmentBytes;
  if (page.number == 0 || page.number > kMaxSegment || page.segment_bytes < least_bytes ||
      page.segment_bytes > kMaxSegmentBytes || page.segment_bytes % kLogPageBytes != 0 ||
      page.recycled > 1 || page.vault > 1 ||
      page.record_bytes > (page.vault == 1 ? page.segment_bytes - kLogPageBytes : 0) ||
      page.record_count > page.record_bytes / kLogRecordHeaderBytes) {
    return "has a header with a field out of range";
  }
  header->log = page.log;
  header->number = page.number;
  header->segment_bytes = page.segment_bytes;
  header->recycled = page.recycled != 0;
  header->instance = page.instance;
  header->vault = page.vault == 1;
  header->record_bytes = page.record_bytes;
  header->record_count = page.record_count;
  return "";
}

void WriteBlockHeader(const BlockHeader& header, std::byte* to) {
  BlockPage page{};
  page.magic = kBlockMagic;
  page.position = header.position;
  page.previous = header.previous;
  page.durable = header.durable;
  page.epoch = header.epoch;
  page.block_bytes = header.block_bytes;
  page.record_bytes = header.record_bytes;
  page.record_count = header.record_count;
  page.log = header.log;
  page.instance = header.instance;
  std::memcpy(to, &page, sizeof(page));
  page.crc = CrcAround({to, sizeof(page)}, offsetof(BlockPage, crc));
  std::memcpy(to, &page, sizeof(page));
}

std::string_view BlockFaultText(BlockFault fault) {
  switch (fault) {
    case BlockFault::kNone:
      return "is sound";
    case BlockFault::kTooShort:
      return "is cut off";
    case BlockFault::kNoBlock:
      return "is no block";
    case BlockFault::kBadHeader:
      return "has a header that does not match its CRC32C";
    case BlockFault::kElsewhere:
      return "is left over from an earlier use of the segment";
    case BlockFault::kBadRecord:
      return "has a record that is not sound";
    case BlockFault::kBadPadding:
      return "has other bytes than zeros in its padding";
  }
  return "";
}

BlockFault ParseBlockHeader(std::span<const std::byte> bytes, uint16_t log, LogPosition position,
                            const LogInstance& instance, BlockHeader* header) {
  if (bytes.size() < sizeof(BlockPage)) return BlockFault::kTooShort;
  BlockPage page;
  std::memcpy(&page, bytes.data(), sizeof(page));
  if (page.magic != kBlockMagic) return BlockFault::kNoBlock;
  if (CrcAround(bytes.first(sizeof(page)), offsetof(BlockPage, crc)) != page.crc) {
    return BlockFault::kBadHeader;
  }
  if (page.position != position || page.log != log || page.instance != instance) {
    return BlockFault::kElsewhere;
  }
  if (page.block_bytes < kLogPageBytes || page.block_bytes > kMaxBlockBytes ||
      page.block_bytes % kLogPageBytes != 0 ||
      page.record_bytes > page.block_bytes - kBlockHeaderBytes) {
    return BlockFault::kBadHeader;
  }
  header->log = page.log;
  header->position = page.position;
  header->previous = page.previous;
  header->durable = page.durable;
  header->epoch = page.epoch;
  header->block_bytes = page.block_bytes;
  header->record_bytes = page.record_bytes;
  header->record_count = page.record_count;
  header->instance = page.instance;
  return BlockFault::kNone;
}

BlockCheck CheckBlock(std::span<const std::byte> bytes, uint16_t log, LogPosition position,
                      const LogInstance& instance, BlockHeader* header) {
  const BlockFault fault = ParseBlockHeader(bytes, log, position, instance, header);
  if (fault != BlockFault::kNone) return {.fault = fault};
  if (bytes.size() < header->block_bytes) return {.fault = BlockFault::kTooShort};
  const size_t records_end = kBlockHeaderBytes + header->record_bytes;
  size_t at = kBlockHeaderBytes;
  for (uint32_t i = 0; i < header->record_count; ++i) {
    LogRecord record;
    size_t record_bytes = 0;
    const LogAddress address = MakeLogAddress(log, position + at);
    const LogRecordFault found =
        ParseLogRecord(bytes.first(records_end).subspan(at), address, &record, &record_bytes);
    if (found != LogRecordFault::kNone) {
      return {.fault = BlockFault::kBadRecord, .offset = at, .record_fault = found};
    }
    at += record_bytes;
  }
  if (at != records_end) {
    return {
        .fault = BlockFault::kBadRecord, .offset = at, .record_fault = LogRecordFault::kBadLength};
  }
  const auto padding = bytes.first(header->block_bytes).subspan(records_end);
  const size_t odd = FirstNonZero(padding);
  if (odd < padding.size()) {
    return {.fault = BlockFault::kBadPadding, .offset = records_end + odd};
  }
  return {};
}

// 1. In the header: each of its bits is tried, as it is short.
// 2. In a record: the one that is not sound; what follows must be sound without it.
// 3. In the padding: the one bit that is set.
std::optional<uint64_t> FindFlippedBitOfBlock(std::span<const std::byte> bytes, uint16_t log,
                                              LogPosition position, const LogInstance& instance) {
  BlockHeader header;
  if (bytes.size() < kBlockHeaderBytes) return std::nullopt;
  const auto becomes_sound = [&](uint64_t bit) {
    const size_t length = std::min<size_t>(bytes.size(), kMaxBlockBytes);
    std::vector<std::byte> mended(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(length));
    FlipBit(mended, bit);
    return CheckBlock(mended, log, position, instance, &header).fault == BlockFault::kNone;
  };
  const BlockCheck check = CheckBlock(bytes, log, position, instance, &header);
  switch (check.fault) {
    case BlockFault::kNoBlock:
    case BlockFault::kBadHeader: {
      std::array<std::byte, kBlockHeaderBytes> mended;
      for (uint64_t bit = 0; bit < 8 * kBlockHeaderBytes; ++bit) {
        std::copy_n(bytes.begin(), kBlockHeaderBytes, mended.begin());
        FlipBit(mended, bit);
        const BlockFault left = ParseBlockHeader(mended, log, position, instance, &header);
        if (left == BlockFault::kNone && becomes_sound(bit)) return bit;
      }
      return std::nullopt;
    }
    case BlockFault::kBadRecord: {
      const LogAddress address = MakeLogAddress(log, position + check.offset);
      const size_t records_end = kBlockHeaderBytes + header.record_bytes;
      if (check.offset >= records_end) return std::nullopt;
      const auto bit = FindFlippedBit(bytes.first(records_end).subspan(check.offset), address);
      if (!bit) return std::nullopt;
      const uint64_t whole = 8 * check.offset + *bit;
      return becomes_sound(whole) ? std::optional(whole) : std::nullopt;
    }
    case BlockFault::kBadPadding: {
      const auto odd = static_cast<uint8_t>(bytes[check.offset]);
      if (!std::has_single_bit(odd)) return std::nullopt;
      const uint64_t bit = 8 * check.offset + static_cast<uint64_t>(std::countr_zero(odd));
      return becomes_sound(bit) ? std::optional(bit) : std::nullopt;
    }
    case BlockFault::kNone:
    case BlockFault::kTooShort:
    case BlockFault::kElsewhere:
      break;
  }
  return std::nullopt;
}

}  // namespace engram
