// What is done to a whole space in a shard: compacting and dropping it (see shard.h); rebuilding it
// is in shard_rebuild.cc.
//
// Compact: until what had ended by then is given back, whatever has ended is swept, however little.
//
// Drop, as SpaceEntry numbers it:
// 1. The producer has begun it. Nothing is taken for the space any more, and nothing found in it.
// 2. What is under way for it comes to its end: observations in the ledger, a link, a sweep, a
//    checkpoint that is being saved. Its sessions are forgotten. Then the shard joins, with a stamp
//    that is later than all it has taken for the space. From here on no save begins.
// 3. The latest of these stamps ends the incarnation. What has it or an earlier one is gone, now
//    and whenever it is replayed: so it does not matter in which order logs say what, and of which
//    of them a crash takes the end. A shard that may have records of the space logs the stamp,
//    also for what it writes later: the next record of what the space is names it again.
// 4. It is answered once that is on stable storage. The part's memory is freed in slices.
//
// In a recovery the shards learn of a drop from what they read or from each other, each at its own
// time (Renew). Why what one of them has when it learns of a drop is of what was dropped, and goes:
// each log, and each checkpoint for the logs behind it, says of itself to which incarnation belongs
// what follows, a record and a session alike. What another log has said does not count, as that
// one may be gone, or be read later by another shard. And a session is handed on with a stamp of
// its incarnation, not with a time. So whatever is stored, the birth that it needs was known
// before. No shard serves before all have read their logs (SpaceCatalogue::is_replaying): until
// then another one may still read of a drop.

#include <algorithm>
#include <string>
#include <utility>

#include "index/shard.h"
#include "src/core/check.h"

namespace engram {

namespace {

// Sessions that are looked at, and nodes whose texts are freed, in one round.
constexpr size_t kSessionsForgotten = 1'024;
constexpr size_t kNodesFreed = 2'048;
constexpr uint32_t kFinishDistances = 1'024;

}  // namespace

void Shard::BeginCommand(size_t producer, SlotId slot) {
  const auto* request =
      reinterpret_cast<const CommandRequest*>(port_.producers[producer].producer_slab->At(slot));
  SpaceEntry* entry = port_.catalogue->FindAny(request->space.view());
  commands_.push_back({.what = request->what, .producer = producer, .slot = slot, .entry = entry});
}

// Returns how much was done.
int Shard::StepCommands() {
  int work = 0;
  for (size_t i = 0; i < commands_.size();) {
    const Command::Step before = commands_[i].step;
    const bool done = StepCommand(&commands_[i]);
    if (done || commands_[i].step != before) ++work;
    if (!done) {
      ++i;
      continue;
    }
    const Command ended = commands_[i];
    commands_.erase(commands_.begin() + static_cast<ptrdiff_t>(i));
    const auto* request = reinterpret_cast<const CommandRequest*>(
        port_.producers[ended.producer].producer_slab->At(ended.slot));
    Complete(ended.producer, {.kind = CompletionKind::kCommand,
                              .reason = ended.reason,
                              .slot = ended.slot,
                              .origin = request->origin,
                              .sequence = request->request_id});
  }
  CountRebuildLeft();
  return work;
}

// True when it is done.
bool Shard::StepCommand(Command* command) {
  auto* request = reinterpret_cast<CommandRequest*>(
      port_.producers[command->producer].producer_slab->At(command->slot));
  if (command->entry == nullptr) return true;
  switch (command->what) {
    case SpaceCommand::kCompact:
      return StepCompact(command, request);
    case SpaceCommand::kRebuild:
      return StepRebuild(command, request);
    case SpaceCommand::kDrop:
      break;
  }
  return StepDrop(command, request);
}

bool Shard::StepCompact(Command* command, CommandRequest* request) {
  const uint32_t index = space_of_entry_[command->entry->index()];
  if (index == kNoNode) return true;
  Space& space = *spaces_[index];
  if (command->step == Command::Step::kBegin) {
    command->step = Command::Step::kSweeping;
    command->generation = generation_of_[index];
    command->goal = space.reclaimed() + space.retired();
    request->observations = space.retired();
    request->bytes_before = space.held_bytes();
    QueueForUpkeep(index);
  }
  const bool was_dropped =
      command->entry->is_dropping() || generation_of_[index] != command->generation;
  const bool done = was_dropped || space.retired() == 0 || space.reclaimed() >= command->goal;
  // Another one may be under way: it says so again in its turn.
  space.SweepAll(!done);
  if (done) request->bytes_after = was_dropped ? 0 : space.held_bytes();
  return done;
}

bool Shard::StepDrop(Command* command, CommandRequest* request) {
  SpaceEntry& entry = *command->entry;
  const uint32_t space = space_of_entry_[entry.index()];
  const uint16_t shards = port_.catalogue->shards();
  switch (command->step) {
    case Command::Step::kBegin:
    case Command::Step::kSweeping:
    case Command::Step::kRebuilding:
      if (space != kNoNode && HasUnderWay(space)) return false;
      command->step = Command::Step::kForgetting;
      return false;
    case Command::Step::kForgetting:
      if (space != kNoNode) {
        // A save that has begun since has what was there; one with half of it there is not.
        if (!ForgetSessions(space, &command->session_cursor) || HasUnderWay(space)) return false;
        request->observations = spaces_[space]->live() + spaces_[space]->hidden();
        request->bytes_before = spaces_[space]->held_bytes();
      }
      entry.JoinDrop(stamp_clock_.Next(unix_ns_));
      command->step = Command::Step::kJoined;
      return false;
    case Command::Step::kJoined: {
      if (!entry.AllJoined(shards)) return false;
      const size_t bytes = LogRecordBytes(entry.name().size(), 0, 0, 0);
      const bool logs = log_ != nullptr && space != kNoNode;
      if (logs && log_->JudgeRoom(bytes, true) != RefusalReason::kNone) return false;
      const CommitStamp stamp = entry.drop_stamp();
      stamp_clock_.Pass(stamp);
      port_.catalogue->EndIncarnation(&entry, stamp);
      if (space != kNoNode) FindOrMakeSpace(&entry);
      if (logs) LogDrop(space, stamp, command);
      command->step = Command::Step::kLogging;
      return false;
    }
    case Command::Step::kLogging:
      if (log_ != nullptr && log_->durable() < command->log_end) return false;
      entry.FinishDrop(shards);
      return true;
  }
  return true;
}

void Shard::LogDrop(uint32_t space, CommitStamp stamp, Command* command) {
  LogRecord record;
  record.kind = LogRecordKind::kDropSpace;
  record.stamp = stamp;
  record.space = entries_[space]->name();
  log_->Append(record, true);
  command->log_end = log_->end();
  dropped_at_[space] = log_->end();
}

// Something of the space would be missed, were it gone now.
bool Shard::HasUnderWay(uint32_t space) {
  if (saver_ != nullptr && saver_->active()) return true;
  if (linker_.active() && linking_space_ == space) return true;
  if (sweep_.active() && sweeping_space_ == space) return true;
  for (uint64_t ticket = ledger_.oldest_ticket(); ticket < ledger_.next_ticket(); ++ticket) {
    const Forward& forward = ledger_.At(ticket);
    if (forward.step == Forward::Step::kAnswered) continue;
    if (forward.request != nullptr && forward.space == entries_[space]->index()) return true;
    if (forward.session != nullptr && forward.session->space == space) return true;
  }
  return false;
}

// Some of them. True when that was all.
bool Shard::ForgetSessions(uint32_t space, uint64_t* cursor) {
  if (*cursor == 0) {
    sessions_.ForEachAttached(space,
                              [this](Session& session) { sessions_.Detach(&session, now_ns_); });
    attached_[space] = 0;
  }
  sessions_.ForgetSpace(space, cursor, kSessionsForgotten);
  counters_[ShardCounter::kSessions].Set(sessions_.size());
  return *cursor == 0;
}

// From then on no save may begin: the incarnation can end at any moment.
bool Shard::JoinsDrop() const {
  return std::ranges::any_of(
      commands_, [](const Command& command) { return command.step >= Command::Step::kJoined; });
}

// ---------------------------------------------------------------------------------------------
// Parts of incarnations

void Shard::RenewStale() {
  const uint64_t ended = port_.catalogue->generations_ended();
  if (ended == generations_seen_) return;
  generations_seen_ = ended;
  for (uint32_t space = 0; space < spaces_.size(); ++space) {
    if (generation_of_[space] != entries_[space]->generation()) Renew(space);
  }
}

// An empty part in place of what there is.
void Shard::Renew(uint32_t space) {
  const SpaceEntry& entry = *entries_[space];
  const uint32_t generation = entry.generation();
  const CommitStamp birth = entry.birth();
  // Only in a recovery is there anything.
  while (linker_.active() && linking_space_ == space) StepLink(kFinishDistances);
  while (sweep_.active() && sweeping_space_ == space) StepSweep(kFinishDistances);
  if (is_recovering()) {
    CheckpointLoading& loading = recovery_->loading;
    if (loading.loader != nullptr && loading.space == space) {
      loading.loader.reset();
      loading.apart.reset();
      loading.passes_over = true;
    }
  }
  condemned_.push_back({.space = std::move(spaces_[space]), .epoch = epochs_.Close()});
  spaces_[space] =
      std::make_unique<Space>(std::string(entry.name()), OptionsOf(entry), &heap_, &epochs_);
  generation_of_[space] = generation;
  PublishUse(space);
  if (birth == birth_of_[space]) return;
  birth_of_[space] = birth;
  logged_partitions_[space] = 0;
  announced_links_[space] = 0;
  credit_due_[space] = false;
  if (is_recovering()) {
    uint64_t cursor = 0;
    while (!ForgetSessions(space, &cursor)) {
    }
  }
}

// Some of what was dropped. Returns how much was done.
int Shard::FreeCondemned() {
  if (condemned_.empty()) return 0;
  Condemned& first = condemned_.front();
  if (saver_ != nullptr && saver_->active()) return 0;
  if (!epochs_.Passed(first.epoch)) return 0;
  if (first.space->Dismantle(kNodesFreed)) condemned_.erase(condemned_.begin());
  return 1;
}

}  // namespace engram
