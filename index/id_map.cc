#include "index/id_map.h"

namespace engram {

bool IdMap::Insert(uint64_t hash, NodeId node) {
  const uint32_t tag = TagOf(hash);
  if (!MakeRoom(tag)) return false;
  Put(directory_[DirectoryIndex(tag)], {tag, node});
  ++size_;
  return true;
}

void IdMap::Replace(uint64_t hash, NodeId from, NodeId to) {
  Segment* segment = nullptr;
  FindEntry(TagOf(hash), from, &segment)->node = to;
}

void IdMap::Erase(uint64_t hash, NodeId node) {
  Segment* segment = nullptr;
  Entry* hole = FindEntry(TagOf(hash), node, &segment);
  Entry* entries = segment->entries();
  auto place = static_cast<uint32_t>(hole - entries);
  // Backward shift: whatever probed past the hole and may lie in it moves into it.
  for (uint32_t next = (place + 1) & segment->mask; entries[next].node != kNoNode;
       next = (next + 1) & segment->mask) {
    const uint32_t home = entries[next].tag & segment->mask;
    if (((next - home) & segment->mask) >= ((next - place) & segment->mask)) {
      entries[place] = entries[next];
      place = next;
    }
  }
  entries[place].node = kNoNode;
  --segment->used;
  --size_;
}

void IdMap::Release() {
  if (directory_ == nullptr) return;
  const size_t places = size_t{1} << depth_;
  for (size_t index = 0; index < places;) {
    Segment* segment = directory_[index];
    index += size_t{1} << (depth_ - segment->depth);
    FreeSegment(segment);
  }
  FreeDirectory();
  depth_ = 0;
  size_ = 0;
}

IdMap::Segment* IdMap::NewSegment(uint32_t places, uint32_t depth) {
  auto* segment = reinterpret_cast<Segment*>(heap_->Allocate(SegmentBytes(places)));
  if (segment == nullptr) return nullptr;
  bytes_ += ArenaHeap::BlockBytes(SegmentBytes(places));
  *segment = {.mask = places - 1, .depth = depth, .used = 0, .reserved = 0};
  for (uint32_t i = 0; i < places; ++i) segment->entries()[i] = {0, kNoNode};
  return segment;
}

void IdMap::FreeSegment(Segment* segment) {
  const size_t bytes = SegmentBytes(segment->mask + 1);
  bytes_ -= ArenaHeap::BlockBytes(bytes);
  heap_->Free(reinterpret_cast<std::byte*>(segment), bytes);
}

IdMap::Segment** IdMap::NewDirectory(size_t places) {
  auto** directory = heap_->AllocateArray<Segment*>(places);
  if (directory != nullptr) bytes_ += ArenaHeap::BlockBytes(places * sizeof(Segment*));
  return directory;
}

// That of now.
void IdMap::FreeDirectory() {
  const size_t places = size_t{1} << depth_;
  bytes_ -= ArenaHeap::BlockBytes(places * sizeof(Segment*));
  heap_->FreeArray(directory_, places);
  directory_ = nullptr;
}

void IdMap::Put(Segment* segment, Entry entry) {
  uint32_t place = entry.tag & segment->mask;
  while (segment->entries()[place].node != kNoNode) place = (place + 1) & segment->mask;
  segment->entries()[place] = entry;
  ++segment->used;
}

IdMap::Entry* IdMap::FindEntry(uint32_t tag, NodeId node, Segment** segment) {
  CHECK(directory_ != nullptr, "the entry is in the map");
  *segment = directory_[DirectoryIndex(tag)];
  Entry* entries = (*segment)->entries();
  for (uint32_t place = tag & (*segment)->mask;; place = (place + 1) & (*segment)->mask) {
    CHECK(entries[place].node != kNoNode, "the entry is in the map");
    if (entries[place].tag == tag && entries[place].node == node) return &entries[place];
  }
}

bool IdMap::MakeRoom(uint32_t tag) {
  if (directory_ == nullptr) {
    directory_ = NewDirectory(1);
    if (directory_ == nullptr) return false;
    directory_[0] = NewSegment(kFirstSegment, 0);
    if (directory_[0] == nullptr) {
      FreeDirectory();
      return false;
    }
  }
  for (;;) {
    const size_t index = DirectoryIndex(tag);
    const Segment& segment = *directory_[index];
    const uint32_t places = segment.mask + 1;
    if (segment.used < places - places / 4) return true;
    // Splitting stops helping where hashes are alike; then the segment grows.
    const bool split = places >= kFullSegment && segment.depth < kMaxDepth;
    if (!(split ? Split(index) : Enlarge(index))) return false;
  }
}

bool IdMap::Enlarge(size_t index) {
  Segment* old = directory_[index];
  Segment* larger = NewSegment((old->mask + 1) * 2, old->depth);
  if (larger == nullptr) return false;
  for (uint32_t i = 0; i <= old->mask; ++i) {
    if (old->entries()[i].node != kNoNode) Put(larger, old->entries()[i]);
  }
  const size_t span = size_t{1} << (depth_ - old->depth);
  const size_t first = index / span * span;
  for (size_t i = first; i < first + span; ++i) directory_[i] = larger;
  FreeSegment(old);
  return true;
}

bool IdMap::Split(size_t index) {
  Segment* old = directory_[index];
  if (old->depth == depth_) {
    if (!DoubleDirectory()) return false;
    index *= 2;
  }
  const uint32_t depth = old->depth + 1;
  Segment* halves[2] = {NewSegment(old->mask + 1, depth), NewSegment(old->mask + 1, depth)};
  if (halves[0] == nullptr || halves[1] == nullptr) {
    for (Segment* half : halves) {
      if (half != nullptr) FreeSegment(half);
    }
    return false;
  }
  for (uint32_t i = 0; i <= old->mask; ++i) {
    const Entry entry = old->entries()[i];
    if (entry.node != kNoNode) Put(halves[(entry.tag >> (32 - depth)) & 1], entry);
  }
  const size_t span = size_t{1} << (depth_ - old->depth);
  const size_t first = index / span * span;
  for (size_t i = 0; i < span; ++i) directory_[first + i] = halves[i < span / 2 ? 0 : 1];
  FreeSegment(old);
  return true;
}

bool IdMap::DoubleDirectory() {
  const size_t places = size_t{1} << depth_;
  auto** larger = NewDirectory(places * 2);
  if (larger == nullptr) return false;
  for (size_t i = 0; i < places * 2; ++i) larger[i] = directory_[i / 2];
  FreeDirectory();
  directory_ = larger;
  ++depth_;
  return true;
}

}  // namespace engram
