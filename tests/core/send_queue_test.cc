#include "src/core/send_queue.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <deque>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "tests/support/random_bytes.h"

namespace engram {
namespace {

SendPool MakePool(size_t blocks) {
  auto pool = SendPool::Create(blocks * kSendBlockBytes);
  EXPECT_TRUE(pool.has_value());
  EXPECT_EQ(pool->total_blocks(), blocks);
  EXPECT_EQ(pool->free_blocks(), blocks);
  return std::move(*pool);
}

void Append(SendPool& pool, SendQueue& queue, std::span<const std::byte> bytes) {
  const std::array<std::span<const std::byte>, 1> parts{bytes};
  pool.Append(queue, parts);
}

Bytes Gathered(const SendPool& pool, const SendQueue& queue, size_t iovecs) {
  std::vector<iovec> out(iovecs);
  const size_t count = pool.Gather(queue, out);
  EXPECT_LE(count, iovecs);
  Bytes bytes;
  for (size_t i = 0; i < count; ++i) {
    const auto* from = static_cast<const std::byte*>(out[i].iov_base);
    bytes.insert(bytes.end(), from, from + out[i].iov_len);
  }
  return bytes;
}

TEST(SendPoolTest, RoundsUpToBlocks) {
  auto pool = SendPool::Create(kSendBlockBytes + 1);
  ASSERT_TRUE(pool.has_value());
  EXPECT_EQ(pool->total_blocks(), 2u);
}

TEST(SendPoolTest, CountsTheBlocksThatBytesNeed) {
  SendPool pool = MakePool(8);
  SendQueue queue;
  EXPECT_EQ(pool.BlocksNeeded(queue, 0), 0u);
  EXPECT_EQ(pool.BlocksNeeded(queue, 1), 1u);
  EXPECT_EQ(pool.BlocksNeeded(queue, kSendBlockBytes), 1u);
  EXPECT_EQ(pool.BlocksNeeded(queue, kSendBlockBytes + 1), 2u);
  Append(pool, queue, RandomBytes(1, 100));
  EXPECT_EQ(pool.free_blocks(), 7u);
  EXPECT_EQ(pool.BlocksNeeded(queue, kSendBlockBytes - 100), 0u);
  EXPECT_EQ(pool.BlocksNeeded(queue, kSendBlockBytes - 99), 1u);
  Append(pool, queue, RandomBytes(1, kSendBlockBytes - 100));
  EXPECT_EQ(pool.BlocksNeeded(queue, 1), 1u) << "the last block is full";
  EXPECT_EQ(pool.free_blocks(), 7u);
}

// Any mix of appending and consuming gives the bytes back in order and the blocks in the end.
TEST(SendPoolTest, KeepsOrderUnderAnyMix) {
  SendPool pool = MakePool(64);
  std::mt19937_64 random(5);
  std::array<SendQueue, 3> queues;
  std::array<std::deque<std::byte>, 3> expected;
  for (int step = 0; step < 5000; ++step) {
    const size_t which = random() % queues.size();
    SendQueue& queue = queues[which];
    if (random() % 2 == 0) {
      const Bytes bytes = RandomBytes(random(), random() % (2 * kSendBlockBytes + 10));
      const size_t needed = pool.BlocksNeeded(queue, bytes.size());
      if (needed > pool.free_blocks()) continue;
      const size_t before = pool.free_blocks();
      Append(pool, queue, bytes);
      ASSERT_EQ(before - pool.free_blocks(), needed);
      expected[which].insert(expected[which].end(), bytes.begin(), bytes.end());
    } else {
      const Bytes front = Gathered(pool, queue, 1 + random() % 8);
      ASSERT_EQ(front.empty(), expected[which].empty());
      ASSERT_TRUE(std::equal(front.begin(), front.end(), expected[which].begin()));
      const size_t bytes = front.empty() ? 0 : 1 + random() % front.size();
      pool.Consume(queue, bytes);
      expected[which].erase(expected[which].begin(),
                            expected[which].begin() + static_cast<std::ptrdiff_t>(bytes));
    }
    ASSERT_EQ(queue.bytes, expected[which].size());
  }
  for (SendQueue& queue : queues) pool.Consume(queue, queue.bytes);
  EXPECT_EQ(pool.free_blocks(), pool.total_blocks());
}

TEST(SendPoolTest, AppendsBehindPinnedBytes) {
  SendPool pool = MakePool(8);
  SendQueue queue;
  const Bytes first = RandomBytes(1, kSendBlockBytes + 100);
  const Bytes second = RandomBytes(2, 2 * kSendBlockBytes);
  Append(pool, queue, first);
  std::array<iovec, 8> under_way;
  pool.Pin(queue, pool.Gather(queue, under_way));
  Append(pool, queue, second);
  // What the kernel reads has not moved nor changed.
  const auto* tail = static_cast<const std::byte*>(under_way[1].iov_base);
  EXPECT_TRUE(std::equal(tail, tail + 100, first.begin() + kSendBlockBytes));
  pool.Unpin(queue);
  pool.Consume(queue, first.size());
  EXPECT_EQ(Gathered(pool, queue, 8), second);
}

// A dropped queue keeps exactly the blocks that the kernel reads until it is done with them.
TEST(SendPoolTest, DropKeepsWhatIsPinnedUntilUnpin) {
  SendPool pool = MakePool(10);
  SendQueue queue;
  Append(pool, queue, RandomBytes(1, 6 * kSendBlockBytes));
  std::array<iovec, 2> under_way;
  pool.Pin(queue, pool.Gather(queue, under_way));
  pool.Drop(queue);
  EXPECT_EQ(queue.bytes, 0u);
  EXPECT_EQ(pool.free_blocks(), 8u);
  EXPECT_EQ(pool.returning_blocks(), 2u);
  // Others that take every free block do not get those.
  SendQueue other;
  const Bytes kept(static_cast<std::byte*>(under_way[0].iov_base),
                   static_cast<std::byte*>(under_way[0].iov_base) + under_way[0].iov_len);
  Append(pool, other, RandomBytes(2, 8 * kSendBlockBytes));
  EXPECT_TRUE(std::equal(kept.begin(), kept.end(), static_cast<std::byte*>(under_way[0].iov_base)));
  pool.Unpin(queue);
  EXPECT_EQ(pool.free_blocks(), 2u);
  EXPECT_EQ(pool.returning_blocks(), 0u);
  EXPECT_EQ(queue.head, kNoSendBlock);
}

TEST(SendPoolTest, DropWithoutPinsFreesAll) {
  SendPool pool = MakePool(10);
  SendQueue queue;
  pool.Drop(queue);
  Append(pool, queue, RandomBytes(1, 3 * kSendBlockBytes + 1));
  pool.Drop(queue);
  EXPECT_EQ(pool.free_blocks(), 10u);
  EXPECT_EQ(pool.returning_blocks(), 0u);
  pool.Unpin(queue);
  EXPECT_EQ(pool.free_blocks(), 10u);
}

TEST(SendPoolTest, ReusesTheBlockFreedLast) {
  SendPool pool = MakePool(100);
  SendQueue queue;
  std::array<iovec, 1> out;
  Append(pool, queue, RandomBytes(1, 10));
  pool.Gather(queue, out);
  const void* first = out[0].iov_base;
  for (int i = 0; i < 10; ++i) {
    pool.Consume(queue, queue.bytes);
    Append(pool, queue, RandomBytes(1, 10));
    pool.Gather(queue, out);
    EXPECT_EQ(out[0].iov_base, first);
  }
}

}  // namespace
}  // namespace engram
