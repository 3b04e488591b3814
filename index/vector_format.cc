#include "index/vector_format.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "src/core/check.h"
#include "src/core/vector_dtype.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "index/vector_format.cc"
#include <hwy/foreach_target.h>  // Compiles what follows once per instruction set.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// The largest of the magnitudes; 0 for a zero vector. No alignment needed.
float LargestOfVector(const float* v, size_t count) {
  const hn::ScalableTag<float> tag;
  const size_t lanes = hn::Lanes(tag);
  auto largest_of_lane = hn::Zero(tag);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    largest_of_lane = hn::Max(largest_of_lane, hn::Abs(hn::LoadU(tag, v + i)));
  }
  float largest = hn::GetLane(hn::MaxOfLanes(tag, largest_of_lane));
  for (; i < count; ++i) largest = std::max(largest, std::fabs(v[i]));
  return largest;
}

// Rounds the upper half of a float by its lower half, ties to even. What would round to infinity
// becomes the largest finite number.
constexpr uint32_t kMagnitudeBits = 0x7FFFFFFF;
constexpr uint32_t kLargestBf16 = 0x7F7F;
uint16_t Bf16Of(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & kMagnitudeBits;
  const uint32_t rounded = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(std::min(rounded, kLargestBf16) | (bits >> 31 << 15));
}
void RoundToBf16(const float* v, size_t count, uint16_t* to) {
  const hn::ScalableTag<float> tag;
  const hn::RebindToUnsigned<decltype(tag)> bits_tag;
  const hn::Rebind<uint16_t, decltype(tag)> half_tag;
  const size_t lanes = hn::Lanes(tag);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto bits = hn::BitCast(bits_tag, hn::LoadU(tag, v + i));
    const auto magnitude = hn::And(bits, hn::Set(bits_tag, kMagnitudeBits));
    const auto tie = hn::And(hn::ShiftRight<16>(magnitude), hn::Set(bits_tag, 1U));
    const auto rounded =
        hn::ShiftRight<16>(hn::Add(hn::Add(magnitude, hn::Set(bits_tag, uint32_t{0x7FFF})), tie));
    const auto sign = hn::ShiftLeft<15>(hn::ShiftRight<31>(bits));
    const auto finite = hn::Min(rounded, hn::Set(bits_tag, kLargestBf16));
    hn::StoreU(hn::TruncateTo(half_tag, hn::Or(finite, sign)), half_tag, to + i);
  }
  for (; i < count; ++i) to[i] = Bf16Of(v[i]);
}

// to[i] = v[i] * factor, rounded to the nearest, ties to even; also the sums of these numbers and
// of their squares. Every product is within +-127.5 and `count` is at most 4,096, so both are below
// 2^27.
void QuantiseToInt8(const float* v, size_t count, double factor, int8_t* to, int32_t* sum_of_all,
                    int32_t* sum_of_squares) {
  int32_t total = 0;
  int32_t total_of_squares = 0;
  size_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::CappedTag<double, 8> wide;
  const hn::Rebind<float, decltype(wide)> float_tag;
  const hn::Rebind<int32_t, decltype(wide)> int_tag;
  const hn::Rebind<int8_t, decltype(wide)> narrow;
  const size_t lanes = hn::Lanes(wide);
  const auto factors = hn::Set(wide, factor);
  auto sums = hn::Zero(int_tag);
  auto sums_of_squares = hn::Zero(int_tag);
  for (; i + lanes <= count; i += lanes) {
    const auto scaled = hn::Mul(hn::PromoteTo(wide, hn::LoadU(float_tag, v + i)), factors);
    const auto number = hn::DemoteTo(int_tag, hn::Round(scaled));
    sums = hn::Add(sums, number);
    sums_of_squares = hn::Add(sums_of_squares, hn::Mul(number, number));
    hn::StoreU(hn::DemoteTo(narrow, number), narrow, to + i);
  }
  total = hn::GetLane(hn::SumOfLanes(int_tag, sums));
  total_of_squares = hn::GetLane(hn::SumOfLanes(int_tag, sums_of_squares));
#endif
  for (; i < count; ++i) {
    const auto number = static_cast<int32_t>(std::nearbyint(double{v[i]} * factor));
    total += number;
    total_of_squares += number * number;
    to[i] = static_cast<int8_t>(number);
  }
  *sum_of_all = total;
  *sum_of_squares = total_of_squares;
}

// Calls some(i, v) for registers v of numbers[i..] * scale in double, and one(i, v) for each number
// of the rest.
template <typename Some, typename One>
HWY_INLINE void ForEachScaled(const int8_t* numbers, size_t count, double scale,
                              [[maybe_unused]] const Some& some, const One& one) {
  size_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::CappedTag<double, 8> wide;
  const hn::Rebind<int32_t, decltype(wide)> int_tag;
  const hn::Rebind<int8_t, decltype(wide)> narrow;
  const size_t lanes = hn::Lanes(wide);
  const auto scales = hn::Set(wide, scale);
  for (; i + lanes <= count; i += lanes) {
    const auto number = hn::PromoteTo(wide, hn::PromoteTo(int_tag, hn::LoadU(narrow, numbers + i)));
    some(i, hn::Mul(number, scales));
  }
#endif
  for (; i < count; ++i) one(i, numbers[i] * scale);
}

// to[i] = numbers[i] * scale, rounded once from double.
void ScaleInt8(const int8_t* numbers, size_t count, double scale, float* to) {
  ForEachScaled(
      numbers, count, scale,
      [to](size_t i, auto scaled) HWY_ATTR {
        const hn::Rebind<float, hn::DFromV<decltype(scaled)>> tag;
        hn::StoreU(hn::DemoteTo(tag, scaled), tag, to + i);
      },
      [to](size_t i, double scaled) { to[i] = static_cast<float>(scaled); });
}

// sums[i] += numbers[i] * scale.
void AddScaledInt8(const int8_t* numbers, size_t count, double scale, double* sums) {
  ForEachScaled(
      numbers, count, scale,
      [sums](size_t i, auto scaled) HWY_ATTR {
        const hn::DFromV<decltype(scaled)> tag;
        hn::StoreU(hn::Add(hn::LoadU(tag, sums + i), scaled), tag, sums + i);
      },
      [sums](size_t i, double scaled) { sums[i] += scaled; });
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace engram {

HWY_EXPORT(LargestOfVector);
HWY_EXPORT(RoundToBf16);
HWY_EXPORT(QuantiseToInt8);
HWY_EXPORT(ScaleInt8);
HWY_EXPORT(AddScaledInt8);

namespace {

constexpr double kLargestInt8 = 127;

size_t BytesOfElement(Precision precision) {
  switch (precision) {
    case Precision::kF32:
      return sizeof(float);
    case Precision::kBf16:
      return sizeof(uint16_t);
    case Precision::kInt8:
      return sizeof(int8_t);
    case Precision::kUnspecified:
      break;
  }
  return 0;
}

}  // namespace

VectorFormat::VectorFormat(Precision precision, Metric metric, uint32_t dimension)
    : precision_(precision),
      metric_(metric),
      dimension_(dimension),
      padded_dimension_(PaddedDimension(precision, dimension)),
      row_bytes_(padded_dimension_ * BytesOfElement(precision) +
                 (precision == Precision::kInt8 ? sizeof(Int8Trailer) : 0)),
      distance_(DistanceFunction(precision, metric)),
      distances_(precision == Precision::kInt8 ? Int8DistancesFunction(metric) : nullptr) {
  CHECK(dimension >= 1 && dimension <= kMaxDimension, "dimension is 1 to 4,096");
}

void VectorFormat::Encode(const float* v, std::byte* row) const {
  switch (precision_) {
    case Precision::kF32:
      std::memcpy(row, v, dimension_ * sizeof(float));
      break;
    case Precision::kBf16:
      HWY_DYNAMIC_DISPATCH(RoundToBf16)(v, dimension_, reinterpret_cast<uint16_t*>(row));
      break;
    case Precision::kInt8:
      EncodeInt8(v, row);
      return;
    case Precision::kUnspecified:
      break;
  }
  const size_t written = dimension_ * BytesOfElement(precision_);
  std::memset(row + written, 0, row_bytes_ - written);
}

void VectorFormat::EncodeInt8(const float* v, std::byte* row) const {
  std::memset(row + dimension_, 0, row_bytes_ - dimension_);
  const double largest = double{HWY_DYNAMIC_DISPATCH(LargestOfVector)(v, dimension_)};
  if (largest == 0) {
    std::memset(row, 0, dimension_);
    return;
  }
  // Exact enough that the largest number becomes 127, never 128: both quotients are far inside
  // double's range even for the smallest and the largest float.
  Int8Trailer trailer = {};
  const auto quantise = HWY_DYNAMIC_DISPATCH(QuantiseToInt8);
  quantise(v, dimension_, kLargestInt8 / largest, reinterpret_cast<int8_t*>(row), &trailer.sum,
           &trailer.squares);
  trailer.scale =
      metric_ == Metric::kCosine ? 1 / std::sqrt(trailer.squares) : largest / kLargestInt8;
  std::memcpy(row + padded_dimension_, &trailer, sizeof(trailer));
}

void VectorFormat::Decode(const std::byte* row, float* v) const {
  switch (precision_) {
    case Precision::kF32:
      std::memcpy(v, row, dimension_ * sizeof(float));
      return;
    case Precision::kBf16:
      DecodeVector(VectorDtype::kBf16, dimension_, 1.0F, row, v);
      return;
    case Precision::kInt8: {
      Int8Trailer trailer;
      std::memcpy(&trailer, row + padded_dimension_, sizeof(trailer));
      HWY_DYNAMIC_DISPATCH(ScaleInt8)
      (reinterpret_cast<const int8_t*>(row), dimension_, trailer.scale, v);
      return;
    }
    case Precision::kUnspecified:
      break;
  }
}

void VectorFormat::AddDecoded(const std::byte* row, double* sums) const {
  Int8Trailer trailer;
  std::memcpy(&trailer, row + padded_dimension_, sizeof(trailer));
  HWY_DYNAMIC_DISPATCH(AddScaledInt8)
  (reinterpret_cast<const int8_t*>(row), dimension_, trailer.scale, sums);
}

}  // namespace engram
#endif  // HWY_ONCE
