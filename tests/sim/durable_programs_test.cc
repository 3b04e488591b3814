// Random programs (tests/sim/durable_program.h) without checkpoints.
//
// ENGRAM_DURABLE_SEED=n runs the program of that seed alone, and says what it
// does; ENGRAM_DURABLE_SEEDS=n runs so many, from ENGRAM_DURABLE_FIRST on.

#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "tests/sim/durable_program.h"
#include "tests/sim/program_seeds.h"

namespace engram {
namespace {

TEST(DurableProgramsTest, WhatWasAcknowledgedIsThere) {
  ProgramStats stats;
  ProgramOptions options;
  options.reshards = FromEnvironment("ENGRAM_DURABLE_RESHARD", 1) != 0;
  const auto seeds = Seeds::FromPrefix("ENGRAM_DURABLE", UsualSeeds(1'500, 100));
  options.talks = seeds.alone;
  const auto [seed, violation] = RunSeeds(seeds, options, &stats);
  ASSERT_EQ(seed, 0u) << violation << "\nagain: ENGRAM_DURABLE_SEED=" << seed;
  ExpectAllHappened({{"acks", stats.acks},
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
                     {"sessions_lowered", stats.lowered}},
                    seeds.count >= 300);
}

// The checks after a crash alone, without the second opinion of FlushAudit.
uint64_t FirstSeedThatSees(RigDisks::Lie lie, bool audits) {
  ProgramStats stats;
  ProgramOptions options;
  options.lie = lie;
  options.audits = audits;
  return RunSeeds({.first = 1, .count = 100}, options, &stats).first;
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
