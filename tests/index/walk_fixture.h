#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "index/graph_walk.h"
#include "index/rabitq_format.h"
#include "index/walk_codes.h"
#include "src/core/check.h"
#include "tests/index/graph_fixture.h"

namespace engram {

// A walk to its end, in slices of `slice` distances.
template <typename IsLive>
std::vector<Neighbour> WalkGraph(const SearchTarget& target, uint32_t k, uint32_t ef,
                                 IsLive is_live, WalkScratch* scratch,
                                 uint64_t slice = UINT64_MAX / 2) {
  GraphWalk<IsLive> walk(is_live);
  walk.Begin(target, k, ef, scratch);
  while (!walk.Step(slice)) {
  }
  std::vector<Neighbour> found(k);
  found.resize(walk.TakeResults(found));
  return found;
}

inline std::vector<std::pair<float, NodeId>> PairsOf(const std::vector<Neighbour>& found) {
  std::vector<std::pair<float, NodeId>> pairs;
  for (const Neighbour& neighbour : found) pairs.emplace_back(neighbour.distance, neighbour.node);
  return pairs;
}

// A graph of exact distances and, of the same vectors, codes to walk it with.
class WalkFixture : public GraphFixture {
 public:
  WalkFixture(Metric metric, uint32_t dimension, const HnswBuildParams& params,
              Precision precision = Precision::kF32)
      : GraphFixture(metric, dimension, params, size_t{512} << 20, precision),
        walk_scratch(&heap) {}

  void Build(const TestVectors& data) {
    GraphFixture::Build(data);
    CHECK(walk_scratch.Reserve(stored), "room for walks");
  }
  void EncodeCodes(const TestVectors& data) {
    std::vector<float> centroid(data.dimension);
    for (size_t i = 0; i < data.size(); ++i) {
      for (uint32_t d = 0; d < data.dimension; ++d) {
        centroid[d] += data[i][d] / static_cast<float>(data.size());
      }
    }
    codes = std::make_unique<WalkCodes>(
        &heap, RabitqFormat::Create(format.metric(), data.dimension, centroid.data(), 7, &heap));
    CHECK(codes->rows().Reserve(data.size() + 1), "room for codes");
    for (size_t i = 0; i < data.size(); ++i) {
      codes->format().Encode(data[i].data(), codes->rows().Row(static_cast<NodeId>(i)));
    }
    code_query = heap.Allocate(codes->format().query_bytes());
  }
  SearchTarget CodeTarget(std::span<const float> query) {
    codes->format().EncodeQuery(query.data(), code_query);
    return codes->TargetFor(&graph, code_query);
  }
  std::vector<Neighbour> Walk(std::span<const float> query, uint32_t k, uint32_t ef) {
    return WalkGraph(Target(query), k, ef, AllLive(), &walk_scratch);
  }

  WalkScratch walk_scratch;
  std::unique_ptr<WalkCodes> codes;
  std::byte* code_query = nullptr;
};

// How many are as near as `bound`.
inline double HitsAmong(const std::vector<Neighbour>& found, float bound) {
  return static_cast<double>(std::count_if(
      found.begin(), found.end(), [bound](const Neighbour& n) { return n.distance <= bound; }));
}

}  // namespace engram
