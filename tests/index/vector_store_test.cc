#include "index/vector_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "index/vector_format.h"
#include "src/core/arena_heap.h"
#include "src/core/huge_page_arena.h"

namespace engram {
namespace {

// The kernels load whole cache lines from rows; a row that shares one with its neighbour would be
// written by that neighbour.
TEST(VectorStoreTest, RowsAreWholeCacheLinesOfTheirOwn) {
  Result<HugePageArena> arena = HugePageArena::Create({.reserve_bytes = size_t{256} << 20});
  ASSERT_TRUE(arena.has_value());
  ArenaHeap heap(&*arena);
  for (const size_t row_bytes : {64, 128, 192, 832, 3072, 4160, 16'384}) {
    VectorStore store(&heap, row_bytes);
    EXPECT_EQ(store.row_bytes(), row_bytes);
    EXPECT_EQ(store.capacity(), 0u);
    constexpr NodeId kNodes = 500;
    ASSERT_TRUE(store.Reserve(kNodes));
    EXPECT_GE(store.capacity(), size_t{kNodes});
    for (NodeId node = 0; node < kNodes; ++node) {
      std::byte* row = store.Row(node);
      ASSERT_EQ(reinterpret_cast<uintptr_t>(row) % 64, 0u) << row_bytes << " " << node;
      ASSERT_TRUE(std::all_of(row, row + row_bytes, [](std::byte b) { return b == std::byte{0}; }))
          << "a new row is zero";
      std::fill_n(row, row_bytes, static_cast<std::byte>(node % 255 + 1));
    }
    for (NodeId node = 0; node < kNodes; ++node) {
      const std::byte* row = std::as_const(store).Row(node);
      ASSERT_TRUE(
          std::all_of(row, row + row_bytes,
                      [node](std::byte b) { return b == static_cast<std::byte>(node % 255 + 1); }))
          << row_bytes << " " << node;
    }
    // The next store gets the same blocks, which hold these values.
    store.Release();
  }
  EXPECT_EQ(heap.live_bytes(), 0u);
}

TEST(VectorStoreTest, RowsStayWhileTheStoreGrows) {
  Result<HugePageArena> arena = HugePageArena::Create({.reserve_bytes = size_t{64} << 20});
  ASSERT_TRUE(arena.has_value());
  ArenaHeap heap(&*arena);
  const VectorFormat format(Precision::kInt8, Metric::kL2, 100);
  VectorStore store(&heap, format.row_bytes());
  ASSERT_TRUE(store.Reserve(1));
  const float v[100] = {1, -2, 3};
  std::byte* first = store.Row(0);
  format.Encode(v, first);
  for (const size_t nodes : {10, 1000, 30'000}) {
    ASSERT_TRUE(store.Reserve(nodes));
    ASSERT_EQ(store.Row(0), first);
    const auto last = static_cast<NodeId>(nodes - 1);
    format.Encode(v, store.Row(last));
    EXPECT_EQ(format.Distance(store.Row(0), store.Row(last)), 0.0F);
  }
}

TEST(VectorStoreTest, SaysWhenTheHeapIsSpent) {
  Result<HugePageArena> arena = HugePageArena::Create({.reserve_bytes = size_t{4} << 20});
  ASSERT_TRUE(arena.has_value());
  ArenaHeap heap(&*arena);
  VectorStore store(&heap, 4160);
  EXPECT_FALSE(store.Reserve(1'000'000));
  ASSERT_GT(store.capacity(), 0u);
  store.Row(static_cast<NodeId>(store.capacity() - 1))[0] = std::byte{1};
}

TEST(VectorStoreDeathTest, RowsOfBrokenQuarterLinesAreABug) {
  EXPECT_DEATH(VectorStore(nullptr, 100), "rows are whole quarters of lines");
  EXPECT_DEATH(VectorStore(nullptr, 24), "");
  EXPECT_DEATH(VectorStore(nullptr, 0), "");
}

}  // namespace
}  // namespace engram
