// Kernels of RaBitQ codes, compiled once per instruction set: included by rabitq_format.cc only.

// What no instruction set changes.
#ifndef ENGRAM_INDEX_RABITQ_FORMAT_INL_H_ONCE_
#define ENGRAM_INDEX_RABITQ_FORMAT_INL_H_ONCE_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

namespace engram {

// A code is cut into parts: whole lines of 64 bytes, then at most one of 32 and one of 16 bytes. A
// query has its factors, then the four planes of each part behind one another, plane 0 first. So a
// register of 64 bytes meets 4, 2 and 1 registers of the query, and the last part of a code, of
// which a line may hold little, costs less than a whole line.
struct RabitqParts {
  static constexpr size_t kPlanes = 4;
  explicit constexpr RabitqParts(size_t bits) {
    const size_t words = bits % 512 / 64;
    // 7 words would take three parts; a whole line has no more to do.
    lines = bits / 512 + (words == 7 ? 1 : 0);
    has_half = words >= 3 && words <= 6;
    has_quarter = words == 1 || words == 2 || words == 5 || words == 6;
  }
  constexpr size_t plane_bytes() const {
    return lines * 64 + (has_half ? 32 : 0) + (has_quarter ? 16 : 0);
  }
  size_t lines;
  bool has_half;
  bool has_quarter;
};

// What a query begins with. Double, because sums of the largest floats leave their range.
struct RabitqQueryFactors {
  double doubled_step;   // 2 * step
  double doubled_low;    // 2 * low
  double base;           // -sum of s as it was quantised
  double offset;         // a float
  uint8_t reserved[32];  // zero
};
static_assert(sizeof(RabitqQueryFactors) == 64, "one cache line, so that the planes are aligned");

// What follows the code of a row.
struct RabitqRowFactors {
  float A;
  float F;
  float ones;
};

// Sums that the encoders take on the way.
struct ResidualSums {
  float squares;      // of the residual
  float by_centroid;  // its inner product with the centroid, both scaled
};
struct SignSums {
  float magnitudes;
  uint32_t ones;
};
struct QuantisedQuery {
  float low;
  float step;
  double sum;  // of low + step * u_i
};

constexpr float kLargestUnsigned = 15;
// Scaled residuals that all lie closer than this are taken as alike: its reciprocal is finite.
constexpr float kSmallestWidth = 1e-30F;

}  // namespace engram

#endif  // ENGRAM_INDEX_RABITQ_FORMAT_INL_H_ONCE_

#if defined(ENGRAM_INDEX_RABITQ_FORMAT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ENGRAM_INDEX_RABITQ_FORMAT_INL_H_
#undef ENGRAM_INDEX_RABITQ_FORMAT_INL_H_
#else
#define ENGRAM_INDEX_RABITQ_FORMAT_INL_H_
#endif

#include <hwy/highway.h>

#include "index/distance-inl.h"  // FloatTag, Floats, ENGRAM_BEFORE_INT8_NAMESPACE

HWY_BEFORE_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// The largest of the magnitudes. No alignment needed.
HWY_INLINE float LargestOf(const float* HWY_RESTRICT v, size_t count) {
  const FloatTag tag;
  const size_t lanes = hn::Lanes(tag);
  Floats largest0 = hn::Zero(tag);
  Floats largest1 = hn::Zero(tag);
  size_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    largest0 = hn::Max(largest0, hn::Abs(hn::LoadU(tag, v + i)));
    largest1 = hn::Max(largest1, hn::Abs(hn::LoadU(tag, v + i + lanes)));
  }
  float largest = hn::GetLane(hn::MaxOfLanes(tag, hn::Max(largest0, largest1)));
  for (; i < count; ++i) largest = std::max(largest, v[i] < 0 ? -v[i] : v[i]);
  return largest;
}

// to[i] = v[i] * scale - centroid[i] * scale, zero from `count` to `padded`, a multiple of 64, on.
// `scale` is a power of two, so the products are exact. `v` needs no alignment.
HWY_INLINE ResidualSums ScaledResidual(const float* HWY_RESTRICT v,
                                       const float* HWY_RESTRICT centroid, size_t count,
                                       size_t padded, float scale, float* HWY_RESTRICT to) {
  const FloatTag tag;
  const size_t lanes = hn::Lanes(tag);
  const Floats factor = hn::Set(tag, scale);
  // So that the last register reads no more of `v` than there is.
  const size_t whole = count / lanes * lanes;
  std::memset(to + whole, 0, (padded - whole) * sizeof(float));
  for (size_t i = whole; i < count; ++i) to[i] = v[i] * scale - centroid[i] * scale;
  Floats squares0 = hn::Zero(tag);
  Floats squares1 = hn::Zero(tag);
  Floats products0 = hn::Zero(tag);
  Floats products1 = hn::Zero(tag);
  for (size_t i = 0; i < whole; i += lanes) {
    const Floats middle = hn::Mul(hn::Load(tag, centroid + i), factor);
    hn::Store(hn::Sub(hn::Mul(hn::LoadU(tag, v + i), factor), middle), tag, to + i);
  }
  for (size_t i = 0; i < padded; i += 2 * lanes) {
    const Floats middle0 = hn::Mul(hn::Load(tag, centroid + i), factor);
    const Floats middle1 = hn::Mul(hn::Load(tag, centroid + i + lanes), factor);
    const Floats residual0 = hn::Load(tag, to + i);
    const Floats residual1 = hn::Load(tag, to + i + lanes);
    squares0 = hn::MulAdd(residual0, residual0, squares0);
    squares1 = hn::MulAdd(residual1, residual1, squares1);
    products0 = hn::MulAdd(residual0, middle0, products0);
    products1 = hn::MulAdd(residual1, middle1, products1);
  }
  return {hn::GetLane(hn::SumOfLanes(tag, hn::Add(squares0, squares1))),
          hn::GetLane(hn::SumOfLanes(tag, hn::Add(products0, products1)))};
}

// Bit i % 8 of code[i / 8] = r[i] > 0. `count` is a multiple of 64.
HWY_INLINE SignSums CodeOf(const float* HWY_RESTRICT r, size_t count, uint8_t* HWY_RESTRICT code) {
  const FloatTag tag;
  const size_t lanes = hn::Lanes(tag);
  Floats sum0 = hn::Zero(tag);
  Floats sum1 = hn::Zero(tag);
  size_t ones = 0;
  // A byte at least at a time: a register may have four lanes.
  for (size_t i = 0; i < count; i += 64) {
    uint64_t word = 0;
    for (size_t j = 0; j < 64; j += 2 * lanes) {
      const Floats r0 = hn::Load(tag, r + i + j);
      const Floats r1 = hn::Load(tag, r + i + j + lanes);
      sum0 = hn::Add(sum0, hn::Abs(r0));
      sum1 = hn::Add(sum1, hn::Abs(r1));
      // StoreMaskBits may write a byte for each 8 lanes, and clears what is beyond the last.
      uint8_t bits[8] = {};
      hn::StoreMaskBits(tag, hn::Gt(r0, hn::Zero(tag)), bits);
      uint64_t low = 0;
      std::memcpy(&low, bits, sizeof(low));
      hn::StoreMaskBits(tag, hn::Gt(r1, hn::Zero(tag)), bits);
      uint64_t high = 0;
      std::memcpy(&high, bits, sizeof(high));
      word |= (low | high << lanes) << j;
    }
    std::memcpy(code + i / 8, &word, sizeof(word));
    ones += hwy::PopCount(word);
  }
  return {hn::GetLane(hn::SumOfLanes(tag, hn::Add(sum0, sum1))), static_cast<uint32_t>(ones)};
}

struct Range {
  float low;
  float high;
};

// `count` is a multiple of 64.
HWY_INLINE Range RangeOf(const float* HWY_RESTRICT s, size_t count) {
  const FloatTag tag;
  const size_t lanes = hn::Lanes(tag);
  Floats low = hn::Load(tag, s);
  Floats high = low;
  for (size_t i = lanes; i < count; i += lanes) {
    const Floats value = hn::Load(tag, s + i);
    low = hn::Min(low, value);
    high = hn::Max(high, value);
  }
  return {hn::GetLane(hn::MinOfLanes(tag, low)), hn::GetLane(hn::MaxOfLanes(tag, high))};
}

// to[i] = (s[i] - low) * factor, rounded to the nearest; all are 0 to 255. Returns their sum.
// `count` is a multiple of 64.
HWY_INLINE uint32_t QuantiseUnsigned(const float* HWY_RESTRICT s, size_t count, float low,
                                     float factor, uint8_t* HWY_RESTRICT to) {
  const FloatTag tag;
  const size_t lanes = hn::Lanes(tag);
  const hn::Rebind<int32_t, FloatTag> int_tag;
  const hn::Rebind<uint8_t, FloatTag> narrow;
  const Floats lows = hn::Set(tag, low);
  const Floats factors = hn::Set(tag, factor);
  auto sums = hn::Zero(int_tag);
  for (size_t i = 0; i < count; i += lanes) {
    const Floats scaled = hn::Mul(hn::Sub(hn::Load(tag, s + i), lows), factors);
    const auto number = hn::NearestInt(scaled);
    sums = hn::Add(sums, number);
    hn::Store(hn::DemoteTo(narrow, number), narrow, to + i);
  }
  return static_cast<uint32_t>(hn::GetLane(hn::SumOfLanes(int_tag, sums)));
}

// Bit i % 8 of plane[i / 8] = bit `bit` of numbers[i]. `count` is a multiple of 64.
HWY_INLINE void PlaneOf(const uint8_t* HWY_RESTRICT numbers, size_t count, int bit,
                        uint8_t* HWY_RESTRICT plane) {
#if HWY_TARGET == HWY_SCALAR
  std::memset(plane, 0, count / 8);
  for (size_t i = 0; i < count; ++i) {
    plane[i / 8] = static_cast<uint8_t>(plane[i / 8] | (numbers[i] >> bit & 1) << (i % 8));
  }
#else
  const hn::CappedTag<uint8_t, 64> tag;
  const size_t lanes = hn::Lanes(tag);
  const auto mask = hn::Set(tag, static_cast<uint8_t>(1 << bit));
  for (size_t i = 0; i < count; i += lanes) {
    hn::StoreMaskBits(tag, hn::TestBit(hn::Load(tag, numbers + i), mask), plane + i / 8);
  }
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

ENGRAM_BEFORE_INT8_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

HWY_INLINE RabitqRowFactors FactorsOf(const std::byte* row, size_t bits) {
  const auto* at = reinterpret_cast<const float*>(row + bits / 8);
  return {at[0], at[1], at[2]};
}

// a * b + c, rounded once where the instruction set has it: explicitly, so that one row and eight
// give the same bits.
HWY_INLINE double MulAddOf(double a, double b, double c) {
#if HWY_NATIVE_FMA
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// `weighted`: sum over the ones of the code of u_i.
HWY_INLINE float EstimateOf(uint32_t weighted, const RabitqRowFactors& row,
                            const RabitqQueryFactors& query) {
  const double low_part = MulAddOf(query.doubled_low, double{row.ones}, query.base);
  const double sum = MulAddOf(query.doubled_step, static_cast<double>(weighted), low_part);
  return ClampToFloat(MulAddOf(double{row.F}, sum, double{row.A} + query.offset));
}

#if HWY_TARGET == HWY_AVX3_DL
// Population counts of bytes, which VPDPBUSD weighs by their plane and adds in fours: one
// instruction where a shift and an addition of 64-bit counts would be two.
HWY_INLINE __m512i AddOnes(__m512i code, __m512i plane, __m512i weights, __m512i sum) {
  return _mm512_dpbusd_epi32(sum, _mm512_popcnt_epi8(_mm512_and_si512(code, plane)), weights);
}

// A part of a query, kPartBytes of each plane, in as many registers as it takes, and the weight of
// each byte in them.
template <size_t kPartBytes>
struct PartOfQuery {
  static constexpr size_t kRegisters = RabitqParts::kPlanes * kPartBytes / 64;
  __m512i planes[kRegisters];
  __m512i weights[kRegisters];
};
template <size_t kPartBytes>
HWY_INLINE PartOfQuery<kPartBytes> LoadPart(const std::byte* query) {
  if constexpr (kPartBytes == 64) {
    return {{_mm512_load_si512(query), _mm512_load_si512(query + 64),
             _mm512_load_si512(query + 128), _mm512_load_si512(query + 192)},
            {_mm512_set1_epi8(1), _mm512_set1_epi8(2), _mm512_set1_epi8(4), _mm512_set1_epi8(8)}};
  } else {
    constexpr int64_t kOf0 = 0x0101010101010101;
    constexpr int64_t kOf1 = 2 * kOf0;
    constexpr int64_t kOf2 = 4 * kOf0;
    constexpr int64_t kOf3 = 8 * kOf0;
    if constexpr (kPartBytes == 32) {
      return {{_mm512_load_si512(query), _mm512_load_si512(query + 64)},
              {_mm512_setr_epi64(kOf0, kOf0, kOf0, kOf0, kOf1, kOf1, kOf1, kOf1),
               _mm512_setr_epi64(kOf2, kOf2, kOf2, kOf2, kOf3, kOf3, kOf3, kOf3)}};
    } else {
      return {{_mm512_load_si512(query)},
              {_mm512_setr_epi64(kOf0, kOf0, kOf1, kOf1, kOf2, kOf2, kOf3, kOf3)}};
    }
  }
}

// The part of a code, as often as a register holds it.
template <size_t kPartBytes>
HWY_INLINE __m512i LoadCode(const std::byte* code) {
  if constexpr (kPartBytes == 64) {
    return _mm512_load_si512(code);
  } else if constexpr (kPartBytes == 32) {
    return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(code)));
  } else {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(code)));
  }
}

// sums[r] += the weighted ones of a part of row r. By recursion, as a loop over the rows would keep
// the sums in memory.
template <size_t kPartBytes, size_t kRows, size_t kRow = 0>
HWY_INLINE void AddPartOfRows(const PartOfQuery<kPartBytes>& query, const std::byte* const* rows,
                              size_t at, __m512i* sums) {
  constexpr size_t kRegisters = PartOfQuery<kPartBytes>::kRegisters;
  if constexpr (kRow < kRows) {
    const __m512i code = LoadCode<kPartBytes>(rows[kRow] + at);
    sums[kRow] = AddOnes(code, query.planes[0], query.weights[0], sums[kRow]);
    if constexpr (kRegisters > 1) {
      sums[kRow] = AddOnes(code, query.planes[1], query.weights[1], sums[kRow]);
    }
    if constexpr (kRegisters > 2) {
      sums[kRow] = AddOnes(code, query.planes[2], query.weights[2], sums[kRow]);
      sums[kRow] = AddOnes(code, query.planes[3], query.weights[3], sums[kRow]);
    }
    AddPartOfRows<kPartBytes, kRows, kRow + 1>(query, rows, at, sums);
  }
}

// Into 16 lanes of 32 bits a row, of which each stays below 2^12.
template <size_t kRows>
HWY_INLINE void AddWeightedOnes(const std::byte* query, const std::byte* const* rows,
                                const RabitqParts& parts, __m512i* sums) {
  size_t at = 0;
  for (size_t line = 0; line < parts.lines; ++line, at += 64, query += 256) {
    AddPartOfRows<64, kRows>(LoadPart<64>(query), rows, at, sums);
  }
  if (parts.has_half) {
    AddPartOfRows<32, kRows>(LoadPart<32>(query), rows, at, sums);
    at += 32;
    query += 128;
  }
  if (parts.has_quarter) AddPartOfRows<16, kRows>(LoadPart<16>(query), rows, at, sums);
}

HWY_INLINE uint32_t WeightedOnes(const std::byte* query, const std::byte* row,
                                 const RabitqParts& parts) {
  __m512i sum = _mm512_setzero_si512();
  AddWeightedOnes<1>(query, &row, parts, &sum);
  return static_cast<uint32_t>(_mm512_reduce_add_epi32(sum));
}

// A, F and the ones of 8 rows, row by row in the lanes.
struct FactorsOf8 {
  __m256 A, F, ones;
};
HWY_INLINE FactorsOf8 TransposedFactors(const std::byte* const* rows, size_t bits) {
  // Four floats are within the row: its end is at a multiple of 64, its factors at one of 8.
  const auto pair = [rows, bits](size_t low, size_t high) HWY_ATTR {
    return _mm256_insertf128_ps(
        _mm256_castps128_ps256(_mm_loadu_ps(reinterpret_cast<const float*>(rows[low] + bits / 8))),
        _mm_loadu_ps(reinterpret_cast<const float*>(rows[high] + bits / 8)), 1);
  };
  const __m256 row04 = pair(0, 4);
  const __m256 row15 = pair(1, 5);
  const __m256 row26 = pair(2, 6);
  const __m256 row37 = pair(3, 7);
  const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(row04, row15));
  const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(row26, row37));
  const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(row04, row15));
  const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(row26, row37));
  return {_mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23)),
          _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23)),
          _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23))};
}

// EstimateOf for 8 rows; `weighted` has one in each lane.
HWY_INLINE __m256 EstimatesOf8(__m256i weighted, const FactorsOf8& rows,
                               const RabitqQueryFactors& query) {
  const __m512d low_part = _mm512_fmadd_pd(_mm512_set1_pd(query.doubled_low),
                                           _mm512_cvtps_pd(rows.ones), _mm512_set1_pd(query.base));
  const __m512d sum =
      _mm512_fmadd_pd(_mm512_set1_pd(query.doubled_step), _mm512_cvtepi32_pd(weighted), low_part);
  const __m512d constant = _mm512_add_pd(_mm512_cvtps_pd(rows.A), _mm512_set1_pd(query.offset));
  const __m512d estimate = _mm512_fmadd_pd(_mm512_cvtps_pd(rows.F), sum, constant);
  constexpr double kLargest = std::numeric_limits<float>::max();
  const __m512d below = _mm512_min_pd(estimate, _mm512_set1_pd(kLargest));
  return _mm512_cvtpd_ps(_mm512_max_pd(below, _mm512_set1_pd(-kLargest)));
}

// The sums of 8 rows in one reduction: two registers are packed into one of 16-bit numbers, whose
// neighbours are added in pairs, so that each level halves the registers and the lanes of a row. No
// number is above 2^15 before the last packing, none above 15 * 4,096 after it.
HWY_INLINE void EstimateOf8(const std::byte* query, const std::byte* const* rows, size_t bits,
                            const RabitqParts& parts, const RabitqQueryFactors& factors,
                            float* out) {
  const __m512i zero = _mm512_setzero_si512();
  __m512i sums[8] = {zero, zero, zero, zero, zero, zero, zero, zero};
  AddWeightedOnes<8>(query, rows, parts, sums);
  const __m512i one = _mm512_set1_epi16(1);
  const auto merge = [one](__m512i a, __m512i b)
                         HWY_ATTR { return _mm512_madd_epi16(_mm512_packus_epi32(a, b), one); };
  const __m512i rows0123 = merge(merge(sums[0], sums[1]), merge(sums[2], sums[3]));
  const __m512i rows4567 = merge(merge(sums[4], sums[5]), merge(sums[6], sums[7]));
  const __m512i all = _mm512_packus_epi32(rows0123, rows4567);
  const __m256i half =
      _mm256_add_epi16(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  const __m128i quarter =
      _mm_add_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m256 estimates =
      EstimatesOf8(_mm256_cvtepu16_epi32(quarter), TransposedFactors(rows, bits), factors);
  _mm256_storeu_ps(out, estimates);
}
#else

#if HWY_TARGET == HWY_SCALAR
// Of one part of `part_bytes`, at `query` and `code`.
HWY_INLINE uint32_t WeightedOnesOfPart(const std::byte* query, const std::byte* code,
                                       size_t part_bytes) {
  size_t sum = 0;
  for (size_t plane = 0; plane < RabitqParts::kPlanes; ++plane) {
    for (size_t at = 0; at < part_bytes; at += sizeof(uint64_t)) {
      uint64_t left = 0;
      uint64_t right = 0;
      std::memcpy(&left, query + plane * part_bytes + at, sizeof(left));
      std::memcpy(&right, code + at, sizeof(right));
      sum += hwy::PopCount(left & right) << plane;
    }
  }
  return static_cast<uint32_t>(sum);
}
HWY_INLINE uint32_t WeightedOnes(const std::byte* query, const std::byte* row,
                                 const RabitqParts& parts) {
  uint32_t sum = 0;
  const auto add = [&](size_t part_bytes) {
    sum += WeightedOnesOfPart(query, row, part_bytes);
    query += RabitqParts::kPlanes * part_bytes;
    row += part_bytes;
  };
  for (size_t line = 0; line < parts.lines; ++line) add(64);
  if (parts.has_half) add(32);
  if (parts.has_quarter) add(16);
  return sum;
}
#else
// Of one part at `query` and `code`, in registers no wider than the part: population counts of
// bytes, weighed as they are added (8 ones by 15 are below 2^8), then summed in 64-bit lanes.
template <size_t kPartBytes, class Sum>
HWY_INLINE Sum AddPart(const std::byte* query, const std::byte* code, Sum sum) {
  const hn::CappedTag < uint8_t, kPartBytes<32 ? kPartBytes : 32> tag;
  const size_t lanes = hn::Lanes(tag);
  const auto* HWY_RESTRICT planes = reinterpret_cast<const uint8_t*>(query);
  const auto* HWY_RESTRICT bytes = reinterpret_cast<const uint8_t*>(code);
  for (size_t at = 0; at < kPartBytes; at += lanes) {
    const auto ones = hn::Load(tag, bytes + at);
    const auto count = [&](size_t plane) HWY_ATTR {
      return hn::PopulationCount(hn::And(ones, hn::Load(tag, planes + plane * kPartBytes + at)));
    };
    auto weighted = count(3);
    weighted = hn::Add(hn::Add(weighted, weighted), count(2));
    weighted = hn::Add(hn::Add(weighted, weighted), count(1));
    weighted = hn::Add(hn::Add(weighted, weighted), count(0));
    sum = hn::Add(sum, hn::SumsOf8(weighted));
  }
  return sum;
}

HWY_INLINE uint32_t WeightedOnes(const std::byte* query, const std::byte* row,
                                 const RabitqParts& parts) {
  const hn::CappedTag<uint64_t, 4> wide;
  const hn::CappedTag<uint64_t, 2> narrow;
  auto sums = hn::Zero(wide);
  for (size_t line = 0; line < parts.lines; ++line) {
    sums = AddPart<64>(query, row, sums);
    query += RabitqParts::kPlanes * 64;
    row += 64;
  }
  if (parts.has_half) {
    sums = AddPart<32>(query, row, sums);
    query += RabitqParts::kPlanes * 32;
    row += 32;
  }
  uint64_t sum = hn::GetLane(hn::SumOfLanes(wide, sums));
  if (parts.has_quarter) {
    sum += hn::GetLane(hn::SumOfLanes(narrow, AddPart<16>(query, row, hn::Zero(narrow))));
  }
  return static_cast<uint32_t>(sum);
}
#endif
#endif

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#endif  // per target
