#include "dataplane/hit_window.h"

#include <cstring>

#include "src/core/check.h"
#include "src/core/vector_dtype.h"

namespace engram {

namespace {

HitHeader HeaderOf(const std::byte* hit) {
  HitHeader header;
  std::memcpy(&header, hit, sizeof(header));
  return header;
}

}  // namespace

bool HitWindow::Add(const std::byte* hit, RecordReader* reader) {
  CHECK(!full(), "ask full() first");
  const HitHeader header = HeaderOf(hit);
  Entry entry{.hit = hit};
  entry.omitted = payload_added_ + header.payload_bytes > max_payload_bytes_;
  const bool wanted = header.vector_dimension > 0 || (header.payload_bytes > 0 && !entry.omitted);
  if ((header.flags & kHitAtAddress) != 0 && wanted && reader != nullptr) {
    entry.ticket = reader->Begin(hit);
    if (entry.ticket == RecordReader::kNone) return false;
  }
  if (!entry.omitted) payload_added_ += header.payload_bytes;
  At(added_++) = entry;
  return true;
}

// As it goes to the client.
HitHeader HitWindow::FinalHeader(const Entry& entry, const RecordReader* reader) {
  HitHeader header = HeaderOf(entry.hit);
  if (entry.omitted) {
    header.payload_bytes = 0;
    header.flags |= kHitPayloadOmitted;
  }
  if ((header.flags & kHitAtAddress) != 0) {
    header.flags &= static_cast<uint8_t>(~kHitAtAddress);
    const bool wanted = header.vector_dimension > 0 || header.payload_bytes > 0;
    const bool there = entry.ticket != RecordReader::kNone &&
                       reader->state(entry.ticket) == RecordReader::State::kReady;
    if (wanted && !there) {
      header.payload_bytes = 0;
      header.vector_dimension = 0;
      header.flags |= kHitPayloadOmitted;
    }
  }
  header.hit_bytes = static_cast<uint32_t>(FullHitBytes(header));
  return header;
}

size_t HitWindow::BytesAt(uint32_t place, const RecordReader* reader) const {
  CHECK(place < size(), "a hit that was added");
  const Entry& entry = At(written_ + place);
  if (entry.ticket != RecordReader::kNone &&
      reader->state(entry.ticket) == RecordReader::State::kReading) {
    return 0;
  }
  return FinalHeader(entry, reader).hit_bytes;
}

void HitWindow::WriteFirst(std::byte* to, RecordReader* reader) {
  CHECK(BytesAt(0, reader) > 0, "the first hit is there");
  Entry& entry = At(written_);
  const HitHeader from = HeaderOf(entry.hit);
  const HitHeader header = FinalHeader(entry, reader);
  const size_t vector_bytes = header.vector_dimension * sizeof(float);
  const std::byte* id = entry.hit + HitIdOffset(from);
  const size_t name_bytes = size_t{from.id_bytes} + from.space_bytes;
  const std::byte* payload = id + name_bytes;
  std::byte* const end = to + header.hit_bytes;
  std::memcpy(to, &header, sizeof(header));
  to += sizeof(header);
  if (entry.ticket != RecordReader::kNone) {
    const LogRecord& record = reader->record(entry.ticket);
    if (vector_bytes > 0) {
      DecodeVector(record.dtype, record.dimension, record.scale, record.vector.data(),
                   reinterpret_cast<float*>(to));
    }
    payload = record.payload.data();
  } else if (vector_bytes > 0) {
    std::memcpy(to, entry.hit + sizeof(header), vector_bytes);
  }
  to += vector_bytes;
  std::memcpy(to, id, name_bytes);
  to += name_bytes;
  if (header.payload_bytes > 0) std::memcpy(to, payload, header.payload_bytes);
  to += header.payload_bytes;
  std::memset(to, 0, static_cast<size_t>(end - to));
  if (entry.ticket != RecordReader::kNone) reader->Release(entry.ticket);
  if (!entry.omitted) payload_written_ += from.payload_bytes;
  ++written_;
}

void HitWindow::Clear(RecordReader* reader) {
  for (uint32_t number = written_; number != added_; ++number) {
    if (At(number).ticket != RecordReader::kNone) reader->Release(At(number).ticket);
  }
  added_ = written_;
  payload_added_ = payload_written_;
}

}  // namespace engram
