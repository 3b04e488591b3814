// Many vectors linked in batches through one space, some updated and some deleted on the way, then
// the space dropped: everything is sound on the way, and all memory is given back.
//
// The suite takes some thousands. The long form, for the AddressSanitizer tree, whose
// LeakSanitizer looks again at the end:
//
//   ENGRAM_BULK_ROWS=1000000 build/asan/tests/space_bulk_test

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "index/recall_job.h"
#include "index/space.h"
#include "src/core/hash.h"
#include "src/core/reader_epochs.h"
#include "tests/index/coded_space_rig.h"
#include "tests/index/latent_vector.h"
#include "tests/index/space_testing.h"
#include "tests/index/space_upkeep.h"
#include "tests/sim/program_seeds.h"
#include "tests/support/sanitized.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
// Of sanitizer/allocator_interface.h, which GCC does not install.
extern "C" size_t __sanitizer_get_current_allocated_bytes();
#endif

namespace engram {
namespace {

constexpr uint32_t kDimension = 96;
constexpr HnswBuildParams kBuild{.M = 12, .M0 = 24, .ef_construction = 80};
// Stored between two turns of upkeep: a batch.
constexpr uint64_t kTurn = 1'000;
// One in so many is deleted later, and one in so many updated.
constexpr uint64_t kDeletedOneIn = 6;
constexpr uint64_t kUpdatedOneIn = 6;
constexpr uint64_t kChecks = 4;  // of everything, on the way

// What malloc has handed out and not got back; 0 without AddressSanitizer, as malloc itself counts
// what it keeps for the next one.
size_t MallocBytes() {
#ifdef __SANITIZE_ADDRESS__
  return __sanitizer_get_current_allocated_bytes();
#else
  return 0;
#endif
}

class BulkRig {
 public:
  BulkRig(TestHeap* memory, uint64_t rows)
      : rows_(rows),
        generations_(rows),
        space_("bulk", OptionsOf(), &memory->heap, &epochs_),
        upkeep_(&space_, &memory->heap, kBuild),
        job_(&memory->heap) {}

  // Stores all rows, in turns with upkeep.
  void Fill() {
    for (uint64_t number = 0; number < rows_; ++number) {
      ASSERT_NO_FATAL_FAILURE(Store(number));
      ++stored_;
      if (stored_ % kTurn == 0) {
        ASSERT_NO_FATAL_FAILURE(ChangeSome());
      }
      if (stored_ % (rows_ / kChecks) == 0) {
        ASSERT_NO_FATAL_FAILURE(Check());
      }
    }
    space_.SetHorizon(stamp_);
    upkeep_.Run();
    ASSERT_NO_FATAL_FAILURE(Check());
    EXPECT_EQ(space_.unlinked_count(), 0u);
    EXPECT_TRUE(upkeep_.sweeps() > 0 || rows_ < 4 * kTurn);
    EXPECT_TRUE(space_.LinksInBatches());
    EXPECT_EQ(SpaceTestPeer::CodesViolation(space_), "");
  }

  // Of the rows that live each finds itself; those that were deleted are not found.
  void ExpectFound() {
    SplitMix64 random(7);
    constexpr uint64_t kAsked = 500;
    uint64_t asked = 0;
    uint64_t found = 0;
    while (asked < kAsked) {
      const uint64_t number = random.Below(rows_);
      const RecallAnswer answer = RunRecall(space_, &job_, VectorOf(number), {.k = 10, .ef = 128});
      ASSERT_EQ(answer.reason, RefusalReason::kNone);
      const bool is_hit = std::ranges::any_of(
          answer.hits, [&](const Hit& hit) { return hit.id == std::to_string(number); });
      if (generations_[number] == kDeleted) {
        EXPECT_FALSE(is_hit) << number << " was deleted";
        continue;
      }
      ++asked;
      found += static_cast<uint64_t>(is_hit);
    }
    EXPECT_GE(found, kAsked * 98 / 100);
  }

  // As a shard drops a space, in slices.
  void Dismantle() {
    while (!space_.Dismantle(1'000)) {
    }
  }

 private:
  static constexpr uint8_t kDeleted = UINT8_MAX;

  static SpaceOptions OptionsOf() {
    SpaceOptions options = TestSpaceOptions(Metric::kCosine, kDimension, kBuild);
    options.traversal = Traversal::kRabitq;
    options.graph_from = 500;
    return options;
  }
  std::vector<float> VectorOf(uint64_t number) const {
    return LatentVector(number + rows_ * (generations_[number] % kDeleted), kDimension);
  }
  void Store(uint64_t number) {
    const std::string id = std::to_string(number);
    const std::vector<float> vector = VectorOf(number);
    ObservationRef observation;
    observation.id = id;
    observation.dtype = VectorDtype::kF32;
    observation.dimension = kDimension;
    observation.vector = reinterpret_cast<const std::byte*>(vector.data());
    ASSERT_EQ(space_.Upsert(observation, ++stamp_).reason, RefusalReason::kNone);
  }
  // Of the rows that are in; then upkeep.
  void ChangeSome() {
    for (uint64_t i = 0; i < kTurn / kDeletedOneIn; ++i) {
      const uint64_t number = random_.Below(stored_);
      if (generations_[number] == kDeleted) continue;
      generations_[number] = kDeleted;
      ++deleted_;
      ASSERT_TRUE(space_.Delete(std::to_string(number), ++stamp_, false).existed);
    }
    for (uint64_t i = 0; i < kTurn / kUpdatedOneIn; ++i) {
      const uint64_t number = random_.Below(stored_);
      if (generations_[number] >= kDeleted - 1) continue;
      ++generations_[number];
      ASSERT_NO_FATAL_FAILURE(Store(number));
    }
    space_.SetHorizon(stamp_);
    upkeep_.Run();
  }
  void Check() {
    const Result<void> sound = space_.CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
    ASSERT_EQ(space_.live() + deleted_, stored_);
  }

  const uint64_t rows_;
  std::vector<uint8_t> generations_;  // times that a row was updated, or kDeleted
  ReaderEpochs epochs_{1};
  Space space_;
  SpaceUpkeep upkeep_;
  RecallJob job_;
  SplitMix64 random_{5};
  CommitStamp stamp_ = kNoStamp;
  uint64_t stored_ = 0;  // rows, updates aside
  uint64_t deleted_ = 0;
};

// Spaces of so many rows, the most first, in one heap after each other.
void FillAndDrop(std::initializer_list<uint64_t> counts) {
  TestHeap memory((size_t{256} << 20) + *counts.begin() * 3'072);
  size_t used = 0;
  for (const uint64_t count : counts) {
    auto rig = std::make_unique<BulkRig>(&memory, count);
    ASSERT_NO_FATAL_FAILURE(rig->Fill());
    ASSERT_NO_FATAL_FAILURE(rig->ExpectFound());
    rig->Dismantle();
    rig.reset();
    EXPECT_EQ(memory.heap.live_bytes(), 0u);
    if (used == 0) used = memory.arena.used_bytes();
  }
  // A block does for a smaller one where it is much larger, so a little more is taken.
  EXPECT_LE(memory.arena.used_bytes(), used + used / 50);
}

TEST(SpaceBulkTest, ManyAreLinkedInBatchesAndAllMemoryComesBack) {
  const uint64_t rows = FromEnvironment("ENGRAM_BULK_ROWS", kSanitized ? 8'000 : 20'000);
  ASSERT_NO_FATAL_FAILURE(FillAndDrop({2'000}));  // makes what is made once
  const size_t malloc_before = MallocBytes();
  // What the first space gave back is what the second one takes.
  ASSERT_NO_FATAL_FAILURE(FillAndDrop({rows, rows / 4}));
  EXPECT_EQ(MallocBytes(), malloc_before);
#ifdef __SANITIZE_ADDRESS__
  EXPECT_EQ(__lsan_do_recoverable_leak_check(), 0);
#endif
}

}  // namespace
}  // namespace engram
