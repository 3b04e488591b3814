// streaming_runbook: runs a streaming runbook of big-ann-benchmarks (inserts, deletes, replaces and
// searches of ranges of a set of vectors) on this project's shard, and on hnswlib.
//
//   streaming_runbook --runbook FILE --data BASE --queries Q [--part NAME] [--count N]
//                     [--order file|shuffled|clustered] [--rest] [--ef N] [--fresh N]
//                     [--peers none|hnswlib] [--json]
//
// 1. The first --count vectors, in the order of --order; the runbook's ranges are scaled to them.
//    "clustered": the runbook's inserts begin where clusters do, so each stretch between two of
//    these gets a cluster (perf/clustered_order.h).
// 2. For each search the exact nearest among what lives then. Distances of queries and vectors are
//    computed once, in blocks, and kept: 4 bytes for each pair.
// 3. The shard runs the steps, one after the other, without a pause: what it does in the background
//    it does in its slices between observations and recalls. With --rest it gets the time to bring
//    all that to its end behind each step, and this counts for the step. At --fresh searches evenly
//    spread a second shard is built of what lives, comes to rest, and answers the same queries.
//    At the end, after a rest, each that lives is asked for with its own vector, and those that are
//    not found once more with eight times the ef: what is not found then is hardly reachable.
// 4. The same by hnswlib in its replace-deleted mode, but for the fresh one.
// 5. A table, or one line of JSON.
//
// Times are processor time of the one thread that does all, so a shard's recall has the slice of
// background work in it that the shard does in the same round.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "perf/bench_inputs.h"
#include "perf/clustered_order.h"
#include "perf/runbook.h"
#include "perf/runbook_run.h"
#include "perf/streamed_hnswlib.h"
#include "perf/streamed_shard.h"
#include "src/core/hash.h"
#include "tools/engramctl/table.h"

namespace engram {

namespace {

using Json = nlohmann::ordered_json;

struct Options {
  BenchInputs inputs;
  RunbookRunOptions run;
  std::string runbook;
  std::string part;
  std::string order = "file";
  std::string peers = "hnswlib";
  uint64_t count = 100'000;
  uint64_t fresh = 1'000'000;
  uint32_t peer_M = 16;
  uint32_t peer_ef_construction = 200;
};

void AddOptions(CLI::App* app, Options* options) {
  options->inputs.query_count = 500;
  AddInputOptions(app, &options->inputs);
  app->remove_option(app->get_option("--rounds"));
  app->add_option("--runbook", options->runbook, "YAML, as of big-ann-benchmarks")->required();
  app->add_option("--part", options->part, "Of the runbook; default: its first one");
  app->add_option("--count", options->count, "Vectors that its ranges are scaled to")
      ->check(CLI::Range(100u, UINT32_MAX))
      ->capture_default_str();
  app->add_option("--order", options->order, "Of the vectors")
      ->check(CLI::IsMember({"file", "shuffled", "clustered"}))
      ->capture_default_str();
  app->add_flag("--rest", options->run.rests, "Background work ends behind each step");
  app->add_option("--ef", options->run.ef)->check(CLI::Range(1u, kMaxEf))->capture_default_str();
  app->add_option("--fresh", options->fresh, "Searches that have a fresh index beside them");
  app->add_option("--peers", options->peers)
      ->check(CLI::IsMember({"none", "hnswlib"}))
      ->capture_default_str();
  app->add_option("--peer-m", options->peer_M, "hnswlib's M")->capture_default_str();
  app->add_option("--peer-ef-construction", options->peer_ef_construction)->capture_default_str();
}

// Where the runbook's inserts begin; the first at 0.
std::vector<size_t> InsertStarts(const Runbook& runbook, size_t rows) {
  std::vector<size_t> starts = {0};
  for (const RunbookStep& step : runbook.steps) {
    const bool is_insert = step.operation == RunbookStep::Operation::kInsert;
    if (is_insert && step.tags.first < rows) starts.push_back(step.tags.first);
  }
  std::ranges::sort(starts);
  starts.erase(std::unique(starts.begin(), starts.end()), starts.end());
  return starts;
}

VectorSet Ordered(VectorSet base, const Runbook& runbook, const Options& options) {
  if (options.order == "file") return base;
  if (options.order == "clustered") {
    return InOrder(base,
                   ClusteredOrder(base, InsertStarts(runbook, base.size()), options.inputs.seed));
  }
  std::vector<uint32_t> order(base.size());
  std::iota(order.begin(), order.end(), 0);
  SplitMix64 random(options.inputs.seed);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.Below(i)]);
  return InOrder(base, order);
}

// So many of the searches, evenly spread, the last among them.
bool IsChosen(size_t search, size_t searches, uint64_t chosen) {
  if (chosen >= searches) return true;
  return (search + 1) * chosen / searches > search * chosen / searches;
}

struct Ran {
  std::string name;
  RunbookFigures figures;
};

std::vector<Ran> RunAll(const Options& options, const JudgedRunbook& judged) {
  std::vector<Ran> ran;
  SpaceOptions space = SpaceOf(options.inputs, judged.base->dimension());
  const auto shard = MakeStreamedShard(space, judged.most_live, true);
  const size_t searches = judged.truths.size();
  ran.push_back(
      {"engram", RunRunbook(options.run, judged, shard.get(),
                            [&](size_t search, size_t live) -> std::unique_ptr<StreamedIndex> {
                              if (!IsChosen(search, searches, options.fresh)) return nullptr;
                              return MakeStreamedShard(space, live, false);
                            })});
  if (options.peers == "none") return ran;
  const auto peer = MakeStreamedHnswlib({.metric = options.run.metric,
                                         .dimension = judged.base->dimension(),
                                         .capacity = judged.most_live,
                                         .M = options.peer_M,
                                         .ef_construction = options.peer_ef_construction,
                                         .seed = options.inputs.seed});
  ran.push_back({"hnswlib", RunRunbook(options.run, judged, peer.get(),
                                       [](size_t, size_t) { return nullptr; })});
  return ran;
}

double Share(size_t part, size_t of) {
  return of == 0 ? 1 : static_cast<double>(part) / static_cast<double>(of);
}
double AverageUs(const RunbookFigures& figures) {
  double sum = 0;
  for (const SearchFigures& search : figures.searches) sum += search.recall_us;
  return sum / static_cast<double>(std::max<size_t>(figures.searches.size(), 1));
}
double P99Us(const RunbookFigures& figures) {
  return static_cast<double>(figures.recall_ns->QuantileNs(0.99)) / 1e3;
}

void Print(const std::vector<Ran>& ran) {
  constexpr auto kRight = Table::Align::kRight;
  Table table({{"index", Table::Align::kLeft},
               {"recall@10", kRight},
               {"worst", kRight},
               {"at step", kRight},
               {"most under fresh", kRight},
               {"at step", kRight},
               {"inserts/s", kRight},
               {"replaces/s", kRight},
               {"deletes/s", kRight},
               {"recall us", kRight},
               {"p99", kRight},
               {"find themselves", kRight},
               {"with 8 ef", kRight},
               {"dead hits", kRight}});
  for (const auto& [name, figures] : ran) {
    const SearchFigures* const worst = figures.Worst();
    const SearchFigures* where = nullptr;
    const double gap = figures.WorstGap(&where);
    table.AddRow({name, Shown(figures.AverageRecall(), "%.4f"), Shown(worst->recall, "%.4f"),
                  std::to_string(worst->step), where != nullptr ? Shown(gap, "%.4f") : "-",
                  where != nullptr ? std::to_string(where->step) : "-",
                  ShownRate(figures.inserts.PerSecond()), ShownRate(figures.replaces.PerSecond()),
                  ShownRate(figures.deletes.PerSecond()), Shown(AverageUs(figures), "%.0f"),
                  Shown(P99Us(figures), "%.0f"), Shown(Share(figures.found, figures.live), "%.5f"),
                  Shown(Share(figures.found_wider, figures.live), "%.5f"),
                  WithThousands(figures.dead_hits)});
  }
  table.Print();
}

Json OrNull(std::optional<double> value) { return value ? Json(FourDigits(*value)) : Json(); }

Json JsonOf(const SearchFigures& search) {
  return {{"step", search.step},
          {"live", search.live},
          {"recall_at_10", FourDigits(search.recall)},
          {"fresh_recall_at_10", OrNull(search.fresh_recall)},
          {"recall_us", FourDigits(search.recall_us)},
          {"fresh_recall_us", OrNull(search.fresh_us)},
          {"unlinked", search.waiting.unlinked},
          {"retired", search.waiting.retired},
          {"linked_ever", search.waiting.linked_ever}};
}

Json JsonOf(const RunbookFigures& figures) {
  const SearchFigures* where = nullptr;
  const double gap = figures.WorstGap(&where);
  Json json = {{"recall_at_10", FourDigits(figures.AverageRecall())},
               {"worst_recall_at_10", FourDigits(figures.Worst()->recall)},
               {"worst_step", figures.Worst()->step},
               {"most_under_fresh", where != nullptr ? Json(FourDigits(gap)) : Json()},
               {"most_under_fresh_step", where != nullptr ? Json(where->step) : Json()},
               {"inserts_per_s", OrNull(figures.inserts.PerSecond())},
               {"replaces_per_s", OrNull(figures.replaces.PerSecond())},
               {"deletes_per_s", OrNull(figures.deletes.PerSecond())},
               {"rest_s", FourDigits(figures.rest_seconds)},
               {"recall_us", FourDigits(AverageUs(figures))},
               {"recall_us_p99", FourDigits(P99Us(figures))},
               {"live", figures.live},
               {"find_themselves", figures.found},
               {"find_themselves_wider", figures.found_wider},
               {"dead_hits", figures.dead_hits}};
  for (const SearchFigures& search : figures.searches) json["searches"].push_back(JsonOf(search));
  return json;
}

Result<void> Measure(Options options) {
  if (auto pinned = PinTo(options.inputs.processor); !pinned) return pinned;
  options.run.metric = MetricOfName(options.inputs.metric);
  const Result<Runbook> written = LoadRunbook(options.runbook, options.part);
  if (!written) return std::unexpected(written.error());
  auto sets = LoadSets(options.inputs, options.count, options.run.k);
  if (!sets) return std::unexpected(sets.error());
  const Runbook runbook = ScaledTo(*written, sets->base.size());
  const VectorSet base = Ordered(std::move(sets->base), runbook, options);
  const auto judged = MakeJudged(runbook, base, sets->queries, options.run.metric, options.run.k);
  if (!judged) return std::unexpected(judged.error());
  const double load_before = LoadAverage();
  const std::vector<Ran> ran = RunAll(options, *judged);
  const double scale = static_cast<double>(runbook.ids()) / static_cast<double>(written->ids());
  const std::string name = std::filesystem::path(options.runbook).filename().string();
  if (!options.inputs.json) {
    std::printf(
        "%s, %s, scaled by %.4g to %s vectors of %s (%s order), at most %s live; "
        "ef %u, %zu queries%s; load %.2f to %.2f\n",
        name.c_str(), runbook.part.c_str(), scale, WithThousands(runbook.ids()).c_str(),
        SetNameOf(options.inputs.data).c_str(), options.order.c_str(),
        WithThousands(judged->most_live).c_str(), options.run.ef, judged->queries->size(),
        options.run.rests ? ", a rest behind each step" : "", load_before, LoadAverage());
    Print(ran);
    return {};
  }
  Json json = {{"benchmark", "streaming_runbook"},
               {"runbook", name},
               {"part", runbook.part},
               {"set", SetNameOf(options.inputs.data)},
               {"metric", options.inputs.metric},
               {"precision", options.inputs.precision},
               {"order", options.order},
               {"vectors", runbook.ids()},
               {"scale", FourDigits(scale)},
               {"most_live", judged->most_live},
               {"queries", judged->queries->size()},
               {"ef", options.run.ef},
               {"rest", options.run.rests},
               {"load_before", FourDigits(load_before)},
               {"load_after", FourDigits(LoadAverage())}};
  for (const auto& [index, figures] : ran) json[index] = JsonOf(figures);
  std::printf("%s\n", json.dump().c_str());
  return {};
}

int Main(int argc, char** argv) {
  CLI::App app("Runs a streaming runbook on this project's shard and on hnswlib.");
  Options options;
  AddOptions(&app, &options);
  return RunBench(&app, argc, argv, "streaming_runbook", [&options] { return Measure(options); });
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) { return engram::Main(argc, argv); }
