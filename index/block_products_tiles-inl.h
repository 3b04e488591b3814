// Kernels of block products with matrix tiles: included by block_products.cc only.
//
// A tile is a register of up to 16 rows of 64 bytes. TDPBSSD takes tile A, 16 rows of 64 int8
// numbers, and tile B, in whose row k the numbers 4k..4k+3 of 16 columns lie side by side, and adds
// the 16 x 16 inner products to tile C. It takes about as many cycles as A has rows, so the sides
// are chosen by what is cheap to bring into B's order:
//
//   int8   Rows are A as they lie in memory, queries are B, ordered when they are packed. C has a
//          line per row and is transposed in registers on its way to the output.
//   signs  Queries are A, so that few queries cost little, and the bits of 16 rows become B: where
//          the 32-bit words number w of 16 rows stand side by side, (words >> j) & 0x01010101 is
//          row 8w + j of B, 64 numbers in two instructions. The queries are packed in that order of
//          dimensions. C has a line per query and is stored as it is.
//
// A sign of +1 or -1 is 2 or 0, less 1: B has 2 or 0 and C begins with -(sum of the query).

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

// ---- int8 rows

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

// ---- rows of signs

// A word of 16 rows as half of a tile B: 32 dimensions, 2 for a one and 0 for a zero.
HWY_INLINE void ExpandHalfTile(const std::byte* words, std::byte* tile) {
  const __m512i word = _mm512_load_si512(words);
  _mm512_store_si512(tile, TwiceTheBit<0>(word));
  _mm512_store_si512(tile + kLine, TwiceTheBit<1>(word));
  _mm512_store_si512(tile + 2 * kLine, TwiceTheBit<2>(word));
  _mm512_store_si512(tile + 3 * kLine, TwiceTheBit<3>(word));
  _mm512_store_si512(tile + 4 * kLine, TwiceTheBit<4>(word));
  _mm512_store_si512(tile + 5 * kLine, TwiceTheBit<5>(word));
  _mm512_store_si512(tile + 6 * kLine, TwiceTheBit<6>(word));
  _mm512_store_si512(tile + 7 * kLine, TwiceTheBit<7>(word));
}

struct SignCall {
  const std::byte* rows;
  size_t row_stride;
  const std::byte* packed;
  const std::byte* offsets;
  size_t query_count;
  size_t width;
  int32_t* out;
  size_t out_stride;
};

// Up to 32 rows of signs in work with 17 to 32 queries, or 64 rows with up to 16, where a tile's
// product is short and more of them are needed side by side. C is tiles 0 to 3: with two packs 0
// and 1 of the first 16 queries, 2 and 3 of the others. A is 4 and 5 (4 alone with one pack), B the
// rest.
template <size_t kRowTiles, bool kTwoPacks>
struct SignRows {
  static_assert(kRowTiles <= 2 || (kRowTiles == 4 && !kTwoPacks));

  // B, expanded one step of 64 dimensions ahead of its use.
  alignas(64) std::byte b[kRowTiles][2][kTileBytes];
  // The bits of 512 dimensions, words of 16 rows side by side.
  alignas(64) std::byte words[kRowTiles][kTileBytes];
  const std::byte* rows[kRowTiles][16];

  HWY_INLINE void Expand(size_t step) {
    HWY_UNROLL(4)
    for (size_t t = 0; t < kRowTiles; ++t) {
      const std::byte* from = words[t] + step % 8 * 2 * kLine;
      std::byte* tile = b[t][step % 2];
      ExpandHalfTile(from, tile);
      ExpandHalfTile(from + kLine, tile + kTileBytes / 2);
    }
  }

  HWY_INLINE void Multiply(const SignCall& call, size_t step) {
    const std::byte* a = call.packed + step * 64;
    LoadTile<4>(a, call.width);
    LoadTile<6>(b[0][step % 2], kLine);
    AddProducts<0, 4, 6>();
    if constexpr (kTwoPacks) {
      LoadTile<5>(a + 16 * call.width, call.width);
      AddProducts<2, 5, 6>();
    }
    if constexpr (kRowTiles > 1) {
      LoadTile<7>(b[1][step % 2], kLine);
      AddProducts<1, 4, 7>();
      if constexpr (kTwoPacks) AddProducts<3, 5, 7>();
    }
    if constexpr (kRowTiles > 2) {
      LoadTile<5>(b[2][step % 2], kLine);
      AddProducts<2, 4, 5>();
      LoadTile<6>(b[3][step % 2], kLine);
      AddProducts<3, 4, 6>();
    }
  }
};

// A tile of products: queries first.. with 16 rows, or fewer.
template <int kTile>
HWY_INLINE void StoreProducts(const SignCall& call, size_t first_query, size_t row,
                              size_t row_count) {
  if (row_count == 0) return;
  int32_t* out = call.out + first_query * call.out_stride + row;
  if (row_count >= 16) {
    StoreTile<kTile>(out, call.out_stride * sizeof(int32_t));
    return;
  }
  alignas(64) std::byte c[kTileBytes];
  StoreTile<kTile>(c, kLine);
  const auto kept = static_cast<__mmask16>((1U << row_count) - 1);
  const size_t queries = std::min<size_t>(16, call.query_count - first_query);
  for (size_t q = 0; q < queries; ++q) {
    _mm512_mask_storeu_epi32(out + q * call.out_stride, kept, _mm512_load_si512(c + q * kLine));
  }
}

template <size_t kRowTiles, bool kTwoPacks>
HWY_INLINE void RowsOfSigns(const SignCall& call, size_t row, size_t row_count) {
  SignRows<kRowTiles, kTwoPacks> work;
  for (size_t r = 0; r < kRowTiles * 16; ++r) {
    work.rows[r / 16][r % 16] = r < row_count ? call.rows + (row + r) * call.row_stride : kZeros;
  }
  LoadTile<0>(call.offsets, kLine);
  if constexpr (kRowTiles > 1) LoadTile<1>(call.offsets, kLine);
  if constexpr (kTwoPacks) {
    LoadTile<2>(call.offsets + kTileBytes, kLine);
    if constexpr (kRowTiles > 1) LoadTile<3>(call.offsets + kTileBytes, kLine);
  }
  if constexpr (kRowTiles > 2) {
    LoadTile<2>(call.offsets, kLine);
    LoadTile<3>(call.offsets, kLine);
  }
  const size_t steps = call.width / 64;
  for (size_t step = 0; step < steps; ++step) {
    if (step % 8 == 0) {
      for (size_t t = 0; t < kRowTiles; ++t) {
        TransposeBits(work.rows[t], step * 8, std::min<size_t>(64, (steps - step) * 8),
                      work.words[t]);
      }
    }
    work.Expand(step);
    if (step != 0) work.Multiply(call, step - 1);
  }
  work.Multiply(call, steps - 1);
  const auto left = [row_count](size_t tile) { return row_count - std::min(row_count, tile * 16); };
  StoreProducts<0>(call, 0, row, left(0));
  if constexpr (kTwoPacks) StoreProducts<2>(call, 16, row, left(0));
  if constexpr (kRowTiles > 1) StoreProducts<1>(call, 0, row + 16, left(1));
  if constexpr (kRowTiles > 1 && kTwoPacks) StoreProducts<3>(call, 16, row + 16, left(1));
  if constexpr (kRowTiles > 2) {
    StoreProducts<2>(call, 0, row + 32, left(2));
    StoreProducts<3>(call, 0, row + 48, left(3));
  }
}

// `kMost`: the row tiles at a time.
template <size_t kMost, bool kTwoPacks>
HWY_INLINE void AllRowsOfSigns(const SignCall& call, size_t row_count) {
  constexpr size_t kRows = kMost * 16;
  size_t row = 0;
  for (; row + kRows / 2 < row_count; row += kRows) {
    RowsOfSigns<kMost, kTwoPacks>(call, row, std::min(kRows, row_count - row));
  }
  for (; row < row_count; row += kRows / 2) {
    RowsOfSigns<kMost / 2, kTwoPacks>(call, row, std::min(kRows / 2, row_count - row));
  }
}

HWY_INLINE void SignsWithTiles(const std::byte* rows, size_t row_stride, size_t row_count,
                               const std::byte* packed, size_t query_count, size_t width,
                               int32_t* out, size_t out_stride) {
  const SignCall call = {
      rows,        row_stride, packed, packed + SignOffsetsAt(query_count, width),
      query_count, width,      out,    out_stride};
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.Set(tile, 16, kLine);
  if (query_count > 16) {
    for (const int tile : {2, 3, 5}) shapes.Set(tile, query_count - 16, kLine);
    LoadShapes(shapes);
    AllRowsOfSigns<2, true>(call, row_count);
  } else {
    for (const int tile : {0, 1, 2, 3, 4}) shapes.Set(tile, query_count, kLine);
    LoadShapes(shapes);
    AllRowsOfSigns<4, false>(call, row_count);
  }
  ReleaseTiles();
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#endif

#endif  // per target
