#include "src/core/data_directory.h"

#include <sys/random.h>

#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdio>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "src/core/clock.h"
#include "src/core/crc32c.h"

namespace engram {

namespace {

constexpr std::string_view kTitle = "engram data directory\n";
constexpr std::string_view kCrcKey = "crc32c ";
constexpr size_t kCrcLineBytes = kCrcKey.size() + 8 + 1;
constexpr size_t kMaxInstanceBytes = 4096;

std::span<const std::byte> BytesOf(std::string_view text) { return std::as_bytes(std::span(text)); }

std::string CrcLineOf(std::string_view text) {
  std::array<char, 16> digits{};
  std::snprintf(digits.data(), digits.size(), "%08x", Crc32c(BytesOf(text)));
  return std::string(kCrcKey) + digits.data() + "\n";
}

std::string Print(const InstanceInfo& instance) {
  std::string text(kTitle);
  text += "format_version " + std::to_string(instance.format_version) + "\n";
  text += "instance_id " + ToString(instance.id) + "\n";
  text += "created_ns " + std::to_string(instance.created_ns) + "\n";
  return text + CrcLineOf(text);
}

// What follows "`key` " in the line that `text` begins with; `text` is moved behind that line.
std::optional<std::string_view> TakeLine(std::string_view& text, std::string_view key) {
  const size_t end = text.find('\n');
  if (end == std::string_view::npos) return std::nullopt;
  const std::string_view line = text.substr(0, end);
  if (!line.starts_with(key) || line.size() <= key.size() || line[key.size()] != ' ') {
    return std::nullopt;
  }
  text.remove_prefix(end + 1);
  return line.substr(key.size() + 1);
}

template <typename Number>
bool ParseNumber(std::optional<std::string_view> text, Number* number) {
  if (!text) return false;
  const char* begin = text->data();
  const char* end = begin + text->size();
  const auto [stop, error] = std::from_chars(begin, end, *number);
  return error == std::errc{} && stop == end;
}

bool ParseId(std::optional<std::string_view> text, InstanceId* id) {
  if (!text || text->size() != 2 * id->size()) return false;
  for (size_t i = 0; i < id->size(); ++i) {
    const char* digits = text->data() + 2 * i;
    const auto [stop, error] = std::from_chars(digits, digits + 2, (*id)[i], 16);
    if (error != std::errc{} || stop != digits + 2) return false;
  }
  return true;
}

std::unexpected<Error> Damaged(const std::string& path, std::string_view what) {
  return Fail(ErrorCode::kCorrupt,
              path + " is damaged (" + std::string(what) +
                  "): restore it from a backup of this directory, or, if you need nothing that is "
                  "in the directory, move the directory away and start again");
}

Result<InstanceInfo> Parse(std::string_view text, const std::string& path) {
  const auto damaged = [&](std::string_view what) { return Damaged(path, what); };
  if (text.size() < kTitle.size() + kCrcLineBytes) return damaged("too short");
  const std::string_view body = text.substr(0, text.size() - kCrcLineBytes);
  if (text.substr(body.size()) != CrcLineOf(body)) return damaged("its checksum does not match");
  if (!body.starts_with(kTitle)) return damaged("its first line is not ours");
  std::string_view rest = body.substr(kTitle.size());
  InstanceInfo instance;
  if (!ParseNumber(TakeLine(rest, "format_version"), &instance.format_version)) {
    return damaged("no format_version");
  }
  if (instance.format_version > kDataFormatVersion) {
    return Fail(ErrorCode::kUnavailable,
                path + " has format version " + std::to_string(instance.format_version) +
                    ", this program knows versions up to " + std::to_string(kDataFormatVersion) +
                    ": start the newer program that wrote it, or choose another directory");
  }
  if (!ParseId(TakeLine(rest, "instance_id"), &instance.id)) return damaged("no instance_id");
  if (!ParseNumber(TakeLine(rest, "created_ns"), &instance.created_ns)) {
    return damaged("no created_ns");
  }
  return instance;
}

// A directory without INSTANCE is new only when there is nothing in it: otherwise it is somebody
// else's, or ours with the file lost, and both need a person.
Result<void> CheckIsNew(Disk& disk) {
  const auto entries = disk.List();
  if (!entries) return std::unexpected(entries.error());
  const std::string temporary = kInstanceFileName + std::string(kTemporarySuffix);
  for (const DirectoryEntry& entry : *entries) {
    if (entry.name == "LOCK" || entry.name == temporary || entry.name == "lost+found") continue;
    return Fail(ErrorCode::kInvalidArgument,
                "directory " + disk.directory() + " holds \"" + entry.name + "\" but no " +
                    kInstanceFileName +
                    ": choose an empty directory, or restore that file from a backup");
  }
  return {};
}

Result<InstanceInfo> ReadOrWriteInstance(Disk& disk, const InstanceInfo& fresh) {
  auto instance = ReadInstance(disk);
  if (instance) {
    if (instance->format_version < kDataFormatVersion) {
      // From now on programs that know the old version only must not touch it.
      instance->format_version = kDataFormatVersion;
      if (const auto written = ReplaceFile(disk, kInstanceFileName, BytesOf(Print(*instance)));
          !written) {
        return std::unexpected(written.error());
      }
    }
    // A process that died between rename and sync may have left a name that a power cut takes.
    if (const auto synced = disk.SyncDirectory(); !synced) return std::unexpected(synced.error());
    return instance;
  }
  if (instance.error().code != ErrorCode::kNotFound) return instance;
  if (const auto is_new = CheckIsNew(disk); !is_new) return std::unexpected(is_new.error());
  if (const auto written = ReplaceFile(disk, kInstanceFileName, BytesOf(Print(fresh))); !written) {
    return std::unexpected(written.error());
  }
  return fresh;
}

}  // namespace

std::string ToString(const InstanceId& id) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string text;
  for (const uint8_t byte : id) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

Result<InstanceInfo> ReadInstance(Disk& disk) {
  const std::string path = disk.directory() + "/" + kInstanceFileName;
  const auto content = ReadWholeFile(disk, kInstanceFileName, kMaxInstanceBytes);
  if (content) {
    return Parse({reinterpret_cast<const char*>(content->data()), content->size()}, path);
  }
  if (content.error().code == ErrorCode::kCorrupt) return Damaged(path, "too long");
  return std::unexpected(content.error());
}

Result<DataDirectory> OpenDataDirectory(std::unique_ptr<Disk> disk, int64_t now_ns,
                                        const InstanceId& fresh_id) {
  if (const auto locked = disk->LockDirectory(); !locked) return std::unexpected(locked.error());
  const auto instance = ReadOrWriteInstance(
      *disk, {.format_version = kDataFormatVersion, .id = fresh_id, .created_ns = now_ns});
  if (!instance) return std::unexpected(instance.error());
  return DataDirectory(std::move(disk), *instance);
}

Result<DataDirectory> OpenDataDirectory(const std::string& path) {
  // A handful of small operations at the start: io_uring would gain nothing.
  auto disk =
      CreatePosixDisk(path, {.max_in_flight = 1, .max_open_files = 1, .registered_buffers = {}});
  if (!disk) return std::unexpected(disk.error());
  InstanceId fresh_id;
  // Up to 256 bytes come whole.
  if (getrandom(fresh_id.data(), fresh_id.size(), 0) != static_cast<ssize_t>(fresh_id.size())) {
    return FailErrno("getrandom", errno);
  }
  return OpenDataDirectory(*std::move(disk), SystemClock().WallNs(), fresh_id);
}

}  // namespace engram
