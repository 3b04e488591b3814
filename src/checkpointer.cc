#include "src/checkpointer.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string_view>

#include "src/core/commit_stamp.h"

namespace engram {

namespace {

// The first one counts, the second one lists what lives, the third one finds that it has moved.
constexpr uint32_t kCompactionRounds = 3;
constexpr uint32_t kAnyDeadBytes = 1000;

}  // namespace

Checkpointer::Checkpointer(const CheckpointerOptions& options, Disk* root, LogStore* logs,
                           Clock* clock, const CheckpointManifest& latest, ReadPins* pins)
    : options_(options),
      root_(root),
      logs_(logs),
      clock_(clock),
      latest_(latest),
      round_(latest.round),
      bytes_at_last_(logs->bytes_written()),
      retention_(options.retention, logs, pins, clock) {}

int Checkpointer::Poll(const NoteFn& note) {
  if (IsHeld()) return 0;
  const int work = retention_.Poll(note);
  switch (phase_) {
    case Phase::kIdle:
      if (retention_.is_taking_over() || !IsDue()) return work;
      Begin();
      return work + 1;
    case Phase::kNoting:
      if (!AllNoted()) return work;
      BeginSaving();
      return work + 1;
    case Phase::kSaving:
      return work + AwaitSaves(note);
    case Phase::kSyncing:
      return work + AwaitSyncs(note);
  }
  return work;
}

// A round that was under way when somebody asked goes on to its end: until then the shards keep
// what only it needs. Whoever reads 1 after asking finds that nothing goes until the lease ends.
bool Checkpointer::IsHeld() {
  const auto held = [this] {
    return !stopping_ && phase_ == Phase::kIdle && lease_.Runs(clock_->MonotonicNs());
  };
  Counter& told = counters_[CheckpointCounter::kHeld];
  if (!held()) {
    if (told.Read() == 0) return false;
    told.Set(0);
    // Somebody else may have asked meanwhile and have read the 1 of before: then the lease is seen
    // here, as one of the two looks after both have written.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (!held()) return false;
  }
  told.Set(1);
  return true;
}

bool Checkpointer::IsDue() const {
  if (requests_.load() != requests_taken_) return true;
  if (IsCompactionWanted()) return true;
  if (compaction_rounds_ > 0 && clock_->MonotonicNs() >= retry_ns_) return true;
  const int64_t now_ns = clock_->MonotonicNs();
  if (options_.every_bytes == 0 || now_ns < retry_ns_) return false;
  if (logs_->is_full() && now_ns - began_ns_ >= options_.full_retry_ns) return true;
  return logs_->bytes_written() - bytes_at_last_ >= options_.every_bytes;
}

void Checkpointer::Begin() {
  requests_taken_ = requests_.load();
  if (IsCompactionWanted()) {
    compactions_taken_ = compactions_.load();
    compaction_rounds_ = kCompactionRounds;
  }
  counters_[CheckpointCounter::kUnderWay].Set(1);
  ++round_;
  began_ns_ = clock_->MonotonicNs();
  bytes_at_last_ = logs_->bytes_written();
  phase_ = Phase::kNoting;
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    logs_->checkpoint(s).note.store(round_, std::memory_order_release);
  }
}

bool Checkpointer::AllNoted() {
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    if (logs_->checkpoint(s).noted.load(std::memory_order_acquire) != round_) return false;
  }
  return true;
}

void Checkpointer::BeginSaving() {
  retention_.BeginRound(compaction_rounds_ > 1 ? kAnyDeadBytes
                                               : options_.retention.rewrite_below_permille);
  CommitStamp hold = kOpenStamp;
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    hold = std::min(hold, logs_->checkpoint(s).complete.load(std::memory_order_relaxed));
  }
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    logs_->checkpoint(s).hold.store(hold, std::memory_order_relaxed);
    logs_->checkpoint(s).save.store(round_, std::memory_order_release);
  }
  phase_ = Phase::kSaving;
}

int Checkpointer::AwaitSaves(const NoteFn& note) {
  if (HasFailed(note)) return 1;
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    if (logs_->checkpoint(s).saved.load(std::memory_order_acquire) != round_) return 0;
  }
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    logs_->checkpoint(s).sync.store(round_, std::memory_order_release);
  }
  phase_ = Phase::kSyncing;
  return 1;
}

int Checkpointer::AwaitSyncs(const NoteFn& note) {
  if (HasFailed(note)) return 1;
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    if (logs_->checkpoint(s).synced.load(std::memory_order_acquire) != round_) return 0;
  }
  Commit(note);
  return 1;
}

bool Checkpointer::HasFailed(const NoteFn& note) {
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    const CheckpointHandoff& shard = logs_->checkpoint(s);
    if (shard.failed.load(std::memory_order_acquire) != round_) continue;
    note({Severity::kError, "checkpoint " + std::to_string(round_) + " failed: shard " +
                                std::to_string(s) + ": " +
                                std::strerror(shard.error.load(std::memory_order_relaxed)) +
                                "; the one before stands, and the log keeps what came since"});
    End(false);
    return true;
  }
  return false;
}

// 1. The files' names are made to stay, then the manifest takes the place of the one before.
// 2. What only that one needed goes.
void Checkpointer::Commit(const NoteFn& note) {
  CheckpointManifest manifest;
  manifest.round = round_;
  uint64_t bytes = 0;
  Result<void> done = logs_->SyncFolders();
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    const CheckpointHandoff& shard = logs_->checkpoint(s);
    manifest.logs.push_back({.from = shard.replay_from.load(std::memory_order_relaxed),
                             .epoch = shard.epoch.load(std::memory_order_relaxed),
                             .file_bytes = shard.bytes.load(std::memory_order_relaxed)});
    bytes += manifest.logs.back().file_bytes;
  }
  if (done) done = logs_->DescribeKept(&manifest);
  if (done) {
    // Until a manifest is there for good, either may be found after a crash.
    either_may_stand_ = true;
    done = WriteManifest(*root_, manifest);
  }
  if (!done) {
    note({Severity::kError, "checkpoint " + std::to_string(round_) +
                                " failed: " + done.error().message +
                                "; the one before stands, and the log keeps what came since"});
    End(false);
    return;
  }
  latest_ = manifest;
  either_may_stand_ = false;
  retention_.EndRound(manifest);
  if (auto removed = logs_->RemoveCheckpointsBut(round_); !removed)
    note({Severity::kWarning, removed.error().message});
  if (auto cleaned = logs_->CleanKept(); !cleaned)
    note({Severity::kWarning, cleaned.error().message});
  const int64_t took_ms = (clock_->MonotonicNs() - began_ns_) / kNanosPerMilli;
  note({Severity::kInfo, "checkpoint " + std::to_string(round_) + ": " +
                             std::to_string(bytes >> 20) + " MiB in " + std::to_string(took_ms) +
                             " ms"});
  counters_[CheckpointCounter::kLastBytes].Set(bytes);
  counters_[CheckpointCounter::kLastMs].Set(static_cast<uint64_t>(took_ms));
  End(true);
}

void Checkpointer::AddCounters(CounterCatalogue* catalogue) const {
  constexpr std::array<std::string_view, static_cast<size_t>(CheckpointCounter::kCount)> kNames = {
      "checkpoints_completed", "checkpoints_failed", "checkpoints_under_way",
      "checkpoint_bytes",      "checkpoint_ms",      "checkpoints_held"};
  for (size_t i = 0; i < kNames.size(); ++i) {
    catalogue->push_back({"control", kNames[i], &counters_[static_cast<CheckpointCounter>(i)]});
  }
  retention_.AddCounters(catalogue);
}

void Checkpointer::End(bool succeeded) {
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    logs_->checkpoint(s).ended.store(round_, std::memory_order_release);
  }
  phase_ = Phase::kIdle;
  counters_[CheckpointCounter::kUnderWay].Set(0);
  if (succeeded) {
    counters_[CheckpointCounter::kCompleted].Add(1);
    if (compaction_rounds_ > 0) --compaction_rounds_;
  } else {
    retry_ns_ = clock_->MonotonicNs() + options_.retry_ns;
    compaction_rounds_ = 0;
    // A file that was begun would only take room.
    if (!either_may_stand_) (void)logs_->RemoveCheckpointsBut(latest_.round);
    counters_[CheckpointCounter::kFailed].Add(1);
  }
}

}  // namespace engram
