// streaming_schedule: inserts at a fixed rate, and recalls meanwhile, as VectorDBBench's streaming
// case has it: on this project's shard and on hnswlib, one thread each.
//
//   streaming_schedule --data BASE --queries Q [--count N] [--rate N] [--recalls-per-s N]
//                      [--stages 50,80,100] [--ef N] [--peers none|hnswlib] [--json]
//
// 1. The vectors come in their order, each due by the clock, whether or not the ones before are
//    done (open loop). Where an index is behind they wait.
// 2. When so many percent can be found a stage begins: all queries, due by the clock as well, one
// at
//    a time, while inserts go on. Recalls that are due go before inserts that are due.
// 3. After a rest, in which background work comes to its end, one more stage.
// 4. recall@10 of each recall is by the exact nearest of what could be found when it was answered.
//    Its time is from due to answered, an insert's from due to when recalls see it; by the clock,
//    so what else runs on the machine counts.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "perf/bench_inputs.h"
#include "perf/live_tags.h"
#include "perf/streamed_hnswlib.h"
#include "perf/streamed_shard.h"
#include "src/core/clock.h"
#include "src/core/latency_histogram.h"
#include "tools/engramctl/table.h"

namespace engram {

namespace {

using Json = nlohmann::ordered_json;

constexpr uint32_t kK = 10;
// Inserts between two rounds of the index.
constexpr int kBurst = 64;

struct Options {
  BenchInputs inputs;
  uint64_t count = 50'000;
  double rate = 1'000;
  double recalls_per_s = 100;
  std::vector<uint32_t> stages = {50, 80, 100};
  uint32_t ef = 128;
  std::string peers = "hnswlib";
  uint32_t peer_M = 16;
  uint32_t peer_ef_construction = 200;
};

void AddOptions(CLI::App* app, Options* options) {
  options->inputs.query_count = 500;
  AddInputOptions(app, &options->inputs);
  app->remove_option(app->get_option("--rounds"));
  app->add_option("--count", options->count, "Vectors")
      ->check(CLI::Range(100u, UINT32_MAX))
      ->capture_default_str();
  app->add_option("--rate", options->rate, "Inserts/s")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--recalls-per-s", options->recalls_per_s, "In a stage")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--stages", options->stages, "Percent that can be found, rising")
      ->delimiter(',')
      ->check(CLI::Range(1u, 100u))
      ->capture_default_str();
  app->add_option("--ef", options->ef)->check(CLI::Range(1u, kMaxEf))->capture_default_str();
  app->add_option("--peers", options->peers)
      ->check(CLI::IsMember({"none", "hnswlib"}))
      ->capture_default_str();
  app->add_option("--peer-m", options->peer_M, "hnswlib's M")->capture_default_str();
  app->add_option("--peer-ef-construction", options->peer_ef_construction)->capture_default_str();
}

struct Stage {
  std::string name;
  size_t found_from = 0;  // vectors that could be found when it began, and when it ended
  size_t found_to = 0;
  double recall = 0;
  StreamedIndex::Waiting waiting;  // when it began
  LatencyHistogram recall_ns;
};

struct Ran {
  std::string name;
  double seconds = 0;  // until all could be found
  LatencyHistogram visible_ns;
  std::vector<std::unique_ptr<Stage>> stages;
};

// One index on the schedule.
class Schedule {
 public:
  Schedule(const Options& options, const VectorSet& base, const VectorSet& queries,
           LiveTruths* truths, StreamedIndex* index, Ran* ran)
      : options_(options),
        base_(base),
        queries_(queries),
        truths_(truths),
        index_(index),
        ran_(ran),
        all_(base.size()),
        insert_ns_(kNanosPerSecond / options.rate),
        recall_ns_(kNanosPerSecond / options.recalls_per_s) {
    std::iota(all_.begin(), all_.end(), 0);
  }

  void Run() {
    start_ns_ = clock_.MonotonicNs();
    for (const uint32_t percent : options_.stages) {
      const size_t from = std::max<size_t>(base_.size() * percent / 100, kK);
      while (seen_ < from) Turn();
      Ask(std::to_string(percent) + " %");
    }
    while (seen_ < base_.size()) Turn();
    index_->Rest();
    Ask("after a rest");
  }

 private:
  int64_t DueNs(size_t row) const {
    return start_ns_ + static_cast<int64_t>(insert_ns_ * static_cast<double>(row));
  }

  // What is due is sent, and the index gets a round.
  void Turn() {
    int64_t now_ns = clock_.MonotonicNs();
    for (int i = 0; i < kBurst && sent_ < base_.size() && DueNs(sent_) <= now_ns; ++i) {
      const auto row = static_cast<int32_t>(sent_);
      if (!index_->Send({static_cast<uint32_t>(row), row}, base_)) break;
      ++sent_;
      See();
      // A recall that has become due meanwhile goes first.
      if (next_recall_ns_ <= clock_.MonotonicNs()) break;
    }
    index_->Poll();
    See();
  }
  // What can be found by now.
  void See() {
    if (seen_ == index_->visible()) return;
    const int64_t now_ns = clock_.MonotonicNs();
    while (seen_ < index_->visible()) ran_->visible_ns.Record(now_ns - DueNs(seen_++));
    if (seen_ == base_.size()) {
      ran_->seconds = static_cast<double>(now_ns - start_ns_) / kNanosPerSecond;
    }
  }

  void Ask(const std::string& name) {
    struct Answer {
      size_t found = 0;
      std::vector<int64_t> tags;
    };
    std::vector<Answer> answers(queries_.size());
    auto& stage = *ran_->stages.emplace_back(std::make_unique<Stage>());
    stage.name = name;
    stage.found_from = seen_;
    stage.waiting = index_->waiting();
    const int64_t began_ns = clock_.MonotonicNs();
    for (size_t query = 0; query < queries_.size(); ++query) {
      next_recall_ns_ = began_ns + static_cast<int64_t>(recall_ns_ * static_cast<double>(query));
      const int64_t due_ns = next_recall_ns_;
      while (clock_.MonotonicNs() < due_ns) Turn();
      next_recall_ns_ = INT64_MAX;
      while (!index_->Ask(queries_, query, kK, options_.ef)) Turn();
      while (!index_->TakeAnswer(&answers[query].tags)) Turn();
      stage.recall_ns.Record(clock_.MonotonicNs() - due_ns);
      answers[query].found = seen_;
    }
    stage.found_to = seen_;
    // Judging takes long, and the schedule does not wait: so what it takes is put off.
    const int64_t judging_ns = clock_.MonotonicNs();
    index_->StopClock();
    uint64_t hits = 0;
    for (size_t query = 0; query < queries_.size(); ++query) {
      const auto rows = std::span<const int32_t>(all_).first(answers[query].found);
      const LiveTruth truth = truths_->OfOne(query, rows);
      hits += Judge(base_, queries_[query], MetricOfName(options_.inputs.metric), all_, truth, 0,
                    answers[query].tags)
                  .hits;
    }
    stage.recall = static_cast<double>(hits) / static_cast<double>(queries_.size() * kK);
    index_->StartClock();
    start_ns_ += clock_.MonotonicNs() - judging_ns;
  }

  const Options& options_;
  const VectorSet& base_;
  const VectorSet& queries_;
  LiveTruths* const truths_;
  StreamedIndex* const index_;
  Ran* const ran_;
  SystemClock clock_;
  std::vector<int32_t> all_;  // each row is its own tag
  const double insert_ns_;    // from one to the next
  const double recall_ns_;
  int64_t start_ns_ = 0;
  int64_t next_recall_ns_ = INT64_MAX;
  size_t sent_ = 0;
  size_t seen_ = 0;  // of these, can be found
};

double Us(const LatencyHistogram& histogram, double quantile) {
  return static_cast<double>(histogram.QuantileNs(quantile)) / 1e3;
}

void Print(const Options& options, const std::vector<std::unique_ptr<Ran>>& all) {
  constexpr auto kRight = Table::Align::kRight;
  Table table({{"index", Table::Align::kLeft},
               {"stage", Table::Align::kLeft},
               {"vectors", kRight},
               {"unlinked", kRight},
               {"recall@10", kRight},
               {"recall us p50", kRight},
               {"p99", kRight}});
  for (const auto& ran : all) {
    std::printf(
        "%s: all could be found after %.1f s (scheduled: %.1f); from due to visible p50 "
        "%.0f us, p99 %.0f us\n",
        ran->name.c_str(), ran->seconds, static_cast<double>(options.count) / options.rate,
        Us(ran->visible_ns, 0.5), Us(ran->visible_ns, 0.99));
    for (const auto& stage : ran->stages) {
      table.AddRow({ran->name, stage->name,
                    WithThousands(stage->found_from) + " to " + WithThousands(stage->found_to),
                    WithThousands(stage->waiting.unlinked), Shown(stage->recall, "%.4f"),
                    Shown(Us(stage->recall_ns, 0.5), "%.0f"),
                    Shown(Us(stage->recall_ns, 0.99), "%.0f")});
    }
  }
  table.Print();
}

Json JsonOf(const Ran& ran) {
  Json json = {{"seconds", FourDigits(ran.seconds)},
               {"visible_us_p50", FourDigits(Us(ran.visible_ns, 0.5))},
               {"visible_us_p99", FourDigits(Us(ran.visible_ns, 0.99))}};
  for (const auto& stage : ran.stages) {
    json["stages"].push_back({{"stage", stage->name},
                              {"vectors_from", stage->found_from},
                              {"vectors_to", stage->found_to},
                              {"unlinked", stage->waiting.unlinked},
                              {"recall_at_10", FourDigits(stage->recall)},
                              {"recall_us_p50", FourDigits(Us(stage->recall_ns, 0.5))},
                              {"recall_us_p99", FourDigits(Us(stage->recall_ns, 0.99))}});
  }
  return json;
}

Result<void> Measure(Options options) {
  if (auto pinned = PinTo(options.inputs.processor); !pinned) return pinned;
  const auto sets = LoadSets(options.inputs, options.count, kK);
  if (!sets) return std::unexpected(sets.error());
  options.count = sets->base.size();
  const Metric metric = MetricOfName(options.inputs.metric);
  LiveTruths truths(sets->base, sets->queries, metric, kK);
  const double load_before = LoadAverage();
  std::vector<std::unique_ptr<Ran>> all;
  const auto run = [&](const char* name, std::unique_ptr<StreamedIndex> index) {
    Ran* const ran = all.emplace_back(std::make_unique<Ran>()).get();
    ran->name = name;
    Schedule(options, sets->base, sets->queries, &truths, index.get(), ran).Run();
  };
  const uint32_t dimension = sets->base.dimension();
  run("engram", MakeStreamedShard(SpaceOf(options.inputs, dimension), options.count, true));
  if (options.peers != "none") {
    run("hnswlib", MakeStreamedHnswlib({.metric = metric,
                                        .dimension = dimension,
                                        .capacity = options.count,
                                        .M = options.peer_M,
                                        .ef_construction = options.peer_ef_construction,
                                        .seed = options.inputs.seed}));
  }
  if (!options.inputs.json) {
    std::printf(
        "%s, %s vectors of %u at %.0f/s, %zu queries a stage at %.0f/s, ef %u; one thread; "
        "load %.2f to %.2f\n",
        SetNameOf(options.inputs.data).c_str(), WithThousands(options.count).c_str(), dimension,
        options.rate, sets->queries.size(), options.recalls_per_s, options.ef, load_before,
        LoadAverage());
    Print(options, all);
    return {};
  }
  Json json = {{"benchmark", "streaming_schedule"},
               {"set", SetNameOf(options.inputs.data)},
               {"metric", options.inputs.metric},
               {"precision", options.inputs.precision},
               {"vectors", options.count},
               {"rate", options.rate},
               {"recalls_per_s", options.recalls_per_s},
               {"queries", sets->queries.size()},
               {"ef", options.ef},
               {"scheduled_s", FourDigits(static_cast<double>(options.count) / options.rate)},
               {"load_before", FourDigits(load_before)},
               {"load_after", FourDigits(LoadAverage())}};
  for (const auto& ran : all) json[ran->name] = JsonOf(*ran);
  std::printf("%s\n", json.dump().c_str());
  return {};
}

int Main(int argc, char** argv) {
  CLI::App app("Inserts and recalls by the clock, on this project's shard and on hnswlib.");
  Options options;
  AddOptions(&app, &options);
  return RunBench(&app, argc, argv, "streaming_schedule", [&options] {
    std::ranges::sort(options.stages);
    return Measure(options);
  });
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) { return engram::Main(argc, argv); }
