#include "src/control/session_stream.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "src/appliance.h"
#include "src/core/clock.h"
#include "src/core/hash.h"

namespace engram {
namespace {

using Kind = StreamEvent::Kind;
using Taken = SessionStream::Taken;

// An event with what its views said.
struct Told {
  StreamEvent event;
  std::string id;
  std::string text;
};

// A stream and what it was told.
struct TestStream final : public StreamClient {
  void OnReady() override { ++ready; }
  void OnGone() override { gone = true; }

  // Takes the events that there are.
  void Listen() {
    while (const auto event = stream->Next()) {
      told.push_back({*event, std::string(event->id), std::string(event->text)});
      told.back().event.id = {};
      told.back().event.text = {};
    }
  }
  std::vector<Told> Take() { return std::exchange(told, {}); }

  std::unique_ptr<SessionStream> stream;
  std::vector<Told> told;
  int ready = 0;
  bool gone = false;
};

// One shard, one ingress core and the pipes, stepped in this thread.
class SessionStreamTest : public testing::Test {
 protected:
  void Start(SpaceSettings settings = {}) {
    auto network = StreamNetwork::Create({.max_connections = 64, .ring_bytes = size_t{1} << 17});
    ASSERT_TRUE(network.has_value());
    network_ = *std::move(network);
    network_->SetWake([] {});
    ApplianceOptions options;
    options.ingest.max_connections = 64;
    options.shard.memory_limit_bytes = size_t{256} << 20;
    options.spaces.emplace_back("space", settings);
    auto appliance = Appliance::Create(options, &clock_, {network_.get()});
    ASSERT_TRUE(appliance.has_value()) << appliance.error().message;
    appliance_ = *std::move(appliance);
    ASSERT_TRUE(network_->Start().has_value());
  }

  void TearDown() override {
    for (TestStream& client : clients_) client.stream->Abandon();
    Settle();
    for (const TestStream& client : clients_) EXPECT_TRUE(client.gone);
    EXPECT_EQ(appliance_->ingest(0).open_connections(), 0u);
    EXPECT_EQ(appliance_->ingest(0).merges_in_flight(), 0u);
  }

  // Until nobody has anything to do.
  void Settle() {
    for (int idle = 0; idle < 5;) {
      int work = appliance_->ingest(0).Poll() + appliance_->shard(0).Poll();
      clock_.AdvanceNs(kNanosPerMilli);
      for (TestStream& client : clients_) {
        const size_t before = client.told.size();
        client.Listen();
        work += static_cast<int>(client.told.size() - before);
      }
      idle = work == 0 ? idle + 1 : 0;
    }
  }

  TestStream& Connect() {
    TestStream& client = clients_.emplace_back();
    StreamPipe* pipe = network_->Connect(&client);
    EXPECT_NE(pipe, nullptr);
    client.stream = std::make_unique<SessionStream>(pipe);
    return client;
  }

  TestStream& Open(StreamOpening opening = {}) {
    if (appliance_ == nullptr) Start();
    TestStream& client = Connect();
    opening.space = SpaceName("space");
    client.stream->Open(opening);
    Settle();
    const auto told = client.Take();
    EXPECT_EQ(told.size(), 1u);
    EXPECT_EQ(told.at(0).event.kind, Kind::kOpened);
    return client;
  }

  Taken Observe(TestStream& client, Sequence sequence, std::string_view id,
                std::vector<float> vector = {1, 2, 3}, std::string_view payload = "p") {
    GatewayQuestion question;
    question.vector = VectorRef(vector);
    question.id = id;
    question.payload = payload;
    const Taken taken = client.stream->Observe(sequence, question);
    return taken == Taken::kTaken ? client.stream->Flush() : taken;
  }

  // What was said of observations, a word each: "3+id" acked, "4!reason" refused and used up,
  // "4?reason" refused and not.
  static std::vector<std::string> Words(const std::vector<Told>& told) {
    std::vector<std::string> words;
    for (const Told& each : told) {
      const StreamEvent& event = each.event;
      std::string word = std::to_string(event.sequence);
      if (event.kind == Kind::kAcked) {
        if (event.first != event.sequence) word = std::to_string(event.first) + "-" + word;
        word += "+" + each.id;
      } else if (event.kind == Kind::kRefused) {
        word += (event.is_consumed ? "!" : "?") + std::string(DescribeRefusal(event.reason).name);
      } else {
        word = "event " + std::to_string(static_cast<int>(event.kind));
      }
      words.push_back(word);
    }
    return words;
  }
  std::vector<std::string> SettledWords(TestStream& client) {
    Settle();
    return Words(client.Take());
  }
  using Strings = std::vector<std::string>;

  // Room for two observations; a third is refused with quota_observations, which waits.
  static SpaceSettings RoomForTwo() {
    SpaceSettings settings;
    settings.quota_observations = 2;
    settings.when_full = WhenFull::kRefuse;
    return settings;
  }
  void Delete(TestStream& client, Sequence sequence, std::string_view id) {
    GatewayQuestion question;
    question.op = ObservationOp::kDelete;
    question.id = id;
    EXPECT_EQ(client.stream->Observe(sequence, question), Taken::kTaken);
    EXPECT_EQ(client.stream->Flush(), Taken::kTaken);
  }

  SimulatedClock clock_;
  std::unique_ptr<StreamNetwork> network_;
  std::unique_ptr<Appliance> appliance_;
  std::deque<TestStream> clients_;
};

TEST_F(SessionStreamTest, AcksNameEachObservationInOrder) {
  TestStream& client = Open();
  EXPECT_NE(client.stream->session().value(), 0u);
  for (Sequence s = 1; s <= 40; ++s) {
    ASSERT_EQ(Observe(client, s, "id" + std::to_string(s)), Taken::kTaken);
  }
  Strings expected;
  for (int s = 1; s <= 40; ++s) expected.push_back(std::to_string(s) + "+id" + std::to_string(s));
  EXPECT_EQ(SettledWords(client), expected);
}

TEST_F(SessionStreamTest, OneAckForSeveralWhereTheClientKnowsSuch) {
  TestStream& client = Open({.goes_back = true, .cumulative = true});
  for (Sequence s = 1; s <= 9; ++s) ASSERT_EQ(Observe(client, s, "id"), Taken::kTaken);
  EXPECT_EQ(client.stream->RefuseObservation(10, "what: wrong"), Taken::kTaken);
  for (Sequence s = 11; s <= 12; ++s) ASSERT_EQ(Observe(client, s, "id"), Taken::kTaken);
  EXPECT_EQ(SettledWords(client), (Strings{"1-9+", "10!bad_field", "11-12+"}));
}

TEST_F(SessionStreamTest, WhatIsWrongUsesItsNumberUpInItsTurn) {
  for (const bool goes_back : {false, true}) {
    TestStream& client = Open({.goes_back = goes_back});
    EXPECT_EQ(Observe(client, 1, "a"), Taken::kTaken);
    EXPECT_EQ(client.stream->RefuseObservation(2, "episode.id: too long"), Taken::kTaken);
    EXPECT_EQ(Observe(client, 3, "b", {1, 2}), Taken::kTaken);
    EXPECT_EQ(Observe(client, 4, "c", {0, 0, 0}), Taken::kTaken);
    EXPECT_EQ(Observe(client, 5, "d"), Taken::kTaken);
    Settle();
    const auto told = client.Take();
    EXPECT_EQ(Words(told),
              (Strings{"1+a", "2!bad_field", "3!wrong_dimension", "4!zero_vector", "5+d"}));
    EXPECT_EQ(told.at(1).text, "episode.id: too long");
    EXPECT_EQ(told.at(2).id, "b");
    EXPECT_EQ(told.at(2).text.find("episode.embedding: "), 0u) << told.at(2).text;
    EXPECT_EQ(told.at(2).event.expected, 4u);
    EXPECT_EQ(told.at(3).event.retry_after_ms, 0u);
  }
}

TEST_F(SessionStreamTest, GapsAreNotTakenAndNameTheNumber) {
  TestStream& old = Open();
  EXPECT_EQ(Observe(old, 1, "a"), Taken::kTaken);
  EXPECT_EQ(Observe(old, 3, "c"), Taken::kTaken);
  EXPECT_EQ(Observe(old, 4, "d"), Taken::kTaken);
  EXPECT_EQ(Observe(old, 0, "z"), Taken::kTaken);
  EXPECT_EQ(Observe(old, 2, "b"), Taken::kTaken);
  Settle();
  const auto told = old.Take();
  EXPECT_EQ(Words(told),
            (Strings{"3?sequence_gap", "4?sequence_gap", "0?sequence_gap", "1+a", "2+b"}));
  EXPECT_EQ(told.at(0).event.expected, 2u);
  EXPECT_EQ(told.at(0).text, "sequence_number: 3; expected 2: send that number next");
  TestStream& fresh = Open({.goes_back = true});
  EXPECT_EQ(Observe(fresh, 2, "b"), Taken::kTaken);
  EXPECT_EQ(Observe(fresh, 3, "c"), Taken::kTaken);
  EXPECT_EQ(Observe(fresh, 1, "a"), Taken::kTaken);
  EXPECT_EQ(Observe(fresh, 3, "c"), Taken::kTaken);
  EXPECT_EQ(SettledWords(fresh), (Strings{"2?sequence_gap", "3?sequence_gap", "1+a"}));
}

TEST_F(SessionStreamTest, RepeatsAreAckedAgainAndStoreNothing) {
  TestStream& client = Open();
  EXPECT_EQ(Observe(client, 1, "a"), Taken::kTaken);
  // Under way: one ack for both.
  EXPECT_EQ(Observe(client, 1, "a"), Taken::kTaken);
  EXPECT_EQ(SettledWords(client), (Strings{"1+a"}));
  EXPECT_EQ(Observe(client, 1, "other"), Taken::kTaken);
  EXPECT_EQ(Observe(client, 2, "b"), Taken::kTaken);
  EXPECT_EQ(SettledWords(client), (Strings{"1+", "2+b"}));
  EXPECT_EQ(appliance_->shard(0).counter(ShardCounter::kObservationsStored).Read(), 2u);
}

TEST_F(SessionStreamTest, WhoGoesBackSendsARefusedNumberAgain) {
  Start(RoomForTwo());
  TestStream& client = Open({.goes_back = true});
  for (Sequence s = 1; s <= 4; ++s) Observe(client, s, "id" + std::to_string(s));
  Settle();
  const auto told = client.Take();
  EXPECT_EQ(Words(told), (Strings{"1+id1", "2+id2", "3?quota_observations"}));
  EXPECT_GT(told.at(2).event.retry_after_ms, 0u);
  EXPECT_EQ(told.at(2).event.expected, 3u);
  // What it still sends behind it is passed over.
  EXPECT_EQ(Observe(client, 5, "id5"), Taken::kTaken);
  EXPECT_EQ(SettledWords(client), Strings{});
  Delete(client, 3, "id1");
  EXPECT_EQ(Observe(client, 4, "id4"), Taken::kTaken);
  EXPECT_EQ(SettledWords(client), (Strings{"3+id1", "4+id4"}));
}

TEST_F(SessionStreamTest, WhoNeverGoesBackLosesTheNumber) {
  Start(RoomForTwo());
  TestStream& client = Open();
  for (Sequence s = 1; s <= 5; ++s) Observe(client, s, "id" + std::to_string(s));
  Settle();
  const auto told = client.Take();
  EXPECT_EQ(Words(told), (Strings{"1+id1", "2+id2", "3!quota_observations", "4!quota_observations",
                                  "5!quota_observations"}));
  EXPECT_GT(told.at(2).event.retry_after_ms, 0u);
  EXPECT_EQ(told.at(2).event.expected, 4u);
  Delete(client, 6, "id1");
  EXPECT_EQ(Observe(client, 7, "id7"), Taken::kTaken);
  EXPECT_EQ(SettledWords(client), (Strings{"6+id1", "7+id7"}));
}

TEST_F(SessionStreamTest, NoMoreIsUnderWayThanTheClientKeeps) {
  TestStream& client = Open({.client_buffer = 3});
  EXPECT_EQ(client.stream->room(), 3u);
  for (Sequence s = 1; s <= 3; ++s) EXPECT_EQ(Observe(client, s, "id"), Taken::kTaken);
  EXPECT_EQ(Observe(client, 4, "id"), Taken::kNoRoom);
  EXPECT_EQ(SettledWords(client), (Strings{"1+id", "2+id", "3+id"}));
  EXPECT_EQ(Observe(client, 4, "id"), Taken::kTaken);
}

TEST_F(SessionStreamTest, WhatThePipeHasNoRoomForComesLater) {
  TestStream& client = Open();
  const std::string payload(60'000, 'x');
  Sequence next = 1;
  while (Observe(client, next, "id" + std::to_string(next), {1, 2, 3}, payload) == Taken::kTaken) {
    ASSERT_LT(next++, 10u);
  }
  ASSERT_GE(next, 2u);
  const int ready = client.ready;
  const auto before = SettledWords(client);
  EXPECT_GT(client.ready, ready);
  EXPECT_EQ(Observe(client, next, "id" + std::to_string(next), {1, 2, 3}, payload), Taken::kTaken);
  EXPECT_EQ(client.stream->Flush(), Taken::kTaken);
  Settle();
  EXPECT_EQ(client.told.back().event.sequence, next);
  EXPECT_EQ(client.told.back().event.kind, Kind::kAcked);
  client.Take();
  EXPECT_FALSE(before.empty());
}

TEST_F(SessionStreamTest, LargeResultsComeWhole) {
  TestStream& client = Open();
  for (Sequence s = 1; s <= 30; ++s) {
    const std::string payload(50'000, static_cast<char>('a' + s % 26));
    while (Observe(client, s, "id" + std::to_string(s), {1, 2, static_cast<float>(s)}, payload) ==
           Taken::kNoRoom) {
      Settle();
    }
  }
  Settle();
  client.Take();
  const std::vector<float> query{1, 2, 30};
  GatewayQuestion question;
  question.kind = CallKind::kRecall;
  question.vector = VectorRef(query);
  question.k = 12;
  ASSERT_EQ(client.stream->Recall(77, question), Taken::kTaken);
  size_t hits = 0;
  size_t bytes = 0;
  for (int i = 0; i < 1000 && hits < 12; ++i) {
    appliance_->ingest(0).Poll();
    appliance_->shard(0).Poll();
    while (const auto event = client.stream->Next()) {
      ASSERT_EQ(event->kind, Kind::kHits);
      EXPECT_EQ(event->request, 77u);
      std::span<const std::byte> left = event->hits;
      while (!left.empty()) {
        const auto header = LoadAs<HitHeader>(left.data());
        ++hits;
        bytes += header.payload_bytes;
        left = left.subspan(header.hit_bytes);
      }
    }
  }
  EXPECT_EQ(hits, 12u);
  EXPECT_EQ(bytes, 12u * 50'000);
}

TEST_F(SessionStreamTest, ARefusedRecallNamesIt) {
  TestStream& client = Open();
  EXPECT_EQ(Observe(client, 1, "a"), Taken::kTaken);
  Settle();
  client.Take();
  const std::vector<float> query{1, 2};
  GatewayQuestion question;
  question.vector = VectorRef(query);
  question.k = 1;
  EXPECT_EQ(client.stream->Recall(5, question), Taken::kTaken);
  Settle();
  const auto told = client.Take();
  ASSERT_EQ(told.size(), 1u);
  const StreamEvent& refused = told[0].event;
  EXPECT_EQ(refused.kind, Kind::kRecallRefused);
  EXPECT_EQ(refused.request, 5u);
  EXPECT_EQ(refused.reason, RefusalReason::kWrongDimension);
}

TEST_F(SessionStreamTest, CloseSettlesAndASecondStreamFencesTheFirst) {
  TestStream& first = Open();
  EXPECT_EQ(Observe(first, 1, "a"), Taken::kTaken);
  Settle();
  first.Take();
  TestStream& second = Connect();
  second.stream->Open({.space = SpaceName("space"), .session = first.stream->session()});
  Settle();
  auto told = first.Take();
  ASSERT_EQ(told.size(), 1u);
  EXPECT_EQ(told[0].event.kind, Kind::kEnded);
  EXPECT_EQ(told[0].event.reason, RefusalReason::kFenced);
  told = second.Take();
  ASSERT_EQ(told.size(), 1u);
  EXPECT_EQ(told[0].event.kind, Kind::kOpened);
  EXPECT_EQ(told[0].event.sequence, 1u);
  EXPECT_EQ(Observe(second, 2, "b"), Taken::kTaken);
  EXPECT_EQ(second.stream->Close(), Taken::kTaken);
  Settle();
  told = second.Take();
  ASSERT_EQ(told.size(), 2u);
  EXPECT_EQ(told[0].id, "b");
  EXPECT_EQ(told[1].event.kind, Kind::kClosed);
  EXPECT_EQ(told[1].event.sequence, 2u);
}

TEST_F(SessionStreamTest, TheServersEndIsToldLast) {
  TestStream& client = Open();
  for (Sequence s = 1; s <= 5; ++s) EXPECT_EQ(Observe(client, s, "id"), Taken::kTaken);
  appliance_->ingest(0).Poll();
  appliance_->ingest(0).BeginDrain();
  Settle();
  const auto told = client.Take();
  ASSERT_EQ(told.size(), 6u);
  EXPECT_EQ(told.back().event.kind, Kind::kEnded);
  EXPECT_EQ(told.back().event.reason, RefusalReason::kShuttingDown);
}

// Its transport says when a client has gone, so nobody has to speak to stay.
TEST_F(SessionStreamTest, AQuietStreamStays) {
  TestStream& client = Open();
  for (int minute = 0; minute < 60; ++minute) {
    clock_.AdvanceNs(60 * kNanosPerSecond);
    Settle();
  }
  EXPECT_TRUE(client.told.empty());
  EXPECT_EQ(Observe(client, 1, "a"), Taken::kTaken);
  EXPECT_EQ(SettledWords(client), (Strings{"1+a"}));
}

// Random observations, good, wrong, repeated, ahead, beyond the quota, and deletes that make room,
// by clients of both kinds that follow their rules: each number is answered once, in order, and the
// space holds what was acked.
TEST_F(SessionStreamTest, EachNumberIsAnsweredOnceAndInOrder) {
  SpaceSettings settings;
  settings.quota_observations = 40;
  settings.when_full = WhenFull::kRefuse;
  Start(settings);
  SplitMix64 random(7);
  std::map<std::string, Sequence> kept;
  for (const bool goes_back : {false, true}) {
    TestStream& client = Open({.goes_back = goes_back});
    Sequence next = 1;
    Sequence answered = 0;
    std::map<Sequence, std::pair<std::string, bool>> sent;  // id, whether it deletes
    const std::string prefix = goes_back ? "new" : "old";
    const auto listen = [&] {
      Settle();
      for (const Told& told : client.Take()) {
        const StreamEvent& event = told.event;
        if (event.reason == RefusalReason::kSequenceGap) continue;
        if (event.kind == Kind::kRefused && !event.is_consumed) {
          ASSERT_TRUE(goes_back);
          ASSERT_EQ(event.sequence, answered + 1);
          next = event.sequence;
          continue;
        }
        if (event.sequence <= answered) continue;  // a repeat
        ASSERT_EQ(event.sequence, ++answered);
        if (event.kind != Kind::kAcked) continue;
        const auto& [id, deletes] = sent.at(event.sequence);
        ASSERT_EQ(told.id, id);
        if (deletes) {
          kept.erase(id);
        } else {
          kept[id] = event.sequence;
        }
      }
    };
    for (int i = 0; i < 2000; ++i) {
      const std::string id = prefix + std::to_string(random.Next() % 60);
      const uint64_t dice = random.Next() % 100;
      if (dice < 60) {
        if (Observe(client, next, id) == Taken::kTaken) sent[next++] = {id, false};
      } else if (dice < 75) {
        Delete(client, next, id);
        sent[next++] = {id, true};
      } else if (dice < 80) {
        ASSERT_EQ(client.stream->RefuseObservation(next, "bad"), Taken::kTaken);
        sent[next++] = {id, false};
      } else if (dice < 85) {
        ASSERT_EQ(Observe(client, next, id, {1}), Taken::kTaken);
        sent[next++] = {id, false};
      } else if (dice < 88 && next > 1) {
        ASSERT_EQ(Observe(client, next - 1, "repeat"), Taken::kTaken);
      } else if (dice < 90) {
        ASSERT_EQ(Observe(client, next + 2, "ahead"), Taken::kTaken);
        if (goes_back) listen();
      }
      ASSERT_EQ(client.stream->Flush(), Taken::kTaken);
      if (dice >= 80 || goes_back) listen();
    }
    listen();
    EXPECT_EQ(answered, next - 1);
  }
  EXPECT_GT(kept.size(), 10u);
  TestStream& reader = Open({.has_session = false});
  const std::vector<float> query{1, 2, 3};
  GatewayQuestion question;
  question.vector = VectorRef(query);
  question.k = 100;
  ASSERT_EQ(reader.stream->Recall(1, question), Taken::kTaken);
  std::vector<std::string> found;
  for (int i = 0; i < 100; ++i) {
    appliance_->ingest(0).Poll();
    appliance_->shard(0).Poll();
    while (const auto event = reader.stream->Next()) {
      ASSERT_EQ(event->kind, Kind::kHits);
      std::span<const std::byte> left = event->hits;
      while (!left.empty()) {
        const auto header = LoadAs<HitHeader>(left.data());
        const char* id = reinterpret_cast<const char*>(left.data()) + sizeof(header) +
                         header.vector_dimension * sizeof(float);
        found.emplace_back(id, header.id_bytes);
        left = left.subspan(header.hit_bytes);
      }
    }
  }
  std::ranges::sort(found);
  std::vector<std::string> expected;
  for (const auto& [id, sequence] : kept) expected.push_back(id);
  EXPECT_EQ(found, expected);
}

}  // namespace
}  // namespace engram
