#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "dataplane/frame_format.h"
#include "src/core/network.h"

// The server's frames, sealed and given to the network. None allocates.

namespace engram {

// What a nak says beside its reason.
struct NakDetail {
  FrameType refused_type = FrameType::kObserve;
  uint64_t session = 0;
  uint64_t sequence = 0;  // of the observation, or the request's id
  uint8_t flags = 0;      // kNakFlagConsumed, kNakFlagClosing
  uint32_t retry_after_ms = 0;
  uint64_t expected = 0;
  // Numbers for the text, where the reason has them: "got 3, expected 768".
  bool has_numbers = false;
  uint64_t got = 0;
  uint64_t wanted = 0;
  // Takes the place of the table's text, at most 255 bytes of it; empty: that stands.
  std::string_view text = {};
};

void SendHelloAck(Network* network, ConnectionId connection, uint64_t session,
                  uint64_t last_sequence, const HelloAckBody& body);
void SendAck(Network* network, ConnectionId connection, uint64_t session, uint64_t sequence,
             uint64_t credit);
void SendNak(Network* network, ConnectionId connection, RefusalReason reason,
             const NakDetail& detail);
void SendFlow(Network* network, ConnectionId connection, uint64_t session, uint64_t sequence,
              const FlowBody& body);
void SendResult(Network* network, ConnectionId connection, uint64_t session, uint64_t request_id,
                const ResultBody& body, bool more, std::span<const std::byte> hits);
void SendIntrospection(Network* network, ConnectionId connection, uint64_t session,
                       uint64_t request_id, const IntrospectionBody& body, bool more,
                       std::span<const std::byte> records);
void SendScrolled(Network* network, ConnectionId connection, uint64_t session, uint64_t request_id,
                  const ScrolledBody& body);
void SendChecked(Network* network, ConnectionId connection, uint64_t session, uint64_t request_id,
                 const CheckedBody& body, std::string_view text);
void SendCommandDone(Network* network, ConnectionId connection, uint64_t session,
                     uint64_t request_id, const CommandDoneBody& body);
void SendPingAnswer(Network* network, ConnectionId connection, uint64_t session, uint64_t sequence);
void SendClose(Network* network, ConnectionId connection, uint64_t session, uint64_t sequence);

}  // namespace engram
