// grow_vectors: writes a set of vectors made larger (perf/grown_set.h), as .fvecs.
//
//   grow_vectors --data BASE --rows N --out FILE.fvecs [--metric cosine|ip|l2] [--seed N]

#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "perf/bench_inputs.h"
#include "perf/grown_set.h"
#include "perf/vector_set.h"
#include "src/core/observation.h"

namespace engram {
namespace {

struct Options {
  std::string data;
  std::string out;
  std::string metric = "cosine";
  uint64_t rows = 1'000'000;
  uint64_t seed = 1;
};

Result<void> Write(const Options& options) {
  const Metric metric = MetricOfName(options.metric);
  auto real = VectorSet::Load(options.data, options.rows, metric == Metric::kCosine);
  if (!real) return std::unexpected(real.error());
  const GrownRows rows(*real, {.metric = metric, .seed = options.seed});
  std::ofstream file(options.out, std::ios::binary);
  std::vector<float> row(real->dimension());
  const auto dimension = static_cast<int32_t>(row.size());
  for (uint64_t number = 0; number < options.rows; ++number) {
    rows.Make(number, row);
    file.write(reinterpret_cast<const char*>(&dimension), sizeof(dimension));
    file.write(reinterpret_cast<const char*>(row.data()),
               static_cast<std::streamsize>(row.size() * sizeof(float)));
  }
  file.close();
  if (!file) return Fail(ErrorCode::kUnavailable, options.out + " cannot be written");
  return {};
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) {
  CLI::App app("A set of vectors made larger");
  engram::Options options;
  app.add_option("--data", options.data, "Vectors: .fvecs, .bvecs or .npy")->required();
  app.add_option("--out", options.out, "The .fvecs file")->required();
  app.add_option("--rows", options.rows)->capture_default_str();
  app.add_option("--metric", options.metric)
      ->check(CLI::IsMember({"cosine", "ip", "l2"}))
      ->capture_default_str();
  app.add_option("--seed", options.seed)->capture_default_str();
  return engram::RunBench(&app, argc, argv, "grow_vectors",
                          [&options] { return engram::Write(options); });
}
