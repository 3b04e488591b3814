#include "index/checkpoint/checkpoint_file.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>

#include "index/checkpoint/space_loader.h"
#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/crc32c.h"

namespace engram {

namespace {

constexpr std::string_view kPrefix = "checkpoint-";
constexpr size_t kDigits = 8;

uint32_t CrcOf(std::span<const std::byte> extent) {
  const uint32_t before = Crc32c(extent.first(kExtentCrcOffset));
  return Crc32c(extent.subspan(kExtentCrcOffset + sizeof(uint32_t)), before);
}

}  // namespace

std::string CheckpointName(uint32_t round) {
  std::array<char, kDigits + 1> digits;
  std::snprintf(digits.data(), digits.size(), "%08x", round);
  return std::string(kPrefix) + digits.data();
}

std::optional<uint32_t> CheckpointRound(std::string_view name) {
  if (name.size() != kPrefix.size() + kDigits || !name.starts_with(kPrefix)) return std::nullopt;
  const std::string_view digits = name.substr(kPrefix.size());
  uint32_t round = 0;
  const auto [end, error] = std::from_chars(digits.begin(), digits.end(), round, 16);
  if (error != std::errc() || end != digits.end() || CheckpointName(round) != name) {
    return std::nullopt;
  }
  return round;
}

CommitStamp BirthOf(const ListedSpace& listed) {
  CommitStamp birth = 0;
  std::memcpy(&birth, listed.birth, sizeof(listed.birth));
  constexpr CommitStamp kShardBits = (CommitStamp{1} << kStampShardBits) - 1;
  return birth == 0 ? kNoStamp : birth << kStampShardBits | kShardBits;
}

void SetBirth(CommitStamp birth, ListedSpace* listed) {
  const CommitStamp kept = birth >> kStampShardBits;
  std::memcpy(listed->birth, &kept, sizeof(listed->birth));
}

size_t SealShardExtent(ExtentKind kind, uint32_t count, size_t body_bytes, std::byte* to) {
  ExtentHeader header;
  header.kind = kind;
  header.count = count;
  const size_t used = sizeof(header) + body_bytes;
  header.bytes = static_cast<uint32_t>(PadTo8(used));
  CHECK(header.bytes <= kMaxExtentBytes, "an extent is no longer than a reader takes");
  std::memset(to + used, 0, header.bytes - used);
  std::memcpy(to, &header, sizeof(header));
  header.crc = CrcOf({to, header.bytes});
  std::memcpy(to, &header, sizeof(header));
  return header.bytes;
}

std::optional<std::span<const std::byte>> OpenShardExtent(std::span<const std::byte> extent,
                                                          ExtentHeader* header) {
  if (extent.size() < sizeof(*header)) return std::nullopt;
  std::memcpy(header, extent.data(), sizeof(*header));
  if (header->magic != kExtentMagic || header->version < kOldestExtentVersion ||
      header->version > kExtentVersion || header->bytes != extent.size() ||
      header->crc != CrcOf(extent)) {
    return std::nullopt;
  }
  return extent.subspan(sizeof(*header));
}

CheckpointReader::~CheckpointReader() {
  while (under_way_ > 0 && disk_->in_flight() > 0) {
    disk_->Wait(kNanosPerSecond);
    (void)TakeCompletions();
  }
  if (file_) disk_->Close(*file_);
}

Result<void> CheckpointReader::Open(const std::string& name, uint64_t bytes) {
  name_ = name;
  bytes_ = bytes;
  auto file = disk_->Open(name, OpenMode::kRead, Caching::kBuffered);
  if (!file) return std::unexpected(file.error());
  file_ = file->id;
  if (file->size_bytes < bytes) {
    return Fail(ErrorCode::kCorrupt, disk_->directory() + "/" + name + " has " +
                                         std::to_string(file->size_bytes) + " bytes, not the " +
                                         std::to_string(bytes) + " that the manifest says");
  }
  for (Part& part : parts_) {
    part.memory.resize(kMaxExtentBytes + std::min<uint64_t>(kReadBytes, bytes));
  }
  for (Part& part : parts_) ReadPart(&part);
  return {};
}

bool CheckpointReader::ReadPart(Part* part) {
  part->ready = false;
  part->offset = asked_;
  part->bytes = std::min<uint64_t>(kReadBytes, bytes_ - asked_);
  if (part->bytes == 0) return false;
  const std::span<std::byte> to(part->memory.data() + kMaxExtentBytes, part->bytes);
  const auto tag = static_cast<uint64_t>(part - parts_.data());
  CHECK(disk_->Read(*file_, asked_, to, tag), "the disk has nothing else to do");
  asked_ += part->bytes;
  ++under_way_;
  return true;
}

Result<void> CheckpointReader::TakeCompletions() {
  std::array<DiskCompletion, 2> ends;
  const size_t count = under_way_ > 0 ? disk_->Poll(ends) : 0;
  for (size_t i = 0; i < count; ++i) {
    --under_way_;
    Part& part = parts_[ends[i].tag];
    if (ends[i].error != 0) error_ = ends[i].error;
    if (ends[i].error == 0 && ends[i].bytes < part.bytes) error_ = EIO;
    part.ready = true;
  }
  if (error_ != 0) return FailErrno("read " + disk_->directory() + "/" + name_, error_);
  return {};
}

// 1. What is left of the current part holds the next extent whole: that one.
// 2. Else the other part follows, with what is left in front of it, and the current one is read
//    anew.
Result<CheckpointReader::Step> CheckpointReader::Next(std::span<const std::byte>* extent) {
  if (auto taken = TakeCompletions(); !taken) return std::unexpected(taken.error());
  for (;;) {
    if (next_offset_ == bytes_) return Step::kEnd;
    extent_offset_ = next_offset_;
    if (left_.size() >= sizeof(ExtentHeader)) {
      const auto size = PeekExtent(left_);
      if (!size) return Fail(ErrorCode::kCorrupt, Place() + ": " + size.error().message);
      if (*size <= left_.size()) {
        *extent = left_.first(*size);
        left_ = left_.subspan(*size);
        next_offset_ += *size;
        return Step::kExtent;
      }
    }
    const bool is_first = next_offset_ == 0 && left_.empty();
    Part& next = parts_[is_first ? 0 : 1 - current_];
    if (next.offset + next.bytes <= next_offset_ + left_.size() && !is_first) {
      return Fail(ErrorCode::kCorrupt, Place() + ": ends in the middle of an extent");
    }
    if (!next.ready) return Step::kPending;
    std::byte* data = next.memory.data() + kMaxExtentBytes;
    if (!left_.empty()) std::memcpy(data - left_.size(), left_.data(), left_.size());
    const size_t carried = left_.size();
    if (!is_first) {
      ReadPart(&parts_[current_]);
      current_ = 1 - current_;
    }
    left_ = {data - carried, carried + next.bytes};
  }
}

std::string CheckpointReader::Place() const {
  return disk_->directory() + "/" + name_ + " at offset " + std::to_string(extent_offset_);
}

}  // namespace engram
