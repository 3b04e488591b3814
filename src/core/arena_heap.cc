#include "src/core/arena_heap.h"

#include <algorithm>
#include <bit>
#include <numeric>

#include "src/core/check.h"
#include "src/core/spsc_ring.h"

namespace engram {

namespace {

// Classes are sizes: multiples of 8 up to a cache line, whole lines up to kFewLinesBytes, then
// steps of a power of two. 56 is none, as the 8 bytes that one would leave of a line are no block.
constexpr size_t kSmallStep = 8;
constexpr size_t kSmallClasses = kCacheLineBytes / kSmallStep + 1;
constexpr size_t kLargestPart = 48;  // of a line
constexpr size_t kFewLinesBytes = 2'048;
constexpr size_t kLineClasses = kFewLinesBytes / kCacheLineBytes - 1;
constexpr size_t kSteps = 32;
constexpr size_t kFirstExponent = 11;  // of kFewLinesBytes
static_assert(size_t{1} << kFirstExponent == kFewLinesBytes);
static_assert(kFewLinesBytes / kSteps == kCacheLineBytes, "all larger sizes are whole lines");

constexpr size_t DivideUp(size_t bytes, size_t step) { return (bytes + step - 1) / step; }

}  // namespace

size_t ArenaHeap::ClassOf(size_t bytes) {
  CHECK(bytes <= kMaxBytes, "block size out of range");
  bytes = std::max(bytes, kMinBytes);
  if (bytes <= kLargestPart) return DivideUp(bytes, kSmallStep);
  if (bytes <= kCacheLineBytes) return kSmallClasses - 1;
  if (bytes <= kFewLinesBytes) return kSmallClasses + DivideUp(bytes, kCacheLineBytes) - 2;
  const size_t exponent = static_cast<size_t>(std::bit_width(bytes - 1)) - 1;  // floor(log2)
  // kSteps + 1 to 2 * kSteps of them.
  const size_t steps = DivideUp(bytes, (size_t{1} << exponent) / kSteps);
  return kSmallClasses + kLineClasses + (exponent - kFirstExponent) * kSteps + steps - kSteps - 1;
}

size_t ArenaHeap::SizeOfClass(size_t size_class) {
  if (size_class < kSmallClasses) return size_class * kSmallStep;
  size_class -= kSmallClasses;
  if (size_class < kLineClasses) return (size_class + 2) * kCacheLineBytes;
  size_class -= kLineClasses;
  const size_t exponent = kFirstExponent + size_class / kSteps;
  return (size_t{1} << exponent) / kSteps * (kSteps + 1 + size_class % kSteps);
}

// Of whole lines.
size_t ArenaHeap::LargestClassWithin(size_t bytes) {
  const size_t size_class = ClassOf(bytes);
  return SizeOfClass(size_class) == bytes ? size_class : size_class - 1;
}

// kNoClass where there is none.
size_t ArenaHeap::FirstFreeFrom(size_t size_class) const {
  size_t word = size_class / kClassesInWord;
  uint64_t bits = has_free_[word] & ~uint64_t{0} << (size_class % kClassesInWord);
  while (bits == 0) {
    if (++word == has_free_.size()) return kNoClass;
    bits = has_free_[word];
  }
  return word * kClassesInWord + static_cast<size_t>(std::countr_zero(bits));
}

void ArenaHeap::Push(size_t size_class, std::byte* block) {
  auto* entry = reinterpret_cast<FreeBlock*>(block);
  entry->next = free_[size_class];
  free_[size_class] = entry;
  has_free_[size_class / kClassesInWord] |= uint64_t{1} << (size_class % kClassesInWord);
  free_bytes_ += SizeOfClass(size_class);
}

std::byte* ArenaHeap::Pop(size_t size_class) {
  FreeBlock* entry = free_[size_class];
  free_[size_class] = entry->next;
  if (entry->next == nullptr) {
    has_free_[size_class / kClassesInWord] &= ~(uint64_t{1} << (size_class % kClassesInWord));
  }
  free_bytes_ -= SizeOfClass(size_class);
  return reinterpret_cast<std::byte*>(entry);
}

// Each piece is the largest that fits, so what is left shrinks to a 33rd or less with each, and is
// a whole size from kFewLinesBytes on: a handful of pieces.
void ArenaHeap::FileLines(std::byte* from, size_t bytes) {
  while (bytes > 0) {
    const size_t size_class = LargestClassWithin(bytes);
    Push(size_class, from);
    from += SizeOfClass(size_class);
    bytes -= SizeOfClass(size_class);
  }
}

// A block of `size_class`, of whole lines, out of a free one of the larger class `from`.
//
// What lies between it and the largest block that may stay behind it is of use to smaller sizes
// alone. So small blocks are cut kFewest at a time or more, which leaves less than a sixteenth; of
// large ones one alone, lest others miss what nobody has asked for.
std::byte* ArenaHeap::CutLines(size_t from, size_t size_class) {
  const size_t bytes = SizeOfClass(size_class);
  const size_t whole = SizeOfClass(from);
  size_t behind = 0;  // stays in one piece
  size_t count = 1;
  if (bytes > kLargestInFew) {
    if (whole > bytes) behind = SizeOfClass(LargestClassWithin(whole - bytes));
  } else {
    if (whole > kMost * bytes) behind = SizeOfClass(LargestClassWithin(whole - kFewest * bytes));
    count = std::min((whole - behind) / bytes, kMost);
  }
  std::byte* const block = Pop(from);
  for (size_t i = count - 1; i > 0; --i) Push(size_class, block + i * bytes);
  FileLines(block + count * bytes, whole - behind - count * bytes);
  if (behind > 0) Push(ClassOf(behind), block + whole - behind);
  return block;
}

// Of whole lines.
std::byte* ArenaHeap::TakeLines(size_t size_class) {
  if (free_[size_class] != nullptr) return Pop(size_class);  // 1.
  const size_t bytes = SizeOfClass(size_class);
  const size_t generous = std::clamp(bytes * kGenerous, kLeastGenerous, kMaxBytes);
  if (const size_t from = FirstFreeFrom(ClassOf(generous)); from != kNoClass) {
    return CutLines(from, size_class);  // 2.
  }
  if (std::byte* block = arena_->Allocate(bytes, kCacheLineBytes); block != nullptr) return block;
  const size_t larger = FirstFreeFrom(size_class);
  return larger == kNoClass ? nullptr : CutLines(larger, size_class);  // 4.
}

// Less than a line. As many as fill whole lines are made at once, so that nothing is left of these.
std::byte* ArenaHeap::TakePart(size_t size_class) {
  if (free_[size_class] != nullptr) return Pop(size_class);
  const size_t bytes = SizeOfClass(size_class);
  const size_t whole = std::lcm(bytes, kCacheLineBytes);
  if (std::byte* const lines = TakeLines(ClassOf(whole)); lines != nullptr) {
    for (size_t at = whole - bytes; at > 0; at -= bytes) Push(size_class, lines + at);
    return lines;
  }
  // Of the last lines, or of a larger part. What is left of its line is a block, too.
  const size_t from = FirstFreeFrom(ClassOf(bytes + kMinBytes));
  if (from == kNoClass) return nullptr;
  std::byte* const block = Pop(from);
  const size_t end = std::min(SizeOfClass(from), kCacheLineBytes);
  Push(ClassOf(end - bytes), block + bytes);
  FileLines(block + end, SizeOfClass(from) - end);
  return block;
}

std::byte* ArenaHeap::Allocate(size_t bytes) {
  const size_t size_class = ClassOf(bytes);
  const bool is_part = SizeOfClass(size_class) < kCacheLineBytes;
  std::byte* const block = is_part ? TakePart(size_class) : TakeLines(size_class);
  if (block != nullptr) live_bytes_ += SizeOfClass(size_class);
  return block;
}

void ArenaHeap::Free(std::byte* block, size_t bytes) {
  const size_t size_class = ClassOf(bytes);
  CHECK(live_bytes_ >= SizeOfClass(size_class), "more was freed than handed out");
  live_bytes_ -= SizeOfClass(size_class);
  Push(size_class, block);
}

}  // namespace engram
