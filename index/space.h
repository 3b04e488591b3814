#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "index/chunked_array.h"
#include "index/distance.h"
#include "index/hnsw_graph.h"
#include "index/hnsw_linker.h"
#include "index/hnsw_params.h"
#include "index/hnsw_search.h"
#include "index/id_map.h"
#include "index/vector_store.h"
#include "src/core/arena_heap.h"
#include "src/core/ids.h"
#include "src/core/observation.h"
#include "src/core/refusal_reason.h"
#include "src/core/result.h"

namespace engram {

// One observation as it is given to a space. Points into the request.
struct ObservationRef {
  std::string_view id;
  std::span<const std::byte> payload;
  VectorDtype dtype = VectorDtype::kNone;
  uint32_t dimension = 0;
  float scale = 1;
  const std::byte* vector = nullptr;
  int64_t when_ns = 0;
  float confidence = 1;
};

// What a space keeps of an observation beside its vector.
struct StoredObservation {
  std::string_view id;
  std::span<const std::byte> payload;
  int64_t when_ns = 0;
  float confidence = 1;
};

// The observations of one memory space in one shard: vectors, ids, payloads, and the graph over
// them.
//
// A stored observation is a node. It is visible from Upsert on: nodes that are not linked yet are
// listed and scanned exactly; the others are found through the graph. A small space has no graph.
//
// A node's life: kFree -> kUnlinked -> kLinking -> kLinked -> kRetired, or from kUnlinked back to
// kFree when it is updated or deleted before it was linked. A retired node is in no result, but
// searches still walk through it, so its vector stays.
//
// Thread safety: the shard's alone.
// Invariants: each live id is in the id map once, with a live node; `unlinked` lists exactly the
// live nodes that are not kLinked; live = linked + unlinked.
class Space {
 public:
  // Nodes from which on a graph pays: below that an exact scan takes well under a millisecond.
  static constexpr uint32_t kGraphFrom = 4'096;

  // `heap` outlives the space. `dimension` 0: that of the first observation. `hash_seed` is secret.
  Space(std::string name, Metric metric, uint32_t dimension, ArenaHeap* heap,
        const HnswBuildParams& build_params, uint64_t hash_seed);
  Space(const Space&) = delete;
  Space& operator=(const Space&) = delete;
  ~Space();

  // Stores the observation, in place of what has its id. kNone, kWrongDimension, kZeroVector,
  // kNotFinite (an int8 vector's product) or kMemoryFull; nothing has changed then.
  RefusalReason Upsert(const ObservationRef& observation);
  // False when the id is not there.
  bool Delete(std::string_view id);

  // Writes a query in the form of this space's rows to `row` (padded_dimension() floats, 64-byte
  // aligned). kNone, kWrongDimension, kZeroVector or kNotFinite, as Upsert.
  RefusalReason PrepareQuery(VectorDtype dtype, uint32_t dimension, float scale,
                             const std::byte* vector, float* row) const;

  // For an exact scan: the live nodes that a graph search does not find.
  size_t unlinked_count() const { return unlinked_count_; }
  NodeId UnlinkedAt(size_t index) const { return unlinked_[index]; }
  bool IsLinked(NodeId node) const { return nodes_[node].state == NodeState::kLinked; }
  SearchTarget TargetFor(const float* query) const {
    return {&graph_, vectors(), distance_, query};
  }

  StoredObservation Get(NodeId node) const;
  // The metric's score of a distance (see Metric).
  float ScoreOf(float distance) const;

  // Linking, by the shard's linker between other work. The next node to link, kNoNode when there is
  // nothing to do. Ask FinishLinking once the linker is done with it.
  NodeId NextToLink() const;
  bool BeginLinking(HnswLinker* linker, NodeId node);
  void FinishLinking(NodeId node);

  // How many unlinked nodes make `bytes` of vectors to scan.
  size_t NodesInBytes(size_t bytes) const;
  bool has_graph() const { return has_graph_; }

  // kCorrupt naming what is wrong. Reads everything: for tests.
  Result<void> CheckInvariants() const;

  const std::string& name() const { return name_; }
  Metric metric() const { return metric_; }
  uint32_t dimension() const { return dimension_; }
  size_t padded_dimension() const { return dimension_ == 0 ? 0 : PaddedDimension(dimension_); }
  size_t node_count() const { return node_count_; }  // ever made; what searches need room for
  uint64_t live() const { return live_; }
  uint64_t linked() const { return live_ - unlinked_count_; }
  uint64_t retired() const { return retired_; }
  uint64_t resident_bytes() const;

 private:
  enum class NodeState : uint8_t { kFree, kUnlinked, kLinking, kLinked, kRetired, kRetiredLinking };
  struct Node {
    std::byte* text;  // id, then payload
    int64_t when_ns;
    float confidence;
    uint32_t payload_bytes;
    uint32_t place;  // in unlinked_; of a free node: the next free one
    uint16_t id_bytes;
    NodeState state;
    uint8_t reserved;
  };
  static_assert(sizeof(Node) == 32);

  const VectorStore* vectors() const { return &*vectors_; }
  void FixDimension(uint32_t dimension);
  void ForgetDimension();
  RefusalReason UpsertHere(const ObservationRef& observation);
  // Writes the vector as this space keeps it. kNone, kZeroVector or kNotFinite.
  RefusalReason WriteRow(VectorDtype dtype, float scale, const std::byte* vector, float* row) const;
  NodeId TakeNode();
  void GiveNode(NodeId node);
  bool WriteText(Node* node, const ObservationRef& observation);
  void FreeText(Node* node);
  void Retire(NodeId node);
  void ListUnlinked(NodeId node);
  void UnlistUnlinked(NodeId node);
  uint64_t HashOf(std::string_view id) const;
  NodeId FindId(uint64_t hash, std::string_view id) const;
  std::string_view IdOf(NodeId node) const;

  // Constant after construction.
  const std::string name_;
  const Metric metric_;
  ArenaHeap* const heap_;
  const uint64_t hash_seed_;
  const DistanceFn distance_;

  uint32_t dimension_;
  std::optional<VectorStore> vectors_;  // from the first observation on
  ChunkedArray<Node> nodes_;
  ChunkedArray<NodeId> unlinked_;
  IdMap ids_;
  HnswGraph graph_;
  uint32_t node_count_ = 0;
  NodeId first_free_ = kNoNode;
  size_t unlinked_count_ = 0;
  uint64_t live_ = 0;
  uint64_t retired_ = 0;
  uint64_t text_bytes_ = 0;
  bool has_graph_ = false;
};

}  // namespace engram
