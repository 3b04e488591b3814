#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

// FORMAT.md written down a second time, by offsets and numbers, so that a mistake in the structs of
// dataplane/ does not hide itself. For tests: allocates, and can say things that are wrong.

namespace engram {

using WireBytes = std::vector<std::byte>;

// Frame types and flags as FORMAT.md numbers them.
enum WireType : uint8_t {
  kWireHello = 1,
  kWireHelloAck = 2,
  kWireObserve = 3,
  kWireAck = 4,
  kWireNak = 5,
  kWireFlow = 6,
  kWireRecall = 7,
  kWireResult = 8,
  kWirePing = 9,
  kWireClose = 10,
  kWireIntrospect = 11,
  kWireIntrospection = 12,
  kWireCommand = 13,
  kWireCommandDone = 14,
  kWireScroll = 15,
  kWireScrolled = 16,
  kWireCheck = 17,
  kWireChecked = 18,
};

// CRC-32C a bit at a time (RFC 3720 B.4: reflected polynomial 0x82F63B78, both ends inverted).
// `crc` is the value so far.
inline uint32_t OracleCrc(std::span<const std::byte> bytes, uint32_t crc = 0) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> made{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) * 0x82F63B78);
      made[i] = value;
    }
    return made;
  }();
  crc = ~crc;
  for (std::byte byte : bytes) crc = (crc >> 8) ^ table[(crc ^ static_cast<uint8_t>(byte)) & 0xFF];
  return ~crc;
}

// Appends little-endian numbers.
class WireWriter {
 public:
  WireWriter& U8(uint64_t value) { return Number(value, 1); }
  WireWriter& U16(uint64_t value) { return Number(value, 2); }
  WireWriter& U32(uint64_t value) { return Number(value, 4); }
  WireWriter& U64(uint64_t value) { return Number(value, 8); }
  WireWriter& F32(float value) {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    return U32(bits);
  }
  WireWriter& Zeros(size_t count) {
    bytes_.resize(bytes_.size() + count);
    return *this;
  }
  WireWriter& Raw(std::span<const std::byte> bytes) {
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
    return *this;
  }
  WireWriter& Text(std::string_view text) {
    return Raw(std::as_bytes(std::span(text.data(), text.size())));
  }
  size_t size() const { return bytes_.size(); }
  WireBytes Take() { return std::move(bytes_); }

 private:
  WireWriter& Number(uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) bytes_.push_back(static_cast<std::byte>(value >> (8 * i)));
    return *this;
  }
  WireBytes bytes_;
};

inline uint64_t WireNumber(std::span<const std::byte> bytes, size_t offset, size_t count) {
  uint64_t value = 0;
  for (size_t i = 0; i < count; ++i) {
    value |= uint64_t{static_cast<uint8_t>(bytes[offset + i])} << (8 * i);
  }
  return value;
}
inline void SetWireNumber(std::span<std::byte> bytes, size_t offset, size_t count, uint64_t value) {
  for (size_t i = 0; i < count; ++i) bytes[offset + i] = static_cast<std::byte>(value >> (8 * i));
}
inline std::string WireText(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Puts the right checksum into a whole frame.
inline void SealWire(std::span<std::byte> frame) {
  const uint32_t crc = OracleCrc(frame.subspan(16), OracleCrc(frame.first(12)));
  SetWireNumber(frame, 12, 4, crc);
}

struct WireHeader {
  uint16_t flags = 0;
  uint64_t session = 0;
  uint64_t sequence = 0;
};

inline WireBytes MakeFrame(uint8_t type, const WireHeader& header,
                           std::span<const std::byte> body = {}) {
  WireWriter out;
  out.Text("ENG1").U8(1).U8(type).U16(header.flags).U32(body.size()).U32(0);
  out.U64(header.session).U64(header.sequence).Raw(body);
  WireBytes frame = out.Take();
  SealWire(frame);
  return frame;
}

struct WireHello {
  uint32_t features = 0;
  uint16_t dimension = 0;
  uint8_t metric = 0;
  uint8_t priority = 0;
  std::string space = {};
  uint64_t session = 0;
};
inline WireBytes HelloBytes(const WireHello& hello) {
  WireWriter body;
  body.U32(hello.features).U16(hello.dimension).U8(hello.metric).U8(hello.priority);
  body.U8(hello.space.size()).Zeros(3).Text(hello.space);
  return MakeFrame(kWireHello, {.session = hello.session}, body.Take());
}

// One observation. The vector is given as its bytes.
struct WireRecord {
  uint8_t op = 1;
  uint8_t dtype = 1;
  uint16_t dimension = 0;
  float scale = 1;
  float confidence = 1;
  int64_t when_ns = 0;
  WireBytes vector = {};
  std::string id = {};
  std::string payload = {};
  std::string attributes = {};
};
inline WireRecord F32Record(std::string id, std::span<const float> vector,
                            std::string payload = {}) {
  WireRecord record{.dimension = static_cast<uint16_t>(vector.size()),
                    .vector = {},
                    .id = std::move(id),
                    .payload = std::move(payload)};
  const auto bytes = std::as_bytes(vector);
  record.vector.assign(bytes.begin(), bytes.end());
  return record;
}
inline WireRecord DeleteRecord(std::string id) {
  return {.op = 2, .dtype = 0, .vector = {}, .id = std::move(id), .payload = {}};
}
inline WireBytes RecordBytesOf(const WireRecord& record) {
  const size_t used = 32 + record.vector.size() + record.id.size() + record.attributes.size() +
                      record.payload.size();
  const size_t padded = (used + 7) / 8 * 8;
  WireWriter out;
  out.U32(padded).U8(record.op).U8(record.dtype).U16(record.dimension);
  out.U16(record.id.size()).U16(record.attributes.size()).U32(record.payload.size());
  out.F32(record.scale).F32(record.confidence).U64(static_cast<uint64_t>(record.when_ns));
  out.Raw(record.vector).Text(record.id).Text(record.attributes).Text(record.payload);
  out.Zeros(padded - used);
  return out.Take();
}
inline WireBytes ObserveBodyOf(std::span<const WireRecord> records, uint8_t payload_kind = 0) {
  WireWriter body;
  body.U16(records.size()).U8(payload_kind).U8(0);
  for (const WireRecord& record : records) body.Raw(RecordBytesOf(record));
  return body.Take();
}
inline WireBytes ObserveBytes(uint64_t session, uint64_t sequence,
                              std::span<const WireRecord> records, uint8_t payload_kind = 0) {
  return MakeFrame(kWireObserve, {.session = session, .sequence = sequence},
                   ObserveBodyOf(records, payload_kind));
}

struct WireRecall {
  uint32_t k = 10;
  uint32_t ef = 0;
  uint16_t dimension = 0;
  uint8_t dtype = 1;
  float scale = 1;
  WireBytes vector = {};
  std::string filter = {};
  float bound = 0;
  int64_t at_unix_ns = 0;
};
inline WireRecall F32Recall(std::span<const float> vector) {
  const auto bytes = std::as_bytes(vector);
  return {.dimension = static_cast<uint16_t>(vector.size()),
          .vector = WireBytes(bytes.begin(), bytes.end())};
}
// With flag 16 (bounded) there is a bound, with flag 64 a moment, with flag 8 (filtered) a filter,
// maybe an empty one.
inline WireBytes RecallBodyOf(const WireRecall& recall, uint16_t flags = 0) {
  WireWriter body;
  body.U32(recall.k).U32(recall.ef).U16(recall.dimension).U8(recall.dtype).U8(0);
  body.F32(recall.scale).Raw(recall.vector);
  if ((flags & 16) != 0) body.F32(recall.bound);
  if ((flags & 64) != 0) body.U64(static_cast<uint64_t>(recall.at_unix_ns));
  if ((flags & 8) != 0) body.U16(recall.filter.size()).Text(recall.filter);
  return body.Take();
}
// `flags`: 1 with payload, 2 with vector, 4 at a snapshot, 8 filtered, 16 bounded, 32 of all
// spaces.
inline WireBytes RecallBytes(uint64_t request_id, const WireRecall& recall, uint16_t flags = 0) {
  return MakeFrame(kWireRecall, {.flags = flags, .sequence = request_id},
                   RecallBodyOf(recall, flags));
}
enum WireFlowAction : uint8_t {
  kWirePause = 1,
  kWireResume = 2,
  kWireSlowDown = 3,
  kWireSpeedUp = 4,
  kWireBufferStatus = 5,
};
struct WireFlowRequest {
  uint8_t action = kWirePause;
  int32_t buffer_remaining = 0;
  float preferred_rate = 0;
};
inline WireBytes FlowBytes(const WireFlowRequest& flow, uint64_t sequence = 0) {
  return MakeFrame(kWireFlow, {.sequence = sequence},
                   WireWriter()
                       .U8(flow.action)
                       .Zeros(3)
                       .U32(static_cast<uint32_t>(flow.buffer_remaining))
                       .F32(flow.preferred_rate)
                       .U32(0)
                       .Take());
}
inline WireBytes IntrospectBytes(uint64_t request_id, uint8_t what) {
  return MakeFrame(kWireIntrospect, {.sequence = request_id}, WireWriter().U8(what).Take());
}

inline WireBytes ScrollBytes(uint64_t request_id, uint64_t cursor, uint16_t partition,
                             uint16_t limit, uint16_t flags = 0) {
  return MakeFrame(kWireScroll, {.flags = flags, .sequence = request_id},
                   WireWriter().U64(cursor).U16(partition).U16(limit).U32(0).Take());
}
inline WireBytes CheckBytes(uint64_t request_id, uint16_t shard) {
  WireBytes body = WireWriter().U16(shard).Take();
  body.resize(136);
  return MakeFrame(kWireCheck, {.sequence = request_id}, body);
}
inline WireBytes CommandBytes(uint64_t request_id, uint8_t what, const std::string& space) {
  WireWriter writer;
  writer.U8(what).U8(static_cast<uint8_t>(space.size())).U16(0).U32(0);
  for (const char letter : space) writer.U8(static_cast<uint8_t>(letter));
  return MakeFrame(kWireCommand, {.sequence = request_id}, writer.Take());
}

// One hit of a result.
struct WireHit {
  std::string id = {};
  float score = 0;
  uint64_t stamp = 0;
  std::string payload = {};
  uint8_t flags = 0;
  std::vector<float> vector = {};
  int64_t when_ns = 0;
  float confidence = 1;
  uint8_t payload_kind = 0;

  bool operator==(const WireHit&) const = default;
};
inline WireBytes HitBytesOf(const WireHit& hit) {
  const size_t used = 40 + 4 * hit.vector.size() + hit.id.size() + hit.payload.size();
  const size_t padded = (used + 7) / 8 * 8;
  WireWriter out;
  out.U32(padded).F32(hit.score).U64(static_cast<uint64_t>(hit.when_ns)).U64(hit.stamp);
  out.F32(hit.confidence).U32(hit.payload.size()).U16(hit.id.size()).U8(hit.flags);
  out.U8(hit.payload_kind).U16(hit.vector.size()).U16(0);
  for (const float value : hit.vector) out.F32(value);
  return out.Text(hit.id).Text(hit.payload).Zeros(padded - used).Take();
}
inline float WireFloat(std::span<const std::byte> bytes, size_t offset) {
  const auto bits = static_cast<uint32_t>(WireNumber(bytes, offset, 4));
  float value = 0;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
// All hits that lie one behind the other in `bytes`.
inline std::vector<WireHit> ParseHits(std::span<const std::byte> bytes) {
  std::vector<WireHit> hits;
  while (!bytes.empty()) {
    WireHit hit{.score = WireFloat(bytes, 4),
                .stamp = WireNumber(bytes, 16, 8),
                .flags = static_cast<uint8_t>(WireNumber(bytes, 34, 1)),
                .when_ns = static_cast<int64_t>(WireNumber(bytes, 8, 8)),
                .confidence = WireFloat(bytes, 24),
                .payload_kind = static_cast<uint8_t>(WireNumber(bytes, 35, 1))};
    size_t offset = 40;
    for (size_t i = 0; i < WireNumber(bytes, 36, 2); ++i, offset += 4) {
      hit.vector.push_back(WireFloat(bytes, offset));
    }
    const size_t id_bytes = WireNumber(bytes, 32, 2);
    hit.id = WireText(bytes.subspan(offset, id_bytes));
    hit.payload = WireText(bytes.subspan(offset + id_bytes, WireNumber(bytes, 28, 4)));
    bytes = bytes.subspan(WireNumber(bytes, 0, 4));
    hits.push_back(std::move(hit));
  }
  return hits;
}

// A frame of the server's, taken apart.
struct WireFrame {
  uint8_t type = 0;
  uint16_t flags = 0;
  uint64_t session = 0;
  uint64_t sequence = 0;
  WireBytes body = {};
};

// Takes the first whole frame off `stream`; nothing while it is not whole. `*sound` becomes false
// when the stream is not made of sealed frames.
inline std::optional<WireFrame> TakeWireFrame(WireBytes* stream, bool* sound) {
  if (stream->size() < 32) return std::nullopt;
  const std::span<const std::byte> bytes(*stream);
  const size_t length = WireNumber(bytes, 8, 4);
  if (WireText(bytes.first(4)) != "ENG1" || WireNumber(bytes, 4, 1) != 1 || length > 1'048'576) {
    *sound = false;
    return std::nullopt;
  }
  if (bytes.size() < 32 + length) return std::nullopt;
  const auto frame = bytes.first(32 + length);
  if (OracleCrc(frame.subspan(16), OracleCrc(frame.first(12))) != WireNumber(bytes, 12, 4)) {
    *sound = false;
  }
  WireFrame taken{.type = static_cast<uint8_t>(WireNumber(bytes, 5, 1)),
                  .flags = static_cast<uint16_t>(WireNumber(bytes, 6, 2)),
                  .session = WireNumber(bytes, 16, 8),
                  .sequence = WireNumber(bytes, 24, 8),
                  .body = WireBytes(frame.begin() + 32, frame.end())};
  stream->erase(stream->begin(), stream->begin() + static_cast<std::ptrdiff_t>(32 + length));
  return taken;
}

struct WireNak {
  uint16_t reason = 0;
  uint8_t refused_type = 0;
  bool consumed = false;
  bool closing = false;
  uint32_t retry_after_ms = 0;
  uint64_t expected = 0;
  std::string text = {};
};
inline WireNak ParseNak(const WireFrame& frame) {
  const uint64_t flags = WireNumber(frame.body, 3, 1);
  const size_t text_bytes = WireNumber(frame.body, 16, 2);
  return {.reason = static_cast<uint16_t>(WireNumber(frame.body, 0, 2)),
          .refused_type = static_cast<uint8_t>(WireNumber(frame.body, 2, 1)),
          .consumed = (flags & 1) != 0,
          .closing = (flags & 2) != 0,
          .retry_after_ms = static_cast<uint32_t>(WireNumber(frame.body, 4, 4)),
          .expected = WireNumber(frame.body, 8, 8),
          .text = WireText(std::span(frame.body).subspan(24, text_bytes))};
}

struct WireFlowState {
  uint8_t state = 0;
  uint32_t retry_after_ms = 0;
  uint32_t queue_depth = 0;
  uint32_t queue_capacity = 0;
  float pressure = 0;
  float preferred_rate = 0;
};
inline WireFlowState ParseFlow(const WireFrame& frame) {
  return {.state = static_cast<uint8_t>(WireNumber(frame.body, 0, 1)),
          .retry_after_ms = static_cast<uint32_t>(WireNumber(frame.body, 4, 4)),
          .queue_depth = static_cast<uint32_t>(WireNumber(frame.body, 8, 4)),
          .queue_capacity = static_cast<uint32_t>(WireNumber(frame.body, 12, 4)),
          .pressure = WireFloat(frame.body, 16),
          .preferred_rate = WireFloat(frame.body, 20)};
}

}  // namespace engram
