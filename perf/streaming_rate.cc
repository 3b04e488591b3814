// streaming_rate: what a shard takes in a second while it is asked, by the clock (open loop).
//
//   streaming_rate --data BASE --queries Q [--metric cosine|ip|l2] [--rate N] [--recalls-per-s N]
//                  [--seconds N] [--preload N] [--grow] [--ef N] [--dir D] [--slices]
//                  [--lost-to N] [--json]
//
// The shard has a thread and a processor of its own; this program's main thread is client and
// ingress core. The set's rows come again and again, each turn with the ids moved on: once it has
// all, each observation replaces another one, and the space neither grows nor stays as it is. With
// --grow all are new instead: rows of the set and, beyond, rows like them (perf/grown_set.h); then
// --rows should be some 40,000, as each row of the set is compared with all others. With --dir the
// shard logs there and acknowledges once it is durable; without it has no log.
//
// 1. `preload` rows are stored and linked; by default all of the set, or 20,000 with --grow.
// 2. loaded: `rate` observations/s and `recalls-per-s` recalls/s for `seconds`.
// 3. at rest, as loaded: the same recalls alone, one after the other, on the index as it is then.
// 4. drained: until all is linked, with the same recalls.
// 5. idle: the same recalls, with nothing to link.
// With --lost-to N instead of 2 and 3: as many observations as credit allows, in turns without and
// with N recalls/s, and what such a recall takes of the processor alone, before and after.
//
// recall@10 of sampled recalls is against the exact ten of what lived and was acknowledged when the
// recall was sent. `found own`: of recalls that ask for the observation that was acknowledged last,
// how many have it first. Latencies count from when the schedule wanted it done.

#include <unistd.h>
#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "index/distance.h"
#include "index/recall_job.h"
#include "perf/bench_inputs.h"
#include "perf/bench_support.h"
#include "perf/grown_set.h"
#include "perf/streaming_feed.h"
#include "src/core/check.h"
#include "tools/engramctl/table.h"

namespace engram {

namespace {

using Json = nlohmann::ordered_json;

constexpr uint32_t kNearest = 10;
constexpr size_t kRowsAtOnce = 256;
constexpr uint32_t kOwnEvery = 20;

struct Options {
  BenchInputs inputs;
  double rate = 60'000;
  double recalls_per_s = 500;
  double seconds = 60;
  uint64_t rows = UINT32_MAX;
  uint64_t preload = 0;
  bool grow = false;
  uint32_t ef = 128;
  std::string dir;
  bool slices = false;
  double lost_to = 0;
  double turn_s = 4;
  uint64_t samples = 200;
  uint64_t waiting_limit = ShardOptions().waiting_limit;
};

void AddOptions(CLI::App* app, Options* options) {
  options->inputs.precision = "int8";
  AddInputOptions(app, &options->inputs);
  app->add_option("--rate", options->rate, "Observations a second")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--recalls-per-s", options->recalls_per_s)
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--seconds", options->seconds, "Under load")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_flag("--grow", options->grow, "All observations are new ones");
  app->add_option("--rows", options->rows, "Of the set")->check(CLI::Range(kNearest, UINT32_MAX));
  app->add_option("--preload", options->preload, "Rows that are linked before")
      ->check(CLI::Range(SpaceOptions::kGraphFrom + 1, UINT32_MAX));
  app->add_option("--ef", options->ef)->check(CLI::PositiveNumber)->capture_default_str();
  app->add_option("--dir", options->dir, "Where the log lies; default: no log");
  app->add_option("--waiting-limit", options->waiting_limit, "As ShardOptions")
      ->capture_default_str();
  app->add_option("--samples", options->samples, "Recalls of a phase that are judged")
      ->capture_default_str();
  app->add_option("--lost-to", options->lost_to, "Recalls a second: the rate that they cost");
  app->add_option("--turn-s", options->turn_s, "Of --lost-to, and of phase 5")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_flag("--slices", options->slices, "Time the shard's slices, in processor time");
}

// A phase with what was found out about its recalls.
struct Line {
  std::string name;
  std::unique_ptr<FeedPhase> phase;
  double recall_at_10 = NAN;
  double found_own = NAN;
};

// The sampled recalls of all phases, by the exact answers.
class Judge {
 public:
  Judge(const VectorSet& queries, Metric metric)
      : queries_(queries), distance_(DistanceFunction(Precision::kF32, metric)) {}

  // Each row is made once. Observations are rows by their numbers, and ids too.
  void FillGrown(const GrownRows& rows, std::vector<Line>* lines) const {
    std::vector<Asked> all = Sampled(lines);
    uint64_t most = 0;
    for (const Asked& asked : all) most = std::max(most, asked.recall->lived);
    VectorSet some = VectorSet::Zeros(kRowsAtOnce, queries_.dimension());
    for (uint64_t first = 0; first < most; first += kRowsAtOnce) {
      const uint64_t end = std::min<uint64_t>(most, first + kRowsAtOnce);
      for (uint64_t row = first; row < end; ++row) rows.Make(row, some.Row(row - first));
      for (Asked& asked : all) {
        for (uint64_t row = first; row < std::min(end, asked.recall->lived); ++row) {
          Offer(Distance(asked.recall->query, some, row - first), &asked.nearest);
        }
      }
    }
    Count(all, lines,
          [&](const AnsweredRecall&, uint64_t id, std::span<float> row) { rows.Make(id, row); });
  }

  void FillReplaced(const ReplacingFeed& feed, const VectorSet& rows,
                    std::vector<Line>* lines) const {
    std::vector<Asked> all = Sampled(lines);
    for (Asked& asked : all) {
      const uint64_t lived = asked.recall->lived;
      for (uint64_t id = 0; id < std::min<uint64_t>(rows.size(), lived); ++id) {
        Offer(Distance(asked.recall->query, rows, feed.RowOf(feed.NumberOf(id, lived))),
              &asked.nearest);
      }
    }
    Count(all, lines, [&](const AnsweredRecall& recall, uint64_t id, std::span<float> row) {
      feed.Make(feed.NumberOf(id, recall.lived), row);
    });
  }

 private:
  struct Asked {
    const AnsweredRecall* recall;
    Line* line;
    std::vector<float> nearest;  // a heap of distances
  };

  std::vector<Asked> Sampled(std::vector<Line>* lines) const {
    std::vector<Asked> all;
    for (Line& line : *lines) {
      for (const AnsweredRecall& recall : line.phase->sampled) {
        if (recall.own == kNoId && recall.lived >= kNearest) all.push_back({&recall, &line, {}});
      }
    }
    return all;
  }
  // What is as near as the tenth counts as found. `make_row` makes what an id was for a recall.
  template <typename MakeRow>
  void Count(const std::vector<Asked>& all, std::vector<Line>* lines,
             const MakeRow& make_row) const {
    constexpr float kRounding = 1e-6F;
    VectorSet made = VectorSet::Zeros(2, queries_.dimension());
    for (Line& line : *lines) {
      size_t judged = 0;
      size_t found = 0;
      for (const Asked& asked : all) {
        if (asked.line != &line) continue;
        ++judged;
        size_t hits = 0;
        for (const uint64_t id : asked.recall->hits) {
          make_row(*asked.recall, id, made.Row(0));
          hits += static_cast<size_t>(Distance(asked.recall->query, made, 0) <=
                                      asked.nearest.front() + kRounding);
        }
        found += std::min<size_t>(hits, kNearest);
      }
      if (judged > 0) {
        line.recall_at_10 = static_cast<double>(found) / static_cast<double>(judged * kNearest);
      }
      size_t own = 0;
      size_t own_first = 0;
      for (const AnsweredRecall& recall : line.phase->sampled) {
        if (recall.own == kNoId) continue;
        ++own;
        if (recall.hits.empty()) continue;
        // The set has exact duplicates.
        make_row(recall, recall.own, made.Row(0));
        make_row(recall, recall.hits[0], made.Row(1));
        own_first += static_cast<size_t>(std::ranges::equal(made[0], made[1]));
      }
      if (own > 0) line.found_own = static_cast<double>(own_first) / static_cast<double>(own);
    }
  }

  float Distance(size_t query, const VectorSet& rows, size_t row) const {
    return distance_(queries_.Bytes(query), rows.Bytes(row), queries_.padded_dimension());
  }
  static void Offer(float distance, std::vector<float>* nearest) {
    if (nearest->size() == kNearest) {
      if (distance >= nearest->front()) return;
      std::ranges::pop_heap(*nearest);
      nearest->pop_back();
    }
    nearest->push_back(distance);
    std::ranges::push_heap(*nearest);
  }

  const VectorSet& queries_;
  const DistanceFn distance_;
};

// Recalls alone on an index that nothing changes.
struct Alone {
  double us = 0;  // of the processor, on average
  double vectors = 0;
  double bytes = 0;
};

class Bench {
 public:
  Bench(const Options& options, const LoadedSets& sets)
      : options_(options),
        sets_(sets),
        metric_(MetricOfName(options.inputs.metric)),
        replaced_(sets.base),
        heap_arena_(Must(HugePageArena::Create({.reserve_bytes = size_t{1} << 30}))),
        heap_(&heap_arena_),
        feed_(FeedOptionsOf(), FedOf(), sets.queries) {}

  void Run() {
    feed_.Preload(preload());
    if (options_.lost_to > 0) {
      MeasureLoss();
      return;
    }
    Add("loaded", feed_.Run(Recalls(options_.rate, options_.seconds)));
    feed_.WithShardAtRest([this](const Shard& shard) { at_rest_ = RecallAlone(shard); });
    auto drain = Recalls(0, 0);
    drain.is_done = [this] { return feed_.IsDrained(); };
    Add("drained", feed_.Run(drain));
    Add("idle", feed_.Run(Recalls(0, 2 * options_.turn_s)));
    feed_.WithShardAtRest([this](const Shard& shard) {
      linked_ = RecallAlone(shard);
      // Millions of rows are compared: the shard's thread would only take time from that.
      const Judge judge(sets_.queries, metric_);
      if (grown_) {
        judge.FillGrown(*grown_, &lines_);
      } else {
        judge.FillReplaced(replaced_, sets_.base, &lines_);
      }
    });
  }

  void Print() const {
    if (options_.lost_to > 0) {
      PrintLoss();
    } else if (options_.inputs.json) {
      PrintJson();
    } else {
      PrintTable();
    }
  }

 private:
  FeedOptions FeedOptionsOf() const {
    FeedOptions feed;
    feed.space = SpaceOf(options_.inputs, sets_.base.dimension());
    feed.shard.traversal = feed.space.traversal;
    feed.shard.default_ef = options_.ef;
    feed.shard.waiting_limit = options_.waiting_limit;
    feed.shard.grow_partition_at = 0;
    feed.k = kNearest;
    feed.times_slices = options_.slices;
    if (!options_.dir.empty()) {
      feed.folder = options_.dir + "/streaming_rate." + std::to_string(getpid());
    }
    const double seconds = options_.lost_to > 0 ? 7 * options_.turn_s : options_.seconds;
    const double rate = options_.lost_to > 0 ? 200'000 : options_.rate;
    const double rows = options_.grow ? static_cast<double>(preload()) + seconds * rate
                                      : 4 * static_cast<double>(sets_.base.size());
    feed.shard.memory_limit_bytes =
        (size_t{512} << 20) + static_cast<size_t>(rows) * BytesARow(sets_.base.dimension());
    return feed;
  }
  const FedRows& FedOf() {
    if (!options_.grow) return replaced_;
    grown_.emplace(sets_.base, GrowthOptions{.metric = metric_, .seed = options_.inputs.seed});
    growing_.emplace(*grown_);
    return *growing_;
  }
  uint64_t preload() const {
    if (options_.preload > 0) return options_.preload;
    return options_.grow ? 20'000 : sets_.base.size();
  }
  // As rows of int8 take it, and room for what is kept besides.
  size_t BytesARow(size_t dimension) const {
    const size_t kept = options_.inputs.precision == "int8"   ? 0
                        : options_.inputs.precision == "bf16" ? 2 * dimension
                                                              : 4 * dimension;
    return kept + std::max<size_t>(2 * dimension, 512);
  }

  StreamingFeed::Schedule Recalls(double rate, double seconds) const {
    return {.observations_per_s = rate,
            .recalls_per_s = options_.recalls_per_s,
            .seconds = seconds,
            .samples = options_.samples,
            .own_every = kOwnEvery};
  }
  void Add(const char* name, std::unique_ptr<FeedPhase> phase) {
    lines_.push_back({.name = name, .phase = std::move(phase)});
  }

  Alone RecallAlone(const Shard& shard) {
    const Space& space = *shard.FindSpace(StreamingFeed::kSpaceName);
    RecallJob job(&heap_, nullptr, RecallJob::Core::kOfShard);
    std::vector<std::byte> slot(kResultSlotBytes);
    const size_t count = std::min<size_t>(sets_.queries.size(), 500);
    const auto recall = [&](size_t query) {
      RecallRequest request;
      request.dtype = VectorDtype::kF32;
      request.dimension = static_cast<uint16_t>(sets_.queries.dimension());
      request.k = kNearest;
      const RefusalReason reason =
          job.Begin(space, request, sets_.queries.Bytes(query), options_.ef);
      CHECK(reason == RefusalReason::kNone, "no recall is refused");
      while (!job.Search(UINT32_MAX)) {
      }
      while (!job.EmitBatch(std::span(slot).first(job.NextBatchBytes(slot.size())))) {
      }
    };
    for (size_t query = 0; query < count; query += 10) recall(query);
    const RecallJob::Work before = job.work();
    const int64_t began_ns = ThreadCpuNs();
    for (size_t query = 0; query < count; ++query) recall(query);
    const auto each = [count](uint64_t sum) {
      return static_cast<double>(sum) / static_cast<double>(count);
    };
    return {.us = each(static_cast<uint64_t>(ThreadCpuNs() - began_ns)) / 1'000,
            .vectors = each(job.work().vectors - before.vectors),
            .bytes = each(job.work().bytes - before.bytes)};
  }

  // Both what is taken without recalls and what a recall takes alone are measured before and after,
  // as they change with the backlog.
  void MeasureLoss() {
    const auto alone = [this] {
      double us = 0;
      feed_.WithShardAtRest([&](const Shard& shard) { us = RecallAlone(shard).us; });
      return us;
    };
    StreamingFeed::Schedule schedule = Recalls(StreamingFeed::kAsCreditAllows, options_.turn_s);
    schedule.recalls_per_s = 0;
    without_.push_back(RateOf(*feed_.Run(schedule)));
    for (int turn = 0; turn < 3; ++turn) {
      const double before_us = alone();
      schedule.recalls_per_s = options_.lost_to;
      const std::unique_ptr<FeedPhase> with = feed_.Run(schedule);
      alone_.push_back((before_us + alone()) / 2);
      with_.push_back(RateOf(*with));
      recalls_.push_back(static_cast<double>(with->recalls) / with->seconds);
      backlogs_.push_back(with->backlog);
      schedule.recalls_per_s = 0;
      without_.push_back(RateOf(*feed_.Run(schedule)));
    }
  }
  static double RateOf(const FeedPhase& phase) {
    return static_cast<double>(phase.accepted) / phase.seconds;
  }

  void PrintLoss() const {
    for (size_t turn = 0; turn < with_.size(); ++turn) {
      const double without = (without_[turn] + without_[turn + 1]) / 2;
      const double lost = 1 - with_[turn] / without;
      const double alone_us = alone_[turn];
      const double alone = alone_us * recalls_[turn] * 1e-6;
      const char* format =
          options_.inputs.json
              ? "{\"accepted_per_s\": %.0f, \"accepted_per_s_with_recalls\": %.0f, "
                "\"recalls_per_s\": %.0f, \"lost\": %.4f, \"us_a_recall_alone\": %.1f, "
                "\"core_time_alone\": %.4f, \"backlog\": %llu}\n"
              : "accepted/s %.0f, with recalls %.0f (%.0f recalls/s): lost %.3f; a recall alone "
                "%.1f us, so %.3f of the core; backlog %llu\n";
      std::printf(format, without, with_[turn], recalls_[turn], lost, alone_us, alone,
                  static_cast<unsigned long long>(backlogs_[turn]));
    }
  }

  static double Us(int64_t ns) { return static_cast<double>(ns) / 1'000; }
  void PrintJson() const {
    Json json;
    for (const Line& line : lines_) {
      const FeedPhase& p = *line.phase;
      Json of;
      of["seconds"] = FourDigits(p.seconds);
      of["accepted_per_s"] = FourDigits(RateOf(p));
      of["accepted"] = p.accepted;
      of["due"] = p.due;
      of["linked"] = p.linked;
      of["backlog"] = p.backlog;
      of["memory_bytes"] = p.memory_bytes;
      of["recalls"] = p.recalls;
      of["recall_at_10"] = line.recall_at_10;
      of["found_own"] = line.found_own;
      of["recall_p50_us"] = Us(p.recall.QuantileNs(0.5));
      of["recall_p99_us"] = Us(p.recall.QuantileNs(0.99));
      of["visible_p50_us"] = Us(p.visible.QuantileNs(0.5));
      of["visible_p99_us"] = Us(p.visible.QuantileNs(0.99));
      of["vectors_a_recall"] = FourDigits(PerRecall(p, p.recall_vectors));
      of["bytes_a_recall"] = FourDigits(PerRecall(p, p.recall_bytes));
      if (options_.slices) {
        of["slice_p999_us"] = Us(p.slice.QuantileNs(0.999));
        of["slice_longest_us"] = Us(p.slice.QuantileNs(1));
      }
      json[line.name] = of;
    }
    json["at_rest"] = AloneJson(at_rest_);
    json["idle_alone"] = AloneJson(linked_);
    std::printf("%s\n", json.dump().c_str());
  }
  static Json AloneJson(const Alone& alone) {
    return {{"us_a_recall", FourDigits(alone.us)},
            {"vectors_a_recall", FourDigits(alone.vectors)},
            {"bytes_a_recall", FourDigits(alone.bytes)}};
  }
  static double PerRecall(const FeedPhase& phase, uint64_t sum) {
    return phase.recalls == 0 ? 0 : static_cast<double>(sum) / static_cast<double>(phase.recalls);
  }

  void PrintTable() const {
    std::printf("%-9s %7s %10s %10s %10s %9s %9s %7s %9s %9s %8s %8s %8s %8s %8s %8s\n", "phase",
                "s", "accepted/s", "due/s", "backlog", "memory", "recall@10", "own", "recall", "",
                "visible", "", "vectors", "KiB", "slice", "");
    std::printf("%-9s %7s %10s %10s %10s %9s %9s %7s %9s %9s %8s %8s %8s %8s %8s %8s\n", "", "", "",
                "", "", "MiB", "", "first", "P50 us", "P99 us", "P50 us", "P99 us", "a recall",
                "a recall", "P99.9 us", "most us");
    for (const Line& line : lines_) {
      const FeedPhase& p = *line.phase;
      std::printf(
          "%-9s %7.1f %10.0f %10.0f %10llu %9.0f %9.4f %7.4f %9.0f %9.0f %8.0f %8.0f "
          "%8.0f %8.0f %8.0f %8.0f\n",
          line.name.c_str(), p.seconds, RateOf(p), static_cast<double>(p.due) / p.seconds,
          static_cast<unsigned long long>(p.backlog),
          static_cast<double>(p.memory_bytes) / (1 << 20), line.recall_at_10, line.found_own,
          Us(p.recall.QuantileNs(0.5)), Us(p.recall.QuantileNs(0.99)),
          Us(p.visible.QuantileNs(0.5)), Us(p.visible.QuantileNs(0.99)),
          PerRecall(p, p.recall_vectors), PerRecall(p, p.recall_bytes) / 1'024,
          Us(p.slice.QuantileNs(0.999)), Us(p.slice.QuantileNs(1)));
    }
    for (const auto& [name, alone] :
         {std::pair("as loaded, at rest", at_rest_), std::pair("linked, at rest", linked_)}) {
      std::printf("%s: %.0f us of the processor a recall, %.0f vectors, %.0f KiB\n", name, alone.us,
                  alone.vectors, alone.bytes / 1'024);
    }
  }

  const Options options_;
  const LoadedSets& sets_;
  const Metric metric_;
  const ReplacingFeed replaced_;
  std::optional<GrownRows> grown_;  // with --grow
  std::optional<GrowingFeed> growing_;
  HugePageArena heap_arena_;
  ArenaHeap heap_;
  StreamingFeed feed_;
  std::vector<Line> lines_;
  Alone at_rest_;
  Alone linked_;
  std::vector<double> alone_;
  std::vector<double> without_;
  std::vector<double> with_;
  std::vector<double> recalls_;
  std::vector<uint64_t> backlogs_;
};

Result<void> RunAll(const Options& options) {
  auto sets = LoadSets(options.inputs, options.rows, kNearest);
  if (!sets) return std::unexpected(sets.error());
  Bench bench(options, *sets);
  bench.Run();
  bench.Print();
  return {};
}

}  // namespace

}  // namespace engram

int main(int argc, char** argv) {
  CLI::App app("What a shard takes in a second while it is asked");
  engram::Options options;
  engram::AddOptions(&app, &options);
  return engram::RunBench(&app, argc, argv, "streaming_rate",
                          [&options] { return engram::RunAll(options); });
}
