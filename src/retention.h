#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "index/checkpoint/live_table.h"
#include "index/log/vault_writer.h"
#include "src/checkpoint_manifest.h"
#include "src/core/clock.h"
#include "src/core/counters.h"
#include "src/core/note.h"
#include "src/core/read_pins.h"
#include "src/log_store.h"

namespace engram {

struct RetentionOptions {
  // From the manifest that a segment is dead by until it is freed: snapshots reach back 1 s. While
  // a forward waits for its owner they may reach back 30 s more, and then lack such a payload.
  int64_t free_after_ns = 5 * kNanosPerSecond;
  // A segment with less than this share of live bytes is rewritten.
  uint32_t rewrite_below_permille = 500;
  // Of what one round rewrites.
  uint64_t max_rewrite_bytes = uint64_t{256} << 20;
  // A segment that has more alone is rewritten by several.
  uint32_t max_rewrite_records = 1u << 18;
  // Written at most, on the average.
  uint64_t rewrite_bytes_per_second = uint64_t{64} << 20;
  // As many files of the vault that are under a quarter of a segment become one.
  uint32_t merge_vault_files = 8;
};

enum class RetentionCounter : uint8_t {
  kSegments,
  kSegmentBytes,
  kLiveBytes,
  kFreed,
  kTakenOver,
  kTakenOverBytes,
  kFailed,
  kCount
};

// Which segments of logs and vault live, and what becomes of the others (src/design/0013):
//
// 1. Before the shards save themselves each gets a LiveTable with all segments that are there. It
//    counts what it saves, and lists what lives in the segments that are to be rewritten: by the
//    counts of the round before those with the least live bytes, within bounds.
// 2. Once the round's manifest is written, a segment that is not replayed and in which no shard
//    has found anything is dead. It is freed when `free_after_ns` have passed and everybody has
//    left who reads for an answer that began before that.
// 3. What was listed is taken over into the vault, and then the shards name the new places. The
//    old segments are dead when the next round finds nothing in them: nothing is freed by any
//    other way than the count of a whole round.
//
// A crash at any point leaves files that are needed, and at most files that are not: the next round
// finds these dead. Damaged records are left where they are, with their segments.
//
// Thread safety: the control plane's alone, but for counters.
// Invariants: a segment in `dead_` is named by no node and no manifest that may be loaded.
class Retention {
 public:
  // `pins`: of those who read from the logs; nullptr: nobody does. All outlive it.
  Retention(const RetentionOptions& options, LogStore* logs, ReadPins* pins, Clock* clock);

  // 1. All shards have noted the round, none saves; nothing is being taken over. Segments that have
  // less than `below_permille` of live bytes are rewritten; 1000: all that have any dead ones.
  void BeginRound(uint32_t below_permille);
  // 2. `manifest` is there for good, and was the result of the round that was begun last.
  void EndRound(const CheckpointManifest& manifest);
  // One bounded round of freeing and taking over; returns how much was done.
  int Poll(const NoteFn& note);

  // No round may begin meanwhile.
  bool is_taking_over() const { return taking_ != Taking::kNothing; }
  // Segments wait to be freed.
  bool has_dead() const { return !dead_.empty(); }
  uint64_t counter(RetentionCounter which) const { return counters_[which].Read(); }
  void AddCounters(CounterCatalogue* catalogue) const;

 private:
  enum class Taking : uint8_t { kNothing, kWriting, kMoving };
  struct Counted {
    LogSegment segment;
    uint64_t bytes = 0;  // of the file
    LiveTable::Live live;
  };
  struct Batch {
    std::vector<LogSegment> segments;
    int64_t not_before_ns = 0;
    ReadPins::Epoch epoch = 0;  // that was closed; 0: none yet
  };

  std::vector<LogSegment> Choose(uint32_t below_permille, size_t* records);
  bool IsDeadEnough(const Counted& counted, uint32_t below_permille) const;
  void BeginTakingOver();
  void BeginMoving();
  bool AllMoved() const;
  int FreeSome();
  int TakeOver(const NoteFn& note);
  void CountMissing();
  void SayMissing(const NoteFn& note);

  // Constant after construction.
  const RetentionOptions options_;
  LogStore* const logs_;
  ReadPins* const pins_;
  Clock* const clock_;
  // The control plane's.
  std::vector<std::unique_ptr<LiveTable>> tables_;  // by shard, of the round begun last
  std::vector<LogStore::SegmentFile> files_;        // that these are about
  std::vector<Counted> counted_;                    // by the last round that succeeded; not dead
  std::set<LogSegment> dead_;                       // those of batches_
  std::deque<Batch> batches_;
  std::set<LogSegment> unsound_;            // are not rewritten
  std::map<LogSegment, uint64_t> missing_;  // with how many records; to be said
  std::set<LogSegment> missing_said_;
  Taking taking_ = Taking::kNothing;
  VaultWriter writer_;
  std::vector<std::vector<OriginMove>> moves_;  // by shard
  uint32_t move_round_ = 0;
  // Any thread's.
  CounterSet<RetentionCounter, static_cast<size_t>(RetentionCounter::kCount)> counters_;
};

}  // namespace engram
