#include "index/log/segment_keeper.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "src/core/log_files.h"
#include "src/core/simulated_disk.h"
#include "tests/index/log/log_builder.h"

namespace engram {
namespace {

constexpr uint32_t kSegmentBytes = 128 * 1024;

SegmentKeeperOptions Options() {
  SegmentKeeperOptions options;
  options.instance = kTestInstance;
  options.segment_bytes = kSegmentBytes;
  options.ahead = 2;
  options.spare = 1;
  options.retry_ns = kNanosPerMilli;
  return options;
}

// The machine stops at the operation with this number.
class CountedDisk final : public Disk {
 public:
  CountedDisk(std::unique_ptr<Disk> disk, SimulatedDisk* medium, int crash_at)
      : disk_(std::move(disk)), medium_(medium), left_(crash_at) {}

  Result<void> LockDirectory() override { return disk_->LockDirectory(); }
  Result<std::vector<DirectoryEntry>> List() override { return disk_->List(); }
  Result<DiskFile> Open(const std::string& name, OpenMode mode, Caching caching) override {
    Count();
    return disk_->Open(name, mode, caching);
  }
  void Close(FileId file) override { disk_->Close(file); }
  Result<void> Rename(const std::string& from, const std::string& to) override {
    Count();
    return disk_->Rename(from, to);
  }
  Result<void> Remove(const std::string& name) override {
    Count();
    return disk_->Remove(name);
  }
  Result<void> SyncDirectory() override {
    Count();
    return disk_->SyncDirectory();
  }
  bool Read(FileId file, uint64_t offset, std::span<std::byte> to, uint64_t tag) override {
    Count();
    return disk_->Read(file, offset, to, tag) || Dead(tag);
  }
  bool Write(FileId file, uint64_t offset, std::span<const std::byte> from, uint64_t tag) override {
    Count();
    return disk_->Write(file, offset, from, tag) || Dead(tag);
  }
  bool Flush(FileId file, uint64_t tag) override {
    Count();
    return disk_->Flush(file, tag) || Dead(tag);
  }
  size_t Poll(std::span<DiskCompletion> out) override {
    size_t count = disk_->Poll(out);
    for (; count < out.size() && !failed_.empty(); ++count) {
      out[count] = failed_.back();
      failed_.pop_back();
    }
    return count;
  }
  uint32_t in_flight() const override {
    return disk_->in_flight() + static_cast<uint32_t>(failed_.size());
  }
  void Wait(int64_t timeout_ns) override { disk_->Wait(timeout_ns); }
  const std::string& directory() const override { return disk_->directory(); }
  std::string_view backend() const override { return disk_->backend(); }

  bool crashed() const { return crashed_; }

 private:
  void Count() {
    if (--left_ != 0) return;
    crashed_ = true;
    medium_->Crash();
  }
  // Nobody waits for a machine that is gone.
  bool Dead(uint64_t tag) {
    if (crashed_) failed_.push_back({.tag = tag, .error = EIO, .bytes = 0});
    return crashed_;
  }

  std::unique_ptr<Disk> disk_;
  SimulatedDisk* const medium_;
  int left_;
  bool crashed_ = false;
  std::vector<DiskCompletion> failed_;
};

class SegmentKeeperTest : public testing::Test {
 protected:
  void Start(uint32_t last, const SegmentKeeperOptions& options = Options()) {
    keeper_.reset();
    disk_ = medium_.Open("log");
    handoff_ = std::make_unique<SegmentHandoff>();
    keeper_ = std::make_unique<SegmentKeeper>(options, disk_.get(), &clock_, handoff_.get());
    ASSERT_TRUE(keeper_->Start(last).has_value());
  }
  void Step() {
    clock_.AdvanceNs(50'000);
    keeper_->Poll();
  }
  bool StepUntilPrepared(uint32_t number) {
    for (int i = 0; i < 20'000 && handoff_->prepared.load() < number; ++i) Step();
    return handoff_->prepared.load() >= number;
  }
  std::vector<std::string> Names() {
    std::vector<std::string> names;
    const auto entries = medium_.Open("log")->List();
    for (const DirectoryEntry& entry : *entries) names.push_back(entry.name);
    return names;
  }
  void ExpectReady(uint32_t number, bool recycled = false) {
    const auto content = medium_.ContentOf("log", SegmentName(number));
    ASSERT_TRUE(content.has_value()) << number;
    ASSERT_EQ(content->size(), kSegmentBytes);
    SegmentHeader header;
    EXPECT_EQ(ParseSegmentHeader(std::span(*content).first(kLogPageBytes), &header), "");
    EXPECT_EQ(header.number, number);
    EXPECT_EQ(header.recycled, recycled);
    if (recycled) return;
    EXPECT_TRUE(std::ranges::all_of(std::span(*content).subspan(kLogPageBytes),
                                    [](std::byte byte) { return byte == std::byte{0}; }));
  }

  SimulatedClock clock_;
  SimulatedDisk medium_{&clock_, 3};
  std::unique_ptr<Disk> disk_;
  std::unique_ptr<SegmentHandoff> handoff_;
  std::unique_ptr<SegmentKeeper> keeper_;
};

TEST_F(SegmentKeeperTest, PreparesSomeAheadThatSurviveAPowerCut) {
  Start(0);
  ASSERT_TRUE(StepUntilPrepared(2));
  for (int i = 0; i < 100; ++i) Step();
  EXPECT_EQ(handoff_->prepared.load(), 2u) << "no more than asked for";
  medium_.Crash();
  EXPECT_EQ(Names(), (std::vector<std::string>{SegmentName(1), SegmentName(2)}));
  ExpectReady(1);
  ExpectReady(2);
  Start(1);
  EXPECT_EQ(handoff_->prepared.load(), 2u) << "what was prepared is taken over";
  ASSERT_TRUE(StepUntilPrepared(3));
}

TEST_F(SegmentKeeperTest, AFullDiskIsSaidAndTriedAgain) {
  SimulatedDiskFaults full;
  full.capacity_bytes = kSegmentBytes + kSegmentBytes / 2;
  medium_.SetFaults(full);
  Start(0);
  ASSERT_TRUE(StepUntilPrepared(1));
  for (int i = 0; i < 200; ++i) Step();
  EXPECT_EQ(handoff_->prepared.load(), 1u);
  EXPECT_EQ(handoff_->trouble.load(), SegmentTrouble::kDiskFull);
  for (int i = 0; i < 200 && medium_.used_bytes() > kSegmentBytes; ++i) Step();
  EXPECT_EQ(medium_.used_bytes(), kSegmentBytes) << "what was begun does not take the room";
  medium_.SetFaults({});
  ASSERT_TRUE(StepUntilPrepared(2));
  EXPECT_EQ(handoff_->trouble.load(), SegmentTrouble::kNone);
}

TEST_F(SegmentKeeperTest, WhatIsKeptFreeIsLeftButFreedOnesAreUsedAgain) {
  SimulatedDiskFaults small;
  small.capacity_bytes = 3 * kSegmentBytes;
  medium_.SetFaults(small);
  Start(0);
  keeper_->KeepFree(kSegmentBytes + 1);
  ASSERT_TRUE(StepUntilPrepared(1));
  for (int i = 0; i < 200; ++i) Step();
  EXPECT_EQ(handoff_->prepared.load(), 1u);
  EXPECT_EQ(handoff_->trouble.load(), SegmentTrouble::kDiskFull);
  keeper_->KeepFree(kSegmentBytes);
  ASSERT_TRUE(StepUntilPrepared(2));
  handoff_->current.store(2);
  for (int i = 0; i < 200; ++i) Step();
  EXPECT_EQ(handoff_->prepared.load(), 2u);
  keeper_->Free(1);
  ASSERT_TRUE(StepUntilPrepared(3));
}

TEST_F(SegmentKeeperTest, ADiskThatFailsIsSaidAndTriedAgain) {
  Start(0);
  medium_.SetFaults({.write_error_probability = 1});
  for (int i = 0; i < 200; ++i) Step();
  EXPECT_EQ(handoff_->prepared.load(), 0u);
  EXPECT_EQ(handoff_->trouble.load(), SegmentTrouble::kFailing);
  medium_.SetFaults({.flush_error_probability = 1});
  for (int i = 0; i < 200; ++i) Step();
  EXPECT_EQ(handoff_->prepared.load(), 0u) << "not before it is flushed";
  medium_.SetFaults({});
  ASSERT_TRUE(StepUntilPrepared(1));
}

TEST_F(SegmentKeeperTest, FirstOneSaysWhatIsMissing) {
  SimulatedDiskFaults full;
  full.capacity_bytes = 1'000;
  medium_.SetFaults(full);
  Start(0);
  const auto prepared = keeper_->PrepareFirst();
  ASSERT_FALSE(prepared.has_value());
  EXPECT_NE(prepared.error().message.find("log/segment-00000001.log"), std::string::npos)
      << prepared.error().message;
}

TEST_F(SegmentKeeperTest, FreedOnesAreUsedAgainAndTheRestIsRemoved) {
  Start(0);
  ASSERT_TRUE(StepUntilPrepared(2));
  handoff_->current.store(2);
  keeper_->Free(1);
  ASSERT_TRUE(StepUntilPrepared(3));
  ExpectReady(3, /*recycled=*/true);
  ASSERT_TRUE(StepUntilPrepared(4));
  const std::vector<std::string> names = Names();
  EXPECT_EQ(std::ranges::count(names, SegmentName(1)), 0);
  // Two more than are kept.
  handoff_->current.store(4);
  ASSERT_TRUE(StepUntilPrepared(6));
  for (const uint32_t number : {3u, 1u, 2u}) keeper_->Free(number);
  for (int i = 0; i < 50; ++i) Step();
  EXPECT_EQ(Names().size(), 4u) << "4, 5, 6 and one to spare";
}

// Any set may be freed: what is kept between stays as it is, and is told from what is spare.
TEST_F(SegmentKeeperTest, WhatIsFreedLeavesGaps) {
  Start(0);
  for (uint32_t number = 1; number <= 6; ++number) {
    ASSERT_TRUE(StepUntilPrepared(number));
    handoff_->current.store(number);
  }
  for (const uint32_t number : {2u, 4u, 5u, 4u, 99u}) {
    if (number < 6) keeper_->Free(number);
  }
  ASSERT_TRUE(StepUntilPrepared(8));
  for (int i = 0; i < 50; ++i) Step();
  const std::vector<std::string> names = Names();
  EXPECT_EQ(names.size(), 6u) << "1, 3, 6, 7, 8 and one to spare";
  for (const uint32_t number : {1u, 3u, 6u, 7u, 8u}) {
    EXPECT_EQ(std::ranges::count(names, SegmentName(number)), 1) << number;
    EXPECT_TRUE(keeper_->segments().contains(number)) << number;
  }
  EXPECT_EQ(keeper_->segments().size(), 5u);
  // A restart knows what is there, and not what was freed.
  Start(6);
  EXPECT_EQ(keeper_->segments().size(), 6u);
  EXPECT_EQ(keeper_->segments().at(3), kSegmentBytes);
}

// At each of its operations the power fails. Nothing that looks ready is not, and the next start
// prepares the same.
TEST_F(SegmentKeeperTest, APowerCutAnywhereLeavesNothingThatLooksReady) {
  for (const bool recycle : {false, true}) {
    int cuts = 0;
    bool was_cut = true;
    for (int crash_at = 1; was_cut; ++crash_at) {
      was_cut = false;
      for (uint64_t seed = 1; seed <= 4; ++seed) {
        SCOPED_TRACE(std::to_string(crash_at) + " seed " + std::to_string(seed));
        SimulatedClock clock;
        SimulatedDisk medium(&clock, seed);
        uint32_t first = 0;
        if (recycle) {
          // A segment that was written and freed.
          const auto disk = medium.Open("log");
          SegmentHandoff handoff;
          SegmentKeeper keeper(Options(), disk.get(), &clock, &handoff);
          ASSERT_TRUE(keeper.Start(0).has_value());
          ASSERT_TRUE(keeper.PrepareFirst().has_value());
          handoff.current.store(1);
          ASSERT_TRUE(keeper.PrepareFirst().has_value());
          first = 2;
        }
        bool crashed = false;
        uint32_t prepared = 0;
        {
          CountedDisk disk(medium.Open("log"), &medium, crash_at);
          SegmentHandoff handoff;
          SegmentKeeper keeper(Options(), &disk, &clock, &handoff);
          if (keeper.Start(first) && first > 0) keeper.Free(1);
          for (int i = 0; i < 100 && !disk.crashed(); ++i) {
            clock.AdvanceNs(50'000);
            keeper.Poll();
          }
          crashed = disk.crashed();
          prepared = handoff.prepared.load();
        }
        cuts += crashed ? 1 : 0;
        was_cut |= crashed;
        if (!crashed) medium.Crash();
        for (uint32_t number = first + 1; number <= first + 2; ++number) {
          const auto content = medium.ContentOf("log", SegmentName(number));
          SegmentHeader header;
          const bool sound =
              content && content->size() == kSegmentBytes &&
              ParseSegmentHeader(std::span(*content).first(kLogPageBytes), &header).empty() &&
              header.number == number;
          EXPECT_TRUE(sound || (number > prepared && !content)) << number;
        }
        const auto disk = medium.Open("log");
        SegmentHandoff handoff;
        SegmentKeeper keeper(Options(), disk.get(), &clock, &handoff);
        ASSERT_TRUE(keeper.Start(first).has_value());
        const auto entries = disk->List();
        EXPECT_TRUE(std::ranges::none_of(*entries, [](const DirectoryEntry& entry) {
          return entry.name.ends_with(kTemporarySuffix);
        })) << "what was not finished is removed";
        ASSERT_TRUE(keeper.PrepareFirst().has_value());
      }
    }
    EXPECT_GT(cuts, 20) << "there are that many operations";
  }
}

}  // namespace
}  // namespace engram
