// Random programs (tests/sim/durable_program.h) with checkpoints and rebuilds at any moment.
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

uint64_t CheckpointSeeds() { return UsualSeeds(400, 30); }

TEST(CheckpointProgramsTest, WhatWasAcknowledgedIsThere) {
  ProgramStats stats;
  ProgramOptions options;
  options.checkpoints = true;
  options.reshards = FromEnvironment("ENGRAM_DURABLE_RESHARD", 1) != 0;
  const auto seeds = Seeds::FromPrefix("ENGRAM_DURABLE", CheckpointSeeds());
  options.talks = seeds.alone;
  const auto [seed, violation] = RunSeeds(seeds, options, &stats);
  ASSERT_EQ(seed, 0u) << violation << "\nagain: ENGRAM_DURABLE_SEED=" << seed;
  ExpectAllHappened({{"acks", stats.acks},
                     {"checkpoints", stats.checkpoints},
                     {"failed_checkpoints", stats.failed_checkpoints},
                     {"crashes_in_checkpoints", stats.crashes_in_checkpoints},
                     {"crashes_before_recovery", stats.crashes_before_recovery},
                     {"crashes_in_recovery", stats.cuts_in_recovery},
                     {"power_cuts", stats.power_cuts},
                     {"kills", stats.kills},
                     {"starts", stats.starts},
                     {"failed_starts", stats.failed_starts},
                     {"files_loaded", stats.loaded},
                     {"files_loaded_elsewhere", stats.loaded_elsewhere},
                     {"segments_freed", stats.segments_freed},
                     {"records_taken_over", stats.records_taken_over},
                     {"rebuilds", stats.rebuilds},
                     {"relinked_by_rebuilds", stats.relinked},
                     {"crashes_in_rebuilds", stats.crashes_in_rebuilds},
                     {"pinned_reads", stats.pinned_reads},
                     {"recalls", stats.recalls},
                     {"records_read", stats.records_read},
                     {"verified", stats.verified},
                     {"spaces_grown", stats.grown},
                     {"sessions_lowered", stats.lowered}},
                    seeds.count >= 400);
}

// As many shards as before, so that spaces are loaded into their places, also those that have
// grown.
TEST(CheckpointProgramsTest, WhatIsLoadedInPlaceMeetsWhatIsReplayed) {
  ProgramStats stats;
  ProgramOptions options;
  options.checkpoints = true;
  options.reshards = false;
  const auto [seed, violation] =
      RunSeeds({.first = 1, .count = CheckpointSeeds() * 5 / 8}, options, &stats);
  ASSERT_EQ(seed, 0u) << violation
                      << "\nagain: ENGRAM_DURABLE_RESHARD=0 ENGRAM_DURABLE_SEED=" << seed;
}

// Segments fill, are rewritten and freed, and it crashes amid that.
TEST(CheckpointProgramsTest, WhatIsTakenOverIsThere) {
  ProgramStats stats;
  ProgramOptions options;
  options.checkpoints = true;
  options.rewrites = true;
  options.reshards = FromEnvironment("ENGRAM_DURABLE_RESHARD", 1) != 0;
  const auto seeds = Seeds::FromPrefix("ENGRAM_DURABLE", CheckpointSeeds() / 2);
  options.talks = seeds.alone;
  const auto [seed, violation] = RunSeeds(seeds, options, &stats);
  ASSERT_EQ(seed, 0u) << violation << "\nagain: ENGRAM_DURABLE_SEED=" << seed;
  ExpectAllHappened({{"acks", stats.acks},
                     {"checkpoints", stats.checkpoints},
                     {"power_cuts", stats.power_cuts},
                     {"kills", stats.kills},
                     {"segments_freed", stats.segments_freed},
                     {"records_taken_over", stats.records_taken_over},
                     {"crashes_in_takeovers", stats.crashes_in_takeovers},
                     {"pinned_reads", stats.pinned_reads},
                     {"pinned_reads_from_vault", stats.reads_from_vault},
                     {"logs_kept", stats.logs_kept},
                     {"files_loaded_elsewhere", stats.loaded_elsewhere}},
                    seeds.count >= 200);
}

}  // namespace
}  // namespace engram
