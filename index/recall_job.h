#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "index/hnsw_search.h"
#include "index/space.h"
#include "src/core/arena_heap.h"
#include "src/core/observation.h"
#include "src/core/refusal_reason.h"
#include "src/core/shard_port.h"

namespace engram {

// One recall, in slices:
// 1. Begin: the query in the form of the space's rows.
// 2. Scan: the live nodes that the graph does not know, exactly.
// 3. Search: the graph, with ef.
// 4. Merge: the k nearest of both.
// 5. Emit: the hits in batches, as result slots become free.
// Between Begin and the last batch the space must not change.
//
// Thread safety: the shard's alone. Takes memory from the shard's heap only, and only when a space
// has grown since the last recall.
class RecallJob {
 public:
  explicit RecallJob(ArenaHeap* heap);

  // Takes the memory for recalls of spaces of up to `nodes` nodes. Call it where a space grows, so
  // that a recall is not refused for lack of memory. False when the heap is spent.
  bool Reserve(size_t nodes) { return scratch_.Reserve(nodes); }

  // kNone, or why the recall cannot be done. `vector` as received. ef 0 takes `default_ef`.
  RefusalReason Begin(const Space& space, const RecallRequest& request, const std::byte* vector,
                      uint32_t default_ef);
  // Steps 2 to 4, until about `max_distances` distances have been evaluated. True when the hits are
  // ready.
  bool Search(uint32_t max_distances);
  // Bytes of the next batch, header included, at most `max_bytes`.
  size_t NextBatchBytes(size_t max_bytes) const;
  // Step 5: writes the next batch of at most `slot.size()` bytes. True when it was the last.
  bool EmitBatch(std::span<std::byte> slot);

  uint64_t distances() const { return scratch_.distances; }

 private:
  struct IsLinked {
    const Space* space;
    bool operator()(NodeId node) const { return space->IsLinked(node); }
  };
  enum class Phase : uint8_t { kIdle, kScan, kSearch, kReady };

  void ScanSlice(uint32_t max_distances);
  void Merge();
  // Payload bytes that hit `index` brings, given what was sent before it.
  size_t PayloadBytesOf(const StoredObservation& stored, size_t sent) const;
  size_t HitBytesOf(size_t index, size_t sent, size_t* payload_bytes) const;
  size_t WriteHit(size_t index, std::byte* to);

  SearchScratch scratch_;
  GraphSearch<IsLinked> search_{IsLinked{nullptr}};
  std::vector<float> query_storage_;
  float* query_ = nullptr;  // aligned to 64 bytes within query_storage_
  std::vector<NeighbourKey> nearest_storage_;
  KeyHeap<FarthestFirst> nearest_;  // the k nearest scanned so far
  std::vector<Neighbour> found_;    // by the graph
  std::vector<NeighbourKey> hits_;  // nearest first

  Phase phase_ = Phase::kIdle;
  const Space* space_ = nullptr;
  uint32_t k_ = 0;
  uint32_t ef_ = 0;
  bool with_payload_ = false;
  size_t scanned_ = 0;
  size_t emitted_ = 0;
  size_t payload_sent_ = 0;
};

}  // namespace engram
