#pragma once

#include <cstdint>

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include "src/control/grpc_call.h"

// Engram's streams over gRPC. Messages are bytes, so that what cannot be read is told in words.

namespace engram {

enum class StreamKind : uint8_t {
  kObserve,  // observations only
  kMemory,   // and recalls
};

// Each returns the reactor of a stream that has begun; it deletes itself. `context` outlives it.
grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* BeginObserveStream(
    CallContext* context, const grpc::CallbackServerContext& grpc_context, StreamKind kind);
grpc::ServerWriteReactor<grpc::ByteBuffer>* BeginRecallStream(
    CallContext* context, const grpc::CallbackServerContext& grpc_context,
    const grpc::ByteBuffer& request);

}  // namespace engram
