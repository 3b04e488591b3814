// A shard with its log on the machine's own disks, through io_uring and through POSIX. The order of
// what was asked for and what ended proves that nothing is acknowledged before it is durable; and
// every state in which a crash may have left the files is recovered from.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "index/log/log_reader.h"
#include "index/log/log_writer.h"
#include "index/log/segment_keeper.h"
#include "src/core/disk.h"
#include "src/core/hash.h"
#include "tests/core/recording_disk.h"
#include "tests/index/log/log_builder.h"
#include "tests/index/log/lying_disk.h"
#include "tests/index/log/real_disk_rig.h"
#include "tests/index/shard_rig.h"
#include "tests/support/scratch_directory.h"

namespace engram {
namespace {

// What a log holds, and what is wrong with it.
struct Found {
  std::map<RecordKey, LogRecordKind> records;
  std::map<uint64_t, uint64_t> last;  // sequence, by session
  std::string fault;
};

// The observations in a block that was written, wherever that is.
std::vector<RecordKey> KeysIn(std::span<const std::byte> bytes) {
  constexpr size_t kPositionOffset = 8;
  std::vector<RecordKey> keys;
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
bool IsPromised(const std::map<RecordKey, SentObservation>& sent, const RecordKey& key) {
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
EarlyAcks FindEarlyAcks(const DiskTrace& trace, const std::map<RecordKey, SentObservation>& sent) {
  using enum DiskTrace::Kind;
  struct Write {
    uint32_t file = 0;
    bool ended = false;
    std::vector<RecordKey> keys;
  };
  std::map<uint64_t, Write> writes;
  std::map<uint64_t, std::vector<uint64_t>> flushes;  // the writes that each covers
  std::set<RecordKey> durable;
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
Found CheckLog(Disk& disk, const std::map<RecordKey, SentObservation>& sent,
               const std::set<RecordKey>& acked) {
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
    const RecordKey key{record.session.value(), record.sequence};
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
  for (const RecordKey& key : acked) {
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
void Restart(DiskBackend backend, const CrashStates::Files& files,
             const std::map<RecordKey, SentObservation>& sent, const std::set<RecordKey>& acked,
             const Found& found) {
  ScratchDirectory scratch;
  const std::string folder = scratch.path() + "/log-000";
  std::filesystem::create_directory(folder);
  for (const auto& [name, bytes] : files) {
    std::ofstream file(folder + "/" + name, std::ios::binary);
    file.write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
  }
  std::map<RecordKey, SentObservation> all = sent;
  std::set<RecordKey> must = acked;
  for (const auto& [key, kind] : found.records) must.insert(key);  // Recovered is durable.
  {
    SimulatedClock clock;
    RealShard shard(backend, folder, &clock, nullptr);
    ASSERT_EQ(shard.Recover(), "");
    std::map<std::string, const SentObservation*> live;
    for (const auto& [key, kind] : found.records) {
      const SentObservation& each = sent.at(key);
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
      SentObservation& added = all[{id, session.next}];
      added = {.space = space, .observation = {}};
      added.observation.id = "added";
      added.observation.vector = QuarterVector(&random, Recording::kDimension);
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
  std::set<RecordKey> acked;
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
