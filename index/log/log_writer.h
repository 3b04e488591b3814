#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "index/log/log_format.h"
#include "index/log/segment_handoff.h"
#include "src/core/disk.h"
#include "src/core/refusal_reason.h"

namespace engram {

// What was read of a log, [durable, end), is on stable storage when this returns; before `durable`
// (0: not known) it was so already. It may have come from the operating system's cache, also after
// a flush that failed, which later flushes do not make good (see Disk): so it is written again,
// with the bytes that are there. Waits for the disk. `disk` has nothing under way.
Result<void> MakeLogDurable(Disk* disk, LogPosition durable, LogPosition end);

struct LogWriterOptions {
  uint16_t log = 0;
  LogInstance instance{};
  // Of one block, a multiple of kLogPageBytes, at least kLeastBlockBytes.
  uint32_t block_bytes = 1u << 20;
  // Memory for what is filled or on its way to the disk, in whole blocks; at least 2.
  uint32_t blocks = 16;
  // Of these, how many may be written at a time.
  uint32_t max_writes = 2;
  // How long what nobody waits for may stay in memory.
  int64_t flush_interval_ns = 20 * kNanosPerMilli;
  // What is durable is said by a marker after so long without anything to write.
  int64_t marker_delay_ns = 2 * kNanosPerMilli;
  // After an error of the disk.
  int64_t retry_ns = 100 * kNanosPerMilli;
};

// Appends records to one log, in blocks, by group commit:
// 1. Append copies a record into the block that is being filled. Its address is settled then.
// 2. Poll seals the block as soon as fewer than max_writes are being written, so what arrives
//    during a write goes with the next one, and hands it to the disk.
// 3. A flush follows the write and covers all that was written when it was asked for; one is under
//    way at a time.
// 4. Blocks become durable in their order, and are free then.
// After an error the blocks that are not durable are written again, at the same places: nobody was
// told of them. Meanwhile the log takes what there is memory for, then refuses.
//
// Thread safety: the shard's alone, with its Disk; the handoff is shared with the SegmentKeeper.
// Takes no memory after Start and never waits, but for opening the next segment's file, in Poll,
// once a segment.
// Invariants: a block that is durable is never written again; durable() <= written() <= end().
class LogWriter {
 public:
  static constexpr uint32_t kLeastBlockBytes =
      (kBlockHeaderBytes + kMaxLogRecordBytes + kLogPageBytes - 1) / kLogPageBytes * kLogPageBytes;
  static size_t MemoryBytes(const LogWriterOptions& options) {
    return size_t{options.blocks} * options.block_bytes;
  }

  // `memory`: MemoryBytes(options), aligned to a page; registered with the disk for speed. All
  // outlive the writer.
  LogWriter(const LogWriterOptions& options, Disk* disk, SegmentHandoff* handoff,
            std::span<std::byte> memory);
  ~LogWriter();
  LogWriter(const LogWriter&) = delete;
  LogWriter& operator=(const LogWriter&) = delete;

  // Goes on at `end`, where reading ended (0: the log is empty), with an epoch that no block has
  // yet. What was read is durable (MakeLogDurable). Waits for the disk. Errors: those of opening
  // the segment and of writing its marker.
  Result<void> Start(LogPosition end, uint32_t epoch);

  // kNone, or why a record of `bytes` cannot be taken now. `frees`: it makes room (a delete), so it
  // may use what is kept for that when the disk is full.
  RefusalReason JudgeRoom(size_t bytes, bool frees) const;
  // Of records, that fit in memory beside what is on its way to the disk.
  size_t room_bytes() const;
  // There is room. `urgent`: somebody waits until it is durable. `follows`: of a record that comes
  // next and was judged together with this one: both go into one block.
  LogAddress Append(const LogRecord& record, bool urgent, size_t follows = 0);

  // One bounded round; returns how much was done. Never blocks.
  int Poll(int64_t now_ns);
  // No write or flush is under way and nothing waits for one.
  bool idle() const { return in_flight_ == 0 && first_ == next_; }
  // All is durable and said to be so by the log itself.
  bool settled() const { return idle() && opened_ && records_end_ <= said_durable_; }
  // From now on everything is urgent and markers do not wait: before a shutdown.
  void Hurry() { hurried_ = true; }

  // Behind the last record.
  LogPosition end() const { return records_end_; }
  // Everything before is at the disk, or on stable storage.
  LogPosition written() const { return written_; }
  LogPosition durable() const { return durable_; }
  // Where the block with the last record begins.
  LogPosition last_block() const { return last_block_; }
  // Where reading would have to begin for what comes from now on: at the block that is being
  // filled, or where the next one begins unless the segment ends before.
  LogPosition next_block() const { return IsFilling() ? At(next_ - 1).position : position_; }
  uint32_t epoch() const { return epoch_; }
  // The last write or flush failed, and is tried again.
  bool failing() const { return failing_; }
  // The bytes of a record that is not durable yet, and what follows it in its block; empty where
  // it is, or was never here.
  std::span<const std::byte> NotDurable(LogAddress address) const;

  uint64_t bytes_written() const { return bytes_written_; }
  uint64_t commits() const { return commits_; }
  uint64_t errors() const { return errors_; }

 private:
  enum class State : uint8_t { kFree, kFilling, kSealed, kWriting, kWritten, kFlushing };
  struct Block {
    State state = State::kFree;
    bool urgent = false;
    FileId file;
    LogPosition position = 0;
    LogPosition durable = 0;  // as its header says
    LogPosition previous = 0;
    size_t memory_at = 0;
    uint32_t room = 0;  // bytes that it may grow to
    uint32_t record_bytes = 0;
    uint32_t record_count = 0;
    uint32_t bytes = 0;  // sealed: with padding
    int64_t began_ns = 0;
    int64_t sealed_ns = 0;
  };

  Block& At(uint64_t block) { return blocks_[block % blocks_.size()]; }
  const Block& At(uint64_t block) const { return blocks_[block % blocks_.size()]; }
  std::byte* MemoryOf(uint64_t block) const { return memory_.data() + At(block).memory_at; }
  // A place in memory for a block.
  struct Place {
    size_t at = 0;
    size_t bytes = 0;  // that lie there free, side by side; 0: there is no place
  };
  Place FindPlace(size_t head, size_t bytes) const;
  static uint32_t PagesOf(size_t bytes) {
    return static_cast<uint32_t>((bytes + kLogPageBytes - 1) / kLogPageBytes * kLogPageBytes);
  }
  size_t HeadAfterFilling() const;
  bool IsFilling() const { return first_ != next_ && At(next_ - 1).state == State::kFilling; }
  Result<void> OpenLast(LogPosition end);
  Result<void> MarkEpoch();
  uint32_t LeftInSegment() const;
  bool MayBeginSegment() const { return next_file_ && !file_before_; }
  void OpenNextSegment();
  void BeginSegment();
  bool BeginBlock(size_t record_bytes);
  void Seal(uint64_t block);
  bool WantsSeal(const Block& filling) const;
  int Submit();
  int SubmitFlush();
  bool WantsFlush(const Block& first) const;
  int TakeCompletions();
  void TakeWritten(uint64_t block, int error);
  void TakeFlushed(int error);
  void NoteError();
  void Advance();
  void BeginMarker();

  // Constant after construction.
  const LogWriterOptions options_;
  Disk* const disk_;
  SegmentHandoff* const handoff_;
  const std::span<std::byte> memory_;

  // Owner only. Blocks [first_, next_) are in use, oldest first; the last one may be filled. They
  // follow each other in memory, which is used as a ring, up to head_.
  std::vector<Block> blocks_;
  size_t head_ = 0;
  uint64_t first_ = 0;
  uint64_t next_ = 0;
  FileId file_;                        // of the segment that is written
  std::optional<FileId> file_before_;  // until its blocks are durable
  std::optional<FileId> next_file_;    // of the next segment, once this one is half full
  uint32_t segment_bytes_ = 0;
  uint32_t next_segment_bytes_ = 0;
  LogPosition position_ = 0;
  LogPosition previous_ = 0;
  LogPosition written_ = 0;
  LogPosition durable_ = 0;
  LogPosition records_end_ = 0;
  LogPosition last_block_ = 0;
  LogPosition said_durable_ = 0;
  uint32_t epoch_ = 0;
  bool opened_ = false;  // a block of this epoch is durable
  uint32_t writing_ = 0;
  uint32_t in_flight_ = 0;
  bool flushing_ = false;
  FileId flushing_file_;
  bool failing_ = false;
  bool hurried_ = false;
  int64_t now_ns_ = 0;
  int64_t retry_ns_ = 0;
  int64_t calm_since_ns_ = 0;  // nothing to write since
  uint64_t bytes_written_ = 0;
  uint64_t commits_ = 0;
  uint64_t errors_ = 0;
};

}  // namespace engram
