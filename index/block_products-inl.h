// Kernels of block products, compiled once per instruction set: included by block_products.cc only.

#if defined(ENGRAM_INDEX_BLOCK_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ENGRAM_INDEX_BLOCK_PRODUCTS_INL_H_
#undef ENGRAM_INDEX_BLOCK_PRODUCTS_INL_H_
#else
#define ENGRAM_INDEX_BLOCK_PRODUCTS_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "index/block_products_kernels.h"
#include "index/int8_product-inl.h"

// Highway asks the machine for AVX512_VNNI and GFNI before it chooses AVX3_DL, but does not allow
// them to the compiler.
#undef ENGRAM_BEFORE_BLOCK_NAMESPACE
#if HWY_TARGET == HWY_AVX3_DL
#define ENGRAM_BEFORE_BLOCK_NAMESPACE()                  \
  HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512vnni,gfni") \
  static_assert(true, "For requiring trailing semicolon")
#else
#define ENGRAM_BEFORE_BLOCK_NAMESPACE() HWY_BEFORE_NAMESPACE()
#endif

ENGRAM_BEFORE_BLOCK_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET == HWY_AVX3_DL

// The sums of 4 registers, one after the other, in the four 32-bit numbers of the result.
HWY_INLINE __m128i SumsOfFour(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i abcd =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i halves =
      _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

// Four rows with kQueries queries of the block; `offset` has 128 * (a query's sum), one each.
// VPDPBUSD multiplies unsigned by signed: a row's numbers are taken plus 128, which is what
// flipping the top bit makes of them, and 128 * (the query's sum) is too much.
template <size_t kQueries>
HWY_INLINE void FourRows(const std::byte* const* rows, const std::byte* queries, size_t width,
                         const int32_t* offset, __mmask8 rows_kept, int32_t* out,
                         size_t out_stride) {
  __m512i sum[kQueries][4];
  HWY_UNROLL(4)
  for (size_t q = 0; q < kQueries; ++q) {
    HWY_UNROLL(4)
    for (size_t r = 0; r < 4; ++r) sum[q][r] = _mm512_setzero_si512();
  }
  const __m512i top_bits = _mm512_set1_epi8(-128);
  for (size_t i = 0; i < width; i += 64) {
    __m512i raised[4];
    HWY_UNROLL(4)
    for (size_t r = 0; r < 4; ++r) {
      raised[r] = _mm512_xor_si512(_mm512_load_si512(rows[r] + i), top_bits);
    }
    HWY_UNROLL(4)
    for (size_t q = 0; q < kQueries; ++q) {
      const __m512i numbers = _mm512_load_si512(queries + q * width + i);
      HWY_UNROLL(4)
      for (size_t r = 0; r < 4; ++r) {
        sum[q][r] = _mm512_dpbusd_epi32(sum[q][r], raised[r], numbers);
      }
    }
  }
  HWY_UNROLL(4)
  for (size_t q = 0; q < kQueries; ++q) {
    const __m128i sums = SumsOfFour(sum[q][0], sum[q][1], sum[q][2], sum[q][3]);
    _mm_mask_storeu_epi32(out + q * out_stride, rows_kept,
                          _mm_sub_epi32(sums, _mm_set1_epi32(offset[q])));
  }
}

HWY_INLINE void Int8Block(const std::byte* rows, size_t row_stride, size_t row_count,
                          const std::byte* packed, size_t query_count, size_t width, int32_t* out,
                          size_t out_stride) {
  int32_t offsets[32];
  for (size_t q = 0; q < query_count; ++q) {
    __m512i sum = _mm512_setzero_si512();
    for (size_t i = 0; i < width; i += 64) {
      sum =
          _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_load_si512(packed + q * width + i));
    }
    offsets[q] = 128 * _mm512_reduce_add_epi32(sum);
  }
  for (size_t row = 0; row < row_count; row += 4) {
    const std::byte* four[4];
    for (size_t r = 0; r < 4; ++r) {
      four[r] = rows + std::min(row + r, row_count - 1) * row_stride;
    }
    const size_t left = std::min<size_t>(4, row_count - row);
    const auto kept = static_cast<__mmask8>((1U << left) - 1);
    size_t q = 0;
    for (; q + 4 <= query_count; q += 4) {
      FourRows<4>(four, packed + q * width, width, offsets + q, kept, out + q * out_stride + row,
                  out_stride);
    }
    for (; q < query_count; ++q) {
      FourRows<1>(four, packed + q * width, width, offsets + q, kept, out + q * out_stride + row,
                  out_stride);
    }
  }
}

// Behind a row that is not there.
alignas(64) constexpr std::byte kZeros[4096] = {};

constexpr size_t kLine = 64;

// Four times 16 bytes: of rows 0, 4, 8 and 12, where `row_at`(r) is where row r's 16 bytes are.
template <size_t kFirst, typename RowAt>
HWY_INLINE __m512i EveryFourthRow(const RowAt& row_at) {
  const auto load = [](const std::byte* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  };
  __m512i lanes = _mm512_castsi128_si512(load(row_at(kFirst)));
  lanes = _mm512_mask_broadcast_i32x4(lanes, 0x00F0, load(row_at(kFirst + 4)));
  lanes = _mm512_mask_broadcast_i32x4(lanes, 0x0F00, load(row_at(kFirst + 8)));
  return _mm512_mask_broadcast_i32x4(lanes, 0xF000, load(row_at(kFirst + 12)));
}

// Four columns of 16 32-bit words.
struct Columns {
  __m512i column[4];
};

// Of 16 bytes of each of 16 rows, column k is word k of every row.
template <typename RowAt>
HWY_INLINE Columns TransposeFourWords(const RowAt& row_at) {
  const __m512i a = EveryFourthRow<0>(row_at);
  const __m512i b = EveryFourthRow<1>(row_at);
  const __m512i c = EveryFourthRow<2>(row_at);
  const __m512i d = EveryFourthRow<3>(row_at);
  const __m512i ab01 = _mm512_unpacklo_epi32(a, b);
  const __m512i ab23 = _mm512_unpackhi_epi32(a, b);
  const __m512i cd01 = _mm512_unpacklo_epi32(c, d);
  const __m512i cd23 = _mm512_unpackhi_epi32(c, d);
  return {{_mm512_unpacklo_epi64(ab01, cd01), _mm512_unpackhi_epi64(ab01, cd01),
           _mm512_unpacklo_epi64(ab23, cd23), _mm512_unpackhi_epi64(ab23, cd23)}};
}

HWY_INLINE void StoreColumns(const Columns& columns, std::byte* out) {
  _mm512_store_si512(out, columns.column[0]);
  _mm512_store_si512(out + kLine, columns.column[1]);
  _mm512_store_si512(out + 2 * kLine, columns.column[2]);
  _mm512_store_si512(out + 3 * kLine, columns.column[3]);
}

#else

HWY_INLINE void Int8Block(const std::byte* rows, size_t row_stride, size_t row_count,
                          const std::byte* packed, size_t query_count, size_t width, int32_t* out,
                          size_t out_stride) {
  for (size_t row = 0; row < row_count; ++row) {
    const auto* numbers = reinterpret_cast<const int8_t*>(rows + row * row_stride);
    for (size_t q = 0; q < query_count; ++q) {
      out[q * out_stride + row] =
          Int8Product(numbers, reinterpret_cast<const int8_t*>(packed + q * width), width);
    }
  }
}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#endif  // per target
