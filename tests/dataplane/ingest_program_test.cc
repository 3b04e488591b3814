// Programs drawn from a seed: many clients that send sound, invalid, cut and repeated frames to a
// whole ingress core, over a network and shards that are late and fail on purpose.

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "src/core/hash.h"
#include "tests/dataplane/fake_shard.h"
#include "tests/dataplane/ingest_harness.h"
#include "tests/dataplane/wire.h"

namespace engram {
namespace {

constexpr Sequence kTarget = 80;
constexpr int kWildSteps = 1500;
constexpr int kStepsMax = 60'000;

std::string SpaceOf(size_t client) { return "space-" + std::to_string(client % 3); }
std::string IdOf(size_t client, Sequence sequence) {
  return std::to_string(client) + "." + std::to_string(sequence);
}
// What each number is worth is fixed, so that it is the same however often it is sent.
bool IsNan(Sequence sequence) { return sequence % 13 == 5; }
bool IsRefusedByShard(Sequence sequence) { return sequence % 11 == 7 && !IsNan(sequence); }

// A third of them never goes back (FORMAT.md): what is refused they do not send again.
bool NeverGoesBack(size_t client) { return client % 3 == 1; }

// One client of the program, through all its connections.
class ProgramClient {
 public:
  ProgramClient(size_t index, IngestHarness* harness, SplitMix64* random)
      : index_(index), harness_(harness), random_(random) {}

  // One action. `wild`: also such as no honest client takes.
  void Act(bool wild) {
    if (!connection_) {
      connection_ = std::make_unique<TestClient>(harness_);
      greeted_ = false;
      last_ack_ = 0;
      used_up_.clear();
      connection_->Send(HelloBytes({.features = NeverGoesBack(index_) ? 8u : 0u,
                                    .space = SpaceOf(index_),
                                    .session = session_}));
      return;
    }
    Read();
    if (connection_->closed()) {
      Leave(false);
      return;
    }
    if (wild && Chance(4)) {
      Misbehave();
    } else if (greeted_ && Chance(40)) {
      Observe(next_, wild && Chance(20));
    } else if (greeted_ && Chance(3)) {
      const std::array<float, 2> query{1, 1};
      connection_->Send(RecallBytes(random_->Next(), F32Recall(query)));
    } else if (Chance(2)) {
      connection_->Send(MakeFrame(kWirePing, {}));
    } else if (greeted_ && Chance(4)) {
      connection_->Send(Question());
    }
  }
  void Leave(bool abort) {
    if (!connection_) return;
    EXPECT_TRUE(connection_->sound());
    if (abort) {
      connection_->Abort();
    } else {
      connection_->Close();
    }
    connection_.reset();
  }

  bool done() const { return settled_ >= kTarget; }
  uint64_t session() const { return session_; }
  size_t index() const { return index_; }
  uint64_t trace() const { return trace_; }

 private:
  bool Chance(uint64_t percent) { return random_->Below(100) < percent; }

  WireBytes Frame(Sequence first, size_t count) {
    std::vector<WireRecord> records;
    for (Sequence sequence = first; sequence < first + count; ++sequence) {
      const std::array<float, 2> vector{
          1, IsNan(sequence) ? std::numeric_limits<float>::quiet_NaN() : 2};
      // Some frames are larger than a piece of the stream, some than a block.
      const size_t payload = sequence % 17 == 3 ? 6000 : sequence % 20;
      records.push_back(F32Record(IdOf(index_, sequence), vector, std::string(payload, 'p')));
    }
    return ObserveBytes(session_, first, records);
  }
  void Observe(Sequence first, bool beyond_credit) {
    const Sequence last = beyond_credit ? kTarget : std::min<Sequence>(kTarget, credit_);
    if (first > last) return;
    const size_t count = std::min<size_t>(1 + random_->Below(6), last - first + 1);
    connection_->Send(Frame(first, count));
    next_ = std::max(next_, first + count);
  }

  // What an operator's tools send, with what they may not say among it.
  WireBytes Question() {
    const uint64_t id = random_->Next();
    switch (random_->Below(4)) {
      case 0:
        return IntrospectBytes(id, 1 + random_->Below(2));
      case 1:
        return ScrollBytes(id, random_->Below(3), static_cast<uint16_t>(random_->Below(3)),
                           static_cast<uint16_t>(1 + random_->Below(600)),
                           static_cast<uint16_t>(random_->Below(4)));
      case 2:
        return CheckBytes(id, static_cast<uint16_t>(random_->Below(4)));
      default:
        return CommandBytes(id,
                            static_cast<uint8_t>(random_->Below(2) == 0 ? SpaceCommand::kCompact
                                                                        : SpaceCommand::kRebuild),
                            SpaceOf(random_->Below(4)));
    }
  }

  void Misbehave() {
    WireBytes frame = Frame(next_, 2);
    switch (random_->Below(10)) {
      case 0:  // a flipped bit
        frame[random_->Below(frame.size())] ^= static_cast<std::byte>(1 << random_->Below(8));
        connection_->Send(frame);
        break;
      case 1:  // killed in mid-frame
        connection_->Send(std::span(frame).first(random_->Below(frame.size())));
        harness_->Run(static_cast<int>(random_->Below(8)));
        Leave(random_->Below(2) == 0);
        break;
      case 2:  // a repeat
        if (greeted_ && settled_ > 0) Observe(1 + random_->Below(settled_), false);
        break;
      case 3:  // a gap
        connection_->Send(Frame(next_ + 1 + random_->Below(5), 1));
        break;
      case 4:
        connection_->Send(MakeFrame(kWireClose, {}));
        break;
      case 5:
        Leave(true);
        break;
      case 6:  // hello again
        connection_->Send(HelloBytes({.space = SpaceOf(index_)}));
        break;
      case 7:  // fences itself
        Leave(false);
        break;
      case 8: {  // a record that does not fit
        frame.resize(frame.size() - 3);
        SetWireNumber(frame, 8, 4, frame.size() - 32);
        SealWire(frame);
        connection_->Send(frame);
        break;
      }
      default:
        connection_->Send(MakeFrame(static_cast<uint8_t>(random_->Below(32)), {}));
        break;
    }
  }

  void Read() {
    for (const WireFrame& frame : connection_->TakeAll()) {
      trace_ = MixBits(trace_ ^ MixBits(frame.type) ^ frame.sequence ^ OracleCrc(frame.body));
      switch (frame.type) {
        case kWireHelloAck:
          EXPECT_TRUE(session_ == 0 || frame.session == session_);
          session_ = frame.session;
          greeted_ = true;
          next_ = frame.sequence + 1;
          last_ack_ = frame.sequence;
          credit_ = WireNumber(frame.body, 8, 8);
          ExpectSettled(frame.sequence, frame.sequence);
          break;
        case kWireAck:
          EXPECT_EQ(frame.session, session_);
          EXPECT_GE(frame.sequence, last_ack_) << "an ack goes back";
          EXPECT_GE(WireNumber(frame.body, 0, 8), credit_) << "credit falls";
          credit_ = WireNumber(frame.body, 0, 8);
          ExpectSettled(last_ack_, frame.sequence);
          last_ack_ = frame.sequence;
          break;
        case kWireNak:
          ReadNak(frame);
          break;
        default:
          break;
      }
    }
  }
  void ReadNak(const WireFrame& frame) {
    const WireNak nak = ParseNak(frame);
    if (nak.closing || nak.refused_type != kWireObserve) return;
    if (nak.consumed && NeverGoesBack(index_) &&
        HasEffect(RefusalReason{nak.reason}, RefusalEffect::kWaits)) {
      EXPECT_EQ(nak.expected, frame.sequence + 1);
      EXPECT_GT(frame.sequence, last_ack_) << "refused, and acked before that";
      EXPECT_TRUE(used_up_.insert(frame.sequence).second) << "refused twice";
      EXPECT_EQ(SettledAt(frame.sequence), nullptr) << "refused, and taken";
    } else if (nak.consumed) {
      EXPECT_TRUE(IsNan(frame.sequence) || IsRefusedByShard(frame.sequence)) << frame.sequence;
      EXPECT_EQ(nak.expected, frame.sequence + 1);
    } else {
      EXPECT_TRUE(!NeverGoesBack(index_) || nak.reason == 60u) << nak.text;
      EXPECT_GT(nak.expected, last_ack_) << "told to send again what is settled";
      next_ = nak.expected;
    }
  }

  const FakeShard::Session* SessionAtShard() const {
    for (size_t s = 0; s < harness_->shards(); ++s) {
      const auto& sessions = harness_->shard(s).sessions();
      if (const auto found = sessions.find(session_); found != sessions.end()) {
        return &found->second;
      }
    }
    return nullptr;
  }
  const FakeShard::Settled* SettledAt(Sequence sequence) const {
    const FakeShard::Session* session = SessionAtShard();
    if (session == nullptr) return nullptr;
    const auto found =
        std::ranges::lower_bound(session->settled, sequence, {}, &FakeShard::Settled::sequence);
    return found != session->settled.end() && found->sequence == sequence ? &*found : nullptr;
  }
  // An ack of `sequence` after one of `before`.
  void ExpectSettled(Sequence before, Sequence sequence) {
    settled_ = std::max(settled_, sequence);
    const FakeShard::Session* session = SessionAtShard();
    ASSERT_NE(session, nullptr);
    if (!NeverGoesBack(index_)) {
      EXPECT_LE(sequence, session->last_sequence) << "acked more than the shard took";
      return;
    }
    for (Sequence number = before + 1; number <= sequence; ++number) {
      EXPECT_TRUE(used_up_.contains(number) || SettledAt(number) != nullptr)
          << number << " is acked, and was neither taken nor refused";
    }
  }

  size_t index_;
  IngestHarness* harness_;
  SplitMix64* random_;
  std::unique_ptr<TestClient> connection_;
  uint64_t session_ = 0;
  bool greeted_ = false;
  Sequence next_ = 1;
  Sequence settled_ = 0;
  Sequence last_ack_ = 0;
  uint64_t credit_ = 0;
  uint64_t trace_ = 0;
  std::set<Sequence> used_up_;  // by a refusal for lack of room, on this connection
};

// Runs the program of a seed; returns a digest of all that the clients read.
uint64_t RunProgram(uint64_t seed) {
  SplitMix64 random(seed);
  HarnessOptions options;
  options.seed = seed;
  options.shards = static_cast<uint16_t>(1 + random.Below(3));
  options.partitions = static_cast<uint16_t>(1 + random.Below(options.shards));
  options.lane_capacity = 16;
  options.recall_lane_capacity = 8;
  options.ingest.max_recalls = 3;
  options.ingest.events_per_poll = static_cast<int>(1 + random.Below(64));
  options.network.network.max_connections = 32;
  options.network.max_chunk_bytes = 1 + random.Below(3000);
  // Less than all unfinished frames together, but where bytes come so slowly that all are
  // unfinished at once: there the oldest is always evicted and none would ever be finished.
  const bool slow = options.network.max_chunk_bytes < 600 || options.ingest.events_per_poll < 8;
  options.ingest.partial_frame_bytes = (slow ? 20 : 6) * 4096;
  options.network.reset_probability = random.Below(2) == 0 ? 0.0 : 0.0005;
  options.network.client_window_bytes = 8192;
  IngestHarness harness(options);
  for (size_t s = 0; s < harness.shards(); ++s) {
    FakeShard& shard = harness.shard(s);
    shard.max_delay_ns = static_cast<int64_t>(random.Below(2 * kNanosPerMilli));
    shard.credit = 10 + random.Below(40);
    shard.hits = {HitBatch({{.id = "hit", .stamp = s}}),
                  HitBatch({{.id = std::to_string(s), .payload = std::string(3000, 'h')}})};
    shard.judge = [&random](const ObserveRequest& request, std::string_view) {
      if (IsRefusedByShard(request.sequence)) return RefusalReason::kBadDtype;
      return random.Below(30) == 0 ? RefusalReason::kBacklogFull : RefusalReason::kNone;
    };
  }
  std::vector<ProgramClient> clients;
  for (size_t i = 0; i < 8; ++i) clients.emplace_back(i, &harness, &random);
  int steps = 0;
  const auto all_done = [&] { return std::ranges::all_of(clients, &ProgramClient::done); };
  for (; steps < kWildSteps || (!all_done() && steps < kStepsMax); ++steps) {
    const bool wild = steps < kWildSteps;
    for (size_t s = 0; s < harness.shards(); ++s) {
      const bool toggle = random.Below(40) == 0;
      if (toggle) harness.shard(s).SetStalled(wild && !harness.shard(s).stalled[0]);
    }
    for (ProgramClient& client : clients) client.Act(wild);
    harness.Step(static_cast<int64_t>(random.Below(200 * kNanosPerMicro)));
  }
  EXPECT_TRUE(all_done()) << "seed " << seed << ": no way forward";
  uint64_t trace = static_cast<uint64_t>(steps);
  for (ProgramClient& client : clients) {
    client.Leave(false);
    trace = MixBits(trace ^ client.trace());
  }
  EXPECT_TRUE(harness.Finish()) << "seed " << seed << ": something is not given back";
  // Each number was settled once, in order, with what was sent under it.
  for (const ProgramClient& client : clients) {
    const FakeShard::Session* session = nullptr;
    for (size_t s = 0; s < harness.shards(); ++s) {
      const auto found = harness.shard(s).sessions().find(client.session());
      if (found != harness.shard(s).sessions().end()) session = &found->second;
    }
    if (session == nullptr) {
      ADD_FAILURE() << "no session";
      continue;
    }
    Sequence last = 0;
    for (const FakeShard::Settled& settled : session->settled) {
      const Sequence sequence = settled.sequence;
      EXPECT_GT(sequence, last);
      EXPECT_TRUE(sequence == last + 1 || NeverGoesBack(client.index()));
      last = sequence;
      const RefusalReason reason = IsNan(sequence)              ? RefusalReason::kNotFinite
                                   : IsRefusedByShard(sequence) ? RefusalReason::kBadDtype
                                                                : RefusalReason::kNone;
      EXPECT_EQ(settled.reason, reason);
      EXPECT_EQ(settled.id, IsNan(sequence) ? "" : IdOf(client.index(), sequence));
    }
    // Of who never goes back, much is refused while a shard stands still.
    EXPECT_GE(session->settled.size(), NeverGoesBack(client.index()) ? kTarget / 8 : kTarget);
  }
  return trace;
}

class IngestProgramTest : public testing::TestWithParam<uint64_t> {};

TEST_P(IngestProgramTest, EverySequenceIsSettledOnceAndInOrder) { RunProgram(GetParam()); }

INSTANTIATE_TEST_SUITE_P(Seeds, IngestProgramTest, testing::Range(uint64_t{1}, uint64_t{13}));

TEST(IngestProgramTraceTest, TheSameSeedGivesTheSameTrace) {
  EXPECT_EQ(RunProgram(101), RunProgram(101));
  EXPECT_NE(RunProgram(101), RunProgram(102));
}

}  // namespace
}  // namespace engram
