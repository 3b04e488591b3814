#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/result.h"

namespace engram {

// Names an open file of one Disk; the generation tells it from an earlier one in the same place.
struct FileId {
  uint32_t index = 0;
  uint32_t generation = 0;  // at least 1
  friend bool operator==(FileId, FileId) = default;
};

enum class OpenMode : uint8_t {
  kRead,       // must exist; never written through this FileId
  kReadWrite,  // must exist
  kCreate,     // read and write; made where it is missing
};

// Whether reads and writes go past the operating system's cache (O_DIRECT).
enum class Caching : uint8_t {
  kBuffered,
  kDirect,  // where the backend and the file system have it; DiskFile::alignment says so
};

struct DiskFile {
  FileId id;
  uint64_t size_bytes = 0;
  // Offsets, lengths and addresses of reads and writes are multiples of this; 1 when buffered.
  uint32_t alignment = 1;
  bool direct = false;
};

struct DirectoryEntry {
  std::string name;
  uint64_t size_bytes = 0;
};

// The end of a Read, Write or Flush.
struct DiskCompletion {
  uint64_t tag = 0;  // as it was given
  int error = 0;     // 0, or an errno value: EIO, ENOSPC, ...
  size_t bytes = 0;  // transferred; without error less than asked only in a read at the end of file
};

struct DiskOptions {
  // Reads, writes and flushes that may be under way at a time.
  uint32_t max_in_flight = 256;
  uint32_t max_open_files = 1024;
  // Memory that reads and writes mostly use, registered with the kernel once instead of pinned for
  // each operation (io_uring). Must outlive the Disk. Optional: other memory works as well.
  std::vector<std::span<std::byte>> registered_buffers;
};

// The files of one directory, for one core.
//
// Two kinds of calls. Read, Write and Flush never wait: they are taken in and their ends fetched
// with Poll; they do not allocate. All others are for start-up and rare occasions: they may wait
// for the disk, and they allocate.
//
// What survives a crash of the machine:
// 1. Bytes: those of every write whose completion was there before a Flush of the same file was
//    asked for, once that Flush has completed without error. Of other writes any, all or none, also
//    in parts, and in any order.
// 2. After a Flush that failed, the writes that it should have covered count as lost, even when a
//    later Flush succeeds: the operating system may have dropped them (Rebello et al., "Can
//    applications recover from fsync failures?", USENIX ATC 2020). Write them again.
// 3. Names: a file made, renamed or removed is so for good once SyncDirectory has succeeded. Flush
//    of a file says nothing about its name.
//
// Thread safety: made anywhere, then used by one thread only.
class Disk {
 public:
  virtual ~Disk() = default;

  // Makes this process the directory's only user until the Disk ends or the process dies. Errors:
  // kAlreadyExists naming the directory, the holder's process and the remedy.
  virtual Result<void> LockDirectory() = 0;
  // Everything in it but "." and "..", by name.
  virtual Result<std::vector<DirectoryEntry>> List() = 0;
  // Names have no slash. Errors name the file.
  virtual Result<DiskFile> Open(const std::string& name, OpenMode mode, Caching caching) = 0;
  // Nothing of it is under way any more.
  virtual void Close(FileId file) = 0;
  // Takes the place of what is called `to`, if anything is, in one step.
  virtual Result<void> Rename(const std::string& from, const std::string& to) = 0;
  virtual Result<void> Remove(const std::string& name) = 0;
  virtual Result<void> SyncDirectory() = 0;
  // Bytes that new files may take on this file system; UINT64_MAX: it does not say.
  virtual uint64_t FreeBytes() const { return UINT64_MAX; }

  // False when max_in_flight are under way; nothing happens then. The memory stays the disk's until
  // the completion is fetched. Operations under way are in no order, also on the same bytes.
  [[nodiscard]] virtual bool Read(FileId file, uint64_t offset, std::span<std::byte> to,
                                  uint64_t tag) = 0;
  [[nodiscard]] virtual bool Write(FileId file, uint64_t offset, std::span<const std::byte> from,
                                   uint64_t tag) = 0;
  [[nodiscard]] virtual bool Flush(FileId file, uint64_t tag) = 0;

  // Hands what was taken in to the operating system and fetches ends, at most out.size(). Returns
  // how many.
  virtual size_t Poll(std::span<DiskCompletion> out) = 0;
  // Taken in, and completion not fetched.
  virtual uint32_t in_flight() const = 0;
  // Blocks until Poll would return something or `timeout_ns` has passed; not at all when nothing is
  // under way. The simulated disk steps its clock instead.
  virtual void Wait(int64_t timeout_ns) = 0;

  // As it was given, for messages.
  virtual const std::string& directory() const = 0;
  // "io_uring", "posix", "simulated".
  virtual std::string_view backend() const = 0;
};

enum class DiskBackend : uint8_t { kAuto, kUring, kPosix };

// The files of `directory`, which is made (mode 0700) where only its last part is missing. kAuto:
// io_uring where it works, else POSIX. `note` (may be nullptr) then says why, and what else the
// machine withholds, for the start-up log; empty when there is nothing to say.
Result<std::unique_ptr<Disk>> CreateDisk(DiskBackend backend, const std::string& directory,
                                         const DiskOptions& options, std::string* note);
// Errors: kUnavailable or kPermissionDenied, naming what the kernel refuses.
Result<std::unique_ptr<Disk>> CreateUringDisk(const std::string& directory,
                                              const DiskOptions& options, std::string* note);
// pread and pwrite inside Poll, for places where io_uring is forbidden. Poll waits for the disk.
Result<std::unique_ptr<Disk>> CreatePosixDisk(const std::string& directory,
                                              const DiskOptions& options);

// Whole small files, for cold boundaries; they wait. `disk` has nothing under way.
//
// Errors: kNotFound, kCorrupt when it is over `max_bytes`, kInternal; all name the file.
Result<std::vector<std::byte>> ReadWholeFile(Disk& disk, const std::string& name, size_t max_bytes);
// After a crash at any moment the file is the old one or the new one, whole.
Result<void> ReplaceFile(Disk& disk, const std::string& name, std::span<const std::byte> content);
// What ReplaceFile writes first; a crash may leave it behind.
inline constexpr std::string_view kTemporarySuffix = ".new";

}  // namespace engram
