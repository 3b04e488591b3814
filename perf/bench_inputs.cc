#include "perf/bench_inputs.h"

#include <stdlib.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <utility>

#include "src/core/observation.h"
#include "src/core/topology.h"
#include "tools/engramctl/table.h"

namespace engram {

namespace {

Traversal TraversalOf(const std::string& name) {
  if (name == "exact") return Traversal::kExact;
  return name == "int8" ? Traversal::kInt8 : Traversal::kRabitq;
}

}  // namespace

void AddInputOptions(CLI::App* app, BenchInputs* inputs) {
  app->add_option("--data", inputs->data, "Vectors: .fvecs, .bvecs or .npy")->required();
  app->add_option("--queries", inputs->queries, "Likewise")->required();
  app->add_option("--metric", inputs->metric)
      ->check(CLI::IsMember({"cosine", "ip", "l2"}))
      ->capture_default_str();
  app->add_option("--query-count", inputs->query_count, "Only the first queries")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--precision", inputs->precision, "Ours: how vectors are kept")
      ->check(CLI::IsMember({"f32", "bf16", "int8"}))
      ->capture_default_str();
  app->add_option("--traversal", inputs->traversal, "Ours: by what the graph is walked")
      ->check(CLI::IsMember({"rabitq", "int8", "exact"}))
      ->capture_default_str();
  app->add_option("--seed", inputs->seed, "Of the levels, for all")->capture_default_str();
  app->add_option("--rounds", inputs->rounds, "Of recalls, for the median")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--processor", inputs->processor, "To run on; default: the first one");
  app->add_flag("--json", inputs->json, "One line of JSON on standard output, nothing else");
}

Result<LoadedSets> LoadSets(const BenchInputs& inputs, uint64_t rows_max, uint32_t k) {
  const bool normalise = MetricOfName(inputs.metric) == Metric::kCosine;
  auto base = VectorSet::Load(inputs.data, rows_max, normalise);
  if (!base) return std::unexpected(base.error());
  auto queries = VectorSet::Load(inputs.queries, inputs.query_count, normalise);
  if (!queries) return std::unexpected(queries.error());
  if (base->dimension() != queries->dimension() || base->dimension() > kMaxDimension ||
      base->size() < k) {
    return Fail(ErrorCode::kInvalidArgument,
                inputs.data + " has " + std::to_string(base->size()) + " vectors of " +
                    std::to_string(base->dimension()) + ", the queries have " +
                    std::to_string(queries->dimension()) + ": at least " + std::to_string(k) +
                    ", equally long, up to " + std::to_string(kMaxDimension));
  }
  return LoadedSets{*std::move(base), *std::move(queries)};
}

SpaceOptions SpaceOf(const BenchInputs& inputs, uint32_t dimension) {
  SpaceOptions space;
  space.metric = MetricOfName(inputs.metric);
  space.precision = PrecisionOfName(inputs.precision);
  space.traversal = TraversalOf(inputs.traversal);
  space.dimension = dimension;
  space.build.seed = inputs.seed;
  space.hash_seed = inputs.seed;
  return space;
}

std::string SetNameOf(const std::string& path) {
  const std::filesystem::path absolute = std::filesystem::absolute(path);
  const std::string folder = absolute.parent_path().filename().string();
  return folder.empty() ? absolute.stem().string() : folder;
}

Result<void> PinTo(int processor) {
  if (processor < 0) {
    auto topology = DiscoverTopology();
    if (!topology) return std::unexpected(topology.error());
    processor = topology->cpus.front().os_index;
  }
  return PinThisThread(processor);
}

double LoadAverage() {
  double load = 0;
  return getloadavg(&load, 1) == 1 ? load : 0;
}

double FourDigits(double value) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%.4g", value);
  return std::strtod(text.data(), nullptr);
}

std::string Shown(std::optional<double> value, const char* format) {
  if (!value) return "-";
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), format, *value);
  return text.data();
}

std::string ShownRate(std::optional<double> value) {
  return value ? WithThousands(static_cast<uint64_t>(std::llround(*value))) : "-";
}

int RunBench(CLI::App* app, int argc, char** argv, const char* name,
             const std::function<Result<void>()>& run) {
  constexpr int kExitFailed = 1;
  constexpr int kExitUsage = 2;
  try {
    app->parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app->exit(error) == 0 ? 0 : kExitUsage;
  }
  if (const auto done = run(); !done) {
    std::fprintf(stderr, "%s: %s\n", name, done.error().message.c_str());
    return kExitFailed;
  }
  return 0;
}

}  // namespace engram
