// Random programs (tests/sim/durable_program.h) without checkpoints.
//
// ENGRAM_DURABLE_SEED=n runs the program of that seed alone, and says what it
// does; ENGRAM_DURABLE_SEEDS=n runs so many, from ENGRAM_DURABLE_FIRST on.

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "tests/sim/durable_program.h"

namespace engram {
namespace {

// A sanitizer takes its time.
uint64_t UsualSeeds() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return 100;
#else
  return 1'500;
#endif
}

TEST(DurableProgramsTest, WhatWasAcknowledgedIsThere) {
  ProgramStats stats;
  ProgramOptions options;
  options.reshards = FromEnvironment("ENGRAM_DURABLE_RESHARD", 1) != 0;
  uint64_t first = FromEnvironment("ENGRAM_DURABLE_FIRST", 1);
  uint64_t seeds = FromEnvironment("ENGRAM_DURABLE_SEEDS", UsualSeeds());
  if (const uint64_t seed = FromEnvironment("ENGRAM_DURABLE_SEED", 0); seed != 0) {
    options.talks = true;
    first = seed;
    seeds = 1;
  }
  const auto [seed, violation] = RunSeeds(first, seeds, options, &stats);
  ASSERT_EQ(seed, 0u) << violation << "\nagain: ENGRAM_DURABLE_SEED=" << seed;
  const std::vector<std::pair<std::string, uint64_t>> counts = {
      {"acks", stats.acks},
      {"refusals", stats.refusals},
      {"refusals_disk_full", stats.disk_full},
      {"refusals_disk_failing", stats.disk_failing},
      {"power_cuts", stats.power_cuts},
      {"kills", stats.kills},
      {"crashes_in_recovery", stats.cuts_in_recovery},
      {"starts", stats.starts},
      {"failed_starts", stats.failed_starts},
      {"other_shards", stats.reshards},
      {"flipped_bits", stats.flips},
      {"recalls", stats.recalls},
      {"records_read", stats.records_read},
      {"verified", stats.verified},
      {"spaces_grown", stats.grown},
      {"sessions_lowered", stats.lowered}};
  for (const auto& [name, count] : counts) {
    std::printf("%s %llu\n", name.c_str(), static_cast<unsigned long long>(count));
    if (seeds >= 300) {
      EXPECT_GT(count, 0u) << name << ": the programs no longer come to that";
    }
  }
}

// The checks after a crash alone, without the second opinion of FlushAudit.
uint64_t FirstSeedThatSees(RigDisks::Lie lie, bool audits) {
  ProgramStats stats;
  ProgramOptions options;
  options.lie = lie;
  options.audits = audits;
  return RunSeeds(1, 100, options, &stats).first;
}

TEST(DurableProgramsTest, ADiskThatDoesNotFlushIsFoundOut) {
  EXPECT_NE(FirstSeedThatSees(RigDisks::Lie::kFlushes, false), 0u);
  EXPECT_NE(FirstSeedThatSees(RigDisks::Lie::kFlushes, true), 0u);
}

TEST(DurableProgramsTest, ADiskThatEndsWritesEarlyIsFoundOut) {
  EXPECT_NE(FirstSeedThatSees(RigDisks::Lie::kWrites, false), 0u);
  EXPECT_NE(FirstSeedThatSees(RigDisks::Lie::kWrites, true), 0u);
}

}  // namespace
}  // namespace engram
