#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "index/batch_linker.h"
#include "index/inverted_lists.h"
#include "index/rabitq_format.h"
#include "index/walk_codes.h"
#include "src/core/check.h"
#include "tests/index/graph_fixture.h"
#include "tests/index/sign_testing.h"

namespace engram {

// A graph of int8 rows that is linked in batches: the fixture with codes, lists and the linker.
class BatchRig : public GraphFixture {
 public:
  BatchRig(Metric metric, uint32_t dimension, const HnswBuildParams& params,
           size_t arena_bytes = size_t{512} << 20)
      : GraphFixture(metric, dimension, params, arena_bytes, Precision::kInt8),
        // The tests' vectors lie about the origin, or anywhere: a code need not be good to be
        // sound.
        codes(&heap, MakeFormat(metric, dimension, &heap)),
        lists(&heap, &format, &vectors, &codes.format()),
        batch(&heap, params, &linker) {}

  // Stores all; the first node of them.
  NodeId StoreAll(const TestVectors& data) {
    const NodeId first = stored;
    for (size_t i = 0; i < data.size(); ++i) Store(data[i]);
    return first;
  }
  BatchTarget TargetOfBatch() {
    CHECK(codes.rows().Reserve(stored), "room for codes");
    return {
        .graph = &graph, .vectors = Target(), .format = &format, .codes = &codes, .lists = &lists};
  }
  // In slices of `budget`, with `after_slice` between them.
  void LinkBatch(
      std::span<const NodeId> nodes, uint32_t budget = UINT32_MAX,
      const std::function<void()>& after_slice = [] {}) {
    CHECK(batch.Begin(TargetOfBatch(), nodes), "room for a batch");
    after_slice();
    while (!batch.Step(budget)) after_slice();
    after_slice();
  }
  // Stores all and links them in batches of `most`.
  void BuildInBatches(const TestVectors& data, size_t most, uint32_t budget = UINT32_MAX) {
    const NodeId first = StoreAll(data);
    for (size_t done = 0; done < data.size(); done += most) {
      LinkBatch(Range(first + static_cast<NodeId>(done), std::min(most, data.size() - done)),
                budget);
    }
  }
  // One by one, by a search that walks by codes.
  void LinkByCodes(NodeId node) {
    CHECK(codes.rows().Reserve(stored), "room for codes");
    std::vector<float> numbers(format.dimension());
    format.Decode(vectors.Row(node), numbers.data());
    codes.format().Encode(numbers.data(), codes.rows().Row(node));
    codes.format().EncodeQuery(numbers.data(), linker.walk_query());
    const SearchTarget walk = codes.TargetFor(&graph, linker.walk_query());
    CHECK(linker.Begin(&graph, Target(), node, &walk), "room for links");
    while (!linker.Step(UINT32_MAX)) {
    }
  }
  // Takes nodes that a sweep has taken out of the graph out of everything.
  void Forget(std::span<const NodeId> nodes) {
    for (const NodeId node : nodes) {
      lists.Remove(node);
      graph.Forget(node);
    }
  }

  static std::vector<NodeId> Range(NodeId first, size_t count) {
    std::vector<NodeId> nodes(count);
    for (size_t i = 0; i < count; ++i) nodes[i] = first + static_cast<NodeId>(i);
    return nodes;
  }
  std::string ListsViolation() const {
    const Result<void> checked = lists.CheckInvariants();
    return checked.has_value() ? "" : checked.error().message;
  }

  WalkCodes codes;
  InvertedLists lists;
  BatchLinker batch;
};

// All links of all levels, node by node.
inline std::vector<std::vector<NodeId>> LinksOf(const GraphFixture& fixture) {
  std::vector<std::vector<NodeId>> all;
  for (NodeId node = 0; node < fixture.stored; ++node) {
    if (!fixture.graph.IsLinked(node)) continue;
    for (uint32_t level = 0; level <= fixture.graph.Level(node); ++level) {
      std::vector<NodeId>& list = all.emplace_back();
      fixture.graph.ForEachLink(node, level, [&](NodeId link) { list.push_back(link); });
    }
  }
  return all;
}

}  // namespace engram
