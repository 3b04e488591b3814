#pragma once

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "index/log/log_format.h"
#include "index/log/log_reader.h"
#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/disk.h"
#include "src/core/hash.h"
#include "src/core/log_files.h"
#include "src/core/log_record.h"

// Logs for tests: records by chance, blocks and segments put together by hand.

namespace engram {

using Bytes = std::vector<std::byte>;
using LogFiles = std::map<std::string, Bytes>;

inline constexpr LogInstance kTestInstance{1, 2, 3, 4, 5, 6, 7, 8};

// A record with the memory that it points to.
class OwnedRecord {
 public:
  explicit OwnedRecord(const LogRecord& record)
      : space_(record.space),
        id_(record.id),
        vector_(record.vector.begin(), record.vector.end()),
        payload_(record.payload.begin(), record.payload.end()),
        record_(record) {}

  LogRecord get() const {
    LogRecord record = record_;
    record.space = space_;
    record.id = id_;
    record.vector = vector_;
    record.payload = payload_;
    return record;
  }

 private:
  std::string space_;
  std::string id_;
  Bytes vector_;
  Bytes payload_;
  LogRecord record_;
};

// Everything that a record says, as text to compare and to print.
inline std::string TextOf(const LogRecord& record) {
  const auto hex = [](std::span<const std::byte> bytes) {
    std::string text;
    for (const std::byte byte : bytes) {
      text += "0123456789abcdef"[static_cast<uint8_t>(byte) >> 4];
      text += "0123456789abcdef"[static_cast<uint8_t>(byte) & 15];
    }
    return text;
  };
  const auto number = [](auto value) { return std::string(" ").append(std::to_string(value)); };
  const auto code = [&](auto value) { return number(static_cast<uint32_t>(value)); };
  return "stamp" + number(record.stamp) + code(record.kind) + code(record.dtype) +
         number(record.dimension) + code(record.payload_kind) + code(record.skip_reason) +
         number(record.scale) + number(record.confidence) + number(record.session.value()) +
         number(record.sequence) + number(record.when_ns) + " " + std::string(record.space) + " " +
         hex(std::as_bytes(std::span(record.id.data(), record.id.size()))) + " " +
         hex(record.vector) + " " + hex(record.payload);
}

// A small record of any kind; `stamp` tells it from others.
inline OwnedRecord RandomRecord(SplitMix64& random, uint64_t stamp, size_t most_payload = 60) {
  constexpr std::array<LogRecordKind, 7> kKinds{LogRecordKind::kUpsert,   LogRecordKind::kUpsert,
                                                LogRecordKind::kDelete,   LogRecordKind::kSkip,
                                                LogRecordKind::kSuppress, LogRecordKind::kRestore,
                                                LogRecordKind::kSpace};
  LogRecord record;
  record.kind = kKinds[random.Below(kKinds.size())];
  record.stamp = stamp;
  record.session = SessionId(random.Below(4));
  record.sequence = random.Next();
  record.when_ns = static_cast<int64_t>(random.Next());
  Bytes vector;
  if (record.kind == LogRecordKind::kUpsert) {
    record.dtype = static_cast<VectorDtype>(1 + random.Below(4));
    record.dimension = static_cast<uint16_t>(1 + random.Below(20));
    vector.resize(VectorBytes(record.dtype, record.dimension));
  }
  for (std::byte& byte : vector) byte = static_cast<std::byte>(random.Next());
  Bytes payload(random.Below(most_payload + 1));
  for (std::byte& byte : payload) byte = static_cast<std::byte>(random.Next());
  const std::string space = "space-" + std::to_string(random.Below(3));
  const std::string id = "id" + std::to_string(random.Below(1'000));
  record.space = space;
  record.vector = vector;
  record.id = id;
  record.payload = payload;
  return OwnedRecord(record);
}

// One block, as it is written.
struct BlockSpec {
  uint16_t log = 0;
  LogInstance instance = kTestInstance;
  LogPosition position = 0;
  LogPosition previous = 0;
  LogPosition durable = 0;
  uint32_t epoch = 1;
};
inline Bytes MakeBlock(const BlockSpec& spec, const std::vector<OwnedRecord>& records) {
  Bytes block(kBlockHeaderBytes);
  for (const OwnedRecord& record : records) {
    const size_t at = block.size();
    block.resize(at + LogRecordBytes(record.get()));
    WriteLogRecord(record.get(), MakeLogAddress(spec.log, spec.position + at), block.data() + at);
  }
  const auto record_bytes = static_cast<uint32_t>(block.size() - kBlockHeaderBytes);
  block.resize((block.size() + kLogPageBytes - 1) / kLogPageBytes * kLogPageBytes);
  WriteBlockHeader({.log = spec.log,
                    .position = spec.position,
                    .previous = spec.previous,
                    .durable = spec.durable,
                    .epoch = spec.epoch,
                    .block_bytes = static_cast<uint32_t>(block.size()),
                    .record_bytes = record_bytes,
                    .record_count = static_cast<uint32_t>(records.size()),
                    .instance = spec.instance},
                   block.data());
  return block;
}

// Puts the files of one log together.
class LogBuilder {
 public:
  explicit LogBuilder(uint32_t segment_bytes = kMinSegmentBytes, uint16_t log = 0,
                      uint64_t seed = 1)
      : segment_bytes_(segment_bytes), log_(log), random_(seed) {}

  // A segment as it is before its use. `recycled`: with other bytes behind the header.
  void AddSegment(uint32_t number, bool recycled = false) {
    Bytes& file = files_[SegmentName(number)];
    file.assign(segment_bytes_, std::byte{0});
    if (recycled) {
      for (std::byte& byte : file) byte = static_cast<std::byte>(random_.Next());
    }
    WriteSegmentHeader({.log = log_,
                        .number = number,
                        .segment_bytes = segment_bytes_,
                        .recycled = recycled,
                        .instance = kTestInstance},
                       file.data());
    if (position_ == 0) position_ = previous_ = MakeLogPosition(number, kLogPageBytes);
  }
  // What follows goes to the beginning of the next segment, which is made where it is missing.
  void GoToNextSegment() {
    const uint32_t number = SegmentOf(position_) + 1;
    if (!files_.contains(SegmentName(number))) AddSegment(number);
    previous_ = position_;
    position_ = MakeLogPosition(number, kLogPageBytes);
  }
  void GoTo(LogPosition position) { position_ = previous_ = position; }

  // A block of `records` random records at position(), or 0 for a marker. What it takes for durable
  // is everything before it, or `durable`. Returns its position.
  LogPosition AddBlock(size_t records, std::optional<LogPosition> durable = {}) {
    std::vector<OwnedRecord> owned;
    for (size_t i = 0; i < records; ++i) owned.push_back(RandomRecord(random_, ++stamp_));
    return AddBlock(owned, durable);
  }
  LogPosition AddBlock(const std::vector<OwnedRecord>& records,
                       std::optional<LogPosition> durable = {}) {
    Bytes block = Make(records, durable.value_or(previous_));
    if (OffsetOf(position_) + block.size() > segment_bytes_) {
      GoToNextSegment();
      block = Make(records, durable.value_or(previous_));
    }
    const LogPosition at = position_;
    std::ranges::copy(block, files_[SegmentName(SegmentOf(at))].begin() + OffsetOf(at));
    for (const OwnedRecord& record : records) texts_.push_back(TextOf(record.get()));
    position_ += block.size();
    previous_ = position_;
    blocks_.push_back(at);
    return at;
  }

  void set_epoch(uint32_t epoch) { epoch_ = epoch; }
  // Where the next block goes.
  LogPosition position() const { return position_; }
  // Of each block.
  const std::vector<LogPosition>& blocks() const { return blocks_; }
  // Of each record.
  std::vector<std::string>& texts() { return texts_; }
  std::vector<std::string> FirstTexts(size_t count) const {
    return {texts_.begin(), texts_.begin() + static_cast<ptrdiff_t>(count)};
  }
  LogFiles& files() { return files_; }
  Bytes& file(uint32_t number) { return files_.at(SegmentName(number)); }
  std::byte& At(LogPosition position) { return file(SegmentOf(position)).at(OffsetOf(position)); }
  void Flip(LogPosition position, unsigned bit) {
    At(position) ^= static_cast<std::byte>(1u << bit);
  }
  SplitMix64& random() { return random_; }

 private:
  Bytes Make(const std::vector<OwnedRecord>& records, LogPosition durable) {
    return MakeBlock({.log = log_,
                      .position = position_,
                      .previous = previous_,
                      .durable = durable,
                      .epoch = epoch_},
                     records);
  }

  const uint32_t segment_bytes_;
  const uint16_t log_;
  SplitMix64 random_;
  LogFiles files_;
  LogPosition position_ = 0;
  LogPosition previous_ = 0;
  uint32_t epoch_ = 1;
  uint64_t stamp_ = 0;
  std::vector<LogPosition> blocks_;
  std::vector<std::string> texts_;
};

// A Disk that reads files in memory, at once. Nothing can be written.
class MemoryDisk final : public Disk {
 public:
  explicit MemoryDisk(const LogFiles* files) : files_(files) {}

  Result<void> LockDirectory() override { return {}; }
  Result<std::vector<DirectoryEntry>> List() override {
    std::vector<DirectoryEntry> entries;
    for (const auto& [name, bytes] : *files_) entries.push_back({name, bytes.size()});
    return entries;
  }
  Result<DiskFile> Open(const std::string& name, OpenMode mode, Caching) override {
    CHECK(mode == OpenMode::kRead, "nothing can be written here");
    const auto file = files_->find(name);
    if (file == files_->end()) return FailErrno("open " + name, ENOENT);
    open_.push_back(&file->second);
    ++open_files_;
    return DiskFile{.id = {static_cast<uint32_t>(open_.size()), 1},
                    .size_bytes = file->second.size()};
  }
  void Close(FileId) override { --open_files_; }
  Result<void> Rename(const std::string&, const std::string&) override { return Refuse(); }
  Result<void> Remove(const std::string&) override { return Refuse(); }
  Result<void> SyncDirectory() override { return {}; }
  bool Read(FileId file, uint64_t offset, std::span<std::byte> to, uint64_t tag) override {
    if (ends_.size() == kMaxInFlight) return false;
    const Bytes& bytes = *open_[file.index - 1];
    const size_t there = std::min<size_t>(to.size(), bytes.size() - std::min(offset, bytes.size()));
    if (there > 0) std::memcpy(to.data(), bytes.data() + offset, there);
    ends_.push_back({.tag = tag, .error = 0, .bytes = there});
    return true;
  }
  bool Write(FileId, uint64_t, std::span<const std::byte>, uint64_t) override { return false; }
  bool Flush(FileId, uint64_t) override { return false; }
  size_t Poll(std::span<DiskCompletion> out) override {
    const size_t count = std::min(out.size(), ends_.size());
    std::copy_n(ends_.begin(), count, out.begin());
    ends_.erase(ends_.begin(), ends_.begin() + static_cast<ptrdiff_t>(count));
    return count;
  }
  uint32_t in_flight() const override { return static_cast<uint32_t>(ends_.size()); }
  void Wait(int64_t) override {}
  const std::string& directory() const override { return directory_; }
  std::string_view backend() const override { return "memory"; }

  int open_files() const { return open_files_; }

 private:
  static constexpr size_t kMaxInFlight = 12;  // fewer than a reader asks for
  static Result<void> Refuse() { return Fail(ErrorCode::kPermissionDenied, "read only"); }

  const LogFiles* files_;
  std::vector<const Bytes*> open_;
  int open_files_ = 0;
  std::vector<DiskCompletion> ends_;
  std::string directory_ = "log-000";
};

// Of what an error or a report names.
inline bool Says(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// A whole log, read.
struct ReadResult {
  std::vector<std::string> records;
  std::vector<LogAddress> addresses;
  LogPosition end = 0;
  LogPosition durable = 0;
  uint32_t last_epoch = 0;
  uint32_t highest_epoch = 0;
  std::vector<MendedBit> mended;
  std::optional<LogDamage> damage;
  ErrorCode code = ErrorCode::kInternal;
  std::string error;  // empty: none
};

inline ReadResult ReadLog(Disk& disk, LogPosition from = 0, uint32_t epoch = 0, uint16_t log = 0,
                          const LogInstance& instance = kTestInstance) {
  LogReader reader(&disk, log, instance);
  ReadResult result;
  const auto fail = [&](const Error& error) {
    result.code = error.code;
    result.error = error.message;
  };
  LogEntry entry;
  auto opened = reader.Open(from, epoch);
  if (!opened) fail(opened.error());
  for (bool reading = opened.has_value(); reading;) {
    const auto step = reader.Next(&entry);
    if (!step) {
      fail(step.error());
      break;
    }
    if (*step == LogStep::kEnd) break;
    if (*step == LogStep::kPending) {
      disk.Wait(kNanosPerSecond);
      continue;
    }
    result.records.push_back(TextOf(entry.record));
    result.addresses.push_back(entry.address);
    CHECK(entry.address == MakeLogAddress(log, PositionOf(entry.address)) &&
              PositionOf(entry.address) > entry.block_begin &&
              PositionOf(entry.address) + entry.record_bytes <= entry.block_end,
          "a record lies in its block");
  }
  CHECK(reader.bytes_read() <= reader.total_bytes(), "progress is at most all");
  result.end = reader.end();
  result.durable = reader.durable();
  result.last_epoch = reader.last_epoch();
  result.highest_epoch = reader.highest_epoch();
  result.mended = reader.mended();
  result.damage = reader.damage();
  return result;
}
inline ReadResult ReadLog(const LogFiles& files, LogPosition from = 0, uint32_t epoch = 0) {
  MemoryDisk disk(&files);
  ReadResult result = ReadLog(disk, from, epoch);
  CHECK(disk.open_files() == 0 && disk.in_flight() == 0, "everything is closed again");
  return result;
}

}  // namespace engram
