#include "src/core/arena_heap.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "src/core/spsc_ring.h"

namespace engram {
namespace {

HugePageArena MakeArena(size_t bytes) {
  return *HugePageArena::Create({.reserve_bytes = bytes, .huge_pages = HugePagePolicy::kOff});
}

TEST(ArenaHeapTest, BlocksHoldWhatWasAskedAndLittleMore) {
  size_t last = 0;
  for (size_t bytes = 0; bytes <= 70'000; ++bytes) {
    const size_t block = ArenaHeap::BlockBytes(bytes);
    ASSERT_GE(block, std::max<size_t>(bytes, 32));
    ASSERT_GE(block, last) << bytes;
    last = block;
    if (bytes >= 32) {
      ASSERT_LE(block - bytes, std::max(bytes / 4, kCacheLineBytes - 1)) << bytes;
    }
    if (bytes >= 256) {
      ASSERT_LE(block - bytes, bytes / 4) << bytes;
    }
    if (block >= kCacheLineBytes) {
      ASSERT_EQ(block % kCacheLineBytes, 0u) << bytes;
    }
  }
  EXPECT_EQ(ArenaHeap::BlockBytes(768 * 4), 768u * 4);
  EXPECT_EQ(ArenaHeap::BlockBytes(size_t{1} << 40), size_t{1} << 40);
}

// BlockBytes is what memory reports are made of: it must be what the arena really loses.
TEST(ArenaHeapTest, BlockBytesAreWhatTheArenaLoses) {
  for (const size_t bytes : {1u, 33u, 40u, 64u, 65u, 100u, 129u, 160u, 200u, 300u, 3'072u}) {
    HugePageArena arena = MakeArena(1 << 20);
    ArenaHeap heap(&arena);
    for (int i = 0; i < 64; ++i) ASSERT_NE(heap.Allocate(bytes), nullptr);
    EXPECT_EQ(arena.used_bytes(), heap.live_bytes()) << bytes;
  }
}

struct Block {
  size_t bytes;
  uint8_t fill;
};

// Random allocations and frees against a map of what is handed out: no overlap, content kept,
// alignment, live_bytes.
TEST(ArenaHeapTest, BehavesLikeAModel) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    std::mt19937_64 random(seed);
    HugePageArena arena = MakeArena(64 << 20);
    ArenaHeap heap(&arena);
    std::map<std::byte*, Block> model;
    size_t live_bytes = 0;
    const auto free_one = [&](auto at) {
      const auto& [block, what] = *at;
      ASSERT_TRUE(std::all_of(block, block + what.bytes,
                              [fill = what.fill](std::byte b) { return b == std::byte{fill}; }))
          << "seed " << seed;
      heap.Free(block, what.bytes);
      live_bytes -= ArenaHeap::BlockBytes(what.bytes);
      model.erase(at);
    };
    for (int step = 0; step < 10'000; ++step) {
      if (model.empty() || random() % 100 < 55) {
        const size_t bytes = random() % (random() % 10 == 0 ? 20'000 : 400);
        std::byte* block = heap.Allocate(bytes);
        ASSERT_NE(block, nullptr);
        const size_t alignment = ArenaHeap::BlockBytes(bytes) >= kCacheLineBytes ? 64 : 8;
        ASSERT_EQ(reinterpret_cast<uintptr_t>(block) % alignment, 0u);
        const auto next = model.lower_bound(block);
        if (next != model.end()) {
          ASSERT_LE(block + bytes, next->first) << "seed " << seed;
        }
        if (next != model.begin()) {
          const auto before = std::prev(next);
          ASSERT_LE(before->first + std::max<size_t>(before->second.bytes, 1), block);
        }
        const auto fill = static_cast<uint8_t>(random());
        std::memset(block, fill, bytes);
        ASSERT_TRUE(model.emplace(block, Block{bytes, fill}).second);
        live_bytes += ArenaHeap::BlockBytes(bytes);
      } else {
        auto at = model.begin();
        std::advance(at,
                     static_cast<std::ptrdiff_t>(random() % std::min<size_t>(64, model.size())));
        free_one(at);
      }
      ASSERT_EQ(heap.live_bytes(), live_bytes);
      ASSERT_LE(heap.live_bytes(), arena.used_bytes());
    }
    while (!model.empty()) free_one(model.begin());
    EXPECT_EQ(heap.live_bytes(), 0u);
  }
}

// Churn at one size must not grow the arena: this is what keeps memory flat for as long as it runs.
TEST(ArenaHeapTest, FreedBlocksAreReused) {
  HugePageArena arena = MakeArena(2 << 20);
  ArenaHeap heap(&arena);
  std::vector<std::byte*> blocks;
  for (int i = 0; i < 100; ++i) blocks.push_back(heap.Allocate(200));
  const size_t used = arena.used_bytes();
  const std::set<std::byte*> first(blocks.begin(), blocks.end());
  for (int round = 0; round < 1'000; ++round) {
    for (std::byte* block : blocks) heap.Free(block, 200);
    // Another size of the same class reuses them too.
    for (std::byte*& block : blocks) block = heap.Allocate(193 + round % 60);
    for (std::byte* block : blocks) ASSERT_TRUE(first.contains(block));
    for (std::byte* block : blocks) heap.Free(block, 193 + static_cast<size_t>(round) % 60);
    for (std::byte*& block : blocks) block = heap.Allocate(200);
  }
  EXPECT_EQ(arena.used_bytes(), used);
}

TEST(ArenaHeapTest, ASpentArenaGivesNullptrUntilSomethingIsFreed) {
  HugePageArena arena = MakeArena(2 << 20);
  ArenaHeap heap(&arena);
  std::vector<std::byte*> blocks;
  while (std::byte* block = heap.Allocate(4'096)) blocks.push_back(block);
  EXPECT_EQ(blocks.size(), (size_t{2} << 20) / 4'096);
  const size_t live_bytes = heap.live_bytes();
  EXPECT_EQ(heap.Allocate(4'096), nullptr);
  EXPECT_EQ(heap.live_bytes(), live_bytes) << "a refusal is not counted";
  heap.Free(blocks[7], 4'096);
  EXPECT_EQ(heap.Allocate(4'096), blocks[7]);
}

TEST(ArenaHeapTest, ArraysAreTyped) {
  HugePageArena arena = MakeArena(2 << 20);
  ArenaHeap heap(&arena);
  auto* numbers = heap.AllocateArray<uint64_t>(100);
  for (uint64_t i = 0; i < 100; ++i) numbers[i] = i;
  EXPECT_EQ(heap.live_bytes(), ArenaHeap::BlockBytes(800));
  heap.FreeArray(numbers, 100);
  EXPECT_EQ(heap.live_bytes(), 0u);
  EXPECT_EQ(heap.AllocateArray<uint64_t>(100), numbers);
}

TEST(ArenaHeapDeathTest, CatchesImpossibleSizesAndSurplusFrees) {
  HugePageArena arena = MakeArena(2 << 20);
  ArenaHeap heap(&arena);
  EXPECT_DEATH((void)heap.Allocate(SIZE_MAX), "block size out of range");
  EXPECT_DEATH((void)heap.Allocate(SIZE_MAX - 40), "block size out of range");
  std::byte* block = heap.Allocate(64);
  heap.Free(block, 64);
  EXPECT_DEATH(heap.Free(block, 64), "more was freed than handed out");
}

}  // namespace
}  // namespace engram
