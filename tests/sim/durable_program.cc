#include "tests/sim/durable_program.h"

#include <algorithm>
#include <array>
#include <cstdio>

namespace engram {

DurableProgram::DurableProgram(const ProgramOptions& options, ProgramStats* stats)
    : options_(options),
      stats_(*stats),
      random_(MixBits(options.seed)),
      rebuild_random_(MixBits(options.seed + 2)),
      rig_(std::make_unique<DurableRig>(MixBits(options.seed + 1))) {
  rig_->disks.lie = options.lie;
  Draw();
}

void DurableProgram::Run() {
  uint64_t steps = 200 + random_.Below(600);
  if (options_.rewrites) steps *= 2;
  for (uint64_t i = 0; i < steps && violation_.empty(); ++i) Step();
  if (!violation_.empty()) return;
  Finish();
  if (!violation_.empty()) return;
  if (options_.checkpoints) CheckpointAll();
  if (!violation_.empty()) return;
  Crash(random_.Below(2) == 0);
  StartAgain();
  if (options_.checkpoints && violation_.empty()) ExpectNothingReplayed();
}

void DurableProgram::Violate(const std::string& what) {
  if (violation_.empty()) violation_ = what;
  Say("VIOLATION: " + what);
}

void DurableProgram::Say(const std::string& what) const {
  if (options_.talks)
    std::printf("%8llu  %s\n", static_cast<unsigned long long>(now_), what.c_str());
}

// ---- Set-up ----

void DurableProgram::Draw() {
  // With checkpoints there are graphs, which are rebuilt at times.
  if (options_.checkpoints && rebuild_random_.Below(4) != 0) {
    graph_from_ = static_cast<uint32_t>(rebuild_random_.Below(4));
  }
  max_shards_ = static_cast<uint16_t>(1 + random_.Below(3));
  reshards_ = max_shards_ > 1 && OneIn(3) && options_.reshards;
  producers_ = static_cast<uint16_t>(1 + random_.Below(2));
  grow_at_ = OneIn(2) ? 0 : 3 + random_.Below(8);
  flips_bits_ = OneIn(4) && !options_.checkpoints;
  faulty_ = OneIn(2);
  max_delay_ns_ = OneIn(3) ? 2 * kNanosPerMilli : 200 * kNanosPerMicro;
  block_pages_ = random_.Below(3);
  max_writes_ = static_cast<uint32_t>(1 + random_.Below(3));
  segment_bytes_ = static_cast<uint32_t>(128 * 1024 << random_.Below(2));
  ahead_ = static_cast<uint32_t>(1 + random_.Below(2));
  big_payloads_ = OneIn(3);
  fills_segments_ = options_.rewrites || (options_.checkpoints && OneIn(2));
  rewrite_below_permille_ = static_cast<uint32_t>(500 * random_.Below(3));
  const size_t spaces = 1 + random_.Below(2);
  constexpr std::array<Durability, 4> kDurabilities{Durability::kFsync, Durability::kFsync,
                                                    Durability::kInterval, Durability::kMemory};
  for (size_t s = 0; s < spaces; ++s) {
    ModelSpace space{.name = "space" + std::to_string(s), .settings = {}, .ids = {}, .vectors = {}};
    space.settings.metric = Metric::kL2;
    space.settings.durability = kDurabilities[random_.Below(kDurabilities.size())];
    space.settings.partitions = 1;
    if (!reshards_ && OneIn(2)) {
      space.settings.partitions = static_cast<uint16_t>(1 + random_.Below(max_shards_));
    }
    space.ids.resize(4 + random_.Below(20));
    for (IdState& id : space.ids) id.in_turn = OneIn(3);
    spaces_.push_back(std::move(space));
  }
  const size_t clients = 1 + random_.Below(4);
  for (size_t c = 0; c < clients; ++c) {
    Client client;
    client.in_session = !OneIn(3);
    client.space = random_.Below(spaces);
    client.session.producer = random_.Below(producers_);
    client.session.space = spaces_[client.space].name;
    clients_.push_back(std::move(client));
  }
  SetDelays(false);
  Say("seed " + std::to_string(options_.seed) + ": shards " + std::to_string(max_shards_) +
      (reshards_ ? " or fewer" : "") + ", grow at " + std::to_string(grow_at_));
  for (const ModelSpace& space : spaces_) {
    Say(space.name + " durability " + std::to_string(static_cast<int>(space.settings.durability)) +
        " partitions " + std::to_string(space.settings.partitions) + " ids " +
        std::to_string(space.ids.size()));
  }
}

DurableSetup DurableProgram::Setup() {
  DurableSetup setup;
  shards_ = max_shards_;
  if (reshards_) shards_ = static_cast<uint16_t>(1 + random_.Below(max_shards_));
  setup.shards = shards_;
  setup.max_partitions = shards_;
  setup.producers = producers_;
  setup.shard = DurableRig::SmallShard();
  setup.shard.seed = random_.Next();
  setup.shard.grow_partition_at = grow_at_;
  setup.shard.graph_from = graph_from_;
  setup.shard.max_forwards = static_cast<uint32_t>(4u << random_.Below(5));
  setup.writer = DurableRig::SmallWriter();
  setup.writer.block_bytes += static_cast<uint32_t>(block_pages_ * kLogPageBytes);
  setup.writer.max_writes = max_writes_;
  setup.keeper = DurableRig::SmallKeeper();
  setup.keeper.segment_bytes = segment_bytes_;
  setup.keeper.ahead = ahead_;
  for (const ModelSpace& space : spaces_) setup.spaces.emplace_back(space.name, space.settings);
  setup.checkpointer.retry_ns = 5 * kNanosPerMilli;
  if (options_.checkpoints && OneIn(2)) setup.checkpointer.every_bytes = 64 * 1024;
  setup.checkpointer.retention.free_after_ns =
      static_cast<int64_t>(random_.Below(2) * kNanosPerMilli);
  setup.checkpointer.retention.rewrite_below_permille = rewrite_below_permille_;
  setup.checkpointer.retention.rewrite_bytes_per_second = uint64_t{1} << 30;
  setup.checkpointer.retention.merge_vault_files = 3;
  return setup;
}

void DurableProgram::SetDelays(bool faults) {
  SimulatedDiskFaults set;
  set.min_delay_ns = 5 * kNanosPerMicro;
  set.max_delay_ns = max_delay_ns_;
  if (faults) {
    const auto some = [&] { return OneIn(2) ? 0.02 * static_cast<double>(random_.Below(15)) : 0; };
    set.write_error_probability = some();
    set.flush_error_probability = some();
    set.read_error_probability = OneIn(4) ? 0.01 : 0;
    if (OneIn(3)) {
      set.capacity_bytes = rig_->medium.used_bytes() + random_.Below(segment_bytes_);
    }
    Say("faults: write " + std::to_string(set.write_error_probability) + " flush " +
        std::to_string(set.flush_error_probability) +
        (set.capacity_bytes != UINT64_MAX ? " full" : ""));
  }
  has_faults_ = faults;
  had_faults_ |= faults;
  rig_->medium.SetFaults(set);
}

// ---- Steps ----

void DurableProgram::Step() {
  ++now_;
  rig_->clock.AdvanceNs(static_cast<int64_t>(random_.Below(40'000)));
  if (!rig_->running()) {
    Start();
    return;
  }
  if (rig_->disks.power_failed) {
    AfterPowerFailed();
    return;
  }
  if (recovering_) {
    StepRecovery();
    return;
  }
  if (options_.checkpoints && StepCheckpoints()) return;
  const uint64_t choice = random_.Below(1'000);
  if (choice < 560) {
    PollShard();
  } else if (choice < 860) {
    Send(random_.Below(clients_.size()));
  } else if (choice < 930) {
    rig_->store->Poll();
  } else if (choice < 950) {
    rig_->clock.AdvanceNs(static_cast<int64_t>(random_.Below(3 * kNanosPerMilli)));
  } else if (choice < 970) {
    CheckRecall();
  } else if (choice < 980) {
    if (faulty_) SetDelays(!has_faults_);
  } else if (choice < 984) {
    if (faulty_) {
      rig_->medium.StallUntil(rig_->clock.MonotonicNs() +
                              static_cast<int64_t>(random_.Below(20 * kNanosPerMilli)));
      Say("stall");
    }
  } else if (choice < 990) {
    Reconnect(random_.Below(clients_.size()));
  } else if (options_.rewrites && !OneIn(8)) {
    return;
  } else if (choice < 994) {
    Crash(OneIn(2));
  } else if (choice < 997) {
    // Amid what goes on, and after most of it was begun.
    if (rig_->disks.power_cut_in == 0) rig_->disks.power_cut_in = 1 + random_.Below(30);
  }
}

void DurableProgram::PollShard() {
  const size_t shard = random_.Below(shards_);
  rig_->shards->PollShard(shard);
  TakeCompletions();
}

void DurableProgram::PollAll() {
  rig_->clock.AdvanceNs(static_cast<int64_t>(1'000 + random_.Below(40'000)));
  for (size_t s = 0; s < shards_; ++s) {
    rig_->shards->PollShard(s);
    TakeCompletions();
  }
  rig_->shards->ReadRecords();
  if (OneIn(4)) rig_->store->Poll();
  if (options_.checkpoints && !recovering_ && OneIn(4)) PollCheckpointer();
}

// ---- What is checked ----

std::string DurableProgram::LivePayload(size_t space, size_t id) const {
  CommitStamp latest = kNoStamp;
  std::string payload;
  for (const auto& shard : rig_->shards->shards) {
    const Space* part = shard->FindSpace(spaces_[space].name);
    if (part == nullptr) continue;
    const NodeId node = part->FindLive(IdText(space, id));
    if (node == kNoNode) continue;
    const StoredObservation stored = part->Get(node);
    if (stored.stamp < latest) continue;
    latest = stored.stamp;
    payload = rig_->PayloadOf(stored).value_or("unreadable:");
  }
  return payload;
}

void DurableProgram::ExpectPossible(size_t space, size_t id, const std::string& when) {
  // What was in memory alone is gone with the machine.
  if (rig_->disks.power_failed) return;
  const std::string live = LivePayload(space, id);
  const std::set<Content> possible = PossibleContents(spaces_[space].ids[id]);
  for (const Content& content : possible) {
    if ((content.is_live() ? content.payload : "") == live) return;
  }
  std::string text = IdText(space, id) + " is " + Brief(live) + " " + when + "; possible:";
  for (const Content& content : possible) {
    text += " " + Brief(content.payload) + (content.hidden ? " hidden" : "");
  }
  for (const Operation* operation : spaces_[space].ids[id].operations) {
    text += "\n    " + Describe(*operation) + " status " +
            std::to_string(static_cast<int>(operation->status)) + " sent " +
            std::to_string(operation->sent_at) + " acked " +
            (operation->acked_at == kNever ? "-" : std::to_string(operation->acked_at));
  }
  Violate(text);
}

void DurableProgram::Verify(const std::string& when) {
  ++stats_.verified;
  for (const auto& shard : rig_->shards->shards) {
    if (const auto sound = shard->CheckInvariants(); !sound) {
      Violate("invariants " + when + ": " + sound.error().message);
    }
  }
  for (size_t s = 0; s < spaces_.size() && violation_.empty(); ++s) {
    std::set<std::string> seen;
    uint64_t hidden = 0;
    for (const auto& shard : rig_->shards->shards) {
      const Space* part = shard->FindSpace(spaces_[s].name);
      if (part == nullptr) continue;
      hidden += part->hidden();
      for (NodeId node = 0; node < part->node_count(); ++node) {
        if (!part->IsVisible(node, kOpenStamp - 1)) continue;
        const std::string id(part->Get(node).id);
        if (!seen.insert(id).second) Violate(id + " is there twice " + when);
      }
    }
    uint64_t least_hidden = 0;
    uint64_t most_hidden = 0;
    for (size_t id = 0; id < spaces_[s].ids.size() && violation_.empty(); ++id) {
      ExpectPossible(s, id, when);
      const auto possible = PossibleContents(spaces_[s].ids[id]);
      const bool any = std::ranges::any_of(possible, &Content::hidden);
      most_hidden += any ? 1 : 0;
      least_hidden += any && std::ranges::all_of(possible, &Content::hidden) ? 1 : 0;
    }
    if (violation_.empty() && (hidden < least_hidden || hidden > most_hidden)) {
      Violate(std::to_string(hidden) + " are hidden " + when + ", not " +
              std::to_string(least_hidden) + " to " + std::to_string(most_hidden));
    }
  }
  for (int i = 0; i < 4 && violation_.empty() && !rig_->disks.power_failed; ++i) CheckRecall();
}

void DurableProgram::Collapse() {
  for (size_t s = 0; s < spaces_.size() && violation_.empty(); ++s) {
    if (spaces_[s].settings.durability != Durability::kFsync) continue;
    for (size_t i = 0; i < spaces_[s].ids.size(); ++i) {
      IdState& id = spaces_[s].ids[i];
      const std::string live = LivePayload(s, i);
      std::set<Content> fitting;
      for (const Content& content : PossibleContents(spaces_[s].ids[i])) {
        if ((content.is_live() ? content.payload : "") == live) fitting.insert(content);
      }
      if (fitting.size() != 1) continue;  // Hidden or deleted cannot be told apart.
      id.base = *fitting.begin();
      std::erase_if(id.operations, [](const Operation* operation) {
        return operation->status != Status::kPending;
      });
    }
  }
}

void DurableProgram::CheckRecall() {
  const size_t s = random_.Below(spaces_.size());
  const size_t i = random_.Below(spaces_[s].ids.size());
  const std::string live = LivePayload(s, i);
  if (live.empty()) return;
  const IdState& id = spaces_[s].ids[i];
  for (const Operation* operation : id.operations) {
    if (operation->outstanding > 0) return;
  }
  ++stats_.recalls;
  const Counter& read = rig_->shards->records->counter(RecordReaderCounter::kRecordsRead);
  const uint64_t read_before = read.Read();
  std::optional<Hit> best;
  for (size_t shard = 0; shard < shards_; ++shard) {
    if (rig_->shards->shards[shard]->FindSpace(spaces_[s].name) == nullptr) continue;
    const uint64_t request = rig_->shards->PushRecall(
        0, spaces_[s].name, spaces_[s].vectors.at(live), {.k = 1, .with_payload = true}, shard);
    // As long as records may be read again.
    for (int n = 0; n < 20'000 && !rig_->shards->answers[request].done; ++n) {
      if (rig_->disks.power_failed) return;
      PollAll();
    }
    const RigAnswer& answer = rig_->shards->answers[request];
    if (!answer.done) Violate("a recall was not answered");
    for (const Hit& hit : answer.hits) {
      if (!best || hit.score < best->score) best = hit;
    }
  }
  stats_.records_read += read.Read() - read_before;
  if (rig_->disks.power_failed) return;
  if (!best || best->id != IdText(s, i) || best->payload != live) {
    Violate(IdText(s, i) + " with " + Brief(live) + " is not recalled by its vector, but " +
            (best ? best->id + " with " + Brief(best->payload) : "nothing"));
  }
}

std::pair<uint64_t, std::string> RunSeeds(const Seeds& seeds, const ProgramOptions& like,
                                          ProgramStats* stats) {
  for (uint64_t seed = seeds.first; seed < seeds.end(); ++seed) {
    ProgramOptions options = like;
    options.seed = seed;
    DurableProgram program(options, stats);
    program.Run();
    if (!program.violation().empty()) return {seed, program.violation()};
  }
  return {0, ""};
}

}  // namespace engram
