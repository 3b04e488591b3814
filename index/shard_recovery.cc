// A shard's start: what its log says is stored again (see shard.h). Each shard reads the log that
// it wrote; what belongs to another one goes there as it did at first, with its old stamp, so the
// later stamp stands in whatever order they come (shard_partitions.cc).

#include "index/shard_recovery.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "index/shard.h"
#include "src/core/check.h"
#include "src/core/log_files.h"

namespace engram {

namespace {

constexpr int kReplayBatch = 64;
// No stamp is earlier: what is published before it says that a shard is still loading.
constexpr CommitStamp kFirstReplayed = 2;
// Without memory for what the log holds for so long, though upkeep went on.
constexpr int64_t kLongestShortageNs = 10 * kNanosPerSecond;

// Of a checkpoint file that cannot be loaded. Settings that are wrong name their own.
Error WithRemedy(Error error) {
  if (error.code == ErrorCode::kInvalidArgument || error.code == ErrorCode::kResourceExhausted) {
    return error;
  }
  error.message +=
      "; restore a backup of the data directory. Where no segment was ever freed, moving the file "
      "CHECKPOINT out of it has the whole log replayed instead";
  return error;
}

}  // namespace

ShardRecovery::ShardRecovery(const ShardStorage& storage, RecoveryProgress* progress)
    : storage_(storage), progress_(progress), sources_(storage.sources.size()) {}

Result<LogStep> ShardRecovery::Next(LogEntry* entry) {
  size_t first = sources_.size();
  for (size_t i = 0; i < sources_.size(); ++i) {
    const auto step = Fill(i);
    if (!step || *step == LogStep::kPending) return step;
    if (*step == LogStep::kEnd) continue;
    if (first == sources_.size() ||
        sources_[i].next->record.stamp < sources_[first].next->record.stamp) {
      first = i;
    }
  }
  if (first == sources_.size()) return LogStep::kEnd;
  from_ = first;
  *entry = *sources_[first].next;
  sources_[first].next.reset();
  return LogStep::kRecord;
}

// So that its next record is there.
Result<LogStep> ShardRecovery::Fill(size_t index) {
  Source& source = sources_[index];
  if (source.ended) return LogStep::kEnd;
  if (source.next) return LogStep::kRecord;
  if (source.reader == nullptr) {
    const LogSource& log = storage_.sources[index];
    source.reader = std::make_unique<LogReader>(log.disk, log.log, storage_.instance);
    if (auto opened = source.reader->Open(log.from, log.epoch); !opened) {
      return std::unexpected(opened.error());
    }
  }
  LogEntry entry;
  const auto step = source.reader->Next(&entry);
  source.bytes_read = source.reader->bytes_read();
  source.total_bytes = source.reader->total_bytes();
  uint64_t bytes_read = 0;
  uint64_t total_bytes = 0;
  for (const Source& each : sources_) {
    bytes_read += each.bytes_read;
    total_bytes += each.total_bytes;
  }
  progress_->bytes_read.store(bytes_read, std::memory_order_relaxed);
  progress_->total_bytes.store(total_bytes, std::memory_order_relaxed);
  if (!step || *step == LogStep::kPending) return step;
  if (*step == LogStep::kRecord) {
    source.next = entry;
  } else if (auto ended = EndSource(index); !ended) {
    return std::unexpected(ended.error());
  }
  return *step;
}

Result<void> ShardRecovery::EndSource(size_t index) {
  Source& source = sources_[index];
  const LogReader& reader = *source.reader;
  const LogSource& log = storage_.sources[index];
  for (const auto& flip : reader.mended()) {
    progress_->mended_bits.fetch_add(1, std::memory_order_relaxed);
    progress_->notes.push_back(
        {Severity::kWarning, "log: " + log.disk->directory() + "/" + flip.file + ": bit " +
                                 std::to_string(flip.bit % 8) + " of byte " +
                                 std::to_string(flip.bit / 8) +
                                 " was flipped and is mended in memory; check this disk"});
  }
  // The shard's own log comes last.
  if (index + 1 == sources_.size()) end_ = reader.end();
  epoch_ = std::max(epoch_, reader.highest_epoch());
  const LogPosition durable = reader.durable();
  const LogPosition end = reader.end();
  source.ended = true;
  source.reader.reset();
  // What lies before `log.from` was made durable before the checkpoint that says so.
  return MakeLogDurable(log.disk, std::max(durable, log.from), end);
}

void ShardRecovery::Note(CommitStamp stamp) {
  latest_ = std::max(latest_, stamp);
  complete_ = std::max(complete_, stamp);
}

std::string ShardRecovery::PlaceOf(const LogEntry& entry) const {
  const LogPosition position = PositionOf(entry.address);
  return storage_.sources[from_].disk->directory() + "/" + SegmentName(SegmentOf(position)) +
         " at offset " + std::to_string(OffsetOf(position));
}

// ---------------------------------------------------------------------------------------------

int Shard::Recover() {
  if (recovery_progress_.failed.load(std::memory_order_relaxed)) return 0;
  RenewStale();
  int work = TakePeerAnswers() + SendWaiting() + FreeCondemned();
  const auto fail = [this](Error error) {
    recovery_progress_.error = std::move(error);
    recovery_progress_.failed.store(true, std::memory_order_release);
    return 0;
  };
  if (recovery_->loading.next < storage_.checkpoints.size()) {
    const auto loaded = LoadCheckpoint();
    if (!loaded) return fail(WithRemedy(loaded.error()));
    // What others ask for waits until the spaces are here; but not while others are asked, who may
    // wait for this shard.
    if (recovery_->loading.hands_on || !recovery_->loading.away.empty()) work += TakePeerRequests();
    return work + *loaded + 1;
  }
  work += TakePeerRequests();
  recovery_->NoteBefore(kFirstReplayed);
  if (!OthersHaveLoaded()) return work + EndByAge(true) + Upkeep(true) + 1;
  for (int n = 0; n < kReplayBatch && ledger_.room() > 1; ++n) {
    LogEntry entry;
    if (recovery_->held) {
      entry = *recovery_->held;
    } else {
      const auto step = recovery_->Next(&entry);
      if (!step) return fail(step.error());
      if (*step == LogStep::kPending) return work + 1;
      if (*step == LogStep::kEnd) {
        if (!ledger_.empty() || !AllHaveReplayed()) break;
        if (auto ended = EndRecovery(); !ended) return fail(ended.error());
        return work + 1;
      }
    }
    if (MustWaitForOthers(entry.record)) {
      recovery_->NoteBefore(entry.record.stamp);
      recovery_->held = entry;
      recovery_->held_since_ns = now_ns_;
      break;
    }
    const auto replayed = Replay(entry);
    if (!replayed) return fail(replayed.error());
    if (!*replayed) {
      if (!recovery_->held) recovery_->held_since_ns = now_ns_;
      recovery_->held = entry;
      if (now_ns_ - recovery_->held_since_ns > kLongestShortageNs) {
        return fail({ErrorCode::kResourceExhausted,
                     "memory.limit_mib is too little for what the log holds (read up to " +
                         recovery_->PlaceOf(entry) + "): raise it"});
      }
      break;
    }
    recovery_->held.reset();
    ++work;
  }
  return work + EndByAge(true) + Upkeep(true) + 1;
}

// What is replayed goes where the partitions say, and an earlier version may be in a later one. So
// first everyone has read how many there are.
bool Shard::OthersHaveLoaded() const {
  for (uint16_t s = 0; s < port_.stamps->shards(); ++s) {
    if (s == port_.shard.value()) continue;
    if (port_.stamps->CompleteUpTo(ShardId(s), INT64_MAX) < kFirstReplayed - 1) return false;
  }
  return true;
}

// Until then another one may read that a space was dropped, of which this one has a part, sessions
// and clients that go on with them.
bool Shard::AllHaveReplayed() {
  if (!recovery_->is_through) {
    recovery_->is_through = true;
    recovery_->NoteBefore(kOpenStamp);
    port_.catalogue->EndReplay();
  }
  return !port_.catalogue->is_replaying();
}

// What it does depends on what came before it, which other logs may hold: then these come first. A
// delete leaves no trace in a space of one partition, so nothing earlier may come after it.
bool Shard::MustWaitForOthers(const LogRecord& record) const {
  if (record.kind == LogRecordKind::kDelete) {
    const SpaceEntry* entry = port_.catalogue->Find(record.space);
    if (entry == nullptr || entry->partitions() > 1) return false;
  } else if (record.kind != LogRecordKind::kSuppress && record.kind != LogRecordKind::kRestore) {
    return false;
  }
  for (uint16_t s = 0; s < port_.stamps->shards(); ++s) {
    if (s == port_.shard.value()) continue;
    // One that has recovered has nothing earlier, whatever the clock says.
    if (port_.stamps->CompleteUpTo(ShardId(s), INT64_MAX) < record.stamp - 1) return true;
  }
  return !ledger_.empty();
}

// False when there is no memory for it now.
Result<bool> Shard::Replay(const LogEntry& entry) {
  const LogRecord& record = entry.record;
  const ReplayScope scope(entry.address);
  bool left_out = false;
  if (storage_.guard != nullptr) {
    const auto judged = storage_.guard->LeavesOut(
        entry, unix_ns_, [&] { return recovery_->PlaceOf(entry); }, &recovery_progress_.notes);
    if (!judged) return std::unexpected(judged.error());
    left_out = *judged;
  }
  if (record.kind == LogRecordKind::kSpace) {
    SpaceDefinition definition;
    if (record.payload.size() < sizeof(definition)) {
      return Fail(ErrorCode::kCorrupt, recovery_->PlaceOf(entry) + ": a space without definition");
    }
    std::memcpy(&definition, record.payload.data(), sizeof(definition));
    CommitStamp birth = kNoStamp;
    if (record.payload.size() >= sizeof(definition) + sizeof(birth)) {
      std::memcpy(&birth, record.payload.data() + sizeof(definition), sizeof(birth));
    }
    auto space = port_.catalogue->Restore(record.space, definition, birth);
    if (!space) return std::unexpected(space.error());
    const uint32_t index = FindOrMakeSpace(*space);
    // What the log of a shard that is gone says has to be said again: that one is not read for
    // ever, nor always by this shard.
    if (recovery_->is_own() && birth == birth_of_[index]) {
      logged_partitions_[index] = definition.partitions;
    }
    return true;
  }
  SpaceEntry* space_entry = port_.catalogue->FindAny(record.space);
  if (record.kind == LogRecordKind::kDropSpace) {
    // Also of one that nobody has read of yet: the others may still.
    const auto dropped = port_.catalogue->Restore(record.space, SpaceDefinition(), record.stamp);
    if (!dropped) return std::unexpected(dropped.error());
    (void)FindOrMakeSpace(*dropped);
    recovery_->Note(record.stamp);
    return true;
  }
  if (space_entry == nullptr) {
    return Fail(ErrorCode::kCorrupt, recovery_->PlaceOf(entry) + ": a record of space " +
                                         std::string(record.space) + ", which was never made");
  }
  const uint32_t space = FindOrMakeSpace(space_entry);
  const bool is_vacant = space_entry->is_vacant();  // Before its birth, which may rise meanwhile.
  if (IsDropped(space, record.stamp)) {
    recovery_->Note(record.stamp);
    return true;
  }
  if (is_vacant) {
    return Fail(ErrorCode::kCorrupt, recovery_->PlaceOf(entry) + ": a record of space " +
                                         std::string(record.space) +
                                         ", which was dropped and not made again");
  }
  if (record.kind != LogRecordKind::kSkip && IsObservation(record.kind) && !left_out) {
    auto stored = ReplayObservation(entry, space);
    if (!stored || !*stored) return stored;
    recovery_progress_.observations.fetch_add(1, std::memory_order_relaxed);
    // Release: who sees it sees it among all.
    recovery_progress_.replayed.fetch_add(1, std::memory_order_release);
  }
  recovery_->Note(record.stamp);
  if (record.session.value() != 0) {
    RestoreSession(record.session, space, record.sequence, record.stamp, UnixNsOf(record.stamp));
  }
  return true;
}

// In its home, which is another one than it was where the number of shards has changed. `stamp` is
// one of the incarnation that it belongs to: it ends with that.
void Shard::RestoreSession(SessionId id, uint32_t space, Sequence sequence, CommitStamp stamp,
                           int64_t last_active_unix_ns) {
  const auto home = static_cast<uint16_t>(HomeOfSession(id).value() % port_.catalogue->shards());
  if (home == port_.shard.value()) {
    sessions_.Restore(id, space, sequence, last_active_unix_ns);
    return;
  }
  void* memory = std::aligned_alloc(kCacheLineBytes, kRequestBodyOffset);
  CHECK(memory != nullptr, "there is memory for one request");
  auto* request = new (memory) ObserveRequest();
  request->op = ObservationOp::kSkip;
  request->session = id;
  request->sequence = sequence;
  request->when_ns = last_active_unix_ns;
  const uint64_t ticket = ledger_.Add(nullptr);
  Forward& forward = ledger_.At(ticket);
  forward.step = Forward::Step::kStore;
  forward.is_replayed = true;
  forward.request = request;
  forward.space = entries_[space]->index();
  forward.stamp = stamp;
  forward.owner = forward.target = ShardId(home);
  forward.next_partitions = UINT32_MAX;  // Nobody else is told.
  Tell(ticket);
}

// In memory of its own, which FreeReplayed gives back. Without the payload where that lies in a log
// (`record_bytes` is not 0).
ObserveRequest* Shard::RequestOf(const LogRecord& record, LogAddress address,
                                 uint32_t record_bytes) {
  const size_t payload_bytes = record_bytes == 0 ? record.payload.size() : 0;
  const size_t body_bytes =
      record.vector.size() + record.id.size() + record.attributes.size() + payload_bytes;
  void* memory =
      std::aligned_alloc(kCacheLineBytes, (kRequestBodyOffset + body_bytes + kCacheLineBytes - 1) /
                                              kCacheLineBytes * kCacheLineBytes);
  CHECK(memory != nullptr, "there is memory for one request");
  auto* request = new (memory) ObserveRequest();
  request->op = static_cast<ObservationOp>(record.kind);
  request->dtype = record.dtype;
  request->dimension = record.dimension;
  request->id_bytes = static_cast<uint16_t>(record.id.size());
  request->attribute_bytes = static_cast<uint16_t>(record.attributes.size());
  request->payload_kind = record.payload_kind;
  request->payload_bytes = static_cast<uint32_t>(record.payload.size());
  request->when_ns = record.when_ns;
  request->confidence = record.confidence;
  request->scale = record.scale;
  request->address = address;
  request->record_bytes = record_bytes;
  std::byte* body = reinterpret_cast<std::byte*>(memory) + kRequestBodyOffset;
  const auto append = [&body](const void* from, size_t bytes) {
    if (bytes > 0) std::memcpy(body, from, bytes);
    body += bytes;
  };
  append(record.vector.data(), record.vector.size());
  append(record.id.data(), record.id.size());
  append(record.attributes.data(), record.attributes.size());
  append(record.payload.data(), payload_bytes);
  return request;
}

Result<bool> Shard::ReplayObservation(const LogEntry& entry, uint32_t space) {
  const LogRecord& record = entry.record;
  const size_t record_bytes = record.kind == LogRecordKind::kUpsert ? LogRecordBytes(record) : 0;
  ObserveRequest* request = RequestOf(record, entry.address, static_cast<uint32_t>(record_bytes));
  if (OwnedHereAlone(space, *request)) {
    const StoreOutcome outcome = Store(space, *request, record.stamp, true);
    std::free(request);
    if (outcome.reason == RefusalReason::kNone) return true;
    if (outcome.reason == RefusalReason::kMemoryFull) return false;
    // Another shard has read meanwhile that it was dropped.
    if (IsDropped(space, record.stamp)) return true;
    return Fail(
        ErrorCode::kInvalidArgument,
        recovery_->PlaceOf(entry) + ": space " + std::string(record.space) +
            " refuses what it once took: " + std::string(DescribeRefusal(outcome.reason).text) +
            "; has its configuration changed?");
  }
  ForwardReplayed(request, space, record.stamp);
  return true;
}

void Shard::ForwardReplayed(const ObserveRequest* request, uint32_t space, CommitStamp stamp) {
  const uint64_t ticket = ledger_.Add(nullptr);
  Forward& forward = ledger_.At(ticket);
  forward.step = Forward::Step::kLog;
  forward.is_replayed = true;
  forward.request = request;
  forward.space = entries_[space]->index();
  forward.stamp = stamp;
  pending_bytes_ += PendingBytes(*request);
  if (request->op == ObservationOp::kUpsert) ++pending_[space];
  BeginStoring(ticket);
}

void Shard::FreeReplayed(const Forward& forward) {
  std::free(const_cast<ObserveRequest*>(forward.request));
}

Result<void> Shard::EndRecovery() {
  // All shards draw their stamps by one clock, so all draw later ones. The step of a stamp is
  // added, as it may have been drawn ahead of the clock.
  stamp_clock_.Pass(recovery_->latest());
  clock_->PassWallNs(UnixNsOf(recovery_->latest()) + (int64_t{1} << kStampShardBits));
  RenewStale();
  const LogPosition end = recovery_->end();
  const uint32_t epoch = recovery_->next_epoch();
  recovery_.reset();
  if (auto started = log_->Start(end, epoch); !started) return started;
  recovering_.store(false, std::memory_order_release);
  return {};
}

}  // namespace engram
