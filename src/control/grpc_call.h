#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <string_view>

#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/status.h>

#include "src/control/call_faults.h"
#include "src/control/gateway_inbox.h"
#include "src/control/memory_wire.h"
#include "src/core/clock.h"
#include "src/core/counters.h"
#include "src/core/space_catalogue.h"
#include "src/core/stream_network.h"

// What gRPC's unary calls and its streams share.

namespace engram {

// Counts the calls that are not through, so that the end can wait for them.
//
// Thread safety: any thread may call anything.
class CallCount {
 public:
  // False once Close was called: the call is not taken.
  [[nodiscard]] bool Enter() {
    if ((state_.fetch_add(kCall) & kClosed) == 0) return true;
    Leave();
    return false;
  }
  void Leave() {
    if (state_.fetch_sub(kCall) - kCall != kClosed) return;
    const std::lock_guard lock(mutex_);
    none_left_.notify_all();
  }
  void Close() { state_.fetch_or(kClosed); }
  // After Close: waits until all have left. False when `timeout` passed before.
  bool WaitForNone(std::chrono::nanoseconds timeout) {
    std::unique_lock lock(mutex_);
    return none_left_.wait_for(lock, timeout, [this] { return state_.load() == kClosed; });
  }

 private:
  static constexpr uint64_t kClosed = 1;
  static constexpr uint64_t kCall = 2;

  std::atomic<uint64_t> state_{0};
  std::mutex mutex_;
  std::condition_variable none_left_;
};

// The bytes of answers that gRPC has and clients have not read yet. A client that does not read
// would else fill the memory with them.
//
// Thread safety: any thread may call anything.
class UnreadAnswers {
 public:
  // Answers up to kSmallBytes may take `most_small` beyond `most`.
  UnreadAnswers(size_t most, size_t most_small) : most_(most), most_small_(most_small) {}
  // False where they would be too many; nothing is counted then.
  [[nodiscard]] bool Add(size_t bytes) {
    const size_t most = bytes <= kSmallBytes ? most_ + most_small_ : most_;
    if (bytes == 0) return true;
    if (bytes_.fetch_add(bytes, std::memory_order_relaxed) + bytes <= most) return true;
    Remove(bytes);
    return false;
  }
  void Remove(size_t bytes) { bytes_.fetch_sub(bytes, std::memory_order_relaxed); }

 private:
  static constexpr size_t kSmallBytes = size_t{64} << 10;

  const size_t most_;
  const size_t most_small_;
  std::atomic<size_t> bytes_{0};
};

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
