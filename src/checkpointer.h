#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "src/checkpoint_manifest.h"
#include "src/core/clock.h"
#include "src/core/counters.h"
#include "src/core/disk.h"
#include "src/core/file_lease.h"
#include "src/core/note.h"
#include "src/core/read_pins.h"
#include "src/log_store.h"
#include "src/retention.h"

namespace engram {

struct CheckpointerOptions {
  // Bytes that all logs together grow by until the next one; 0: only on request.
  uint64_t every_bytes = 0;
  // Between a round that failed and the next one.
  int64_t retry_ns = 10 * kNanosPerSecond;
  // While the disk has no room for the log, from one round to the next: what has been dropped,
  // deleted or has expired since may have left segments in which nothing lives. Not with
  // every_bytes 0.
  int64_t full_retry_ns = 30 * kNanosPerSecond;
  RetentionOptions retention;
};

enum class CheckpointCounter : uint8_t {
  kCompleted,
  kFailed,
  kUnderWay,
  kLastBytes,
  kLastMs,
  kHeld,
  kCount
};

// Conducts checkpoints, on the control plane's core (index/checkpoint/checkpoint_handoff.h has the
// rounds). Once a round's manifest is written, what only the one before needed is given back: its
// files at once, and, by what the round has counted, segments in which nothing lives any more
// (src/retention.h).
//
// Thread safety: the control plane's alone, but for requests and counters.
class Checkpointer {
 public:
  // `root` is over the data directory and has nothing else under way when this polls. `latest` as
  // it was read at the start, 0 rounds where there was none. `pins` of those who read from the
  // logs; nullptr: nobody does. All outlive it.
  Checkpointer(const CheckpointerOptions& options, Disk* root, LogStore* logs, Clock* clock,
               const CheckpointManifest& latest, ReadPins* pins = nullptr);

  // One bounded round, which may wait for the disk; returns how much was done. `note` receives
  // lines for the log.
  int Poll(const NoteFn& note);
  // Begins a round as soon as none is under way. Any thread may count requests here, too.
  void Request() { requests_.fetch_add(1); }
  std::atomic<uint64_t>& requests() { return requests_; }
  // Begins the rounds that take over what lives in segments with any dead bytes, within the bounds
  // of a round, and find the old ones empty; a round that fails ends them. Any thread may ask, too.
  void RequestCompaction() { compactions_.fetch_add(1); }
  std::atomic<uint64_t>& compactions() { return compactions_; }
  // While it runs no round begins, and, once none is under way, no file of the logs goes that is
  // there: somebody copies them. The counter `checkpoints_held` tells when it is so. Any thread.
  FileLease& lease() { return lease_; }
  // From now on nobody holds files, and rounds are made on request alone: no compaction is begun or
  // goes on.
  void BeginStop() {
    stopping_ = true;
    compaction_rounds_ = 0;
  }
  // A round is under way, or was asked for.
  bool busy() const {
    return phase_ != Phase::kIdle || requests_.load() != requests_taken_ ||
           compaction_rounds_ > 0 || IsCompactionWanted();
  }
  const Retention& retention() const { return retention_; }
  // By how much the logs have grown since the last round began.
  uint64_t bytes_since_last() const { return logs_->bytes_written() - bytes_at_last_; }
  // Rounds that succeeded.
  uint64_t completed() const { return counters_[CheckpointCounter::kCompleted].Read(); }
  void AddCounters(CounterCatalogue* catalogue) const;

 private:
  enum class Phase : uint8_t { kIdle, kNoting, kSaving, kSyncing };

  bool IsHeld();
  bool IsCompactionWanted() const {
    return !stopping_ && compactions_.load() != compactions_taken_;
  }
  bool IsDue() const;
  void Begin();
  bool AllNoted();
  void BeginSaving();
  int AwaitSaves(const NoteFn& note);
  int AwaitSyncs(const NoteFn& note);
  bool HasFailed(const NoteFn& note);
  void Commit(const NoteFn& note);
  void End(bool succeeded);

  // Constant after construction.
  const CheckpointerOptions options_;
  Disk* const root_;
  LogStore* const logs_;
  Clock* const clock_;
  // The control plane's.
  CheckpointManifest latest_;
  // A later manifest than latest_ may be in place: its files are kept as well.
  bool either_may_stand_ = false;
  Phase phase_ = Phase::kIdle;
  uint32_t round_;
  int64_t began_ns_ = 0;
  int64_t retry_ns_ = 0;
  uint64_t bytes_at_last_ = 0;
  uint64_t requests_taken_ = 0;
  uint64_t compactions_taken_ = 0;
  uint32_t compaction_rounds_ = 0;  // still to be made
  bool stopping_ = false;
  Retention retention_;
  // Any thread's.
  CounterSet<CheckpointCounter, static_cast<size_t>(CheckpointCounter::kCount)> counters_;
  std::atomic<uint64_t> requests_{0};
  std::atomic<uint64_t> compactions_{0};
  FileLease lease_;
};

}  // namespace engram
