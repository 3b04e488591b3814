#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "src/core/disk.h"
#include "src/core/result.h"
#include "src/core/unique_fd.h"

namespace engram {

// An open file of the operating system, with what a Disk must know of it.
struct PosixFile {
  UniqueFd fd;
  uint64_t size_bytes = 0;
  uint32_t alignment = 1;
  bool direct = false;
  bool writable = false;
  uint32_t in_flight = 0;  // operations under way, counted by the Disk
};

// The calls on names that the POSIX and the io_uring disk share; see Disk.
//
// Thread safety: one thread.
class PosixDirectory {
 public:
  // Makes the directory (0700) where only its last part is missing.
  static Result<PosixDirectory> Open(const std::string& path);

  Result<void> Lock();
  Result<std::vector<DirectoryEntry>> List() const;
  // kDirect falls back to buffered where the file system has no O_DIRECT.
  Result<PosixFile> OpenFile(const std::string& name, OpenMode mode, Caching caching) const;
  Result<void> Rename(const std::string& from, const std::string& to) const;
  Result<void> Remove(const std::string& name) const;
  Result<void> Sync() const;
  uint64_t FreeBytes() const;
  const std::string& path() const { return path_; }

 private:
  PosixDirectory(std::string path, UniqueFd fd) : path_(std::move(path)), fd_(std::move(fd)) {}
  std::string PathOf(const std::string& name) const { return path_ + "/" + name; }

  std::string path_;
  UniqueFd fd_;
  UniqueFd lock_;
};

// What a name inside a directory may not be: empty, ".", "..", or with a slash or a zero byte.
Result<void> CheckFileName(const std::string& name);

}  // namespace engram
