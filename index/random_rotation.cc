// As in index/rabitq_format.cc, so that both have the same targets; before any header of Highway.
#define HWY_WANT_AVX3_DL

#include "index/random_rotation.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numbers>

#include "src/core/check.h"
#include "src/core/hash.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "index/random_rotation.cc"
#include <hwy/foreach_target.h>  // Compiles what follows once per instruction set.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

namespace {

// A group of 16 floats is a whole number of registers.
using FloatTag = hn::CappedTag<float, 16>;
using Floats = hn::Vec<FloatTag>;
constexpr size_t kGroup = 16;
constexpr size_t kGroupsOfWord = 32;

// `signs`: laid out as RandomRotation has them. `count` is a multiple of 16.
void FlipSigns(float* HWY_RESTRICT x, size_t count, const uint32_t* HWY_RESTRICT signs) {
  const FloatTag tag;
  const hn::RebindToUnsigned<FloatTag> bits_tag;
  const size_t lanes = hn::Lanes(tag);
  const auto sign_bit = hn::Set(bits_tag, 0x80000000U);
  for (size_t start = 0; start < count; start += kGroup * kGroupsOfWord, signs += kGroup) {
    const size_t end = std::min(count, start + kGroup * kGroupsOfWord);
    for (size_t lane = 0; lane < kGroup; lane += lanes) {
      auto word = hn::Load(bits_tag, signs + lane);
      for (size_t i = start + lane; i < end; i += kGroup) {
        const auto sign = hn::BitCast(tag, hn::And(word, sign_bit));
        hn::Store(hn::Xor(hn::Load(tag, x + i), sign), tag, x + i);
        word = hn::Add(word, word);
      }
    }
  }
}

#if HWY_TARGET == HWY_SCALAR
void TransformGroups(float* x, size_t count, float scale) {
  for (size_t i = 0; i < count; ++i) x[i] *= scale;
  for (size_t stride = 1; stride < kGroup; stride *= 2) {
    for (size_t i = 0; i < count; ++i) {
      if ((i & stride) != 0) continue;
      const float a = x[i];
      const float b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
}
#else
// Sums in the lanes where `sign` is 0, differences where it is the sign bit.
HWY_INLINE Floats Butterfly(Floats v, Floats swapped, Floats sign) {
  return hn::Add(swapped, hn::Xor(v, sign));
}

// Scales, then transforms each 16 neighbouring floats, by strides 1, 2, 4 and 8 on every
// instruction set, whether the partners lie in one register or in two.
void TransformGroups(float* HWY_RESTRICT x, size_t count, float scale) {
  const FloatTag tag;
  const size_t lanes = hn::Lanes(tag);
  HWY_ALIGN static constexpr float kSign1[kGroup] = {0, -0.0F, 0, -0.0F, 0, -0.0F, 0, -0.0F,
                                                     0, -0.0F, 0, -0.0F, 0, -0.0F, 0, -0.0F};
  HWY_ALIGN static constexpr float kSign2[kGroup] = {0, 0, -0.0F, -0.0F, 0, 0, -0.0F, -0.0F,
                                                     0, 0, -0.0F, -0.0F, 0, 0, -0.0F, -0.0F};
  HWY_ALIGN static constexpr float kSign4[kGroup] = {0, 0, 0, 0, -0.0F, -0.0F, -0.0F, -0.0F,
                                                     0, 0, 0, 0, -0.0F, -0.0F, -0.0F, -0.0F};
  HWY_ALIGN static constexpr float kSign8[kGroup] = {
      0, 0, 0, 0, 0, 0, 0, 0, -0.0F, -0.0F, -0.0F, -0.0F, -0.0F, -0.0F, -0.0F, -0.0F};
  const Floats sign1 = hn::Load(tag, kSign1);
  const Floats sign2 = hn::Load(tag, kSign2);
  const Floats factor = hn::Set(tag, scale);
  const auto of_four = [&](const float* at) HWY_ATTR {
    Floats v = hn::Mul(hn::Load(tag, at), factor);
    v = Butterfly(v, hn::Shuffle2301(v), sign1);
    return Butterfly(v, hn::Shuffle1032(v), sign2);
  };
  if (lanes == 16) {
    const Floats sign4 = hn::Load(tag, kSign4);
    const Floats sign8 = hn::Load(tag, kSign8);
    for (size_t i = 0; i < count; i += kGroup) {
      Floats v = of_four(x + i);
      v = Butterfly(v, hn::SwapAdjacentBlocks(v), sign4);
      v = Butterfly(v, hn::ConcatLowerUpper(tag, v, v), sign8);
      hn::Store(v, tag, x + i);
    }
  } else if (lanes == 8) {
    const Floats sign4 = hn::Load(tag, kSign4);
    for (size_t i = 0; i < count; i += kGroup) {
      Floats a = of_four(x + i);
      Floats b = of_four(x + i + 8);
      a = Butterfly(a, hn::SwapAdjacentBlocks(a), sign4);
      b = Butterfly(b, hn::SwapAdjacentBlocks(b), sign4);
      hn::Store(hn::Add(a, b), tag, x + i);
      hn::Store(hn::Sub(a, b), tag, x + i + 8);
    }
  } else {
    for (size_t i = 0; i < count; i += kGroup) {
      const Floats a = of_four(x + i);
      const Floats b = of_four(x + i + 4);
      const Floats c = of_four(x + i + 8);
      const Floats d = of_four(x + i + 12);
      const Floats ab = hn::Add(a, b);
      const Floats cd = hn::Add(c, d);
      const Floats a_b = hn::Sub(a, b);
      const Floats c_d = hn::Sub(c, d);
      hn::Store(hn::Add(ab, cd), tag, x + i);
      hn::Store(hn::Add(a_b, c_d), tag, x + i + 4);
      hn::Store(hn::Sub(ab, cd), tag, x + i + 8);
      hn::Store(hn::Sub(a_b, c_d), tag, x + i + 12);
    }
  }
}
#endif

// The Walsh-Hadamard transform of scale * x; `count` is a power of two from 64 on.
void Transform(float* HWY_RESTRICT x, size_t count, float scale) {
  const FloatTag tag;
  const size_t lanes = hn::Lanes(tag);
  TransformGroups(x, count, scale);
  size_t stride = kGroup;
  // Two strides at a time, which halves the passes over memory.
  for (; stride * 4 <= count; stride *= 4) {
    for (size_t start = 0; start < count; start += 4 * stride) {
      for (size_t i = start; i < start + stride; i += lanes) {
        const Floats a = hn::Load(tag, x + i);
        const Floats b = hn::Load(tag, x + i + stride);
        const Floats c = hn::Load(tag, x + i + 2 * stride);
        const Floats d = hn::Load(tag, x + i + 3 * stride);
        const Floats ab = hn::Add(a, b);
        const Floats cd = hn::Add(c, d);
        const Floats a_b = hn::Sub(a, b);
        const Floats c_d = hn::Sub(c, d);
        hn::Store(hn::Add(ab, cd), tag, x + i);
        hn::Store(hn::Add(a_b, c_d), tag, x + i + stride);
        hn::Store(hn::Sub(ab, cd), tag, x + i + 2 * stride);
        hn::Store(hn::Sub(a_b, c_d), tag, x + i + 3 * stride);
      }
    }
  }
  if (stride == count) return;
  for (size_t i = 0; i < stride; i += lanes) {
    const Floats a = hn::Load(tag, x + i);
    const Floats b = hn::Load(tag, x + i + stride);
    hn::Store(hn::Add(a, b), tag, x + i);
    hn::Store(hn::Sub(a, b), tag, x + i + stride);
  }
}

// Each pair (i, i + count / 2) becomes its sum and its difference, as long as it was.
void Pair(float* HWY_RESTRICT x, size_t count) {
  const FloatTag tag;
  const size_t lanes = hn::Lanes(tag);
  const size_t half = count / 2;
  const Floats factor = hn::Set(tag, std::numbers::sqrt2_v<float> / 2);
  for (size_t i = 0; i < half; i += lanes) {
    const Floats a = hn::Load(tag, x + i);
    const Floats b = hn::Load(tag, x + i + half);
    hn::Store(hn::Mul(hn::Add(a, b), factor), tag, x + i);
    hn::Store(hn::Mul(hn::Sub(a, b), factor), tag, x + i + half);
  }
}

}  // namespace

// See the class for the steps. `signs`: `sign_words` words for each of four rounds and two
// pairings; `scale`: 1 / sqrt(transformed).
void RotateByRounds(float* HWY_RESTRICT x, size_t count, size_t transformed, const uint32_t* signs,
                    size_t sign_words, float scale) {
  for (int half = 0; half < 2; ++half) {
    FlipSigns(x, count, signs);
    Transform(x, transformed, scale);
    FlipSigns(x, count, signs + sign_words);
    Transform(x + (count - transformed), transformed, scale);
    if (transformed < count) {
      FlipSigns(x + count / 2, count / 2, signs + 2 * sign_words);
      Pair(x, count);
    }
    signs += 3 * sign_words;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace engram {

HWY_EXPORT(RotateByRounds);

RandomRotation::RandomRotation(uint32_t dimension, uint64_t seed)
    : dimension_(dimension),
      rotated_dimension_(RotatedDimension(dimension)),
      transformed_(std::bit_floor(rotated_dimension_)),
      scale_(static_cast<float>(1 / std::sqrt(static_cast<double>(transformed_)))) {
  CHECK(dimension >= 1 && dimension <= kMaxDimension, "dimension is 1 to 4,096");
  SplitMix64 random(seed);
  for (uint32_t& word : signs_) word = static_cast<uint32_t>(random.Next() >> 32);
}

void RandomRotation::Rotate(const float* v, float* rotated) const {
  std::memcpy(rotated, v, dimension_ * sizeof(float));
  std::memset(rotated + dimension_, 0, (rotated_dimension_ - dimension_) * sizeof(float));
  RotateInPlace(rotated);
}

void RandomRotation::RotateInPlace(float* v) const {
  HWY_DYNAMIC_DISPATCH(RotateByRounds)
  (v, rotated_dimension_, transformed_, signs_.data(), kSignWords, scale_);
}

}  // namespace engram
#endif  // HWY_ONCE
