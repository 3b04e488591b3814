#include "src/core/posix_directory.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/stat.h>
#include <pwd.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <memory>
#include <optional>
#include <string_view>

#include "src/core/check.h"

namespace engram {

namespace {

constexpr const char* kLockName = "LOCK";
// For kernels that do not tell (STATX_DIOALIGN came with Linux 6.1): enough for any common disk.
constexpr uint32_t kFallbackAlignment = 4096;

std::string ParentOf(const std::string& path) {
  const size_t end = path.find_last_not_of('/');
  if (end == std::string::npos) return "/";
  const size_t slash = path.find_last_of('/', end);
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

UniqueFd OpenDirectoryFd(const std::string& path) {
  return UniqueFd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
}

// "daemon", or the number where it has no name.
std::string UserName(uid_t user) {
  std::array<char, 4096> memory;
  passwd entry{};
  passwd* found = nullptr;
  (void)getpwuid_r(user, &entry, memory.data(), memory.size(), &found);
  return found != nullptr ? found->pw_name : std::to_string(user);
}

// `directory_fd`: of `directory`, or -1. Whose it is explains a want of permission.
std::unexpected<Error> FailAccess(const std::string& what, int error, const std::string& directory,
                                  int directory_fd) {
  if (error != EACCES && error != EPERM) {
    return FailErrno(what + ": mend this, or choose another one", error);
  }
  const std::string user = UserName(geteuid());
  struct stat status{};
  std::string owner;
  if (directory_fd >= 0 && fstat(directory_fd, &status) == 0 && status.st_uid != geteuid()) {
    owner = ", and the directory is user " + UserName(status.st_uid) + "'s";
  }
  return FailErrno(what + ": this process runs as user " + user + owner +
                       "; start it as the directory's owner, let this user read and write " +
                       directory + " (chown -R " + user + "), or choose another one",
                   error);
}

// 0, or why not.
int TryLock(int fd) { return flock(fd, LOCK_EX | LOCK_NB) == 0 ? 0 : errno; }

// The directory's own name must survive a crash like what will be written into it.
Result<void> MakeDirectory(const std::string& path) {
  if (mkdir(path.c_str(), 0700) != 0) {
    const int error = errno;
    if (error == EEXIST) return {};
    return FailErrno("make directory " + path + ": make the directory above it and let user " +
                         UserName(geteuid()) + " write there, or choose another one",
                     error);
  }
  const std::string parent = ParentOf(path);
  const UniqueFd fd = OpenDirectoryFd(parent);
  if (!fd) return FailErrno("open directory " + parent, errno);
  if (fsync(fd.get()) != 0) return FailErrno("flush directory " + parent, errno);
  return {};
}

std::optional<int64_t> ReadPid(int fd) {
  std::array<char, 32> text{};
  const ssize_t bytes = pread(fd, text.data(), text.size(), 0);
  if (bytes <= 0) return std::nullopt;
  int64_t pid = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + bytes, pid);
  if (error != std::errc{} || pid <= 0) return std::nullopt;
  return pid;
}

uint32_t DirectAlignment(int fd) {
  // The C library's struct statx is older than the field.
  struct statx info{};
  if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 &&
      (info.stx_mask & STATX_DIOALIGN) != 0) {
    return std::max(info.stx_dio_mem_align, info.stx_dio_offset_align);  // 0: no direct I/O
  }
  return kFallbackAlignment;
}

struct DirectoryStreamCloser {
  void operator()(DIR* stream) const { closedir(stream); }
};

int OpenFlags(OpenMode mode) {
  switch (mode) {
    case OpenMode::kRead:
      return O_RDONLY;
    case OpenMode::kReadWrite:
      return O_RDWR;
    case OpenMode::kCreate:
      return O_RDWR | O_CREAT;
  }
  return O_RDONLY;
}

}  // namespace

Result<void> CheckFileName(const std::string& name) {
  if (name.empty() || name == "." || name == ".." ||
      name.find_first_of(std::string_view("/\0", 2)) != std::string::npos) {
    return Fail(ErrorCode::kInvalidArgument, "\"" + name + "\" cannot be the name of a file");
  }
  return {};
}

Result<PosixDirectory> PosixDirectory::Open(const std::string& path) {
  if (path.empty()) return Fail(ErrorCode::kInvalidArgument, "the directory's name is empty");
  if (const auto made = MakeDirectory(path); !made) return std::unexpected(made.error());
  UniqueFd fd = OpenDirectoryFd(path);
  if (!fd) {
    const int error = errno;
    const UniqueFd seen(open(path.c_str(), O_PATH | O_CLOEXEC));
    return FailAccess("open directory " + path, error, path, seen.get());
  }
  return PosixDirectory(path, std::move(fd));
}

// The locks are the kernel's (flock), so they end with their holder however that ends. The one on
// the directory itself holds even where the file has been removed; the one on the file also where a
// directory cannot be locked. The pid in the file is for the message only; the file itself stays.
Result<void> PosixDirectory::Lock() {
  if (lock_) return {};
  UniqueFd fd(openat(fd_.get(), kLockName, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) return FailAccess("open " + PathOf(kLockName), errno, path_, fd_.get());
  int error = TryLock(fd_.get());
  // NFS has no exclusive lock on what cannot be opened for writing.
  if (error == 0 || error == EBADF) error = TryLock(fd.get());
  if (error != 0) {
    if (error != EWOULDBLOCK) return FailErrno("lock " + PathOf(kLockName), error);
    const std::optional<int64_t> pid = ReadPid(fd.get());
    return Fail(ErrorCode::kAlreadyExists,
                "directory " + path_ + " is in use by " +
                    (pid ? "process " + std::to_string(*pid) : std::string("another process")) +
                    ": stop that process, or choose another directory");
  }
  const std::string pid = std::to_string(getpid()) + "\n";
  if (ftruncate(fd.get(), 0) != 0 ||
      pwrite(fd.get(), pid.data(), pid.size(), 0) != static_cast<ssize_t>(pid.size())) {
    return FailErrno("write " + PathOf(kLockName), errno);
  }
  lock_ = std::move(fd);
  return {};
}

Result<std::vector<DirectoryEntry>> PosixDirectory::List() const {
  // Its own descriptor: a directory stream moves the offset of the one it is given.
  UniqueFd fd(openat(fd_.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) return FailErrno("list " + path_, errno);
  const std::unique_ptr<DIR, DirectoryStreamCloser> stream(fdopendir(fd.get()));
  if (stream == nullptr) return FailErrno("list " + path_, errno);
  (void)fd.Release();  // The stream's now.
  std::vector<DirectoryEntry> entries;
  while (true) {
    errno = 0;
    const dirent* entry = readdir(stream.get());
    if (entry == nullptr) {
      if (errno != 0) return FailErrno("list " + path_, errno);
      break;
    }
    const std::string_view name = entry->d_name;
    if (name == "." || name == "..") continue;
    struct stat status{};
    if (fstatat(fd_.get(), entry->d_name, &status, AT_SYMLINK_NOFOLLOW) != 0) {
      if (errno == ENOENT) continue;  // Removed meanwhile.
      return FailErrno("look at " + PathOf(entry->d_name), errno);
    }
    entries.push_back({std::string(name), static_cast<uint64_t>(status.st_size)});
  }
  std::ranges::sort(entries, {}, &DirectoryEntry::name);
  return entries;
}

Result<PosixFile> PosixDirectory::OpenFile(const std::string& name, OpenMode mode,
                                           Caching caching) const {
  if (const auto valid = CheckFileName(name); !valid) return std::unexpected(valid.error());
  const int flags = OpenFlags(mode) | O_CLOEXEC | O_NOFOLLOW;
  PosixFile file;
  file.writable = mode != OpenMode::kRead;
  if (caching == Caching::kDirect) {
    file.fd = UniqueFd(openat(fd_.get(), name.c_str(), flags | O_DIRECT, 0600));
    // EINVAL: the file system has no O_DIRECT.
    if (!file.fd && errno != EINVAL) return FailErrno("open " + PathOf(name), errno);
    if (file.fd) {
      const uint32_t alignment = DirectAlignment(file.fd.get());
      file.direct = alignment > 0;
      if (file.direct) file.alignment = alignment;
    }
  }
  if (!file.direct) {
    file.fd = UniqueFd(openat(fd_.get(), name.c_str(), flags, 0600));
    if (!file.fd) return FailErrno("open " + PathOf(name), errno);
  }
  struct stat status{};
  if (fstat(file.fd.get(), &status) != 0) return FailErrno("look at " + PathOf(name), errno);
  if (!S_ISREG(status.st_mode)) {
    return Fail(ErrorCode::kInvalidArgument, PathOf(name) + " is not a regular file");
  }
  file.size_bytes = static_cast<uint64_t>(status.st_size);
  return file;
}

Result<void> PosixDirectory::Rename(const std::string& from, const std::string& to) const {
  for (const std::string& name : {from, to}) {
    if (const auto valid = CheckFileName(name); !valid) return valid;
  }
  if (renameat(fd_.get(), from.c_str(), fd_.get(), to.c_str()) != 0) {
    return FailErrno("rename " + PathOf(from) + " to " + to, errno);
  }
  return {};
}

Result<void> PosixDirectory::Remove(const std::string& name) const {
  if (const auto valid = CheckFileName(name); !valid) return valid;
  if (unlinkat(fd_.get(), name.c_str(), 0) != 0) return FailErrno("remove " + PathOf(name), errno);
  return {};
}

Result<void> PosixDirectory::Sync() const {
  if (fsync(fd_.get()) != 0) return FailErrno("flush directory " + path_, errno);
  return {};
}

uint64_t PosixDirectory::FreeBytes() const {
  struct statvfs status;
  if (fstatvfs(fd_.get(), &status) != 0) return UINT64_MAX;
  return uint64_t{status.f_bavail} * status.f_frsize;
}

}  // namespace engram
