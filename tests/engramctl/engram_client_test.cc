#include "tools/clients/cpp/engram_client.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>

#include <array>

#include "src/core/attributes.h"
#include "src/core/clock.h"
#include "tests/engramctl/scripted_peer.h"

namespace engram {
namespace {

// The answers are in the socket before they are awaited, so no test waits this long.
constexpr int64_t kTimeoutNs = 10 * kNanosPerSecond;

struct TestHit {
  std::string id;
  float score = 0;
  std::string payload = {};
  uint8_t flags = 0;
  std::vector<float> vector = {};
  uint64_t stamp = 0;
};

Bytes ResultOf(const std::vector<TestHit>& hits) {
  ResultBody body;
  body.count = static_cast<uint16_t>(hits.size());
  body.metric = Metric::kCosine;
  body.snapshot = 4711;
  Bytes bytes = ScriptedPeer::ToBytes(BytesOf(body));
  for (const TestHit& hit : hits) {
    HitHeader header = {};
    header.hit_bytes =
        static_cast<uint32_t>(PadTo8(sizeof(HitHeader) + hit.vector.size() * sizeof(float) +
                                     hit.id.size() + hit.payload.size()));
    header.score = hit.score;
    header.payload_bytes = static_cast<uint32_t>(hit.payload.size());
    header.id_bytes = static_cast<uint16_t>(hit.id.size());
    header.flags = hit.flags;
    header.stamp = hit.stamp;
    header.vector_dimension = static_cast<uint16_t>(hit.vector.size());
    const size_t start = bytes.size();
    AppendBytes(bytes, BytesOf(header));
    AppendBytes(bytes, std::as_bytes(std::span(hit.vector)));
    AppendBytes(bytes, BytesOf(std::string_view(hit.id)));
    AppendBytes(bytes, BytesOf(std::string_view(hit.payload)));
    bytes.resize(start + header.hit_bytes);
  }
  return bytes;
}

class EngramClientTest : public testing::Test {
 protected:
  // A connection for recalls, past its handshake.
  void Greet() {
    peer_.SendHelloAck(0, 0);
    ASSERT_TRUE(connection_.Hello({.no_session = true}, kTimeoutNs).has_value());
    ASSERT_TRUE(peer_.NextFrame().has_value());
  }
  std::string MessageOf(const auto& result) {
    return result ? std::string("no error") : result.error().message;
  }

  ScriptedPeer peer_;
  Connection connection_ = peer_.Client();
  const std::array<float, 2> vector_ = {1, 0};
};

TEST(ParseAddressTest, TakesHostsAndBracketedAddresses) {
  EXPECT_EQ(ParseAddress("127.0.0.1:7654")->host, "127.0.0.1");
  EXPECT_EQ(ParseAddress("[::1]:80")->host, "::1");
  EXPECT_EQ(ParseAddress("[::1]:80")->ToString(), "[::1]:80");
  EXPECT_EQ(ParseAddress("db.example:1")->port, "1");
  for (const char* bad : {"", ":", "host", "host:", ":7654", "host:0", "host:65536", "host:12x",
                          "::1:7654", "host:-1"}) {
    EXPECT_FALSE(ParseAddress(bad).has_value()) << bad;
  }
}

TEST(PrintableTest, TakesAwayWhatATerminalActsOn) {
  EXPECT_EQ(Printable("a\x1b[31mb\n\x7f"), "a?[31mb??");
  EXPECT_EQ(Printable("\xc2\x9b"
                      "31m"),
            "??31m");
  EXPECT_EQ(Printable("caf\xc3\xa9 \xc2\xb5s"), "caf\xc3\xa9 \xc2\xb5s");
}

// A TCP socket on a port of its own. While it does not listen it keeps the port from everybody
// else.
class TcpPort {
 public:
  TcpPort() : socket_fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in name = {};
    name.sin_family = AF_INET;
    name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(name);
    CHECK(bind(socket_fd_.get(), reinterpret_cast<sockaddr*>(&name), size) == 0, "bind");
    CHECK(getsockname(socket_fd_.get(), reinterpret_cast<sockaddr*>(&name), &size) == 0, "name");
    address_ = {"127.0.0.1", std::to_string(ntohs(name.sin_port))};
  }
  void Listen() { CHECK(listen(socket_fd_.get(), 4) == 0, "listen"); }
  UniqueFd Accept() { return UniqueFd(accept(socket_fd_.get(), nullptr, nullptr)); }
  const Address& address() const { return address_; }

 private:
  UniqueFd socket_fd_;
  Address address_;
};

void AwaitReady(const Connection& connection, short events) {
  pollfd entry = {.fd = connection.fd(), .events = events, .revents = 0};
  ASSERT_EQ(poll(&entry, 1, static_cast<int>(kTimeoutNs / kNanosPerMilli)), 1);
}

TEST(ConnectTest, StartsAndSaysHelloWithoutWaiting) {
  TcpPort port;
  port.Listen();
  auto connection = Connection::StartConnect(port.address(), /*attempt=*/7);
  ASSERT_TRUE(connection.has_value()) << connection.error().message;
  ASSERT_TRUE(connection->SendHello({.session = 9}).has_value());
  EXPECT_GT(connection->PendingBytes(), 0u);
  AwaitReady(*connection, POLLOUT);
  auto answered = connection->PollHello();
  ASSERT_TRUE(answered.has_value()) << answered.error().message;
  EXPECT_FALSE(*answered);
  EXPECT_EQ(connection->PendingBytes(), 0u);

  const UniqueFd server = port.Accept();
  const Bytes ack = ScriptedPeer::Framed(FrameType::kHelloAck, 0, 5, Bytes(sizeof(HelloAckBody)));
  // In two pieces; the first is no answer yet.
  ASSERT_EQ(send(server.get(), ack.data(), 40, 0), 40);
  AwaitReady(*connection, POLLIN);
  answered = connection->PollHello();
  ASSERT_TRUE(answered.has_value());
  EXPECT_FALSE(*answered);
  ASSERT_GT(send(server.get(), ack.data() + 40, ack.size() - 40, 0), 0);
  AwaitReady(*connection, POLLIN);
  answered = connection->PollHello();
  ASSERT_TRUE(answered.has_value());
  EXPECT_TRUE(*answered);
  EXPECT_EQ(connection->hello().last_sequence, 5u);
  EXPECT_EQ(connection->hello().session, ScriptedPeer::kSession);
}

TEST(ConnectTest, AStartThatComesToNothingMayPass) {
  const TcpPort port;  // and nobody listens
  auto connection = Connection::StartConnect(port.address(), 0);
  Error error;
  if (!connection) {
    error = connection.error();
  } else {
    ASSERT_TRUE(connection->SendHello({}).has_value());
    AwaitReady(*connection, POLLIN | POLLOUT);
    const auto answered = connection->PollHello();
    ASSERT_FALSE(answered.has_value());
    error = answered.error();
  }
  EXPECT_EQ(error.code, ErrorCode::kUnavailable);
  EXPECT_NE(error.message.find("Connection refused; is engramd running?"), std::string::npos)
      << error.message;
}

TEST(ConnectTest, SaysWhatToLookAtWhenNobodyListens) {
  const TcpPort port;
  const Address& address = port.address();
  const auto connection = Connection::Connect(address, kTimeoutNs);
  ASSERT_FALSE(connection.has_value());
  EXPECT_EQ(connection.error().message, "cannot connect to " + address.ToString() +
                                            ": Connection refused; is engramd running?");
}

TEST_F(EngramClientTest, HelloSaysWhatIsAskedAndKeepsTheAnswer) {
  peer_.SendHelloAck(41, 100, 5'000, 8);
  const HelloOptions options = {.space = "notes",
                                .dimension = 2,
                                .metric = Metric::kL2,
                                .priority = Priority::kHigh,
                                .session = 9,
                                .no_session = false};
  ASSERT_TRUE(connection_.Hello(options, kTimeoutNs).has_value());
  EXPECT_EQ(connection_.hello().session, ScriptedPeer::kSession);
  EXPECT_EQ(connection_.hello().last_sequence, 41u);
  EXPECT_EQ(connection_.hello().credit, 100u);
  EXPECT_EQ(connection_.hello().max_frame_bytes, 5'000u);
  EXPECT_EQ(connection_.hello().max_recalls, 8u);
  EXPECT_FALSE(connection_.hello().attributes) << "a server that does not know them";
  EXPECT_FALSE(connection_.hello().wide_recalls);

  const auto frame = peer_.NextFrame();
  ASSERT_TRUE(frame.has_value());
  EXPECT_EQ(frame->header.type, FrameType::kHello);
  EXPECT_EQ(frame->header.session, 9u);
  const auto body = LoadAs<HelloBody>(frame->body.data());
  EXPECT_EQ(body.features, kFeatureAttributes | kFeatureWideRecalls);
  EXPECT_EQ(body.dimension, 2);
  EXPECT_EQ(body.metric, Metric::kL2);
  EXPECT_EQ(body.priority, Priority::kHigh);
  ASSERT_EQ(frame->body.size(), sizeof(HelloBody) + 5);
  EXPECT_EQ(std::memcmp(frame->body.data() + sizeof(HelloBody), "notes", 5), 0);
}

TEST_F(EngramClientTest, ARefusedHelloShowsNameTextAndTheServersWords) {
  peer_.SendNak({.reason = RefusalReason::kMetricMismatch,
                 .refused_type = FrameType::kHello,
                 .flags = kNakFlagClosing},
                0, "space notes has l2\x1b[2J");
  peer_.Close();
  const auto greeted =
      connection_.Hello({.space = "notes", .metric = Metric::kInnerProduct}, kTimeoutNs);
  EXPECT_EQ(MessageOf(greeted),
            "the server ended the connection: metric_mismatch: the space has another metric "
            "(space notes has l2?[2J); asked for was ip in space notes; `engramctl spaces` says "
            "what the space has");
}

TEST_F(EngramClientTest, ARefusedDimensionIsNamed) {
  peer_.SendNak({.reason = RefusalReason::kDimensionMismatch,
                 .refused_type = FrameType::kHello,
                 .flags = kNakFlagClosing},
                0);
  EXPECT_NE(MessageOf(connection_.Hello({.dimension = 96}, kTimeoutNs))
                .find("; asked for was dimension 96 in space default; `engramctl spaces`"),
            std::string::npos);
}

TEST_F(EngramClientTest, TheCodeOfARefusalSaysWhatCanBeDone) {
  const std::pair<RefusalReason, ErrorCode> cases[] = {
      {RefusalReason::kShuttingDown, ErrorCode::kUnavailable},
      {RefusalReason::kConnectionLimit, ErrorCode::kUnavailable},
      {RefusalReason::kSlowReader, ErrorCode::kUnavailable},
      {RefusalReason::kSessionExpired, ErrorCode::kNotFound},
      {RefusalReason::kFenced, ErrorCode::kAlreadyExists},
      {RefusalReason::kBadFrame, ErrorCode::kInvalidArgument},
      {RefusalReason::kSessionSpaceMismatch, ErrorCode::kInvalidArgument},
      {static_cast<RefusalReason>(60'000), ErrorCode::kUnavailable},
  };
  for (const auto& [reason, code] : cases) {
    peer_.SendNak({.reason = reason, .flags = kNakFlagClosing}, 0);
    EXPECT_EQ(connection_.Hello({}, kTimeoutNs).error().code, code) << DescribeRefusal(reason).name;
  }
}

// Others have all the room now.
TEST_F(EngramClientTest, AScrollThatFindsNoRoomIsAskedAgain) {
  constexpr uint64_t kRequest = UINT64_MAX;
  peer_.SendHelloAck(0, 0);
  ASSERT_TRUE(connection_.Hello({}, kTimeoutNs).has_value());
  for (int i = 0; i < 2; ++i) {
    peer_.SendNak({.reason = RefusalReason::kMergesFull,
                   .refused_type = FrameType::kScroll,
                   .retry_after_ms = 1},
                  kRequest);
  }
  peer_.Send(FrameType::kScrolled, 0, kRequest,
             ScriptedPeer::ToBytes(BytesOf(ScrolledBody{.partitions = 1, .ended = 1})));
  const auto page = Scroll(connection_, {}, kTimeoutNs);
  ASSERT_TRUE(page.has_value()) << page.error().message;
  EXPECT_TRUE(page->ended);
  int asked = 0;
  while (const auto frame = peer_.NextFrame()) {
    asked += frame->header.type == FrameType::kScroll ? 1 : 0;
  }
  EXPECT_EQ(asked, 3);
}

TEST_F(EngramClientTest, AConnectionToItselfIsNoServer) {
  ASSERT_TRUE(connection_.SendHello({}).has_value());
  ASSERT_TRUE(connection_.Flush().has_value());
  const auto own = peer_.NextFrame();
  peer_.SendRaw(BytesOf(own->header));
  peer_.SendRaw(own->body);
  const auto answered = connection_.PollHello();
  ASSERT_FALSE(answered.has_value());
  EXPECT_EQ(answered.error().code, ErrorCode::kUnavailable);
}

TEST_F(EngramClientTest, AHelloAckThatIsTooShortIsNoAnswer) {
  peer_.Send(FrameType::kHelloAck, 0, 0, Bytes(sizeof(HelloAckBody) - 1));
  EXPECT_EQ(connection_.Hello({}, kTimeoutNs).error().code, ErrorCode::kCorrupt);
}

TEST_F(EngramClientTest, ANakWhoseTextLiesAboutItsLengthIsCaught) {
  NakBody nak{.reason = RefusalReason::kBadFrame, .flags = kNakFlagClosing};
  nak.text_bytes = 1;  // and no text follows
  peer_.Send(FrameType::kNak, 0, 0, ScriptedPeer::ToBytes(BytesOf(nak)));
  EXPECT_EQ(connection_.Hello({}, kTimeoutNs).error().code, ErrorCode::kCorrupt);
  peer_.Send(FrameType::kNak, 0, 0, Bytes(3));
  EXPECT_EQ(connection_.Hello({}, kTimeoutNs).error().code, ErrorCode::kCorrupt);
}

TEST_F(EngramClientTest, AnotherProtocolOnThePortIsNamed) {
  peer_.SendRaw(BytesOf(std::string_view("HTTP/1.1 400 Bad Request\r\nConnection: close\r\n")));
  const auto greeted = connection_.Hello({}, kTimeoutNs);
  EXPECT_NE(MessageOf(greeted).find("does not begin with the bytes ENG1"), std::string::npos)
      << MessageOf(greeted);
}

TEST_F(EngramClientTest, AFrameLengthOverTheBoundIsNotAwaited) {
  FrameHeader header;
  header.type = FrameType::kHelloAck;
  header.length = 0xFFFFFFFF;
  peer_.SendRaw(BytesOf(header));
  EXPECT_EQ(connection_.Hello({}, kTimeoutNs).error().code, ErrorCode::kCorrupt);
}

TEST_F(EngramClientTest, AFlippedBitIsCaught) {
  Bytes frame = ScriptedPeer::Framed(FrameType::kHelloAck, 0, 0, Bytes(sizeof(HelloAckBody)));
  frame.back() ^= std::byte{1};
  peer_.SendRaw(frame);
  const auto greeted = connection_.Hello({}, kTimeoutNs);
  EXPECT_NE(MessageOf(greeted).find("CRC32C"), std::string::npos) << MessageOf(greeted);
}

TEST_F(EngramClientTest, AnEndInMidFrameIsToldFromAnEndBetweenFrames) {
  const Bytes frame = ScriptedPeer::Framed(FrameType::kHelloAck, 0, 0, Bytes(24));
  peer_.SendRaw(std::span<const std::byte>(frame).first(40));
  peer_.Close();
  EXPECT_EQ(MessageOf(connection_.Hello({}, kTimeoutNs)),
            "the server closed the connection in mid-frame");
}

TEST_F(EngramClientTest, AnEndBetweenFrames) {
  peer_.Close();
  EXPECT_EQ(MessageOf(connection_.Hello({}, kTimeoutNs)), "the server closed the connection");
}

TEST_F(EngramClientTest, FramesMayArriveByteByByte) {
  for (uint64_t sequence = 5; sequence < 8; ++sequence) {
    const Bytes frame = ScriptedPeer::Framed(FrameType::kPing, kFrameFlagPingAnswer, sequence, {});
    for (size_t i = 0; i < frame.size(); ++i) {
      const auto early = connection_.NextFrame();
      ASSERT_TRUE(early.has_value());
      ASSERT_FALSE(early->has_value()) << i;
      peer_.SendRaw({&frame[i], 1});
      ASSERT_TRUE(connection_.Receive().has_value());
    }
    const auto whole = connection_.NextFrame();
    ASSERT_TRUE(whole.has_value() && whole->has_value());
    EXPECT_EQ((*whole)->header.sequence, sequence);
  }
}

TEST_F(EngramClientTest, AnswersTheServersPingsAndTimesItsOwn) {
  peer_.Send(FrameType::kPing, 0, 123, {});
  peer_.Send(FrameType::kPing, kFrameFlagPingAnswer, 1, {});
  EXPECT_GE(connection_.Ping(kTimeoutNs).value(), 0);
  const auto own = peer_.NextFrame();
  ASSERT_TRUE(own.has_value());
  EXPECT_EQ(own->header.flags, 0);
  EXPECT_EQ(own->header.sequence, 1u);
  // The answer to the server's ping is in the buffer and goes out with the next flush.
  ASSERT_TRUE(connection_.Flush().has_value());
  const auto answer = peer_.NextFrame();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->header.flags, kFrameFlagPingAnswer);
  EXPECT_EQ(answer->header.sequence, 123u);
}

TEST_F(EngramClientTest, ASilentConnectionIsKeptAliveOnceAMinute) {
  Greet();
  connection_.KeepAlive(kNanosPerSecond);
  connection_.KeepAlive(60 * kNanosPerSecond);
  EXPECT_EQ(connection_.PendingBytes(), 0u);
  connection_.KeepAlive(61 * kNanosPerSecond);
  EXPECT_EQ(connection_.PendingBytes(), kFrameHeaderBytes);
}

TEST_F(EngramClientTest, RecallCarriesItsFields) {
  Greet();
  RecallStream stream(&connection_);
  const uint64_t request = stream.Send({.vector = vector_, .k = 3, .ef = 70, .with_payload = true});
  ASSERT_TRUE(connection_.Flush().has_value());
  const auto frame = peer_.NextFrame();
  ASSERT_TRUE(frame.has_value());
  EXPECT_EQ(frame->header.type, FrameType::kRecall);
  EXPECT_EQ(frame->header.sequence, request);
  EXPECT_EQ(frame->header.flags, kFrameFlagWithPayload);
  const auto body = LoadAs<RecallBody>(frame->body.data());
  EXPECT_EQ(body.k, 3u);
  EXPECT_EQ(body.ef, 70u);
  EXPECT_EQ(body.dimension, 2);
  EXPECT_EQ(body.dtype, VectorDtype::kF32);
  EXPECT_EQ(frame->body.size(), sizeof(RecallBody) + 8);
}

TEST_F(EngramClientTest, AFilterFollowsTheVector) {
  peer_.features = kFeatureAttributes | kFeatureNoSession;
  Greet();
  EXPECT_TRUE(connection_.hello().attributes);
  RecallStream stream(&connection_);
  FilterWriter writer;
  writer.SetTimes({.begin_ns = 5});
  const std::string filter = writer.Bytes();
  stream.Send({.vector = vector_, .filter = filter});
  stream.Send({.vector = vector_});
  ASSERT_TRUE(connection_.Flush().has_value());
  const auto frame = peer_.NextFrame();
  ASSERT_TRUE(frame.has_value());
  EXPECT_EQ(frame->header.flags, kFrameFlagFiltered);
  const size_t vector_end = sizeof(RecallBody) + sizeof(vector_);
  ASSERT_EQ(frame->body.size(), vector_end + 2 + filter.size());
  EXPECT_EQ(LoadAs<uint16_t>(frame->body.data() + vector_end), filter.size());
  EXPECT_EQ(std::memcmp(frame->body.data() + vector_end + 2, filter.data(), filter.size()), 0);
  const auto plain = peer_.NextFrame();
  ASSERT_TRUE(plain.has_value());
  EXPECT_EQ(plain->header.flags, 0);
  EXPECT_EQ(plain->body.size(), vector_end);
}

TEST_F(EngramClientTest, ABoundFollowsTheVectorAndAllSpacesAreAFlag) {
  peer_.features = kFeatureWideRecalls | kFeatureAttributes | kFeatureNoSession;
  Greet();
  EXPECT_TRUE(connection_.hello().wide_recalls);
  RecallStream stream(&connection_);
  const std::string filter = FilterWriter().BytesOfAny();
  stream.Send({.vector = vector_, .filter = filter, .bound = 0.25F});
  stream.Send({.vector = vector_, .across = true});
  stream.Send({.vector = {}, .filter = filter});
  ASSERT_TRUE(connection_.Flush().has_value());
  const auto bounded = peer_.NextFrame();
  ASSERT_TRUE(bounded.has_value());
  EXPECT_EQ(bounded->header.flags, kFrameFlagFiltered | kFrameFlagBounded);
  const size_t vector_end = sizeof(RecallBody) + sizeof(vector_);
  ASSERT_EQ(bounded->body.size(), vector_end + sizeof(float) + 2 + filter.size());
  EXPECT_EQ(LoadAs<float>(bounded->body.data() + vector_end), 0.25F);
  const auto across = peer_.NextFrame();
  ASSERT_TRUE(across.has_value());
  EXPECT_EQ(across->header.flags, kFrameFlagAcross);
  EXPECT_EQ(across->body.size(), vector_end);
  const auto latest = peer_.NextFrame();
  ASSERT_TRUE(latest.has_value());
  EXPECT_EQ(LoadAs<RecallBody>(latest->body.data()).dtype, VectorDtype::kNone);
  EXPECT_EQ(latest->body.size(), sizeof(RecallBody) + 2 + filter.size());
}

TEST_F(EngramClientTest, RecallAsksForVectorsAndASnapshotByFlags) {
  Greet();
  RecallStream stream(&connection_);
  stream.Send({.vector = vector_});
  stream.Send({.vector = vector_, .with_vector = true});
  stream.Send({.vector = vector_, .at_snapshot = true});
  ASSERT_TRUE(connection_.Flush().has_value());
  for (const uint16_t flags : {uint16_t{0}, kFrameFlagWithVector, kFrameFlagSnapshot}) {
    const auto frame = peer_.NextFrame();
    ASSERT_TRUE(frame.has_value());
    EXPECT_EQ(frame->header.flags, flags);
  }
}

TEST_F(EngramClientTest, AHitHasItsVectorAndStamp) {
  Greet();
  RecallStream stream(&connection_);
  const uint64_t request = stream.Send({.vector = vector_, .k = 2, .with_vector = true});
  peer_.Send(FrameType::kResult, 0, request,
             ResultOf({{"a", 1, "payload", 0, {0.5f, -2}, 99}, {"b", 0, "", 0, {}, 100}}));
  const auto answer = stream.AwaitAnswer(kTimeoutNs);
  ASSERT_TRUE(answer.has_value()) << MessageOf(answer);
  EXPECT_EQ(answer->snapshot, 4711u);
  ASSERT_EQ(answer->hits.size(), 2u);
  EXPECT_EQ(answer->hits[0].id, "a");
  EXPECT_EQ(answer->hits[0].payload, "payload");
  EXPECT_EQ(answer->hits[0].vector, (std::vector<float>{0.5f, -2}));
  EXPECT_EQ(answer->hits[0].stamp, 99u);
  EXPECT_TRUE(answer->hits[1].vector.empty());
  EXPECT_EQ(answer->hits[1].stamp, 100u);
}

TEST_F(EngramClientTest, AnswersInPiecesAndOutOfOrderAreJoined) {
  Greet();
  RecallStream stream(&connection_);
  const uint64_t first = stream.Send({.vector = vector_, .k = 3});
  const uint64_t second = stream.Send({.vector = vector_, .k = 3});
  EXPECT_EQ(stream.InFlight(), 2u);
  peer_.Send(FrameType::kResult, kFrameFlagMore, first, ResultOf({{"a", 0.9f, "text a"}}));
  peer_.Send(FrameType::kResult, 0, second, ResultOf({{"x", 0.5f}}));
  peer_.Send(FrameType::kResult, kFrameFlagMore, first, ResultOf({}));
  peer_.Send(FrameType::kResult, 0, first,
             ResultOf({{"bb", 0.8f, "", kHitPayloadOmitted}, {"ccc", 0.7f}}));

  const auto answer = stream.AwaitAnswer(kTimeoutNs);
  ASSERT_TRUE(answer.has_value()) << MessageOf(answer);
  EXPECT_EQ(answer->request, second);
  ASSERT_EQ(answer->hits.size(), 1u);

  const auto joined = stream.AwaitAnswer(kTimeoutNs);
  ASSERT_TRUE(joined.has_value()) << MessageOf(joined);
  EXPECT_EQ(joined->request, first);
  EXPECT_EQ(joined->metric, Metric::kCosine);
  ASSERT_EQ(joined->hits.size(), 3u);
  EXPECT_EQ(joined->hits[0].id, "a");
  EXPECT_EQ(joined->hits[0].payload, "text a");
  EXPECT_FALSE(joined->hits[0].payload_omitted);
  EXPECT_EQ(joined->hits[1].id, "bb");
  EXPECT_TRUE(joined->hits[1].payload_omitted);
  EXPECT_EQ(joined->hits[2].id, "ccc");
  EXPECT_FLOAT_EQ(joined->hits[2].score, 0.7f);
  EXPECT_EQ(stream.InFlight(), 0u);
}

TEST_F(EngramClientTest, NoMoreRecallsThanTheServerTakes) {
  Greet();
  RecallStream stream(&connection_);
  for (int i = 0; i < 4; ++i) {
    EXPECT_TRUE(stream.HasRoom());
    stream.Send({.vector = vector_});
  }
  EXPECT_FALSE(stream.HasRoom());
  peer_.Send(FrameType::kResult, 0, 2, ResultOf({}));
  ASSERT_TRUE(stream.AwaitAnswer(kTimeoutNs).has_value());
  EXPECT_TRUE(stream.HasRoom());
}

TEST_F(EngramClientTest, ARefusedRecallIsAnAnswerAndTheOthersGoOn) {
  Greet();
  RecallStream stream(&connection_);
  const uint64_t refused = stream.Send({.vector = vector_});
  const uint64_t served = stream.Send({.vector = vector_});
  peer_.SendNak({.reason = RefusalReason::kUnknownSpace, .refused_type = FrameType::kRecall},
                refused);
  peer_.Send(FrameType::kResult, 0, served, ResultOf({{"a", 1}}));
  const auto first = stream.AwaitAnswer(kTimeoutNs);
  ASSERT_TRUE(first.has_value() && first->refusal.has_value());
  EXPECT_EQ(first->refusal->Describe(), "unknown_space: the space holds nothing yet");
  const auto second = stream.AwaitAnswer(kTimeoutNs);
  ASSERT_TRUE(second.has_value());
  EXPECT_EQ(second->hits.size(), 1u);
}

TEST_F(EngramClientTest, HostileResultsAreCaught) {
  const auto error_of = [&](const Bytes& body, uint64_t request) {
    ScriptedPeer peer;
    Connection connection = peer.Client();
    peer.SendHelloAck(0, 0);
    EXPECT_TRUE(connection.Hello({}, kTimeoutNs).has_value());
    RecallStream stream(&connection);
    stream.Send({.vector = vector_, .k = 2});
    peer.Send(FrameType::kResult, 0, request, body);
    const auto answer = stream.AwaitAnswer(kTimeoutNs);
    return answer ? std::string("no error") : answer.error().message;
  };
  const Bytes good = ResultOf({{"a", 1}});
  EXPECT_EQ(error_of(good, 1), "no error");
  EXPECT_NE(error_of(good, 2).find("answers no recall"), std::string::npos);
  EXPECT_NE(error_of(Bytes(7), 1).find("too short"), std::string::npos);
  EXPECT_NE(error_of(ResultOf({{"a", 1}, {"b", 1}, {"c", 1}}), 1).find("more hits"),
            std::string::npos);
  EXPECT_NE(error_of(Bytes(good.begin(), good.begin() + 20), 1).find("within a hit"),
            std::string::npos);

  // Lengths inside the hit that its bytes do not hold.
  const auto with_header = [&](auto change) {
    HitHeader header = {};
    header.hit_bytes = 48;
    header.id_bytes = 1;
    change(header);
    Bytes body(good.begin(), good.begin() + sizeof(ResultBody));
    AppendBytes(body, BytesOf(header));
    AppendBytes(body, Bytes(8));
    return body;
  };
  EXPECT_EQ(error_of(with_header([](HitHeader&) {}), 1), "no error");
  for (const Bytes& body : {with_header([](HitHeader& hit) { hit.hit_bytes = 0; }),
                            with_header([](HitHeader& hit) { hit.hit_bytes = 1'000; }),
                            with_header([](HitHeader& hit) { hit.id_bytes = 500; }),
                            with_header([](HitHeader& hit) { hit.vector_dimension = 2; }),
                            with_header([](HitHeader& hit) { hit.payload_bytes = UINT32_MAX; })}) {
    EXPECT_NE(error_of(body, 1).find("hit's length"), std::string::npos);
  }
}

Bytes SpaceRecordOf(std::string_view name, uint64_t observations) {
  SpaceRecord record = {};
  record.record_bytes = static_cast<uint32_t>(PadTo8(sizeof(SpaceRecord) + name.size()));
  record.dimension = 8;
  record.metric = Metric::kL2;
  record.name_bytes = static_cast<uint8_t>(name.size());
  record.observations = observations;
  Bytes bytes = ScriptedPeer::ToBytes(BytesOf(record));
  AppendBytes(bytes, BytesOf(name));
  bytes.resize(record.record_bytes);
  return bytes;
}

Bytes IntrospectionOf(IntrospectWhat what, uint16_t count, const std::vector<Bytes>& parts) {
  Bytes bytes = ScriptedPeer::ToBytes(BytesOf(IntrospectionBody{.count = count, .what = what}));
  for (const Bytes& part : parts) AppendBytes(bytes, part);
  return bytes;
}

TEST_F(EngramClientTest, SpacesComeOverSeveralFrames) {
  Greet();
  peer_.Send(FrameType::kIntrospection, kFrameFlagMore, 1,
             IntrospectionOf(IntrospectWhat::kSpaces, 2,
                             {SpaceRecordOf("a", 1), SpaceRecordOf("longer-name", 2)}));
  peer_.Send(FrameType::kIntrospection, 0, 1,
             IntrospectionOf(IntrospectWhat::kSpaces, 1, {SpaceRecordOf("c", 3)}));
  const auto spaces = IntrospectSpaces(connection_, kTimeoutNs);
  ASSERT_TRUE(spaces.has_value()) << MessageOf(spaces);
  ASSERT_EQ(spaces->size(), 3u);
  EXPECT_EQ((*spaces)[1].name, "longer-name");
  EXPECT_EQ((*spaces)[2].record.observations, 3u);
  const auto frame = peer_.NextFrame();
  ASSERT_TRUE(frame.has_value());
  EXPECT_EQ(frame->header.type, FrameType::kIntrospect);
  ASSERT_EQ(frame->body.size(), 1u);
  EXPECT_EQ(frame->body[0], std::byte{1});
}

TEST_F(EngramClientTest, HostileSpaceRecordsAreCaught) {
  Greet();
  Bytes lying = SpaceRecordOf("abc", 1);
  SpaceRecord record = LoadAs<SpaceRecord>(lying.data());
  record.name_bytes = 255;
  std::memcpy(lying.data(), &record, sizeof(record));
  for (const Bytes& part : {lying, Bytes(sizeof(SpaceRecord)), Bytes(10)}) {
    peer_.Send(FrameType::kIntrospection, 0, 1,
               IntrospectionOf(IntrospectWhat::kSpaces, 1, {part}));
    EXPECT_EQ(IntrospectSpaces(connection_, kTimeoutNs).error().code, ErrorCode::kCorrupt);
  }
}

TEST_F(EngramClientTest, StatusLinesMayBeCutBetweenFrames) {
  Greet();
  const auto text = [](std::string_view part) { return ScriptedPeer::ToBytes(BytesOf(part)); };
  peer_.Send(FrameType::kIntrospection, kFrameFlagMore, 1,
             IntrospectionOf(IntrospectWhat::kStatus, 0, {text("ingress0 obser")}));
  peer_.Send(FrameType::kIntrospection, 0, 1,
             IntrospectionOf(IntrospectWhat::kStatus, 0, {text("vations 5\n")}));
  EXPECT_EQ(IntrospectStatus(connection_, kTimeoutNs).value(), "ingress0 observations 5\n");
}

TEST_F(EngramClientTest, CloseWaitsForTheServersClose) {
  Greet();
  peer_.SendAck(3, 3);
  peer_.Send(FrameType::kClose, 0, 3, {});
  EXPECT_TRUE(connection_.Close(kTimeoutNs).has_value());
  EXPECT_EQ(peer_.NextFrame()->header.type, FrameType::kClose);
}

}  // namespace
}  // namespace engram
