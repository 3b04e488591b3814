#pragma once

#include <cstddef>
#include <cstdint>

#include "index/block_products_kernels.h"

namespace engram {

// Inner products of many rows with a block of up to 32 queries, exact in int32.
//
// One row meets all queries of a block while it is in the first-level cache, and on a processor
// with matrix tiles one instruction takes 16 rows, 16 queries and 64 dimensions. That is several
// times cheaper than a distance function called pair by pair.
//
// Rows and queries are `width` signed int8 numbers: those of an int8 row of VectorFormat, without
// its trailer. `width` is a multiple of 64 and at most kMaxWidth, which keeps every sum below 2^27.
//
// A block of queries is packed once and used for any number of rows, by block products of the same
// kernel.
//
// Sources: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18
// (programming with Intel AMX) and volume 2 (TDPBSSD, VPDPBUSD); Intel 64 and IA-32 Architectures
// Optimization Reference Manual, chapter on Intel AMX (blocking of tiles, preparing of operands).
//
// Thread safety: constant after construction; copies are equal. No call allocates. A call with
// tiles leaves the calling thread's tile registers released, so that no context switch saves them.
class BlockProducts {
 public:
  enum class Kernel : uint8_t {
    kBest,     // kTiles where there are tiles, else kVectors
    kTiles,    // Intel AMX; kVectors where the machine or its kernel does not grant them
    kVectors,  // Highway's best target, with VPDPBUSD where there is AVX-512 VNNI
  };

  static constexpr size_t kMaxQueries = 32;
  static constexpr size_t kMaxWidth = 4096;

  // Whether this process may use int8 tiles. The first call asks the operating system for the
  // permission, which holds for all threads of the process and for its life. False where the
  // processor has none, the operating system does not save them, or refuses.
  static bool HasTiles();

  explicit BlockProducts(Kernel kernel = Kernel::kBest);

  // What is in use: kTiles or kVectors.
  Kernel kernel() const { return kernel_; }

  // Bytes of a packed block of `query_count` queries (1 to kMaxQueries). A multiple of 64.
  static constexpr size_t PackedBytes(size_t query_count, size_t width) {
    return (query_count + 15) / 16 * 16 * width;
  }

  // Packs `query_count` queries (1 to kMaxQueries) of `width` int8 numbers each, aligned to 64
  // bytes. `packed`: PackedBytes(), aligned to 64 bytes.
  void PackQueries(const std::byte* const* queries, size_t query_count, size_t width,
                   std::byte* packed) const;

  // out[query * out_stride + row] = the inner product, for each of the `query_count` queries of
  // `packed` (the count and width that it was packed with) and each of `row_count` int8 rows, of
  // which row r begins at rows + r * row_stride. `rows` is aligned to 64 bytes and `row_stride` is
  // a multiple of 64; `width` bytes of each row are read and nothing else. `out_stride` is counted
  // in numbers and at least `row_count`; no other number of `out` is written. `out` needs no
  // alignment. `row_count` may be 0.
  //
  // With tiles a call costs some 55 ns before its first product, for loading their shapes: give it
  // many rows. It uses up to 50 KiB of stack.
  void Products(const std::byte* rows, size_t row_stride, size_t row_count, const std::byte* packed,
                size_t query_count, size_t width, int32_t* out, size_t out_stride) const;

 private:
  Kernel kernel_;
  BlockKernels kernels_;
};

}  // namespace engram
