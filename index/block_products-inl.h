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

// The words of up to 512 bits of 16 rows, side by side: words[w] has word w of every row. A row's
// bits end after `bytes` from `at` on, a multiple of 8, and nothing behind them is read.
HWY_INLINE void TransposeBits(const std::byte* const* rows, size_t at, size_t bytes,
                              std::byte* words) {
  size_t column = 0;
  for (; column + 16 <= bytes; column += 16) {
    const size_t from = at + column;
    StoreColumns(TransposeFourWords([rows, from](size_t r) { return rows[r] + from; }),
                 words + column * 16);
  }
  if (column == bytes) return;
  alignas(16) std::byte tails[16][16] = {};
  for (size_t r = 0; r < 16; ++r) std::memcpy(tails[r], rows[r] + at + column, 8);
  StoreColumns(TransposeFourWords([&tails](size_t r) { return tails[r]; }), words + column * 16);
}

// Of each byte, bit kBit as a number, 2 or 0. An affine map of the bits of a byte: its bit 1 is
// taken from bit kBit (SDM volume 2, GF2P8AFFINEQB: the matrix' row for bit 1 is its byte 6).
template <size_t kBit>
HWY_INLINE __m512i TwiceTheBit(__m512i bytes) {
  if constexpr (kBit == 1) return _mm512_and_si512(bytes, _mm512_set1_epi8(2));
  return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(int64_t{1} << (48 + kBit)), 0);
}

HWY_INLINE __m512i FourNumbers(const std::byte* at) {
  int32_t word;
  std::memcpy(&word, at, sizeof(word));
  return _mm512_set1_epi32(word);
}

// As index/block_products_kernels.h describes it.
HWY_INLINE void PackSigns(const std::byte* const* queries, size_t query_count, size_t width,
                          std::byte* packed) {
  alignas(64) uint8_t source[64];
  for (size_t i = 0; i < 64; ++i) {
    source[i] = static_cast<uint8_t>(i / 32 * 32 + i % 4 * 8 + i % 32 / 4);
  }
  const __m512i order = _mm512_load_si512(source);
  std::byte* offsets = packed + SignOffsetsAt(query_count, width);
  for (size_t q = 0; q < query_count; ++q) {
    __m512i sum = _mm512_setzero_si512();
    for (size_t i = 0; i < width; i += 64) {
      const __m512i numbers = _mm512_load_si512(queries[q] + i);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), numbers);
      _mm512_store_si512(packed + q * width + i, _mm512_permutexvar_epi8(order, numbers));
    }
    _mm512_store_si512(offsets + q * kLine, _mm512_set1_epi32(-_mm512_reduce_add_epi32(sum)));
  }
}

// Queries that are taken at once: with 64 rows, 20 sums and what they are made of fill the 32
// registers.
constexpr size_t kMostSums = 5;

// One of the eight bits of each byte of kBlocks words: kBlocks * 16 rows, kQueries queries, four
// dimensions. The words are read again for each bit: the sums need the registers.
template <size_t kBit, size_t kBlocks, size_t kQueries>
HWY_INLINE void AddBit(const std::byte* words, const std::byte* numbers, size_t width,
                       __m512i (&sum)[kBlocks][kQueries]) {
  __m512i twice[kBlocks];
  HWY_UNROLL(4)
  for (size_t t = 0; t < kBlocks; ++t) {
    twice[t] = TwiceTheBit<kBit>(_mm512_load_si512(words + t * width * 2));
  }
  HWY_UNROLL(6)
  for (size_t q = 0; q < kQueries; ++q) {
    const __m512i four = FourNumbers(numbers + q * width + 4 * kBit);
    HWY_UNROLL(4)
    for (size_t t = 0; t < kBlocks; ++t) {
      sum[t][q] = _mm512_dpbusd_epi32(sum[t][q], twice[t], four);
    }
  }
}

// Rows of signs whose words stand side by side, from `words` on: per block of 16 rows width * 2
// bytes. A lane per row, so that a query's sums are ready for the output. `kept`: the last block's
// rows.
template <size_t kBlocks, size_t kQueries>
HWY_INLINE void SignsOfSomeQueries(const std::byte* words, const std::byte* numbers,
                                   const std::byte* offsets, size_t width, __mmask16 kept,
                                   int32_t* out, size_t out_stride) {
  __m512i sum[kBlocks][kQueries];
  HWY_UNROLL(4)
  for (size_t t = 0; t < kBlocks; ++t) {
    HWY_UNROLL(6)
    for (size_t q = 0; q < kQueries; ++q) sum[t][q] = _mm512_load_si512(offsets + q * kLine);
  }
  for (size_t i = 0; i < width; i += 32) {
    const std::byte* const word = words + i * 2;
    AddBit<0>(word, numbers + i, width, sum);
    AddBit<1>(word, numbers + i, width, sum);
    AddBit<2>(word, numbers + i, width, sum);
    AddBit<3>(word, numbers + i, width, sum);
    AddBit<4>(word, numbers + i, width, sum);
    AddBit<5>(word, numbers + i, width, sum);
    AddBit<6>(word, numbers + i, width, sum);
    AddBit<7>(word, numbers + i, width, sum);
  }
  HWY_UNROLL(6)
  for (size_t q = 0; q < kQueries; ++q) {
    HWY_UNROLL(4)
    for (size_t t = 0; t < kBlocks; ++t) {
      const __mmask16 rows = t + 1 < kBlocks ? static_cast<__mmask16>(0xFFFF) : kept;
      _mm512_mask_storeu_epi32(out + q * out_stride + t * 16, rows, sum[t][q]);
    }
  }
}

template <size_t kBlocks>
HWY_INLINE void SignsOfAllQueries(const std::byte* rows, size_t row_stride, size_t row_count,
                                  const std::byte* packed, size_t query_count, size_t width,
                                  int32_t* out, size_t out_stride) {
  alignas(64) std::byte words[kBlocks * 4096 * 2];
  for (size_t t = 0; t < kBlocks; ++t) {
    const std::byte* sixteen[16];
    for (size_t r = 0; r < 16; ++r) {
      sixteen[r] = t * 16 + r < row_count ? rows + (t * 16 + r) * row_stride : kZeros;
    }
    for (size_t at = 0; at < width / 8; at += 64) {
      TransposeBits(sixteen, at, std::min<size_t>(64, width / 8 - at),
                    words + t * width * 2 + at * 16);
    }
  }
  const std::byte* offsets = packed + SignOffsetsAt(query_count, width);
  const auto kept = static_cast<__mmask16>((1U << (row_count - (kBlocks - 1) * 16)) - 1);
  while (query_count > 0) {
    // Alike shares: a few alone would not keep the multipliers busy.
    const size_t shares = (query_count + kMostSums - 1) / kMostSums;
    const size_t share = (query_count + shares - 1) / shares;
    switch (share) {
      case 1:
        SignsOfSomeQueries<kBlocks, 1>(words, packed, offsets, width, kept, out, out_stride);
        break;
      case 2:
        SignsOfSomeQueries<kBlocks, 2>(words, packed, offsets, width, kept, out, out_stride);
        break;
      case 3:
        SignsOfSomeQueries<kBlocks, 3>(words, packed, offsets, width, kept, out, out_stride);
        break;
      case 4:
        SignsOfSomeQueries<kBlocks, 4>(words, packed, offsets, width, kept, out, out_stride);
        break;
      case 5:
        SignsOfSomeQueries<kBlocks, 5>(words, packed, offsets, width, kept, out, out_stride);
        break;
      default:
        SignsOfSomeQueries<kBlocks, 6>(words, packed, offsets, width, kept, out, out_stride);
        break;
    }
    query_count -= share;
    packed += share * width;
    offsets += share * kLine;
    out += share * out_stride;
  }
}

HWY_INLINE void SignBlock(const std::byte* rows, size_t row_stride, size_t row_count,
                          const std::byte* packed, size_t query_count, size_t width, int32_t* out,
                          size_t out_stride) {
  for (size_t row = 0; row < row_count; row += 64) {
    const std::byte* from = rows + row * row_stride;
    const size_t count = std::min<size_t>(64, row_count - row);
    int32_t* to = out + row;
    if (count > 48) {
      SignsOfAllQueries<4>(from, row_stride, count, packed, query_count, width, to, out_stride);
    } else if (count > 32) {
      SignsOfAllQueries<3>(from, row_stride, count, packed, query_count, width, to, out_stride);
    } else if (count > 16) {
      SignsOfAllQueries<2>(from, row_stride, count, packed, query_count, width, to, out_stride);
    } else {
      SignsOfAllQueries<1>(from, row_stride, count, packed, query_count, width, to, out_stride);
    }
  }
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

// The bits of a row as numbers, 1 or -1, in the order of the packed queries.
HWY_INLINE void ExpandSigns(const std::byte* row, size_t width, int8_t* numbers) {
  for (size_t i = 0; i < width; i += 32) {
    uint32_t word;
    std::memcpy(&word, row + i / 8, sizeof(word));
    for (uint32_t j = 0; j < 8; ++j) {
      // A byte of 1 becomes 1 and a byte of 0 becomes 0xFF.
      const uint32_t signs = ~(((word >> j) & 0x01010101U) * 0xFEU);
      std::memcpy(numbers + i + size_t{4} * j, &signs, sizeof(signs));
    }
  }
}

// Four rows at a time: their numbers stay in the first-level cache for all queries.
HWY_INLINE void SignBlock(const std::byte* rows, size_t row_stride, size_t row_count,
                          const std::byte* packed, size_t query_count, size_t width, int32_t* out,
                          size_t out_stride) {
  alignas(64) int8_t numbers[4 * 4096];
  for (size_t row = 0; row < row_count; row += 4) {
    const size_t count = std::min<size_t>(4, row_count - row);
    for (size_t r = 0; r < count; ++r) {
      ExpandSigns(rows + (row + r) * row_stride, width, numbers + r * width);
    }
    Int8Block(reinterpret_cast<const std::byte*>(numbers), width, count, packed, query_count, width,
              out + row, out_stride);
  }
}

HWY_INLINE void PackSigns(const std::byte* const* queries, size_t query_count, size_t width,
                          std::byte* packed) {
  std::byte* offsets = packed + SignOffsetsAt(query_count, width);
  for (size_t q = 0; q < query_count; ++q) {
    int32_t sum = 0;
    for (size_t i = 0; i < width; ++i) {
      const size_t of_word = i % 32;
      packed[q * width + i - of_word + of_word % 8 * 4 + of_word / 8] = queries[q][i];
      sum += static_cast<int8_t>(queries[q][i]);
    }
    int32_t offset[16];
    for (int32_t& o : offset) o = -sum;
    std::memcpy(offsets + q * sizeof(offset), offset, sizeof(offset));
  }
}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#endif  // per target
