#include "index/nearest_selection.h"

#include <algorithm>
#include <bit>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "index/nearest_selection.cc"
#include <hwy/foreach_target.h>  // Compiles what follows once per instruction set.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using Tag = hn::CappedTag<float, kSelectionSlack>;
using IdTag = hn::RebindToUnsigned<Tag>;
using IntTag = hn::RebindToSigned<Tag>;

float WeightBelow(const float* distances, const float* weights, size_t count, float bound) {
  const Tag tag;
  const size_t lanes = hn::Lanes(tag);
  const auto bounds = hn::Set(tag, bound);
  const auto ones = hn::Set(tag, 1.0F);
  auto sum = hn::Zero(tag);
  for (size_t i = 0; i < count; i += lanes) {
    const auto nearer =
        hn::And(hn::Lt(hn::LoadU(tag, distances + i), bounds), hn::FirstN(tag, count - i));
    const auto weight = weights == nullptr ? ones : hn::LoadU(tag, weights + i);
    sum = hn::Add(sum, hn::IfThenElseZero(nearer, weight));
  }
  return hn::GetLane(hn::SumOfLanes(tag, sum));
}

// Of those that are numbers; least > most where there are none.
void Range(const float* distances, size_t count, float* least, float* most) {
  const Tag tag;
  const size_t lanes = hn::Lanes(tag);
  const auto high = hn::Set(tag, HUGE_VALF);
  const auto low = hn::Set(tag, -HUGE_VALF);
  auto least_lanes = high;
  auto most_lanes = low;
  for (size_t i = 0; i < count; i += lanes) {
    const auto values = hn::LoadU(tag, distances + i);
    const auto numbers = hn::And(hn::Eq(values, values), hn::FirstN(tag, count - i));
    least_lanes = hn::Min(least_lanes, hn::IfThenElse(numbers, values, high));
    most_lanes = hn::Max(most_lanes, hn::IfThenElse(numbers, values, low));
  }
  *least = hn::GetLane(hn::MinOfLanes(tag, least_lanes));
  *most = hn::GetLane(hn::MaxOfLanes(tag, most_lanes));
}

size_t Keep(float bound, float* distances, uint32_t* ids, size_t count) {
  const Tag tag;
  const IdTag id_tag;
  const size_t lanes = hn::Lanes(tag);
  const auto bounds = hn::Set(tag, bound);
  size_t kept = 0;
  for (size_t i = 0; i < count; i += lanes) {
    const auto values = hn::LoadU(tag, distances + i);
    const auto id = hn::LoadU(id_tag, ids + i);
    const auto nearer = hn::And(hn::Lt(values, bounds), hn::FirstN(tag, count - i));
    hn::StoreU(hn::Compress(values, nearer), tag, distances + kept);
    hn::StoreU(hn::Compress(id, hn::RebindMask(id_tag, nearer)), id_tag, ids + kept);
    kept += hn::CountTrue(tag, nearer);
  }
  return kept;
}

size_t Append(const int32_t* products, const float* offsets, const float* factors, float scale,
              const uint32_t* ids, size_t count, float bound, float* out_distances,
              uint32_t* out_ids) {
  const Tag tag;
  const IdTag id_tag;
  const IntTag int_tag;
  const size_t lanes = hn::Lanes(tag);
  const auto bounds = hn::Set(tag, bound);
  const auto scales = hn::Set(tag, scale);
  size_t appended = 0;
  for (size_t i = 0; i < count; i += lanes) {
    const auto products_scaled =
        hn::Mul(hn::ConvertTo(tag, hn::LoadU(int_tag, products + i)), scales);
    const auto values =
        hn::MulAdd(products_scaled, hn::LoadU(tag, factors + i), hn::LoadU(tag, offsets + i));
    const auto nearer = hn::And(hn::Lt(values, bounds), hn::FirstN(tag, count - i));
    const size_t found = hn::CountTrue(tag, nearer);
    if (found == 0) continue;
    hn::StoreU(hn::Compress(values, nearer), tag, out_distances + appended);
    hn::StoreU(hn::Compress(hn::LoadU(id_tag, ids + i), hn::RebindMask(id_tag, nearer)), id_tag,
               out_ids + appended);
    appended += found;
  }
  return appended;
}

size_t Places(const float* distances, size_t count, float bound, size_t most, uint32_t* places) {
  const Tag tag;
  const IdTag id_tag;
  const size_t lanes = hn::Lanes(tag);
  const auto bounds = hn::Set(tag, bound);
  size_t found = 0;
  for (size_t i = 0; i < count && found < most; i += lanes) {
    const auto nearer =
        hn::And(hn::Lt(hn::LoadU(tag, distances + i), bounds), hn::FirstN(tag, count - i));
    if (hn::AllFalse(tag, nearer)) continue;
    const auto here = hn::Iota(id_tag, static_cast<uint32_t>(i));
    hn::StoreU(hn::Compress(here, hn::RebindMask(id_tag, nearer)), id_tag, places + found);
    found += hn::CountTrue(tag, nearer);
  }
  return std::min(found, most);
}

size_t Scale(const int32_t* products, const float* offsets, const float* factors, float scale,
             size_t count, float* out) {
  const Tag tag;
  const IntTag int_tag;
  const size_t lanes = hn::Lanes(tag);
  const auto scales = hn::Set(tag, scale);
  const auto high = hn::Set(tag, HUGE_VALF);
  auto least = high;
  for (size_t i = 0; i < count; i += lanes) {
    const auto products_scaled =
        hn::Mul(hn::ConvertTo(tag, hn::LoadU(int_tag, products + i)), scales);
    const auto values =
        hn::MulAdd(products_scaled, hn::LoadU(tag, factors + i), hn::LoadU(tag, offsets + i));
    hn::StoreU(values, tag, out + i);
    least = hn::Min(least, hn::IfThenElse(hn::FirstN(tag, count - i), values, high));
  }
  const float minimum = hn::GetLane(hn::MinOfLanes(tag, least));
  for (size_t i = 0; i < count; ++i) {
    if (out[i] == minimum) return i;
  }
  return 0;
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace engram {

HWY_EXPORT(WeightBelow);
HWY_EXPORT(Range);
HWY_EXPORT(Keep);
HWY_EXPORT(Append);
HWY_EXPORT(Places);
HWY_EXPORT(Scale);

namespace {

// Floats in their order as integers, so that halving an interval ends for infinite ones too.
int64_t KeyOfFloat(float value) {
  const auto bits = std::bit_cast<int32_t>(value);
  return bits < 0 ? -int64_t{bits & 0x7FFFFFFF} : int64_t{bits};
}
float FloatOfKey(int64_t key) {
  const auto bits = static_cast<uint32_t>(key < 0 ? -key : key);
  return std::bit_cast<float>(bits | (key < 0 ? 0x80000000U : 0U));
}

}  // namespace

float BoundOfNearest(const float* distances, const float* weights, size_t count, float least,
                     float most) {
  float nearest = 0;
  float farthest = 0;
  HWY_DYNAMIC_DISPATCH(Range)(distances, count, &nearest, &farthest);
  if (!(nearest <= farthest)) return HUGE_VALF;
  // Below `low` lies too little, below `high` enough, if anywhere.
  int64_t low = KeyOfFloat(nearest);
  int64_t high = KeyOfFloat(farthest) + 1;
  // Above what is spread evenly a middle of numbers comes closer than one of keys.
  for (bool by_number = true; high - low > 1; by_number = !by_number) {
    int64_t middle = low + (high - low) / 2;
    if (by_number) {
      const float number = FloatOfKey(low) / 2 + FloatOfKey(high) / 2;
      if (std::isfinite(number)) middle = std::clamp(KeyOfFloat(number), low + 1, high - 1);
    }
    const float bound = FloatOfKey(middle);
    const float weight = HWY_DYNAMIC_DISPATCH(WeightBelow)(distances, weights, count, bound);
    if (weight < least) {
      low = middle;
    } else if (weight > most) {
      high = middle;
    } else {
      return bound;
    }
  }
  // Behind infinity come no numbers.
  return high > KeyOfFloat(HUGE_VALF) ? HUGE_VALF : FloatOfKey(high);
}

size_t KeepNearer(float bound, float* distances, uint32_t* ids, size_t count) {
  return HWY_DYNAMIC_DISPATCH(Keep)(bound, distances, ids, count);
}

size_t AppendNearer(const int32_t* products, const float* offsets, const float* factors,
                    float scale, const uint32_t* ids, size_t count, float bound,
                    float* out_distances, uint32_t* out_ids) {
  return HWY_DYNAMIC_DISPATCH(Append)(products, offsets, factors, scale, ids, count, bound,
                                      out_distances, out_ids);
}

size_t PlacesNearer(const float* distances, size_t count, float bound, size_t most,
                    uint32_t* places) {
  return HWY_DYNAMIC_DISPATCH(Places)(distances, count, bound, most, places);
}

size_t ScaleProducts(const int32_t* products, const float* offsets, const float* factors,
                     float scale, size_t count, float* out) {
  return HWY_DYNAMIC_DISPATCH(Scale)(products, offsets, factors, scale, count, out);
}

}  // namespace engram
#endif  // HWY_ONCE
