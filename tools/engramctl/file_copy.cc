#include "tools/engramctl/file_copy.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <span>
#include <utility>
#include <vector>

#include "src/core/crc32c.h"
#include "src/core/unique_fd.h"

namespace engram {

namespace {

constexpr size_t kPieceBytes = size_t{1} << 20;

// As much as there is, at most `room`.
Result<size_t> ReadSome(int fd, const std::string& path, uint64_t offset,
                        std::span<std::byte> room) {
  size_t count = 0;
  while (count < room.size()) {
    const ssize_t read =
        pread(fd, room.data() + count, room.size() - count, static_cast<off_t>(offset + count));
    if (read < 0 && errno == EINTR) continue;
    if (read < 0) return FailErrno("read " + path, errno);
    if (read == 0) break;
    count += static_cast<size_t>(read);
  }
  return count;
}

Result<void> WriteAll(int fd, const std::string& path, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = write(fd, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return FailErrno("write " + path, errno);
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
  return {};
}

// `to` is -1 where nothing is written.
Result<CopiedFile> CopyPieces(int from, const std::string& from_path, int to,
                              const std::string& to_path, const CopyRange& range,
                              const std::function<Result<void>()>& between) {
  struct stat status{};
  if (fstat(from, &status) != 0) return FailErrno("look at " + from_path, errno);
  CopiedFile copied{.bytes = 0, .crc = 0, .inode = status.st_ino};
  std::vector<std::byte> piece(kPieceBytes);
  for (;;) {
    auto count = ReadSome(from, from_path, copied.bytes, piece);
    if (!count) return std::unexpected(count.error());
    if (*count == 0) return copied;
    const uint64_t kept = range.kept_bytes > copied.bytes ? range.kept_bytes - copied.bytes : 0;
    if (kept < *count) {
      std::fill(piece.begin() + static_cast<ptrdiff_t>(kept),
                piece.begin() + static_cast<ptrdiff_t>(*count), std::byte{0});
    }
    const auto bytes = std::span(piece).first(*count);
    copied.crc = Crc32c(bytes, copied.crc);
    copied.bytes += *count;
    if (to >= 0) {
      if (auto written = WriteAll(to, to_path, bytes); !written) {
        return std::unexpected(written.error());
      }
    }
    if (between) {
      if (auto go_on = between(); !go_on) return std::unexpected(go_on.error());
    }
  }
}

}  // namespace

Result<CopiedFile> CopyFile(const std::string& from, const std::string& to, const CopyRange& range,
                            const std::function<Result<void>()>& between) {
  const UniqueFd source(open(from.c_str(), O_RDONLY | O_CLOEXEC));
  if (!source) return FailErrno("open " + from, errno);
  const UniqueFd target(open(to.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!target) {
    Error error = FailErrno("make " + to, errno).error();
    if (error.code == ErrorCode::kNotFound) error.code = ErrorCode::kUnavailable;
    return std::unexpected(std::move(error));
  }
  auto copied = CopyPieces(source.get(), from, target.get(), to, range, between);
  if (copied && fsync(target.get()) != 0) return FailErrno("flush " + to, errno);
  return copied;
}

Result<CopiedFile> ChecksumFile(const std::string& path) {
  const UniqueFd source(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!source) return FailErrno("open " + path, errno);
  return CopyPieces(source.get(), path, -1, "", {}, {});
}

Result<void> SyncFolder(const std::string& path) {
  const UniqueFd folder(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder) return FailErrno("open directory " + path, errno);
  if (fsync(folder.get()) != 0) return FailErrno("flush directory " + path, errno);
  return {};
}

Result<void> WriteTextFile(const std::string& path, const std::string& text) {
  const std::string beside = path + ".new";
  {
    const UniqueFd file(open(beside.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    if (!file) return FailErrno("make " + beside, errno);
    const std::span<const char> bytes(text);
    if (auto written = WriteAll(file.get(), beside, std::as_bytes(bytes)); !written) return written;
    if (fsync(file.get()) != 0) return FailErrno("flush " + beside, errno);
  }
  if (rename(beside.c_str(), path.c_str()) != 0) return FailErrno("rename " + beside, errno);
  return {};
}

}  // namespace engram
