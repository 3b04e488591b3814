#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "src/core/arena_heap.h"
#include "src/core/check.h"
#include "src/core/ids.h"

namespace engram {

// From keys to NodeIds, where the key of a node lies elsewhere: the map holds 32 bits of each key's
// hash and the node, 8 bytes an entry at 50 to 75 % load.
//
// Extendible hashing (Fagin et al. 1979): a directory of segments, indexed by the hash's upper
// bits; a full segment splits in two, so an insert moves at most kFullSegment entries and never
// stalls for a rehash of the whole table. Inside a segment: linear probing with backward-shift
// deletion.
//
// Thread safety: the owner core's alone.
// Invariants: an entry lies in the segment that its tag's upper bits name, and every place between
// its home and its own is taken.
class IdMap {
 public:
  // `heap` must outlive the map. Nothing is taken before the first insert.
  explicit IdMap(ArenaHeap* heap) : heap_(heap) {}
  IdMap(const IdMap&) = delete;
  IdMap& operator=(const IdMap&) = delete;
  ~IdMap() { Release(); }

  // The node whose key has `hash` and for which `is_key(node)` says true; kNoNode when there is
  // none.
  template <typename IsKey>
  NodeId Find(uint64_t hash, IsKey&& is_key) const {
    if (directory_ == nullptr) return kNoNode;
    const uint32_t tag = TagOf(hash);
    const Segment& segment = *directory_[DirectoryIndex(tag)];
    for (uint32_t place = tag & segment.mask;; place = (place + 1) & segment.mask) {
      const Entry& entry = segment.entries()[place];
      if (entry.node == kNoNode) return kNoNode;
      if (entry.tag == tag && is_key(entry.node)) return entry.node;
    }
  }

  // Adds a key that is not there. False when the heap is spent; nothing has changed then.
  bool Insert(uint64_t hash, NodeId node);
  // Makes the entry (hash, from), which must be there, stand for node `to`.
  void Replace(uint64_t hash, NodeId from, NodeId to);
  // Removes the entry (hash, node), which must be there.
  void Erase(uint64_t hash, NodeId node);
  // Gives every block back.
  void Release();

  size_t size() const { return size_; }

 private:
  struct Entry {
    uint32_t tag;
    NodeId node;  // kNoNode: free
  };
  struct Segment {
    uint32_t mask;   // places - 1
    uint32_t depth;  // of the directory's bits, how many it answers to
    uint32_t used;
    uint32_t reserved;
    Entry* entries() { return reinterpret_cast<Entry*>(this + 1); }
    const Entry* entries() const { return reinterpret_cast<const Entry*>(this + 1); }
  };
  static constexpr uint32_t kFirstSegment = 16;
  static constexpr uint32_t kFullSegment = 512;
  // Beyond this many bits splitting cannot help: the keys' hashes are alike.
  static constexpr uint32_t kMaxDepth = 22;

  static uint32_t TagOf(uint64_t hash) { return static_cast<uint32_t>(hash >> 32); }
  size_t DirectoryIndex(uint32_t tag) const { return depth_ == 0 ? 0 : tag >> (32 - depth_); }
  static size_t SegmentBytes(uint32_t places) { return sizeof(Segment) + places * sizeof(Entry); }
  Segment* NewSegment(uint32_t places, uint32_t depth);
  void FreeSegment(Segment* segment);
  static void Put(Segment* segment, Entry entry);
  Entry* FindEntry(uint32_t tag, NodeId node, Segment** segment);
  // Room for one more in the segment of `tag`.
  bool MakeRoom(uint32_t tag);
  bool Enlarge(size_t index);
  bool Split(size_t index);
  bool DoubleDirectory();

  ArenaHeap* heap_;
  Segment** directory_ = nullptr;
  uint32_t depth_ = 0;
  size_t size_ = 0;
};

}  // namespace engram
