#include "src/core/vector_dtype.h"

#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/core/vector_dtype.cc"
#include <hwy/foreach_target.h>  // Compiles what follows once per instruction set.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// The exponent field of each format is all ones for NaN and infinity, and the bits without the sign
// are ordered like the magnitude: so an unsigned maximum over (bits & kMagnitude) tells all.
template <typename Word, Word kMagnitude, Word kInfinity>
VectorFinding CopyWords(const std::byte* HWY_RESTRICT from, std::byte* HWY_RESTRICT to,
                        size_t count) {
  const hn::ScalableTag<Word> tag;
  const size_t lanes = hn::Lanes(tag);
  const auto mask = hn::Set(tag, kMagnitude);
  auto max0 = hn::Zero(tag);
  auto max1 = hn::Zero(tag);
  const auto* in = reinterpret_cast<const Word*>(from);
  auto* out = reinterpret_cast<Word*>(to);
  size_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    const auto a = hn::LoadU(tag, in + i);
    const auto b = hn::LoadU(tag, in + i + lanes);
    hn::StoreU(a, tag, out + i);
    hn::StoreU(b, tag, out + i + lanes);
    max0 = hn::Max(max0, hn::And(a, mask));
    max1 = hn::Max(max1, hn::And(b, mask));
  }
  HWY_ALIGN Word largest_of_lane[HWY_MAX_BYTES / sizeof(Word)];
  hn::Store(hn::Max(max0, max1), tag, largest_of_lane);
  Word largest = 0;
  for (size_t lane = 0; lane < lanes; ++lane) {
    largest = largest_of_lane[lane] > largest ? largest_of_lane[lane] : largest;
  }
  for (; i < count; ++i) {
    Word word;
    std::memcpy(&word, from + i * sizeof(Word), sizeof(Word));
    std::memcpy(to + i * sizeof(Word), &word, sizeof(Word));
    word &= kMagnitude;
    largest = word > largest ? word : largest;
  }
  if (largest >= kInfinity) return VectorFinding::kNotFinite;
  return largest == 0 ? VectorFinding::kZero : VectorFinding::kOrdinary;
}

VectorFinding CopyF32(const std::byte* from, std::byte* to, size_t count) {
  return CopyWords<uint32_t, 0x7FFFFFFF, 0x7F800000>(from, to, count);
}
VectorFinding CopyF16(const std::byte* from, std::byte* to, size_t count) {
  return CopyWords<uint16_t, 0x7FFF, 0x7C00>(from, to, count);
}
VectorFinding CopyBf16(const std::byte* from, std::byte* to, size_t count) {
  return CopyWords<uint16_t, 0x7FFF, 0x7F80>(from, to, count);
}

// Runs `convert(from, to, lanes)` over whole vectors, then once over a padded copy of the rest.
template <typename Word, typename Convert>
void DecodeWords(const std::byte* from, size_t count, float* to, const Convert& convert) {
  const hn::ScalableTag<float> tag;
  const size_t lanes = hn::Lanes(tag);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    convert(reinterpret_cast<const Word*>(from) + i, to + i);
  }
  if (i == count) return;
  HWY_ALIGN Word rest[HWY_MAX_BYTES / sizeof(float)] = {};
  HWY_ALIGN float decoded[HWY_MAX_BYTES / sizeof(float)];
  std::memcpy(rest, from + i * sizeof(Word), (count - i) * sizeof(Word));
  convert(rest, decoded);
  std::memcpy(to + i, decoded, (count - i) * sizeof(float));
}

void DecodeF16(const std::byte* from, size_t count, float* to) {
  const hn::ScalableTag<float> tag;
  const hn::Rebind<hwy::float16_t, decltype(tag)> half_tag;
  const hn::Rebind<uint16_t, decltype(tag)> bits_tag;
  DecodeWords<uint16_t>(from, count, to, [&](const uint16_t* in, float* out) {
    const auto half = hn::BitCast(half_tag, hn::LoadU(bits_tag, in));
    hn::StoreU(hn::PromoteTo(tag, half), tag, out);
  });
}

void DecodeBf16(const std::byte* from, size_t count, float* to) {
  const hn::ScalableTag<float> tag;
  const hn::Rebind<uint32_t, decltype(tag)> wide_tag;
  const hn::Rebind<uint16_t, decltype(tag)> bits_tag;
  DecodeWords<uint16_t>(from, count, to, [&](const uint16_t* in, float* out) {
    const auto wide = hn::PromoteTo(wide_tag, hn::LoadU(bits_tag, in));
    hn::StoreU(hn::BitCast(tag, hn::ShiftLeft<16>(wide)), tag, out);
  });
}

void DecodeInt8(const std::byte* from, size_t count, float scale, float* to) {
  const hn::ScalableTag<float> tag;
  const hn::Rebind<int32_t, decltype(tag)> wide_tag;
  const hn::Rebind<int8_t, decltype(tag)> narrow_tag;
  const auto factor = hn::Set(tag, scale);
  DecodeWords<int8_t>(from, count, to, [&](const int8_t* in, float* out) {
    const auto wide = hn::PromoteTo(wide_tag, hn::LoadU(narrow_tag, in));
    hn::StoreU(hn::Mul(hn::ConvertTo(tag, wide), factor), tag, out);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace engram {

HWY_EXPORT(CopyF32);
HWY_EXPORT(CopyF16);
HWY_EXPORT(CopyBf16);
HWY_EXPORT(DecodeF16);
HWY_EXPORT(DecodeBf16);
HWY_EXPORT(DecodeInt8);

std::string_view DtypeName(VectorDtype dtype) {
  switch (dtype) {
    case VectorDtype::kF32:
      return "f32";
    case VectorDtype::kF16:
      return "f16";
    case VectorDtype::kBf16:
      return "bf16";
    case VectorDtype::kInt8:
      return "int8";
    case VectorDtype::kNone:
      break;
  }
  return "none";
}

VectorFinding CopyVector(VectorDtype dtype, uint32_t dimension, const std::byte* from,
                         std::byte* to) {
  switch (dtype) {
    case VectorDtype::kF32:
      return HWY_DYNAMIC_DISPATCH(CopyF32)(from, to, dimension);
    case VectorDtype::kF16:
      return HWY_DYNAMIC_DISPATCH(CopyF16)(from, to, dimension);
    case VectorDtype::kBf16:
      return HWY_DYNAMIC_DISPATCH(CopyBf16)(from, to, dimension);
    case VectorDtype::kInt8: {
      std::memcpy(to, from, dimension);
      for (uint32_t i = 0; i < dimension; ++i) {
        if (from[i] != std::byte{0}) return VectorFinding::kOrdinary;
      }
      return VectorFinding::kZero;
    }
    case VectorDtype::kNone:
      break;
  }
  return VectorFinding::kZero;
}

void DecodeVector(VectorDtype dtype, uint32_t dimension, float scale, const std::byte* from,
                  float* to) {
  switch (dtype) {
    case VectorDtype::kF32:
      std::memcpy(to, from, dimension * sizeof(float));
      return;
    case VectorDtype::kF16:
      HWY_DYNAMIC_DISPATCH(DecodeF16)(from, dimension, to);
      return;
    case VectorDtype::kBf16:
      HWY_DYNAMIC_DISPATCH(DecodeBf16)(from, dimension, to);
      return;
    case VectorDtype::kInt8:
      HWY_DYNAMIC_DISPATCH(DecodeInt8)(from, dimension, scale, to);
      return;
    case VectorDtype::kNone:
      return;
  }
}

}  // namespace engram
#endif  // HWY_ONCE
