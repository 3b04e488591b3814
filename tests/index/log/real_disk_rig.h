#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "index/log/log_writer.h"
#include "index/log/segment_keeper.h"
#include "src/core/disk.h"
#include "src/core/hash.h"
#include "tests/core/recording_disk.h"
#include "tests/index/log/log_builder.h"
#include "tests/index/log/lying_disk.h"
#include "tests/index/shard_rig.h"
#include "tests/support/scratch_directory.h"

// A shard with its log on the machine's own disks, and a recording of all that goes to them.

namespace engram {

// (session, sequence)
using RecordKey = std::pair<uint64_t, uint64_t>;

// A shard with its log in a folder of the machine's disk, as it runs in one process.
class RealShard {
 public:
  // Of each session its space; "unsafe" does not promise that what it acknowledges is durable.
  static constexpr size_t kSessions = 4;
  static constexpr std::string_view kSpaces[kSessions] = {"first", "first", "second", "unsafe"};

  RealShard(DiskBackend backend, const std::string& folder, SimulatedClock* clock, DiskTrace* trace,
            Lie lie = Lie::kNone)
      : memory_(static_cast<std::byte*>(
                    std::aligned_alloc(kLogPageBytes, LogWriter::MemoryBytes(WriterOptions()))),
                &std::free) {
    const std::span<std::byte> memory(memory_.get(), LogWriter::MemoryBytes(WriterOptions()));
    const auto make_disk = [&](const DiskOptions& options) {
      auto made = CreateDisk(backend, folder, options, nullptr);
      CHECK(made.has_value(), "the test's disk");
      std::unique_ptr<Disk> disk = *std::move(made);
      if (trace != nullptr) disk = std::make_unique<RecordingDisk>(std::move(disk), trace);
      return disk;
    };
    DiskOptions options;
    options.registered_buffers = {memory};
    disk_ = std::make_unique<LyingDisk>(make_disk(options), lie);
    keeper_disk_ = make_disk({});
    writer_.emplace(WriterOptions(), disk_.get(), &handoff_, memory);
    SegmentKeeperOptions keeper_options;
    keeper_options.instance = kTestInstance;
    keeper_options.segment_bytes = 128 * 1024;
    keeper_options.ahead = 1;
    keeper_.emplace(keeper_options, keeper_disk_.get(), clock, &handoff_);
    ShardStorage storage;
    storage.log = &*writer_;
    storage.instance = kTestInstance;
    storage.sources.push_back({.log = 0, .disk = disk_.get()});
    RigWorld world;
    world.clock = clock;
    world.storage = {storage};
    world.records = {
        [backend, folder](const std::string&, const DiskOptions& disk_options, std::string* note) {
          return CreateDisk(backend, folder, disk_options, note);
        },
        &pins_, 0};
    for (const std::string_view space : kSpaces) {
      SpaceSettings settings;
      settings.metric = Metric::kL2;
      settings.durability = space == "unsafe" ? Durability::kMemory : Durability::kFsync;
      if (std::ranges::none_of(world.spaces, [&](const auto& e) { return e.first == space; })) {
        world.spaces.emplace_back(space, settings);
      }
    }
    ShardOptions shard = ShardRig::SmallOptions();
    shard.memory_limit_bytes = size_t{16} << 20;
    shard.grow_partition_at = 0;
    rig_.emplace(shard, /*producers=*/1, /*lane_capacity=*/64, /*max_spaces=*/16, RigShards{},
                 world);
  }

  // Empty, or why the shard cannot start.
  std::string Recover() {
    for (int i = 0; i < kPolls && rig_->shard->is_recovering(); ++i) {
      rig_->Poll();
      const RecoveryProgress& progress = rig_->shard->recovery();
      if (progress.failed.load()) return progress.error.message;
      disk_->Wait(kNanosPerMilli);
    }
    if (rig_->shard->is_recovering()) return "recovery does not end";
    if (auto started = keeper_->Start(handoff_.current.load()); !started) {
      return started.error().message;
    }
    if (auto prepared = keeper_->PrepareFirst(); !prepared) return prepared.error().message;
    rig_->Poll();
    return "";
  }
  // Everyone's turn.
  void Poll() {
    keeper_->Poll();
    rig_->Poll();
  }
  template <typename Done>
  bool PollUntil(Done&& done) {
    for (int i = 0; i < kPolls; ++i) {
      if (done()) return true;
      Poll();
      disk_->Wait(kNanosPerMilli);
    }
    return false;
  }
  ShardRig& rig() { return *rig_; }

 private:
  static constexpr int kPolls = 200'000;

  static LogWriterOptions WriterOptions() {
    LogWriterOptions options;
    options.instance = kTestInstance;
    options.block_bytes = LogWriter::kLeastBlockBytes;
    options.blocks = 4;
    options.flush_interval_ns = kNanosPerMilli;
    options.marker_delay_ns = kNanosPerMilli / 2;
    return options;
  }

  std::unique_ptr<std::byte, decltype(&std::free)> memory_;
  SegmentHandoff handoff_;
  std::unique_ptr<Disk> disk_;
  std::unique_ptr<Disk> keeper_disk_;
  std::optional<LogWriter> writer_;
  std::optional<SegmentKeeper> keeper_;
  ReadPins pins_{1};
  std::optional<ShardRig> rig_;
};

// What was sent under a number.
struct SentObservation {
  std::string space;
  Observation observation;
};

// Sends observations of several sessions over a recording disk, with a restart on the way.
class Recording {
 public:
  static constexpr size_t kDimension = 24;

  Recording(DiskBackend backend, Lie lie, uint64_t seed)
      : backend_(backend), lie_(lie), random_(seed) {}

  const DiskTrace& trace() const { return trace_; }
  const std::map<RecordKey, SentObservation>& sent() const { return sent_; }
  SimulatedClock& clock() { return clock_; }

  void Run(size_t observations) {
    for (int process = 0; process < 2; ++process) {
      RealShard shard(backend_, scratch_.path() + "/log-000", &clock_, &trace_, lie_);
      ASSERT_EQ(shard.Recover(), "");
      seen_ = shard.rig().completions.size();
      trace_.before_event = [&] {
        shard.rig().Drain();
        NoteAcks(shard.rig());
      };
      OpenSessions(&shard);
      const size_t goal = sent_.size() + observations / 2;
      while (sent_.size() < goal) {
        const uint64_t choice = random_.Below(100);
        if (choice < 25) {
          for (uint64_t n = random_.Below(6) + 1; n > 0; --n) Send(&shard);
        } else if (choice < 97) {
          shard.Poll();
          NoteAcks(shard.rig());
        } else {
          Settle(&shard);
        }
      }
      // The first one ends amid its work, as much as the disk's user may.
      if (process == 1) Settle(&shard);
      trace_.before_event = nullptr;
    }
  }

 private:
  static constexpr size_t kSessions = RealShard::kSessions;
  static constexpr const std::string_view* kSpaces = RealShard::kSpaces;

  void OpenSessions(RealShard* shard) {
    for (size_t i = 0; i < kSessions; ++i) {
      HelloParams params;
      params.metric = Metric::kL2;
      if (i < sessions_.size()) params.session = sessions_[i].id;
      RigSession session = shard->rig().Open(0, /*origin=*/i + 1, std::string(kSpaces[i]), params);
      if (i < sessions_.size()) {
        EXPECT_GE(session.last_settled, kSpaces[i] == "unsafe" ? 0 : acked_[i]);
        sessions_[i] = session;
      } else {
        sessions_.push_back(session);
      }
      // What was not taken before is sent anew, and may be another one.
      std::erase_if(sent_, [&](const auto& each) {
        return each.first.first == session.id.value() && each.first.second >= session.next;
      });
      outstanding_[i] = 0;
      goes_back_[i] = false;
    }
    acked_.resize(kSessions);
  }
  void Send(RealShard* shard) {
    const size_t which = random_.Below(kSessions);
    RigSession& session = sessions_[which];
    if (outstanding_[which] == 0) goes_back_[which] = false;
    if (goes_back_[which] || outstanding_[which] >= 6) return;
    if (session.next > session.credit_sequence) return;
    SentObservation sent{.space = std::string(kSpaces[which]), .observation = {}};
    Observation& observation = sent.observation;
    const uint64_t number = session.next;
    if (number > 4 && random_.Below(10) == 0) {
      observation.op = ObservationOp::kDelete;
      observation.id = IdOf(which, number - 3);
    } else {
      observation.id = IdOf(which, number);
      observation.vector = QuarterVector(&random_, kDimension);
      // Mostly small; now and then several pages.
      observation.payload.resize(random_.Below(random_.Below(8) == 0 ? 12'000 : 700));
      for (char& byte : observation.payload) byte = static_cast<char>(random_.Next());
    }
    shard->rig().PushObserve(session, number, observation);
    sent_[{session.id.value(), number}] = std::move(sent);
    ++session.next;
    ++outstanding_[which];
  }
  static std::string IdOf(size_t session, uint64_t number) {
    return std::to_string(session) + "-" + std::to_string(number);
  }
  void NoteAcks(const ShardRig& rig) {
    for (; seen_ < rig.completions.size(); ++seen_) {
      const Completion& completion = rig.completions[seen_].second;
      if (completion.kind != CompletionKind::kObserve) continue;
      const size_t which = completion.origin - 1;
      RigSession& session = sessions_[which];
      session.credit_sequence = std::max(session.credit_sequence, completion.credit_sequence);
      --outstanding_[which];
      if (completion.reason != RefusalReason::kNone) {
        // The log was busy. What was sent behind it is refused as well, and all goes again.
        session.next = std::min(session.next, completion.sequence);
        goes_back_[which] = true;
        continue;
      }
      acked_[which] = completion.sequence;
      trace_.Note(session.id.value(), completion.sequence);
    }
  }
  // Until all is acknowledged and the log says itself what is durable.
  void Settle(RealShard* shard) {
    EXPECT_TRUE(shard->PollUntil([&] {
      NoteAcks(shard->rig());
      return shard->rig().shard->Idle();
    }));
  }

  const DiskBackend backend_;
  const Lie lie_;
  SplitMix64 random_;
  SimulatedClock clock_;
  ScratchDirectory scratch_;
  DiskTrace trace_;
  std::map<RecordKey, SentObservation> sent_;
  std::vector<RigSession> sessions_;
  std::vector<Sequence> acked_;
  size_t outstanding_[kSessions] = {};
  bool goes_back_[kSessions] = {};  // once nothing of it is outstanding
  size_t seen_ = 0;
};

}  // namespace engram
