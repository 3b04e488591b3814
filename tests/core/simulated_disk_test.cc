#include "src/core/simulated_disk.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/core/clock.h"
#include "src/core/hash.h"

namespace engram {
namespace {

constexpr size_t kSector = SimulatedDisk::kSectorBytes;
const std::string kDirectory = "data";

std::vector<std::byte> Filled(size_t bytes, uint8_t value) {
  return std::vector<std::byte>(bytes, std::byte{value});
}

DiskCompletion Await(Disk& disk) {
  DiskCompletion end;
  while (disk.Poll(std::span(&end, 1)) == 0) disk.Wait(kNanosPerSecond);
  return end;
}
int WriteNow(Disk& disk, FileId file, uint64_t offset, std::span<const std::byte> bytes) {
  EXPECT_TRUE(disk.Write(file, offset, bytes, 0));
  return Await(disk).error;
}
int FlushNow(Disk& disk, FileId file) {
  EXPECT_TRUE(disk.Flush(file, 0));
  return Await(disk).error;
}

TEST(SimulatedDiskTest, NothingEndsBeforeItsTime) {
  SimulatedClock clock;
  SimulatedDisk medium(&clock, 1, {.min_delay_ns = 1'000, .max_delay_ns = 2'000});
  const auto disk = medium.Open(kDirectory);
  const auto file = disk->Open("f", OpenMode::kCreate, Caching::kBuffered);
  const auto bytes = Filled(10, 1);
  ASSERT_TRUE(disk->Write(file->id, 0, bytes, 0));
  DiskCompletion end;
  clock.AdvanceNs(999);
  EXPECT_EQ(disk->Poll(std::span(&end, 1)), 0u);
  EXPECT_TRUE(medium.ContentOf(kDirectory, "f")->empty()) << "it has no effect before it ends";
  clock.AdvanceNs(1'001);
  EXPECT_EQ(disk->Poll(std::span(&end, 1)), 1u);
  medium.StallUntil(clock.MonotonicNs() + 1'000'000);
  ASSERT_TRUE(disk->Flush(file->id, 0));
  clock.AdvanceNs(999'999);
  EXPECT_EQ(disk->Poll(std::span(&end, 1)), 0u) << "stalled";
  clock.AdvanceNs(1);
  EXPECT_EQ(disk->Poll(std::span(&end, 1)), 1u);
}

TEST(SimulatedDiskTest, EndsComeInAnyOrder) {
  SimulatedClock clock;
  SimulatedDisk medium(&clock, 1);
  const auto disk = medium.Open(kDirectory);
  const auto file = disk->Open("f", OpenMode::kCreate, Caching::kBuffered);
  const auto bytes = Filled(1, 1);
  for (uint64_t i = 0; i < 20; ++i) ASSERT_TRUE(disk->Write(file->id, i, bytes, i));
  clock.AdvanceNs(kNanosPerSecond);
  std::array<DiskCompletion, 20> ends;
  ASSERT_EQ(disk->Poll(ends), 20u);
  EXPECT_FALSE(std::ranges::is_sorted(ends, {}, &DiskCompletion::tag));
}

// What a crash makes of one unflushed write of eight sectors, over many seeds.
TEST(SimulatedDiskTest, UnflushedWritesAreLostKeptOrTorn) {
  std::set<std::string> fates;
  for (uint64_t seed = 0; seed < 200; ++seed) {
    SimulatedClock clock;
    SimulatedDisk medium(&clock, seed);
    {
      const auto disk = medium.Open(kDirectory);
      const auto file = disk->Open("f", OpenMode::kCreate, Caching::kBuffered);
      ASSERT_EQ(WriteNow(*disk, file->id, 0, Filled(8 * kSector, 1)), 0);
      ASSERT_EQ(FlushNow(*disk, file->id), 0);
      ASSERT_TRUE(disk->SyncDirectory().has_value());
      ASSERT_EQ(WriteNow(*disk, file->id, 0, Filled(8 * kSector, 2)), 0);
      medium.Crash();
    }
    const auto content = medium.ContentOf(kDirectory, "f");
    ASSERT_TRUE(content.has_value()) << "the name was synced";
    ASSERT_EQ(content->size(), 8 * kSector);
    size_t of_new = 0;
    for (size_t sector = 0; sector < 8; ++sector) {
      const auto first = (*content)[sector * kSector];
      ASSERT_TRUE(
          std::all_of(content->begin() + static_cast<std::ptrdiff_t>(sector * kSector),
                      content->begin() + static_cast<std::ptrdiff_t>((sector + 1) * kSector),
                      [&](std::byte b) { return b == first; }))
          << "a sector is never torn";
      of_new += first == std::byte{2};
    }
    fates.insert(of_new == 0 ? "lost" : of_new == 8 ? "kept" : "torn");
  }
  EXPECT_EQ(fates, (std::set<std::string>{"kept", "lost", "torn"}));
}

// The trap that a group commit can fall into: a flush asked for while a write is under way.
TEST(SimulatedDiskTest, AFlushDoesNotCoverWritesUnderWay) {
  bool was_lost = false;
  for (uint64_t seed = 0; seed < 100 && !was_lost; ++seed) {
    SimulatedClock clock;
    SimulatedDisk medium(&clock, seed);
    const auto bytes = Filled(kSector, 2);
    {
      const auto disk = medium.Open(kDirectory);
      const auto file = disk->Open("f", OpenMode::kCreate, Caching::kBuffered);
      ASSERT_TRUE(disk->SyncDirectory().has_value());
      ASSERT_TRUE(disk->Write(file->id, 0, bytes, 1));
      ASSERT_TRUE(disk->Flush(file->id, 2));
      EXPECT_EQ(Await(*disk).error, 0);
      EXPECT_EQ(Await(*disk).error, 0);
      medium.Crash();
    }
    was_lost = medium.ContentOf(kDirectory, "f")->empty();
  }
  EXPECT_TRUE(was_lost);
}

// After a flush that failed, one that succeeds proves nothing about the earlier writes.
TEST(SimulatedDiskTest, AFailedFlushMayLoseWritesForGood) {
  size_t lost = 0;
  size_t written_again_lost = 0;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    SimulatedClock clock;
    SimulatedDisk medium(&clock, seed);
    {
      const auto disk = medium.Open(kDirectory);
      const auto file = disk->Open("f", OpenMode::kCreate, Caching::kBuffered);
      ASSERT_TRUE(disk->SyncDirectory().has_value());
      ASSERT_EQ(WriteNow(*disk, file->id, 0, Filled(kSector, 1)), 0);
      ASSERT_EQ(WriteNow(*disk, file->id, kSector, Filled(kSector, 1)), 0);
      medium.SetFaults({.flush_error_probability = 1.0});
      ASSERT_EQ(FlushNow(*disk, file->id), EIO);
      medium.SetFaults({});
      ASSERT_EQ(WriteNow(*disk, file->id, kSector, Filled(kSector, 2)), 0);
      ASSERT_EQ(FlushNow(*disk, file->id), 0);
      medium.Crash();
    }
    const auto content = medium.ContentOf(kDirectory, "f");
    ASSERT_EQ(content->size(), 2 * kSector);
    lost += (*content)[0] != std::byte{1};
    written_again_lost += (*content)[kSector] != std::byte{2};
  }
  EXPECT_GT(lost, 0u);
  EXPECT_EQ(written_again_lost, 0u) << "what was written again and flushed is safe";
}

// Random programs of sector writes and flushes with a crash somewhere: each sector must hold its
// last flushed version or one written since.
TEST(SimulatedDiskTest, ACrashLeavesEachSectorAtAPossibleVersion) {
  constexpr size_t kSectors = 16;
  for (uint64_t seed = 0; seed < 400; ++seed) {
    SplitMix64 random(seed);
    SimulatedClock clock;
    SimulatedDisk medium(&clock, seed,
                         {.write_error_probability = 0.05, .flush_error_probability = 0.05});
    // By sector: the versions that a crash may leave, the certain one first.
    std::vector<std::set<uint8_t>> possible(kSectors, {0});
    struct Write {
      size_t first;
      size_t count;
      uint8_t version;
    };
    using Versions = std::vector<std::vector<uint8_t>>;  // by sector, in order
    std::map<uint64_t, Write> writes;                    // under way
    std::map<uint64_t, Versions> flushes;                // what each covers
    Versions ended(kSectors);                            // without error, since the start
    std::set<uint8_t> doubtful;  // a flush that should have covered them failed
    auto disk = medium.Open(kDirectory);
    const auto file = disk->Open("f", OpenMode::kCreate, Caching::kDirect);
    ASSERT_TRUE(disk->SyncDirectory().has_value());
    ASSERT_EQ(file->alignment, kSector);
    alignas(512) static std::array<std::byte, 4 * kSector> memory[256];
    uint64_t tag = 0;
    const uint64_t steps = random.Below(120);
    for (uint64_t step = 0; step < steps; ++step) {
      const uint64_t what = random.Below(10);
      if (what < 5 && tag < 250) {
        const size_t first = random.Below(kSectors);
        const size_t count = 1 + random.Below(std::min<size_t>(4, kSectors - first));
        // Two writes under way at once on one sector have no order: a caller does not do that.
        bool overlaps = false;
        for (const auto& [other_tag, other] : writes) {
          overlaps |= first < other.first + other.count && other.first < first + count;
        }
        if (overlaps) continue;
        const auto version = static_cast<uint8_t>(++tag);
        const auto bytes = std::span(memory[tag]).first(count * kSector);
        std::ranges::fill(bytes, std::byte{version});
        ASSERT_TRUE(disk->Write(file->id, first * kSector, bytes, tag));
        for (size_t s = first; s < first + count; ++s) possible[s].insert(version);
        writes[tag] = {first, count, version};
      } else if (what < 7 && tag < 250) {
        ASSERT_TRUE(disk->Flush(file->id, ++tag));
        flushes[tag] = ended;
      } else {
        clock.AdvanceNs(static_cast<int64_t>(random.Below(100'000)));
        DiskCompletion end;
        while (disk->Poll(std::span(&end, 1)) == 1) {
          if (const auto write = writes.find(end.tag); write != writes.end()) {
            if (end.error == 0) {
              const Write& done = write->second;
              for (size_t s = done.first; s < done.first + done.count; ++s) {
                ended[s].push_back(done.version);
              }
            }
            writes.erase(write);
            continue;
          }
          for (size_t s = 0; s < kSectors; ++s) {
            std::vector<uint8_t> covered = flushes[end.tag][s];
            if (end.error != 0) {
              doubtful.insert(covered.begin(), covered.end());
              continue;
            }
            // The last version that the flush covers is safe: all before it are impossible.
            std::erase_if(covered, [&](uint8_t v) { return doubtful.contains(v); });
            if (covered.empty()) continue;
            std::erase_if(possible[s], [&](uint8_t v) { return v < covered.back(); });
          }
        }
      }
    }
    medium.Crash();
    const auto content = *medium.ContentOf(kDirectory, "f");
    for (size_t s = 0; s < kSectors; ++s) {
      const uint8_t found =
          s * kSector < content.size() ? static_cast<uint8_t>(content[s * kSector]) : uint8_t{0};
      ASSERT_TRUE(possible[s].contains(found))
          << "seed " << seed << " sector " << s << " version " << int{found};
    }
  }
}

TEST(SimulatedDiskTest, NamesNeedSyncDirectory) {
  std::set<size_t> kept;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    SimulatedClock clock;
    SimulatedDisk medium(&clock, seed);
    {
      const auto disk = medium.Open(kDirectory);
      const auto safe = disk->Open("safe", OpenMode::kCreate, Caching::kBuffered);
      ASSERT_TRUE(safe.has_value());
      ASSERT_TRUE(disk->SyncDirectory().has_value());
      const auto flushed = disk->Open("flushed", OpenMode::kCreate, Caching::kBuffered);
      ASSERT_EQ(WriteNow(*disk, flushed->id, 0, Filled(10, 1)), 0);
      ASSERT_EQ(FlushNow(*disk, flushed->id), 0);
      ASSERT_TRUE(disk->Open("last", OpenMode::kCreate, Caching::kBuffered).has_value());
      medium.Crash();
    }
    const auto disk = medium.Open(kDirectory);
    const auto entries = *disk->List();
    ASSERT_TRUE(medium.ContentOf(kDirectory, "safe").has_value());
    const bool has_flushed = medium.ContentOf(kDirectory, "flushed").has_value();
    const bool has_last = medium.ContentOf(kDirectory, "last").has_value();
    ASSERT_TRUE(has_flushed || !has_last) << "changes of names survive in order";
    kept.insert(entries.size());
  }
  EXPECT_EQ(kept, (std::set<size_t>{1, 2, 3}));
}

TEST(SimulatedDiskTest, AnUnsyncedRemoveMayComeBack) {
  size_t came_back = 0;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    SimulatedClock clock;
    SimulatedDisk medium(&clock, seed);
    const auto disk = medium.Open(kDirectory);
    ASSERT_TRUE(ReplaceFile(*disk, "f", Filled(100, 3)).has_value());
    ASSERT_TRUE(disk->Remove("f").has_value());
    ASSERT_FALSE(medium.ContentOf(kDirectory, "f").has_value());
    medium.Crash();
    const auto content = medium.ContentOf(kDirectory, "f");
    if (!content) continue;
    ++came_back;
    ASSERT_EQ(*content, Filled(100, 3)) << "whole, if at all";
  }
  EXPECT_GT(came_back, 0u);
  EXPECT_LT(came_back, 50u);
}

// Passes everything on, and lets the power fail before the call number `crash_at`.
class CrashingDisk final : public Disk {
 public:
  CrashingDisk(SimulatedDisk* medium, std::unique_ptr<Disk> disk, int crash_at)
      : medium_(medium), disk_(std::move(disk)), calls_left_(crash_at) {}
  Result<void> LockDirectory() override { return Count(), disk_->LockDirectory(); }
  Result<std::vector<DirectoryEntry>> List() override { return Count(), disk_->List(); }
  Result<DiskFile> Open(const std::string& name, OpenMode mode, Caching caching) override {
    return Count(), disk_->Open(name, mode, caching);
  }
  void Close(FileId file) override { Count(), disk_->Close(file); }
  Result<void> Rename(const std::string& from, const std::string& to) override {
    return Count(), disk_->Rename(from, to);
  }
  Result<void> Remove(const std::string& name) override { return Count(), disk_->Remove(name); }
  Result<void> SyncDirectory() override { return Count(), disk_->SyncDirectory(); }
  bool Read(FileId file, uint64_t offset, std::span<std::byte> to, uint64_t tag) override {
    Count();
    return crashed_ ? (failed_ = tag, pending_ = true) : disk_->Read(file, offset, to, tag);
  }
  bool Write(FileId file, uint64_t offset, std::span<const std::byte> from, uint64_t tag) override {
    Count();
    return crashed_ ? (failed_ = tag, pending_ = true) : disk_->Write(file, offset, from, tag);
  }
  bool Flush(FileId file, uint64_t tag) override {
    Count();
    return crashed_ ? (failed_ = tag, pending_ = true) : disk_->Flush(file, tag);
  }
  // The dead never answer; here they fail, so that the caller under test comes back.
  size_t Poll(std::span<DiskCompletion> out) override {
    const bool was_pending = disk_->in_flight() > 0;
    Count();
    if (!crashed_) return disk_->Poll(out);
    if (!pending_ && !was_pending) return 0;
    pending_ = false;
    out[0] = {.tag = failed_, .error = EIO, .bytes = 0};
    return 1;
  }
  uint32_t in_flight() const override { return disk_->in_flight(); }
  void Wait(int64_t timeout_ns) override { disk_->Wait(timeout_ns); }
  const std::string& directory() const override { return disk_->directory(); }
  std::string_view backend() const override { return "crashing"; }

 private:
  void Count() {
    if (crashed_ || calls_left_-- > 0) return;
    crashed_ = true;
    medium_->Crash();
  }
  SimulatedDisk* medium_;
  std::unique_ptr<Disk> disk_;
  int calls_left_;
  bool crashed_ = false;
  bool pending_ = false;
  uint64_t failed_ = 0;
};

// A crash before each of the calls that ReplaceFile makes, and after the last: the file is the old
// or the new one, whole; and the new one once ReplaceFile has said so. Fails without the flush (the
// name survives, the bytes do not) and without the sync.
TEST(SimulatedDiskTest, ReplaceFileIsAtomicInACrash) {
  std::set<std::string> outcomes;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    for (int crash_at = 0; crash_at < 30; ++crash_at) {
      SimulatedClock clock;
      SimulatedDisk medium(&clock, seed);
      const auto old_content = Filled(3'000, 1);
      const auto new_content = Filled(2'000, 2);
      ASSERT_TRUE(ReplaceFile(*medium.Open(kDirectory), "f", old_content).has_value());
      CrashingDisk crashing(&medium, medium.Open(kDirectory), crash_at);
      const bool done = ReplaceFile(crashing, "f", new_content).has_value();
      medium.Crash();
      const auto content = medium.ContentOf(kDirectory, "f");
      ASSERT_TRUE(content.has_value()) << "seed " << seed << " call " << crash_at;
      ASSERT_TRUE(*content == old_content || *content == new_content)
          << "seed " << seed << " call " << crash_at;
      if (done) {
        ASSERT_EQ(*content, new_content) << "seed " << seed << " call " << crash_at;
      }
      outcomes.insert(std::string(done ? "done" : "not done") +
                      (*content == new_content ? " new" : " old"));
    }
  }
  EXPECT_EQ(outcomes, (std::set<std::string>{"done new", "not done new", "not done old"}));
}

TEST(SimulatedDiskTest, ReplaceFileKeepsTheOldOneWhenTheDiskFails) {
  for (const bool write_fails : {true, false}) {
    SimulatedClock clock;
    SimulatedDisk medium(&clock, 1);
    const auto disk = medium.Open(kDirectory);
    ASSERT_TRUE(ReplaceFile(*disk, "f", Filled(100, 1)).has_value());
    medium.SetFaults({.write_error_probability = write_fails ? 1.0 : 0.0,
                      .flush_error_probability = write_fails ? 0.0 : 1.0});
    const auto replaced = ReplaceFile(*disk, "f", Filled(100, 2));
    ASSERT_FALSE(replaced.has_value());
    EXPECT_NE(replaced.error().message.find("data/f.new"), std::string::npos)
        << replaced.error().message;
    EXPECT_EQ(*medium.ContentOf(kDirectory, "f"), Filled(100, 1));
    medium.SetFaults({});
    EXPECT_TRUE(ReplaceFile(*disk, "f", Filled(100, 3)).has_value()) << "and can be tried again";
  }
}

TEST(SimulatedDiskTest, FillsAndRecovers) {
  SimulatedClock clock;
  SimulatedDisk medium(&clock, 1, {.capacity_bytes = 10 * kSector});
  const auto disk = medium.Open(kDirectory);
  const auto first = disk->Open("a", OpenMode::kCreate, Caching::kBuffered);
  const auto second = disk->Open("b", OpenMode::kCreate, Caching::kBuffered);
  ASSERT_EQ(WriteNow(*disk, first->id, 0, Filled(6 * kSector, 1)), 0);
  EXPECT_EQ(WriteNow(*disk, second->id, 0, Filled(5 * kSector, 1)), ENOSPC);
  EXPECT_LE(medium.used_bytes(), 10 * kSector);
  EXPECT_EQ(WriteNow(*disk, first->id, 0, Filled(6 * kSector, 2)), 0) << "it does not grow";
  disk->Close(first->id);
  ASSERT_TRUE(disk->Remove("a").has_value());
  EXPECT_EQ(WriteNow(*disk, second->id, 0, Filled(5 * kSector, 1)), 0);
}

TEST(SimulatedDiskTest, FailsAsOftenAsItIsTold) {
  SimulatedClock clock;
  SimulatedDisk medium(&clock, 1, {.read_error_probability = 0.2, .write_error_probability = 0.3});
  const auto disk = medium.Open(kDirectory);
  const auto file = disk->Open("f", OpenMode::kCreate, Caching::kBuffered);
  int write_errors = 0;
  int read_errors = 0;
  std::vector<std::byte> read(10);
  for (int i = 0; i < 2'000; ++i) {
    write_errors += WriteNow(*disk, file->id, 0, Filled(10, 1)) == EIO;
    ASSERT_TRUE(disk->Read(file->id, 0, read, 0));
    read_errors += Await(*disk).error == EIO;
    ASSERT_EQ(FlushNow(*disk, file->id), 0);
  }
  EXPECT_NEAR(write_errors, 600, 100);
  EXPECT_NEAR(read_errors, 400, 100);
}

TEST(SimulatedDiskTest, DisksFromBeforeTheCrashAreDead) {
  SimulatedClock clock;
  SimulatedDisk medium(&clock, 1);
  const auto bytes = Filled(10, 1);
  const auto old = medium.Open(kDirectory);
  ASSERT_TRUE(old->LockDirectory().has_value());
  const auto file = old->Open("f", OpenMode::kCreate, Caching::kBuffered);
  ASSERT_TRUE(old->Write(file->id, 0, bytes, 0));
  medium.Crash();
  clock.AdvanceNs(kNanosPerSecond);
  DiskCompletion end;
  EXPECT_EQ(old->in_flight(), 0u);
  EXPECT_EQ(old->Poll(std::span(&end, 1)), 0u);
  EXPECT_FALSE(old->Write(file->id, 0, bytes, 0));
  EXPECT_FALSE(old->Open("g", OpenMode::kCreate, Caching::kBuffered).has_value());
  EXPECT_EQ(old->LockDirectory().error().code, ErrorCode::kUnavailable);
  const auto fresh = medium.Open(kDirectory);
  EXPECT_TRUE(fresh->LockDirectory().has_value()) << "a lock does not outlive its machine";
}

TEST(SimulatedDiskTest, FlipsOneBit) {
  SimulatedClock clock;
  SimulatedDisk medium(&clock, 1);
  const auto disk = medium.Open(kDirectory);
  ASSERT_TRUE(ReplaceFile(*disk, "f", Filled(100, 0)).has_value());
  medium.FlipBit(kDirectory, "f", 8 * 40 + 3);
  auto want = Filled(100, 0);
  want[40] = std::byte{8};
  EXPECT_EQ(*medium.ContentOf(kDirectory, "f"), want);
  medium.Crash();
  EXPECT_EQ(*medium.ContentOf(kDirectory, "f"), want);
}

// A failing seed must fail again.
TEST(SimulatedDiskTest, TheSameSeedGivesTheSameTrace) {
  const auto trace = [](uint64_t seed) {
    SimulatedClock clock;
    SimulatedDisk medium(&clock, seed, {.write_error_probability = 0.1});
    SplitMix64 random(seed);
    std::vector<uint64_t> events;
    {
      const auto disk = medium.Open(kDirectory);
      const auto file = disk->Open("f", OpenMode::kCreate, Caching::kBuffered);
      const auto bytes = Filled(3'000, 7);
      for (uint64_t i = 0; i < 100; ++i) {
        EXPECT_TRUE(disk->Write(file->id, random.Below(10'000), bytes, i));
        if (i % 10 == 0) {
          EXPECT_TRUE(disk->Flush(file->id, 1'000 + i));
        }
        clock.AdvanceNs(20'000);
        std::array<DiskCompletion, 8> ends;
        const size_t count = disk->Poll(ends);
        for (size_t e = 0; e < count; ++e) {
          events.push_back(ends[e].tag << 8 | static_cast<uint64_t>(ends[e].error));
        }
      }
      EXPECT_TRUE(disk->SyncDirectory().has_value());
      medium.Crash();
    }
    uint64_t hash = 0;
    const auto content = medium.ContentOf(kDirectory, "f");
    for (const std::byte byte : *content) {
      hash = MixBits(hash ^ static_cast<uint64_t>(byte));
    }
    events.push_back(hash);
    return events;
  };
  EXPECT_EQ(trace(5), trace(5));
  EXPECT_NE(trace(5), trace(6));
}

}  // namespace
}  // namespace engram
