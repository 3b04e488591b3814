#include "src/retention.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include "src/core/check.h"
#include "src/core/log_files.h"

namespace engram {

namespace {

constexpr size_t kFreedPerPoll = 16;

}  // namespace

Retention::Retention(const RetentionOptions& options, LogStore* logs, ReadPins* pins, Clock* clock)
    : options_(options),
      logs_(logs),
      pins_(pins),
      clock_(clock),
      writer_(
          {.instance = logs->instance(),
           .segment_bytes = logs->segment_bytes(),
           .bytes_per_second = options.rewrite_bytes_per_second},
          logs->vault(), [logs](uint16_t log) { return logs->OpenLog(log); }, clock) {}

// ---------------------------------------------------------------------------------------------
// 1.

void Retention::BeginRound(uint32_t below_permille) {
  CHECK(!is_taking_over(), "what was listed before is dealt with first");
  files_ = logs_->Segments();
  std::vector<LogSegment> segments;
  for (const LogStore::SegmentFile& file : files_) segments.push_back(file.segment);
  size_t records = 0;
  const std::vector<LogSegment> wanted = Choose(below_permille, &records);
  tables_.clear();
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    tables_.push_back(std::make_unique<LiveTable>(segments, wanted, records));
    logs_->checkpoint(s).live.store(tables_.back().get(), std::memory_order_relaxed);
  }
}

bool Retention::IsDeadEnough(const Counted& counted, uint32_t below_permille) const {
  // The header, and what pads a file's end, are no loss.
  if (counted.live.bytes + 2 * kLogPageBytes > counted.bytes) return false;
  return counted.live.bytes * 1000 < uint64_t{below_permille} * counted.bytes;
}

// Those with the least live bytes come first: they give the most room for what they cost. Returns
// them in order, and in *records how many records they have at most.
std::vector<LogSegment> Retention::Choose(uint32_t below_permille, size_t* records) {
  std::vector<const Counted*> worth;
  std::vector<const Counted*> small;
  for (const Counted& counted : counted_) {
    if (unsound_.contains(counted.segment)) continue;
    if (IsDeadEnough(counted, below_permille)) {
      worth.push_back(&counted);
    } else if (counted.segment.log == kVaultLog && counted.bytes < logs_->segment_bytes() / 4) {
      small.push_back(&counted);
    }
  }
  if (small.size() >= options_.merge_vault_files)
    worth.insert(worth.end(), small.begin(), small.end());
  std::ranges::stable_sort(worth, [](const Counted* a, const Counted* b) {
    return a->live.bytes * b->bytes < b->live.bytes * a->bytes;
  });
  std::vector<LogSegment> chosen;
  uint64_t bytes = 0;
  for (const Counted* counted : worth) {
    if (!chosen.empty() && (bytes + counted->live.bytes > options_.max_rewrite_bytes ||
                            *records + counted->live.records > options_.max_rewrite_records)) {
      break;
    }
    bytes += counted->live.bytes;
    *records += counted->live.records;
    chosen.push_back(counted->segment);
  }
  // Of a single one that has more as many as may be: the rest is the next round's.
  *records = std::min<size_t>(*records, options_.max_rewrite_records);
  std::ranges::sort(chosen);
  return chosen;
}

// ---------------------------------------------------------------------------------------------
// 2.

void Retention::EndRound(const CheckpointManifest& manifest) {
  counted_.clear();
  // What was freed since the round began is not dead once more.
  std::set<LogSegment> there;
  for (const LogStore::SegmentFile& file : logs_->Segments()) there.insert(file.segment);
  Batch batch;
  uint64_t live_bytes = 0;
  uint64_t file_bytes = 0;
  for (size_t i = 0; i < files_.size(); ++i) {
    if (!there.contains(files_[i].segment)) continue;
    Counted counted{.segment = files_[i].segment, .bytes = files_[i].bytes, .live = {}};
    for (const auto& table : tables_) {
      counted.live.bytes += table->live(i).bytes;
      counted.live.records += table->live(i).records;
    }
    live_bytes += counted.live.bytes;
    file_bytes += counted.bytes;
    const uint16_t log = counted.segment.log;
    const bool is_replayed =
        log < manifest.logs.size() && counted.segment.number >= SegmentOf(manifest.logs[log].from);
    if (is_replayed || dead_.contains(counted.segment)) continue;
    if (counted.live.records > 0) {
      counted_.push_back(counted);
    } else {
      batch.segments.push_back(counted.segment);
      dead_.insert(counted.segment);
    }
  }
  counters_[RetentionCounter::kSegments].Set(there.size());
  counters_[RetentionCounter::kSegmentBytes].Set(file_bytes);
  counters_[RetentionCounter::kLiveBytes].Set(live_bytes);
  if (!batch.segments.empty()) {
    batch.not_before_ns = clock_->MonotonicNs() + options_.free_after_ns;
    batches_.push_back(std::move(batch));
  }
  CountMissing();
  BeginTakingOver();
}

int Retention::Poll(const NoteFn& note) {
  SayMissing(note);
  return FreeSome() + TakeOver(note);
}

void Retention::CountMissing() {
  for (const auto& table : tables_) {
    for (const LiveTable::Missing& missing : table->missing()) {
      if (!missing_said_.contains(missing.segment)) missing_[missing.segment] += missing.records;
    }
  }
}

void Retention::SayMissing(const NoteFn& note) {
  for (const auto& [segment, records] : missing_) {
    missing_said_.insert(segment);
    note({Severity::kError,
          LogFolder(segment.log) + "/" + SegmentName(segment.number) +
              " is missing: the payloads and vectors as received of " + std::to_string(records) +
              " observations lie there, and recalls leave them out; put it back, or restore a "
              "backup"});
  }
  missing_.clear();
}

// Whoever enters after the epoch was closed finds nothing that names these segments: what it may
// read ended 1 s before at the earliest, and what lay here had ended when the round counted.
int Retention::FreeSome() {
  if (batches_.empty()) return 0;
  Batch& batch = batches_.front();
  if (clock_->MonotonicNs() < batch.not_before_ns) return 0;
  if (pins_ != nullptr) {
    if (batch.epoch == 0) batch.epoch = pins_->Close();
    if (batch.epoch == 0 || !pins_->Passed(batch.epoch)) return 0;
  }
  size_t freed = 0;
  for (; freed < kFreedPerPoll && !batch.segments.empty(); ++freed) {
    logs_->Free(batch.segments.back());
    dead_.erase(batch.segments.back());
    batch.segments.pop_back();
  }
  counters_[RetentionCounter::kFreed].Add(freed);
  if (batch.segments.empty()) batches_.pop_front();
  return 1;
}

// ---------------------------------------------------------------------------------------------
// 3.

void Retention::BeginTakingOver() {
  std::vector<VaultMove> moves;
  for (const auto& table : tables_) {
    for (const LiveTable::Found& found : table->found()) {
      moves.push_back({.from = found.address, .record_bytes = found.record_bytes});
    }
  }
  if (moves.empty()) return;
  // A record may be named by a node and by a hidden copy of it.
  std::ranges::sort(moves, {}, &VaultMove::from);
  const auto again = std::ranges::unique(moves, {}, &VaultMove::from);
  moves.erase(again.begin(), again.end());
  writer_.Begin(std::move(moves), logs_->next_vault_number());
  taking_ = Taking::kWriting;
}

int Retention::TakeOver(const NoteFn& note) {
  switch (taking_) {
    case Taking::kNothing:
      return 0;
    case Taking::kWriting: {
      const int work = writer_.Poll([&](const Note& failure) {
        counters_[RetentionCounter::kFailed].Add(1);
        note(failure);
      });
      if (!writer_.active()) BeginMoving();
      return work;
    }
    case Taking::kMoving:
      if (!AllMoved()) return 0;
      moves_.clear();
      taking_ = Taking::kNothing;
      return 1;
  }
  return 0;
}

void Retention::BeginMoving() {
  unsound_.insert(writer_.unsound().begin(), writer_.unsound().end());
  for (const VaultWriter::Written& file : writer_.written()) {
    logs_->AddToVault(file.number, file.bytes);
  }
  const std::vector<VaultMove>& taken = writer_.moves();
  moves_.resize(logs_->shards());
  ++move_round_;
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    for (const LiveTable::Found& found : tables_[s]->found()) {
      const auto at = std::ranges::lower_bound(taken, found.address, {}, &VaultMove::from);
      if (at->to == kNoLogAddress) continue;
      moves_[s].push_back(
          {.space = found.space, .node = found.node, .from = found.address, .to = at->to});
    }
    CheckpointHandoff& shard = logs_->checkpoint(s);
    shard.moves.store(&moves_[s], std::memory_order_relaxed);
    shard.move.store(move_round_, std::memory_order_release);
  }
  for (const VaultMove& move : taken) {
    if (move.to == kNoLogAddress) continue;
    counters_[RetentionCounter::kTakenOver].Add(1);
    counters_[RetentionCounter::kTakenOverBytes].Add(move.record_bytes);
  }
  taking_ = Taking::kMoving;
}

bool Retention::AllMoved() const {
  for (uint16_t s = 0; s < logs_->shards(); ++s) {
    if (logs_->checkpoint(s).moved.load(std::memory_order_acquire) != move_round_) return false;
  }
  return true;
}

void Retention::AddCounters(CounterCatalogue* catalogue) const {
  constexpr std::array<std::string_view, static_cast<size_t>(RetentionCounter::kCount)> kNames = {
      "segments",         "segment_bytes",      "segment_live_bytes",
      "segments_freed",   "records_taken_over", "records_taken_over_bytes",
      "takeover_failures"};
  for (size_t i = 0; i < kNames.size(); ++i) {
    catalogue->push_back({"control", kNames[i], &counters_[static_cast<RetentionCounter>(i)]});
  }
}

}  // namespace engram
