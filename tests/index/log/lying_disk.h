#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/disk.h"

namespace engram {

// How a disk deceives its user.
enum class Lie : uint8_t {
  kNone,
  kFlushEndsEarly,  // as soon as it is asked for
  kWriteEndsEarly,
  kFlushHangs,
};

// What it says is not what the disk below it does.
class LyingDisk final : public Disk {
 public:
  LyingDisk(std::unique_ptr<Disk> disk, Lie lie) : disk_(std::move(disk)), lie_(lie) {}

  Result<void> LockDirectory() override { return disk_->LockDirectory(); }
  Result<std::vector<DirectoryEntry>> List() override { return disk_->List(); }
  Result<DiskFile> Open(const std::string& name, OpenMode mode, Caching caching) override {
    return disk_->Open(name, mode, caching);
  }
  void Close(FileId file) override {
    while (!hidden_.empty()) {
      disk_->Wait(kNanosPerSecond);
      Fetch();
    }
    disk_->Close(file);
  }
  Result<void> Rename(const std::string& from, const std::string& to) override {
    return disk_->Rename(from, to);
  }
  Result<void> Remove(const std::string& name) override { return disk_->Remove(name); }
  Result<void> SyncDirectory() override { return disk_->SyncDirectory(); }
  bool Read(FileId file, uint64_t offset, std::span<std::byte> to, uint64_t tag) override {
    return disk_->Read(file, offset, to, Begin(tag, false, 0));
  }
  bool Write(FileId file, uint64_t offset, std::span<const std::byte> from, uint64_t tag) override {
    return disk_->Write(file, offset, from, Begin(tag, lie_ == Lie::kWriteEndsEarly, from.size()));
  }
  bool Flush(FileId file, uint64_t tag) override {
    if (lie_ == Lie::kFlushHangs) {
      hanging_.push_back({file, tag});
      return true;
    }
    return disk_->Flush(file, Begin(tag, lie_ == Lie::kFlushEndsEarly, 0));
  }
  // Those that hang go on, and others no longer hang.
  void EndHanging() {
    lie_ = Lie::kNone;
    for (const auto& [file, tag] : hanging_) {
      CHECK(Flush(file, tag), "there is room for it");
    }
    hanging_.clear();
  }
  size_t Poll(std::span<DiskCompletion> out) override {
    // What it says without ground comes before what is true.
    if (ends_.empty()) Fetch();
    const size_t count = std::min(out.size(), ends_.size());
    std::copy_n(ends_.begin(), count, out.begin());
    ends_.erase(ends_.begin(), ends_.begin() + static_cast<ptrdiff_t>(count));
    return count;
  }
  uint32_t in_flight() const override {
    return static_cast<uint32_t>(tags_.size() + hanging_.size() + ends_.size());
  }
  void Wait(int64_t timeout_ns) override {
    if (ends_.empty()) disk_->Wait(timeout_ns);
  }
  const std::string& directory() const override { return disk_->directory(); }
  std::string_view backend() const override { return disk_->backend(); }

 private:
  uint64_t Begin(uint64_t tag, bool lies, size_t bytes) {
    const uint64_t number = ++last_;
    if (lies) {
      hidden_.insert(number);
      ends_.push_back({.tag = tag, .error = 0, .bytes = bytes});
    } else {
      tags_[number] = tag;
    }
    return number;
  }
  void Fetch() {
    DiskCompletion end;
    while (disk_->Poll({&end, 1}) > 0) {
      if (hidden_.erase(end.tag) > 0) continue;
      const auto tag = tags_.find(end.tag);
      ends_.push_back({.tag = tag->second, .error = end.error, .bytes = end.bytes});
      tags_.erase(tag);
    }
  }

  std::unique_ptr<Disk> disk_;
  Lie lie_;
  std::vector<std::pair<FileId, uint64_t>> hanging_;
  std::set<uint64_t> hidden_;
  std::map<uint64_t, uint64_t> tags_;
  std::vector<DiskCompletion> ends_;
  uint64_t last_ = 0;
};

}  // namespace engram
