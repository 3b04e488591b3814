#include "perf/peer_comparison.h"

#include <time.h>

#include <algorithm>
#include <cstdio>

#include "perf/bench_support.h"
#include "src/core/check.h"

namespace engram {

namespace {

// Enough for every code path of an insert: more than a space keeps without a graph.
constexpr size_t kWarmUpRows = 5'000;
constexpr size_t kQueryBlock = 100;

double SecondsOf(clockid_t clock) {
  timespec now{};
  CHECK(clock_gettime(clock, &now) == 0, "the clock can be read");
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Runs `work`; returns the processor time that it took, in seconds, and adds to `share`.
template <typename Work>
double Measure(MachineShare* share, Work work) {
  const double began = SecondsOf(CLOCK_MONOTONIC);
  const double began_processor = SecondsOf(CLOCK_THREAD_CPUTIME_ID);
  work();
  const double seconds = SecondsOf(CLOCK_THREAD_CPUTIME_ID) - began_processor;
  share->processor_seconds += seconds;
  share->seconds += SecondsOf(CLOCK_MONOTONIC) - began;
  return seconds;
}

// Calls `turn` for each contender, beginning with another one each time.
template <typename Turn>
void TakeTurns(std::vector<Contender>* contenders, size_t time, Turn turn) {
  for (size_t i = 0; i < contenders->size(); ++i) {
    turn(&(*contenders)[(time + i) % contenders->size()]);
  }
}

}  // namespace

size_t Contender::Linked() const {
  size_t linked = 0;
  for (const Chunk& chunk : chunks) linked += chunk.linked;
  return linked;
}

std::optional<double> Contender::InsertsPerSecond() const {
  double seconds = 0;
  for (const Chunk& chunk : chunks) seconds += chunk.seconds;
  if (Linked() == 0) return std::nullopt;
  return static_cast<double>(Linked()) / seconds;
}

MachineShare MeasureInserts(const ComparisonOptions& options, const VectorSet& base,
                            std::vector<Contender>* contenders) {
  WarmUpAndMake(base, contenders);
  return MeasureInsertsOf(options, base, 0, base.size(), contenders);
}

void WarmUpAndMake(const VectorSet& base, std::vector<Contender>* contenders) {
  for (size_t i = 0; i < std::min<size_t>(2, contenders->size()); ++i) {
    (*contenders)[i].make()->Insert(base, 0, std::min(kWarmUpRows, base.size()));
  }
  for (Contender& contender : *contenders) contender.index = contender.make();
}

MachineShare MeasureInsertsOf(const ComparisonOptions& options, const VectorSet& base, size_t first,
                              size_t last, std::vector<Contender>* contenders) {
  MachineShare share;
  size_t tenths = 10 * first / base.size();
  while (first < last) {
    const size_t end = std::min(first + options.chunk, last);
    TakeTurns(contenders, first / options.chunk, [&](Contender* contender) {
      const size_t linked = contender->index->linked();
      const double seconds = Measure(&share, [&] { contender->index->Insert(base, first, end); });
      contender->chunks.push_back({contender->index->linked() - linked, seconds});
    });
    if (10 * end / base.size() > tenths) {
      tenths = 10 * end / base.size();
      std::fprintf(stderr, "inserted %zu of %zu\n", end, base.size());
    }
    first = end;
  }
  return share;
}

MachineShare MeasureRecalls(const ComparisonOptions& options, const VectorSet& base,
                            const VectorSet& queries, const ExactTruth& truth,
                            std::vector<Contender>* contenders) {
  MachineShare share;
  std::vector<int64_t> rows(queries.size() * options.k);
  for (const uint32_t ef : options.efs) {
    std::vector<std::vector<double>> seconds(contenders->size());
    TakeTurns(contenders, 0, [&](Contender* contender) {
      contender->index->Recall(queries, 0, queries.size(), options.k, ef, rows.data());
      const double recall = RecallAtK(base, queries, truth, options.metric, rows);
      contender->curve.push_back({.ef = ef, .recall = recall, .recalls_per_s = 0});
    });
    size_t turn = 0;
    for (int round = 0; round < options.rounds; ++round) {
      for (auto& of_contender : seconds) of_contender.push_back(0);
      for (size_t first = 0; first < queries.size(); first += kQueryBlock, ++turn) {
        const size_t last = std::min(first + kQueryBlock, queries.size());
        TakeTurns(contenders, turn, [&](Contender* contender) {
          seconds[static_cast<size_t>(contender - contenders->data())].back() += Measure(
              &share,
              [&] { contender->index->Recall(queries, first, last, options.k, ef, rows.data()); });
        });
      }
    }
    for (size_t i = 0; i < contenders->size(); ++i) {
      (*contenders)[i].curve.back().recalls_per_s =
          static_cast<double>(queries.size()) / Median(seconds[i]);
    }
    std::fprintf(stderr, "recalled with ef %u\n", ef);
  }
  return share;
}

}  // namespace engram
