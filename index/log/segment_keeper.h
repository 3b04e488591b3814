#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "index/log/log_format.h"
#include "index/log/segment_handoff.h"
#include "src/core/clock.h"
#include "src/core/disk.h"
#include "src/core/log_files.h"
#include "src/core/result.h"

namespace engram {

struct SegmentKeeperOptions {
  uint16_t log = 0;
  LogInstance instance{};
  uint32_t segment_bytes = 64u << 20;
  // Segments that are ready beyond the one that is written.
  uint32_t ahead = 2;
  // Freed segments that are kept for another use; those beyond are removed.
  uint32_t spare = 2;
  int64_t retry_ns = kNanosPerSecond;
};

// Prepares the segments of one log ahead of their use, on a core that may wait for the disk:
// 1. A freed segment gets the next number: its header page is written and flushed, then it is
//    renamed and the folder synced.
// 2. Where there is none a new file is written with zeros, its header last, flushed, renamed and
//    synced. Its name ends in ".new" until then, so that a crash leaves nothing that looks ready.
// 3. Only then its number is published.
// Where the disk is full, but for what is kept free, or fails, it says so, and tries again after a
// while.
//
// Thread safety: one core's alone, together with its Disk; the handoff is shared with the writer.
class SegmentKeeper {
 public:
  // `disk` is over the log's folder; it, `clock` and `handoff` outlive the keeper.
  SegmentKeeper(const SegmentKeeperOptions& options, Disk* disk, Clock* clock,
                SegmentHandoff* handoff);
  ~SegmentKeeper();
  SegmentKeeper(const SegmentKeeper&) = delete;
  SegmentKeeper& operator=(const SegmentKeeper&) = delete;

  // Before the writer starts: `last` is the segment in which the log ends, 0 where there is none.
  // Takes over what was prepared beyond it before a restart, and removes what was not finished.
  Result<void> Start(uint32_t last);
  // Prepares segments ahead before it returns, so that what comes at first finds the disk free; at
  // least one. Errors: those of the disk, naming
  // the file and the remedy.
  Result<void> PrepareFirst();
  // One bounded round; returns how much was done. Renaming and syncing wait for the disk.
  int Poll();
  // Nothing needs this segment any more, which lies before the one that is written: it is used
  // again or removed. Does nothing where it is not there.
  void Free(uint32_t number);
  // From now on no new file is made that would leave less than this on the disk: a checkpoint has
  // to fit, as only after one segments can be freed. Freed ones are used again all the same.
  void KeepFree(uint64_t bytes) { keep_free_ = bytes; }
  // Those that are there and were not freed, prepared ones included, with their bytes.
  const std::map<uint32_t, uint64_t>& segments() const { return segments_; }

 private:
  enum class Step : uint8_t { kIdle, kFilling, kWritingHeader, kFlushing };
  static constexpr size_t kFillBytes = size_t{1} << 20;
  static constexpr uint32_t kFillsInFlight = 4;

  std::string FillingName() const { return SegmentName(number_) + std::string(kTemporarySuffix); }
  bool Begin();
  bool BeginRecycled();
  void Fill();
  void WriteHeader();
  void Finish();
  void TakeCompletions();
  void Fail(int error);
  Result<void> TakeOver(uint32_t number);

  // Constant after construction.
  const SegmentKeeperOptions options_;
  Disk* const disk_;
  Clock* const clock_;
  SegmentHandoff* const handoff_;

  // Owner only.
  std::unique_ptr<std::byte[]> memory_;
  std::byte* zeros_ = nullptr;   // kFillBytes, aligned to a page
  std::byte* header_ = nullptr;  // a page
  std::map<uint32_t, uint64_t> segments_;
  // Freed segments that still lie under their old names.
  std::deque<uint32_t> spare_;
  Step step_ = Step::kIdle;
  uint32_t number_ = 0;               // being prepared
  std::optional<uint32_t> recycled_;  // the segment that it is made of
  std::optional<FileId> file_;
  uint64_t filled_ = 0;  // bytes asked for
  uint32_t in_flight_ = 0;
  int error_ = 0;  // of what is under way
  int64_t retry_ns_ = 0;
  uint64_t keep_free_ = 0;
};

}  // namespace engram
