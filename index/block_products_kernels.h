#pragma once

#include <cstddef>
#include <cstdint>

namespace engram {

// The functions behind BlockProducts, one set per kernel; the arguments are those of
// index/block_products.h, checked.
struct BlockKernels {
  using PackFn = void (*)(const std::byte* const* queries, size_t query_count, size_t width,
                          std::byte* packed);
  using ProductsFn = void (*)(const std::byte* rows, size_t row_stride, size_t row_count,
                              const std::byte* packed, size_t query_count, size_t width,
                              int32_t* out, size_t out_stride);
  PackFn pack_queries;
  ProductsFn products;
};

}  // namespace engram
