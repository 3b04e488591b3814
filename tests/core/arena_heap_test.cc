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
    ASSERT_GE(block, std::max<size_t>(bytes, 16));
    ASSERT_GE(block, last) << bytes;
    last = block;
    if (bytes > 48) {
      ASSERT_EQ(block % kCacheLineBytes, 0u) << bytes;
      ASSERT_LE(block - bytes, std::max(bytes / 32, kCacheLineBytes - 1)) << bytes;
    } else if (bytes >= 16) {
      ASSERT_LE(block - bytes, 7u) << bytes;
    }
  }
  EXPECT_EQ(ArenaHeap::BlockBytes(768 * 4), 768u * 4);
  EXPECT_EQ(ArenaHeap::BlockBytes(512 * 832), 512u * 832);
  EXPECT_EQ(ArenaHeap::BlockBytes(512 * 784), 512u * 784);
  EXPECT_EQ(ArenaHeap::BlockBytes(size_t{1} << 40), size_t{1} << 40);
  EXPECT_EQ(ArenaHeap::BlockBytes(size_t{1} << 42), size_t{1} << 42);
}

// BlockBytes is what memory reports are made of: it must be what the arena really loses, but for
// what else is in the last lines.
TEST(ArenaHeapTest, BlockBytesAreWhatTheArenaLoses) {
  for (const size_t bytes :
       {1u, 17u, 33u, 40u, 64u, 65u, 100u, 129u, 160u, 200u, 300u, 1'100u, 3'072u}) {
    HugePageArena arena = MakeArena(1 << 20);
    ArenaHeap heap(&arena);
    for (int i = 0; i < 64; ++i) ASSERT_NE(heap.Allocate(bytes), nullptr);
    EXPECT_EQ(arena.used_bytes(), heap.live_bytes() + heap.free_bytes()) << bytes;
    EXPECT_LT(heap.free_bytes(), 5 * kCacheLineBytes) << bytes;
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

// The same in an arena that is spent most of the time. Blocks are refused only where nothing free
// is larger, and what is free and what is handed out is all that there is.
TEST(ArenaHeapTest, BehavesLikeAModelWhereTheArenaIsSpent) {
  uint64_t refused = 0;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    std::mt19937_64 random(seed);
    HugePageArena arena = MakeArena(2 << 20);
    ArenaHeap heap(&arena);
    std::map<std::byte*, Block> model;
    size_t live_bytes = 0;
    size_t largest = 20'000;  // sizes change with time
    for (int step = 0; step < 20'000; ++step) {
      if (step % 2'000 == 0) largest = size_t{16} << (random() % 14);
      if (random() % 100 < 52) {
        const size_t bytes = random() % largest;
        std::byte* block = heap.Allocate(bytes);
        if (block == nullptr) {
          ++refused;
          // Any free block as large would have been cut; free ones of less than a line aside.
          ASSERT_GE(arena.used_bytes() + ArenaHeap::BlockBytes(bytes), arena.reserve_bytes());
          continue;
        }
        const size_t alignment = ArenaHeap::BlockBytes(bytes) >= kCacheLineBytes ? 64 : 8;
        ASSERT_EQ(reinterpret_cast<uintptr_t>(block) % alignment, 0u);
        const auto next = model.lower_bound(block);
        if (next != model.end()) {
          ASSERT_LE(block + ArenaHeap::BlockBytes(bytes), next->first) << "seed " << seed;
        }
        if (next != model.begin()) {
          const auto before = std::prev(next);
          ASSERT_LE(before->first + ArenaHeap::BlockBytes(before->second.bytes), block);
        }
        const auto fill = static_cast<uint8_t>(random());
        std::memset(block, fill, ArenaHeap::BlockBytes(bytes));
        ASSERT_TRUE(model.emplace(block, Block{bytes, fill}).second);
        live_bytes += ArenaHeap::BlockBytes(bytes);
      } else if (!model.empty()) {
        auto at = model.begin();
        std::advance(at,
                     static_cast<std::ptrdiff_t>(random() % std::min<size_t>(64, model.size())));
        const auto& [block, what] = *at;
        const size_t whole = ArenaHeap::BlockBytes(what.bytes);
        ASSERT_TRUE(std::all_of(block, block + whole,
                                [fill = what.fill](std::byte b) { return b == std::byte{fill}; }))
            << "seed " << seed;
        heap.Free(block, what.bytes);
        live_bytes -= whole;
        model.erase(at);
      }
      ASSERT_EQ(heap.live_bytes(), live_bytes);
      ASSERT_EQ(heap.live_bytes() + heap.free_bytes(), arena.used_bytes());
    }
    for (const auto& [block, what] : model) heap.Free(block, what.bytes);
    // All that is free can be had as blocks of a line, but for lines that are in parts.
    size_t lines = 0;
    while (heap.Allocate(64) != nullptr) ++lines;
    EXPECT_EQ(lines * 64, heap.live_bytes());
    size_t parts = 0;
    for (const size_t part : {16u, 24u}) {
      while (heap.Allocate(part) != nullptr) parts += part;
    }
    EXPECT_EQ(heap.free_bytes(), 0u) << "seed " << seed;
    EXPECT_EQ(lines * 64 + parts, heap.live_bytes());
  }
  EXPECT_GT(refused, 1'000u);
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

// What was given back serves every smaller size, but for a small share.
TEST(ArenaHeapTest, ASpentArenaIsUsedAgainInOtherSizes) {
  for (const size_t smaller : {1u, 16u, 20u, 24u, 32u, 36u, 48u, 64u, 100u, 192u, 1'000u, 1'100u,
                               4'096u, 7'296u, 40'000u}) {
    HugePageArena arena = MakeArena(2 << 20);
    ArenaHeap heap(&arena);
    std::vector<std::byte*> blocks;
    constexpr size_t kLarge = 90'000;
    while (std::byte* block = heap.Allocate(kLarge)) blocks.push_back(block);
    while (heap.Allocate(64) != nullptr) {
    }
    for (std::byte* block : blocks) heap.Free(block, kLarge);
    ASSERT_EQ(heap.free_bytes(), blocks.size() * ArenaHeap::BlockBytes(kLarge));
    const size_t before = heap.free_bytes();
    std::map<std::byte*, size_t> taken;
    size_t got = 0;
    while (std::byte* block = heap.Allocate(smaller)) {
      got += ArenaHeap::BlockBytes(smaller);
      ASSERT_TRUE(taken.emplace(block, ArenaHeap::BlockBytes(smaller)).second);
    }
    std::byte* end = nullptr;
    for (const auto& [block, bytes] : taken) {
      ASSERT_LE(end, block) << smaller;
      end = block + bytes;
    }
    EXPECT_EQ(got + heap.free_bytes(), before) << smaller;
    EXPECT_LT(heap.free_bytes(), before / 10) << smaller << ": in pieces that are too small";
  }
}

// A block that is not wanted any more makes place for many small ones before new memory is taken.
TEST(ArenaHeapTest, LargeFreeBlocksComeBeforeNewMemory) {
  HugePageArena arena = MakeArena(8 << 20);
  ArenaHeap heap(&arena);
  constexpr size_t kLarge = size_t{1} << 20;
  heap.Free(heap.Allocate(kLarge), kLarge);
  const size_t used = arena.used_bytes();
  size_t taken = 0;
  for (; taken < kLarge / 4 * 3; taken += ArenaHeap::BlockBytes(7'296)) {
    ASSERT_NE(heap.Allocate(7'296), nullptr);
    ASSERT_NE(heap.Allocate(13), nullptr);
  }
  EXPECT_EQ(arena.used_bytes(), used);
  // But a block that is hardly larger is left for its own size.
  std::byte* const block = heap.Allocate(20'000);
  heap.Free(block, 20'000);
  EXPECT_NE(heap.Allocate(10'000), block);
  EXPECT_EQ(heap.Allocate(20'000), block);
}

// Rounds of large blocks and rounds of small ones, again and again: what it takes stops growing.
TEST(ArenaHeapTest, TurnsOfLargeAndSmallSizesStayBounded) {
  HugePageArena arena = MakeArena(64 << 20);
  ArenaHeap heap(&arena);
  std::mt19937_64 random(5);
  size_t after_some = 0;
  for (int round = 0; round < 60; ++round) {
    for (const size_t most : {300u, 5'000u, 100'000u}) {
      std::vector<std::pair<std::byte*, size_t>> blocks;
      for (size_t taken = 0; taken < size_t{2} << 20;) {
        const size_t bytes = most / 2 + random() % (most / 2);
        blocks.emplace_back(heap.Allocate(bytes), bytes);
        ASSERT_NE(blocks.back().first, nullptr);
        taken += ArenaHeap::BlockBytes(bytes);
      }
      for (const auto& [block, bytes] : blocks) heap.Free(block, bytes);
    }
    if (round == 29) after_some = arena.used_bytes();
  }
  EXPECT_LE(arena.used_bytes(), after_some + (size_t{1} << 20));
  EXPECT_LE(arena.used_bytes(), size_t{16} << 20);
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
