#include "tests/sim/durable_program.h"

#include <algorithm>
#include <cstring>

#include "src/core/log_files.h"

namespace engram {

void DurableProgram::BeginRebuild() {
  if (rig_->shards->commands_under_way > 0) return;
  const std::string& name = spaces_[rebuild_random_.Below(spaces_.size())].name;
  rig_->shards->PushCommand(SpaceCommand::kRebuild, name);
  ++stats_.rebuilds;
  Say("a rebuild of " + name + " begins");
}

void DurableProgram::NoteRebuild() {
  if (rig_->shards->commands_under_way > 0) ++stats_.crashes_in_rebuilds;
  for (const auto& shard : rig_->shards->shards) {
    for (const ModelSpace& space : spaces_) {
      const Space* part = shard->FindSpace(space.name);
      if (part != nullptr) stats_.relinked += part->relinked();
    }
  }
}

bool DurableProgram::StepCheckpoints() {
  if (graph_from_ != SpaceOptions::kGraphFrom && rebuild_random_.Below(60) == 0) BeginRebuild();
  const uint64_t choice = random_.Below(1'000);
  if (choice < 100 || (options_.rewrites && choice >= 700 && choice < 980)) {
    PollCheckpointer();
    rig_->store->Poll();
    return true;
  }
  if (choice < 112) {
    rig_->checkpointer->Request();
    Say("a checkpoint is asked for");
    return true;
  }
  if (choice < 115) {
    rig_->checkpointer->RequestCompaction();
    Say("a compaction is asked for");
    return true;
  }
  if (choice >= 980) {
    Pin();
    return true;
  }
  if (choice < 135 && rig_->checkpointer->retention().is_taking_over()) {
    ++stats_.crashes_in_takeovers;
    if (OneIn(2)) {
      Crash(OneIn(2));
    } else if (rig_->disks.power_cut_in == 0) {
      rig_->disks.power_cut_in = 1 + random_.Below(12);
    }
    return true;
  }
  if (choice < 122 && rig_->checkpointer->busy() && (!options_.rewrites || OneIn(8))) {
    ++stats_.crashes_in_checkpoints;
    if (OneIn(2)) {
      Crash(OneIn(2));
    } else if (rig_->disks.power_cut_in == 0) {
      rig_->disks.power_cut_in = 1 + random_.Below(12);
    }
    return true;
  }
  return false;
}

void DurableProgram::PollCheckpointer() {
  if (rig_->disks.power_failed) return;
  rig_->checkpointer->Poll([this](const Note& note) {
    Say(note.text);
    const bool failed = note.severity == Severity::kError;
    ++(failed ? stats_.failed_checkpoints : stats_.checkpoints);
    if (failed && !had_faults_ && !rig_->disks.power_failed) Violate(note.text);
  });
}

void DurableProgram::Pin() {
  constexpr uint32_t kPlace = 1;
  if (pin_ != 0) {
    for (const PinnedRead& read : pinned_) {
      const LogPosition position = PositionOf(read.address);
      const std::string folder = LogFolder(LogOf(read.address));
      const std::string name = SegmentName(SegmentOf(position));
      const auto bytes = rig_->medium.BytesOf(folder, name, OffsetOf(position), read.bytes);
      LogRecord record;
      if (!bytes ||
          ParseLogRecord(*bytes, read.address, &record, nullptr) != LogRecordFault::kNone ||
          record.id != read.id || record.payload.size() != read.payload.size() ||
          std::memcmp(record.payload.data(), read.payload.data(), read.payload.size()) != 0) {
        Violate(read.id + " is gone from " + folder + "/" + name + " while it is read");
      }
      ++stats_.pinned_reads;
      stats_.reads_from_vault += LogOf(read.address) == kVaultLog ? 1 : 0;
    }
    pinned_.clear();
    rig_->pins->Leave(kPlace, std::exchange(pin_, 0));
    return;
  }
  pin_ = rig_->pins->Enter(kPlace);
  for (const ModelSpace& space : spaces_) {
    for (const auto& shard : rig_->shards->shards) {
      const Space* part = shard->FindSpace(space.name);
      for (NodeId node = 0; part != nullptr && node < part->node_count(); ++node) {
        if (!part->IsVisible(node, kOpenStamp - 1) || !OneIn(3)) continue;
        const StoredObservation stored = part->Get(node);
        const uint16_t log = LogOf(stored.origin);
        if (stored.record_bytes == 0 ||
            (log < shards_ && !rig_->store->ForShard(log).log->NotDurable(stored.origin).empty())) {
          continue;
        }
        const auto payload = rig_->PayloadOf(stored);
        if (!payload) Violate(std::string(stored.id) + " cannot be read");
        pinned_.push_back(
            {stored.origin, stored.record_bytes, std::string(stored.id), payload.value_or("")});
      }
    }
  }
}

std::set<LogSegment> DurableProgram::NamedSegments() const {
  std::set<LogSegment> named;
  for (const ModelSpace& space : spaces_) {
    for (const auto& shard : rig_->shards->shards) {
      const Space* part = shard->FindSpace(space.name);
      for (NodeId node = 0; part != nullptr && node < part->node_count(); ++node) {
        const auto content = part->ContentOf(node);
        if (content && content->stored.record_bytes != 0) {
          named.insert(SegmentAt(content->stored.origin));
        }
      }
    }
  }
  return named;
}

void DurableProgram::CheckpointAll() {
  if (pin_ != 0) Pin();
  const auto await = [this] {
    const auto busy = [this] {
      const Retention& retention = rig_->checkpointer->retention();
      return rig_->checkpointer->busy() || retention.is_taking_over() || retention.has_dead();
    };
    for (int i = 0; i < 100'000 && violation_.empty() && busy(); ++i) {
      PollAll();
      PollCheckpointer();
    }
  };
  await();
  const uint64_t before = rig_->checkpointer->completed();
  rig_->checkpointer->Request();
  await();
  if (rig_->checkpointer->completed() == before) Violate("a checkpoint is not completed");
  // Until a round finds nothing to free and nothing to take over.
  const auto changes = [this] {
    const Retention& retention = rig_->checkpointer->retention();
    return retention.counter(RetentionCounter::kFreed) +
           retention.counter(RetentionCounter::kTakenOver);
  };
  uint64_t rounds = 0;
  for (uint64_t seen = kNever; violation_.empty() && seen != changes(); ++rounds) {
    seen = changes();
    rig_->checkpointer->Request();
    await();
    rig_->checkpointer->Request();
    await();
    if (rounds == 8) Violate("rounds at rest go on changing what is kept");
  }
  for (int i = 0; i < 2'000; ++i) {
    rig_->clock.AdvanceNs(100 * kNanosPerMicro);
    rig_->store->Poll();
  }
  if (violation_.empty()) ExpectRoom();
}

void DurableProgram::ExpectRoom() {
  const auto root = rig_->medium.Open(DurableRig::kRootFolder);
  const auto manifest = ReadManifest(*root);
  if (!manifest || !*manifest) {
    Violate("there is no manifest after a checkpoint");
    return;
  }
  if ((*manifest)->logs.size() != shards_) {
    Violate("the manifest is of other logs");
    return;
  }
  const std::set<LogSegment> named = NamedSegments();
  for (const CheckpointManifest::Kept& kept : (*manifest)->kept) {
    if (std::ranges::none_of(named, [&](LogSegment each) { return each.log == kept.log; })) {
      Violate(LogFolder(kept.log) + " is kept, and nothing lies in it");
    }
  }
  const auto vault = rig_->medium.Open(LogFolder(kVaultLog))->List();
  for (const DirectoryEntry& entry : *vault) {
    const auto number = SegmentNumber(entry.name);
    if (!number || !named.contains({kVaultLog, *number})) {
      Violate("vault/" + entry.name + " is left");
    }
  }
  for (const uint16_t log : rig_->logs) {
    const auto disk = rig_->medium.Open(LogFolder(log));
    const auto entries = disk->List();
    size_t files = 0;
    uint32_t last = 0;
    size_t spare = 0;
    for (const DirectoryEntry& entry : *entries) {
      const std::string place = LogFolder(log) + "/" + entry.name;
      const auto segment = SegmentNumber(entry.name);
      const bool is_named = segment && named.contains({log, *segment});
      if (log >= shards_) {
        if (!is_named) Violate(place + " is left, of a shard that is gone");
      } else if (const auto round = CheckpointRound(entry.name)) {
        ++files;
        if (*round != (*manifest)->round) Violate(place + " is left");
      } else if (segment) {
        last = std::max(last, *segment);
        spare += *segment < SegmentOf((*manifest)->logs[log].from) && !is_named ? 1 : 0;
      } else {
        Violate(place + " is none of ours");
      }
    }
    if (log >= shards_) continue;
    if (files != 1) Violate(std::to_string(files) + " checkpoints in " + LogFolder(log));
    // The log is at rest: it goes on in the segment of the checkpoint, or in
    // the next one.
    const uint32_t from = SegmentOf((*manifest)->logs[log].from);
    if (spare > DurableRig::SmallKeeper().spare || last > from + 1 + ahead_) {
      Violate(LogFolder(log) + " keeps " + std::to_string(spare) + " segments before " +
              std::to_string(from) + ", and has " + std::to_string(last));
    }
  }
}

void DurableProgram::ExpectNothingReplayed() {
  for (const auto& each : rig_->shards->shards) {
    if (const uint64_t replayed = each->recovery().replayed.load(); replayed > 0) {
      Violate(std::to_string(replayed) + " observations are replayed that were saved");
    }
  }
}

}  // namespace engram
