#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "src/core/attributes.h"
#include "src/core/commit_stamp.h"
#include "src/core/ids.h"
#include "src/core/log_address.h"
#include "src/core/observation.h"
#include "src/core/refusal_reason.h"
#include "src/core/vector_dtype.h"

namespace engram {

// What a record of a log says. Those up to kRestore are ObservationOps. Stored: unchangeable.
enum class LogRecordKind : uint8_t {
  kUpsert = 1,
  kDelete = 2,
  kSkip = 3,  // the sequence number of an observation that was refused for good
  kSuppress = 4,
  kRestore = 5,
  kSpace = 16,      // a space was made; the payload is a SpaceDefinition
  kDropSpace = 17,  // a space was dropped: what is older of it is gone
};
constexpr bool IsObservation(LogRecordKind kind) { return kind <= LogRecordKind::kRestore; }

// One record, as it is written and as it was read; index/log/FORMAT.md is its grammar. Views point
// into the caller's memory, or into the bytes that were read.
struct LogRecord {
  LogRecordKind kind = LogRecordKind::kUpsert;
  VectorDtype dtype = VectorDtype::kNone;
  PayloadKind payload_kind = PayloadKind::kOpaque;
  RefusalReason skip_reason = RefusalReason::kNone;
  uint16_t dimension = 0;
  float scale = 1;
  float confidence = 1;
  CommitStamp stamp = kNoStamp;
  SessionId session;  // 0: none
  Sequence sequence = 0;
  int64_t when_ns = 0;
  std::string_view space;
  std::span<const std::byte> vector;
  std::string_view id;
  std::span<const std::byte> attributes;  // attributes.h
  std::span<const std::byte> payload;
};

inline constexpr size_t kLogRecordHeaderBytes = 64;
inline constexpr size_t kMaxLogRecordBytes =
    PadTo8(kLogRecordHeaderBytes + kMaxSpaceNameBytes + kMaxDimension * sizeof(float) +
           kMaxIdBytes + kMaxAttributesBytes + kMaxPayloadBytes);

// The bytes that the record takes, a multiple of 8.
constexpr size_t LogRecordBytes(size_t space_bytes, size_t vector_bytes, size_t id_bytes,
                                size_t payload_bytes, size_t attribute_bytes = 0) {
  return PadTo8(kLogRecordHeaderBytes + space_bytes + vector_bytes + id_bytes + attribute_bytes +
                payload_bytes);
}
inline size_t LogRecordBytes(const LogRecord& record) {
  return LogRecordBytes(record.space.size(), record.vector.size(), record.id.size(),
                        record.payload.size(), record.attributes.size());
}

// Writes LogRecordBytes(record) bytes. `address` is where they will lie.
void WriteLogRecord(const LogRecord& record, LogAddress address, std::byte* to);

// Why bytes are no record.
enum class LogRecordFault : uint8_t { kNone, kTooShort, kBadLength, kBadCrc, kBadField };
std::string_view LogRecordFaultText(LogRecordFault fault);

// Reads the record at `address` that begins `bytes`, which may go on behind it. Checks everything;
// *record_bytes (may be nullptr) is its length.
LogRecordFault ParseLogRecord(std::span<const std::byte> bytes, LogAddress address,
                              LogRecord* record, size_t* record_bytes);

// The same of bytes that ParseLogRecord has found sound before: checks nothing. Returns the
// record's length.
size_t ReadLogRecord(std::span<const std::byte> bytes, LogRecord* record);

// Where the CRC does not match and turning one bit of the record makes it match: that bit, counted
// from the record's first byte, lowest bit of each byte first. Records of what `bytes` may hold.
std::optional<uint64_t> FindFlippedBit(std::span<const std::byte> bytes, LogAddress address);

// The one bit among the last `bytes` bytes that a CRC-32C covers whose turning changes that CRC by
// `change` (the xor of the two), counted from the first of these bytes.
std::optional<uint64_t> FindBitOfCrcChange(uint32_t change, size_t bytes);

}  // namespace engram
