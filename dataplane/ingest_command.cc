// Commands of an ingress core (see ingest_core.h): what is done to a whole space goes to every
// shard, or to none, and is answered when all have. A connection has one at a time.

#include <algorithm>
#include <new>

#include "dataplane/ingest_core.h"
#include "src/core/check.h"

namespace engram {

bool IngestCore::TakeCommand(Connection& connection, const FrameHeader& header,
                             std::span<const std::byte> body) {
  CommandView command;
  RefusalReason reason = DecodeCommand(body, &command);
  if (reason == RefusalReason::kBadFrame) {
    return RefuseAndClose(connection, reason, header.type, header.sequence);
  }
  if (reason == RefusalReason::kNone) reason = PushCommand(connection, command, header.sequence);
  if (reason != RefusalReason::kNone) {
    RefuseRequest(connection, reason, header.type, header.sequence);
  }
  return true;
}

// A drop begins once nothing can keep it from reaching every shard.
RefusalReason IngestCore::PushCommand(Connection& connection, const CommandView& command,
                                      uint64_t request_id) {
  if (connection.commands_in_flight > 0) return RefusalReason::kBusy;
  SpaceEntry* entry = port_.catalogue->Find(command.space);
  if (entry == nullptr) return RefusalReason::kUnknownSpace;
  request_shards_.clear();
  for (uint16_t s = 0; s < shards(); ++s) request_shards_.push_back(ShardId(s));
  const RefusalReason reason = AcquireForEach(request_shards_, kRequestBodyOffset);
  if (reason != RefusalReason::kNone) return reason;
  if (command.what == SpaceCommand::kDrop ? !entry->BeginDrop() : entry->is_dropping()) {
    ReleaseForEach(request_shards_.size());
    return RefusalReason::kSpaceDropping;
  }
  if (command.what == SpaceCommand::kRebuild && !entry->BeginRebuild(shards())) {
    ReleaseForEach(request_shards_.size());
    return RefusalReason::kBusy;
  }
  for (uint16_t s = 0; s < shards(); ++s) {
    auto* request = new (port_.slab->At(request_slots_[s])) CommandRequest;
    request->what = command.what;
    request->origin = OriginOf(connection);
    request->request_id = request_id;
    request->space = SpaceName(command.space);
    const bool pushed = LaneOf(ShardId(s), Lane::kRecall).TryPush(request_slots_[s]);
    CHECK(pushed, "the ring had room");
    ++connection.commands_in_flight;
  }
  connection.command = {.what = command.what};
  connection.command_reason = RefusalReason::kNone;
  return RefusalReason::kNone;
}

// One shard's answer.
void IngestCore::FinishCommand(Connection& connection, const Completion& completion) {
  const auto* request = reinterpret_cast<const CommandRequest*>(port_.slab->At(completion.slot));
  CommandDoneBody& sums = connection.command;
  sums.observations += request->observations;
  sums.bytes_before += request->bytes_before;
  sums.bytes_after += request->bytes_after;
  if (completion.reason != RefusalReason::kNone) connection.command_reason = completion.reason;
  if (--connection.commands_in_flight > 0) return;
  AskForWhatFollows(sums.what);
  if (connection.state == State::kClosing) return;
  if (connection.command_reason != RefusalReason::kNone) {
    RefuseRequest(connection, connection.command_reason, FrameType::kCommand, completion.sequence);
    return;
  }
  SendCommandDone(network_, connection.id, connection.session.value(), completion.sequence, sums);
}

// What follows is the same where nobody is told.
void IngestCore::FinishOrphanedCommand(const Completion& completion) {
  const auto orphan =
      std::ranges::find(orphaned_commands_, completion.origin, &OrphanedCommand::origin);
  CHECK(orphan != orphaned_commands_.end(), "a command belongs to a connection or has lost it");
  if (--orphan->in_flight > 0) return;
  orphaned_commands_.erase(orphan);
  AskForWhatFollows(reinterpret_cast<const CommandRequest*>(port_.slab->At(completion.slot))->what);
}

// What lies in the logs goes the same way: a compaction rewrites what is partly dead, a checkpoint
// finds the segments in which nothing lives.
void IngestCore::AskForWhatFollows(SpaceCommand what) {
  std::atomic<uint64_t>* follows = nullptr;
  if (what == SpaceCommand::kDrop) follows = options_.checkpoint_requests;
  if (what == SpaceCommand::kCompact) follows = options_.compaction_requests;
  if (follows != nullptr) follows->fetch_add(1);
}

}  // namespace engram
