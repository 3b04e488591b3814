// A shard's part of a rebuild, by which all that is in a space's graph is linked anew (see shard.h;
// index/space_rebuild.cc has the steps, upkeep takes them).
//
// Nothing is logged: after a crash everything is there, linked as far as the checkpoint has it. A
// space that is dropped meanwhile is not rebuilt any more.

#include <algorithm>

#include "index/shard.h"

namespace engram {

namespace {

// What leaves a graph at once is scanned by each recall until it is linked anew. So it is this
// share of what credit lets wait for linking.
constexpr size_t kLiftedShare = 32;

}  // namespace

bool Shard::StepRebuild(Command* command, CommandRequest* request) {
  SpaceEntry& entry = *command->entry;
  const uint32_t index = space_of_entry_[entry.index()];
  if (index == kNoNode) {
    entry.FinishRebuild();
    return true;
  }
  Space& space = *spaces_[index];
  if (command->step == Command::Step::kBegin && !entry.is_dropping()) {
    command->step = Command::Step::kRebuilding;
    command->generation = generation_of_[index];
    command->goal = space.relinked();
    request->bytes_before = space.held_bytes();
    space.BeginRebuild(space.NodesInBytes(options_.unlinked_limit_bytes / kLiftedShare));
    QueueForUpkeep(index);
  }
  if (entry.is_dropping() || generation_of_[index] != command->generation) {
    command->reason = RefusalReason::kSpaceDropping;  // The space that it was to be done to.
  } else if (space.is_rebuilding()) {
    return false;
  } else {
    request->observations = space.relinked() - command->goal;
    request->bytes_after = space.held_bytes();
  }
  entry.FinishRebuild();
  return true;
}

void Shard::CountRebuildLeft() {
  uint64_t left = 0;
  for (const Command& command : commands_) {
    if (command.step != Command::Step::kRebuilding) continue;
    left += spaces_[space_of_entry_[command.entry->index()]]->rebuild_left();
  }
  counters_[ShardCounter::kRebuildLeft].Set(left);
}

}  // namespace engram
