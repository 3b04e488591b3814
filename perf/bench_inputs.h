#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "index/space.h"
#include "perf/vector_set.h"
#include "src/core/result.h"

// What the programs that measure an index on a set of vectors are told, and what they make of it.

namespace engram {

struct BenchInputs {
  std::string data;
  std::string queries;
  std::string metric = "cosine";
  uint64_t query_count = 1'000;
  std::string precision = "f32";
  std::string traversal = "rabitq";
  uint64_t seed = HnswBuildParams().seed;
  int rounds = 5;
  int processor = -1;
  bool json = false;
};

// The options of these names; defaults are what `inputs` has.
void AddInputOptions(CLI::App* app, BenchInputs* inputs);

struct LoadedSets {
  VectorSet base;
  VectorSet queries;
};
// The first `rows_max` rows and query_count queries, of norm 1 under cosine. Errors: those of the
// files; kInvalidArgument where the two do not go together or there are fewer than `k` rows.
Result<LoadedSets> LoadSets(const BenchInputs& inputs, uint64_t rows_max, uint32_t k);

SpaceOptions SpaceOf(const BenchInputs& inputs, uint32_t dimension);

// The folder of the file, which is how vector sets are named here; else the file.
std::string SetNameOf(const std::string& path);
// Binds this thread to `processor`; the first one where it is negative.
Result<void> PinTo(int processor);
// Of the last minute.
double LoadAverage();
// A number that prints with four digits.
double FourDigits(double value);
// For tables; "-" where there is none. `format`: of one double.
std::string Shown(std::optional<double> value, const char* format);
// The same with thousands apart.
std::string ShownRate(std::optional<double> value);

// Main of program `name`: reads the arguments and runs. Its exit status: 0, 1 where `run` failed,
// which it says, 2 for arguments that are none.
int RunBench(CLI::App* app, int argc, char** argv, const char* name,
             const std::function<Result<void>()>& run);

}  // namespace engram
