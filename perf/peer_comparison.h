#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "perf/compared_index.h"
#include "perf/recall_curve.h"
#include "perf/vector_set.h"
#include "src/core/observation.h"

namespace engram {

// One index under comparison and what was measured of it.
struct Contender {
  std::string name;
  uint32_t M = 0;
  uint32_t ef_construction = 0;
  std::function<std::unique_ptr<ComparedIndex>()> make;

  // Measured.
  std::unique_ptr<ComparedIndex> index{};
  struct Chunk {
    size_t linked = 0;   // rows that were linked in it
    double seconds = 0;  // storing and linking
  };
  std::vector<Chunk> chunks{};
  RecallCurve curve{};

  // Rows that the chunks linked.
  size_t Linked() const;
  // The same a second; nothing while nothing was linked.
  std::optional<double> InsertsPerSecond() const;
};

struct ComparisonOptions {
  Metric metric = Metric::kCosine;
  uint32_t k = 10;
  size_t chunk = 1'000;  // rows that one contender inserts in its turn
  int rounds = 5;
  std::vector<uint32_t> efs = {10, 16, 24, 32, 48, 64, 96, 128, 200, 400, 600};
};

// How quiet the machine was: processor time over time, of what was measured.
struct MachineShare {
  double processor_seconds = 0;
  double seconds = 0;
};

// Measures all contenders on the same vectors in the same order, on this thread. Rates are by the
// thread's processor time, so that a processor which others use too lengthens no measurement by the
// time that it was theirs; what they cost in caches and memory hits all alike, because:
// 1. Warm-up: each of the first two contenders is built over some rows and thrown away.
// 2. Inserts: each contender inserts a chunk, then each the next one. The order turns by one place
//    from chunk to chunk.
// 3. Recalls: for each ef, each contender answers all queries once unmeasured, which gives its
//    recall@k; then in each of `rounds` rounds the contenders take turns, a block of queries each.
//    Recalls/s is the median of the rounds.
// Writes its progress to standard error.
MachineShare MeasureInserts(const ComparisonOptions& options, const VectorSet& base,
                            std::vector<Contender>* contenders);
// Steps 1 and 2 on their own: the contenders are made, then they insert rows `first` to `last` - 1.
void WarmUpAndMake(const VectorSet& base, std::vector<Contender>* contenders);
MachineShare MeasureInsertsOf(const ComparisonOptions& options, const VectorSet& base, size_t first,
                              size_t last, std::vector<Contender>* contenders);
MachineShare MeasureRecalls(const ComparisonOptions& options, const VectorSet& base,
                            const VectorSet& queries, const ExactTruth& truth,
                            std::vector<Contender>* contenders);

}  // namespace engram
