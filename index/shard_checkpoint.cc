// A shard's part of checkpoints: saving (index/checkpoint/checkpoint_handoff.h has the rounds), and
// loading when it starts.

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "index/checkpoint/checkpoint_file.h"
#include "index/checkpoint/space_loader.h"
#include "index/shard.h"

namespace engram {

namespace {

constexpr size_t kMovesPerPoll = 128;
constexpr int kExtentsPerPoll = 64;
constexpr int kHandedOnPerPoll = 64;

// The partitions are those that there were, or have doubled since.
bool StaysInPlace(const SpaceDefinition& saved, const SpaceEntry& entry) {
  return saved.first_partitions() == entry.first_partitions() &&
         saved.partitions == saved.first_partitions() << saved.growths &&
         saved.partitions <= entry.partitions();
}

// Some of the records that were taken over. Returns how much was done.
int MoveOrigins(std::span<const std::unique_ptr<Space>> spaces, CheckpointHandoff* handoff) {
  const uint32_t move = handoff->move.load(std::memory_order_acquire);
  if (move == handoff->moved.load(std::memory_order_relaxed)) return 0;
  const std::vector<OriginMove>& moves = *handoff->moves.load(std::memory_order_relaxed);
  const size_t end = std::min(moves.size(), handoff->next_move + kMovesPerPoll);
  for (; handoff->next_move < end; ++handoff->next_move) {
    const OriginMove& each = moves[handoff->next_move];
    Space* space = each.space < spaces.size() ? spaces[each.space].get() : nullptr;
    if (space == nullptr || each.node >= space->node_count()) continue;
    (void)space->MoveOrigin(each.node, each.from, each.to);
  }
  if (handoff->next_move == moves.size()) {
    handoff->next_move = 0;
    handoff->moved.store(move, std::memory_order_release);
  }
  return 1;
}

// Of all files, those that are loaded and the one that is being read.
void TellProgress(std::span<const CheckpointSource> files, const CheckpointLoading& loading,
                  RecoveryProgress* progress) {
  uint64_t read = loading.reader ? loading.reader->offset() : 0;
  uint64_t bytes = 0;
  for (size_t i = 0; i < files.size(); ++i) {
    if (i < loading.next) read += files[i].bytes;
    bytes += files[i].bytes;
  }
  progress->checkpoint_bytes_read.store(read, std::memory_order_relaxed);
  progress->checkpoint_bytes.store(bytes, std::memory_order_relaxed);
}

}  // namespace

// No recall is under way, so a save may begin.
int Shard::StepCheckpoint() {
  CheckpointHandoff* const handoff = storage_.checkpoint;
  if (handoff == nullptr) return 0;
  if (const int moved = MoveOrigins(spaces_, handoff); moved > 0) return moved;
  const uint32_t note = handoff->note.load(std::memory_order_acquire);
  if (note != noted_round_) {
    noted_round_ = note;
    keeps_tombstones_ = true;
    sync_to_.reset();
    saver_->Abort();  // The round before has failed elsewhere.
    NoteForCheckpoint(handoff);
    return 1;
  }
  if (keeps_tombstones_ && handoff->ended.load(std::memory_order_acquire) == noted_round_) {
    saver_->Abort();
    keeps_tombstones_ = false;
  }
  const uint32_t save = handoff->save.load(std::memory_order_acquire);
  if (save != saved_round_ && save == noted_round_ && keeps_tombstones_ && !JoinsDrop()) {
    saved_round_ = save;
    const ShardContents contents{
        .spaces = spaces_,
        .entries = entries_,
        .dropped_at = dropped_at_,
        .replay_from = handoff->replay_from.load(std::memory_order_relaxed),
        .sessions = &sessions_,
        .shard = port_.shard.value(),
        .shards = port_.catalogue->shards(),
        .live = handoff->live.load(std::memory_order_relaxed)};
    const CommitStamp hold = handoff->hold.load(std::memory_order_relaxed);
    if (!saver_->Begin(save, hold, stamp_clock_.last(), contents)) ReportSave(handoff);
    return 1;
  }
  if (!saver_->active()) return SyncForCheckpoint(handoff);
  const int work = saver_->Step();
  if (!saver_->active()) ReportSave(handoff);
  return work;
}

// From where the log would have to be replayed: the oldest observation that is not answered, or
// what is written next.
void Shard::NoteForCheckpoint(CheckpointHandoff* handoff) {
  const LogPosition from =
      ledger_.empty() ? log_->next_block() : std::min(ledger_.Oldest().block, log_->next_block());
  const CommitStamp complete = ledger_.empty() ? StampBefore(unix_ns_) : ledger_.OldestStamp() - 1;
  handoff->replay_from.store(from, std::memory_order_relaxed);
  handoff->epoch.store(log_->epoch(), std::memory_order_relaxed);
  handoff->complete.store(complete, std::memory_order_relaxed);
  handoff->noted.store(noted_round_, std::memory_order_release);
}

// Blocks go out within the flush interval whether somebody waits for them or not.
int Shard::SyncForCheckpoint(CheckpointHandoff* handoff) {
  const uint32_t sync = handoff->sync.load(std::memory_order_acquire);
  if (sync == synced_round_ || sync != noted_round_ || !keeps_tombstones_) return 0;
  if (!sync_to_) sync_to_ = log_->end();
  if (!log_->idle() && log_->durable() < *sync_to_) {
    if (!log_->failing()) return 0;
    handoff->error.store(EIO, std::memory_order_relaxed);
    handoff->failed.store(sync, std::memory_order_release);
  } else {
    handoff->synced.store(sync, std::memory_order_release);
  }
  synced_round_ = sync;
  return 1;
}

void Shard::ReportSave(CheckpointHandoff* handoff) {
  if (saver_->done()) {
    handoff->bytes.store(saver_->bytes(), std::memory_order_relaxed);
    handoff->saved.store(saved_round_, std::memory_order_release);
  } else {
    handoff->error.store(saver_->error(), std::memory_order_relaxed);
    handoff->failed.store(saved_round_, std::memory_order_release);
  }
}

// ---------------------------------------------------------------------------------------------
// Loading

// Some extents of the files, one file after the other. Returns how much was done.
Result<int> Shard::LoadCheckpoint() {
  CheckpointLoading& loading = recovery_->loading;
  const CheckpointSource& source = storage_.checkpoints[loading.next];
  if (!loading.reader) {
    loading.reader = std::make_unique<CheckpointReader>(source.disk);
    auto opened = loading.reader->Open(CheckpointName(source.round), source.bytes);
    if (!opened) return std::unexpected(opened.error());
  }
  for (int n = 0; n < kExtentsPerPoll; ++n) {
    if (!loading.away.empty()) return HandOnSessions() ? 1 : 0;
    if (loading.hands_on) return HandOn() ? 1 : 0;
    std::span<const std::byte> extent;
    const auto step = loading.reader->Next(&extent);
    if (!step) return std::unexpected(step.error());
    if (*step == CheckpointReader::Step::kPending) return n;
    if (*step == CheckpointReader::Step::kEnd) {
      return Fail(ErrorCode::kCorrupt, loading.reader->Place() + ": the file has no end");
    }
    if (auto loaded = LoadExtent(extent); !loaded) {
      return Fail(loaded.error().code, loading.reader->Place() + ": " + loaded.error().message);
    }
    if (!loading.reader) return n + 1;  // That was all of the file.
  }
  TellProgress(storage_.checkpoints, loading, &recovery_progress_);
  return kExtentsPerPoll;
}

Result<void> Shard::LoadExtent(std::span<const std::byte> extent) {
  const auto damaged = [] { return Fail(ErrorCode::kCorrupt, "is damaged"); };
  CheckpointLoading& loading = recovery_->loading;
  ExtentHeader header;
  std::memcpy(&header, extent.data(), sizeof(header));
  if (header.kind < kShardExtent) {
    if (loading.loader == nullptr && !loading.passes_over) {
      if (auto begun = BeginLoadingSpace(extent); !begun) return begun;
    }
    if (loading.passes_over) {
      if (header.kind != ExtentKind::kEnd) return {};
      loading.passes_over = false;
      ++loading.spaces;
      return {};
    }
    if (auto taken = loading.loader->Take(extent); !taken) return taken;
    return loading.loader->is_complete() ? FinishLoadingSpace() : Result<void>();
  }
  const auto body = OpenShardExtent(extent, &header);
  if (!body || loading.loader != nullptr || loading.passes_over) return damaged();
  if (header.kind == kShardExtent) {
    ShardExtent shard;
    if (body->size() < sizeof(shard)) return damaged();
    std::memcpy(&shard, body->data(), sizeof(shard));
    const CheckpointSource& source = storage_.checkpoints[loading.next];
    if (shard.round != source.round || shard.shard != source.shard) {
      return Fail(ErrorCode::kCorrupt, "is the checkpoint of round " + std::to_string(shard.round) +
                                           " of shard " + std::to_string(shard.shard) +
                                           ", not what the manifest says");
    }
    recovery_->NoteLoaded(shard.latest_stamp);
    return {};
  }
  if (header.kind == kSpaceListExtent) return LoadSpaceList(*body, header.count);
  if (header.kind == kSessionsExtent) return LoadSessions(*body, header.count);
  ShardEndExtent end;
  if (header.kind != kShardEndExtent || body->size() < sizeof(end)) return damaged();
  std::memcpy(&end, body->data(), sizeof(end));
  if (end.sessions != loading.sessions || end.spaces != loading.spaces ||
      loading.reader->offset() + extent.size() != loading.reader->bytes()) {
    return damaged();
  }
  const size_t next = loading.next + 1;
  loading = CheckpointLoading();
  loading.next = next;
  TellProgress(storage_.checkpoints, loading, &recovery_progress_);
  return {};
}

Result<void> Shard::LoadSpaceList(std::span<const std::byte> body, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) {
    ListedSpace listed;
    if (body.size() < sizeof(listed)) return Fail(ErrorCode::kCorrupt, "list of spaces is cut off");
    std::memcpy(&listed, body.data(), sizeof(listed));
    const std::string_view name(reinterpret_cast<const char*>(body.data()) + sizeof(listed),
                                listed.name_bytes);
    const size_t bytes = sizeof(listed) + PadTo8(listed.name_bytes);
    if (body.size() < bytes || !IsValidSpaceName(name)) {
      return Fail(ErrorCode::kCorrupt, "list of spaces has a name that is none");
    }
    body = body.subspan(bytes);
    CheckpointLoading& loading = recovery_->loading;
    const bool was_dropped = listed.definition.metric == Metric::kUnspecified;
    const CommitStamp birth = BirthOf(listed);
    if (was_dropped) ++loading.spaces;
    if (was_dropped && birth == kNoStamp) {
      loading.listed.push_back(kNoNode);
      continue;
    }
    auto entry = port_.catalogue->Restore(name, listed.definition, birth);
    if (!entry) return std::unexpected(entry.error());
    loading.listed.push_back(FindOrMakeSpace(*entry));
    loading.definitions[std::string(name)] = listed.definition;
    loading.births[std::string(name)] = birth;
  }
  return {};
}

Result<void> Shard::LoadSessions(std::span<const std::byte> body, uint32_t count) {
  CheckpointLoading& loading = recovery_->loading;
  for (uint32_t i = 0; i < count; ++i) {
    SavedSession saved;
    if (body.size() < sizeof(saved)) return Fail(ErrorCode::kCorrupt, "sessions are cut off");
    std::memcpy(&saved, body.data(), sizeof(saved));
    if (saved.space >= loading.listed.size()) {
      return Fail(ErrorCode::kCorrupt, "a session of a space that is not listed");
    }
    ++loading.sessions;
    saved.space = loading.listed[saved.space];
    if (saved.space != kNoNode) loading.away.push_back(saved);
    body = body.subspan(sizeof(saved));
  }
  return {};
}

// Each session to its home, which is another shard where the number of shards has changed. False
// when the ledger has no room.
bool Shard::HandOnSessions() {
  std::vector<SavedSession>& away = recovery_->loading.away;
  const size_t before = away.size();
  for (; !away.empty() && ledger_.room() > 1; away.pop_back()) {
    const SavedSession& saved = away.back();
    // It belongs to the incarnation that was saved, which may have been dropped since.
    const CommitStamp first =
        recovery_->loading.births[std::string(spaces_[saved.space]->name())] + 1;
    if (IsDropped(saved.space, first)) continue;
    RestoreSession(SessionId(saved.id), saved.space, saved.last_sequence, first,
                   saved.last_active_unix_ns);
  }
  return away.size() < before;
}

// Where as many shards are there as were, and the space began with as many partitions, each of its
// observations is where it belongs.
Result<void> Shard::BeginLoadingSpace(std::span<const std::byte> extent) {
  CheckpointLoading& loading = recovery_->loading;
  const auto saved = ReadSpaceExtent(extent);
  if (!saved) return std::unexpected(saved.error());
  SpaceEntry* entry = port_.catalogue->FindAny(saved->name);
  const auto birth = loading.births.find(saved->name);
  if (entry == nullptr || birth == loading.births.end()) {
    return Fail(ErrorCode::kCorrupt, "space " + saved->name + " is not listed");
  }
  if (!loading.begun.insert(saved->name).second) {
    return Fail(ErrorCode::kCorrupt, "space " + saved->name + " is saved twice");
  }
  loading.space = FindOrMakeSpace(entry);
  if (birth->second < birth_of_[loading.space]) {
    loading.passes_over = true;
    return {};
  }
  if (saved->dimension != 0 && !entry->FixDimension(static_cast<uint16_t>(saved->dimension),
                                                    generation_of_[loading.space])) {
    return Fail(ErrorCode::kInvalidArgument,
                "space " + saved->name + " is configured with dimension " +
                    std::to_string(entry->dimension()) + ", and was saved with " +
                    std::to_string(saved->dimension) + "; write that one");
  }
  const bool stays = storage_.checkpoints[loading.next].shards == port_.catalogue->shards() &&
                     spaces_[loading.space]->node_count() == 0 &&
                     StaysInPlace(loading.definitions[saved->name], *entry);
  if (!stays) {
    loading.apart = std::make_unique<Space>(saved->name, OptionsOf(*entry), &heap_, &epochs_);
  }
  Space* to = stays ? spaces_[loading.space].get() : loading.apart.get();
  loading.loader = std::make_unique<SpaceLoader>(to);
  return {};
}

Result<void> Shard::FinishLoadingSpace() {
  CheckpointLoading& loading = recovery_->loading;
  if (auto finished = loading.loader->Finish(); !finished) return finished;
  loading.loader.reset();
  ++loading.spaces;
  if (loading.apart != nullptr) {
    loading.hands_on = true;
    loading.next_node = 0;
    // So that each finds its place in the owner's queue at once.
    loading.by_age.clear();
    if (entries_[loading.space]->ends_by_age()) loading.by_age = loading.apart->NodesByAge();
    return {};
  }
  const Space& space = *spaces_[loading.space];
  recovery_->NoteLoaded(space.latest_stamp());
  recovery_progress_.observations.fetch_add(space.live(), std::memory_order_relaxed);
  if (!ReserveRecalls(space.node_count())) {
    return Fail(ErrorCode::kResourceExhausted,
                "memory.limit_mib is too little for what was saved: raise it");
  }
  QueueForUpkeep(loading.space);
  return {};
}

// What belongs to others goes to them as if the log said so. False when the ledger has no room.
bool Shard::HandOn() {
  CheckpointLoading& loading = recovery_->loading;
  const Space& apart = *loading.apart;
  std::vector<float> vector(apart.dimension());
  std::vector<std::byte> attributes;
  for (int n = 0; n < kHandedOnPerPoll && loading.next_node < apart.node_count();
       ++n, ++loading.next_node) {
    // A hidden one is two records.
    if (ledger_.room() < 2) return n > 0;
    const NodeId node =
        loading.by_age.empty() ? loading.next_node : loading.by_age[loading.next_node];
    const auto content = apart.ContentOf(node);
    if (!content) continue;
    LogRecord record;
    record.id = content->stored.id;
    if (content->kind == Space::Content::Kind::kDeleted) {
      record.kind = LogRecordKind::kDelete;
      ForwardReplayed(RequestOf(record, kNoLogAddress, 0), loading.space, content->stamp);
      continue;
    }
    apart.GetVector(node, vector.data());
    record.dtype = VectorDtype::kF32;
    record.dimension = static_cast<uint16_t>(apart.dimension());
    record.payload_kind = content->stored.payload_kind;
    record.confidence = content->stored.confidence;
    record.when_ns = content->stored.when_ns;
    record.vector = std::as_bytes(std::span(vector));
    attributes.resize(apart.attributes().AttributeBytes(node));
    apart.attributes().WriteAttributes(node, attributes.data());
    record.attributes = attributes;
    // Its length alone where it lies in a log.
    record.payload = {content->stored.payload.data(), content->stored.payload_bytes};
    ForwardReplayed(RequestOf(record, content->stored.origin, content->stored.record_bytes),
                    loading.space, content->stamp);
    recovery_->NoteLoaded(content->stored.stamp);
    recovery_progress_.observations.fetch_add(1, std::memory_order_relaxed);
    if (content->kind == Space::Content::Kind::kLive) continue;
    LogRecord hide;
    hide.kind = LogRecordKind::kSuppress;
    hide.id = record.id;
    ForwardReplayed(RequestOf(hide, kNoLogAddress, 0), loading.space, content->stored.stamp);
  }
  if (loading.next_node < apart.node_count() || !ledger_.empty()) return true;
  loading.apart.reset();
  loading.hands_on = false;
  return true;
}

}  // namespace engram
