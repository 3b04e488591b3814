// Sessions of clients that never go back: their numbers have gaps, through refusals, resumes,
// checkpoints and crashes.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "src/core/hash.h"
#include "tests/sim/checkpoint_steps.h"
#include "tests/sim/program_seeds.h"

namespace engram {
namespace {

constexpr size_t kSessions = 3;
constexpr int kRounds = 60;

class SkippedNumbersTest : public CheckpointSteps, public testing::WithParamInterface<uint64_t> {
 protected:
  // One client's session and what it knows of it.
  struct Client {
    RigSession session;
    Sequence next = 1;                      // that it has not used yet
    Sequence last = 0;                      // that was taken, or refused for good
    std::map<Sequence, std::string> taken;  // the ids
  };
  // What a number of a batch is.
  enum class Kind : uint8_t { kSound, kInvalid, kWaits, kRepeat };
  struct Sent {
    Kind kind = Kind::kSound;
    Sequence sequence = 0;
    SlotId slot = kNoSlot;
  };

  static std::string IdOf(size_t client, Sequence sequence) {
    return std::to_string(client) + "." + std::to_string(sequence);
  }

  void Open(Client* client) {
    client->session = rig_.shards->Open(0, ++connections_, "space",
                                        {.dimension = 4, .session = client->session.id});
    client->session.may_skip = true;
    EXPECT_EQ(client->session.last_settled, client->last);
    // What was refused last is free again.
    client->next = client->last + 1;
  }

  // Some numbers at once, with gaps for those that were refused on the way here.
  void Observe(size_t which) {
    Client& client = clients_[which];
    std::vector<Sent> sent;
    for (uint64_t i = 1 + random_.Below(6); i > 0; --i) {
      Sent one;
      if (client.last > 0 && random_.Below(6) == 0) {
        one = {.kind = Kind::kRepeat, .sequence = 1 + random_.Below(client.last)};
      } else {
        client.next += random_.Below(4) == 0 ? 1 + random_.Below(5) : 0;
        const uint64_t chance = random_.Below(10);
        one = {.kind = chance == 0  ? Kind::kInvalid
                       : chance < 4 ? Kind::kWaits
                                    : Kind::kSound,
               .sequence = client.next++};
      }
      one.slot = rig_.shards->PushObserve(client.session, one.sequence, ObservationFor(which, one));
      sent.push_back(one);
    }
    rig_.shards->completions.clear();
    ASSERT_TRUE(
        rig_.shards->PollUntil([&] { return rig_.shards->completions.size() >= sent.size(); }));
    Take(which, sent);
  }
  static Observation ObservationFor(size_t which, const Sent& one) {
    if (one.kind == Kind::kInvalid) {
      return {.op = ObservationOp::kSkip, .skip_reason = RefusalReason::kBadScale};
    }
    if (one.kind == Kind::kWaits) {
      return {.op = ObservationOp::kSkip, .skip_reason = RefusalReason::kQueueFull};
    }
    const std::string repeated = one.kind == Kind::kRepeat ? "x" : "";
    return Upsert(repeated + IdOf(which, one.sequence), std::to_string(one.sequence));
  }

  // 1. Each was answered once, as it deserved, or for want of room.
  // 2. What was taken or refused for good was answered in order, and what waits before that.
  void Take(size_t which, const std::vector<Sent>& sent) {
    Client& client = clients_[which];
    Sequence settled = 0;
    ASSERT_EQ(rig_.shards->completions.size(), sent.size());
    for (const auto& [producer, completion] : rig_.shards->completions) {
      const auto one = std::ranges::find(sent, completion.slot, &Sent::slot);
      ASSERT_NE(one, sent.end());
      EXPECT_EQ(completion.sequence, one->sequence);
      if (completion.repeated) {
        EXPECT_EQ(one->kind, Kind::kRepeat);
        continue;
      }
      EXPECT_GT(completion.sequence, settled) << "settled before what comes before it";
      if (HasEffect(completion.reason, RefusalEffect::kWaits)) continue;
      settled = completion.sequence;
      client.last = settled;
      if (completion.reason == RefusalReason::kNone) {
        EXPECT_EQ(one->kind, Kind::kSound);
        client.taken[settled] = IdOf(which, settled);
      } else {
        EXPECT_EQ(one->kind, Kind::kInvalid);
      }
    }
  }

  void ExpectWhatWasTaken() {
    size_t taken = 0;
    for (const Client& client : clients_) {
      for (const auto& [sequence, id] : client.taken) {
        EXPECT_EQ(PayloadOf(id), std::to_string(sequence)) << id;
      }
      taken += client.taken.size();
    }
    const Space* space = rig_.shards->shard->FindSpace("space");
    EXPECT_EQ(space == nullptr ? 0 : space->live(), taken) << "something else was stored, too";
  }

  SplitMix64 random_{GetParam()};
  Origin connections_ = 0;
  std::vector<Client> clients_{kSessions};
};

TEST_P(SkippedNumbersTest, GapsOutliveEverything) {
  ASSERT_EQ(Start(), "");
  for (Client& client : clients_) Open(&client);
  for (int round = 0; round < kRounds; ++round) {
    SCOPED_TRACE(round);
    ASSERT_NO_FATAL_FAILURE(Observe(random_.Below(kSessions)));
    for (int i = 0; i < 20; ++i) Poll();
    const uint64_t what = random_.Below(12);
    if (what == 0) {
      Client& client = clients_[random_.Below(kSessions)];
      // A session that has taken nothing ends with its connection.
      if (client.last == 0) continue;
      rig_.shards->Detach(client.session);
      Open(&client);
    } else if (what == 1) {
      ASSERT_TRUE(Checkpoint());
    } else if (what == 2) {
      if (random_.Below(2) == 0) rig_.CutPower();
      if (rig_.running()) rig_.Kill();
      ASSERT_EQ(Start(), "");
      for (Client& client : clients_) {
        if (client.last == 0) client.session.id = SessionId();
        Open(&client);
      }
      ExpectWhatWasTaken();
    }
  }
  ExpectWhatWasTaken();
}

INSTANTIATE_TEST_SUITE_P(Seeds, SkippedNumbersTest, testing::Range(uint64_t{1}, uint64_t{21}));

}  // namespace
}  // namespace engram
