#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "index/log/log_format.h"
#include "index/log/segment_window.h"
#include "src/core/disk.h"
#include "src/core/log_record.h"
#include "src/core/result.h"

namespace engram {

enum class LogStep : uint8_t {
  kRecord,
  kPending,  // the disk is reading, or there is much to look through: call again
  kEnd,
};

// A record as it was read. Its views are valid until the next call of the reader.
struct LogEntry {
  LogRecord record;
  LogAddress address = kNoLogAddress;
  uint32_t record_bytes = 0;
  LogPosition block_begin = 0;
  LogPosition block_end = 0;
  uint32_t epoch = 0;
};

// A bit that was turned and is turned back in what is read; the file itself stays as it is.
struct MendedBit {
  std::string file;
  uint64_t bit = 0;  // of the file, lowest bit of each byte first
  friend bool operator==(const MendedBit&, const MendedBit&) = default;
};

// A place that is damaged, and where reading could go on with another reader; 0: nowhere.
struct LogDamage {
  std::string file;
  uint64_t offset = 0;
  LogPosition resume = 0;
};

// Reads a log from a position to its end, by FORMAT.md, "Where a log ends":
//
// 1. Open looks at the folder and at the header of each segment from there on.
// 2. Next goes from block to block; where a segment ends, or where no live block lies, to the next
//    segment's first one, if that names this place as the end of the one before.
// 3. Where there is neither, a single turned bit is looked for and mended, in the block that should
//    be here, then in the one that should begin the next segment.
// 4. Otherwise everything behind is searched for blocks of this log. One that says that more was
//    durable, or that lies behind a segment that is missing, makes it an error; else the log ends.
//
// A segment whose header was not completely written, or which is shorter than its header says, was
// being prepared when the machine stopped: it counts as missing, which is an error only where a
// live block lies in it or behind it.
//
// Whoever goes on writing makes a block of the new epoch durable at end(), a marker will do, before
// it writes or promises anything else: until then sectors of a write that was cut off may be
// completed by those that are written now (zeros, say), and come back as a block.
//
// Errors: kCorrupt, naming file, offset and remedy; kUnavailable for a later version of the format;
// those of the disk. After one the reader gives only that.
//
// Thread safety: one thread. While it is in use the disk's completions are the reader's. Takes
// memory in Open only (up to 32 MiB, less where segments are small), and for what it reports.
class LogReader {
 public:
  // `disk` is over the log's folder, with nothing under way, and outlives the reader. Room for two
  // open files.
  LogReader(Disk* disk, uint16_t log, const LogInstance& instance);
  LogReader(const LogReader&) = delete;
  LogReader& operator=(const LogReader&) = delete;
  ~LogReader();

  // Segments with other numbers are as if they were not there.
  struct Range {
    uint32_t first = 0;
    uint32_t last = UINT32_MAX;
  };
  // Once. `from` is 0, for the oldest segment, or where a block begins, or where the log once ended
  // (end()): blocks cannot be found from elsewhere. `epoch` is last_epoch() as it was there: what
  // an earlier epoch left behind is then not taken for live. May wait for the disk.
  Result<void> Open(LogPosition from, uint32_t epoch = 0) { return Open(from, epoch, Range()); }
  Result<void> Open(LogPosition from, uint32_t epoch, const Range& range);

  // Never waits, but for opening a segment's file. Polls the disk itself; on kPending the caller
  // may wait for it.
  Result<LogStep> Next(LogEntry* entry);

  // After kEnd ---------------------------------------------------------------------------------

  // Where the next block belongs if it fits in the rest of that segment; else it begins the next
  // segment, with this as its `previous`. 0: there is no segment yet. While reading: behind the
  // block that the last record came from.
  LogPosition end() const { return position_; }
  // Of the last live block; 0 where there was none and Open was given none.
  uint32_t last_epoch() const { return last_epoch_; }
  // The highest one that any block names, live or left behind: the next start's must be above it.
  uint32_t highest_epoch() const { return highest_epoch_; }
  // As the live blocks say.
  LogPosition durable() const { return durable_; }

  // At any time --------------------------------------------------------------------------------

  const std::vector<MendedBit>& mended() const { return mended_; }
  // Gone through, and what there is, behind the end included.
  uint64_t bytes_read() const;
  uint64_t total_bytes() const { return total_bytes_; }

  struct Segment {
    uint32_t number = 0;
    uint32_t bytes = 0;  // that may hold something
    bool recycled = false;
    std::string trouble;      // why it counts as missing; empty: it does not
    bool renumbered = false;  // its header is one of another number
    // Behind its last live block, where the reader has left it.
    uint32_t live_bytes = 0;
  };
  // Those that were there at Open, from `from` on.
  const std::vector<Segment>& segments() const { return segments_; }
  uint64_t blocks() const { return blocks_; }

  // After an error that what lies behind it proves.
  const std::optional<LogDamage>& damage() const { return damage_; }

 private:
  enum class Phase : uint8_t {
    kClosed,
    kWalk,
    kNextSegment,
    kMend,
    kMendNextSegment,
    kSearch,
    kEnd,
  };
  // A place where a block may lie, looked at.
  struct Candidate {
    size_t segment = 0;
    uint32_t offset = 0;
    BlockHeader header;
    BlockCheck check;
    std::span<std::byte> bytes;
    bool zero = false;  // nothing but zeros on its first page
    bool live = false;
  };
  static constexpr uint32_t kPagesPerStep = 1024;

  std::string FileOf(uint32_t number) const;
  Result<void> ListSegments(LogPosition from, const Range& range);
  Result<void> AddSegment(uint32_t number, uint64_t file_bytes);
  Result<void> ParseHead(std::span<std::byte> page, Segment* segment);
  Result<void> BeginAt(LogPosition from);

  // These return false while the disk is reading.
  Result<bool> Step();
  Result<bool> Walk();
  Result<bool> TryNextSegment();
  Result<bool> Mend();
  Result<bool> MendNextSegment();
  Result<bool> Search();
  Result<bool> SearchPage(std::span<const std::byte> page);
  Result<bool> Examine(size_t segment, uint32_t offset, Candidate* candidate);
  Result<bool> MendAt(size_t segment, uint32_t offset, Candidate* candidate);
  Result<bool> Look(size_t segment, uint32_t offset, uint32_t bytes, std::span<std::byte>* found);
  Result<bool> OpenWindow(size_t segment, uint32_t offset);

  bool HasNextSegment() const;
  bool IsLive(const Candidate& candidate) const;
  void Accept(const Candidate& candidate);
  void TakeRecord(LogEntry* entry);
  void Drive();
  void ReadAhead();
  std::unexpected<Error> Damaged(LogPosition found);

  // Constant after Open.
  Disk* const disk_;
  const uint16_t log_;
  const LogInstance instance_;
  std::vector<Segment> segments_;
  uint64_t total_bytes_ = 0;

  std::array<SegmentWindow, 2> windows_;  // segment i in the one of i % 2
  struct Opened {
    size_t segment = SIZE_MAX;
    std::optional<FileId> file;
  };
  std::array<Opened, 2> opened_;

  Phase phase_ = Phase::kClosed;
  std::optional<Error> error_;
  size_t segment_ = 0;        // where position_ lies
  LogPosition position_ = 0;  // behind the last live block
  uint32_t last_epoch_ = 0;
  uint32_t highest_epoch_ = 0;
  LogPosition durable_ = 0;
  uint64_t blocks_ = 0;
  std::vector<MendedBit> mended_;

  // The block whose records are handed out.
  std::span<const std::byte> block_;
  BlockHeader block_header_;
  uint32_t record_at_ = 0;
  uint32_t records_left_ = 0;

  // What was found instead of the next block, for the message.
  Candidate fault_;
  // The search behind it.
  size_t search_segment_ = 0;
  uint32_t search_offset_ = 0;
  std::optional<uint32_t> missing_;  // the first segment that is not there
  LogPosition first_found_ = 0;      // the first live header behind
  std::optional<LogDamage> damage_;
};

// The header of the first segment in a folder that has a sound one, or one with a single turned
// bit; nothing where there is none. Waits for the disk, which has nothing under way.
Result<std::optional<SegmentHeader>> FindSegmentHeader(Disk& disk);

}  // namespace engram
