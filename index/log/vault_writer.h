#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "index/checkpoint/live_table.h"
#include "index/log/log_format.h"
#include "src/core/clock.h"
#include "src/core/disk.h"
#include "src/core/log_address.h"
#include "src/core/note.h"
#include "src/core/result.h"

namespace engram {

struct VaultWriterOptions {
  LogInstance instance{};
  // The longest file; others are as long as what they hold.
  uint32_t segment_bytes = 64u << 20;
  // Written at most, so that the logs have the disk to themselves most of the time.
  uint64_t bytes_per_second = uint64_t{64} << 20;
};

// One record that is taken over.
struct VaultMove {
  LogAddress from = kNoLogAddress;
  uint32_t record_bytes = 0;
  // Where it is for good; kNoLogAddress: not taken over (yet).
  LogAddress to = kNoLogAddress;
};

// Takes records over from segments that are mostly dead into new segments of the vault
// (index/log/FORMAT.md, "The vault"):
// 1. The records are read where they lie, a stretch of a file at a time, and checked.
// 2. They are written back to back, under their new addresses, into a file aside.
// 3. Where it is full, or nothing is left: its header, flushed, then its name, and the folder
//    synced. Only then the moves of that file have a new place.
// A record that is not sound, and what comes after it in its segment, stays where it is. After an
// error of the vault's disk what was begun is removed, and nothing more is taken over.
//
// Thread safety: one core's alone, together with its disks. A Poll does at most one stretch; names,
// and opening files, wait for the disk.
class VaultWriter {
 public:
  using OpenLogFn = std::function<Result<std::unique_ptr<Disk>>(uint16_t log)>;

  // `vault` is over the vault's folder, for this alone. `open_log` makes a Disk over a log's
  // folder. All outlive it.
  VaultWriter(const VaultWriterOptions& options, Disk* vault, OpenLogFn open_log, Clock* clock);
  ~VaultWriter();
  VaultWriter(const VaultWriter&) = delete;
  VaultWriter& operator=(const VaultWriter&) = delete;

  // `moves` rising by `from`, each once. `number` is above all that the vault has had.
  void Begin(std::vector<VaultMove> moves, uint32_t number);
  // One bounded round; returns how much was done. `note` receives lines on what is wrong.
  int Poll(const NoteFn& note);
  bool active() const { return step_ != Step::kIdle; }

  // Once it is not active: what became of them.
  const std::vector<VaultMove>& moves() const { return moves_; }
  // The files that were written, by number, with their bytes.
  struct Written {
    uint32_t number = 0;
    uint64_t bytes = 0;
  };
  const std::vector<Written>& written() const { return written_; }
  // Segments with a record that is not sound or cannot be read.
  const std::vector<LogSegment>& unsound() const { return unsound_; }

 private:
  enum class Step : uint8_t { kIdle, kGather, kReading, kWriting, kHeader, kFlushing };
  static constexpr size_t kStretchBytes = size_t{1} << 20;

  std::string NewName() const;
  void Gather(const NoteFn& note);
  bool OpenSource(LogSegment segment, const NoteFn& note);
  void CloseSource();
  void TakeRecords(size_t bytes, const NoteFn& note);
  void LeaveSegment(const std::string& why, LogAddress at, const NoteFn& note);
  bool BeginFile(const NoteFn& note);
  void WriteOut(size_t bytes);
  void EndFile();
  void WriteHeader();
  void NameFile(const NoteFn& note);
  void TakeCompletion(const NoteFn& note);
  void GiveUp(const std::string& why, const NoteFn& note);

  // Constant after construction.
  const VaultWriterOptions options_;
  Disk* const vault_;
  const OpenLogFn open_log_;
  Clock* const clock_;

  std::unique_ptr<std::byte[]> memory_;
  std::byte* in_ = nullptr;   // kStretchBytes
  std::byte* out_ = nullptr;  // kStretchBytes and a record, aligned to a page

  Step step_ = Step::kIdle;
  std::vector<VaultMove> moves_;
  std::vector<Written> written_;
  std::vector<LogSegment> unsound_;
  size_t next_ = 0;  // move that is not read yet

  // The segment that is read.
  std::unique_ptr<Disk> source_;
  std::optional<LogSegment> source_segment_;
  std::optional<FileId> source_file_;
  uint32_t stretch_at_ = 0;  // its offset

  // The file that is written. `first_` is the first move that belongs to it.
  std::optional<FileId> file_;
  uint32_t number_ = 0;
  size_t first_ = 0;
  std::vector<LogAddress> places_;  // of moves_[first_ ...]; kNoLogAddress: left where it is
  uint64_t file_at_ = 0;            // of out_
  size_t out_used_ = 0;
  size_t out_written_ = 0;  // by the write under way
  uint32_t record_bytes_ = 0;
  uint32_t record_count_ = 0;
  bool ends_file_ = false;
  int64_t not_before_ns_ = 0;
};

}  // namespace engram
