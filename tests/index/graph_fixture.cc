#include "tests/index/graph_fixture.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>

#include "src/core/check.h"
#include "tests/index/graph_search.h"

namespace engram {
namespace {

HugePageArena MakeArena(size_t bytes) {
  Result<HugePageArena> arena = HugePageArena::Create({.reserve_bytes = bytes});
  CHECK(arena.has_value(), "the test's arena");
  return std::move(*arena);
}

}  // namespace

std::string Violation(const HnswGraph& graph) {
  const Result<void> checked = graph.CheckInvariants();
  return checked.has_value() ? "" : checked.error().message;
}

TestVectors GaussianVectors(size_t count, uint32_t dimension, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  TestVectors vectors{dimension, std::vector<float>(count * dimension)};
  for (float& value : vectors.values) value = normal(random);
  return vectors;
}

TestVectors ClusteredVectors(size_t count, uint32_t dimension, size_t clusters, uint32_t seed) {
  const TestVectors centres = GaussianVectors(clusters, dimension, seed);
  TestVectors vectors = GaussianVectors(count, dimension, seed + 1);
  for (size_t i = 0; i < count; ++i) {
    const std::span<const float> centre = centres[i % clusters];
    for (uint32_t d = 0; d < dimension; ++d) {
      float& value = vectors.values[i * dimension + d];
      value = 10 * centre[d] + 0.1F * value;
    }
  }
  return vectors;
}

GraphFixture::GraphFixture(Metric metric, uint32_t dimension, const HnswBuildParams& params,
                           size_t arena_bytes, Precision precision)
    : arena(MakeArena(arena_bytes)),
      heap(&arena),
      format(precision, metric, dimension),
      vectors(&heap, format.row_bytes()),
      graph(&heap, params),
      linker(&heap, params),
      sweep(&heap, params),
      scratch(&heap),
      query_(&heap, format.row_bytes()) {
  CHECK(query_.Reserve(1), "room for the query");
}

void GraphFixture::Encode(std::span<const float> vector, std::byte* row) const {
  std::vector<float> numbers(vector.begin(), vector.end());
  if (format.metric() == Metric::kCosine) NormaliseInPlace(numbers.data(), numbers.size());
  format.Encode(numbers.data(), row);
}

NodeId GraphFixture::Store(std::span<const float> vector) {
  const NodeId node = stored++;
  CHECK(vectors.Reserve(stored) && scratch.Reserve(stored), "room for a node");
  Encode(vector, vectors.Row(node));
  return node;
}

SearchTarget GraphFixture::TargetOf(NodeId node) const {
  SearchTarget target = Target();
  target.query = vectors.Row(node);
  return target;
}

SearchTarget GraphFixture::Target() const {
  return {&graph, &vectors, format.distance(), format.padded_dimension(), nullptr};
}

SearchTarget GraphFixture::Target(std::span<const float> query) {
  Encode(query, query_.Row(0));
  SearchTarget target = Target();
  target.query = query_.Row(0);
  return target;
}

void GraphFixture::Link(NodeId node, uint32_t budget) {
  CHECK(linker.Begin(&graph, Target(), node), "room for links");
  while (!linker.Step(budget)) {
  }
}

void GraphFixture::Sweep(std::span<const NodeId> nodes, uint32_t budget,
                         const std::function<void()>& after_slice) {
  CHECK(sweep.Begin(&graph, Target(), nodes), "room for a sweep");
  after_slice();
  while (!sweep.Step(budget)) after_slice();
  after_slice();
}

void GraphFixture::Build(const TestVectors& data, uint32_t budget) {
  for (size_t i = 0; i < data.size(); ++i) Link(Store(data[i]), budget);
}

std::vector<Neighbour> GraphFixture::Search(std::span<const float> query, uint32_t k, uint32_t ef) {
  return Search(query, k, ef, AllLive());
}

std::vector<Neighbour> GraphFixture::Search(std::span<const float> query, uint32_t k, uint32_t ef,
                                            const std::function<bool(NodeId)>& is_live) {
  std::vector<Neighbour> out(k);
  out.resize(SearchGraph(Target(query), k, ef, is_live, &scratch, out));
  return out;
}

std::vector<Neighbour> GraphFixture::ExactSearch(std::span<const float> query, uint32_t k) {
  const SearchTarget target = Target(query);
  std::vector<Neighbour> all;
  for (NodeId node = 0; node < stored; ++node) {
    if (graph.IsLinked(node)) all.push_back({target.DistanceTo(node), node});
  }
  std::sort(all.begin(), all.end(), [](const Neighbour& a, const Neighbour& b) {
    return std::pair(a.distance, a.node) < std::pair(b.distance, b.node);
  });
  all.resize(std::min<size_t>(k, all.size()));
  return all;
}

double GraphFixture::RecallAt(uint32_t k, uint32_t ef, const TestVectors& queries) {
  size_t hits = 0;
  for (size_t i = 0; i < queries.size(); ++i) {
    const float bound = ExactSearch(queries[i], k).back().distance;
    for (const Neighbour& found : Search(queries[i], k, ef)) {
      hits += static_cast<size_t>(found.distance <= bound);
    }
  }
  return static_cast<double>(hits) / static_cast<double>(k * queries.size());
}

}  // namespace engram
