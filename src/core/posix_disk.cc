#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <memory>
#include <utility>
#include <vector>

#include "src/core/check.h"
#include "src/core/disk.h"
#include "src/core/file_table.h"
#include "src/core/posix_directory.h"

namespace engram {

namespace {

enum class Kind : uint8_t { kRead, kWrite, kFlush };

struct Operation {
  Kind kind = Kind::kRead;
  FileId file;
  uint64_t offset = 0;
  std::byte* memory = nullptr;
  size_t bytes = 0;
  uint64_t tag = 0;
};

// Operations wait in a queue and are done one after the other inside Poll.
//
// Thread safety: one thread.
// Invariants: the queue [head_, tail_) holds what is under way, oldest first.
class PosixDisk final : public Disk {
 public:
  PosixDisk(PosixDirectory directory, const DiskOptions& options)
      : directory_(std::move(directory)),
        max_in_flight_(options.max_in_flight),
        queue_(std::bit_ceil(options.max_in_flight)),
        files_(options.max_open_files) {}

  Result<void> LockDirectory() override { return directory_.Lock(); }
  Result<std::vector<DirectoryEntry>> List() override { return directory_.List(); }
  Result<DiskFile> Open(const std::string& name, OpenMode mode, Caching caching) override;
  void Close(FileId file) override;
  Result<void> Rename(const std::string& from, const std::string& to) override {
    return directory_.Rename(from, to);
  }
  Result<void> Remove(const std::string& name) override { return directory_.Remove(name); }
  Result<void> SyncDirectory() override { return directory_.Sync(); }
  uint64_t FreeBytes() const override { return directory_.FreeBytes(); }

  bool Read(FileId file, uint64_t offset, std::span<std::byte> to, uint64_t tag) override {
    return Enqueue({Kind::kRead, file, offset, to.data(), to.size(), tag});
  }
  bool Write(FileId file, uint64_t offset, std::span<const std::byte> from, uint64_t tag) override {
    // Kept as mutable for reads' sake; a write only reads it.
    auto* memory = const_cast<std::byte*>(from.data());
    return Enqueue({Kind::kWrite, file, offset, memory, from.size(), tag});
  }
  bool Flush(FileId file, uint64_t tag) override {
    return Enqueue({Kind::kFlush, file, 0, nullptr, 0, tag});
  }
  size_t Poll(std::span<DiskCompletion> out) override;
  uint32_t in_flight() const override { return static_cast<uint32_t>(tail_ - head_); }
  // Whatever is under way is done by the next Poll.
  void Wait(int64_t /*timeout_ns*/) override {}
  const std::string& directory() const override { return directory_.path(); }
  std::string_view backend() const override { return "posix"; }

 private:
  bool Enqueue(const Operation& operation);

  // Constant after construction, but for the lock.
  PosixDirectory directory_;
  const uint32_t max_in_flight_;
  // Owner only.
  std::vector<Operation> queue_;  // A power of two, used as a ring.
  FileTable<PosixFile> files_;
  uint64_t head_ = 0;
  uint64_t tail_ = 0;
};

Result<DiskFile> PosixDisk::Open(const std::string& name, OpenMode mode, Caching /*caching*/) {
  if (files_.full()) {
    return Fail(ErrorCode::kResourceExhausted, "open " + name + ": max_open_files are open");
  }
  // Always buffered: this is the backend that asks nothing of the machine.
  Result<PosixFile> file = directory_.OpenFile(name, mode, Caching::kBuffered);
  if (!file) return std::unexpected(file.error());
  DiskFile opened;
  opened.size_bytes = file->size_bytes;
  opened.id = files_.Add(*std::move(file));
  return opened;
}

void PosixDisk::Close(FileId file) {
  CHECK(files_.Get(file).in_flight == 0, "a file is closed when nothing of it is under way");
  files_.Take(file);
}

bool PosixDisk::Enqueue(const Operation& operation) {
  PosixFile& file = files_.Get(operation.file);
  CHECK(operation.kind != Kind::kWrite || file.writable, "the file was opened for reading");
  if (tail_ - head_ == max_in_flight_) return false;
  queue_[tail_ & (queue_.size() - 1)] = operation;
  ++tail_;
  ++file.in_flight;
  return true;
}

DiskCompletion Transfer(int fd, const Operation& operation) {
  DiskCompletion end;
  end.tag = operation.tag;
  while (end.bytes < operation.bytes) {
    std::byte* memory = operation.memory + end.bytes;
    const size_t left = operation.bytes - end.bytes;
    const auto offset = static_cast<off_t>(operation.offset + end.bytes);
    const ssize_t done = operation.kind == Kind::kRead ? pread(fd, memory, left, offset)
                                                       : pwrite(fd, memory, left, offset);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) {
      end.error = errno;
      break;
    }
    if (done == 0) {  // A read at the end of the file; a write that takes nothing would spin.
      if (operation.kind == Kind::kWrite) end.error = EIO;
      break;
    }
    end.bytes += static_cast<size_t>(done);
  }
  return end;
}

size_t PosixDisk::Poll(std::span<DiskCompletion> out) {
  size_t count = 0;
  for (; count < out.size() && head_ != tail_; ++count) {
    const Operation& operation = queue_[head_ & (queue_.size() - 1)];
    PosixFile& file = files_.Get(operation.file);
    if (operation.kind == Kind::kFlush) {
      const int error = fdatasync(file.fd.get()) == 0 ? 0 : errno;
      out[count] = {.tag = operation.tag, .error = error, .bytes = 0};
    } else {
      out[count] = Transfer(file.fd.get(), operation);
    }
    --file.in_flight;
    ++head_;
  }
  return count;
}

}  // namespace

Result<std::unique_ptr<Disk>> CreatePosixDisk(const std::string& directory,
                                              const DiskOptions& options) {
  CHECK(options.max_in_flight > 0 && options.max_open_files > 0, "a disk needs room to work");
  Result<PosixDirectory> opened = PosixDirectory::Open(directory);
  if (!opened) return std::unexpected(opened.error());
  return std::make_unique<PosixDisk>(*std::move(opened), options);
}

}  // namespace engram
