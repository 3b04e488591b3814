#include "perf/runbook_run.h"

#include <algorithm>
#include <string>
#include <utility>

#include "perf/bench_support.h"
#include "tools/engramctl/recall_quality.h"

namespace engram {

namespace {

using Operation = RunbookStep::Operation;

// Between two rounds of the index.
constexpr int kBurst = 64;

// Runs `work`; its processor time in seconds.
template <typename Work>
double Timed(Work work) {
  const int64_t began_ns = ThreadCpuNs();
  work();
  return static_cast<double>(ThreadCpuNs() - began_ns) * 1e-9;
}

void Recall(StreamedIndex* index, const VectorSet& queries, size_t query, uint32_t k, uint32_t ef,
            std::vector<int64_t>* tags) {
  while (!index->Ask(queries, query, k, ef)) index->Poll();
  while (!index->TakeAnswer(tags)) index->Poll();
}

class Run {
 public:
  Run(const RunbookRunOptions& options, const JudgedRunbook& judged, StreamedIndex* index)
      : options_(options), judged_(judged), index_(index), live_(judged.tags) {
    figures_.recall_ns = std::make_unique<LatencyHistogram>();
  }

  RunbookFigures Go(const MakeFresh& fresh) {
    const Runbook& runbook = *judged_.runbook;
    for (size_t i = 0; i < runbook.steps.size(); ++i) {
      const RunbookStep& step = runbook.steps[i];
      if (step.operation == Operation::kSearch) {
        Search(i + 1, fresh);
      } else {
        Mutate(step);
      }
      if (10 * (i + 1) / runbook.steps.size() > 10 * i / runbook.steps.size()) {
        std::fprintf(stderr, "step %zu of %zu\n", i + 1, runbook.steps.size());
      }
    }
    figures_.rest_seconds = Timed([this] { index_->Rest(); });
    index_->CheckSound();
    FindAll();
    return std::move(figures_);
  }

 private:
  void Mutate(const RunbookStep& step) {
    const std::vector<Mutation> mutations = *live_.Take(*judged_.runbook, step);
    StepRate* const rate = step.operation == Operation::kInsert   ? &figures_.inserts
                           : step.operation == Operation::kDelete ? &figures_.deletes
                                                                  : &figures_.replaces;
    rate->count += mutations.size();
    rate->seconds += Timed([&] {
      ApplyAll(index_, *judged_.base, mutations);
      if (options_.rests) index_->Rest();
    });
  }

  void Search(size_t number, const MakeFresh& fresh) {
    const size_t search = figures_.searches.size();
    SearchFigures figures;
    figures.step = number;
    figures.live = live_.live();
    figures.waiting = index_->waiting();
    figures.recall = Measure(index_, search, true, &figures.recall_us);
    index_->StopClock();
    if (const auto other = fresh(search, live_.live())) {
      ApplyAll(other.get(), *judged_.base, live_.InOrder());
      other->Rest();
      double us = 0;
      figures.fresh_recall = Measure(other.get(), search, false, &us);
      figures.fresh_us = us;
    }
    index_->StartClock();
    figures_.searches.push_back(figures);
  }

  // recall@k of all queries. `counts`: into the figures of the whole run.
  double Measure(StreamedIndex* index, size_t search, bool counts, double* average_us) {
    const VectorSet& queries = *judged_.queries;
    const LiveTruth& truth = judged_.truths[search];
    std::vector<std::vector<int64_t>> answers(queries.size());
    int64_t spent_ns = 0;
    for (size_t query = 0; query < queries.size(); ++query) {
      const int64_t began_ns = ThreadCpuNs();
      Recall(index, queries, query, options_.k, options_.ef, &answers[query]);
      const int64_t ns = ThreadCpuNs() - began_ns;
      spent_ns += ns;
      if (counts) figures_.recall_ns->Record(ns);
    }
    // Judged when all is measured: it takes the caches.
    uint64_t hits = 0;
    for (size_t query = 0; query < queries.size(); ++query) {
      const Judged judged = Judge(*judged_.base, queries[query], options_.metric, live_.rows(),
                                  truth, query, answers[query]);
      hits += judged.hits;
      if (counts) figures_.dead_hits += judged.dead;
    }
    const auto asked = static_cast<double>(queries.size());
    *average_us = static_cast<double>(spent_ns) / 1e3 / asked;
    return static_cast<double>(hits) / (asked * options_.k);
  }

  void FindAll() {
    const uint32_t wider = std::min(options_.ef * RunbookFigures::kWider, kMaxEf);
    for (const Mutation& put : live_.InOrder()) {
      ++figures_.live;
      const bool found = Finds(put, options_.ef);
      figures_.found += static_cast<size_t>(found);
      figures_.found_wider += static_cast<size_t>(found || Finds(put, wider));
    }
  }

  // Whether it is found with its own vector.
  bool Finds(const Mutation& put, uint32_t ef) {
    std::vector<int64_t> tags;
    Recall(index_, *judged_.base, static_cast<size_t>(put.row), options_.k, ef, &tags);
    if (std::ranges::find(tags, int64_t{put.tag}) != tags.end()) return true;
    const std::span<const float> vector = (*judged_.base)[static_cast<size_t>(put.row)];
    const double own = ExactScore(options_.metric, vector, vector);
    const auto as_near = std::ranges::count_if(tags, [&](int64_t tag) {
      const int32_t row = live_.rows()[static_cast<size_t>(tag)];
      if (row == kNoRow) return false;
      const double score =
          ExactScore(options_.metric, vector, (*judged_.base)[static_cast<size_t>(row)]);
      return options_.metric == Metric::kL2 ? score <= own : score >= own - kScoreSlack;
    });
    return as_near == static_cast<ptrdiff_t>(options_.k);
  }

  // What double leaves of a cosine.
  static constexpr double kScoreSlack = 1e-12;

  const RunbookRunOptions& options_;
  const JudgedRunbook& judged_;
  StreamedIndex* const index_;
  LiveTags live_;
  RunbookFigures figures_;
};

}  // namespace

std::optional<double> StepRate::PerSecond() const {
  if (count == 0 || seconds == 0) return std::nullopt;
  return static_cast<double>(count) / seconds;
}

double RunbookFigures::AverageRecall() const {
  double sum = 0;
  for (const SearchFigures& search : searches) sum += search.recall;
  return searches.empty() ? 0 : sum / static_cast<double>(searches.size());
}

const SearchFigures* RunbookFigures::Worst() const {
  const auto worst = std::ranges::min_element(searches, {}, &SearchFigures::recall);
  return worst == searches.end() ? nullptr : &*worst;
}

double RunbookFigures::WorstGap(const SearchFigures** where) const {
  double worst = 0;
  *where = nullptr;
  for (const SearchFigures& search : searches) {
    if (!search.fresh_recall) continue;
    const double gap = *search.fresh_recall - search.recall;
    if (*where != nullptr && gap <= worst) continue;
    worst = gap;
    *where = &search;
  }
  return worst;
}

Result<JudgedRunbook> MakeJudged(const Runbook& runbook, const VectorSet& base,
                                 const VectorSet& queries, Metric metric, uint32_t k) {
  if (runbook.ids() > base.size()) {
    return Fail(ErrorCode::kInvalidArgument,
                runbook.file + ": names " + std::to_string(runbook.ids()) + " vectors, there are " +
                    std::to_string(base.size()));
  }
  JudgedRunbook judged{
      .runbook = &runbook, .base = &base, .queries = &queries, .truths = {}, .tags = runbook.ids()};
  LiveTags live(judged.tags);
  LiveTruths truths(base, queries, metric, k);
  for (const RunbookStep& step : runbook.steps) {
    if (auto taken = live.Take(runbook, step); !taken) return std::unexpected(taken.error());
    judged.most_live = std::max(judged.most_live, live.live());
    if (step.operation != Operation::kSearch) continue;
    if (live.live() < k) {
      return Fail(ErrorCode::kInvalidArgument,
                  runbook.file + ":" + std::to_string(step.line) + ": searches among " +
                      std::to_string(live.live()) + ", fewer than k; take a larger --count");
    }
    judged.truths.push_back(truths.Among(live.rows()));
  }
  return judged;
}

RunbookFigures RunRunbook(const RunbookRunOptions& options, const JudgedRunbook& judged,
                          StreamedIndex* index, const MakeFresh& fresh) {
  return Run(options, judged, index).Go(fresh);
}

void ApplyAll(StreamedIndex* index, const VectorSet& base, const std::vector<Mutation>& mutations) {
  const uint64_t visible = index->visible() + mutations.size();
  auto next = mutations.begin();
  while (index->visible() < visible) {
    for (int i = 0; i < kBurst && next != mutations.end() && index->Send(*next, base); ++i) ++next;
    index->Poll();
  }
}

}  // namespace engram
