#include "src/core/disk.h"

#include <utility>

#include "src/core/check.h"
#include "src/core/clock.h"

namespace engram {

namespace {

// The end of the one operation under way.
DiskCompletion Await(Disk& disk) {
  DiskCompletion completion;
  while (disk.Poll(std::span(&completion, 1)) == 0) disk.Wait(kNanosPerSecond);
  return completion;
}

std::string PathOf(const Disk& disk, const std::string& name) {
  return disk.directory() + "/" + name;
}

Result<void> WriteAndFlush(Disk& disk, FileId file, const std::string& path,
                           std::span<const std::byte> content) {
  if (!content.empty()) {
    CHECK(disk.Write(file, 0, content, 0), "nothing is under way");
    if (const DiskCompletion end = Await(disk); end.error != 0) {
      return FailErrno("write " + path, end.error);
    }
  }
  CHECK(disk.Flush(file, 0), "nothing is under way");
  if (const DiskCompletion end = Await(disk); end.error != 0) {
    return FailErrno("flush " + path, end.error);
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<Disk>> CreateDisk(DiskBackend backend, const std::string& directory,
                                         const DiskOptions& options, std::string* note) {
  if (note != nullptr) note->clear();
  if (backend == DiskBackend::kPosix) return CreatePosixDisk(directory, options);
  auto uring = CreateUringDisk(directory, options, note);
  if (uring || backend == DiskBackend::kUring) return uring;
  auto posix = CreatePosixDisk(directory, options);
  // Where the directory itself is the trouble, POSIX fails with the same error.
  if (posix && note != nullptr) {
    *note = std::string(uring.error().code == ErrorCode::kPermissionDenied
                            ? "io_uring is forbidden here ("
                            : "io_uring cannot be used here (") +
            uring.error().message + "); using pread and pwrite";
  }
  return posix;
}

Result<std::vector<std::byte>> ReadWholeFile(Disk& disk, const std::string& name,
                                             size_t max_bytes) {
  CHECK(disk.in_flight() == 0, "its completions are not ours");
  const std::string path = PathOf(disk, name);
  const auto file = disk.Open(name, OpenMode::kRead, Caching::kBuffered);
  if (!file) return std::unexpected(file.error());
  if (file->size_bytes > max_bytes) {
    disk.Close(file->id);
    return Fail(ErrorCode::kCorrupt, path + " has " + std::to_string(file->size_bytes) +
                                         " bytes, more than the " + std::to_string(max_bytes) +
                                         " that it can have");
  }
  std::vector<std::byte> content(file->size_bytes);
  DiskCompletion end;
  if (!content.empty()) {
    CHECK(disk.Read(file->id, 0, content, 0), "nothing is under way");
    end = Await(disk);
  }
  disk.Close(file->id);
  if (end.error != 0) return FailErrno("read " + path, end.error);
  content.resize(end.bytes);
  return content;
}

// 1. Write the whole content beside the old file and flush it.
// 2. Rename it over the old one: a reader, or a crash, finds one of the two.
// 3. Sync the directory, so that the rename itself stays.
Result<void> ReplaceFile(Disk& disk, const std::string& name, std::span<const std::byte> content) {
  CHECK(disk.in_flight() == 0, "its completions are not ours");
  const std::string temporary = name + std::string(kTemporarySuffix);
  // One that a crash left behind may be longer than the new content.
  if (const auto removed = disk.Remove(temporary);
      !removed && removed.error().code != ErrorCode::kNotFound) {
    return removed;
  }
  const auto file = disk.Open(temporary, OpenMode::kCreate, Caching::kBuffered);
  if (!file) return std::unexpected(file.error());
  const Result<void> written = WriteAndFlush(disk, file->id, PathOf(disk, temporary), content);
  disk.Close(file->id);
  if (!written) return written;
  if (const auto renamed = disk.Rename(temporary, name); !renamed) return renamed;
  return disk.SyncDirectory();
}

}  // namespace engram
