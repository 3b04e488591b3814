#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "dataplane/frame_format.h"
#include "src/core/observation.h"
#include "src/core/refusal_reason.h"
#include "src/core/shard_port.h"
#include "src/core/stream_network.h"

namespace engram {

// What became of an order.
struct SpaceOutcome {
  RefusalReason reason = RefusalReason::kNone;
  uint32_t retry_after_ms = 0;
  std::string text{};  // of a refusal
  // Of a space that was made.
  Metric metric = Metric::kUnspecified;
  uint16_t dimension = 0;
  // Of one that was dropped: what was in it.
  uint64_t observations = 0;
};

// One space is made or dropped, by native frames in a pipe (FORMAT.md).
//
// A space is made by a session that says its metric and dimension and uses one number up: so it is
// on stable storage like what a client stores there, and is there after a restart.
//
// Lifecycle: Begin; Look after each StreamClient::OnReady, until it has an outcome; destructor.
// Thread safety: one thread's alone.
class SpaceOrder {
 public:
  enum class What : uint8_t { kCreate, kDrop };

  // `metric` and `dimension` of a new one; kUnspecified and 0: left open.
  SpaceOrder(What what, const SpaceName& space, Metric metric = Metric::kUnspecified,
             uint16_t dimension = 0)
      : what_(what), space_(space), metric_(metric), dimension_(dimension) {}
  // Gives the pipe back.
  ~SpaceOrder();
  SpaceOrder(const SpaceOrder&) = delete;
  SpaceOrder& operator=(const SpaceOrder&) = delete;

  void Begin(StreamPipe* pipe);
  // Nothing while it is not done.
  std::optional<SpaceOutcome> Look();

  const SpaceName& space() const { return space_; }
  What what() const { return what_; }

 private:
  void SendHello();
  void SendCommand();
  void SendSkip();
  void Send(FrameHeader header, std::span<const std::byte> body);
  // One whole frame.
  std::optional<SpaceOutcome> See(const FrameHeader& header, std::span<const std::byte> body);

  const What what_;
  const SpaceName space_;
  const Metric metric_;
  const uint16_t dimension_;
  StreamPipe* pipe_ = nullptr;
  uint64_t session_ = 0;
  SpaceOutcome outcome_;         // of a space that is being made
  std::vector<std::byte> came_;  // and is not a whole frame yet
};

}  // namespace engram
