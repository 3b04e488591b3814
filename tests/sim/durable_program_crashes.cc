#include "tests/sim/durable_program.h"

#include <algorithm>

#include "index/log/log_reader.h"
#include "src/core/log_files.h"

namespace engram {

// ---- Crashes and starts ----

void DurableProgram::AfterPowerFailed() {
  TakeCompletions();
  if (!violation_.empty()) return;
  Crash(true);
}

void DurableProgram::Crash(bool power) {
  if (!rig_->running()) return;
  if (recovering_) ++stats_.cuts_in_recovery;
  NoteRetention();
  NoteRebuild();
  if (!power && OneIn(2)) {
    // What the kernel has still goes on.
    rig_->clock.AdvanceNs(5 * kNanosPerMilli);
  }
  if (power) {
    ++stats_.power_cuts;
    rig_->CutPower();
  } else {
    ++stats_.kills;
    rig_->Kill();
  }
  NoteStopped(power);
}

void DurableProgram::NoteRetention() {
  pin_ = 0;
  pinned_.clear();
  if (rig_->checkpointer == nullptr) return;
  const Retention& retention = rig_->checkpointer->retention();
  stats_.segments_freed += retention.counter(RetentionCounter::kFreed);
  stats_.records_taken_over += retention.counter(RetentionCounter::kTakenOver);
}

void DurableProgram::NoteStopped(bool power) {
  Say(power ? "power cut" : "kill");
  power_was_cut_ = power;
  rig_->disks.power_cut_in = 0;
  for (Client& client : clients_) {
    const Durability durability = spaces_[client.space].settings.durability;
    const bool keeps =
        durability == Durability::kFsync || (durability == Durability::kInterval && !power);
    client.attached = false;
    client.out.clear();
    // What it was told before does not count any more where it may be lost.
    if (durability == Durability::kFsync) {
      client.durable = std::max(client.durable, client.settled);
    }
    client.floor = keeps ? std::max(client.floor, client.settled) : client.durable;
    stats_.lowered += client.settled > client.floor ? 1 : 0;
    client.settled = std::min(client.settled, client.floor);
    for (Operation* operation : client.operations) operation->outstanding = 0;
  }
  for (const auto& operation : operations_) {
    if (clients_[operation->client].in_session) continue;
    operation->outstanding = 0;
    const Durability durability = spaces_[operation->space].settings.durability;
    const bool keeps =
        durability == Durability::kFsync || (durability == Durability::kInterval && !power);
    if (operation->status == Status::kOut || (operation->status == Status::kCertain && !keeps)) {
      operation->status = Status::kMaybe;
    }
  }
}

void DurableProgram::Start() {
  UndoFlip();
  if (flips_bits_ && power_was_cut_ && OneIn(2)) FlipABit();
  // Somebody sets the clock while the daemon is down.
  if (OneIn(8)) rig_->clock.StepWallNs(-static_cast<int64_t>(random_.Below(kNanosPerSecond)));
  const uint16_t before = shards_;
  had_faults_ = has_faults_;
  // Also while it reads the manifest and removes the logs of shards that are
  // gone.
  const DurableSetup setup = Setup();
  if (options_.checkpoints && OneIn(6)) rig_->disks.power_cut_in = 1 + random_.Below(6);
  const auto started = rig_->Start(setup);
  if (rig_->disks.power_failed) {
    ++stats_.crashes_before_recovery;
    rig_->CutPower();
    NoteStopped(true);
    return;
  }
  if (!started && had_faults_) {
    ++stats_.failed_starts;
    Say("start: " + started.error().message);
    SetDelays(false);
    rig_->Kill();
    return;
  }
  if (!started) {
    Violate("start: " + started.error().message);
    return;
  }
  ++stats_.starts;
  stats_.reshards += starts_++ > 0 && before != shards_ ? 1 : 0;
  for (uint16_t s = 0; s < shards_; ++s) {
    for (const CheckpointSource& source : rig_->store->ForShard(s).checkpoints) {
      ++stats_.loaded;
      stats_.loaded_elsewhere += source.shards != shards_ ? 1 : 0;
    }
  }
  if (options_.checkpoints) {
    const auto root = rig_->medium.Open(DurableRig::kRootFolder);
    const auto manifest = ReadManifest(*root);
    if (manifest && *manifest) stats_.logs_kept += (*manifest)->kept.size();
  }
  recovering_ = true;
  recovery_steps_ = 0;
  Say("start with " + std::to_string(shards_) + " shards");
}

void DurableProgram::StepRecovery() {
  rig_->shards->PollShard(random_.Below(shards_));
  TakeCompletions();
  if (OneIn(8)) rig_->store->Poll();
  if (++recovery_steps_ > 200'000) Violate("recovery does not end");
  if (rig_->disks.power_failed) return;
  if (OneIn(500)) {
    Crash(OneIn(2));
    return;
  }
  if (OneIn(300) && rig_->disks.power_cut_in == 0) {
    rig_->disks.power_cut_in = 1 + random_.Below(10);
  }
  if (const std::string error = rig_->RecoveryError(); !error.empty()) {
    FailedStart("recovery: " + error);
    return;
  }
  if (rig_->IsRecovering()) return;
  if (OneIn(2)) {
    if (auto prepared = rig_->store->PrepareFirst(); !prepared) {
      if (!rig_->disks.power_failed) FailedStart("prepare: " + prepared.error().message);
      return;
    }
  }
  recovering_ = false;
  AfterRecovery();
}

void DurableProgram::FailedStart(const std::string& why) {
  ++stats_.failed_starts;
  Say(why);
  if (!had_faults_) Violate(why);
  SetDelays(false);
  Crash(false);
}

void DurableProgram::AfterRecovery() {
  if (options_.talks) {
    for (const auto& each : rig_->shards->shards) {
      for (const Note& note : each->recovery().notes) Say(note.text);
    }
  }
  if (flip_) {
    if (rig_->MendedBits() != 1) {
      Violate("a flipped bit was mended " + std::to_string(rig_->MendedBits()) +
              " times: " + flip_->file + " bit " + std::to_string(flip_->bit));
    }
  } else if (rig_->MendedBits() != 0) {
    Violate("a bit was mended that was not flipped");
  }
  for (size_t c = 0; c < clients_.size() && violation_.empty(); ++c) {
    if (rig_->disks.power_failed) return;
    if (clients_[c].in_session) {
      if (clients_[c].session.id.value() != 0) Attach(c);
    } else {
      clients_[c].attached = true;
    }
  }
  if (rig_->disks.power_failed || !violation_.empty()) return;
  Verify("after a restart");
  Collapse();
}

void DurableProgram::StartAgain() {
  rig_->disks.power_cut_in = 0;
  SetDelays(false);
  faulty_ = false;
  for (int i = 0; i < 1'000'000 && violation_.empty(); ++i) {
    ++now_;
    rig_->clock.AdvanceNs(static_cast<int64_t>(random_.Below(40'000)));
    if (!rig_->running()) {
      Start();
    } else if (rig_->disks.power_failed) {
      AfterPowerFailed();
    } else if (recovering_) {
      StepRecovery();
    } else {
      return;
    }
  }
  Violate("it does not start");
}

void DurableProgram::Finish() {
  SetDelays(false);
  faulty_ = false;
  finishing_ = true;
  for (int i = 0; i < 200'000 && violation_.empty(); ++i) {
    if (!rig_->running() || recovering_ || rig_->disks.power_failed) {
      StartAgain();
      continue;
    }
    rig_->disks.power_cut_in = 0;
    ++now_;
    PollAll();
    for (size_t c = 0; c < clients_.size(); ++c) {
      Client& client = clients_[c];
      if (!client.in_session) continue;
      if (!client.attached && client.session.id.value() == 0) continue;
      Send(c);
    }
    if (i % 16 == 0 && AllSettled()) {
      Verify("at the end");
      for (const auto& each : rig_->shards->shards) {
        stats_.grown += each->counter(ShardCounter::kSpacesGrown).Read();
      }
      return;
    }
  }
  Violate("it does not come to rest");
  for (const Client& client : clients_) {
    Say("client settled " + std::to_string(client.settled) + " of " +
        std::to_string(client.operations.size()) + ", out " + std::to_string(client.out.size()));
  }
}

bool DurableProgram::AllSettled() const {
  for (const Client& client : clients_) {
    if (client.settled < client.operations.size() || !client.out.empty()) return false;
  }
  return std::ranges::all_of(rig_->shards->shards, [](const auto& each) {
    return each->Idle() && each->counter(ShardCounter::kLogUnsettledBytes).Read() == 0;
  });
}

// ---- Bits that flip ----

void DurableProgram::FlipABit() {
  std::vector<std::pair<Flip, uint64_t>> places;
  uint64_t bits = 0;
  for (const uint16_t log : rig_->logs) {
    const std::string folder = LogFolder(log);
    const auto disk = rig_->medium.Open(folder);
    LogInstance instance;
    instance.fill(7);
    LogReader reader(disk.get(), log, instance);
    rig_->medium.SetFaults({});
    bool ok = reader.Open(0).has_value();
    LogEntry entry;
    while (ok) {
      const auto step = reader.Next(&entry);
      ok = step.has_value();
      if (!ok || *step == LogStep::kEnd) break;
      if (*step == LogStep::kPending) disk->Wait(kNanosPerSecond);
    }
    SetDelays(has_faults_);
    if (!ok) {
      Violate("the log cannot be read");
      return;
    }
    for (const LogReader::Segment& segment : reader.segments()) {
      if (segment.number > SegmentOf(reader.end()) || !segment.trouble.empty()) continue;
      if (segment.live_bytes <= kLogPageBytes) continue;
      bits += uint64_t{segment.live_bytes} * 8;
      places.push_back(
          {Flip{.folder = folder, .file = SegmentName(segment.number), .bit = 0}, bits});
    }
  }
  if (bits == 0) return;
  const uint64_t drawn = random_.Below(bits);
  uint64_t begin = 0;
  for (auto& [place, end] : places) {
    if (drawn < end) {
      flip_ = place;
      flip_->bit = drawn - begin;
      break;
    }
    begin = end;
  }
  ++stats_.flips;
  rig_->medium.FlipBit(flip_->folder, flip_->file, flip_->bit);
  Say("flip bit " + std::to_string(flip_->bit) + " of " + flip_->folder + "/" + flip_->file);
}

void DurableProgram::UndoFlip() {
  if (!power_was_cut_) return;
  if (flip_) rig_->medium.FlipBit(flip_->folder, flip_->file, flip_->bit);
  flip_.reset();
}

}  // namespace engram
