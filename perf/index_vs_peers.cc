// index_vs_peers: this project's index beside hnswlib on one set of vectors, on one thread.
//
//   index_vs_peers --data BASE --queries Q --groundtruth T --metric cosine|ip|l2 [--count N]
//                  [--json] [--out DIR]
//
// 1. Load base, queries and truth; with --count, or without --groundtruth, the truth is computed.
// 2. Contenders: ours; hnswlib M 16/ef_construction 200; hnswlib at the settings of --cheaper.
// 3. Insert, then recall with each ef, the contenders taking turns (peer_comparison.h).
// 4. Report: a table, or one line of JSON with --json; two plots with --out (comparison_report.h).

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "index/batch_linker.h"
#include "index/shard.h"
#include "index/space.h"
#include "perf/bench_inputs.h"
#include "perf/comparison_report.h"
#include "perf/engram_index.h"
#include "perf/hnswlib_index.h"
#include "perf/peer_comparison.h"
#include "perf/vector_set.h"
#include "src/core/observation.h"

namespace engram {

namespace {

struct Setting {
  uint32_t M = 0;
  uint32_t ef_construction = 0;
};

struct Options {
  BenchInputs inputs;
  std::string groundtruth;
  uint64_t count = UINT64_MAX;
  uint32_t M = HnswBuildParams().M;
  uint32_t ef_construction = HnswBuildParams().ef_construction;
  uint32_t batch = BatchLinker::kMaxBatch;
  std::string peer = "16:200";
  std::vector<std::string> cheaper = {"16:100", "16:64", "16:40", "12:100", "12:64", "8:64"};
  uint32_t scanned = HnswBuildParams().scanned;
  uint64_t chunk = 1'000;
  std::string out;
};

// M:ef_construction. Nothing where it is not.
std::optional<Setting> SettingOf(std::string_view text) {
  Setting setting;
  const char* const end = text.data() + text.size();
  const auto [colon, error] = std::from_chars(text.data(), end, setting.M);
  if (error != std::errc() || colon == end || *colon != ':') return std::nullopt;
  const auto [last, error2] = std::from_chars(colon + 1, end, setting.ef_construction);
  const bool sound = error2 == std::errc() && last == end && setting.M >= 2 && setting.M <= 64 &&
                     setting.ef_construction >= 1 && setting.ef_construction <= kMaxEf;
  return sound ? std::optional(setting) : std::nullopt;
}

void AddOptions(CLI::App* app, Options* options) {
  const CLI::Validator setting(
      [](std::string& text) {
        return text == "none" || SettingOf(text) ? std::string()
                                                 : "a setting is M:ef_construction, like 16:200";
      },
      "M:EF");
  AddInputOptions(app, &options->inputs);
  app->add_option("--groundtruth", options->groundtruth,
                  ".ivecs: exact nearest rows of each query; default: computed");
  app->add_option("--count", options->count, "Only the first rows; their truth is computed")
      ->check(CLI::PositiveNumber);
  app->add_option("--m", options->M, "Ours: links of a new node on a level")
      ->check(CLI::Range(2, 64))
      ->capture_default_str();
  app->add_option("--ef-construction", options->ef_construction, "Ours")
      ->check(CLI::Range(1u, kMaxEf))
      ->capture_default_str();
  app->add_option("--batch", options->batch, "Ours: nodes linked at once")
      ->check(CLI::Range(1u, BatchLinker::kMaxBatch))
      ->capture_default_str();
  app->add_option("--scanned", options->scanned, "Ours: members of lists compared, of a batch")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--peer", options->peer, "hnswlib's setting")
      ->check(setting)
      ->capture_default_str();
  app->add_option("--cheaper", options->cheaper, "Settings to look for the cheapest in, or none")
      ->delimiter(',')
      ->check(setting)
      ->capture_default_str();
  app->add_option("--chunk", options->chunk, "Inserts in a turn")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--out", options->out, "Directory for the plots, like perf/results");
}

// What is compared, on what.
struct Inputs {
  VectorSet base;
  VectorSet queries;
  ExactTruth truth;
};

Result<Inputs> LoadInputs(const Options& options, const ComparisonOptions& comparison) {
  auto sets = LoadSets(options.inputs, options.count, comparison.k);
  if (!sets) return std::unexpected(sets.error());
  auto& [base, queries] = *sets;
  if (options.count == UINT64_MAX && !options.groundtruth.empty()) {
    auto truth = LoadTruth(options.groundtruth, base, queries, comparison.metric, comparison.k);
    if (!truth) return std::unexpected(truth.error());
    return Inputs{std::move(base), std::move(queries), *std::move(truth)};
  }
  std::fprintf(stderr, "computing the truth\n");
  ExactTruth truth = ComputeTruth(base, queries, comparison.metric, comparison.k);
  return Inputs{std::move(base), std::move(queries), std::move(truth)};
}

SpaceOptions OurSpaceOf(const Options& options, const Inputs& inputs) {
  SpaceOptions space = SpaceOf(options.inputs, inputs.base.dimension());
  space.build.M = options.M;
  space.build.M0 = 2 * options.M;
  space.build.ef_construction = options.ef_construction;
  space.build.scanned = options.scanned;
  return space;
}

std::vector<Contender> MakeContenders(const Options& options, const Inputs& inputs, Metric metric) {
  std::vector<Contender> contenders;
  const size_t capacity = inputs.base.size();
  const SpaceOptions space = OurSpaceOf(options, inputs);
  contenders.push_back({.name = "engram",
                        .M = options.M,
                        .ef_construction = options.ef_construction,
                        .make = [space, capacity, batch = options.batch] {
                          return MakeEngramIndex(space, batch, capacity);
                        }});
  std::vector<std::string> settings = {options.peer};
  settings.insert(settings.end(), options.cheaper.begin(), options.cheaper.end());
  for (const std::string& text : settings) {
    const std::optional<Setting> setting = SettingOf(text);
    if (!setting) continue;
    const HnswlibOptions peer{.metric = metric,
                              .dimension = inputs.base.dimension(),
                              .capacity = capacity,
                              .M = setting->M,
                              .ef_construction = setting->ef_construction,
                              .seed = options.inputs.seed};
    contenders.push_back({.name = "hnswlib",
                          .M = setting->M,
                          .ef_construction = setting->ef_construction,
                          .make = [peer] { return MakeHnswlibIndex(peer); }});
  }
  return contenders;
}

Result<void> Compare(const Options& options) {
  ComparisonOptions comparison;
  comparison.metric = MetricOfName(options.inputs.metric);
  comparison.chunk = options.chunk;
  comparison.rounds = options.inputs.rounds;
  const uint32_t default_ef = ShardOptions().default_ef;
  comparison.efs.push_back(default_ef);
  std::ranges::sort(comparison.efs);
  comparison.efs.erase(std::ranges::unique(comparison.efs).begin(), comparison.efs.end());

  if (auto pinned = PinTo(options.inputs.processor); !pinned) return pinned;
  Result<Inputs> inputs = LoadInputs(options, comparison);
  if (!inputs) return std::unexpected(inputs.error());
  std::vector<Contender> contenders = MakeContenders(options, *inputs, comparison.metric);
  if (contenders.size() < 2) {
    return Fail(ErrorCode::kInvalidArgument, "--peer is what the ratios are of: not none");
  }
  ComparisonSubject subject{.set = SetNameOf(options.inputs.data),
                            .dimension = inputs->base.dimension(),
                            .rows = inputs->base.size(),
                            .queries = inputs->queries.size(),
                            .precision = options.inputs.precision,
                            .traversal = options.inputs.traversal,
                            .default_ef = default_ef,
                            .seed = options.inputs.seed,
                            .options = comparison,
                            .inserting = {},
                            .recalling = {},
                            .load_before = LoadAverage()};
  subject.inserting = MeasureInserts(comparison, inputs->base, &contenders);
  subject.recalling =
      MeasureRecalls(comparison, inputs->base, inputs->queries, inputs->truth, &contenders);
  subject.load_after = LoadAverage();
  if (options.inputs.json) {
    std::printf("%s\n", ComparisonJson(subject, contenders).c_str());
  } else {
    PrintComparison(subject, contenders);
  }
  if (options.out.empty()) return {};
  const auto plots = WriteComparisonPlots(subject, contenders, options.out);
  if (!plots) return std::unexpected(plots.error());
  for (const std::string& path : *plots) std::fprintf(stderr, "wrote %s\n", path.c_str());
  return {};
}

int Main(int argc, char** argv) {
  CLI::App app("Compares this project's index with hnswlib on one set of vectors.");
  Options options;
  AddOptions(&app, &options);
  return RunBench(&app, argc, argv, "index_vs_peers", [&options] { return Compare(options); });
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) { return engram::Main(argc, argv); }
