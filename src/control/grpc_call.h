#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/status.h>

#include "src/control/call_count.h"
#include "src/control/call_faults.h"
#include "src/control/gateway_inbox.h"
#include "src/control/memory_wire.h"
#include "src/core/clock.h"
#include "src/core/counters.h"
#include "src/core/space_catalogue.h"
#include "src/core/stream_network.h"

// What gRPC's unary calls and its streams share.

namespace engram {

// What every call needs of its surroundings; lives as long as the server.
struct CallContext {
  GatewayDoor door;
  Clock* clock;
  const CounterCatalogue* counters;
  const SpaceCatalogue* spaces;
  StreamNetwork* streams;
  UnreadAnswers unread;
  CallCount calls;
  std::function<std::string()> recovering;
  std::atomic<bool> serves;  // what was recovered is there
};

// Why a call is not taken while what was stored is read.
grpc::Status RecoveringStatus(const CallContext& context);

// The call's deadline on our monotonic clock; 0: none.
int64_t DeadlineNs(const grpc::CallbackServerContext& context, int64_t now_ns);

// The one space that the metadata names; several must agree.
std::expected<std::string_view, CallError> SpaceOfMetadata(
    const grpc::CallbackServerContext& context);

grpc::Status StatusOf(const CallError& error);

// Fills in `message`. gRPC's own reading would answer bytes that are none with UNIMPLEMENTED and
// without a word.
template <typename Message>
grpc::Status ReadMessage(const grpc::ByteBuffer& bytes, Message* message) {
  grpc::ByteBuffer taken = bytes;
  if (grpc::SerializationTraits<Message>::Deserialize(&taken, message).ok()) {
    // Fields that we do not know can be large, and the call may wait.
    message->DiscardUnknownFields();
    return grpc::Status::OK;
  }
  grpc::Slice whole;
  std::string fault;
  if (bytes.DumpToSingleSlice(&whole).ok()) {
    fault = WireFault(*Message::descriptor(),
                      {reinterpret_cast<const char*>(whole.begin()), whole.size()});
  }
  if (fault.empty()) {
    fault = "request: " + std::to_string(bytes.Length()) + " bytes; expected a message";
  }
  return {grpc::StatusCode::INVALID_ARGUMENT,
          fault + " (as " + Message::descriptor()->full_name() + ")"};
}

}  // namespace engram
