#include "dataplane/frame_writer.h"

#include <algorithm>
#include <array>
#include <cstdio>

namespace engram {

namespace {

// Seals and sends the frame whose body is the concatenation of `parts`.
template <size_t kParts>
void SendFrame(Network* network, ConnectionId connection, FrameHeader header,
               const std::array<std::span<const std::byte>, kParts>& parts) {
  SealFrame(&header, parts);
  std::array<std::span<const std::byte>, kParts + 1> frame;
  frame[0] = BytesOf(header);
  for (size_t i = 0; i < kParts; ++i) frame[i + 1] = parts[i];
  // A false answer means that the connection is going: OnClosed tells.
  (void)network->Send(connection, frame);
}

using Parts0 = std::array<std::span<const std::byte>, 0>;
using Parts1 = std::array<std::span<const std::byte>, 1>;
using Parts2 = std::array<std::span<const std::byte>, 2>;

}  // namespace

void SendHelloAck(Network* network, ConnectionId connection, uint64_t session,
                  uint64_t last_sequence, const HelloAckBody& body) {
  const FrameHeader header{
      .type = FrameType::kHelloAck, .session = session, .sequence = last_sequence};
  SendFrame(network, connection, header, Parts1{BytesOf(body)});
}

void SendAck(Network* network, ConnectionId connection, uint64_t session, uint64_t sequence,
             uint64_t credit) {
  const AckBody body{.credit = credit};
  const FrameHeader header{.type = FrameType::kAck, .session = session, .sequence = sequence};
  SendFrame(network, connection, header, Parts1{BytesOf(body)});
}

void SendNak(Network* network, ConnectionId connection, RefusalReason reason,
             const NakDetail& detail) {
  RefusalInfo info = DescribeRefusal(reason);
  if (!detail.text.empty()) info.text = detail.text;
  std::array<char, 256> text;
  int length = 0;
  if (detail.has_numbers) {
    length = std::snprintf(text.data(), text.size(), "%.*s (got %llu, expected %llu)",
                           static_cast<int>(info.text.size()), info.text.data(),
                           static_cast<unsigned long long>(detail.got),
                           static_cast<unsigned long long>(detail.wanted));
  } else {
    length = std::snprintf(text.data(), text.size(), "%.*s", static_cast<int>(info.text.size()),
                           info.text.data());
  }
  const size_t text_bytes = std::min(static_cast<size_t>(length), text.size() - 1);
  NakBody body;
  body.reason = reason;
  body.refused_type = detail.refused_type;
  body.flags = detail.flags;
  body.retry_after_ms = detail.retry_after_ms;
  body.expected = detail.expected;
  body.text_bytes = static_cast<uint16_t>(text_bytes);
  const FrameHeader header{
      .type = FrameType::kNak, .session = detail.session, .sequence = detail.sequence};
  SendFrame(network, connection, header,
            Parts2{BytesOf(body), BytesOf(std::string_view(text.data(), text_bytes))});
}

void SendFlow(Network* network, ConnectionId connection, uint64_t session, uint64_t sequence,
              const FlowBody& body) {
  const FrameHeader header{.type = FrameType::kFlow, .session = session, .sequence = sequence};
  SendFrame(network, connection, header, Parts1{BytesOf(body)});
}

void SendResult(Network* network, ConnectionId connection, uint64_t session, uint64_t request_id,
                const ResultBody& body, bool more, std::span<const std::byte> hits) {
  const FrameHeader header{.type = FrameType::kResult,
                           .flags = more ? kFrameFlagMore : uint16_t{0},
                           .session = session,
                           .sequence = request_id};
  SendFrame(network, connection, header, Parts2{BytesOf(body), hits});
}

void SendIntrospection(Network* network, ConnectionId connection, uint64_t session,
                       uint64_t request_id, const IntrospectionBody& body, bool more,
                       std::span<const std::byte> records) {
  const FrameHeader header{.type = FrameType::kIntrospection,
                           .flags = more ? kFrameFlagMore : uint16_t{0},
                           .session = session,
                           .sequence = request_id};
  SendFrame(network, connection, header, Parts2{BytesOf(body), records});
}

void SendScrolled(Network* network, ConnectionId connection, uint64_t session, uint64_t request_id,
                  const ScrolledBody& body) {
  const FrameHeader header{
      .type = FrameType::kScrolled, .session = session, .sequence = request_id};
  SendFrame(network, connection, header, Parts1{BytesOf(body)});
}

void SendChecked(Network* network, ConnectionId connection, uint64_t session, uint64_t request_id,
                 const CheckedBody& body, std::string_view text) {
  const FrameHeader header{.type = FrameType::kChecked, .session = session, .sequence = request_id};
  SendFrame(network, connection, header, Parts2{BytesOf(body), BytesOf(text)});
}

void SendCommandDone(Network* network, ConnectionId connection, uint64_t session,
                     uint64_t request_id, const CommandDoneBody& body) {
  const FrameHeader header{
      .type = FrameType::kCommandDone, .session = session, .sequence = request_id};
  SendFrame(network, connection, header, Parts1{BytesOf(body)});
}

void SendPingAnswer(Network* network, ConnectionId connection, uint64_t session,
                    uint64_t sequence) {
  const FrameHeader header{.type = FrameType::kPing,
                           .flags = kFrameFlagPingAnswer,
                           .session = session,
                           .sequence = sequence};
  SendFrame(network, connection, header, Parts0{});
}

void SendClose(Network* network, ConnectionId connection, uint64_t session, uint64_t sequence) {
  const FrameHeader header{.type = FrameType::kClose, .session = session, .sequence = sequence};
  SendFrame(network, connection, header, Parts0{});
}

}  // namespace engram
