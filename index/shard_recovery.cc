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

namespace engram {

namespace {

constexpr int kReplayBatch = 64;
// Without memory for what the log holds for so long, though upkeep went on.
constexpr int64_t kLongestShortageNs = 10 * kNanosPerSecond;

}  // namespace

ShardRecovery::ShardRecovery(const ShardStorage& storage, RecoveryProgress* progress)
    : storage_(storage), progress_(progress) {}

Result<LogStep> ShardRecovery::Next(LogEntry* entry) {
  while (source_ < storage_.sources.size()) {
    if (!reader_) {
      const LogSource& source = storage_.sources[source_];
      reader_.emplace(source.disk, source.log, storage_.instance);
      if (auto opened = reader_->Open(source.from); !opened) {
        return std::unexpected(opened.error());
      }
    }
    auto step = reader_->Next(entry);
    progress_->bytes_read.store(bytes_before_ + reader_->bytes_read(), std::memory_order_relaxed);
    progress_->total_bytes.store(bytes_before_ + reader_->total_bytes(), std::memory_order_relaxed);
    if (!step || *step != LogStep::kEnd) return step;
    EndSource();
  }
  return LogStep::kEnd;
}

void ShardRecovery::EndSource() {
  bytes_before_ += reader_->bytes_read();
  const LogSource& source = storage_.sources[source_];
  for (const auto& flip : reader_->mended()) {
    progress_->mended_bits.fetch_add(1, std::memory_order_relaxed);
    progress_->notes.push_back("log: " + source.disk->directory() + "/" + flip.file + ": bit " +
                               std::to_string(flip.bit % 8) + " of byte " +
                               std::to_string(flip.bit / 8) +
                               " was flipped and is mended in memory; check this disk");
  }
  ++source_;
  // The shard's own log comes last.
  end_ = reader_->end();
  epoch_ = std::max(epoch_, reader_->highest_epoch());
  reader_.reset();
}

void ShardRecovery::Note(CommitStamp stamp) {
  latest_ = std::max(latest_, stamp);
  // Before the last log anything may still come.
  if (source_ + 1 >= storage_.sources.size()) complete_ = std::max(complete_, stamp);
}

std::string ShardRecovery::PlaceOf(const LogEntry& entry) const {
  const LogPosition position = PositionOf(entry.address);
  return storage_.sources[source_].disk->directory() + "/" + SegmentName(SegmentOf(position)) +
         " at offset " + std::to_string(OffsetOf(position));
}

// ---------------------------------------------------------------------------------------------

int Shard::Recover() {
  if (recovery_progress_.failed.load(std::memory_order_relaxed)) return 0;
  int work = TakePeerAnswers() + SendWaiting() + TakePeerRequests();
  const auto fail = [this](Error error) {
    recovery_progress_.error = std::move(error);
    recovery_progress_.failed.store(true, std::memory_order_release);
    return 0;
  };
  for (int n = 0; n < kReplayBatch && ledger_.room() > 0; ++n) {
    LogEntry entry;
    if (recovery_->held) {
      entry = *recovery_->held;
    } else {
      const auto step = recovery_->Next(&entry);
      if (!step) return fail(step.error());
      if (*step == LogStep::kPending) return work + 1;
      if (*step == LogStep::kEnd) {
        if (ledger_.empty()) {
          if (auto ended = EndRecovery(); !ended) return fail(ended.error());
        }
        return work + 1;
      }
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
  return work + Upkeep(true);
}

// False when there is no memory for it now.
Result<bool> Shard::Replay(const LogEntry& entry) {
  const LogRecord& record = entry.record;
  if (record.kind == LogRecordKind::kSpace) {
    SpaceDefinition definition;
    if (record.payload.size() < sizeof(definition)) {
      return Fail(ErrorCode::kCorrupt, recovery_->PlaceOf(entry) + ": a space without definition");
    }
    std::memcpy(&definition, record.payload.data(), sizeof(definition));
    auto space = port_.catalogue->Restore(record.space, definition);
    if (!space) return std::unexpected(space.error());
    logged_partitions_[FindOrMakeSpace(*space)] = definition.partitions;
    return true;
  }
  SpaceEntry* space_entry = port_.catalogue->Find(record.space);
  if (space_entry == nullptr) {
    return Fail(ErrorCode::kCorrupt, recovery_->PlaceOf(entry) + ": a record of space " +
                                         std::string(record.space) + ", which was never made");
  }
  const uint32_t space = FindOrMakeSpace(space_entry);
  if (record.kind != LogRecordKind::kSkip && IsObservation(record.kind)) {
    auto stored = ReplayObservation(entry, space);
    if (!stored || !*stored) return stored;
    recovery_progress_.observations.fetch_add(1, std::memory_order_relaxed);
  }
  recovery_->Note(record.stamp);
  if (record.session.value() != 0) {
    sessions_.Restore(record.session, space, record.sequence, UnixNsOf(record.stamp));
  }
  return true;
}

Result<bool> Shard::ReplayObservation(const LogEntry& entry, uint32_t space) {
  const LogRecord& record = entry.record;
  const size_t body_bytes = record.vector.size() + record.id.size() + record.payload.size();
  void* memory =
      std::aligned_alloc(kCacheLineBytes, (kRequestBodyOffset + body_bytes + kCacheLineBytes - 1) /
                                              kCacheLineBytes * kCacheLineBytes);
  CHECK(memory != nullptr, "there is memory for one request");
  auto* request = new (memory) ObserveRequest();
  request->op = static_cast<ObservationOp>(record.kind);
  request->dtype = record.dtype;
  request->dimension = record.dimension;
  request->id_bytes = static_cast<uint16_t>(record.id.size());
  request->payload_kind = record.payload_kind;
  request->payload_bytes = static_cast<uint32_t>(record.payload.size());
  request->when_ns = record.when_ns;
  request->confidence = record.confidence;
  request->scale = record.scale;
  request->address = entry.address;
  std::byte* body = reinterpret_cast<std::byte*>(memory) + kRequestBodyOffset;
  // Vector, id and payload lie side by side in the record, too.
  if (body_bytes > 0) std::memcpy(body, record.vector.data(), body_bytes);
  if (OwnedHereAlone(space, *request)) {
    const StoreOutcome outcome = Store(space, *request, record.stamp, true);
    std::free(memory);
    if (outcome.reason == RefusalReason::kNone) return true;
    if (outcome.reason == RefusalReason::kMemoryFull) return false;
    return Fail(
        ErrorCode::kInvalidArgument,
        recovery_->PlaceOf(entry) + ": space " + std::string(record.space) +
            " refuses what it once took: " + std::string(DescribeRefusal(outcome.reason).text) +
            "; has its configuration changed?");
  }
  const uint64_t ticket = ledger_.Add(nullptr);
  Forward& forward = ledger_.At(ticket);
  forward.step = Forward::Step::kLog;
  forward.is_replayed = true;
  forward.request = request;
  forward.space = entries_[space]->index();
  forward.stamp = record.stamp;
  pending_bytes_ += PendingBytes(*request);
  if (request->op == ObservationOp::kUpsert) ++pending_[space];
  BeginStoring(ticket);
  return true;
}

void Shard::FreeReplayed(const Forward& forward) {
  std::free(const_cast<ObserveRequest*>(forward.request));
}

Result<void> Shard::EndRecovery() {
  stamp_clock_.Pass(recovery_->latest());
  const LogPosition end = recovery_->end();
  const uint32_t epoch = recovery_->next_epoch();
  recovery_.reset();
  if (auto started = log_->Start(end, epoch); !started) return started;
  recovering_.store(false, std::memory_order_release);
  return {};
}

}  // namespace engram
