#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "src/core/log_address.h"
#include "src/core/log_record.h"

// FORMAT.md of this folder as code: segments and blocks. Records are in src/core/log_record.h.

namespace engram {

inline constexpr uint32_t kLogFormatVersion = 2;
// Blocks begin and end at multiples of this; a segment's header takes the first one.
inline constexpr uint32_t kLogPageBytes = 4096;
inline constexpr uint32_t kMinSegmentBytes = 64 * 1024;
inline constexpr uint32_t kMaxSegmentBytes = 1u << 30;
// A block holds at least one record of any size.
inline constexpr uint32_t kMaxBlockBytes = 4u << 20;

// Tells a data directory's logs from those of any other: the first half of its instance id.
using LogInstance = std::array<uint8_t, 8>;

struct SegmentHeader {
  uint16_t log = 0;
  uint32_t number = 0;  // 1 to kMaxSegment
  uint32_t segment_bytes = 0;
  bool recycled = false;  // what follows the last block may be older bytes; else it is zero
  LogInstance instance{};
  // Of the vault: no blocks, but records back to back behind this page, then zeros. It may be
  // shorter than kMinSegmentBytes.
  bool vault = false;
  uint32_t record_bytes = 0;  // of all records; 0 where it is not of the vault
  uint32_t record_count = 0;  // likewise
  friend bool operator==(const SegmentHeader&, const SegmentHeader&) = default;
};

// The header page: kLogPageBytes.
void WriteSegmentHeader(const SegmentHeader& header, std::byte* to);
// Why a page is no header; empty when it is one.
std::string ParseSegmentHeader(std::span<const std::byte> page, SegmentHeader* header);
// The version of a header whose CRC matches; nothing where the page is no such header.
std::optional<uint32_t> SegmentHeaderVersion(std::span<const std::byte> page);
// Where turning one bit makes the CRC of kLogPageBytes match: that bit.
std::optional<uint64_t> FindFlippedBitOfSegmentHeader(std::span<const std::byte> page);

struct BlockHeader {
  uint16_t log = 0;
  LogPosition position = 0;  // of this block
  LogPosition previous = 0;  // where the block before it ended; its own position within a segment
  LogPosition durable = 0;   // all before it was on stable storage when this block was begun
  uint32_t epoch = 0;        // rises with each start of the daemon
  uint32_t block_bytes = 0;  // with header and padding, a multiple of kLogPageBytes
  uint32_t record_bytes = 0;
  uint32_t record_count = 0;  // 0: the block is a marker, it says what is durable
  LogInstance instance{};
  friend bool operator==(const BlockHeader&, const BlockHeader&) = default;
};
inline constexpr size_t kBlockHeaderBytes = 64;

void WriteBlockHeader(const BlockHeader& header, std::byte* to);

enum class BlockFault : uint8_t {
  kNone,
  kTooShort,    // the bytes end before the block does
  kNoBlock,     // not the header of a block
  kBadHeader,   // one of a block, whose CRC does not match
  kElsewhere,   // a sound header of another place, log or directory: what was here before
  kBadRecord,   // sound header, and a record that is not
  kBadPadding,  // sound header and records, and something where zeros belong
};
std::string_view BlockFaultText(BlockFault fault);

// The header alone, of a block that lies at `position` of `log`.
BlockFault ParseBlockHeader(std::span<const std::byte> bytes, uint16_t log, LogPosition position,
                            const LogInstance& instance, BlockHeader* header);

// What is wrong with a block, and where.
struct BlockCheck {
  BlockFault fault = BlockFault::kNone;
  size_t offset = 0;  // from the block's first byte, of what is wrong
  LogRecordFault record_fault = LogRecordFault::kNone;
};
// The whole block.
BlockCheck CheckBlock(std::span<const std::byte> bytes, uint16_t log, LogPosition position,
                      const LogInstance& instance, BlockHeader* header);

// Where turning one bit makes the block at `position` a sound one: that bit, counted from the
// block's first byte. Such damage cannot come from a write that was cut off, but by a chance of
// some 1 in 100,000.
std::optional<uint64_t> FindFlippedBitOfBlock(std::span<const std::byte> bytes, uint16_t log,
                                              LogPosition position, const LogInstance& instance);

// Calls `visit(record, address, bytes)` for each record of a sound block.
template <typename Visit>
void ForEachRecord(std::span<const std::byte> block, const BlockHeader& header, Visit&& visit) {
  size_t at = kBlockHeaderBytes;
  for (uint32_t i = 0; i < header.record_count; ++i) {
    LogRecord record;
    size_t bytes = 0;
    const LogAddress address = MakeLogAddress(header.log, header.position + at);
    const auto fault = ParseLogRecord(block.subspan(at), address, &record, &bytes);
    if (fault != LogRecordFault::kNone) return;
    visit(record, address, bytes);
    at += bytes;
  }
}

}  // namespace engram
