#include "src/core/read_pins.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "src/core/hash.h"

namespace engram {
namespace {

TEST(ReadPinsTest, WithNobodyInsideEveryEpochHasPassed) {
  ReadPins pins(3);
  EXPECT_EQ(pins.readers(), 3u);
  for (int i = 0; i < 20; ++i) {
    const ReadPins::Epoch closed = pins.Close();
    EXPECT_NE(closed, 0u);
    EXPECT_TRUE(pins.Passed(closed));
    EXPECT_EQ(pins.current(), closed + 1);
  }
  ReadPins nobody(0);
  EXPECT_TRUE(nobody.Passed(nobody.Close()));
}

// Whoever entered before an epoch was closed may have been given what is removed after that.
TEST(ReadPinsTest, AReaderHoldsTheEpochThatItEnteredInAndAllLaterOnes) {
  ReadPins pins(1);
  const ReadPins::Epoch earlier = pins.Close();
  const ReadPins::Epoch inside = pins.Enter(0);
  const ReadPins::Epoch first = pins.Close();
  const ReadPins::Epoch second = pins.Close();
  EXPECT_EQ(inside, first);
  EXPECT_TRUE(pins.Passed(earlier)) << "closed before it entered";
  EXPECT_FALSE(pins.Passed(first));
  EXPECT_FALSE(pins.Passed(second));
  pins.Leave(0, inside);
  EXPECT_TRUE(pins.Passed(first));
  EXPECT_TRUE(pins.Passed(second));
}

TEST(ReadPinsTest, WhoEntersAfterwardsHoldsNothing) {
  ReadPins pins(2);
  const ReadPins::Epoch before = pins.Enter(0);
  const ReadPins::Epoch closed = pins.Close();
  const ReadPins::Epoch after = pins.Enter(1);
  EXPECT_NE(before, after);
  EXPECT_FALSE(pins.Passed(closed));
  pins.Leave(0, before);
  EXPECT_TRUE(pins.Passed(closed));
  EXPECT_FALSE(pins.Passed(pins.Close()));
  pins.Leave(1, after);
}

// A place is inside as often as it has answers under way.
TEST(ReadPinsTest, EachOfAPlacesAnswersCounts) {
  ReadPins pins(2);
  std::array<ReadPins::Epoch, 3> inside{};
  for (ReadPins::Epoch& epoch : inside) epoch = pins.Enter(1);
  const ReadPins::Epoch closed = pins.Close();
  for (const ReadPins::Epoch epoch : inside) {
    EXPECT_FALSE(pins.Passed(closed));
    pins.Leave(1, epoch);
  }
  EXPECT_TRUE(pins.Passed(closed));
}

// Else a count would be taken for one of another epoch.
TEST(ReadPinsTest, NoMoreEpochsAreClosedThanAreToldApart) {
  ReadPins pins(1);
  const ReadPins::Epoch inside = pins.Enter(0);
  ReadPins::Epoch last = 0;
  int closed = 0;
  while (const ReadPins::Epoch epoch = pins.Close()) {
    EXPECT_FALSE(pins.Passed(epoch));
    last = epoch;
    ASSERT_LT(++closed, 100);
  }
  EXPECT_EQ(pins.Close(), 0u);
  EXPECT_FALSE(pins.Passed(last));
  pins.Leave(0, inside);
  EXPECT_TRUE(pins.Passed(last));
  EXPECT_NE(pins.Close(), 0u);
}

TEST(ReadPinsDeathTest, WhoLeavesHasEntered) {
  ReadPins pins(1);
  EXPECT_DEATH(pins.Leave(0, pins.current()), "who leaves has entered");
}

// What a reader found before it left is never marked as removed.
TEST(ReadPinsTest, NothingIsRemovedUnderAReader) {
  constexpr int kRounds = 300;
  constexpr uint32_t kReaders = 2;
  ReadPins pins(kReaders);
  std::array<std::atomic<bool>, kRounds + 1> removed{};
  std::atomic<int> named{0};  // what whoever asks is given
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> wrong{0};
  std::atomic<uint64_t> reads{0};
  std::vector<std::thread> readers;
  for (uint32_t r = 0; r < kReaders; ++r) {
    readers.emplace_back([&, r] {
      SplitMix64 random(r);
      while (!stop.load()) {
        const ReadPins::Epoch epoch = pins.Enter(r);
        const int found = named.load(std::memory_order_acquire);
        for (uint64_t i = random.Below(4); i > 0; --i) std::this_thread::yield();
        if (removed[static_cast<size_t>(found)].load()) wrong.fetch_add(1);
        pins.Leave(r, epoch);
        reads.fetch_add(1);
      }
    });
  }
  while (reads.load() == 0) std::this_thread::yield();
  for (int i = 0; i < kRounds; ++i) {
    named.store(i + 1, std::memory_order_release);
    ReadPins::Epoch closed = 0;
    while ((closed = pins.Close()) == 0) std::this_thread::yield();
    while (!pins.Passed(closed)) std::this_thread::yield();
    removed[static_cast<size_t>(i)].store(true);
  }
  stop.store(true);
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(wrong.load(), 0u);
}

}  // namespace
}  // namespace engram
