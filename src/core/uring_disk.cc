#include <liburing.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <memory>
#include <utility>
#include <vector>

#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/disk.h"
#include "src/core/file_table.h"
#include "src/core/posix_directory.h"

namespace engram {

namespace {

enum class Kind : uint8_t { kRead, kWrite, kFlush };

// One operation under way; its place in the table is the kernel's user_data.
struct Operation {
  Kind kind = Kind::kRead;
  FileId file;
  int fd = -1;
  int registered_buffer = -1;  // index, or -1
  uint32_t alignment = 1;
  uint64_t offset = 0;
  std::byte* memory = nullptr;
  size_t bytes = 0;
  size_t done = 0;  // of `bytes`, over however many partial transfers
  uint64_t tag = 0;
};

// One submission carries at most this; the kernel's length is 32 bits, and its own limit is less.
constexpr size_t kMaxTransferBytes = size_t{1} << 30;
constexpr size_t kCompletionBatch = 64;
// The submission ring has a place for each operation under way; the kernel's limit is 32,768.
constexpr uint32_t kMaxInFlight = 16'384;
// One thread submits, and completions are worked off only when that thread asks for them; a flag
// in the shared ring says when there is something to ask for, so an idle Poll is no system call.
constexpr unsigned kSetupFlags =
    IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG;

// Operations go to the kernel in Poll, all in one system call.
//
// Thread safety: one thread. The kernel accepts only the thread of the first Poll, since then.
// Invariants: an operation is free, or holds exactly one submission or completion entry; so neither
// ring can overflow.
class UringDisk final : public Disk {
 public:
  UringDisk(PosixDirectory directory, const DiskOptions& options)
      : directory_(std::move(directory)),
        operations_(options.max_in_flight),
        files_(options.max_open_files) {
    free_.reserve(options.max_in_flight);
    for (uint32_t i = options.max_in_flight; i > 0; --i) free_.push_back(i - 1);
  }
  UringDisk(const UringDisk&) = delete;
  UringDisk& operator=(const UringDisk&) = delete;
  ~UringDisk() override;

  // Once, right after construction.
  Result<void> SetUp(const DiskOptions& options, std::string* note);

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
    return Begin(Kind::kRead, file, offset, to.data(), to.size(), tag);
  }
  bool Write(FileId file, uint64_t offset, std::span<const std::byte> from, uint64_t tag) override {
    // Kept as mutable for reads' sake; a write only reads it.
    return Begin(Kind::kWrite, file, offset, const_cast<std::byte*>(from.data()), from.size(), tag);
  }
  bool Flush(FileId file, uint64_t tag) override {
    return Begin(Kind::kFlush, file, 0, nullptr, 0, tag);
  }
  size_t Poll(std::span<DiskCompletion> out) override;
  uint32_t in_flight() const override {
    return static_cast<uint32_t>(operations_.size() - free_.size());
  }
  void Wait(int64_t timeout_ns) override;
  const std::string& directory() const override { return directory_.path(); }
  std::string_view backend() const override { return "io_uring"; }

 private:
  bool Begin(Kind kind, FileId file, uint64_t offset, std::byte* memory, size_t bytes,
             uint64_t tag);
  int RegisteredBufferOf(const std::byte* memory, size_t bytes) const;
  void Enqueue(uint32_t index);
  void EnableOnce();
  void Submit();
  // True when the operation has ended; false when the rest of it was enqueued again.
  bool Advance(uint32_t index, int result, DiskCompletion* end);

  // Constant after SetUp, but for the lock.
  PosixDirectory directory_;
  io_uring ring_{};
  bool ring_made_ = false;
  std::vector<std::span<std::byte>> registered_buffers_;
  // Owner only.
  bool enabled_ = false;
  std::vector<Operation> operations_;
  std::vector<uint32_t> free_;
  FileTable<PosixFile> files_;
};

std::unexpected<Error> Refused(const std::string& what, int error) {
  auto failure = FailErrno(what, error);
  if (failure.error().code != ErrorCode::kPermissionDenied) {
    failure.error().code = ErrorCode::kUnavailable;
  }
  return failure;
}

// The kernel goes on writing into buffers of operations under way, so they are waited for.
UringDisk::~UringDisk() {
  if (!ring_made_) return;
  std::array<DiskCompletion, kCompletionBatch> ends;
  while (in_flight() > 0) {
    if (Poll(ends) == 0) Wait(kNanosPerSecond);
  }
  io_uring_queue_exit(&ring_);
}

Result<void> UringDisk::SetUp(const DiskOptions& options, std::string* note) {
  // Disabled at first: the thread that enables the ring becomes its one submitter.
  int result =
      io_uring_queue_init(options.max_in_flight, &ring_, kSetupFlags | IORING_SETUP_R_DISABLED);
  if (result == -EINVAL) {  // A kernel before 6.1.
    result = io_uring_queue_init(options.max_in_flight, &ring_, IORING_SETUP_R_DISABLED);
  }
  if (result < 0) {
    return Refused(
        "io_uring_setup: allow it in the container's seccomp profile, set "
        "kernel.io_uring_disabled to 0 and, on kernels before 5.12, raise ulimit -l",
        -result);
  }
  ring_made_ = true;
  if (options.registered_buffers.empty()) return {};
  std::vector<iovec> regions;
  for (const std::span<std::byte> region : options.registered_buffers) {
    regions.push_back({region.data(), region.size()});
  }
  result = io_uring_register_buffers(&ring_, regions.data(), static_cast<unsigned>(regions.size()));
  if (result == 0) {
    registered_buffers_ = options.registered_buffers;
  } else if (note != nullptr) {
    *note = FailErrno(
                "io_uring: disk buffers are not registered, which costs some speed; raise "
                "ulimit -l (LimitMEMLOCK)",
                -result)
                .error()
                .message;
  }
  return {};
}

Result<DiskFile> UringDisk::Open(const std::string& name, OpenMode mode, Caching caching) {
  if (files_.full()) {
    return Fail(ErrorCode::kResourceExhausted, "open " + name + ": max_open_files are open");
  }
  Result<PosixFile> file = directory_.OpenFile(name, mode, caching);
  if (!file) return std::unexpected(file.error());
  DiskFile opened;
  opened.size_bytes = file->size_bytes;
  opened.alignment = file->alignment;
  opened.direct = file->direct;
  opened.id = files_.Add(*std::move(file));
  return opened;
}

void UringDisk::Close(FileId file) {
  CHECK(files_.Get(file).in_flight == 0, "a file is closed when nothing of it is under way");
  files_.Take(file);
}

int UringDisk::RegisteredBufferOf(const std::byte* memory, size_t bytes) const {
  for (size_t i = 0; i < registered_buffers_.size(); ++i) {
    const std::span<std::byte> region = registered_buffers_[i];
    if (memory >= region.data() && bytes <= region.size() &&
        memory <= region.data() + (region.size() - bytes)) {
      return static_cast<int>(i);
    }
  }
  return -1;
}

bool UringDisk::Begin(Kind kind, FileId file_id, uint64_t offset, std::byte* memory, size_t bytes,
                      uint64_t tag) {
  PosixFile& file = files_.Get(file_id);
  CHECK(offset % file.alignment == 0 && bytes % file.alignment == 0 &&
            std::bit_cast<uintptr_t>(memory) % file.alignment == 0,
        "direct reads and writes are aligned");
  CHECK(kind != Kind::kWrite || file.writable, "the file was opened for reading");
  if (free_.empty()) return false;
  const uint32_t index = free_.back();
  free_.pop_back();
  operations_[index] = {.kind = kind,
                        .file = file_id,
                        .fd = file.fd.get(),
                        .registered_buffer = RegisteredBufferOf(memory, bytes),
                        .alignment = file.alignment,
                        .offset = offset,
                        .memory = memory,
                        .bytes = bytes,
                        .done = 0,
                        .tag = tag};
  ++file.in_flight;
  Enqueue(index);
  return true;
}

void UringDisk::Enqueue(uint32_t index) {
  const Operation& operation = operations_[index];
  io_uring_sqe* entry = io_uring_get_sqe(&ring_);
  CHECK(entry != nullptr, "the submission ring has a place for each operation");
  std::byte* memory = operation.memory + operation.done;
  const auto bytes =
      static_cast<unsigned>(std::min(operation.bytes - operation.done, kMaxTransferBytes));
  const uint64_t offset = operation.offset + operation.done;
  const int buffer = operation.registered_buffer;
  if (operation.kind == Kind::kFlush) {
    io_uring_prep_fsync(entry, operation.fd, IORING_FSYNC_DATASYNC);
  } else if (operation.kind == Kind::kRead && buffer >= 0) {
    io_uring_prep_read_fixed(entry, operation.fd, memory, bytes, offset, buffer);
  } else if (operation.kind == Kind::kRead) {
    io_uring_prep_read(entry, operation.fd, memory, bytes, offset);
  } else if (buffer >= 0) {
    io_uring_prep_write_fixed(entry, operation.fd, memory, bytes, offset, buffer);
  } else {
    io_uring_prep_write(entry, operation.fd, memory, bytes, offset);
  }
  io_uring_sqe_set_data64(entry, index);
}

void UringDisk::EnableOnce() {
  if (enabled_) return;
  // liburing 2.3 declares io_uring_enable_rings but its library lacks it.
  CHECK(
      syscall(SYS_io_uring_register, ring_.ring_fd, IORING_REGISTER_ENABLE_RINGS, nullptr, 0) == 0,
      "a ring that was made can be enabled");
  enabled_ = true;
}

void UringDisk::Submit() {
  if (io_uring_sq_ready(&ring_) == 0) return;
  const int result = io_uring_submit(&ring_);
  // What was not taken stays in the ring for the next Poll.
  CHECK(
      result >= 0 || result == -EINTR || result == -EAGAIN || result == -EBUSY || result == -ENOMEM,
      "a disk is used by one thread only");
}

bool UringDisk::Advance(uint32_t index, int result, DiskCompletion* end) {
  Operation& operation = operations_[index];
  if (result == -EINTR || result == -EAGAIN) {
    Enqueue(index);
    return false;
  }
  end->tag = operation.tag;
  end->error = result < 0 ? -result : 0;
  if (result > 0) operation.done += static_cast<size_t>(result);
  const bool is_partial = result > 0 && operation.done < operation.bytes;
  // A direct read that ends off the alignment has met the end of the file.
  if (is_partial && operation.done % operation.alignment == 0) {
    Enqueue(index);
    return false;
  }
  if (operation.kind == Kind::kWrite && result >= 0 && operation.done < operation.bytes) {
    end->error = EIO;  // A write that takes nothing would spin.
  }
  end->bytes = operation.done;
  --files_.Get(operation.file).in_flight;
  free_.push_back(index);
  return true;
}

// 1. Hand over what was taken in since the last Poll.
// 2. Fetch completions; what the kernel did in part goes into the ring again.
// 3. Hand that over.
size_t UringDisk::Poll(std::span<DiskCompletion> out) {
  EnableOnce();
  Submit();
  size_t count = 0;
  std::array<io_uring_cqe*, kCompletionBatch> entries;
  while (count < out.size()) {
    const auto wanted = static_cast<unsigned>(std::min(out.size() - count, entries.size()));
    const unsigned got = io_uring_peek_batch_cqe(&ring_, entries.data(), wanted);
    if (got == 0) break;
    for (unsigned i = 0; i < got; ++i) {
      const auto index = static_cast<uint32_t>(io_uring_cqe_get_data64(entries[i]));
      if (Advance(index, entries[i]->res, &out[count])) ++count;
    }
    io_uring_cq_advance(&ring_, got);
  }
  Submit();
  return count;
}

void UringDisk::Wait(int64_t timeout_ns) {
  if (in_flight() == 0) return;
  EnableOnce();
  __kernel_timespec timeout{.tv_sec = timeout_ns / kNanosPerSecond,
                            .tv_nsec = timeout_ns % kNanosPerSecond};
  io_uring_cqe* entry = nullptr;
  // An early return is no harm: the caller polls and waits again.
  (void)io_uring_submit_and_wait_timeout(&ring_, &entry, 1, &timeout, nullptr);
}

}  // namespace

Result<std::unique_ptr<Disk>> CreateUringDisk(const std::string& directory,
                                              const DiskOptions& options, std::string* note) {
  CHECK(options.max_in_flight > 0 && options.max_open_files > 0, "a disk needs room to work");
  if (note != nullptr) note->clear();
  if (options.max_in_flight > kMaxInFlight) {
    return Fail(ErrorCode::kInvalidArgument, "max_in_flight is " +
                                                 std::to_string(options.max_in_flight) +
                                                 ": at most " + std::to_string(kMaxInFlight));
  }
  Result<PosixDirectory> opened = PosixDirectory::Open(directory);
  if (!opened) return std::unexpected(opened.error());
  auto disk = std::make_unique<UringDisk>(*std::move(opened), options);
  if (const auto set_up = disk->SetUp(options, note); !set_up) {
    return std::unexpected(set_up.error());
  }
  return disk;
}

}  // namespace engram
