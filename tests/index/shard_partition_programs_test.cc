// Random programs over a space of several partitions, against a model of what was answered.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/partition_rig.h"

namespace engram::partitions {
namespace {

// One operation on an id, in the order of stamps: (round in which its home took it, its place in
// that round).
struct Operation {
  std::string id;
  ObservationOp op = ObservationOp::kUpsert;
  std::string payload;
  // Where it is certain: the payload that lives once it is done, empty: none; whether it hides one;
  // and the one that then lives or is hidden.
  std::string after{};
  bool hides = false;
  std::string restored{};
  size_t client = 0;
  Sequence sequence = 0;
  uint64_t taken_round = 0;  // 0: not yet
  int64_t taken_unix_ns = 0;
  bool answered = false;
  bool refused = false;
};

// Clients at different homes, each with a session or without, write the same few ids while the
// space grows and shards are stepped in any order. The clock moves on between two steps, so the
// order of the steps in which the homes took them is the order of the stamps.
//
// Some ids are only upserted and deleted. Others are suppressed and restored, too: on some of them
// one operation is done after the other, from any client, so that it is certain what each of them
// does; on others they meet: then it is certain which content stands, and whether it is hidden is
// not.
class PartitionProgram {
 public:
  explicit PartitionProgram(uint64_t seed)
      : random_(seed), rig_(First(), ProgramOptions(), kShards, kClients) {
    std::vector<size_t> homes(kShards);
    for (size_t s = 0; s < kShards; ++s) homes[s] = s;
    // The home of the first client holds the first partition.
    std::swap(homes[0], homes[rig_.ShardOfPartition(0)]);
    for (size_t c = 0; c < kClients; ++c) {
      if (c > 0) std::swap(homes[c], homes[c + random_.Below(kShards - c)]);
      clients_.push_back(PartitionRig::AloneAt(homes[c]));
      clients_.back().producer = c;
      clients_.back().origin = 100 + c;
    }
  }

  void Run(int steps) {
    for (int i = 0; i < steps && !testing::Test::HasFailure(); ++i) Step();
    for (size_t s = 0; s < kShards; ++s) PollOne(s);  // The last ones are taken.
    rig_.Settle();
    TakeAnswers();
    for (const Operation& operation : operations_) EXPECT_TRUE(operation.answered);
    CheckEnd();
    rig_.ExpectNothingLeft();
  }
  uint16_t partitions() { return rig_.space().partitions(); }
  uint64_t snapshots_checked() const { return snapshots_checked_; }
  uint64_t refusals() const { return refusals_; }
  uint64_t hidings() const { return hidings_; }
  uint64_t restored() const { return restored_; }

 private:
  static constexpr size_t kClients = 4;
  static constexpr uint64_t kIds = 40;

  uint16_t First() { return static_cast<uint16_t>(1 + random_.Below(3)); }
  ShardOptions ProgramOptions() {
    ShardOptions options = Options(random_.Below(2) == 0 ? 0 : 4 + random_.Below(8),
                                   static_cast<uint32_t>(4 << random_.Below(4)));
    options.snapshot_keep_ns = 2 * kNanosPerMilli;
    return options;
  }

  void Step() {
    const uint64_t choice = random_.Below(12);
    if (choice < 4) {
      Push(random_.Below(kClients));
    } else if (choice == 4 && random_.Below(40) == 0) {
      (void)rig_.space().Grow(rig_.space().partitions());
    } else if (choice == 5) {
      CheckSnapshot();
    } else {
      PollOne(random_.Below(kShards));
    }
  }

  // With or without a session.
  void Open(size_t client) {
    is_open_[client] = true;
    if (random_.Below(3) == 0) return;
    for (size_t s = 0; s < kShards; ++s) PollOne(s);  // So that what waits is taken in its round.
    clients_[client] = rig_.OpenAt(clients_[client].shard, client);
    TakeAnswers();
  }

  // A space of one partition has one home.
  void Push(size_t client) {
    if (outstanding_[client] >= 6 || (client > 0 && rig_.space().partitions() == 1)) return;
    if (!is_open_[client]) Open(client);
    RigSession& session = clients_[client];
    const uint64_t number = random_.Below(kIds);
    Operation operation{.id = IdAt(number),
                        .op = ObservationOp::kUpsert,
                        .payload = std::to_string(operations_.size()),
                        .client = client};
    if (random_.Below(3) == 0) operation.op = ObservationOp::kDelete;
    if (UseOf(operation.id) != Use::kPlain && session.id.value() == 0 && random_.Below(2) == 0) {
      operation.op = random_.Below(2) == 0 ? ObservationOp::kSuppress : ObservationOp::kRestore;
      ++hidings_;
    }
    if (!Foretell(&operation)) return;
    operation.sequence = session.next++;
    rig_.PushObserve(session, operation.sequence, ObservationOf(operation));
    ++outstanding_[client];
    operations_.push_back(operation);
  }

  enum class Use : uint8_t { kPlain, kInTurn, kMeet };
  static Use UseOf(const std::string& id) {
    const int number = std::stoi(id.substr(2));
    return number % 4 < 2 ? Use::kPlain : number % 4 == 2 ? Use::kInTurn : Use::kMeet;
  }
  static bool IsContent(const Operation& operation) {
    return operation.op == ObservationOp::kUpsert || operation.op == ObservationOp::kDelete;
  }
  // What it leads to is not certain.
  static bool IsOpen(const Operation& operation) {
    return !IsContent(operation) && UseOf(operation.id) == Use::kMeet;
  }
  static Observation ObservationOf(const Operation& operation) {
    if (operation.op == ObservationOp::kUpsert) return Upsert(operation.id, 1, operation.payload);
    return {.op = operation.op, .id = operation.id};
  }
  // False where it is not the id's turn.
  bool Foretell(Operation* operation) const {
    const bool is_upsert = operation->op == ObservationOp::kUpsert;
    if (is_upsert) operation->after = operation->restored = operation->payload;
    if (UseOf(operation->id) != Use::kInTurn) return true;
    const Operation* last = nullptr;
    for (const Operation& before : operations_) {
      if (before.id != operation->id) continue;
      if (!before.answered) return false;
      if (!before.refused) last = &before;
    }
    if (last == nullptr || IsContent(*operation)) return true;
    operation->restored = last->restored;
    operation->hides = operation->op == ObservationOp::kSuppress && !last->restored.empty();
    if (operation->op == ObservationOp::kRestore) operation->after = last->restored;
    return true;
  }

  void PollOne(size_t shard) {
    ++round_;
    rig_.clock.AdvanceNs(static_cast<int64_t>(50'000 + random_.Below(20'000)));
    for (Operation& operation : operations_) {
      if (operation.taken_round == 0 && clients_[operation.client].shard == shard) {
        operation.taken_round = round_;
        operation.taken_unix_ns = rig_.clock.WallNs();
      }
    }
    rig_.PollShard(shard);
    TakeAnswers();
  }

  void TakeAnswers() {
    for (const auto& [producer, completion] : rig_.completions) {
      if (completion.kind != CompletionKind::kObserve) continue;
      const auto found = std::ranges::find_if(operations_, [&](const Operation& operation) {
        return operation.client == producer && operation.sequence == completion.sequence &&
               !operation.answered;
      });
      ASSERT_NE(found, operations_.end());
      found->answered = true;
      found->refused = completion.reason != kNone;
      --outstanding_[producer];
      refusals_ += static_cast<uint64_t>(found->refused);
      // Whoever is refused begins there again; what it had sent after it meets a gap.
      RigSession& session = clients_[producer];
      if (!found->refused) {
        CheckVisible(*found);
      } else if (session.id.value() != 0) {
        EXPECT_TRUE(completion.reason == RefusalReason::kQueueFull ||
                    completion.reason == RefusalReason::kSequenceGap);
        if (outstanding_[producer] == 0) session.next = LastTaken(producer) + 1;
      }
    }
    rig_.completions.clear();
  }

  Sequence LastTaken(size_t client) const {
    Sequence last = 0;
    for (const Operation& operation : operations_) {
      if (operation.client == client && !operation.refused) last = operation.sequence;
    }
    return last;
  }

  // Of the operations that may have had an effect, in the order of their stamps. Within a round
  // they are those of one client, as they were pushed.
  std::vector<const Operation*> OperationsOn(const std::string& id) const {
    std::vector<const Operation*> found;
    for (const Operation& operation : operations_) {
      if (operation.id == id && operation.taken_round > 0 && !operation.refused) {
        found.push_back(&operation);
      }
    }
    std::ranges::stable_sort(found, {}, &Operation::taken_round);
    return found;
  }

  // What was answered is there, or something later.
  void CheckVisible(const Operation& answered) {
    if (IsOpen(answered)) return;
    const std::vector<const Operation*> order = OperationsOn(answered.id);
    const auto live = rig_.LiveOf(answered.id);
    CommitStamp latest = kNoStamp;
    std::string payload;
    for (const auto& [shard, stored] : live) {
      if (stored.stamp < latest) continue;
      latest = stored.stamp;
      payload.assign(reinterpret_cast<const char*>(stored.payload.data()), stored.payload.size());
    }
    if (UseOf(answered.id) == Use::kInTurn) {
      EXPECT_LE(live.size(), 1u);
    }
    bool reached = false;
    for (const Operation* operation : order) {
      reached = reached || operation == &answered;
      if (!reached) continue;
      if (operation->after.empty() ? live.empty() : payload == operation->after) return;
      // Of what came before it.
      if (IsOpen(*operation) && operation->op == ObservationOp::kRestore) return;
    }
    ADD_FAILURE() << answered.id << ": operation " << answered.payload << " was answered, and "
                  << (live.empty() ? "nothing" : payload) << " is there";
  }

  // The snapshot that a recall would be given now.
  void CheckSnapshot() {
    CommitStamp snapshot = kOpenStamp;
    for (uint16_t s = 0; s < kShards; ++s) {
      snapshot = std::min(snapshot, rig_.stamps->CompleteUpTo(ShardId(s), rig_.clock.WallNs()));
    }
    std::map<std::string, std::string> seen;
    for (const auto& each : rig_.shards) {
      const Space* part = each->FindSpace(kSpace);
      if (part == nullptr) continue;
      if (part->horizon() > snapshot) return;  // It would be refused.
      for (NodeId node = 0; node < part->node_count(); ++node) {
        if (!part->IsVisible(node, snapshot)) continue;
        const StoredObservation stored = part->Get(node);
        EXPECT_LE(stored.stamp, snapshot);
        const std::string payload(reinterpret_cast<const char*>(stored.payload.data()),
                                  stored.payload.size());
        EXPECT_TRUE(seen.emplace(stored.id, payload).second)
            << stored.id << " twice in a snapshot: " << payload;
      }
    }
    // A round draws its stamps within 20 us of its clock.
    ++snapshots_checked_;
    for (uint64_t i = 0; i < kIds; ++i) {
      const std::string id = IdAt(i);
      std::vector<std::string> allowed = {""};
      for (const Operation* operation : OperationsOn(id)) {
        const auto from = static_cast<CommitStamp>(operation->taken_unix_ns);
        if (from + 20'000 <= snapshot && !IsOpen(*operation)) allowed.clear();
        if (from <= snapshot + kMaxShards) allowed.push_back(operation->after);
      }
      const std::string found = seen.contains(id) ? seen[id] : "";
      EXPECT_NE(std::ranges::find(allowed, found), allowed.end())
          << id << " is " << found << " in snapshot " << snapshot << Describe(id);
    }
  }

  std::string Describe(const std::string& id) const {
    std::string text;
    for (const Operation& operation : operations_) {
      if (operation.id != id) continue;
      text += "\n  " + operation.payload + " op " + std::to_string(static_cast<int>(operation.op)) +
              " by client " + std::to_string(operation.client) + " taken at " +
              std::to_string(operation.taken_unix_ns) + (operation.answered ? ", answered" : "") +
              (operation.refused ? ", refused" : "");
    }
    return text;
  }

  // Of the contents the last one stands, live or hidden, once; what is hidden can be restored.
  void CheckEnd() {
    std::vector<std::pair<std::string, std::string>> hidden;
    for (uint64_t i = 0; i < kIds; ++i) {
      const std::string id = IdAt(i);
      const std::vector<const Operation*> order = OperationsOn(id);
      const Operation* content = nullptr;
      for (const Operation* operation : order) {
        if (IsContent(*operation)) content = operation;
      }
      const bool is_there = content != nullptr && content->op == ObservationOp::kUpsert;
      const auto live = rig_.LiveOf(id);
      const bool may_hide =
          is_there && !IsContent(*order.back()) && (order.back()->hides || IsOpen(*order.back()));
      if (!is_there) {
        EXPECT_TRUE(live.empty()) << id << " was deleted";
      } else if (live.empty() && may_hide) {
        hidden.emplace_back(id, content->payload);
      } else {
        EXPECT_EQ(rig_.PayloadOf(id), content->payload) << id << Describe(id);
        EXPECT_FALSE(order.back()->hides) << id << Describe(id);
      }
    }
    EXPECT_EQ(rig_.CountHidden(), hidden.size());
    for (const auto& [id, payload] : hidden) {
      EXPECT_TRUE(rig_.Existed(clients_[0].shard, Restore(id))) << id << Describe(id);
      EXPECT_EQ(rig_.PayloadOf(id), payload) << id << Describe(id);
    }
    EXPECT_EQ(rig_.CountHidden(), 0u);
    restored_ += hidden.size();
  }

  SplitMix64 random_;
  PartitionRig rig_;
  std::vector<RigSession> clients_;
  std::map<size_t, bool> is_open_;
  std::map<size_t, int> outstanding_;
  std::vector<Operation> operations_;
  uint64_t round_ = 0;
  uint64_t snapshots_checked_ = 0;
  uint64_t refusals_ = 0;
  uint64_t hidings_ = 0;
  uint64_t restored_ = 0;
};

TEST(ShardPartitionProgramsTest, RandomProgramsKeepTheLaterStamp) {
  std::map<uint16_t, int> partitions;
  uint64_t snapshots = 0;
  uint64_t refusals = 0;
  uint64_t hidings = 0;
  uint64_t restored = 0;
  for (uint64_t seed = 1; seed <= 150 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    PartitionProgram program(seed);
    program.Run(1'500);
    ++partitions[program.partitions()];
    snapshots += program.snapshots_checked();
    refusals += program.refusals();
    hidings += program.hidings();
    restored += program.restored();
  }
  EXPECT_GE(partitions.size(), 3u) << "some grow, some do not";
  EXPECT_GT(snapshots, 1'000u);
  EXPECT_GT(refusals, 100u) << "some run out of room";
  EXPECT_GT(hidings, 1'000u);
  EXPECT_GT(restored, 100u) << "some are hidden in the end";
}

}  // namespace
}  // namespace engram::partitions
