#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

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

  // Calls `visit(node)` for entries in the order of their hashes' upper 32 bits, from *cursor (0 to
  // 2^32 - 1) on, until at least `limit` were visited and the next one differs in those bits.
  // *cursor is then where to go on, or 0 when all were visited. An entry that is in the map
  // throughout is visited exactly once, whatever else comes and goes between the calls.
  template <typename Visit>
  void VisitFrom(uint64_t* cursor, size_t limit, Visit&& visit) const {
    std::vector<Entry> found;
    size_t visited = 0;
    uint64_t from = *cursor;
    *cursor = 0;
    while (directory_ != nullptr && from <= UINT32_MAX) {
      const auto tag = static_cast<uint32_t>(from);
      const Segment& segment = *directory_[DirectoryIndex(tag)];
      found.clear();
      for (uint32_t place = 0; place <= segment.mask; ++place) {
        const Entry& entry = segment.entries()[place];
        if (entry.node != kNoNode && entry.tag >= tag) found.push_back(entry);
      }
      std::sort(found.begin(), found.end(), [](const Entry& a, const Entry& b) {
        return a.tag != b.tag ? a.tag < b.tag : a.node < b.node;
      });
      for (size_t i = 0; i < found.size(); ++i) {
        if (visited >= limit && (i == 0 || found[i].tag != found[i - 1].tag)) {
          *cursor = found[i].tag;
          return;
        }
        visit(found[i].node);
        ++visited;
      }
      // The first tag of the next segment.
      const uint64_t span = uint64_t{1} << (32 - segment.depth);
      from = (uint64_t{tag} / span + 1) * span;
    }
  }

  size_t size() const { return size_; }
  // What it takes of the heap.
  size_t bytes() const { return bytes_; }

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
  Segment** NewDirectory(size_t places);
  void FreeDirectory();
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
  size_t bytes_ = 0;
};

}  // namespace engram
