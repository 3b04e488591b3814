#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "src/core/disk.h"
#include "src/core/result.h"

namespace engram {

// Tells one data directory from all others; drawn at random when it is made.
using InstanceId = std::array<uint8_t, 16>;
std::string ToString(const InstanceId& id);  // 32 hexadecimal digits

// What the file INSTANCE says. Its grammar, in every format version, in lines of text:
//
//   engram data directory
//   format_version DECIMAL
//   instance_id 32 HEXADECIMAL DIGITS
//   created_ns DECIMAL            nanoseconds since 1970
//   ...                           later versions may add lines here
//   crc32c 8 HEXADECIMAL DIGITS   of all bytes before this line
//
// A version is refused by programs that know only earlier ones, so it rises with every change that
// these would misread; later programs read all earlier versions.
struct InstanceInfo {
  uint32_t format_version = 0;
  InstanceId id{};
  int64_t created_ns = 0;
};
// 1: nothing but INSTANCE. 2: the logs of the shards, in folders log-NNN (index/log/FORMAT.md).
inline constexpr uint32_t kDataFormatVersion = 2;
inline constexpr const char* kInstanceFileName = "INSTANCE";

// What the file in `disk`'s directory says, whoever uses that. Errors: kNotFound where there is
// none, kCorrupt, kUnavailable (written by a newer version); those of the file system.
Result<InstanceInfo> ReadInstance(Disk& disk);

// A directory that is ours alone, for as long as this lives.
class DataDirectory {
 public:
  DataDirectory(std::unique_ptr<Disk> disk, const InstanceInfo& instance)
      : disk_(std::move(disk)), instance_(instance) {}

  const std::string& path() const { return disk_->directory(); }
  const InstanceInfo& instance() const { return instance_; }
  // For one thread at a time, with nothing under way between its calls.
  Disk& disk() { return *disk_; }

 private:
  std::unique_ptr<Disk> disk_;  // Holds the lock.
  InstanceInfo instance_;
};

// Makes the directory (mode 0700) where it is missing, locks it, and reads its INSTANCE file or, in
// an empty one, writes it. Errors name the path and the remedy: kAlreadyExists when another process
// holds it, kUnavailable when a newer version wrote it, kCorrupt when INSTANCE is damaged,
// kInvalidArgument when it holds other things, and those of the file system.
Result<DataDirectory> OpenDataDirectory(const std::string& path);

// The same over any disk. `now_ns` (since 1970) and `fresh_id` are for a directory that is new.
Result<DataDirectory> OpenDataDirectory(std::unique_ptr<Disk> disk, int64_t now_ns,
                                        const InstanceId& fresh_id);

}  // namespace engram
