// As in index/block_products.cc, so that its targets are all tested here.
#define HWY_WANT_AVX3_DL

#include "index/block_products.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>

namespace engram {
namespace {

using Kernel = BlockProducts::Kernel;

constexpr int32_t kUntouched = 0x5A5A5A5A;
constexpr std::byte kGuard{0xA5};

// Bytes of which the last one is the last of its page, and the next page cannot be touched: a read
// behind them ends the test, also one by a tile, of which no sanitizer knows. They begin on a cache
// line if `size` is a multiple of 64.
class Bytes {
 public:
  explicit Bytes(size_t size) : size_(size), mapped_((size + kPage - 1) / kPage * kPage + kPage) {
    void* pages =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT_NE(pages, MAP_FAILED);
    pages_ = static_cast<std::byte*>(pages);
    EXPECT_EQ(mprotect(pages_ + mapped_ - kPage, kPage, PROT_NONE), 0);
  }
  ~Bytes() { munmap(pages_, mapped_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  std::byte* data() const { return pages_ + mapped_ - kPage - size_; }
  size_t size() const { return size_; }

 private:
  static constexpr size_t kPage = 4096;
  size_t size_;
  size_t mapped_;
  std::byte* pages_;
};

enum class Numbers { kRandom, kLowest, kHighest, kExtremes };

std::byte NumberOf(Numbers numbers, std::mt19937& random) {
  switch (numbers) {
    case Numbers::kRandom:
      return std::byte(random());
    case Numbers::kLowest:
      return std::byte{0x80};
    case Numbers::kHighest:
      return std::byte{0x7F};
    case Numbers::kExtremes:
      return random() % 2 == 0 ? std::byte{0x80} : std::byte{0x7F};
  }
  return {};
}

int32_t SignedAt(const std::byte* numbers, size_t i) { return static_cast<int8_t>(numbers[i]); }

struct Shape {
  size_t rows;
  size_t queries;
  size_t width;
  size_t extra_stride = 0;  // Bytes between a row and the next.
  Numbers row_numbers = Numbers::kRandom;
  Numbers query_numbers = Numbers::kRandom;

  size_t row_stride() const { return width + extra_stride; }
  std::string Describe() const {
    return "rows " + std::to_string(rows) + ", queries " + std::to_string(queries) + ", width " +
           std::to_string(width) + ", stride " + std::to_string(row_stride());
  }
};

// One shape's rows, queries and products by the definition.
class Case {
 public:
  Case(const Shape& shape, uint32_t seed) : shape_(shape), rows_(RowBytes(shape)) {
    std::mt19937 random(seed);
    // What lies between two rows must not count: large numbers, ones.
    std::memset(rows_.data(), 0x7F, rows_.size());
    for (size_t r = 0; r < shape.rows; ++r) {
      std::byte* row = rows_.data() + r * shape.row_stride();
      for (size_t i = 0; i < shape.width; ++i) row[i] = NumberOf(shape.row_numbers, random);
    }
    for (size_t q = 0; q < shape.queries; ++q) {
      queries_.emplace_back(shape.width);
      for (size_t i = 0; i < shape.width; ++i) {
        queries_[q].data()[i] = NumberOf(shape.query_numbers, random);
      }
    }
    for (size_t q = 0; q < shape.queries; ++q) {
      for (size_t r = 0; r < shape.rows; ++r) expected_.push_back(Product(q, r));
    }
  }

  // Packs and multiplies; every number of the output that is not a product, and every byte around
  // the packed block, must stay as it was.
  void ExpectExact(Kernel kernel) const {
    SCOPED_TRACE(shape_.Describe() + (kernel == Kernel::kTiles ? ", tiles" : ", vectors"));
    const BlockProducts products(kernel);
    const size_t packed_bytes = BlockProducts::PackedBytes(shape_.queries, shape_.width);
    ASSERT_EQ(packed_bytes % 64, 0U);
    Bytes packed(packed_bytes + 128);
    std::memset(packed.data(), static_cast<int>(kGuard), packed.size());
    std::vector<const std::byte*> queries;
    for (const Bytes& query : queries_) queries.push_back(query.data());
    // An output without alignment, with room before all, behind each query's products, and for 16
    // queries more.
    const size_t out_stride = shape_.rows + kRoom;
    std::vector<int32_t> out(kRoom + (shape_.queries + 16) * out_stride, kUntouched);
    products.PackQueries(queries.data(), shape_.queries, shape_.width, packed.data() + 64);
    products.Products(rows_.data(), shape_.row_stride(), shape_.rows, packed.data() + 64,
                      shape_.queries, shape_.width, out.data() + kRoom, out_stride);
    for (size_t i = 0; i < 64; ++i) {
      ASSERT_EQ(packed.data()[i], kGuard) << "before the packed block";
      ASSERT_EQ(packed.data()[64 + packed_bytes + i], kGuard) << "behind the packed block";
    }
    std::vector<int32_t> wanted(out.size(), kUntouched);
    for (size_t q = 0; q < shape_.queries; ++q) {
      std::copy_n(expected_.begin() + static_cast<ptrdiff_t>(q * shape_.rows), shape_.rows,
                  wanted.begin() + static_cast<ptrdiff_t>(kRoom + q * out_stride));
    }
    const auto differ = std::mismatch(out.begin(), out.end(), wanted.begin());
    if (differ.first == out.end()) return;
    const size_t at = static_cast<size_t>(differ.first - out.begin());
    ADD_FAILURE() << "at number " << at << " of the output, " << (at - kRoom) / out_stride
                  << " queries and " << (at - kRoom) % out_stride << " rows in: " << *differ.first
                  << " instead of " << *differ.second;
  }

 private:
  static constexpr size_t kRoom = 21;

  // Nothing behind the last row.
  static size_t RowBytes(const Shape& shape) {
    return shape.rows == 0 ? 0 : (shape.rows - 1) * shape.row_stride() + shape.width;
  }

  int32_t Product(size_t query, size_t row) const {
    const std::byte* numbers = queries_[query].data();
    const std::byte* of_row = rows_.data() + row * shape_.row_stride();
    int32_t sum = 0;
    for (size_t i = 0; i < shape_.width; ++i) {
      sum += SignedAt(numbers, i) * SignedAt(of_row, i);
    }
    return sum;
  }

  Shape shape_;
  Bytes rows_;
  std::deque<Bytes> queries_;
  std::vector<int32_t> expected_;
};

// Both kernels; where there are no tiles, the second is the first once more.
void ExpectExact(const Shape& shape, uint32_t seed) {
  const Case one(shape, seed);
  one.ExpectExact(Kernel::kTiles);
  one.ExpectExact(Kernel::kVectors);
}

TEST(BlockProducts, EveryNumberOfRows) {
  for (size_t rows = 0; rows <= 70; ++rows) {
    for (const size_t queries : {1, 5, 16, 17, 32}) {
      ExpectExact({.rows = rows, .queries = queries, .width = 128}, static_cast<uint32_t>(rows));
    }
  }
}

TEST(BlockProducts, EveryNumberOfQueries) {
  for (size_t queries = 1; queries <= 32; ++queries) {
    for (const size_t rows : {1, 7, 16, 23, 40, 67}) {
      ExpectExact({.rows = rows, .queries = queries, .width = 192}, static_cast<uint32_t>(queries));
    }
  }
}

TEST(BlockProducts, EveryWidth) {
  for (size_t width = 64; width <= BlockProducts::kMaxWidth; width += 64) {
    for (const size_t queries : {3, 19}) {
      ExpectExact({.rows = 37, .queries = queries, .width = width}, static_cast<uint32_t>(width));
    }
  }
}

TEST(BlockProducts, ManyRows) {
  for (const size_t queries : {3, 32}) {
    ExpectExact({.rows = 400, .queries = queries, .width = 768}, 1);
  }
}

// The distance from row to row is not the row's size.
TEST(BlockProducts, RowsWithRoomBetween) {
  for (const size_t extra : {64, 128, 1024}) {
    for (const size_t width : {64, 448, 768, 1536}) {
      for (const size_t queries : {2, 32}) {
        ExpectExact({.rows = 45, .queries = queries, .width = width, .extra_stride = extra}, 7);
      }
    }
  }
}

// The largest sums there are, of either sign, and numbers whose negative is no int8.
TEST(BlockProducts, ExtremeNumbers) {
  constexpr Numbers kAll[] = {Numbers::kLowest, Numbers::kHighest, Numbers::kExtremes};
  for (const Numbers of_rows : kAll) {
    for (const Numbers of_queries : kAll) {
      for (const size_t queries : {4, 32}) {
        ExpectExact({.rows = 20,
                     .queries = queries,
                     .width = BlockProducts::kMaxWidth,
                     .row_numbers = of_rows,
                     .query_numbers = of_queries},
                    11);
      }
    }
  }
}

// The vector kernels of every instruction set that this machine has.
class VectorTargets : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override {
    BlockProducts::HasTiles();  // Is asked for once, with all that the machine has.
    hwy::SetSupportedTargetsForTest(GetParam());
  }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};
INSTANTIATE_TEST_SUITE_P(Targets, VectorTargets,
                         testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         [](const testing::TestParamInfo<int64_t>& target) {
                           return std::string(hwy::TargetName(target.param));
                         });

TEST_P(VectorTargets, AreExact) {
  for (const Numbers numbers : {Numbers::kRandom, Numbers::kLowest, Numbers::kExtremes}) {
    for (const size_t width : {64, 448, 768, 4096}) {
      for (const size_t queries : {1, 6, 32}) {
        Case({.rows = 21,
              .queries = queries,
              .width = width,
              .extra_stride = 64,
              .row_numbers = numbers,
              .query_numbers = numbers},
             13)
            .ExpectExact(Kernel::kVectors);
      }
    }
  }
}

#if defined(__x86_64__)
// Which states of the processor are in use: what a context switch must save (XGETBV with ECX = 1).
uint32_t StatesInUse() {
  uint32_t low = 0;
  uint32_t high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return low;
}

TEST(BlockProducts, TilesAreReleased) {
  if (!BlockProducts::HasTiles()) GTEST_SKIP() << "needs int8 tiles (Intel AMX)";
  constexpr uint32_t kTiles = 3U << 17;
  for (const size_t queries : {1, 32}) {
    Case({.rows = 40, .queries = queries, .width = 128}, 5).ExpectExact(Kernel::kTiles);
    EXPECT_EQ(StatesInUse() & kTiles, 0U);
  }
}
#endif

TEST(BlockProducts, ChoosesTheKernel) {
  EXPECT_EQ(BlockProducts(Kernel::kVectors).kernel(), Kernel::kVectors);
  const Kernel best = BlockProducts::HasTiles() ? Kernel::kTiles : Kernel::kVectors;
  EXPECT_EQ(BlockProducts().kernel(), best);
  EXPECT_EQ(BlockProducts(Kernel::kTiles).kernel(), best);
}

TEST(BlockProducts, PackedBytesAreForWholeGroupsOf16) {
  EXPECT_EQ(BlockProducts::PackedBytes(1, 64), 16U * 64);
  EXPECT_EQ(BlockProducts::PackedBytes(16, 64), 16U * 64);
  EXPECT_EQ(BlockProducts::PackedBytes(17, 64), 32U * 64);
}

}  // namespace
}  // namespace engram
