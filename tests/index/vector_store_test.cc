#include "index/vector_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "index/distance.h"
#include "src/core/arena_heap.h"
#include "src/core/huge_page_arena.h"

namespace engram {
namespace {

// The kernels load whole cache lines from rows, and rely on the padding being zero.
TEST(VectorStoreTest, RowsStartAtCacheLinesAndArePaddedWithZeros) {
  Result<HugePageArena> arena = HugePageArena::Create({.reserve_bytes = size_t{256} << 20});
  ASSERT_TRUE(arena.has_value());
  ArenaHeap heap(&*arena);
  for (const uint32_t dimension : {1U, 15U, 16U, 17U, 100U, 768U, 784U, 4096U}) {
    VectorStore store(&heap, dimension);
    EXPECT_EQ(store.dimension(), dimension);
    EXPECT_EQ(store.padded_dimension(), PaddedDimension(dimension));
    EXPECT_GE(store.padded_dimension(), dimension);
    EXPECT_LT(store.padded_dimension(), dimension + 16);
    constexpr NodeId kNodes = 500;
    ASSERT_TRUE(store.Reserve(kNodes));
    for (NodeId node = 0; node < kNodes; ++node) {
      float* row = store.Row(node);
      ASSERT_EQ(reinterpret_cast<uintptr_t>(row) % 64, 0u) << dimension << " " << node;
      std::fill_n(row, dimension, static_cast<float>(node + 1));
    }
    for (NodeId node = 0; node < kNodes; ++node) {
      const float* row = std::as_const(store).Row(node);
      EXPECT_EQ(row[0], static_cast<float>(node + 1));
      EXPECT_EQ(row[dimension - 1], static_cast<float>(node + 1));
      for (size_t i = dimension; i < store.padded_dimension(); ++i) ASSERT_EQ(row[i], 0.0F);
    }
    // The next store gets the same blocks, which hold these values.
    store.Release();
  }
  EXPECT_EQ(heap.live_bytes(), 0u);
}

}  // namespace
}  // namespace engram
