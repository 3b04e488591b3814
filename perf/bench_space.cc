#include "perf/bench_space.h"

#include "perf/bench_support.h"
#include "src/core/check.h"
#include "src/core/observation.h"

namespace engram {

namespace {

size_t ArenaBytes(size_t rows, uint32_t dimension) {
  constexpr size_t kRowOverheadBytes = 1'536;
  return (size_t{320} << 20) + rows * (size_t{dimension} * 5 + kRowOverheadBytes) * 5 / 4;
}

}  // namespace

BenchSpace::BenchSpace(const SpaceOptions& options, size_t rows)
    : options_(options),
      arena_(Must(HugePageArena::Create({.reserve_bytes = ArenaBytes(rows, options.dimension)}))),
      heap_(&arena_),
      space_("bench", options, &heap_, &epochs_),
      linker_(&heap_, options.build, BatchLinker::kMaxBatch) {}

void BenchSpace::Store(const std::byte* vector, int64_t when_ns, const std::string& attributes) {
  const size_t row = space_.node_count();
  const std::string id = std::to_string(row);
  ObservationRef observation;
  observation.id = id;
  observation.dtype = VectorDtype::kF32;
  observation.dimension = options_.dimension;
  observation.vector = vector;
  observation.when_ns = when_ns;
  observation.attributes = std::as_bytes(std::span<const char>(attributes));
  const StoreOutcome outcome = space_.Upsert(observation, row + 1);
  CHECK(outcome.reason == RefusalReason::kNone && outcome.node == row, "a row was refused");
}

void BenchSpace::LinkAll() {
  while (linker_.Begin(&space_) == SpaceLinker::Begun::kStarted) {
    while (!linker_.Step(kSliceDistances)) {
    }
  }
}

BenchSpace::Compared BenchSpace::CompareWith(const std::byte* query) {
  const WalkCodes* codes = nullptr;
  const Space::QueryForms forms{.code = forms_.code, .exact = forms_.exact, .walk = nullptr};
  CHECK(space_.PrepareQuery(VectorDtype::kF32, options_.dimension, 1, query, &codes, forms) ==
            RefusalReason::kNone,
        "a query was refused");
  Compared compared{.by_int8 = space_.TargetFor(forms.code), .exact = {}};
  if (space_.has_exact()) compared.exact = space_.ExactTargetFor(forms.exact);
  return compared;
}

}  // namespace engram
