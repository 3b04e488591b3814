#include "src/core/log_record.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "src/core/crc32c.h"

namespace engram {

namespace {

// As it lies in a segment.
struct Header {
  uint32_t record_bytes;
  uint32_t crc;
  uint64_t stamp;
  uint64_t session;
  uint64_t sequence;
  int64_t when_ns;
  uint8_t kind;
  uint8_t dtype;
  uint16_t dimension;
  uint16_t id_bytes;
  uint8_t space_bytes;
  uint8_t payload_kind;
  uint32_t payload_bytes;
  float scale;
  float confidence;
  uint16_t skip_reason;
  uint16_t attribute_bytes;
};
static_assert(sizeof(Header) == kLogRecordHeaderBytes);

constexpr size_t kCrcFrom = offsetof(Header, stamp);

// Of the record's place and length, so that one which lies elsewhere does not pass.
uint32_t PrefixCrc(LogAddress address, uint32_t record_bytes) {
  std::array<std::byte, sizeof(address) + sizeof(record_bytes)> prefix;
  std::memcpy(prefix.data(), &address, sizeof(address));
  std::memcpy(prefix.data() + sizeof(address), &record_bytes, sizeof(record_bytes));
  return Crc32c(prefix);
}

uint32_t CrcOf(std::span<const std::byte> record, LogAddress address) {
  return Crc32c(record.subspan(kCrcFrom), PrefixCrc(address, static_cast<uint32_t>(record.size())));
}

bool IsKnownKind(uint8_t kind) {
  return (kind >= static_cast<uint8_t>(LogRecordKind::kUpsert) &&
          kind <= static_cast<uint8_t>(LogRecordKind::kRestore)) ||
         kind == static_cast<uint8_t>(LogRecordKind::kSpace) ||
         kind == static_cast<uint8_t>(LogRecordKind::kDropSpace);
}

bool FieldsAreSound(const Header& header) {
  return IsKnownKind(header.kind) && header.dtype <= static_cast<uint8_t>(VectorDtype::kInt8) &&
         header.dimension <= kMaxDimension &&
         (header.dtype == static_cast<uint8_t>(VectorDtype::kNone)) == (header.dimension == 0) &&
         header.id_bytes <= kMaxIdBytes && header.space_bytes >= 1 &&
         header.space_bytes <= kMaxSpaceNameBytes &&
         header.payload_kind <= static_cast<uint8_t>(PayloadKind::kMemory) &&
         header.attribute_bytes <= kMaxAttributesBytes &&
         header.payload_bytes <= kMaxPayloadBytes && std::isfinite(header.scale) &&
         header.confidence >= 0 && header.confidence <= 1;
}

size_t BytesOf(const Header& header) {
  return LogRecordBytes(header.space_bytes,
                        VectorBytes(static_cast<VectorDtype>(header.dtype), header.dimension),
                        header.id_bytes, header.payload_bytes, header.attribute_bytes);
}

bool LengthIsSound(uint32_t record_bytes) {
  return record_bytes >= kLogRecordHeaderBytes && record_bytes <= kMaxLogRecordBytes &&
         record_bytes % 8 == 0;
}

// The header has been checked, `whole` is the record.
void TakeFields(const Header& header, std::span<const std::byte> whole, LogRecord* record) {
  record->kind = static_cast<LogRecordKind>(header.kind);
  record->dtype = static_cast<VectorDtype>(header.dtype);
  record->payload_kind = static_cast<PayloadKind>(header.payload_kind);
  record->skip_reason = static_cast<RefusalReason>(header.skip_reason);
  record->dimension = header.dimension;
  record->scale = header.scale;
  record->confidence = header.confidence;
  record->stamp = header.stamp;
  record->session = SessionId(header.session);
  record->sequence = header.sequence;
  record->when_ns = header.when_ns;
  size_t at = sizeof(header);
  const auto take = [&at, whole](size_t count) {
    const auto part = whole.subspan(at, count);
    at += count;
    return part;
  };
  const auto text = [](std::span<const std::byte> part) {
    return std::string_view(reinterpret_cast<const char*>(part.data()), part.size());
  };
  record->space = text(take(header.space_bytes));
  record->vector = take(VectorBytes(record->dtype, header.dimension));
  record->id = text(take(header.id_bytes));
  record->attributes = take(header.attribute_bytes);
  record->payload = take(header.payload_bytes);
}

// The CRC of a byte that stands alone, reflected, without inversions.
constexpr std::array<uint32_t, 256> MakeCrcTable() {
  constexpr uint32_t kPolynomial = 0x82F63B78;
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ ((crc & 1) != 0 ? kPolynomial : 0);
    table[byte] = crc;
  }
  return table;
}
constexpr std::array<uint32_t, 256> kCrcTable = MakeCrcTable();

}  // namespace

void WriteLogRecord(const LogRecord& record, LogAddress address, std::byte* to) {
  const size_t bytes = LogRecordBytes(record);
  Header header{.record_bytes = static_cast<uint32_t>(bytes),
                .crc = 0,
                .stamp = record.stamp,
                .session = record.session.value(),
                .sequence = record.sequence,
                .when_ns = record.when_ns,
                .kind = static_cast<uint8_t>(record.kind),
                .dtype = static_cast<uint8_t>(record.dtype),
                .dimension = record.dimension,
                .id_bytes = static_cast<uint16_t>(record.id.size()),
                .space_bytes = static_cast<uint8_t>(record.space.size()),
                .payload_kind = static_cast<uint8_t>(record.payload_kind),
                .payload_bytes = static_cast<uint32_t>(record.payload.size()),
                .scale = record.scale,
                .confidence = record.confidence,
                .skip_reason = static_cast<uint16_t>(record.skip_reason),
                .attribute_bytes = static_cast<uint16_t>(record.attributes.size())};
  std::memcpy(to, &header, sizeof(header));
  std::byte* at = to + sizeof(header);
  const auto append = [&at](const void* from, size_t count) {
    if (count > 0) std::memcpy(at, from, count);
    at += count;
  };
  append(record.space.data(), record.space.size());
  append(record.vector.data(), record.vector.size());
  append(record.id.data(), record.id.size());
  append(record.attributes.data(), record.attributes.size());
  append(record.payload.data(), record.payload.size());
  std::memset(at, 0, static_cast<size_t>(to + bytes - at));
  header.crc = CrcOf({to, bytes}, address);
  std::memcpy(to + offsetof(Header, crc), &header.crc, sizeof(header.crc));
}

std::string_view LogRecordFaultText(LogRecordFault fault) {
  switch (fault) {
    case LogRecordFault::kNone:
      return "sound";
    case LogRecordFault::kTooShort:
      return "is cut off";
    case LogRecordFault::kBadLength:
      return "has an impossible length";
    case LogRecordFault::kBadCrc:
      return "does not match its CRC32C";
    case LogRecordFault::kBadField:
      return "has a field out of range";
  }
  return "";
}

LogRecordFault ParseLogRecord(std::span<const std::byte> bytes, LogAddress address,
                              LogRecord* record, size_t* record_bytes) {
  if (bytes.size() < sizeof(Header)) return LogRecordFault::kTooShort;
  Header header;
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (!LengthIsSound(header.record_bytes)) return LogRecordFault::kBadLength;
  if (header.record_bytes > bytes.size()) return LogRecordFault::kTooShort;
  const std::span<const std::byte> whole = bytes.first(header.record_bytes);
  if (CrcOf(whole, address) != header.crc) return LogRecordFault::kBadCrc;
  if (!FieldsAreSound(header)) return LogRecordFault::kBadField;
  if (BytesOf(header) != header.record_bytes) return LogRecordFault::kBadField;
  TakeFields(header, whole, record);
  if (CheckAttributes(record->attributes) != RefusalReason::kNone) return LogRecordFault::kBadField;
  if (record_bytes != nullptr) *record_bytes = header.record_bytes;
  return LogRecordFault::kNone;
}

size_t ReadLogRecord(std::span<const std::byte> bytes, LogRecord* record) {
  Header header;
  std::memcpy(&header, bytes.data(), sizeof(header));
  TakeFields(header, bytes.first(header.record_bytes), record);
  return header.record_bytes;
}

// A bit of the length changes what is covered: those 32 are tried one by one. The others by what
// they do to the CRC.
std::optional<uint64_t> FindFlippedBit(std::span<const std::byte> bytes, LogAddress address) {
  if (bytes.size() < sizeof(Header)) return std::nullopt;
  Header header;
  std::memcpy(&header, bytes.data(), sizeof(header));
  for (uint32_t bit = 0; bit < 32; ++bit) {
    const uint32_t length = header.record_bytes ^ uint32_t { 1 } << bit;
    if (!LengthIsSound(length) || length > bytes.size()) continue;
    if (CrcOf(bytes.first(length), address) == header.crc) return bit;
  }
  if (!LengthIsSound(header.record_bytes) || header.record_bytes > bytes.size()) {
    return std::nullopt;
  }
  const uint32_t change = CrcOf(bytes.first(header.record_bytes), address) ^ header.crc;
  if (std::has_single_bit(change)) {
    return 8 * offsetof(Header, crc) + static_cast<uint64_t>(std::countr_zero(change));
  }
  const auto bit = FindBitOfCrcChange(change, header.record_bytes - kCrcFrom);
  if (!bit) return std::nullopt;
  return 8 * kCrcFrom + *bit;
}

// CRC32C is linear: a turned bit changes it by what depends on the bit's distance from the end
// alone. So the eight changes of a byte's bits are followed from the last byte to the first, and
// compared with the change that is there.
std::optional<uint64_t> FindBitOfCrcChange(uint32_t change, size_t bytes) {
  std::array<uint32_t, 8> changes;
  for (size_t bit = 0; bit < 8; ++bit) changes[bit] = kCrcTable[size_t{1} << bit];
  for (size_t byte = bytes; byte-- > 0;) {
    for (size_t bit = 0; bit < 8; ++bit) {
      if (changes[bit] == change) return 8 * byte + bit;
      changes[bit] = changes[bit] >> 8 ^ kCrcTable[changes[bit] & 0xFF];
    }
  }
  return std::nullopt;
}

}  // namespace engram
