// A whole ingress core under clients that do anything, in one thread with simulated time, network
// and shards. The input is a program: an operation byte, then what the operation reads. So almost
// every input means something, and the fuzzer's own mutations are enough.
//
// At the end everybody leaves and everything is answered: no slot may be lost and no connection
// left.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/attributes.h"
#include "src/core/check.h"
#include "tests/dataplane/fake_shard.h"
#include "tests/dataplane/ingest_harness.h"
#include "tests/dataplane/wire.h"
#include "tests/fuzz/fuzz_program.h"

namespace engram {
namespace {

constexpr size_t kClients = 4;
constexpr size_t kOperationsMax = 300;

// One of the places from which clients connect.
struct Place {
  std::unique_ptr<TestClient> client;
  uint64_t session = 0;
  Sequence next = 1;
  Sequence acked = 0;
  Sequence used_up = 0;  // the last that was refused for lack of room and never comes again
  bool paused = false;   // so says the server
  bool ends = false;     // it may have been told to, so nothing is held back
};

class Machine {
 public:
  explicit Machine(FuzzProgram* program) : program_(program), harness_(Options(program->Byte())) {
    for (size_t s = 0; s < harness_.shards(); ++s) {
      harness_.shard(s).judge = [this](const ObserveRequest& request, std::string_view) {
        return request.sequence % 5 == 3 ? shard_refusal_ : RefusalReason::kNone;
      };
    }
  }

  void Run() {
    for (size_t i = 0; i < kOperationsMax && !program_->empty(); ++i) {
      const uint8_t operation = program_->Byte();
      Operate(operation & 15, &places_[(operation >> 4) % kClients]);
      harness_.Step();
    }
    for (Place& place : places_) Leave(&place);
    CHECK(harness_.Finish(), "every slot is given back and nobody is left");
  }

 private:
  static HarnessOptions Options(uint8_t choice) {
    HarnessOptions options;
    options.seed = choice;
    options.shards = 1 + choice % 2;
    options.partitions = (choice & 8) != 0 ? options.shards : 1;
    options.ingest.max_merges = 2;
    options.lane_capacity = 8;
    options.recall_lane_capacity = 4;
    options.ingest.partial_frame_bytes = 4 * 4096;
    options.ingest.max_recalls = 2;
    options.ingest.send_pause_bytes = 8192;
    options.network.network.max_connections = 8;
    options.network.max_chunk_bytes = (choice & 4) != 0 ? 40 : 5000;
    options.network.client_window_bytes = 4096;
    options.network.network.send_limit_bytes = 100'000;
    return options;
  }

  TestClient& ClientOf(Place* place) {
    if (!place->client) {
      place->client = std::make_unique<TestClient>(&harness_);
      place->acked = 0;
      place->used_up = 0;
      place->paused = false;
      place->ends = drains_;
    }
    return *place->client;
  }
  void Leave(Place* place) {
    if (!place->client) return;
    Read(place);
    place->client->Close();
    place->client.reset();
  }

  void Read(Place* place) {
    for (const WireFrame& frame : ClientOf(place).TakeAll()) {
      if (frame.type == kWireHelloAck) {
        place->session = frame.session;
        place->next = frame.sequence + 1;
      } else if (frame.type == kWireAck) {
        CHECK(frame.sequence >= place->acked, "an ack does not go back");
        if (const auto last = LastAtShard(frame.session)) {
          CHECK(frame.sequence <= std::max(*last, place->used_up),
                "acked more than the shard took and was refused");
        }
        place->acked = frame.sequence;
      } else if (frame.type == kWireNak) {
        const WireNak nak = ParseNak(frame);
        if (nak.refused_type == kWireObserve && nak.expected != 0) place->next = nak.expected;
        if (nak.refused_type == kWireObserve && nak.consumed) {
          place->used_up = std::max(place->used_up, frame.sequence);
        }
      } else if (frame.type == kWireFlow) {
        place->paused = ParseFlow(frame).state == 2;
      } else if (frame.type == kWireResult) {
        CHECK(!place->paused || place->ends, "a result in a pause");
      }
    }
    CHECK(ClientOf(place).sound(), "every frame of the server's is sealed");
  }
  // Nothing where the shard has forgotten the session.
  std::optional<Sequence> LastAtShard(uint64_t session) {
    for (size_t s = 0; s < harness_.shards(); ++s) {
      const auto& sessions = harness_.shard(s).sessions();
      if (const auto found = sessions.find(session); found != sessions.end()) {
        return found->second.last_sequence;
      }
    }
    return std::nullopt;
  }

  WireBytes Hello(Place* place) {
    const uint8_t choice = program_->Byte();
    return HelloBytes({.features = (choice & 1u) | (choice & 2u) | (program_->Byte() & 24u),
                       .dimension = static_cast<uint16_t>((choice >> 1) & 1 ? 2 : 0),
                       .metric = static_cast<uint8_t>((choice >> 2) & 3),
                       .priority = static_cast<uint8_t>((choice >> 4) & 1),
                       .space = std::string(1, static_cast<char>('a' + ((choice >> 5) & 1))),
                       .session = (choice & 0x80) != 0   ? place->session
                                  : (choice & 0x40) != 0 ? places_[0].session
                                                         : 0});
  }
  WireBytes Observe(Place* place, size_t payload_bytes) {
    const uint8_t choice = program_->Byte();
    std::vector<WireRecord> records;
    for (int i = 0; i <= (choice & 3); ++i) {
      const std::array<float, 3> vector{
          1, (choice & 4) != 0 ? std::numeric_limits<float>::infinity() : 2, 3};
      records.push_back(F32Record("id", std::span(vector).first((choice & 8) != 0 ? 3 : 2),
                                  std::string(payload_bytes, 'p')));
      records.back().attributes = Attributes();
    }
    const Sequence first = place->next + (choice >> 4) - ((choice >> 4) > 7 ? 16 : 0);
    if (first == place->next) place->next += records.size();
    return ObserveBytes(place->session, first, records);
  }
  // None, sound ones, or whatever.
  std::string Attributes() {
    const uint8_t choice = program_->Byte();
    if ((choice & 3) == 0) return WireText(program_->Bytes(choice >> 2));
    std::string attributes;
    if ((choice & 3) == 1) AppendAttribute("key", std::string(choice, 'v'), &attributes);
    return attributes;
  }
  WireBytes Recall() {
    const uint8_t choice = program_->Byte();
    const float value = (choice & 1) != 0 ? 0 : 1;
    const std::array<float, 3> query{value, value, value};
    WireRecall recall = F32Recall(std::span(query).first((choice & 2) != 0 ? 3 : 2));
    if ((choice & 12) == 12) recall.k = 0;
    auto flags = static_cast<uint16_t>(choice >> 5);
    if ((choice & 16) != 0) {
      flags |= 8;
      FilterWriter writer;
      const std::array<std::string_view, 1> values{"value"};
      writer.Exclude("key", values);
      const uint8_t filter = program_->Byte();
      recall.filter = (filter & 1) != 0 ? writer.Bytes() : WireText(program_->Bytes(filter >> 1));
    }
    return RecallBytes(choice, recall, flags);
  }
  // Of an operator's tools.
  WireBytes Question() {
    const uint8_t choice = program_->Byte();
    const uint8_t which = choice >> 2;
    switch (choice & 3) {
      case 0:
        return IntrospectBytes(1, which % 8);
      case 1:
        return ScrollBytes(choice, program_->Byte(), which & 3, program_->Byte(), which >> 2 & 3);
      case 2:
        return CheckBytes(choice, which & 3);
      default:
        return CommandBytes(choice, which & 3, std::string(1, static_cast<char>('a' + which / 32)));
    }
  }
  WireBytes Flow() {
    constexpr std::array<float, 6> kRates{0,     2,  5'000,
                                          1e30F, -1, std::numeric_limits<float>::quiet_NaN()};
    const uint8_t choice = program_->Byte();
    return FlowBytes({.action = static_cast<uint8_t>(choice & 7),
                      .buffer_remaining = (choice >> 3 & 3) - 1,
                      .preferred_rate = kRates[(choice >> 5) % kRates.size()]});
  }
  WireBytes RawFrame(Place* place) {
    place->ends = true;
    const uint8_t type = program_->Byte();
    const uint8_t sequence = program_->Byte();
    const WireBytes body = program_->Bytes(program_->Byte());
    return MakeFrame(type & 31,
                     {.flags = static_cast<uint16_t>(type >> 5),
                      .session = place->session,
                      .sequence = sequence},
                     body);
  }

  void Operate(int operation, Place* place) {
    FakeShard& shard = harness_.shard(program_->empty() ? 0 : operation % harness_.shards());
    switch (operation) {
      case 0:
        ClientOf(place).Send(Hello(place));
        break;
      case 1:
        ClientOf(place).Send(Observe(place, 5));
        break;
      case 2:
        ClientOf(place).Send(Recall());
        break;
      case 3:
        ClientOf(place).Send(Question());
        break;
      case 4: {
        TestClient& client = ClientOf(place);
        const uint8_t choice = program_->Byte() % 4;
        place->ends |= choice == 0;
        client.Send(choice > 1 ? Flow() : MakeFrame(choice == 0 ? kWireClose : kWirePing, {}));
        break;
      }
      case 5: {
        TestClient& client = ClientOf(place);
        client.Send(RawFrame(place));
        break;
      }
      case 6: {
        TestClient& client = ClientOf(place);
        place->ends = true;
        client.Send(program_->Bytes(program_->Byte()));
        break;
      }
      case 7: {
        const WireBytes frame = Observe(place, 1000);
        ClientOf(place).Send(std::span(frame).first(program_->Byte() * frame.size() / 256));
        break;
      }
      case 8:
        harness_.Step(int64_t{1} << (program_->Byte() % 39));  // up to 275 s
        break;
      case 9:
        End(place);
        break;
      case 10:
        Read(place);
        break;
      case 11: {
        const uint8_t choice = program_->Byte();
        if ((choice & 1) != 0) {
          shard.SetHeld(static_cast<RequestKind>(1 + (choice >> 2) % 5), (choice & 2) != 0);
        } else {
          shard.stalled[(choice >> 2) % kLanes] = (choice & 2) != 0;
        }
        break;
      }
      case 12:
        Misbehave(&shard);
        break;
      case 13:
        if (program_->Byte() != 13) break;
        harness_.core().BeginDrain();
        drains_ = true;
        for (Place& each : places_) each.ends = true;
        break;
      case 14:
        harness_.Run(8, 100 * kNanosPerMicro);
        break;
      default:
        ClientOf(place).Send(Observe(place, size_t{program_->Byte()} * 16));
        break;
    }
  }
  void End(Place* place) {
    const uint8_t choice = program_->Byte();
    if (!place->client) return;
    if (choice % 3 == 0) {
      place->client->Shutdown();
    } else if (choice % 3 == 1) {
      place->client->Abort();
      place->client.reset();
    } else {
      Leave(place);
    }
  }
  void Misbehave(FakeShard* shard) {
    constexpr std::array<RefusalReason, 6> kReasons{
        RefusalReason::kNone,           RefusalReason::kBacklogFull,  RefusalReason::kMemoryFull,
        RefusalReason::kSessionExpired, RefusalReason::kUnknownSpace, RefusalReason::kBadDtype};
    const uint8_t choice = program_->Byte();
    const RefusalReason reason = kReasons[(choice >> 2) % kReasons.size()];
    switch (choice & 3) {
      case 0:
        shard_refusal_ = reason;
        break;
      case 1:
        shard->recall_refusal = reason;
        break;
      case 2:
        shard->hits.assign(
            1 + (choice >> 6),
            HitBatch({{.id = std::string(1 + (choice >> 4 & 3), 'i'),
                       .stamp = choice,
                       .payload = std::string(size_t{program_->Byte()} * 100, 'h')}}));
        break;
      default:
        if (!shard->sessions().empty()) {
          const auto& session = *shard->sessions().begin();
          if ((choice & 4) != 0) {
            shard->ForgetSession(session.first);
          } else {
            shard->Notify(0, CompletionKind::kCredit, session.second.origin, choice);
          }
        }
        break;
    }
  }

  FuzzProgram* program_;
  IngestHarness harness_;
  std::array<Place, kClients> places_;
  RefusalReason shard_refusal_ = RefusalReason::kNone;
  bool drains_ = false;
};

}  // namespace
}  // namespace engram

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  engram::FuzzProgram program({data, size});
  engram::Machine(&program).Run();
  return 0;
}
