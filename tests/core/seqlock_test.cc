#include "src/core/seqlock.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace engram {
namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr uint64_t kMeetings = 2'000;
#else
constexpr uint64_t kMeetings = 50'000;
#endif
constexpr uint64_t kMostStores = 80 * kMeetings;  // where the two do not run side by side

TEST(SeqlockTest, StartsAsTheDefaultValue) {
  struct Limits {
    uint32_t rate = 7;
    uint8_t level = 3;
  };
  const Seqlock<Limits> lock;
  EXPECT_EQ(lock.Load().rate, 7u);
  EXPECT_EQ(lock.Load().level, 3);
}

// Sizes that are no multiple of a word: the last word must come whole and not write past the value.
TEST(SeqlockTest, OddSizesSurvive) {
  using Bytes = std::array<uint8_t, 13>;
  Seqlock<Bytes> lock;
  Bytes value{};
  for (size_t i = 0; i < value.size(); ++i) value[i] = static_cast<uint8_t>(i + 1);
  lock.Store(value);
  struct Guarded {
    Bytes bytes{};
    std::array<uint8_t, 3> guard{0xAA, 0xBB, 0xCC};
  } guarded;
  ASSERT_TRUE(lock.TryLoad(&guarded.bytes));
  EXPECT_EQ(guarded.bytes, value);
  EXPECT_EQ(guarded.guard, (std::array<uint8_t, 3>{0xAA, 0xBB, 0xCC}));
}

// Wide, so that reader and writer often meet in the middle: most reads begin at an even version,
// for the writer rests between its stores. Fails when the version is not made odd, made even before
// the words are written, or not looked at again after them.
struct Wide {
  std::array<uint64_t, 64> words{};
};

TEST(SeqlockTest, AReadIsNeverTorn) {
  Seqlock<Wide> lock;
  std::atomic<uint64_t> meetings{0};  // reads that found another value than the one before
  std::atomic<bool> done{false};
  uint64_t torn = 0;
  uint64_t went_back = 0;
  std::thread reader([&] {
    uint64_t last = 0;
    while (!done.load(std::memory_order_acquire)) {
      Wide value;
      if (!lock.TryLoad(&value)) continue;
      for (const uint64_t word : value.words) torn += word != value.words[0];
      went_back += value.words[0] < last;
      if (value.words[0] != last) meetings.fetch_add(1, std::memory_order_relaxed);
      last = value.words[0];
    }
  });
  uint64_t stores = 0;
  while (meetings.load(std::memory_order_relaxed) < kMeetings && stores < kMostStores) {
    Wide value;
    value.words.fill(++stores);
    lock.Store(value);
    for (uint64_t i = 0; i < stores % 128; ++i) std::atomic_signal_fence(std::memory_order_seq_cst);
  }
  done.store(true, std::memory_order_release);
  reader.join();
  EXPECT_EQ(torn, 0u);
  EXPECT_EQ(went_back, 0u);
  EXPECT_EQ(lock.Load().words[63], stores);
}

// What the writer wrote before Store is visible to whoever loads the value: plain memory is
// published by index. ThreadSanitizer names the race when Store or TryLoad are too weak.
TEST(SeqlockTest, StorePublishesEarlierWrites) {
  constexpr uint64_t kEntries = 20'000;
  const auto entries = std::make_unique<uint64_t[]>(kEntries + 1);
  Seqlock<uint64_t> published;
  std::thread writer([&] {
    for (uint64_t i = 1; i <= kEntries; ++i) {
      entries[i] = i * 3;
      published.Store(i);
    }
  });
  uint64_t wrong = 0;
  for (uint64_t seen = 0; seen < kEntries;) {
    seen = published.Load();
    wrong += entries[seen] != seen * 3;
  }
  writer.join();
  EXPECT_EQ(wrong, 0u);
}

}  // namespace
}  // namespace engram
