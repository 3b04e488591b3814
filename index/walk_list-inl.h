// Kernels of WalkList, compiled once per instruction set: included by walk_list.cc only.

#if defined(ENGRAM_INDEX_WALK_LIST_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ENGRAM_INDEX_WALK_LIST_INL_H_
#undef ENGRAM_INDEX_WALK_LIST_INL_H_
#else
#define ENGRAM_INDEX_WALK_LIST_INL_H_
#endif

#include <hwy/highway.h>

#include "index/walk_list.h"

HWY_BEFORE_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using KeyTag = hn::CappedTag<uint32_t, WalkList::kBlockKeys>;
using Keys = hn::Vec<KeyTag>;

// A float's bits so that they are ordered as the floats are, and of these the upper 18.
HWY_INLINE Keys OrderedUpperBits(hn::Vec<hn::Rebind<float, KeyTag>> distances) {
  constexpr uint32_t kUpperBits = ~uint32_t{0} << 14;
  const KeyTag tag;
  const hn::Rebind<int32_t, KeyTag> int_tag;
  const Keys bits = hn::BitCast(tag, distances);
  const Keys sign = hn::BitCast(tag, hn::ShiftRight<31>(hn::BitCast(int_tag, bits)));
  const Keys ordered = hn::Xor(bits, hn::Or(sign, hn::Set(tag, uint32_t{1} << 31)));
  return hn::And(ordered, hn::Set(tag, kUpperBits));
}

HWY_INLINE size_t CompressedKeysBelow(const float* HWY_RESTRICT distances, size_t count,
                                      float reference, uint32_t first_slot, WalkKey bound,
                                      WalkKey* HWY_RESTRICT keys) {
  const KeyTag tag;
  const hn::Rebind<float, KeyTag> float_tag;
  const size_t lanes = hn::Lanes(tag);
  const auto references = hn::Set(float_tag, reference);
  const Keys bounds = hn::Set(tag, bound);
  Keys slots = hn::ShiftLeft<1>(hn::Iota(tag, first_slot));
  const Keys step = hn::Set(tag, static_cast<uint32_t>(2 * lanes));
  size_t kept = 0;
  for (size_t i = 0; i < count; i += lanes) {
    const auto from_reference = hn::Sub(hn::LoadU(float_tag, distances + i), references);
    const Keys key = hn::Or(OrderedUpperBits(from_reference), slots);
    const auto below = hn::And(hn::Lt(key, bounds), hn::FirstN(tag, count - i));
    kept += hn::CompressStore(key, below, tag, keys + kept);
    slots = hn::Add(slots, step);
  }
  return kept;
}

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
// The key before each: the last of the block before, then this block's but its last. Blocks stay in
// registers: a load across two lines that were stored a moment ago would wait for both.
HWY_INLINE void InsertKey(WalkKey* list, size_t blocks, WalkKey key) {
  const __m512i keys = _mm512_set1_epi32(static_cast<int>(key));
  WalkKey* at = list + (blocks - 1) * WalkList::kBlockKeys;
  __m512i block = _mm512_load_si512(at);
  for (; blocks != 0; --blocks, at -= WalkList::kBlockKeys) {
    const __m512i before = _mm512_load_si512(at - WalkList::kBlockKeys);
    const __m512i shifted = _mm512_alignr_epi32(block, before, 15);
    _mm512_store_si512(at, _mm512_max_epu32(shifted, _mm512_min_epu32(block, keys)));
    block = before;
  }
}
#else
HWY_INLINE void InsertKey(WalkKey* list, size_t blocks, WalkKey key) {
  const KeyTag tag;
  const size_t lanes = hn::Lanes(tag);
  const Keys keys = hn::Set(tag, key);
  for (size_t i = blocks * WalkList::kBlockKeys; i != 0; i -= lanes) {
    WalkKey* const at = list + i - lanes;
    const Keys shifted = hn::LoadU(tag, at - 1);
    hn::Store(hn::Max(shifted, hn::Min(hn::Load(tag, at), keys)), tag, at);
  }
}
#endif

HWY_INLINE WalkListKernels::Places FirstOpenPlaces(const WalkKey* HWY_RESTRICT list, size_t end) {
  const KeyTag tag;
  const size_t lanes = hn::Lanes(tag);
  const Keys expanded = hn::Set(tag, kExpanded);
  const auto none = static_cast<uint32_t>(end);
  const auto place = [end, none](size_t block, intptr_t lane) {
    const size_t at = block + static_cast<size_t>(lane);
    return lane < 0 || at >= end ? none : static_cast<uint32_t>(at);
  };
  for (size_t i = 0; i < end; i += lanes) {
    const auto open = hn::Eq(hn::And(hn::Load(tag, list + i), expanded), hn::Zero(tag));
    const intptr_t first = hn::FindFirstTrue(tag, open);
    if (first < 0) continue;
    const auto after = hn::Gt(hn::Iota(tag, 0), hn::Set(tag, static_cast<uint32_t>(first)));
    return {place(i, first), place(i, hn::FindFirstTrue(tag, hn::And(open, after)))};
  }
  return {none, none};
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#endif  // ENGRAM_INDEX_WALK_LIST_INL_H_
