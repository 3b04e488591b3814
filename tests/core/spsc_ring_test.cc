#include "src/core/spsc_ring.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <optional>
#include <random>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace engram {
namespace {

using Ring = SpscRing<uint64_t>;

static_assert(!std::is_copy_constructible_v<Ring::Producer>);
static_assert(!std::is_copy_constructible_v<Ring::Consumer>);
static_assert(std::is_nothrow_move_constructible_v<Ring::Producer>);
static_assert(std::is_nothrow_move_assignable_v<Ring::Consumer>);

TEST(SpscRingTest, CapacityIsRoundedUpToAPowerOfTwo) {
  for (const auto& [asked, given] :
       std::vector<std::pair<size_t, size_t>>{{1, 1}, {2, 2}, {3, 4}, {64, 64}, {65, 128}}) {
    auto [producer, consumer] = Ring::Create(asked);
    EXPECT_EQ(producer.capacity(), given);
    EXPECT_EQ(consumer.capacity(), given);
  }
}

// Every slot is used: a ring that keeps one free would refuse early, one that miscounts would
// overwrite.
TEST(SpscRingTest, HoldsExactlyItsCapacity) {
  for (const size_t capacity : {1u, 2u, 8u, 64u}) {
    auto [producer, consumer] = Ring::Create(capacity);
    for (int round = 0; round < 3; ++round) {  // Wraps.
      for (uint64_t i = 0; i < capacity; ++i) ASSERT_TRUE(producer.TryPush(i));
      EXPECT_TRUE(producer.Full());
      EXPECT_FALSE(producer.TryPush(99));
      EXPECT_EQ(producer.Depth(), capacity);
      EXPECT_EQ(consumer.Depth(), capacity);
      for (uint64_t i = 0; i < capacity; ++i) {
        ASSERT_EQ(consumer.Peek(), i) << "it stays";
        ASSERT_EQ(consumer.TryPop(), i);
      }
      EXPECT_EQ(consumer.Peek(), std::nullopt);
      EXPECT_EQ(consumer.TryPop(), std::nullopt);
      EXPECT_EQ(producer.Depth(), 0u);
    }
  }
}

TEST(SpscRingTest, EmptyBatchesDoNothing) {
  auto [producer, consumer] = Ring::Create(4);
  EXPECT_EQ(producer.PushBatch({}), 0u);
  std::vector<uint64_t> out(4);
  EXPECT_EQ(consumer.PopBatch(out), 0u);
  ASSERT_TRUE(producer.TryPush(1));
  EXPECT_EQ(consumer.PopBatch({}), 0u);
  EXPECT_EQ(consumer.Depth(), 1u);
}

TEST(SpscRingTest, HandlesCanMoveWithEntriesInTheRing) {
  auto [first_producer, first_consumer] = Ring::Create(4);
  ASSERT_TRUE(first_producer.TryPush(1));
  ASSERT_TRUE(first_producer.TryPush(2));
  ASSERT_EQ(first_consumer.TryPop(), 1u);
  Ring::Producer producer = std::move(first_producer);
  Ring::Consumer consumer;
  EXPECT_FALSE(consumer);
  consumer = std::move(first_consumer);
  EXPECT_TRUE(consumer);
  EXPECT_FALSE(first_producer);  // NOLINT(bugprone-use-after-move): this is what is tested.
  for (uint64_t i = 3; i <= 5; ++i) ASSERT_TRUE(producer.TryPush(i));
  EXPECT_FALSE(producer.TryPush(6));
  for (uint64_t i = 2; i <= 5; ++i) ASSERT_EQ(consumer.TryPop(), i);
}

TEST(SpscRingTest, EitherSideMayEndFirst) {
  std::optional<std::pair<Ring::Producer, Ring::Consumer>> ends(Ring::Create(4));
  Ring::Consumer consumer = std::move(ends->second);
  ASSERT_TRUE(ends->first.TryPush(7));
  ends.reset();
  EXPECT_EQ(consumer.TryPop(), 7u);  // AddressSanitizer would object to a dead ring.
}

// Against a model, all four operations in random order and sizes: stale cached indices, wrong wraps
// and off-by-ones in batches show as a difference.
TEST(SpscRingTest, BehavesLikeABoundedDeque) {
  for (uint64_t seed = 0; seed < 40; ++seed) {
    std::mt19937_64 random(seed);
    const size_t capacity = size_t{1} << (random() % 7);
    auto [producer, consumer] = Ring::Create(capacity);
    std::deque<uint64_t> model;
    uint64_t next = 0;
    for (int step = 0; step < 5'000; ++step) {
      switch (random() % 4) {
        case 0: {
          const bool pushed = producer.TryPush(next);
          ASSERT_EQ(pushed, model.size() < capacity) << "seed " << seed;
          if (pushed) model.push_back(next++);
          break;
        }
        case 1: {
          std::vector<uint64_t> values(random() % (2 * capacity + 2));
          for (size_t i = 0; i < values.size(); ++i) values[i] = next + i;
          const size_t pushed = producer.PushBatch(values);
          ASSERT_EQ(pushed, std::min(values.size(), capacity - model.size())) << "seed " << seed;
          model.insert(model.end(), values.begin(),
                       values.begin() + static_cast<std::ptrdiff_t>(pushed));
          next += pushed;
          break;
        }
        case 2: {
          const std::optional<uint64_t> popped = consumer.TryPop();
          ASSERT_EQ(popped.has_value(), !model.empty()) << "seed " << seed;
          if (!popped) break;
          ASSERT_EQ(*popped, model.front()) << "seed " << seed;
          model.pop_front();
          break;
        }
        case 3: {
          std::vector<uint64_t> out(random() % (2 * capacity + 2));
          const size_t popped = consumer.PopBatch(out);
          ASSERT_EQ(popped, std::min(out.size(), model.size())) << "seed " << seed;
          for (size_t i = 0; i < popped; ++i) {
            ASSERT_EQ(out[i], model.front()) << "seed " << seed;
            model.pop_front();
          }
          break;
        }
      }
      if (random() % 2 == 0) {  // Not always: it refreshes the producer's cached index.
        ASSERT_EQ(producer.Full(), model.size() == capacity) << "seed " << seed;
      }
      ASSERT_EQ(producer.Depth(), model.size());
      ASSERT_EQ(consumer.Depth(), model.size());
    }
  }
}

// An entry wide enough to tear.
struct Entry {
  uint64_t number = 0;
  uint64_t inverse = 0;
  uint64_t square = 0;
};
Entry MakeEntry(uint64_t i) { return {i, ~i, i * i}; }

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr uint64_t kEntries = 400'000;
#else
constexpr uint64_t kEntries = 4'000'000;
#endif

// Single pushes and pops mixed with batches, between two threads. The entries are plain memory, so
// ThreadSanitizer sees any index that is published too early or too weakly.
void StreamBetweenThreads(size_t capacity, uint64_t entries) {
  auto [producer, consumer] = SpscRing<Entry>::Create(capacity);
  std::thread writer([entries, ring = std::move(producer)]() mutable {
    std::vector<Entry> batch;
    uint64_t next = 0;
    while (next < entries) {
      size_t pushed = 0;
      if (next % 3 == 0) {
        pushed = ring.TryPush(MakeEntry(next)) ? 1 : 0;
      } else {
        batch.clear();
        const uint64_t end = std::min(entries, next + 1 + next % 32);
        for (uint64_t i = next; i < end; ++i) batch.push_back(MakeEntry(i));
        pushed = ring.PushBatch(batch);
      }
      next += pushed;
      if (pushed == 0) std::this_thread::yield();
    }
  });
  std::vector<Entry> out(24);
  uint64_t expected = 0;
  uint64_t wrong = 0;
  const auto check = [&](const Entry& entry) {
    const Entry want = MakeEntry(expected++);
    wrong +=
        entry.number != want.number || entry.inverse != want.inverse || entry.square != want.square;
  };
  while (expected < entries) {
    size_t popped = 0;
    if (expected % 5 == 0) {
      if (const std::optional<Entry> entry = consumer.TryPop()) {
        check(*entry);
        popped = 1;
      }
    } else {
      popped = consumer.PopBatch(out);
      for (size_t i = 0; i < popped; ++i) check(out[i]);
    }
    if (popped == 0) std::this_thread::yield();
  }
  writer.join();
  EXPECT_EQ(wrong, 0u);
  EXPECT_EQ(consumer.TryPop().has_value(), false);
}

TEST(SpscRingTest, StreamsInOrderBetweenThreads) { StreamBetweenThreads(1024, kEntries); }
TEST(SpscRingTest, StreamsThroughATinyRing) { StreamBetweenThreads(2, kEntries / 40); }

TEST(SpscRingDeathTest, NeedsRoom) { EXPECT_DEATH((void)Ring::Create(0), "room for one entry"); }

}  // namespace
}  // namespace engram
