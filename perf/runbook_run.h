#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "perf/live_tags.h"
#include "perf/runbook.h"
#include "perf/streamed_index.h"
#include "perf/vector_set.h"
#include "src/core/latency_histogram.h"
#include "src/core/observation.h"
#include "src/core/result.h"

namespace engram {

struct RunbookRunOptions {
  Metric metric = Metric::kCosine;
  uint32_t k = 10;
  uint32_t ef = 128;
  // What is done in the background is brought to its end behind each step, and counts for it. Else
  // the next step comes at once.
  bool rests = false;
};

// A runbook with what is needed to judge who runs it.
struct JudgedRunbook {
  const Runbook* runbook = nullptr;
  const VectorSet* base = nullptr;  // rows are the runbook's ids
  const VectorSet* queries = nullptr;
  std::vector<LiveTruth> truths;  // by search
  size_t most_live = 0;
  uint64_t tags = 0;
};
// Computes the truths. Errors: kInvalidArgument naming file and line of a step that does not fit to
// those before, or that searches among fewer than `k`.
Result<JudgedRunbook> MakeJudged(const Runbook& runbook, const VectorSet& base,
                                 const VectorSet& queries, Metric metric, uint32_t k);

// Observations of one kind, and the processor time that they took.
struct StepRate {
  uint64_t count = 0;
  double seconds = 0;
  std::optional<double> PerSecond() const;
};

struct SearchFigures {
  size_t step = 0;  // of the runbook, from 1
  size_t live = 0;
  double recall = 0;
  double recall_us = 0;                // processor time, on average
  std::optional<double> fresh_recall;  // of an index that was built of what lived then
  std::optional<double> fresh_us;
  StreamedIndex::Waiting waiting;  // when the search began
};

struct RunbookFigures {
  StepRate inserts;
  StepRate replaces;
  StepRate deletes;
  std::vector<SearchFigures> searches;
  std::unique_ptr<LatencyHistogram> recall_ns;  // of all searches
  uint64_t dead_hits = 0;                       // answers that did not live
  double rest_seconds = 0;                      // behind the last step
  // At the end, after a rest: of what lives, how many are found when they are asked for: as one of
  // the k, or where k others are as near; and how many at latest when they are asked for again with
  // kWider times the ef.
  static constexpr uint32_t kWider = 8;
  size_t live = 0;
  size_t found = 0;
  size_t found_wider = 0;

  double AverageRecall() const;
  const SearchFigures* Worst() const;
  // How far a search's recall lies below that of the fresh index at most, and where; nullptr and 0
  // where none was built.
  double WorstGap(const SearchFigures** where) const;
};

// Runs the runbook on an empty index. `fresh`: an index for comparison at some searches, asked for
// by the number of the search from 0 and what lives then; nullptr: none then.
using MakeFresh = std::function<std::unique_ptr<StreamedIndex>(size_t search, size_t live)>;
RunbookFigures RunRunbook(const RunbookRunOptions& options, const JudgedRunbook& judged,
                          StreamedIndex* index, const MakeFresh& fresh);

// Sends these, and waits until recalls see them.
void ApplyAll(StreamedIndex* index, const VectorSet& base, const std::vector<Mutation>& mutations);

}  // namespace engram
