#include "index/chunked_array.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <set>
#include <utility>
#include <vector>

#include "src/core/arena_heap.h"
#include "src/core/huge_page_arena.h"

namespace engram {
namespace {

class ChunkedArrayTest : public testing::Test {
 protected:
  static HugePageArena MakeArena(size_t bytes) {
    Result<HugePageArena> arena = HugePageArena::Create({.reserve_bytes = bytes});
    EXPECT_TRUE(arena.has_value());
    return std::move(*arena);
  }

  HugePageArena arena_ = MakeArena(size_t{64} << 20);
  ArenaHeap heap_{&arena_};
};

// Every index has its own place, and the place stays while the array grows through all chunk sizes.
TEST_F(ChunkedArrayTest, ItemsKeepTheirPlacesWhileItGrows) {
  ChunkedArray<uint64_t> array(&heap_);
  constexpr size_t kItems = 400'000;  // several full chunks of 65,536
  std::vector<const uint64_t*> places;
  for (size_t i = 0; i < kItems; ++i) {
    ASSERT_TRUE(array.Reserve(i + 1));
    ASSERT_GE(array.capacity(), i + 1);
    ASSERT_EQ(array[i], 0u);
    array[i] = i;
    places.push_back(&array[i]);
  }
  for (size_t i = 0; i < kItems; ++i) {
    ASSERT_EQ(&array[i], places[i]);
    ASSERT_EQ(array[i], i);
  }
}

TEST_F(ChunkedArrayTest, ASmallArrayIsSmall) {
  ChunkedArray<uint32_t> array(&heap_);
  EXPECT_EQ(heap_.live_bytes(), 0u);
  ASSERT_TRUE(array.Reserve(1));
  EXPECT_LE(heap_.live_bytes(), 512u);
  EXPECT_EQ(array.capacity(), 64u);
}

// Strides whose items exceed the first chunk, fill it unevenly, or exceed half of a full chunk.
TEST_F(ChunkedArrayTest, RowsOfAnyStrideAreApartAndZero) {
  for (const size_t stride :
       {size_t{1}, size_t{3}, size_t{16}, size_t{48}, size_t{784}, size_t{4096}, size_t{100'000}}) {
    ChunkedArray<float, kRunTimeStride> rows(&heap_, stride);
    const size_t items = std::min<size_t>(3'000'000 / stride, 20'000);
    ASSERT_TRUE(rows.Reserve(items));
    for (size_t i = 0; i < items; ++i) {
      float* row = rows.Row(i);
      ASSERT_EQ(row[0], 0.0F) << "stride " << stride << " item " << i;
      ASSERT_EQ(row[stride - 1], 0.0F) << "stride " << stride << " item " << i;
      row[0] = static_cast<float>(i + 1);
      row[stride - 1] = static_cast<float>(i + 1);
    }
    for (size_t i = 0; i < items; ++i) {
      ASSERT_EQ(rows.Row(i)[0], static_cast<float>(i + 1)) << "stride " << stride;
      ASSERT_EQ(rows.Row(i)[stride - 1], static_cast<float>(i + 1)) << "stride " << stride;
    }
  }
}

// Blocks that come back dirty from the heap are zeroed again.
TEST_F(ChunkedArrayTest, ReleaseGivesAllBackAndTheArrayMayGrowAgain) {
  ChunkedArray<uint64_t> array(&heap_);
  ASSERT_TRUE(array.Reserve(200'000));
  for (size_t i = 0; i < 200'000; ++i) array[i] = ~uint64_t{0};
  array.Release();
  EXPECT_EQ(heap_.live_bytes(), 0u);
  EXPECT_EQ(array.capacity(), 0u);
  const size_t used = arena_.used_bytes();
  ASSERT_TRUE(array.Reserve(200'000));
  EXPECT_EQ(arena_.used_bytes(), used);
  for (size_t i = 0; i < 200'000; ++i) ASSERT_EQ(array[i], 0u) << i;
}

TEST_F(ChunkedArrayTest, ASpentHeapIsToldAndWhatIsThereStays) {
  HugePageArena small_arena = MakeArena(size_t{2} << 20);
  ArenaHeap small_heap(&small_arena);
  ChunkedArray<uint64_t> array(&small_heap);
  ASSERT_TRUE(array.Reserve(1'000));
  for (size_t i = 0; i < 1'000; ++i) array[i] = i;
  EXPECT_FALSE(array.Reserve(10'000'000));
  EXPECT_GE(array.capacity(), 1'000u);
  EXPECT_LT(array.capacity(), 10'000'000u);
  for (size_t i = 0; i < 1'000; ++i) ASSERT_EQ(array[i], i);
  array.Release();
  EXPECT_EQ(small_heap.live_bytes(), 0u);
}

}  // namespace
}  // namespace engram
