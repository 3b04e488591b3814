// For the kernel by VPOPCNT and VPDPBUSD; before any header of Highway.
#define HWY_WANT_AVX3_DL

#include "index/rabitq_format.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>

#include "src/core/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "index/rabitq_format.cc"
#include <hwy/foreach_target.h>  // Compiles what follows once per instruction set.
#include <hwy/highway.h>

#include "index/rabitq_format-inl.h"

HWY_BEFORE_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

float RabitqLargestMagnitude(const float* v, size_t count) { return LargestOf(v, count); }
ResidualSums RabitqScaleResidual(const float* v, const float* centroid, size_t count, size_t padded,
                                 float scale, float* to) {
  return ScaledResidual(v, centroid, count, padded, scale, to);
}
SignSums RabitqEncodeSigns(const float* r, size_t count, uint8_t* code) {
  return CodeOf(r, count, code);
}

// Four planes of bits / 8 bytes behind one another, and low, step and the sum of s as quantised.
QuantisedQuery RabitqQuantisePlanes(const float* s, size_t bits, uint8_t* planes) {
  HWY_ALIGN uint8_t numbers[kMaxDimension];
  const Range range = RangeOf(s, bits);
  const float width = range.high - range.low;
  const float step = width / kLargestUnsigned;
  const float factor = width > kSmallestWidth ? kLargestUnsigned / width : 0;
  const uint32_t sum = QuantiseUnsigned(s, bits, range.low, factor, numbers);
  for (int plane = 0; plane < static_cast<int>(RabitqParts::kPlanes); ++plane) {
    PlaneOf(numbers, bits, plane, planes + static_cast<size_t>(plane) * bits / 8);
  }
  return {range.low, step, double{range.low} * static_cast<double>(bits) + double{step} * sum};
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

ENGRAM_BEFORE_INT8_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

HWY_INLINE RabitqQueryFactors FactorsOfQuery(const std::byte* query) {
  RabitqQueryFactors factors;
  std::memcpy(&factors, query, sizeof(factors));
  return factors;
}
HWY_INLINE const std::byte* PlanesOfQuery(const std::byte* query) {
  return query + sizeof(RabitqQueryFactors);
}

float RabitqEstimate(const std::byte* query, const std::byte* row, size_t bits) {
  const RabitqParts parts(bits);
  return EstimateOf(WeightedOnes(PlanesOfQuery(query), row, parts), FactorsOf(row, bits),
                    FactorsOfQuery(query));
}

void RabitqEstimates(const std::byte* query, const std::byte* const* rows, size_t count,
                     size_t bits, float* out) {
  const RabitqParts parts(bits);
  const RabitqQueryFactors factors = FactorsOfQuery(query);
  const std::byte* const planes = PlanesOfQuery(query);
  size_t i = 0;
#if HWY_TARGET == HWY_AVX3_DL
  for (; i + 8 <= count; i += 8) EstimateOf8(planes, rows + i, bits, parts, factors, out + i);
  // Three rows by themselves cost as much as eight.
  if (count - i >= 3) {
    const std::byte* some[8];
    float estimates[8];
    for (size_t r = 0; r < 8; ++r) some[r] = rows[std::min(i + r, count - 1)];
    EstimateOf8(planes, some, bits, parts, factors, estimates);
    std::copy_n(estimates, count - i, out + i);
    return;
  }
#endif
  for (; i < count; ++i) {
    out[i] = EstimateOf(WeightedOnes(planes, rows[i], parts), FactorsOf(rows[i], bits), factors);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace engram {

HWY_EXPORT(RabitqLargestMagnitude);
HWY_EXPORT(RabitqScaleResidual);
HWY_EXPORT(RabitqEncodeSigns);
HWY_EXPORT(RabitqQuantisePlanes);
HWY_EXPORT(RabitqEstimate);
HWY_EXPORT(RabitqEstimates);

namespace {

float Clamped(double value) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  return static_cast<float>(std::clamp(value, -kLargest, kLargest));
}

size_t BytesOfRow(size_t bits) { return (bits / 8 + sizeof(RabitqRowFactors) + 63) & ~size_t{63}; }

size_t BytesOfFormat(size_t bits) { return sizeof(RabitqFormat) + bits * sizeof(float); }

}  // namespace

// A vector's residual, rotated, in units of `unit`: so scaled that the largest of the vector's and
// the centroid's numbers is 1 to 2, as far as a float's exponent allows. Sums of squares then
// neither overflow nor vanish, and as the scale is a power of two, nothing is rounded.
struct RabitqFormat::Residual {
  alignas(64) float values[kMaxDimension];  // aligned for whole registers
  double unit;
  double squared_norm;  // |r|^2
  double by_centroid;   // <x - c, c>
};

RabitqFormat::RabitqFormat(Metric metric, uint32_t dimension, uint64_t seed, float* centroid)
    : rotation_(dimension, seed),
      metric_(metric),
      bits_(rotation_.rotated_dimension()),
      row_bytes_(BytesOfRow(bits_)),
      query_bytes_(RabitqParts::kPlanes * RabitqParts(bits_).plane_bytes() +
                   sizeof(RabitqQueryFactors)),
      centroid_(centroid) {
  largest_of_centroid_ = HWY_DYNAMIC_DISPATCH(RabitqLargestMagnitude)(centroid_, dimension);
  squared_norm_of_centroid_ = 0;
  for (uint32_t i = 0; i < dimension; ++i) {
    squared_norm_of_centroid_ += double{centroid_[i]} * double{centroid_[i]};
  }
  // Without this the table's first entry would choose the target anew on every call.
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  distance_ = &HWY_DYNAMIC_DISPATCH(RabitqEstimate);
  distances_ = &HWY_DYNAMIC_DISPATCH(RabitqEstimates);
}

RabitqFormat* RabitqFormat::Create(Metric metric, uint32_t dimension, const float* centroid,
                                   uint64_t seed, ArenaHeap* heap) {
  CHECK(metric != Metric::kUnspecified, "a space has a metric");
  static_assert(sizeof(RabitqFormat) % 64 == 0, "so that the centroid behind it is aligned");
  const size_t bits = RandomRotation::RotatedDimension(dimension);
  std::byte* const block = heap->Allocate(BytesOfFormat(bits));
  if (block == nullptr) return nullptr;
  auto* const own_centroid = reinterpret_cast<float*>(block + sizeof(RabitqFormat));
  std::memcpy(own_centroid, centroid, dimension * sizeof(float));
  std::memset(own_centroid + dimension, 0, (bits - dimension) * sizeof(float));
  return new (block) RabitqFormat(metric, dimension, seed, own_centroid);
}

size_t RabitqFormat::heap_bytes() const { return ArenaHeap::BlockBytes(BytesOfFormat(bits_)); }

void RabitqFormat::Destroy(RabitqFormat* format, ArenaHeap* heap) {
  if (format == nullptr) return;
  const size_t bytes = BytesOfFormat(format->bits());
  format->~RabitqFormat();
  heap->Free(reinterpret_cast<std::byte*>(format), bytes);
}

void RabitqFormat::TakeResidual(const float* v, Residual* residual) const {
  const float largest =
      std::max(HWY_DYNAMIC_DISPATCH(RabitqLargestMagnitude)(v, dimension()), largest_of_centroid_);
  const int exponent = largest > 0 ? std::clamp(std::ilogb(largest), -126, 126) : 0;
  const auto sums = HWY_DYNAMIC_DISPATCH(RabitqScaleResidual)(
      v, centroid_, dimension(), bits_, std::ldexp(1.0F, -exponent), residual->values);
  rotation_.RotateInPlace(residual->values);
  residual->unit = std::ldexp(1.0, exponent);
  residual->squared_norm = double{sums.squares} * residual->unit * residual->unit;
  residual->by_centroid = double{sums.by_centroid} * residual->unit * residual->unit;
}

void RabitqFormat::WriteRow(const Residual& residual, std::byte* row) const {
  const size_t code_bytes = bits_ / 8;
  const auto sums = HWY_DYNAMIC_DISPATCH(RabitqEncodeSigns)(residual.values, bits_,
                                                            reinterpret_cast<uint8_t*>(row));
  const double magnitudes = double{sums.magnitudes} * residual.unit;
  const double slope = magnitudes > 0 ? residual.squared_norm / magnitudes : 0;
  RabitqRowFactors factors = {};
  factors.ones = static_cast<float>(sums.ones);
  switch (metric_) {
    case Metric::kL2:
      factors.A = Clamped(residual.squared_norm);
      factors.F = Clamped(-2 * slope);
      break;
    case Metric::kCosine:
      factors.A = Clamped(residual.squared_norm / 2);
      factors.F = Clamped(-slope);
      break;
    case Metric::kInnerProduct:
      factors.A = Clamped(-residual.by_centroid);
      factors.F = Clamped(-slope);
      break;
    case Metric::kUnspecified:
      break;
  }
  std::memcpy(row + code_bytes, &factors, sizeof(factors));
  const size_t written = code_bytes + sizeof(factors);
  std::memset(row + written, 0, row_bytes_ - written);
}

float RabitqFormat::OffsetOf(const Residual& residual) const {
  switch (metric_) {
    case Metric::kL2:
      return Clamped(residual.squared_norm);
    case Metric::kCosine:
      return Clamped(residual.squared_norm / 2);
    case Metric::kInnerProduct:
      return Clamped(-residual.by_centroid - squared_norm_of_centroid_);
    case Metric::kUnspecified:
      break;
  }
  return 0;
}

void RabitqFormat::Encode(const float* v, std::byte* row) const {
  Residual residual;
  TakeResidual(v, &residual);
  WriteRow(residual, row);
}

void RabitqFormat::EncodeQuery(const float* v, std::byte* query) const {
  Residual residual;
  TakeResidual(v, &residual);
  uint8_t planes[RabitqParts::kPlanes * kMaxDimension / 8];
  const QuantisedQuery quantised =
      HWY_DYNAMIC_DISPATCH(RabitqQuantisePlanes)(residual.values, bits_, planes);
  const RabitqParts parts(bits_);
  const size_t code_bytes = bits_ / 8;
  std::byte* to = query + sizeof(RabitqQueryFactors);
  size_t from = 0;
  // Of the last part only what the code has is written, the rest is zero.
  const auto write = [&](size_t part_bytes) {
    const size_t taken = std::min(part_bytes, code_bytes - from);
    for (size_t plane = 0; plane < RabitqParts::kPlanes; ++plane, to += part_bytes) {
      std::memcpy(to, planes + plane * code_bytes + from, taken);
      std::memset(to + taken, 0, part_bytes - taken);
    }
    from += taken;
  };
  for (size_t line = 0; line < parts.lines; ++line) write(64);
  if (parts.has_half) write(32);
  if (parts.has_quarter) write(16);
  RabitqQueryFactors factors = {};
  factors.doubled_step = 2 * double{quantised.step} * residual.unit;
  factors.doubled_low = 2 * double{quantised.low} * residual.unit;
  factors.base = -quantised.sum * residual.unit;
  factors.offset = OffsetOf(residual);
  std::memcpy(query, &factors, sizeof(factors));
}

float RabitqFormat::SquaredResidual(const float* v) const {
  // Several sums, so that the compiler may take them side by side.
  constexpr size_t kSums = 16;
  std::array<float, kSums> sums{};
  const size_t count = dimension();
  size_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (size_t j = 0; j < kSums; ++j) {
      const float residual = v[i + j] - centroid_[i + j];
      sums[j] += residual * residual;
    }
  }
  for (; i < count; ++i) sums[0] += (v[i] - centroid_[i]) * (v[i] - centroid_[i]);
  return std::accumulate(sums.begin(), sums.end(), 0.0F);
}

}  // namespace engram
#endif  // HWY_ONCE
