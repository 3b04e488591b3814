#include "src/core/byte_ring.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <random>
#include <set>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "tests/support/random_bytes.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

// A ring with both of its handles.
struct Ends {
  explicit Ends(size_t capacity) : ring(capacity), producer(&ring), consumer(&ring) {
    EXPECT_TRUE(ring.TakeBuffer());
  }
  void Write(std::span<const std::byte> bytes) {
    const std::array<std::span<const std::byte>, 1> parts{bytes};
    ASSERT_TRUE(producer.HasRoom(bytes.size()));
    producer.Write(parts, bytes.size());
  }
  Bytes Read(size_t most) {
    Bytes bytes;
    consumer.Refresh();
    while (bytes.size() < most && consumer.Unread() > 0) {
      const auto part = consumer.Peek();
      const size_t step = std::min(part.size(), most - bytes.size());
      bytes.insert(bytes.end(), part.begin(), part.begin() + static_cast<std::ptrdiff_t>(step));
      consumer.Consume(step);
    }
    return bytes;
  }
  ByteRing ring;
  ByteRing::Producer producer;
  ByteRing::Consumer consumer;
};

// Every place is used: a ring that keeps one free would refuse early, one that miscounts would
// overwrite.
TEST(ByteRingTest, HoldsExactlyItsCapacity) {
  for (const size_t capacity : {1u, 2u, 64u, 8192u}) {
    Ends ends(capacity);
    for (uint64_t round = 0; round < 3; ++round) {
      const Bytes bytes = RandomBytes(round, capacity);
      EXPECT_EQ(ends.producer.Room(), capacity);
      ends.Write(bytes);
      EXPECT_EQ(ends.producer.Room(), 0u);
      EXPECT_FALSE(ends.producer.HasRoom(1));
      EXPECT_TRUE(ends.producer.HasRoom(0));
      EXPECT_EQ(ends.Read(capacity + 1), bytes);
      EXPECT_TRUE(ends.consumer.Empty());
      EXPECT_EQ(ends.consumer.Room(), capacity);
    }
  }
}

TEST(ByteRingTest, WritesTheFirstBytesOfSeveralParts) {
  Ends ends(64);
  const Bytes a = RandomBytes(1, 20);
  const Bytes b = RandomBytes(2, 30);
  const std::array<std::span<const std::byte>, 4> parts{a, {}, b, a};
  ASSERT_EQ(ends.producer.Room(), 64u);
  ends.producer.Write(parts, 45);
  Bytes expected = a;
  expected.insert(expected.end(), b.begin(), b.begin() + 25);
  EXPECT_EQ(ends.Read(100), expected);
}

TEST(ByteRingTest, WhatIsPeekedStaysUntilItIsConsumed) {
  Ends ends(64);
  const Bytes bytes = RandomBytes(3, 50);
  ends.Write(bytes);
  EXPECT_EQ(ends.consumer.Unread(), 0u) << "not looked for yet";
  EXPECT_FALSE(ends.consumer.Empty());
  EXPECT_EQ(ends.consumer.Refresh(), 50u);
  EXPECT_TRUE(std::ranges::equal(ends.consumer.Peek(), bytes));
  ends.consumer.Consume(20);
  EXPECT_TRUE(std::ranges::equal(ends.consumer.Peek(), std::span(bytes).subspan(20)));
  EXPECT_EQ(ends.producer.Room(), 34u);
  // Cut where the buffer ends.
  const Bytes more = RandomBytes(4, 34);
  ends.Write(more);
  ends.consumer.Refresh();
  EXPECT_EQ(ends.consumer.Unread(), 64u);
  EXPECT_EQ(ends.consumer.Peek().size(), 44u);
  ends.consumer.Consume(44);
  EXPECT_TRUE(std::ranges::equal(ends.consumer.Peek(), std::span(more).subspan(14)));
}

TEST(ByteRingTest, IsAsNewAfterAReset) {
  Ends ends(64);
  ends.Write(RandomBytes(5, 60));
  ends.ring.Reset();
  ends.producer = ByteRing::Producer(&ends.ring);
  ends.consumer = ByteRing::Consumer(&ends.ring);
  EXPECT_EQ(ends.consumer.Refresh(), 0u);
  EXPECT_TRUE(ends.consumer.Empty());
  const Bytes bytes = RandomBytes(6, 64);
  ends.Write(bytes);
  EXPECT_EQ(ends.Read(64), bytes);
}

// Small messages that are read at once keep to the first pages of a large ring, so that ten
// thousand quiet connections do not take the memory of ten thousand whole rings.
TEST(ByteRingTest, WhoeverIsReadAtOnceTouchesFewPages) {
  constexpr size_t kPage = 4096;
  Ends ends(size_t{64} * kPage);
  std::mt19937_64 random(7);
  std::set<size_t> pages;
  ends.Write(RandomBytes(0, 1));
  ends.consumer.Refresh();
  const std::byte* const first = ends.consumer.Peek().data();
  ends.consumer.Consume(1);
  for (uint64_t i = 0; i < 5'000; ++i) {
    const Bytes bytes = RandomBytes(i, 1 + random() % 1'000);
    ends.Write(bytes);
    ends.consumer.Refresh();
    ASSERT_TRUE(std::ranges::equal(ends.consumer.Peek(), bytes)) << "cut, or another's";
    pages.insert(static_cast<size_t>(ends.consumer.Peek().data() - first) / kPage);
    pages.insert(static_cast<size_t>(&ends.consumer.Peek().back() - first) / kPage);
    ends.consumer.Consume(bytes.size());
  }
  EXPECT_LE(pages.size(), 2u);
}

// Against a model, all operations in random order and sizes: stale cached indices, wrong wraps, a
// new start that forgets or repeats bytes show as a difference.
TEST(ByteRingTest, BehavesLikeABoundedDeque) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    std::mt19937_64 random(seed);
    const size_t capacity = size_t{1} << (random() % 15);
    // Some stay nearly empty, some nearly full.
    const size_t largest = 1 + random() % (capacity + 1);
    Ends ends(capacity);
    std::deque<std::byte> model;
    for (uint64_t step = 0; step < 2'000; ++step) {
      const size_t size = random() % (largest + 1);
      if (random() % 2 == 0) {
        const bool fits = size <= capacity - model.size();
        ASSERT_EQ(ends.producer.HasRoom(size), fits) << "seed " << seed;
        if (!fits) continue;
        const Bytes bytes = RandomBytes(seed * 10'000 + step, size);
        ends.Write(bytes);
        model.insert(model.end(), bytes.begin(), bytes.end());
      } else {
        const Bytes bytes = ends.Read(size);
        ASSERT_EQ(bytes.size(), std::min(size, model.size())) << "seed " << seed;
        const auto end = model.begin() + static_cast<std::ptrdiff_t>(bytes.size());
        ASSERT_TRUE(std::equal(bytes.begin(), bytes.end(), model.begin())) << "seed " << seed;
        model.erase(model.begin(), end);
        ASSERT_EQ(ends.consumer.Unread(), model.size()) << "seed " << seed;
      }
      ASSERT_EQ(ends.consumer.Empty(), model.empty()) << "seed " << seed;
      if (random() % 2 == 0) {  // Not always: it refreshes the producer's cached index.
        ASSERT_EQ(ends.producer.Room(), capacity - model.size()) << "seed " << seed;
      }
    }
  }
}

std::byte ByteAt(uint64_t position) {
  return static_cast<std::byte>((position * 0x9E3779B97F4A7C15) >> 56);
}

// The bytes are plain memory, so ThreadSanitizer sees any index that is published too early or too
// weakly, and a new start over bytes that are still being read.
void StreamBetweenThreads(size_t capacity, size_t largest, uint64_t total) {
  Ends ends(capacity);
  std::thread writer([&, producer = std::move(ends.producer)]() mutable {
    std::mt19937_64 random(1);
    Bytes bytes;
    for (uint64_t next = 0; next < total;) {
      const size_t size = std::min<size_t>(1 + random() % largest, total - next);
      bytes.resize(size);
      for (size_t i = 0; i < size; ++i) bytes[i] = ByteAt(next + i);
      const auto all = std::span<const std::byte>(bytes);
      const std::array<std::span<const std::byte>, 2> parts{all.first(size / 2),
                                                            all.subspan(size / 2)};
      while (!producer.HasRoom(size)) std::this_thread::yield();
      producer.Write(parts, size);
      next += size;
    }
  });
  std::mt19937_64 random(2);
  uint64_t position = 0;
  uint64_t wrong = 0;
  while (position < total) {
    ends.consumer.Refresh();
    if (ends.consumer.Unread() == 0) std::this_thread::yield();
    while (ends.consumer.Unread() > 0) {
      const auto part = ends.consumer.Peek();
      const size_t size = random() % 4 == 0 ? 1 + random() % part.size() : part.size();
      for (size_t i = 0; i < size; ++i) wrong += part[i] != ByteAt(position + i) ? 1 : 0;
      position += size;
      ends.consumer.Consume(size);
    }
  }
  writer.join();
  EXPECT_EQ(wrong, 0u);
  EXPECT_TRUE(ends.consumer.Empty());
}

constexpr uint64_t kTotal = kSanitized ? 4'000'000 : 40'000'000;
TEST(ByteRingTest, StreamsInOrderBetweenThreads) {
  StreamBetweenThreads(128 * 1024, 10'000, kTotal);
}
TEST(ByteRingTest, StreamsThroughATinyRing) { StreamBetweenThreads(64, 40, kTotal / 40); }
TEST(ByteRingTest, StreamsThroughAPage) { StreamBetweenThreads(4096, 300, kTotal / 10); }

TEST(ByteRingDeathTest, KnowsItsBounds) {
  EXPECT_DEATH((ByteRing(100)), "by a mask");
  Ends ends(64);
  const Bytes bytes(65);
  const std::array<std::span<const std::byte>, 1> parts{bytes};
  EXPECT_DEATH(ends.producer.Write(parts, 65), "asked for the room");
  EXPECT_DEATH(ends.consumer.Consume(1), "no more is consumed than was found");
}

}  // namespace
}  // namespace engram
