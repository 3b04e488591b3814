// A shard with its log on the machine's own disks, through io_uring and through POSIX. The order of
// what was asked for and what ended proves that nothing is acknowledged before it is durable; and
// every state in which a crash may have left the files is recovered from.

#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "index/log/log_reader.h"
#include "index/log/log_writer.h"
#include "index/log/segment_keeper.h"
#include "src/core/disk.h"
#include "src/core/hash.h"
#include "tests/core/recording_disk.h"
#include "tests/index/log/log_builder.h"
#include "tests/index/shard_rig.h"
#include "tests/support/scratch_directory.h"

namespace engram {
namespace {

constexpr size_t kDimension = 24;
constexpr size_t kSessions = 4;
constexpr std::string_view kSpaces[kSessions] = {"first", "first", "second", "unsafe"};

// (session, sequence)
using Key = std::pair<uint64_t, uint64_t>;

// How a disk deceives its user.
enum class Lie : uint8_t {
  kNone,
  kFlushEndsEarly,  // as soon as it is asked for
  kWriteEndsEarly,
  kFlushHangs,
};

// What it says is not what the disk below it does.
class LyingDisk final : public Disk {
 public:
  LyingDisk(std::unique_ptr<Disk> disk, Lie lie) : disk_(std::move(disk)), lie_(lie) {}

  Result<void> LockDirectory() override { return disk_->LockDirectory(); }
  Result<std::vector<DirectoryEntry>> List() override { return disk_->List(); }
  Result<DiskFile> Open(const std::string& name, OpenMode mode, Caching caching) override {
    return disk_->Open(name, mode, caching);
  }
  void Close(FileId file) override {
    while (!hidden_.empty()) {
      disk_->Wait(kNanosPerSecond);
      Fetch();
    }
    disk_->Close(file);
  }
  Result<void> Rename(const std::string& from, const std::string& to) override {
    return disk_->Rename(from, to);
  }
  Result<void> Remove(const std::string& name) override { return disk_->Remove(name); }
  Result<void> SyncDirectory() override { return disk_->SyncDirectory(); }
  bool Read(FileId file, uint64_t offset, std::span<std::byte> to, uint64_t tag) override {
    return disk_->Read(file, offset, to, Begin(tag, false, 0));
  }
  bool Write(FileId file, uint64_t offset, std::span<const std::byte> from, uint64_t tag) override {
    return disk_->Write(file, offset, from, Begin(tag, lie_ == Lie::kWriteEndsEarly, from.size()));
  }
  bool Flush(FileId file, uint64_t tag) override {
    if (lie_ == Lie::kFlushHangs) {
      hanging_.push_back({file, tag});
      return true;
    }
    return disk_->Flush(file, Begin(tag, lie_ == Lie::kFlushEndsEarly, 0));
  }
  // Those that hang go on, and others no longer hang.
  void EndHanging() {
    lie_ = Lie::kNone;
    for (const auto& [file, tag] : hanging_) {
      CHECK(Flush(file, tag), "there is room for it");
    }
    hanging_.clear();
  }
  size_t Poll(std::span<DiskCompletion> out) override {
    // What it says without ground comes before what is true.
    if (ends_.empty()) Fetch();
    const size_t count = std::min(out.size(), ends_.size());
    std::copy_n(ends_.begin(), count, out.begin());
    ends_.erase(ends_.begin(), ends_.begin() + static_cast<ptrdiff_t>(count));
    return count;
  }
  uint32_t in_flight() const override {
    return static_cast<uint32_t>(tags_.size() + hanging_.size() + ends_.size());
  }
  void Wait(int64_t timeout_ns) override {
    if (ends_.empty()) disk_->Wait(timeout_ns);
  }
  const std::string& directory() const override { return disk_->directory(); }
  std::string_view backend() const override { return disk_->backend(); }

 private:
  uint64_t Begin(uint64_t tag, bool lies, size_t bytes) {
    const uint64_t number = ++last_;
    if (lies) {
      hidden_.insert(number);
      ends_.push_back({.tag = tag, .error = 0, .bytes = bytes});
    } else {
      tags_[number] = tag;
    }
    return number;
  }
  void Fetch() {
    DiskCompletion end;
    while (disk_->Poll({&end, 1}) > 0) {
      if (hidden_.erase(end.tag) > 0) continue;
      const auto tag = tags_.find(end.tag);
      ends_.push_back({.tag = tag->second, .error = end.error, .bytes = end.bytes});
      tags_.erase(tag);
    }
  }

  std::unique_ptr<Disk> disk_;
  Lie lie_;
  std::vector<std::pair<FileId, uint64_t>> hanging_;
  std::set<uint64_t> hidden_;
  std::map<uint64_t, uint64_t> tags_;
  std::vector<DiskCompletion> ends_;
  uint64_t last_ = 0;
};

// A shard with its log in a folder of the machine's disk, as it runs in one process.
class RealShard {
 public:
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
struct Sent {
  std::string space;
  Observation observation;
};

// What a log holds, and what is wrong with it.
struct Found {
  std::map<Key, LogRecordKind> records;
  std::map<uint64_t, uint64_t> last;  // sequence, by session
  std::string fault;
};

// Sends observations of several sessions over a recording disk, with a restart on the way.
class Recording {
 public:
  Recording(DiskBackend backend, Lie lie, uint64_t seed)
      : backend_(backend), lie_(lie), random_(seed) {}

  const DiskTrace& trace() const { return trace_; }
  const std::map<Key, Sent>& sent() const { return sent_; }
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
    Sent sent{.space = std::string(kSpaces[which]), .observation = {}};
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
  std::map<Key, Sent> sent_;
  std::vector<RigSession> sessions_;
  std::vector<Sequence> acked_;
  size_t outstanding_[kSessions] = {};
  bool goes_back_[kSessions] = {};  // once nothing of it is outstanding
  size_t seen_ = 0;
};

// The observations in a block that was written, wherever that is.
std::vector<Key> KeysIn(std::span<const std::byte> bytes) {
  constexpr size_t kPositionOffset = 8;
  std::vector<Key> keys;
  LogPosition position = 0;
  if (bytes.size() < kBlockHeaderBytes) return keys;
  std::memcpy(&position, bytes.data() + kPositionOffset, sizeof(position));
  BlockHeader header;
  if (CheckBlock(bytes, 0, position, kTestInstance, &header).fault != BlockFault::kNone) {
    return keys;
  }
  ForEachRecord(bytes, header, [&](const LogRecord& record, LogAddress, size_t) {
    if (IsObservation(record.kind)) keys.emplace_back(record.session.value(), record.sequence);
  });
  return keys;
}

// Whether an acknowledgement says that it is durable. What it does not say so of may be sent anew
// after a restart.
bool IsPromised(const std::map<Key, Sent>& sent, const Key& key) {
  const auto found = sent.find(key);
  return found != sent.end() && found->second.space != "unsafe";
}

// Acknowledgements that came before a flush that was asked for after the end of the write of their
// record had ended without error; of spaces where that was promised, and of the others.
struct EarlyAcks {
  size_t acks = 0;  // where it was promised
  size_t early = 0;
  size_t early_unsafe = 0;
};
EarlyAcks FindEarlyAcks(const DiskTrace& trace, const std::map<Key, Sent>& sent) {
  using enum DiskTrace::Kind;
  struct Write {
    uint32_t file = 0;
    bool ended = false;
    std::vector<Key> keys;
  };
  std::map<uint64_t, Write> writes;
  std::map<uint64_t, std::vector<uint64_t>> flushes;  // the writes that each covers
  std::set<Key> durable;
  EarlyAcks result;
  for (const DiskTrace::Event& event : trace.events) {
    if (event.kind == kWrite) {
      writes[event.operation] = {.file = event.file, .ended = false, .keys = KeysIn(event.bytes)};
    } else if (event.kind == kFlush) {
      for (const auto& [number, write] : writes) {
        if (write.ended && write.file == event.file) flushes[event.operation].push_back(number);
      }
    } else if (event.kind == kEnd && writes.contains(event.operation)) {
      writes[event.operation].ended = event.error == 0;
    } else if (event.kind == kEnd && event.error == 0) {
      for (const uint64_t number : flushes[event.operation]) {
        durable.insert(writes[number].keys.begin(), writes[number].keys.end());
      }
    } else if (event.kind == kNote) {
      const bool is_safe = IsPromised(sent, event.note);
      const bool is_early = !durable.contains(event.note);
      result.acks += is_safe;
      result.early += is_safe && is_early;
      result.early_unsafe += !is_safe && is_early;
    }
  }
  return result;
}

// Compares each record with what was sent, and that all of `acked` are there.
Found CheckLog(Disk& disk, const std::map<Key, Sent>& sent, const std::set<Key>& acked) {
  Found found;
  LogReader reader(&disk, 0, kTestInstance);
  if (auto opened = reader.Open(0); !opened) {
    found.fault = opened.error().message;
    return found;
  }
  while (found.fault.empty()) {
    LogEntry entry;
    const auto step = reader.Next(&entry);
    if (!step) {
      found.fault = step.error().message;
      break;
    }
    if (*step == LogStep::kEnd) break;
    if (*step == LogStep::kPending) {
      disk.Wait(kNanosPerSecond);
      continue;
    }
    const LogRecord& record = entry.record;
    if (record.kind == LogRecordKind::kSpace) continue;
    const Key key{record.session.value(), record.sequence};
    const std::string name = std::to_string(key.first) + "/" + std::to_string(key.second);
    const auto original = sent.find(key);
    if (original == sent.end()) {
      found.fault = name + " was never sent";
      break;
    }
    const Observation& observation = original->second.observation;
    const bool is_same =
        record.space == original->second.space && record.id == observation.id &&
        record.kind == static_cast<LogRecordKind>(observation.op) &&
        std::ranges::equal(record.vector, std::as_bytes(std::span(observation.vector))) &&
        std::ranges::equal(record.payload, BytesOf(observation.payload));
    if (!is_same) found.fault = name + " is not what was sent";
    if (!found.records.emplace(key, record.kind).second) found.fault = name + " is there twice";
    if (key.second != ++found.last[key.first]) found.fault = name + " is out of its order";
  }
  if (!found.fault.empty()) return found;
  if (!reader.mended().empty()) found.fault = "a bit was mended";
  for (const Key& key : acked) {
    if (found.records.contains(key)) continue;
    found.fault = std::to_string(key.first) + "/" + std::to_string(key.second) +
                  " was acknowledged and is gone";
  }
  return found;
}

struct CrashFigures {
  size_t moments = 0;
  size_t states = 0;
  size_t faults = 0;
  size_t restarts = 0;
  std::string first_fault;
};

// A whole new shard on what a crash left: all of it can be recalled, sessions go on, and what is
// added is durable, too.
void Restart(DiskBackend backend, const CrashStates::Files& files, const std::map<Key, Sent>& sent,
             const std::set<Key>& acked, const Found& found) {
  ScratchDirectory scratch;
  const std::string folder = scratch.path() + "/log-000";
  std::filesystem::create_directory(folder);
  for (const auto& [name, bytes] : files) {
    std::ofstream file(folder + "/" + name, std::ios::binary);
    file.write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
  }
  std::map<Key, Sent> all = sent;
  std::set<Key> must = acked;
  for (const auto& [key, kind] : found.records) must.insert(key);  // Recovered is durable.
  {
    SimulatedClock clock;
    RealShard shard(backend, folder, &clock, nullptr);
    ASSERT_EQ(shard.Recover(), "");
    std::map<std::string, const Sent*> live;
    for (const auto& [key, kind] : found.records) {
      const Sent& each = sent.at(key);
      if (kind == LogRecordKind::kDelete) {
        live.erase(each.observation.id);
      } else {
        live[each.observation.id] = &each;
      }
    }
    for (const auto& [id, each] : live) {
      const RigAnswer answer =
          shard.rig().Recall(each->space, each->observation.vector, {.k = 1, .with_payload = true});
      ASSERT_EQ(answer.hits.size(), 1u) << id;
      EXPECT_EQ(answer.hits[0].id, id);
      EXPECT_EQ(answer.hits[0].payload, each->observation.payload);
    }
    EXPECT_TRUE(shard.rig().shard->CheckInvariants().has_value());
    SplitMix64 random(9);
    for (const auto& [id, last] : found.last) {
      const std::string space = sent.at({id, last}).space;
      HelloParams params;
      params.metric = Metric::kL2;
      params.session = SessionId(id);
      RigSession session = shard.rig().Open(0, /*origin=*/id, space, params);
      EXPECT_EQ(session.last_settled, last);
      Sent& added = all[{id, session.next}];
      added = {.space = space, .observation = {}};
      added.observation.id = "added";
      added.observation.vector = QuarterVector(&random, kDimension);
      // Refused while there is no segment to write to.
      const auto& completions = shard.rig().completions;
      for (bool acknowledged = false; !acknowledged;) {
        const size_t before = completions.size();
        shard.rig().PushObserve(session, session.next, added.observation);
        const auto is_answer = [](const auto& each) {
          return each.second.kind == CompletionKind::kObserve;
        };
        auto answer = completions.end();
        ASSERT_TRUE(shard.PollUntil([&] {
          answer = std::find_if(completions.begin() + static_cast<ptrdiff_t>(before),
                                completions.end(), is_answer);
          return answer != completions.end();
        }));
        acknowledged = answer->second.reason == RefusalReason::kNone;
        ASSERT_TRUE(acknowledged || answer->second.reason == RefusalReason::kLogBusy)
            << DescribeRefusal(answer->second.reason).name;
      }
      must.insert({id, session.next});
    }
    EXPECT_TRUE(shard.PollUntil([&] { return shard.rig().shard->Idle(); }));
  }
  auto disk = CreateDisk(backend, folder, {}, nullptr);
  ASSERT_TRUE(disk.has_value());
  EXPECT_EQ(CheckLog(**disk, all, must).fault, "");
}

// The last moment of each set of states.
CrashFigures CheckCrashes(DiskBackend backend, const Recording& recording, size_t most_states,
                          size_t restarts) {
  CrashStates crash;
  CrashFigures figures;
  std::set<Key> acked;
  SplitMix64 random(77);
  const size_t restart_every = recording.trace().events.size() / (restarts + 1) + 1;
  size_t next_restart = restarts == 0 ? SIZE_MAX : restart_every;
  for (size_t i = 0; i < recording.trace().events.size(); ++i) {
    const DiskTrace::Event& event = recording.trace().events[i];
    if (event.kind == DiskTrace::Kind::kNote && recording.sent().at(event.note).space != "unsafe") {
      acked.insert(event.note);
    }
    if (CrashStates::Changes(event)) {
      ++figures.moments;
      bool restarts_here = i >= next_restart;
      figures.states += crash.ForEach(most_states, &random, [&](const CrashStates::Files& files) {
        MemoryDisk disk(&files);
        const Found found = CheckLog(disk, recording.sent(), acked);
        if (!found.fault.empty()) {
          if (figures.faults++ == 0) figures.first_fault = found.fault;
        } else if (restarts_here && !found.records.empty() && random.Below(3) == 0) {
          restarts_here = false;
          next_restart += restart_every;
          ++figures.restarts;
          Restart(backend, files, recording.sent(), acked, found);
        }
      });
    }
    crash.Step(event);
  }
  return figures;
}

class RealDiskTest : public testing::TestWithParam<DiskBackend> {
 protected:
  void SetUp() override {
    ScratchDirectory scratch;
    const auto disk = CreateDisk(GetParam(), scratch.path(), {}, nullptr);
    if (!disk) GTEST_SKIP() << "needs io_uring: " << disk.error().message;
  }
};

TEST_P(RealDiskTest, NothingIsAcknowledgedBeforeItsFlushHasEnded) {
  Recording recording(GetParam(), Lie::kNone, 1);
  ASSERT_NO_FATAL_FAILURE(recording.Run(1'200));
  const EarlyAcks acks = FindEarlyAcks(recording.trace(), recording.sent());
  EXPECT_GT(acks.acks, 500u);
  EXPECT_EQ(acks.early, 0u);
  // So the trace would show it.
  EXPECT_GT(acks.early_unsafe, 0u);
  std::cout << acks.acks << " acknowledgements, " << recording.trace().events.size() << " events, "
            << acks.early_unsafe << " early ones of a space without the promise\n";
}

TEST_P(RealDiskTest, EveryStateThatACrashMayLeaveIsRecoveredFrom) {
  Recording recording(GetParam(), Lie::kNone, 2);
  ASSERT_NO_FATAL_FAILURE(recording.Run(300));
  const CrashFigures figures =
      CheckCrashes(GetParam(), recording, /*most_states=*/16, /*restarts=*/12);
  EXPECT_EQ(figures.faults, 0u) << figures.first_fault;
  EXPECT_GT(figures.states, 1'000u);
  EXPECT_GT(figures.restarts, 4u);
  std::cout << figures.states << " states at " << figures.moments << " moments, "
            << figures.restarts << " of them with a whole shard\n";
}

TEST_P(RealDiskTest, EverySectorOfSmallWritesMayBeMissing) {
  Recording recording(GetParam(), Lie::kNone, 3);
  ASSERT_NO_FATAL_FAILURE(recording.Run(40));
  const CrashFigures figures =
      CheckCrashes(GetParam(), recording, /*most_states=*/1 << CrashStates::kFewSectors,
                   /*restarts=*/0);
  EXPECT_EQ(figures.faults, 0u) << figures.first_fault;
  std::cout << figures.states << " states at " << figures.moments << " moments\n";
}

// The tests above see it when an acknowledgement comes one flush early.
TEST_P(RealDiskTest, AcknowledgementsOneFlushEarlyAreFound) {
  Recording recording(GetParam(), Lie::kFlushEndsEarly, 4);
  ASSERT_NO_FATAL_FAILURE(recording.Run(200));
  EXPECT_GT(FindEarlyAcks(recording.trace(), recording.sent()).early, 0u);
  EXPECT_GT(CheckCrashes(GetParam(), recording, 8, 0).faults, 0u);
}

TEST_P(RealDiskTest, FlushesThatAreAskedForBeforeTheWriteHasEndedAreFound) {
  Recording recording(GetParam(), Lie::kWriteEndsEarly, 5);
  ASSERT_NO_FATAL_FAILURE(recording.Run(200));
  EXPECT_GT(FindEarlyAcks(recording.trace(), recording.sent()).early, 0u);
  EXPECT_GT(CheckCrashes(GetParam(), recording, 8, 0).faults, 0u);
}

// What arrives meanwhile goes into few blocks, and not one by one into all of them.
TEST_P(RealDiskTest, WhileAFlushTakesLongTheLogTakesWhatItsMemoryHolds) {
  ScratchDirectory scratch;
  SimulatedClock clock;
  LogWriterOptions options;
  options.instance = kTestInstance;
  options.block_bytes = LogWriter::kLeastBlockBytes;
  const size_t memory_bytes = LogWriter::MemoryBytes(options);
  const std::unique_ptr<std::byte, decltype(&std::free)> memory(
      static_cast<std::byte*>(std::aligned_alloc(kLogPageBytes, memory_bytes)), &std::free);
  SegmentHandoff handoff;
  auto made = CreateDisk(GetParam(), scratch.path(), {}, nullptr);
  auto keeper_disk = CreateDisk(GetParam(), scratch.path(), {}, nullptr);
  ASSERT_TRUE(made.has_value() && keeper_disk.has_value());
  LyingDisk disk(*std::move(made), Lie::kFlushHangs);
  SegmentKeeperOptions keeper_options;
  keeper_options.instance = kTestInstance;
  keeper_options.segment_bytes = 1u << 20;
  SegmentKeeper keeper(keeper_options, keeper_disk->get(), &clock, &handoff);
  LogWriter writer(options, &disk, &handoff, {memory.get(), memory_bytes});
  ASSERT_TRUE(writer.Start(0, 1).has_value());
  ASSERT_TRUE(keeper.Start(0).has_value());
  ASSERT_TRUE(keeper.PrepareFirst().has_value());
  writer.Poll(clock.MonotonicNs());
  const std::string payload(1'000, 'p');
  LogRecord record;
  record.space = "space";
  record.payload = BytesOf(payload);
  const size_t bytes = LogRecordBytes(record);
  size_t taken = 0;
  for (; writer.JudgeRoom(bytes, false) == RefusalReason::kNone; taken += bytes) {
    record.stamp += 1;
    writer.Append(record, /*urgent=*/true);
    for (int i = 0; i < 3; ++i) {
      writer.Poll(clock.MonotonicNs());
      disk.Wait(kNanosPerMilli / 20);
      clock.AdvanceNs(kNanosPerMicro);
    }
  }
  EXPECT_GT(taken, memory_bytes / 2);
  disk.EndHanging();
  for (int i = 0; i < 10'000 && writer.JudgeRoom(bytes, false) != RefusalReason::kNone; ++i) {
    keeper.Poll();
    writer.Poll(clock.MonotonicNs());
    disk.Wait(kNanosPerMilli);
    clock.AdvanceNs(kNanosPerMicro);
  }
  EXPECT_EQ(writer.JudgeRoom(bytes, false), RefusalReason::kNone);
}

INSTANTIATE_TEST_SUITE_P(Backends, RealDiskTest,
                         testing::Values(DiskBackend::kUring, DiskBackend::kPosix),
                         [](const auto& each) {
                           return each.param == DiskBackend::kUring ? "io_uring" : "posix";
                         });

}  // namespace
}  // namespace engram
