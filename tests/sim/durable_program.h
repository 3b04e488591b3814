#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "src/core/hash.h"
#include "tests/sim/durable_model.h"
#include "tests/sim/durable_rig.h"
#include "tests/sim/program_seeds.h"

// Random programs over shards with logs on a simulated disk, against a model of
// what was acknowledged: sessions and requests without one, checkpoints, faults
// of the disk, power cuts, kills, restarts.

namespace engram {

struct ProgramStats {
  uint64_t acks = 0;
  uint64_t refusals = 0;
  uint64_t power_cuts = 0;
  uint64_t kills = 0;
  uint64_t cuts_in_recovery = 0;
  uint64_t flips = 0;
  uint64_t starts = 0;
  uint64_t failed_starts = 0;
  uint64_t recalls = 0;
  uint64_t records_read = 0;  // for these, from the disk
  uint64_t verified = 0;
  uint64_t grown = 0;
  uint64_t disk_full = 0;
  uint64_t disk_failing = 0;
  uint64_t reshards = 0;
  uint64_t lowered = 0;  // sessions that went back, in spaces where they may
  uint64_t checkpoints = 0;
  uint64_t failed_checkpoints = 0;
  uint64_t crashes_in_checkpoints = 0;
  uint64_t crashes_before_recovery = 0;  // while the manifest is read and logs are given up
  uint64_t segments_freed = 0;
  uint64_t records_taken_over = 0;
  uint64_t crashes_in_takeovers = 0;
  uint64_t pinned_reads = 0;
  uint64_t reads_from_vault = 0;
  uint64_t logs_kept = 0;         // of shards that are gone, at a start
  uint64_t loaded = 0;            // starts from a checkpoint
  uint64_t loaded_elsewhere = 0;  // of these, with another number of shards
  uint64_t rebuilds = 0;
  uint64_t relinked = 0;  // nodes, by these
  uint64_t crashes_in_rebuilds = 0;
};

struct ProgramOptions {
  uint64_t seed = 1;
  RigDisks::Lie lie = RigDisks::Lie::kNone;
  bool audits = true;
  bool reshards = true;  // another number of shards now and then
  bool checkpoints = false;
  bool rewrites = false;  // with them: segments fill, and crashes are rarer, but amid takeovers
  bool talks = false;
};

class DurableProgram {
 public:
  DurableProgram(const ProgramOptions& options, ProgramStats* stats);

  // What was violated; empty: nothing.
  const std::string& violation() const { return violation_; }

  void Run();

 private:
  // One who reads records for an answer, long after it was told where they lie.
  struct PinnedRead {
    LogAddress address = kNoLogAddress;
    uint32_t bytes = 0;
    std::string id;
    std::string payload;
  };
  struct Flip {
    std::string folder;
    std::string file;
    uint64_t bit = 0;
  };

  bool OneIn(uint64_t n) { return random_.Below(n) == 0; }
  void Violate(const std::string& what);
  void Say(const std::string& what) const;

  // ---- Set-up and steps ----

  void Draw();
  DurableSetup Setup();
  void SetDelays(bool faults);
  void Step();
  void PollShard();
  // Every part in turn, for the synchronous parts of a program.
  void PollAll();

  // ---- What is checked ----

  // The live payload, empty: none; of the latest version where there is more
  // than one.
  std::string LivePayload(size_t space, size_t id) const;
  void ExpectPossible(size_t space, size_t id, const std::string& when);
  // All of it, while nothing is under way.
  void Verify(const std::string& when);
  // What was found after a restart stands from then on, where nothing may be
  // lost later.
  void Collapse();
  // A live observation is the first that its own vector recalls, with its
  // payload.
  void CheckRecall();

  // ---- Clients, in durable_program_clients.cc ----

  // A new operation, where an id is free for one; nullptr: none.
  Operation* MakeOperation(size_t which);
  void Send(size_t which);
  void SendInSession(size_t which);
  void SendAlone(Operation* operation);
  void Push(Operation* operation, const RigSession& session, Sequence sequence);
  void TakeCompletions();
  void TakeCredit(const Completion& completion);
  void TakeObserved(const Completion& completion);
  void Refused(Client* client, const Operation& operation, RefusalReason reason);
  void Acknowledge(Operation* operation, const FlushAudit::Key& key);
  void Attach(size_t which);
  void ForgetSession(Client* client);
  // `reconnected`: the process went on, and what is under way is still to be
  // answered.
  void TakeResume(size_t which, Sequence last, bool reconnected);
  void Reconnect(size_t which);

  // ---- Crashes, starts, bits that flip, in durable_program_crashes.cc ----

  void AfterPowerFailed();
  void Crash(bool power);
  void NoteRetention();
  // What clients know and may expect from then on.
  void NoteStopped(bool power);
  void Start();
  void StepRecovery();
  // Only a disk that fails may keep it from starting.
  void FailedStart(const std::string& why);
  void AfterRecovery();
  void StartAgain();
  // Everything that was sent is answered in the end, once nothing is wrong any
  // more.
  void Finish();
  bool AllSettled() const;
  // In what is live of one log.
  void FlipABit();
  // Two in one block cannot be mended.
  void UndoFlip();

  // ---- Checkpoints, in durable_program_checkpoints.cc ----

  void BeginRebuild();
  void NoteRebuild();
  // Whether that was the step.
  bool StepCheckpoints();
  void PollCheckpointer();
  // Enters, or reads and leaves.
  void Pin();
  // The segments that an observation lies in.
  std::set<LogSegment> NamedSegments() const;
  // Nothing else goes on: it succeeds, and what is not needed any more is gone.
  void CheckpointAll();
  // What lies on the disk after a checkpoint at rest.
  void ExpectRoom();
  // Everything was answered before the checkpoint.
  void ExpectNothingReplayed();

  const ProgramOptions options_;
  ProgramStats& stats_;
  SplitMix64 random_;
  SplitMix64 rebuild_random_;
  std::unique_ptr<DurableRig> rig_;
  std::string violation_;
  uint64_t now_ = 1;
  uint64_t connections_ = 0;

  uint16_t max_shards_ = 1;
  uint16_t shards_ = 1;
  uint16_t producers_ = 1;
  bool reshards_ = false;
  uint64_t grow_at_ = 0;
  uint32_t graph_from_ = SpaceOptions::kGraphFrom;
  bool flips_bits_ = false;
  bool faulty_ = false;
  bool big_payloads_ = false;
  bool fills_segments_ = false;
  uint32_t rewrite_below_permille_ = 500;
  int64_t max_delay_ns_ = 0;
  uint64_t block_pages_ = 0;
  uint32_t max_writes_ = 1;
  uint32_t segment_bytes_ = 0;
  uint32_t ahead_ = 1;

  ReadPins::Epoch pin_ = 0;  // of the one who reads by himself; 0: none
  std::vector<PinnedRead> pinned_;

  std::vector<ModelSpace> spaces_;
  std::vector<Client> clients_;
  std::vector<std::unique_ptr<Operation>> operations_;
  uint64_t starts_ = 0;
  bool power_was_cut_ = false;  // when it last stopped
  bool recovering_ = false;
  uint64_t recovery_steps_ = 0;
  bool finishing_ = false;
  bool has_faults_ = false;
  bool had_faults_ = false;  // at any time since the start
  std::optional<Flip> flip_;
  std::optional<Completion> hello_;
  size_t attaching_ = SIZE_MAX;
};

// The first seed that violates something, and what; 0: none.
std::pair<uint64_t, std::string> RunSeeds(const Seeds& seeds, const ProgramOptions& like,
                                          ProgramStats* stats);

}  // namespace engram
