// Distance kernels, compiled once per instruction set: included by distance.cc only.

#if defined(ENGRAM_INDEX_DISTANCE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ENGRAM_INDEX_DISTANCE_INL_H_
#undef ENGRAM_INDEX_DISTANCE_INL_H_
#else
#define ENGRAM_INDEX_DISTANCE_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "index/distance.h"
#include "index/int8_product-inl.h"

HWY_BEFORE_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// At most one row's alignment unit in a register, so that a row is a whole number of registers.
using FloatTag = hn::CappedTag<float, 16>;
using Floats = hn::Vec<FloatTag>;

// What a pair of registers adds to the sum.
struct Product {
  HWY_INLINE Floats operator()(Floats a, Floats b, Floats sum) const {
    return hn::MulAdd(a, b, sum);
  }
};
struct SquaredDifference {
  HWY_INLINE Floats operator()(Floats a, Floats b, Floats sum) const {
    const Floats difference = hn::Sub(a, b);
    return hn::MulAdd(difference, difference, sum);
  }
};

// Both sums take four registers, so that one addition need not wait for the last.

// Of two f32 rows; `count` is a multiple of 16.
template <typename Term>
HWY_INLINE float SumOfF32(const std::byte* a_row, const std::byte* b_row, size_t count) {
  const FloatTag tag;
  const Term term;
  const size_t lanes = hn::Lanes(tag);
  const auto* HWY_RESTRICT a = reinterpret_cast<const float*>(a_row);
  const auto* HWY_RESTRICT b = reinterpret_cast<const float*>(b_row);
  Floats sum0 = hn::Zero(tag);
  Floats sum1 = hn::Zero(tag);
  Floats sum2 = hn::Zero(tag);
  Floats sum3 = hn::Zero(tag);
  size_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    sum0 = term(hn::Load(tag, a + i), hn::Load(tag, b + i), sum0);
    sum1 = term(hn::Load(tag, a + i + lanes), hn::Load(tag, b + i + lanes), sum1);
    sum2 = term(hn::Load(tag, a + i + 2 * lanes), hn::Load(tag, b + i + 2 * lanes), sum2);
    sum3 = term(hn::Load(tag, a + i + 3 * lanes), hn::Load(tag, b + i + 3 * lanes), sum3);
  }
  for (; i < count; i += lanes) sum0 = term(hn::Load(tag, a + i), hn::Load(tag, b + i), sum0);
  return hn::GetLane(hn::SumOfLanes(tag, hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3))));
}

// A bf16 number is the upper half of a float, so a register of 32-bit pairs gives the odd numbers
// by a mask and the even ones by a shift.
using PairTag = hn::RebindToUnsigned<FloatTag>;
using Pairs = hn::Vec<PairTag>;
HWY_INLINE Floats EvenOf(Pairs pairs) { return hn::BitCast(FloatTag(), hn::ShiftLeft<16>(pairs)); }
HWY_INLINE Floats OddOf(Pairs pairs) {
  return hn::BitCast(FloatTag(), hn::And(pairs, hn::Set(PairTag(), 0xFFFF0000U)));
}

// Of two bf16 rows; `count` is a multiple of 32.
template <typename Term>
HWY_INLINE float SumOfBf16(const std::byte* a_row, const std::byte* b_row, size_t count) {
  const FloatTag tag;
  const PairTag pair_tag;
  const Term term;
  const size_t lanes = hn::Lanes(tag);
  const auto* HWY_RESTRICT a = reinterpret_cast<const uint32_t*>(a_row);
  const auto* HWY_RESTRICT b = reinterpret_cast<const uint32_t*>(b_row);
  const size_t pairs = count / 2;
  Floats sum0 = hn::Zero(tag);
  Floats sum1 = hn::Zero(tag);
  Floats sum2 = hn::Zero(tag);
  Floats sum3 = hn::Zero(tag);
  size_t i = 0;
  for (; i + 2 * lanes <= pairs; i += 2 * lanes) {
    const Pairs a0 = hn::Load(pair_tag, a + i);
    const Pairs b0 = hn::Load(pair_tag, b + i);
    const Pairs a1 = hn::Load(pair_tag, a + i + lanes);
    const Pairs b1 = hn::Load(pair_tag, b + i + lanes);
    sum0 = term(EvenOf(a0), EvenOf(b0), sum0);
    sum1 = term(OddOf(a0), OddOf(b0), sum1);
    sum2 = term(EvenOf(a1), EvenOf(b1), sum2);
    sum3 = term(OddOf(a1), OddOf(b1), sum3);
  }
  for (; i < pairs; i += lanes) {
    const Pairs a0 = hn::Load(pair_tag, a + i);
    const Pairs b0 = hn::Load(pair_tag, b + i);
    sum0 = term(EvenOf(a0), EvenOf(b0), sum0);
    sum1 = term(OddOf(a0), OddOf(b0), sum1);
  }
  return hn::GetLane(hn::SumOfLanes(tag, hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3))));
}

// In double, so that neither tiny nor huge values leave the range. No alignment needed.
HWY_INLINE double SumOfSquaresInDouble(const float* HWY_RESTRICT v, size_t count) {
  double sum = 0;
  size_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::CappedTag<double, 8> wide;
  const hn::Rebind<float, decltype(wide)> narrow;
  const size_t lanes = hn::Lanes(wide);
  auto sum0 = hn::Zero(wide);
  auto sum1 = hn::Zero(wide);
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    const auto value0 = hn::PromoteTo(wide, hn::LoadU(narrow, v + i));
    const auto value1 = hn::PromoteTo(wide, hn::LoadU(narrow, v + i + lanes));
    sum0 = hn::MulAdd(value0, value0, sum0);
    sum1 = hn::MulAdd(value1, value1, sum1);
  }
  sum = hn::GetLane(hn::SumOfLanes(wide, hn::Add(sum0, sum1)));
#endif
  for (; i < count; ++i) sum += double{v[i]} * double{v[i]};
  return sum;
}

// v[i] * factor, rounded once from double.
HWY_INLINE void ScaleInDouble(float* v, size_t count, double factor) {
  size_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::CappedTag<double, 8> wide;
  const hn::Rebind<float, decltype(wide)> narrow;
  const size_t lanes = hn::Lanes(wide);
  const auto factors = hn::Set(wide, factor);
  for (; i + lanes <= count; i += lanes) {
    const auto value = hn::PromoteTo(wide, hn::LoadU(narrow, v + i));
    hn::StoreU(hn::DemoteTo(narrow, hn::Mul(value, factors)), narrow, v + i);
  }
#endif
  for (; i < count; ++i) v[i] = static_cast<float>(double{v[i]} * factor);
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

// Highway asks the machine for AVX512_VNNI before it chooses AVX3_DL, but does not allow it to the
// compiler.
#undef ENGRAM_BEFORE_INT8_NAMESPACE
#if HWY_TARGET == HWY_AVX3_DL
#define ENGRAM_BEFORE_INT8_NAMESPACE()              \
  HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512vnni") \
  static_assert(true, "For requiring trailing semicolon")
#else
#define ENGRAM_BEFORE_INT8_NAMESPACE() HWY_BEFORE_NAMESPACE()
#endif

ENGRAM_BEFORE_INT8_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

HWY_INLINE Int8Trailer TrailerOf(const std::byte* row, size_t padded_dimension) {
  Int8Trailer trailer;
  std::memcpy(&trailer, row + padded_dimension, sizeof(trailer));
  return trailer;
}
// Rounded by itself: where it is added to another one the compiler may else round the sum alone,
// and which of two rows comes first would matter.
HWY_INLINE double SquaredNormOf(const Int8Trailer& trailer) {
  double norm = trailer.squared_norm();
  __asm__("" : "+m"(norm));
  return norm;
}

// The exact inner product of two int8 rows; `count` is a multiple of 64 and at most 4,096, which
// keeps every sum below 2^27.
#if HWY_TARGET == HWY_AVX3_DL
// VPDPBUSD multiplies unsigned by signed, four products a lane, and does not saturate. So `a` is
// taken as a + 128, which is what flipping its top bit makes of it, and 128 * sum(b) is too much.
HWY_INLINE __m512i AddProducts(const std::byte* a, const std::byte* b, __m512i sum) {
  const __m512i raised = _mm512_xor_si512(_mm512_loadu_si512(a), _mm512_set1_epi8(-128));
  return _mm512_dpbusd_epi32(sum, raised, _mm512_loadu_si512(b));
}
HWY_INLINE int32_t DotOfInt8(const std::byte* a, const std::byte* b, size_t count) {
  __m512i sum0 = _mm512_setzero_si512();
  __m512i sum1 = _mm512_setzero_si512();
  __m512i sum2 = _mm512_setzero_si512();
  __m512i sum3 = _mm512_setzero_si512();
  size_t i = 0;
  for (; i + 256 <= count; i += 256) {
    sum0 = AddProducts(a + i, b + i, sum0);
    sum1 = AddProducts(a + i + 64, b + i + 64, sum1);
    sum2 = AddProducts(a + i + 128, b + i + 128, sum2);
    sum3 = AddProducts(a + i + 192, b + i + 192, sum3);
  }
  for (; i < count; i += 64) sum0 = AddProducts(a + i, b + i, sum0);
  const __m512i sums = _mm512_add_epi32(_mm512_add_epi32(sum0, sum1), _mm512_add_epi32(sum2, sum3));
  return _mm512_reduce_add_epi32(sums) - 128 * TrailerOf(b, count).sum;
}
// The same of one row and four: the query's numbers are loaded once, and the four sums are one
// reduction.
HWY_INLINE void DotsOfFour(const std::byte* query, const std::byte* const* rows, size_t count,
                           int32_t* out) {
  __m512i sum0 = _mm512_setzero_si512();
  __m512i sum1 = _mm512_setzero_si512();
  __m512i sum2 = _mm512_setzero_si512();
  __m512i sum3 = _mm512_setzero_si512();
  for (size_t i = 0; i < count; i += 64) {
    const __m512i raised = _mm512_xor_si512(_mm512_loadu_si512(query + i), _mm512_set1_epi8(-128));
    sum0 = _mm512_dpbusd_epi32(sum0, raised, _mm512_loadu_si512(rows[0] + i));
    sum1 = _mm512_dpbusd_epi32(sum1, raised, _mm512_loadu_si512(rows[1] + i));
    sum2 = _mm512_dpbusd_epi32(sum2, raised, _mm512_loadu_si512(rows[2] + i));
    sum3 = _mm512_dpbusd_epi32(sum3, raised, _mm512_loadu_si512(rows[3] + i));
  }
  const __m512i sum01 =
      _mm512_add_epi32(_mm512_unpacklo_epi32(sum0, sum1), _mm512_unpackhi_epi32(sum0, sum1));
  const __m512i sum23 =
      _mm512_add_epi32(_mm512_unpacklo_epi32(sum2, sum3), _mm512_unpackhi_epi32(sum2, sum3));
  const __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(sum01, sum23), _mm512_unpackhi_epi64(sum01, sum23));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  const __m128i quarter =
      _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), quarter);
  for (size_t r = 0; r < 4; ++r) out[r] -= 128 * TrailerOf(rows[r], count).sum;
}
#else
HWY_INLINE int32_t DotOfInt8(const std::byte* a, const std::byte* b, size_t count) {
  return Int8Product(reinterpret_cast<const int8_t*>(a), reinterpret_cast<const int8_t*>(b), count);
}
HWY_INLINE void DotsOfFour(const std::byte* query, const std::byte* const* rows, size_t count,
                           int32_t* out) {
  for (size_t r = 0; r < 4; ++r) out[r] = DotOfInt8(query, rows[r], count);
}
#endif

HWY_INLINE float ClampToFloat(double value) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  return static_cast<float>(std::clamp(value, -kLargest, kLargest));
}

// Distances, given the inner product of the int8 numbers.
struct CosineOfDot {
  HWY_INLINE float operator()(const Int8Trailer& a, const Int8Trailer& b, int32_t dot) const {
    return static_cast<float>(1.0 - a.scale * b.scale * dot);
  }
};
struct InnerProductOfDot {
  HWY_INLINE float operator()(const Int8Trailer& a, const Int8Trailer& b, int32_t dot) const {
    return ClampToFloat(-(a.scale * b.scale * dot));
  }
};
struct L2OfDot {
  HWY_INLINE float operator()(const Int8Trailer& a, const Int8Trailer& b, int32_t dot) const {
    const double norms = SquaredNormOf(a) + SquaredNormOf(b);
    return ClampToFloat(std::max(0.0, norms - 2 * (a.scale * b.scale * dot)));
  }
};

template <class OfDot>
HWY_INLINE float DistanceOfInt8(const std::byte* a, const std::byte* b, size_t count) {
  return OfDot()(TrailerOf(a, count), TrailerOf(b, count), DotOfInt8(a, b, count));
}

template <class OfDot>
HWY_INLINE void DistancesOfInt8(const std::byte* query, const std::byte* const* rows,
                                size_t row_count, size_t count, float* out) {
  const Int8Trailer trailer = TrailerOf(query, count);
  size_t r = 0;
  for (; r + 4 <= row_count; r += 4) {
    int32_t dots[4];
    DotsOfFour(query, rows + r, count, dots);
    for (size_t i = 0; i < 4; ++i) {
      out[r + i] = OfDot()(trailer, TrailerOf(rows[r + i], count), dots[i]);
    }
  }
  for (; r < row_count; ++r) out[r] = DistanceOfInt8<OfDot>(query, rows[r], count);
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#endif  // per target
