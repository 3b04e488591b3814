#include "src/core/counters.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <thread>

namespace engram {
namespace {

enum class Event : uint8_t { kAccepted, kRefused };

TEST(CounterTest, AddsSetsAndKeepsTheLargest) {
  Counter counter;
  EXPECT_EQ(counter.Read(), 0u);
  counter.Add(3);
  counter.Add(4);
  EXPECT_EQ(counter.Read(), 7u);
  counter.SetMax(5);
  EXPECT_EQ(counter.Read(), 7u);
  counter.SetMax(9);
  EXPECT_EQ(counter.Read(), 9u);
  counter.Set(1);
  EXPECT_EQ(counter.Read(), 1u);
}

TEST(CounterSetTest, NamesAreApart) {
  CounterSet<Event, 2> counters;
  counters[Event::kAccepted].Add(2);
  counters[Event::kRefused].Add(5);
  const auto& view = counters;
  EXPECT_EQ(view[Event::kAccepted].Read(), 2u);
  EXPECT_EQ(view[Event::kRefused].Read(), 5u);
}

// Two cores' counters side by side in an array must not share a line.
static_assert(alignof(CounterSet<Event, 2>) == kFalseSharingBytes);
static_assert(sizeof(CounterSet<Event, 2>) % kFalseSharingBytes == 0);

// ThreadSanitizer would name the race, were the counter a plain integer.
TEST(CounterTest, AnotherThreadReadsWhileTheOwnerWrites) {
  constexpr uint64_t kAdds = 200'000;
  Counter counter;
  std::atomic<bool> done{false};
  std::thread reader([&] {
    uint64_t last = 0;
    while (!done.load(std::memory_order_acquire)) {
      const uint64_t now = counter.Read();
      ASSERT_GE(now, last);
      last = now;
    }
  });
  for (uint64_t i = 0; i < kAdds; ++i) counter.Add(1);
  done.store(true, std::memory_order_release);
  reader.join();
  EXPECT_EQ(counter.Read(), kAdds);
}

}  // namespace
}  // namespace engram
