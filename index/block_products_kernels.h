#pragma once

#include <cstddef>
#include <cstdint>

namespace engram {

// The functions behind BlockProducts, one set per kernel; the arguments are those of
// index/block_products.h, checked.
//
// A block packed for rows of signs is the same in every set:
//   numbers   query q's at byte q * width. In each group of 32 dimensions the number of dimension
//             8 * b + j stands at 4 * j + b, so that (word >> j) & 0x01010101 of a row's 32-bit
//             word meets four adjacent numbers (b = 0..3).
//   offsets   behind the numbers of 16 or 32 queries: 64 bytes per query, -(sum of its numbers)
//             16 times over: the product with signs is twice that with bits, plus the offset.
// Absent queries, up to a multiple of 16, are not written.
struct BlockKernels {
  using PackFn = void (*)(const std::byte* const* queries, size_t query_count, size_t width,
                          std::byte* packed);
  using ProductsFn = void (*)(const std::byte* rows, size_t row_stride, size_t row_count,
                              const std::byte* packed, size_t query_count, size_t width,
                              int32_t* out, size_t out_stride);
  PackFn pack_queries;
  PackFn pack_sign_queries;
  ProductsFn products;
  ProductsFn sign_products;
};

// Where the offsets of a block packed for signs begin.
constexpr size_t SignOffsetsAt(size_t query_count, size_t width) {
  return (query_count + 15) / 16 * 16 * width;
}

}  // namespace engram
