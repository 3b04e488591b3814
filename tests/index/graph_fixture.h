#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "index/distance.h"
#include "index/hnsw_graph.h"
#include "index/hnsw_linker.h"
#include "index/hnsw_params.h"
#include "index/hnsw_search.h"
#include "index/hnsw_sweep.h"
#include "index/vector_format.h"
#include "index/vector_store.h"
#include "src/core/arena_heap.h"
#include "src/core/huge_page_arena.h"
#include "src/core/observation.h"

namespace engram {

inline constexpr HnswBuildParams kSmallBuild{.M = 4, .M0 = 8, .ef_construction = 30};

// What is wrong with the graph; empty: nothing.
std::string Violation(const HnswGraph& graph);

// Vectors side by side, `dimension` floats each.
struct TestVectors {
  uint32_t dimension = 0;
  std::vector<float> values;
  size_t size() const { return values.size() / dimension; }
  std::span<const float> operator[](size_t i) const {
    return std::span(values).subspan(i * dimension, dimension);
  }
};

// Independent normal values.
TestVectors GaussianVectors(size_t count, uint32_t dimension, uint32_t seed);
// `clusters` far centres with narrow clouds around them.
TestVectors ClusteredVectors(size_t count, uint32_t dimension, size_t clusters, uint32_t seed);

// For searches in which no node is retired.
struct AllLive {
  bool operator()(NodeId) const { return true; }
};

// Arena, heap, vectors, graph, linker and scratch of one space; vectors are normalised under
// cosine.
class GraphFixture {
 public:
  GraphFixture(Metric metric, uint32_t dimension, const HnswBuildParams& params,
               size_t arena_bytes = size_t{256} << 20, Precision precision = Precision::kF32);

  // Writes the vector as the next node and makes room for it.
  NodeId Store(std::span<const float> vector);
  // Links `node` in slices of `budget` distances.
  void Link(NodeId node, uint32_t budget = UINT32_MAX);
  // Takes `nodes` out of the graph, in slices of `budget`; with `after_slice` between them.
  void Sweep(
      std::span<const NodeId> nodes, uint32_t budget = UINT32_MAX,
      const std::function<void()>& after_slice = [] {});
  // Stores and links all.
  void Build(const TestVectors& vectors, uint32_t budget = UINT32_MAX);

  std::vector<Neighbour> Search(std::span<const float> query, uint32_t k, uint32_t ef);
  std::vector<Neighbour> Search(std::span<const float> query, uint32_t k, uint32_t ef,
                                const std::function<bool(NodeId)>& is_live);
  // The true answer, over all nodes of the graph that are not doomed, by the same kernel.
  std::vector<Neighbour> ExactSearch(std::span<const float> query, uint32_t k);
  // Mean recall@k over the queries; a result as near as the kth true one is a hit.
  double RecallAt(uint32_t k, uint32_t ef, const TestVectors& queries);

  HugePageArena arena;
  ArenaHeap heap;
  VectorFormat format;
  VectorStore vectors;
  HnswGraph graph;
  HnswLinker linker;
  HnswSweep sweep;
  SearchScratch scratch;
  NodeId stored = 0;

  // What is searched; `query` stays valid until the next call.
  SearchTarget Target(std::span<const float> query);
  SearchTarget TargetOf(NodeId node) const;
  SearchTarget Target() const;
  // Writes the vector as a row.
  void Encode(std::span<const float> vector, std::byte* row) const;

 private:
  VectorStore query_;
};

}  // namespace engram
