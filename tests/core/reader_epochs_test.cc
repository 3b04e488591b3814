#include "src/core/reader_epochs.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace engram {
namespace {

TEST(ReaderEpochsTest, WithNobodyInsideEveryEpochHasPassed) {
  ReaderEpochs epochs(3);
  EXPECT_EQ(epochs.readers(), 3u);
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(epochs.Passed(epochs.Close()));
  ReaderEpochs nobody(0);
  EXPECT_TRUE(nobody.Passed(nobody.Close()));
}

TEST(ReaderEpochsTest, TheEpochOnlyRises) {
  ReaderEpochs epochs(1);
  ReaderEpochs::Epoch before = epochs.Close();
  EXPECT_NE(before, 0u) << "0 says that nobody is inside";
  for (int i = 0; i < 5; ++i) {
    const ReaderEpochs::Epoch now = epochs.Close();
    EXPECT_GT(now, before);
    before = now;
  }
}

// Whoever entered before an epoch was closed may have what was taken out before that.
TEST(ReaderEpochsTest, AReaderHoldsTheEpochThatItEnteredInAndAllLaterOnes) {
  ReaderEpochs epochs(1);
  const ReaderEpochs::Epoch earlier = epochs.Close();
  epochs.Enter(0);
  const ReaderEpochs::Epoch first = epochs.Close();
  const ReaderEpochs::Epoch second = epochs.Close();
  EXPECT_TRUE(epochs.Passed(earlier)) << "closed before it entered";
  EXPECT_FALSE(epochs.Passed(first));
  EXPECT_FALSE(epochs.Passed(second));
  epochs.Leave(0);
  EXPECT_TRUE(epochs.Passed(first));
  EXPECT_TRUE(epochs.Passed(second));
}

TEST(ReaderEpochsTest, EnteringAgainDoesNotHoldWhatWasClosedBetween) {
  ReaderEpochs epochs(1);
  epochs.Enter(0);
  const ReaderEpochs::Epoch closed = epochs.Close();
  epochs.Leave(0);
  epochs.Enter(0);
  EXPECT_TRUE(epochs.Passed(closed));
  EXPECT_FALSE(epochs.Passed(epochs.Close()));
  epochs.Leave(0);
}

TEST(ReaderEpochsTest, EachPlaceCounts) {
  constexpr uint32_t kReaders = 5;
  ReaderEpochs epochs(kReaders);
  for (uint32_t reader = 0; reader < kReaders; ++reader) {
    epochs.Enter(reader);
    const ReaderEpochs::Epoch closed = epochs.Close();
    EXPECT_FALSE(epochs.Passed(closed)) << reader;
    epochs.Leave(reader);
    EXPECT_TRUE(epochs.Passed(closed)) << reader;
  }
  for (uint32_t reader = 0; reader < kReaders; ++reader) epochs.Enter(reader);
  const ReaderEpochs::Epoch closed = epochs.Close();
  for (uint32_t reader = 0; reader < kReaders; ++reader) {
    EXPECT_FALSE(epochs.Passed(closed)) << "until the last one has left";
    epochs.Leave(reader);
  }
  EXPECT_TRUE(epochs.Passed(closed));
}

TEST(ReaderEpochsTest, AGuardIsInsideFromConstructionToDestruction) {
  ReaderEpochs epochs(2);
  ReaderEpochs::Epoch closed = 0;
  {
    const ReaderGuard guard(&epochs, 1);
    closed = epochs.Close();
    EXPECT_FALSE(epochs.Passed(closed));
  }
  EXPECT_TRUE(epochs.Passed(closed));
}

TEST(ReaderEpochsDeathTest, APlaceDoesNotNest) {
  ReaderEpochs epochs(1);
  epochs.Enter(0);
  EXPECT_DEATH(epochs.Enter(0), "leaves before it enters again");
}

// One cell is published at a time. The writer spoils an earlier one once its epoch has passed: a
// reader that saw it spoiled, or a race that ThreadSanitizer sees, is a reader that was not waited
// for.
TEST(ReaderEpochsTest, NobodySeesWhatIsReused) {
  constexpr uint32_t kReaders = 2;
  constexpr uint64_t kTurns = 20'000;
  constexpr uint64_t kSpoilt = UINT64_MAX;
  constexpr size_t kCells = 256;
  ReaderEpochs epochs(kReaders);
  std::vector<std::array<uint64_t, 8>> cells(kCells);  // plain memory; a cell's numbers are equal
  std::vector<ReaderEpochs::Epoch> closed(kCells, 0);  // when the cell was taken out
  std::atomic<size_t> published{0};
  std::atomic<bool> done{false};
  std::array<std::atomic<uint64_t>, kReaders> looks{};
  std::array<std::atomic<uint64_t>, kReaders> wrong{};
  std::vector<std::thread> threads;
  for (uint32_t reader = 0; reader < kReaders; ++reader) {
    threads.emplace_back([&, reader] {
      while (!done.load(std::memory_order_acquire)) {
        const ReaderGuard guard(&epochs, reader);
        const auto& cell = cells[published.load(std::memory_order_acquire)];
        for (const uint64_t number : cell) {
          wrong[reader] += static_cast<uint64_t>(number == kSpoilt || number != cell[0]);
        }
        looks[reader].fetch_add(1, std::memory_order_relaxed);
      }
    });
  }
  size_t oldest = 0;  // of those that were taken out and not spoiled yet
  for (uint64_t turn = 0; turn < kTurns; ++turn) {
    const size_t old = turn % kCells;
    const size_t next = (old + 1) % kCells;
    cells[next].fill(turn);
    published.store(next, std::memory_order_release);
    closed[old] = epochs.Close();
    // A reader that is not running just now is waited for only when the cells are spent.
    while (oldest != next && (epochs.Passed(closed[oldest]) || (next + 1) % kCells == oldest)) {
      while (!epochs.Passed(closed[oldest])) std::this_thread::yield();
      cells[oldest].fill(kSpoilt);
      oldest = (oldest + 1) % kCells;
    }
    while (turn == kTurns / 2 && (looks[0] == 0 || looks[1] == 0)) std::this_thread::yield();
  }
  done.store(true, std::memory_order_release);
  for (std::thread& thread : threads) thread.join();
  for (uint32_t reader = 0; reader < kReaders; ++reader) {
    EXPECT_GT(looks[reader], 0u);
    EXPECT_EQ(wrong[reader], 0u);
  }
}

}  // namespace
}  // namespace engram
