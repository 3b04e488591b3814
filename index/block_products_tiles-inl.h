// Kernels of block products with matrix tiles: included by block_products.cc only.
//
// A tile is a register of up to 16 rows of 64 bytes. TDPBSSD takes tile A, 16 rows of 64 int8
// numbers, and tile B, in whose row k the numbers 4k..4k+3 of 16 columns lie side by side, and adds
// the 16 x 16 inner products to tile C. Rows are A as they lie in memory, queries are B, ordered
// when they are packed. C has a line per row and is transposed in registers on its way to the
// output.

#if defined(ENGRAM_INDEX_BLOCK_PRODUCTS_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ENGRAM_INDEX_BLOCK_PRODUCTS_TILES_INL_H_
#undef ENGRAM_INDEX_BLOCK_PRODUCTS_TILES_INL_H_
#else
#define ENGRAM_INDEX_BLOCK_PRODUCTS_TILES_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "index/block_products-inl.h"
#include "index/block_products_kernels.h"

// Every processor with tiles has what the target AVX3_DL asks for.
#if HWY_TARGET == HWY_AVX3_DL && defined(__x86_64__)

ENGRAM_BEFORE_BLOCK_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

constexpr size_t kTileBytes = 1024;

// What LDTILECFG reads (SDM volume 1, "Tile configuration").
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};

  void Set(int tile, size_t row_count, size_t byte_count) {
    rows[tile] = static_cast<uint8_t>(row_count);
    bytes_per_row[tile] = static_cast<uint16_t>(byte_count);
  }
};
static_assert(sizeof(TileShapes) == 64);

// Not the compiler's intrinsics: those of GCC 12 do not say that they read memory.
HWY_INLINE void LoadShapes(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
}
HWY_INLINE void ReleaseTiles() { asm volatile("tilerelease" : : : "memory"); }
template <int kTile>
HWY_INLINE void ZeroTile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
HWY_INLINE void LoadTile(const void* at, size_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(at), "r"(stride) : "memory");
}
// The same for what is read once.
template <int kTile>
HWY_INLINE void LoadTileOnce(const void* at, size_t stride) {
  asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(at), "r"(stride) : "memory");
}
template <int kTile>
HWY_INLINE void StoreTile(void* at, size_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(at), "r"(stride) : "memory");
}
// C += A * B.
template <int kC, int kA, int kB>
HWY_INLINE void AddProducts() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

// Per 16 queries: width / 64 tiles in B's order, one after the other.
HWY_INLINE void PackTiles(const std::byte* const* queries, size_t query_count, size_t width,
                          std::byte* packed) {
  for (size_t first = 0; first < query_count; first += 16) {
    const std::byte* rows[16];
    for (size_t q = 0; q < 16; ++q) {
      rows[q] = first + q < query_count ? queries[first + q] : kZeros;
    }
    std::byte* out = packed + first * width;
    for (size_t i = 0; i < width; i += 16) {
      StoreColumns(TransposeFourWords([&rows, i](size_t r) { return rows[r] + i; }), out + i * 16);
    }
  }
}

struct Int8Call {
  const std::byte* rows;
  size_t row_stride;
  size_t row_count;
  const std::byte* packed;
  size_t query_count;
  size_t width;
  int32_t* out;
  size_t out_stride;
};

// Products that stand in memory with a line per row, on their way to the output, where they stand
// with a line per query. They are written a turn later, behind the tile operations of the rows that
// follow: a line that a tile has just stored cannot be read until it has reached the cache, and the
// processor would wait for it with all that comes after.
class DelayedOutput {
 public:
  explicit DelayedOutput(const Int8Call& call) : call_(call) {}

  // Where the next tiles are to be stored: [row tile][16 queries or the next 16][line].
  std::byte* Next() { return c_[next_]; }

  // The tiles of Next() are stored: `row_tiles` of them from `row` on, `tile_rows` rows each. What
  // went before has been written.
  HWY_INLINE void Stored(size_t row, size_t row_tiles, size_t tile_rows) {
    row_ = row;
    row_tiles_ = row_tiles;
    kept_ = static_cast<__mmask16>((1U << tile_rows) - 1);
    next_ ^= 1;
  }

  HWY_INLINE void Write() {
    for (size_t t = 0; t < row_tiles_; ++t) {
      const std::byte* from = c_[next_ ^ 1] + 2 * t * kTileBytes;
      int32_t* out = call_.out + row_ + t * 16;
      for (size_t query = 0; query < call_.query_count; query += 4) {
        WriteFourQueries(from + query / 16 * kTileBytes + query % 16 * 4, call_.query_count - query,
                         out + query * call_.out_stride);
      }
    }
    row_tiles_ = 0;
  }

 private:
  HWY_INLINE void WriteFourQueries(const std::byte* from, size_t queries_left, int32_t* out) {
    const size_t stride = call_.out_stride;
    const Columns columns = TransposeFourWords([from](size_t r) { return from + r * kLine; });
    _mm512_mask_storeu_epi32(out, kept_, columns.column[0]);
    if (queries_left > 1) _mm512_mask_storeu_epi32(out + stride, kept_, columns.column[1]);
    if (queries_left > 2) _mm512_mask_storeu_epi32(out + 2 * stride, kept_, columns.column[2]);
    if (queries_left > 3) _mm512_mask_storeu_epi32(out + 3 * stride, kept_, columns.column[3]);
  }

  // One is written by tiles while the other waits.
  alignas(64) std::byte c_[2][4 * kTileBytes];
  const Int8Call& call_;
  size_t next_ = 0;
  size_t row_ = 0;
  size_t row_tiles_ = 0;
  __mmask16 kept_ = 0;
};

// kRowTiles * 16 rows, or a single tile of fewer, with up to 16 queries a pack. C is tiles 0 to 3,
// A 4 and 5, B 6 and 7.
template <size_t kRowTiles, bool kTwoPacks>
HWY_INLINE void MultiplyRows(const Int8Call& call, size_t row, size_t tile_rows,
                             DelayedOutput& output) {
  const std::byte* a = call.rows + row * call.row_stride;
  const std::byte* b = call.packed;
  ZeroTile<0>();
  if constexpr (kTwoPacks) ZeroTile<1>();
  if constexpr (kRowTiles > 1) ZeroTile<2>();
  if constexpr (kRowTiles > 1 && kTwoPacks) ZeroTile<3>();
  for (size_t i = 0; i < call.width; i += 64) {
    LoadTile<6>(b + i * 16, kLine);
    LoadTileOnce<4>(a + i, call.row_stride);
    AddProducts<0, 4, 6>();
    if constexpr (kTwoPacks) {
      LoadTile<7>(b + 16 * call.width + i * 16, kLine);
      AddProducts<1, 4, 7>();
    }
    if constexpr (kRowTiles > 1) {
      LoadTileOnce<5>(a + 16 * call.row_stride + i, call.row_stride);
      AddProducts<2, 5, 6>();
      if constexpr (kTwoPacks) AddProducts<3, 5, 7>();
    }
  }
  output.Write();
  std::byte* c = output.Next();
  StoreTile<0>(c, kLine);
  if constexpr (kTwoPacks) StoreTile<1>(c + kTileBytes, kLine);
  if constexpr (kRowTiles > 1) StoreTile<2>(c + 2 * kTileBytes, kLine);
  if constexpr (kRowTiles > 1 && kTwoPacks) StoreTile<3>(c + 3 * kTileBytes, kLine);
  output.Stored(row, kRowTiles, tile_rows);
}

// Pairs of whole tiles of rows. What is left over is done as the last whole tile again, which
// overlaps the one before and writes the same products there: nothing behind the last row may be
// read, and other shapes for fewer rows would cost more than the products that are done twice.
template <bool kTwoPacks>
HWY_INLINE void MultiplyAll(const Int8Call& call, size_t tile_rows) {
  DelayedOutput output(call);
  size_t row = 0;
  for (; row + 32 <= call.row_count; row += 32) {
    MultiplyRows<2, kTwoPacks>(call, row, 16, output);
  }
  for (; row < call.row_count; row += tile_rows) {
    MultiplyRows<1, kTwoPacks>(call, std::min(row, call.row_count - tile_rows), tile_rows, output);
  }
  output.Write();
}

HWY_INLINE void Int8WithTiles(const std::byte* rows, size_t row_stride, size_t row_count,
                              const std::byte* packed, size_t query_count, size_t width,
                              int32_t* out, size_t out_stride) {
  const Int8Call call = {rows, row_stride, row_count, packed, query_count, width, out, out_stride};
  const size_t tile_rows = std::min<size_t>(16, row_count);
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.Set(tile, 16, kLine);
  for (const int tile : {0, 1, 4}) shapes.Set(tile, tile_rows, kLine);
  LoadShapes(shapes);
  if (query_count > 16) {
    MultiplyAll<true>(call, tile_rows);
  } else {
    MultiplyAll<false>(call, tile_rows);
  }
  ReleaseTiles();
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#endif

#endif  // per target
