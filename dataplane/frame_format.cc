#include "dataplane/frame_format.h"

#include "src/core/crc32c.h"

namespace engram {

namespace {

constexpr size_t kCrcOffset = offsetof(FrameHeader, crc);
constexpr size_t kAfterCrc = kCrcOffset + sizeof(uint32_t);

}  // namespace

uint32_t FrameCrc(const FrameHeader& header, std::span<const std::span<const std::byte>> parts) {
  const auto bytes = BytesOf(header);
  uint32_t crc = Crc32c(bytes.first(kCrcOffset));
  crc = Crc32c(bytes.subspan(kAfterCrc), crc);
  for (const auto& part : parts) crc = Crc32c(part, crc);
  return crc;
}

void SealFrame(FrameHeader* header, std::span<const std::span<const std::byte>> parts) {
  size_t length = 0;
  for (const auto& part : parts) length += part.size();
  header->length = static_cast<uint32_t>(length);
  header->crc = FrameCrc(*header, parts);
}

RefusalReason CheckFrameHeader(const std::byte* bytes, FrameHeader* header) {
  *header = LoadAs<FrameHeader>(bytes);
  if (header->magic != kFrameMagic) return RefusalReason::kBadMagic;
  if (header->version != kFrameVersion) return RefusalReason::kBadVersion;
  if (header->length > kMaxFrameBodyBytes) return RefusalReason::kFrameTooLong;
  return RefusalReason::kNone;
}

RefusalReason CheckFrameCrc(const FrameHeader& header, std::span<const std::byte> frame) {
  uint32_t crc = Crc32c(frame.first(kCrcOffset));
  crc = Crc32c(frame.subspan(kAfterCrc), crc);
  return crc == header.crc ? RefusalReason::kNone : RefusalReason::kBadCrc;
}

}  // namespace engram
