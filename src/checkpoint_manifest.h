#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/disk.h"
#include "src/core/log_address.h"
#include "src/core/result.h"

namespace engram {

// The latest checkpoint: one file of the data directory, CHECKPOINT, that replaces the one before
// in one step. Its grammar, in lines of text:
//
//   engram checkpoint
//   version 2
//   round DECIMAL
//   shards DECIMAL                 that there were; each has a file and a log
//   log NUMBER from HEXADECIMAL epoch DECIMAL file_bytes DECIMAL      for each, in this order
//   kept NUMBER from HEXADECIMAL   a log of a shard that is gone: what lies before is not replayed,
//                                  but observations may lie in it
//   crc32c 8 HEXADECIMAL DIGITS    of all bytes before this line
struct CheckpointManifest {
  struct Log {
    LogPosition from = 0;  // the log is replayed from there
    uint32_t epoch = 0;    // of the log there
    uint64_t file_bytes = 0;
    friend bool operator==(const Log&, const Log&) = default;
  };
  struct Kept {
    uint16_t log = 0;
    LogPosition from = 0;
    friend bool operator==(const Kept&, const Kept&) = default;
  };
  uint32_t round = 0;
  std::vector<Log> logs;   // by shard
  std::vector<Kept> kept;  // by log, none of a shard that there was
  friend bool operator==(const CheckpointManifest&, const CheckpointManifest&) = default;
};

inline constexpr const char* kCheckpointManifestName = "CHECKPOINT";

std::string PrintManifest(const CheckpointManifest& manifest);
// Nothing where the text is not whole, or of another version.
std::optional<CheckpointManifest> ParseManifest(std::string_view text);

// Nothing where there is no checkpoint. Errors: kCorrupt, and kUnavailable for another version,
// naming the file and the remedy.
Result<std::optional<CheckpointManifest>> ReadManifest(Disk& disk);
Result<void> WriteManifest(Disk& disk, const CheckpointManifest& manifest);

}  // namespace engram
