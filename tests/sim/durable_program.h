#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "index/log/log_reader.h"
#include "src/core/hash.h"
#include "src/core/log_files.h"
#include "tests/sim/durable_rig.h"
#include "tests/sim/program_seeds.h"

// Random programs over shards with logs on a simulated disk, against a model of
// what was acknowledged: sessions and requests without one, checkpoints, faults
// of the disk, power cuts, kills, restarts.

namespace engram {

inline constexpr RefusalReason kNone = RefusalReason::kNone;
inline constexpr size_t kDimension = 4;
inline constexpr uint64_t kNever = UINT64_MAX;

enum class Status : uint8_t {
  kPending,  // it was not taken, and is going to be sent again
  kOut,      // under way
  kCertain,  // acknowledged, or a resumed session says that it was taken
  kMaybe,    // without a session, under way in a crash
  kDead,     // it was not taken, and never will be
};

struct Operation {
  ObservationOp op = ObservationOp::kUpsert;
  uint64_t number = 0;
  size_t space = 0;
  size_t id = 0;
  std::string payload{};
  std::vector<float> vector{};
  bool invalid = false;  // uses up its number
  RefusalReason skip_reason = kNone;
  size_t client = 0;
  Sequence sequence = 0;
  Status status = Status::kPending;
  int outstanding = 0;
  bool acked = false;
  uint64_t sent_at = 0;
  uint64_t acked_at = kNever;
};

// What an id holds: nothing, or a payload, which may be hidden.
struct Content {
  std::string payload;
  bool hidden = false;
  auto operator<=>(const Content&) const = default;
  bool is_live() const { return !payload.empty() && !hidden; }
};

struct IdState {
  // One operation after the other, suppress and restore among them; else
  // upserts and deletes of several clients meet.
  bool in_turn = false;
  Content base;
  std::vector<Operation*> operations;  // since then
};

struct ModelSpace {
  std::string name;
  SpaceSettings settings;
  std::vector<IdState> ids;
  std::map<std::string, std::vector<float>> vectors;  // by payload
};

struct Client {
  bool in_session = true;
  size_t space = 0;
  RigSession session;
  bool attached = false;
  std::vector<Operation*> operations;  // by sequence - 1
  Sequence settled = 0;
  Sequence next = 1;
  Sequence floor = 0;    // a resume must not say less,
  Sequence durable = 0;  // whatever happens
  bool goes_back = false;
  uint64_t wait_until = 0;
  std::vector<Operation*> out;  // without a session; in the order of their numbers
};

struct ProgramStats {
  uint64_t acks = 0;
  uint64_t refusals = 0;
  uint64_t power_cuts = 0;
  uint64_t kills = 0;
  uint64_t cuts_in_recovery = 0;
  uint64_t flips = 0;
  uint64_t starts = 0;
  uint64_t failed_starts = 0;
  uint64_t recalls = 0;
  uint64_t records_read = 0;  // for these, from the disk
  uint64_t verified = 0;
  uint64_t grown = 0;
  uint64_t disk_full = 0;
  uint64_t disk_failing = 0;
  uint64_t reshards = 0;
  uint64_t lowered = 0;  // sessions that went back, in spaces where they may
  uint64_t checkpoints = 0;
  uint64_t failed_checkpoints = 0;
  uint64_t crashes_in_checkpoints = 0;
  uint64_t crashes_before_recovery = 0;  // while the manifest is read and logs are given up
  uint64_t segments_freed = 0;
  uint64_t records_taken_over = 0;
  uint64_t crashes_in_takeovers = 0;
  uint64_t pinned_reads = 0;
  uint64_t reads_from_vault = 0;
  uint64_t logs_kept = 0;         // of shards that are gone, at a start
  uint64_t loaded = 0;            // starts from a checkpoint
  uint64_t loaded_elsewhere = 0;  // of these, with another number of shards
};

struct ProgramOptions {
  uint64_t seed = 1;
  RigDisks::Lie lie = RigDisks::Lie::kNone;
  bool audits = true;
  bool reshards = true;  // another number of shards now and then
  bool checkpoints = false;
  bool rewrites = false;  // with them: segments fill, and crashes are rarer, but amid takeovers
  bool talks = false;
};

class DurableProgram {
 public:
  DurableProgram(const ProgramOptions& options, ProgramStats* stats)
      : options_(options),
        stats_(*stats),
        random_(MixBits(options.seed)),
        rig_(std::make_unique<DurableRig>(MixBits(options.seed + 1))) {
    rig_->disks.lie = options.lie;
    Draw();
  }

  // What was violated; empty: nothing.
  const std::string& violation() const { return violation_; }

  void Run() {
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

 private:
  bool OneIn(uint64_t n) { return random_.Below(n) == 0; }
  void Violate(const std::string& what) {
    if (violation_.empty()) violation_ = what;
    Say("VIOLATION: " + what);
  }
  void Say(const std::string& what) const {
    if (options_.talks)
      std::printf("%8llu  %s\n", static_cast<unsigned long long>(now_), what.c_str());
  }

  // ---- Set-up ----

  void Draw() {
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
      ModelSpace space{
          .name = "space" + std::to_string(s), .settings = {}, .ids = {}, .vectors = {}};
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
      Say(space.name + " durability " +
          std::to_string(static_cast<int>(space.settings.durability)) + " partitions " +
          std::to_string(space.settings.partitions) + " ids " + std::to_string(space.ids.size()));
    }
  }

  DurableSetup Setup() {
    DurableSetup setup;
    shards_ = max_shards_;
    if (reshards_) shards_ = static_cast<uint16_t>(1 + random_.Below(max_shards_));
    setup.shards = shards_;
    setup.max_partitions = shards_;
    setup.producers = producers_;
    setup.shard = DurableRig::SmallShard();
    setup.shard.seed = random_.Next();
    setup.shard.grow_partition_at = grow_at_;
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

  void SetDelays(bool faults) {
    SimulatedDiskFaults set;
    set.min_delay_ns = 5 * kNanosPerMicro;
    set.max_delay_ns = max_delay_ns_;
    if (faults) {
      const auto some = [&] {
        return OneIn(2) ? 0.02 * static_cast<double>(random_.Below(15)) : 0;
      };
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

  void Step() {
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

  // ---- Checkpoints ----

  // Whether that was the step.
  bool StepCheckpoints() {
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

  void PollCheckpointer() {
    if (rig_->disks.power_failed) return;
    rig_->checkpointer->Poll([this](const std::string& line) {
      Say(line);
      const bool failed = line.find("failed") != std::string::npos;
      ++(failed ? stats_.failed_checkpoints : stats_.checkpoints);
      if (failed && !had_faults_ && !rig_->disks.power_failed) Violate(line);
    });
  }

  // One who reads records for an answer, long after it was told where they lie.
  struct PinnedRead {
    LogAddress address = kNoLogAddress;
    uint32_t bytes = 0;
    std::string id;
    std::string payload;
  };

  // Enters, or reads and leaves.
  void Pin() {
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
              (log < shards_ &&
               !rig_->store->ForShard(log).log->NotDurable(stored.origin).empty())) {
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

  // The segments that an observation lies in.
  std::set<LogSegment> NamedSegments() const {
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

  // Nothing else goes on: it succeeds, and what is not needed any more is gone.
  void CheckpointAll() {
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

  // What lies on the disk after a checkpoint at rest.
  void ExpectRoom() {
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

  // Everything was answered before the checkpoint.
  void ExpectNothingReplayed() {
    for (const auto& each : rig_->shards->shards) {
      if (const uint64_t replayed = each->recovery().replayed.load(); replayed > 0) {
        Violate(std::to_string(replayed) + " observations are replayed that were saved");
      }
    }
  }

  void PollShard() {
    const size_t shard = random_.Below(shards_);
    rig_->shards->PollShard(shard);
    TakeCompletions();
  }

  // Every part in turn, for the synchronous parts of a program.
  void PollAll() {
    rig_->clock.AdvanceNs(static_cast<int64_t>(1'000 + random_.Below(40'000)));
    for (size_t s = 0; s < shards_; ++s) {
      rig_->shards->PollShard(s);
      TakeCompletions();
    }
    rig_->shards->ReadRecords();
    if (OneIn(4)) rig_->store->Poll();
    if (options_.checkpoints && !recovering_ && OneIn(4)) PollCheckpointer();
  }

  // ---- Clients ----

  std::string IdText(size_t space, size_t id) const {
    std::string text = std::to_string(space);
    text += "-id";
    text += std::to_string(id);
    return text;
  }

  // A new operation, where an id is free for one; nullptr: none.
  Operation* MakeOperation(size_t which) {
    Client& client = clients_[which];
    ModelSpace& space = spaces_[client.space];
    auto made = std::make_unique<Operation>();
    made->number = operations_.size() + 1;
    made->client = which;
    made->space = client.space;
    made->id = random_.Below(space.ids.size());
    if (client.in_session && OneIn(12)) {
      made->invalid = true;
      if (OneIn(2)) {
        made->op = ObservationOp::kSkip;
        made->skip_reason = RefusalReason::kBadId;
      } else {
        made->vector.assign(kDimension + 1, 1.0F);
      }
      operations_.push_back(std::move(made));
      return operations_.back().get();
    }
    IdState& id = space.ids[made->id];
    if (id.in_turn && std::ranges::any_of(id.operations, [](const Operation* operation) {
          return operation->status == Status::kOut || operation->status == Status::kPending;
        })) {
      return nullptr;
    }
    if (OneIn(3)) made->op = ObservationOp::kDelete;
    if (id.in_turn && !client.in_session && OneIn(2)) {
      made->op = OneIn(2) ? ObservationOp::kSuppress : ObservationOp::kRestore;
    }
    if (made->op == ObservationOp::kUpsert) {
      made->payload = std::to_string(made->number) + ":";
      size_t filler = random_.Below(60);
      if (OneIn(8)) filler = random_.Below(3'000);
      if (fills_segments_ && OneIn(3)) filler = random_.Below(16'000);
      if (big_payloads_ && OneIn(10)) filler = random_.Below(60'000);
      made->payload.append(filler, static_cast<char>('a' + made->number % 26));
      for (size_t i = 0; i < kDimension; ++i) {
        made->vector.push_back(static_cast<float>(random_.Below(1u << 20)) / 1024);
      }
      space.vectors[made->payload] = made->vector;
    }
    id.operations.push_back(made.get());
    operations_.push_back(std::move(made));
    return operations_.back().get();
  }

  void Send(size_t which) {
    Client& client = clients_[which];
    if (!client.attached) {
      Attach(which);
      return;
    }
    if (client.wait_until > now_ ||
        rig_->shards->outstanding(client.session.producer) >= DurableRig::kMostOutstanding) {
      return;
    }
    if (client.in_session) {
      SendInSession(which);
    } else if (client.out.size() < 4) {
      if (Operation* operation = MakeOperation(which)) SendAlone(operation);
    }
  }

  void SendInSession(size_t which) {
    Client& client = clients_[which];
    if (client.goes_back) {
      if (CountOut(client) > 0) return;
      client.goes_back = false;
      client.next = client.settled + 1;
    }
    if (client.next > client.settled + 8 || rig_->shards->LaneFull(client.session)) return;
    if (client.next > client.session.credit_sequence) return;
    if (client.next > client.operations.size()) {
      Operation* operation = finishing_ ? nullptr : MakeOperation(which);
      if (operation == nullptr) return;
      client.operations.push_back(operation);
      operation->sequence = client.operations.size();
    }
    Operation* operation = client.operations[client.next - 1];
    ++client.next;
    Push(operation, client.session, operation->sequence);
  }

  size_t CountOut(const Client& client) const {
    size_t out = 0;
    for (const Operation* operation : client.operations) {
      out += static_cast<size_t>(operation->outstanding);
    }
    return out;
  }

  void SendAlone(Operation* operation) {
    Client& client = clients_[operation->client];
    RigSession nobody = client.session;
    nobody.id = SessionId();
    nobody.origin = 1'000 + operation->client;
    // To the shard that owns the id.
    const SpaceEntry* entry = rig_->shards->entry(nobody.space);
    const uint64_t hash = SpaceCatalogue::HashOfId(IdText(operation->space, operation->id));
    nobody.shard = entry->ShardOf(PartitionOf(hash, entry->partitions())).value();
    if (rig_->shards->LaneFull(nobody)) {
      operation->status = Status::kDead;
      return;
    }
    client.out.push_back(operation);
    Push(operation, nobody, operation->number);
  }

  void Push(Operation* operation, const RigSession& session, Sequence sequence) {
    Observation observation{.op = operation->op,
                            .id = IdText(operation->space, operation->id),
                            .vector = operation->vector,
                            .payload = operation->payload,
                            .skip_reason = operation->skip_reason};
    if (operation->status == Status::kPending) {
      operation->sent_at = now_;
      operation->status = Status::kOut;
    }
    ++operation->outstanding;
    rig_->shards->PushObserve(session, sequence, observation);
    Say("send " + Describe(*operation) + " to shard " + std::to_string(session.shard));
  }

  static std::string Describe(const Operation& operation) {
    static constexpr std::array<const char*, 6> kNames{"?",    "upsert",   "delete",
                                                       "skip", "suppress", "restore"};
    return "#" + std::to_string(operation.number) + " client " + std::to_string(operation.client) +
           " seq " + std::to_string(operation.sequence) + " " +
           kNames[static_cast<size_t>(operation.op)] + (operation.invalid ? " (invalid)" : "") +
           " s" + std::to_string(operation.space) + "-id" + std::to_string(operation.id) +
           " payload " + std::to_string(operation.payload.size());
  }

  void TakeCompletions() {
    auto& completions = rig_->shards->completions;
    for (const auto& [producer, completion] : completions) {
      if (!violation_.empty()) return;
      if (completion.kind == CompletionKind::kHello) {
        hello_ = completion;
        // What comes behind it for the connection before is not the client's
        // any more.
        if (completion.reason == kNone) clients_[attaching_].session.origin = completion.origin;
      }
      if (completion.kind == CompletionKind::kCredit) TakeCredit(completion);
      if (completion.kind == CompletionKind::kObserve) TakeObserved(completion);
    }
    completions.clear();
  }

  void TakeCredit(const Completion& completion) {
    for (Client& client : clients_) {
      if (client.session.origin != completion.origin) continue;
      client.session.credit_sequence =
          std::max(client.session.credit_sequence, completion.credit_sequence);
    }
  }

  void TakeObserved(const Completion& completion) {
    const bool alone = completion.origin < 10'000;
    if (alone) {
      Operation* operation = operations_[completion.sequence - 1].get();
      Client& client = clients_[operation->client];
      std::erase(client.out, operation);
      --operation->outstanding;
      if (completion.reason == kNone) {
        Acknowledge(operation, {0, rig_->shards->alone_stamps[completion.sequence]});
      } else {
        operation->status = Status::kDead;
        Refused(&client, *operation, completion.reason);
      }
      return;
    }
    // By the connection's number: the client's, then which of its connections.
    Client& client = clients_[completion.origin / 10'000 - 1];
    if (completion.sequence > client.operations.size()) {
      Violate("an answer to what was not sent");
      return;
    }
    Operation* operation = client.operations[completion.sequence - 1];
    --operation->outstanding;
    const bool current = completion.origin == client.session.origin;
    client.session.credit_sequence =
        std::max(client.session.credit_sequence, current ? completion.credit_sequence : 0);
    const bool consumed = HasEffect(completion.reason, RefusalEffect::kConsumes);
    if (completion.reason == kNone || consumed) {
      if (completion.reason == kNone && operation->invalid && !completion.repeated) {
        Violate("accepted though invalid: " + Describe(*operation));
      }
      if (consumed && !operation->invalid) Violate("refused for good: " + Describe(*operation));
      Acknowledge(operation, {client.session.id.value(), completion.sequence});
      if (!current) return;
      if (completion.sequence > client.settled + 1) {
        Violate("answered out of order, settled " + std::to_string(client.settled) + ": " +
                Describe(*operation));
      }
      client.settled = std::max(client.settled, completion.sequence);
      return;
    }
    if (operation->outstanding == 0 && operation->status == Status::kOut) {
      operation->status = Status::kPending;
    }
    if (!current) return;
    client.goes_back = true;
    Refused(&client, *operation, completion.reason);
  }

  void Refused(Client* client, const Operation& operation, RefusalReason reason) {
    ++stats_.refusals;
    stats_.disk_full += reason == RefusalReason::kDiskFull ? 1 : 0;
    stats_.disk_failing += reason == RefusalReason::kDiskFailing ? 1 : 0;
    client->wait_until = now_ + 1 + random_.Below(20);
    Say("refused " + Describe(operation) + ": " + std::string(DescribeRefusal(reason).name));
    switch (reason) {
      case RefusalReason::kQueueFull:
      case RefusalReason::kBacklogFull:
      case RefusalReason::kMemoryFull:
      case RefusalReason::kDiskFull:
      case RefusalReason::kDiskFailing:
      case RefusalReason::kLogBusy:
        return;
      case RefusalReason::kFenced:
        if (attaching_ == operation.client) return;
        break;
      case RefusalReason::kSequenceGap:
        if (operation.sequence > client->settled + 1) return;
        break;
      default:
        break;
    }
    Violate("refused with " + std::string(DescribeRefusal(reason).name) + ": " +
            Describe(operation));
  }

  void Acknowledge(Operation* operation, const FlushAudit::Key& key) {
    ++stats_.acks;
    Say("ack " + Describe(*operation));
    operation->status = Status::kCertain;
    if (!operation->acked) operation->acked_at = now_;
    operation->acked = true;
    const ModelSpace& space = spaces_[operation->space];
    if (options_.audits && space.settings.durability == Durability::kFsync &&
        !rig_->audit.IsDurable(key)) {
      Violate("acknowledged before it was flushed: " + Describe(*operation));
    }
    if (!operation->invalid) ExpectPossible(operation->space, operation->id, "after its ack");
  }

  // ---- Hellos ----

  void Attach(size_t which) {
    Client& client = clients_[which];
    if (!client.in_session) {
      client.attached = true;
      return;
    }
    HelloParams params{.metric = Metric::kL2,
                       .dimension = static_cast<uint16_t>(kDimension),
                       .session = client.session.id};
    if (client.session.id.value() != 0) {
      params.shard = HomeOfSession(client.session.id).value() % shards_;
    } else {
      params.shard = rig_->shards->entry(client.session.space)->NextHome().value();
    }
    hello_.reset();
    attaching_ = which;  // What it has under way may be fenced.
    const bool was_attached = client.attached;
    const Origin origin = (which + 1) * 10'000 + ++connections_ % 10'000;
    rig_->shards->PushHello(client.session.producer, origin, client.session.space, params);
    for (int i = 0; i < 20'000 && !hello_ && !rig_->disks.power_failed && violation_.empty(); ++i) {
      PollAll();
    }
    attaching_ = SIZE_MAX;
    if (!hello_) {
      if (!rig_->disks.power_failed) Violate("a hello was not answered");
      return;
    }
    const HelloRequest& answer = rig_->shards->last_hello();
    Say("hello of client " + std::to_string(which) + ": " +
        std::string(DescribeRefusal(hello_->reason).name) + ", last " +
        std::to_string(answer.last_sequence));
    if (hello_->reason == RefusalReason::kSessionExpired) {
      if (client.floor > 0) {
        Violate("the session of client " + std::to_string(which) + " is gone, with " +
                std::to_string(client.floor) + " settled");
      }
      ForgetSession(&client);
      Attach(which);
      return;
    }
    if (hello_->reason != kNone) {
      Violate("hello refused: " + std::string(DescribeRefusal(hello_->reason).name));
      return;
    }
    client.attached = true;
    client.session.shard = params.shard;
    client.session.id = answer.session;
    client.session.slot = answer.session_slot;
    client.session.credit_sequence = answer.last_sequence + answer.credit;
    TakeResume(which, answer.last_sequence, was_attached);
  }

  void ForgetSession(Client* client) {
    for (Operation* operation : client->operations) operation->status = Status::kDead;
    client->operations.clear();
    client->session.id = SessionId();
    client->settled = 0;
    client->next = 1;
    client->goes_back = false;
  }

  // `reconnected`: the process went on, and what is under way is still to be
  // answered.
  void TakeResume(size_t which, Sequence last, bool reconnected) {
    Client& client = clients_[which];
    const std::string who = "client " + std::to_string(which);
    if (last < client.floor) {
      Violate(who + " resumes at " + std::to_string(last) + ", and had settled " +
              std::to_string(client.floor));
    }
    if (last > client.operations.size()) Violate(who + " resumes beyond what it has sent");
    if (!violation_.empty()) return;
    if (reconnected && last < client.settled) Violate(who + " was told more than its hello says");
    for (Sequence sequence = 1; sequence <= client.operations.size(); ++sequence) {
      Operation* operation = client.operations[sequence - 1];
      if (sequence <= last) {
        operation->status = Status::kCertain;
        operation->acked_at = std::min(operation->acked_at, now_);
        if (options_.audits && spaces_[client.space].settings.durability == Durability::kFsync &&
            !rig_->audit.IsDurable({client.session.id.value(), sequence})) {
          Violate(who + " resumes at what was not flushed: " + Describe(*operation));
        }
      } else if (!reconnected) {
        operation->status = Status::kPending;
        operation->acked = false;
        operation->acked_at = kNever;
      }
    }
    if (!reconnected && spaces_[client.space].settings.durability != Durability::kFsync) {
      // What is sent from here on is something else: so ids keep to their
      // turns.
      for (size_t i = last; i < client.operations.size(); ++i) {
        // A checkpoint may have what its session does not.
        client.operations[i]->status = options_.checkpoints ? Status::kMaybe : Status::kDead;
        client.operations[i]->sequence = 0;
      }
      client.operations.resize(last);
    }
    client.settled = last;
    client.next = last + 1;
    client.goes_back = false;
    // What was read from the log stays.
    if (!reconnected) client.floor = client.durable = last;
  }

  void Reconnect(size_t which) {
    if (clients_[which].in_session && clients_[which].attached) Attach(which);
  }

  // ---- Crashes and starts ----

  void AfterPowerFailed() {
    TakeCompletions();
    if (!violation_.empty()) return;
    Crash(true);
  }

  void Crash(bool power) {
    if (!rig_->running()) return;
    if (recovering_) ++stats_.cuts_in_recovery;
    NoteRetention();
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

  void NoteRetention() {
    pin_ = 0;
    pinned_.clear();
    if (rig_->checkpointer == nullptr) return;
    const Retention& retention = rig_->checkpointer->retention();
    stats_.segments_freed += retention.counter(RetentionCounter::kFreed);
    stats_.records_taken_over += retention.counter(RetentionCounter::kTakenOver);
  }

  // What clients know and may expect from then on.
  void NoteStopped(bool power) {
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

  void Start() {
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

  void StepRecovery() {
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

  // Only a disk that fails may keep it from starting.
  void FailedStart(const std::string& why) {
    ++stats_.failed_starts;
    Say(why);
    if (!had_faults_) Violate(why);
    SetDelays(false);
    Crash(false);
  }

  void AfterRecovery() {
    if (options_.talks) {
      for (const auto& each : rig_->shards->shards) {
        for (const std::string& note : each->recovery().notes) Say(note);
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

  void StartAgain() {
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

  // Everything that was sent is answered in the end, once nothing is wrong any
  // more.
  void Finish() {
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

  bool AllSettled() const {
    for (const Client& client : clients_) {
      if (client.settled < client.operations.size() || !client.out.empty()) return false;
    }
    return std::ranges::all_of(rig_->shards->shards, [](const auto& each) {
      return each->Idle() && each->counter(ShardCounter::kLogUnsettledBytes).Read() == 0;
    });
  }

  // ---- Bits that flip ----

  struct Flip {
    std::string folder;
    std::string file;
    uint64_t bit = 0;
  };

  // In what is live of one log.
  void FlipABit() {
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
  // Two in one block cannot be mended.
  void UndoFlip() {
    if (!power_was_cut_) return;
    if (flip_) rig_->medium.FlipBit(flip_->folder, flip_->file, flip_->bit);
    flip_.reset();
  }

  // ---- The model ----

  static bool Happened(const Operation& operation) { return operation.status == Status::kCertain; }
  static bool MayHaveHappened(const Operation& operation) {
    return operation.status == Status::kCertain || operation.status == Status::kOut ||
           operation.status == Status::kMaybe;
  }
  // `later` was taken after `earlier`, for sure.
  bool IsAfter(const Operation& later, const Operation& earlier) const {
    if (later.client == earlier.client && later.sequence != 0 && earlier.sequence != 0 &&
        clients_[later.client].in_session) {
      return later.sequence > earlier.sequence;
    }
    return later.sent_at > earlier.acked_at;
  }

  static Content Apply(const Operation& operation, Content content) {
    switch (operation.op) {
      case ObservationOp::kUpsert:
        return {operation.payload, false};
      case ObservationOp::kDelete:
        return {};
      case ObservationOp::kSuppress:
        if (!content.payload.empty()) content.hidden = true;
        return content;
      case ObservationOp::kRestore:
        content.hidden = false;
        return content;
      case ObservationOp::kSkip:
        break;
    }
    return content;
  }

  std::set<Content> PossibleContents(size_t space, size_t number) const {
    const IdState& id = spaces_[space].ids[number];
    std::set<Content> possible;
    if (id.in_turn) {
      possible.insert(id.base);
      for (const Operation* operation : id.operations) {
        if (!MayHaveHappened(*operation)) continue;
        std::set<Content> after;
        for (const Content& content : possible) after.insert(Apply(*operation, content));
        if (!Happened(*operation)) after.insert(possible.begin(), possible.end());
        possible = std::move(after);
      }
      return possible;
    }
    const auto superseded = [&](const Operation* operation) {
      return std::ranges::any_of(id.operations, [&](const Operation* later) {
        return later != operation && Happened(*later) &&
               (operation == nullptr || IsAfter(*later, *operation));
      });
    };
    if (!superseded(nullptr)) possible.insert(id.base);
    for (const Operation* operation : id.operations) {
      if (MayHaveHappened(*operation) && !superseded(operation)) {
        possible.insert(Apply(*operation, {}));
      }
    }
    return possible;
  }

  // The live payload, empty: none; of the latest version where there is more
  // than one.
  std::string LivePayload(size_t space, size_t id) const {
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

  static std::string Brief(const std::string& payload) {
    return payload.empty() ? "nothing" : payload.substr(0, payload.find(':'));
  }

  void ExpectPossible(size_t space, size_t id, const std::string& when) {
    // What was in memory alone is gone with the machine.
    if (rig_->disks.power_failed) return;
    const std::string live = LivePayload(space, id);
    const std::set<Content> possible = PossibleContents(space, id);
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

  // All of it, while nothing is under way.
  void Verify(const std::string& when) {
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
        const auto possible = PossibleContents(s, id);
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

  // What was found after a restart stands from then on, where nothing may be
  // lost later.
  void Collapse() {
    for (size_t s = 0; s < spaces_.size() && violation_.empty(); ++s) {
      if (spaces_[s].settings.durability != Durability::kFsync) continue;
      for (size_t i = 0; i < spaces_[s].ids.size(); ++i) {
        IdState& id = spaces_[s].ids[i];
        const std::string live = LivePayload(s, i);
        std::set<Content> fitting;
        for (const Content& content : PossibleContents(s, i)) {
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

  // A live observation is the first that its own vector recalls, with its
  // payload.
  void CheckRecall() {
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

  const ProgramOptions options_;
  ProgramStats& stats_;
  SplitMix64 random_;
  std::unique_ptr<DurableRig> rig_;
  std::string violation_;
  uint64_t now_ = 1;
  uint64_t connections_ = 0;

  uint16_t max_shards_ = 1;
  uint16_t shards_ = 1;
  uint16_t producers_ = 1;
  bool reshards_ = false;
  uint64_t grow_at_ = 0;
  bool flips_bits_ = false;
  bool faulty_ = false;
  bool big_payloads_ = false;
  bool fills_segments_ = false;
  uint32_t rewrite_below_permille_ = 500;
  int64_t max_delay_ns_ = 0;
  uint64_t block_pages_ = 0;
  uint32_t max_writes_ = 1;
  uint32_t segment_bytes_ = 0;
  uint32_t ahead_ = 1;

  ReadPins::Epoch pin_ = 0;  // of the one who reads by himself; 0: none
  std::vector<PinnedRead> pinned_;

  std::vector<ModelSpace> spaces_;
  std::vector<Client> clients_;
  std::vector<std::unique_ptr<Operation>> operations_;
  uint64_t starts_ = 0;
  bool power_was_cut_ = false;  // when it last stopped
  bool recovering_ = false;
  uint64_t recovery_steps_ = 0;
  bool finishing_ = false;
  bool has_faults_ = false;
  bool had_faults_ = false;  // at any time since the start
  std::optional<Flip> flip_;
  std::optional<Completion> hello_;
  size_t attaching_ = SIZE_MAX;
};

// The first seed that violates something, and what; 0: none.
inline std::pair<uint64_t, std::string> RunSeeds(const Seeds& seeds, const ProgramOptions& like,
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
