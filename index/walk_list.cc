#include "index/walk_list.h"

#include <cstring>

#include "src/core/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "index/walk_list.cc"
#include <hwy/foreach_target.h>  // Compiles what follows once per instruction set.
#include <hwy/highway.h>

#include "index/walk_list-inl.h"

HWY_BEFORE_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

size_t KeysBelow(const float* distances, size_t count, float reference, uint32_t first_slot,
                 WalkKey bound, WalkKey* keys) {
  return CompressedKeysBelow(distances, count, reference, first_slot, bound, keys);
}
void Insert(WalkKey* list, size_t blocks, size_t last, const WalkKey* keys, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (keys[i] < list[last]) InsertKey(list, blocks, keys[i]);
  }
}
WalkListKernels::Places FirstOpen(const WalkKey* list, size_t end) {
  return FirstOpenPlaces(list, end);
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace engram {

HWY_EXPORT(KeysBelow);
HWY_EXPORT(Insert);
HWY_EXPORT(FirstOpen);

WalkListKernels WalkListKernels::Get() {
  // Without this the table's first entry would choose the target anew on every call.
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  return {.keys_below = &HWY_DYNAMIC_DISPATCH(KeysBelow),
          .insert = &HWY_DYNAMIC_DISPATCH(Insert),
          .first_open = &HWY_DYNAMIC_DISPATCH(FirstOpen)};
}

void WalkList::Attach(std::byte* memory) {
  kernels_ = WalkListKernels::Get();
  std::memset(memory, 0, kBlockKeys * sizeof(WalkKey));
  keys_ = reinterpret_cast<WalkKey*>(memory) + kBlockKeys;
  retired_ = keys_ + kMaxSize;
  retired_count_ = 1;  // so that Begin clears the bits
}

void WalkList::Begin(uint32_t ef) {
  CHECK(ef >= 1 && ef <= kMaxSize, "ef is beyond the list");
  size_ = ef;
  std::fill_n(keys_, blocks() * kBlockKeys, kNoKey);
  std::memset(retired_, 0, kRetiredBytes);
  retired_count_ = 0;
}

bool WalkList::InsertRetired(WalkKey key) {
  if (size_ == kMaxSize) return false;
  if (size_ % kBlockKeys == 0) std::fill_n(keys_ + size_, kBlockKeys, kNoKey);
  const uint32_t slot = SlotOf(key);
  retired_[slot / 32] |= 1U << slot % 32;
  ++retired_count_;
  // Everything from here on moves by one, the last of the places too.
  ++size_;
  kernels_.insert(keys_, blocks(), size_ - 1, &key, 1);
  return true;
}

void WalkList::InsertAmongRetired(const WalkKey* keys, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (keys[i] >= bound()) continue;
    kernels_.insert(keys_, blocks(), size_ - 1, keys + i, 1);
    // The farthest of the others has dropped out: the retired nodes before it are of no use.
    while (IsRetired(keys_[size_ - 1])) {
      --size_;
      --retired_count_;
    }
  }
}

}  // namespace engram
#endif  // HWY_ONCE
