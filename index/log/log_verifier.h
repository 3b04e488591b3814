#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "index/log/log_format.h"
#include "index/log/log_reader.h"
#include "src/core/commit_stamp.h"
#include "src/core/disk.h"
#include "src/core/result.h"

namespace engram {

// A place in a log's folder.
struct LogFinding {
  std::string file;
  uint64_t offset = 0;
  uint64_t bytes = 0;  // 0: not known
  std::string text;
};

// What a whole log holds and what is wrong with it.
struct LogReport {
  uint64_t segments = 0;
  uint64_t blocks = 0;
  uint64_t records = 0;
  uint64_t record_bytes = 0;
  std::array<uint64_t, static_cast<size_t>(LogRecordKind::kDropSpace) + 1> records_of_kind{};
  std::map<std::string, uint64_t> records_of_space;
  uint64_t sessions = 0;
  CommitStamp first_stamp = kNoStamp;  // the least and the greatest; kNoStamp: no records
  CommitStamp last_stamp = kNoStamp;
  uint32_t last_epoch = 0;
  LogPosition end = 0;

  // Acknowledged records, headers or zeros that are not what they were.
  std::vector<LogFinding> damages;
  // Single turned bits that a start mends, in what it reads; the files stay as they are.
  std::vector<MendedBit> mended;
  // No damage: what writes left behind that a crash cut off before they were acknowledged.
  std::vector<LogFinding> rests;
  // No damage: segments whose preparation a crash cut off. They hold nothing.
  std::vector<LogFinding> unfinished;

  bool sound() const { return damages.empty() && mended.empty(); }
};

// Reads the whole log in `disk`'s folder as a start would, and looks at what that leaves out:
//
// 1. Everything that LogReader checks, from the first segment that is there: those before it were
//    freed. Before the segment in which `replay_from` lies, the position from where a start replays
//    the log, any may have been freed: what is there is read as so many runs, each to its end.
//    Where there is damage, reading goes on at the next sound block.
// 2. In segments that were not recycled what lies behind the last block must be zero. What looks
//    like a write that was cut off is told apart from damage: it has the header of a block, or it
//    is more than a single bit in a disk's sector.
//
// Where a start `needs` the log, as a checkpoint that names its position does, the segment in which
// `replay_from` lies has to be there.
//
// Waits for the disk; for tools, not for a core. Nothing is written. Errors: those of the disk, and
// a segment of another log, directory or version.
Result<LogReport> VerifyLog(Disk& disk, uint16_t log, const LogInstance& instance,
                            LogPosition replay_from = 0, bool needs = false);

}  // namespace engram
