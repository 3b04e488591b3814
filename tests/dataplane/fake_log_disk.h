#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "dataplane/record_reader.h"
#include "src/core/check.h"
#include "src/core/log_files.h"
#include "src/core/log_record.h"

namespace engram {

// Logs in memory, whose reads end when and how a test says.
class FakeLogs {
 public:
  struct Read {
    std::string file;  // with its folder
    uint64_t offset = 0;
    std::span<std::byte> to;
    uint64_t tag = 0;
    class FakeLogDisk* disk = nullptr;
  };

  // A disk of these logs. They outlive it.
  RecordAccess::DiskFactory Factory();
  RecordAccess Access() { return {Factory(), &pins, 0}; }

  // Writes a record with this content, and attributes before its payload; returns the hit that
  // refers to it. `in_file` false: it is
  // not written yet.
  std::vector<std::byte> Put(uint16_t log, uint32_t segment, uint32_t offset, const std::string& id,
                             const std::string& payload, CommitStamp stamp,
                             const std::vector<float>& vector = {1, 2}, bool in_file = true) {
    LogRecord record;
    record.space = "space";
    record.stamp = stamp;
    record.id = id;
    record.attributes = std::as_bytes(std::span(attributes));
    record.payload = std::as_bytes(std::span(payload));
    record.dtype = VectorDtype::kF32;
    record.dimension = static_cast<uint16_t>(vector.size());
    record.vector = std::as_bytes(std::span(vector));
    const size_t bytes = LogRecordBytes(record);
    if (in_file) PutRecord(log, segment, offset, record);
    HitHeader header{};
    header.score = static_cast<float>(stamp);
    header.stamp = stamp;
    header.confidence = 1;
    header.payload_bytes = static_cast<uint32_t>(payload.size());
    header.id_bytes = static_cast<uint16_t>(id.size());
    header.flags = kHitAtAddress;
    header.hit_bytes =
        static_cast<uint32_t>(PadTo8(sizeof(header) + sizeof(HitReference) + id.size()));
    const HitReference reference{.address = MakeLogAddress(log, MakeLogPosition(segment, offset)),
                                 .record_bytes = static_cast<uint32_t>(bytes),
                                 .has_older_stamp = 0};
    std::vector<std::byte> hit(header.hit_bytes);
    std::memcpy(hit.data(), &header, sizeof(header));
    std::memcpy(hit.data() + sizeof(header), &reference, sizeof(reference));
    std::memcpy(hit.data() + sizeof(header) + sizeof(reference), id.data(), id.size());
    return hit;
  }
  void PutRecord(uint16_t log, uint32_t segment, uint32_t offset, const LogRecord& record) {
    auto& content = files[LogFolder(log) + "/" + SegmentName(segment)];
    content.resize(std::max(content.size(), offset + LogRecordBytes(record) + 64));
    WriteLogRecord(record, MakeLogAddress(log, MakeLogPosition(segment, offset)),
                   content.data() + offset);
  }
  // Ends that read, `bytes` of which are there.
  void End(size_t which, int error = 0, size_t bytes = SIZE_MAX);
  void EndAll() {
    while (!reads.empty()) End(0);
  }

  const std::string attributes = "\x06\x04sourcedocs";  // that records have
  ReadPins pins{1};
  std::map<std::string, std::vector<std::byte>> files;  // by folder and name
  std::vector<Read> reads;                              // under way
  bool ends_at_once = false;                            // reads end by themselves
  int opened = 0;                                       // ever
  int open = 0;
  int most_open = 0;
};

class FakeLogDisk final : public Disk {
 public:
  FakeLogDisk(FakeLogs* logs, std::string folder, uint32_t max_open_files)
      : logs_(logs), folder_(std::move(folder)), max_open_files_(max_open_files) {}
  ~FakeLogDisk() override {
    std::erase_if(logs_->reads, [this](const auto& read) { return read.disk == this; });
  }

  Result<void> LockDirectory() override { return {}; }
  Result<std::vector<DirectoryEntry>> List() override { return std::vector<DirectoryEntry>(); }
  Result<DiskFile> Open(const std::string& name, OpenMode mode, Caching caching) override {
    CHECK(mode == OpenMode::kRead && caching == Caching::kBuffered, "logs are read by the cache");
    const std::string file = folder_ + "/" + name;
    if (!logs_->files.contains(file)) return Fail(ErrorCode::kNotFound, "open " + file);
    CHECK(names_.size() < max_open_files_, "the reader keeps to its bound");
    names_[++last_file_] = file;
    ++logs_->opened;
    logs_->most_open = std::max(logs_->most_open, ++logs_->open);
    return DiskFile{.id = {last_file_, 1}};
  }
  void Close(FileId file) override {
    CHECK(names_.erase(file.index) == 1, "an open file is closed once");
    for (const auto& read : logs_->reads) {
      CHECK(read.disk != this || names_.contains(files_of_.at(read.tag)),
            "no file is closed while it is read");
    }
    --logs_->open;
  }
  Result<void> Rename(const std::string&, const std::string&) override { return {}; }
  Result<void> Remove(const std::string&) override { return {}; }
  Result<void> SyncDirectory() override { return {}; }
  bool Read(FileId file, uint64_t offset, std::span<std::byte> to, uint64_t tag) override {
    files_of_[tag] = file.index;
    logs_->reads.push_back({names_.at(file.index), offset, to, tag, this});
    ++in_flight_;
    if (logs_->ends_at_once) logs_->End(logs_->reads.size() - 1);
    return true;
  }
  bool Write(FileId, uint64_t, std::span<const std::byte>, uint64_t) override { return false; }
  bool Flush(FileId, uint64_t) override { return false; }
  size_t Poll(std::span<DiskCompletion> out) override {
    const size_t count = std::min(out.size(), ends_.size());
    std::copy_n(ends_.begin(), count, out.begin());
    ends_.erase(ends_.begin(), ends_.begin() + static_cast<std::ptrdiff_t>(count));
    in_flight_ -= static_cast<uint32_t>(count);
    return count;
  }
  uint32_t in_flight() const override { return in_flight_; }
  void Wait(int64_t) override {}
  const std::string& directory() const override { return folder_; }
  std::string_view backend() const override { return "fake"; }

  void End(const DiskCompletion& end) { ends_.push_back(end); }

 private:
  FakeLogs* const logs_;
  const std::string folder_;
  const uint32_t max_open_files_;
  std::map<uint32_t, std::string> names_;  // of open files
  std::map<uint64_t, uint32_t> files_of_;  // by tag
  uint32_t last_file_ = 0;
  uint32_t in_flight_ = 0;
  std::vector<DiskCompletion> ends_;
};

inline RecordAccess::DiskFactory FakeLogs::Factory() {
  return [this](const std::string& folder, const DiskOptions& options,
                std::string*) -> Result<std::unique_ptr<Disk>> {
    return std::make_unique<FakeLogDisk>(this, folder, options.max_open_files);
  };
}

inline void FakeLogs::End(size_t which, int error, size_t bytes) {
  const Read read = reads[which];
  reads.erase(reads.begin() + static_cast<std::ptrdiff_t>(which));
  const std::vector<std::byte>& content = files[read.file];
  const size_t there = read.offset < content.size() ? content.size() - read.offset : 0;
  const size_t count = error != 0 ? 0 : std::min({bytes, there, read.to.size()});
  if (count > 0) std::memcpy(read.to.data(), content.data() + read.offset, count);
  read.disk->End({.tag = read.tag, .error = error, .bytes = count});
}

}  // namespace engram
