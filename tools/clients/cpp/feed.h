#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>

#include "src/core/clock.h"
#include "src/core/latency_histogram.h"
#include "tools/clients/cpp/engram_client.h"

namespace engram {

// One observation as its owner shows it. What the views point to stays valid until the owner is
// asked for the next one.
struct Observation {
  ObservationOp op = ObservationOp::kUpsert;
  VectorDtype dtype = VectorDtype::kF32;
  uint32_t dimension = 0;
  float scale = 1;
  float confidence = 1;
  int64_t when_ns = 0;
  std::span<const std::byte> vector;  // VectorBytes(dtype, dimension)
  std::string_view id;
  std::string_view payload;
};

// Shows observation `index`, counted from 0. It is asked again for what has to be sent again, so
// nothing is kept for that, and must show the same then.
using ObservationSource = std::function<void(uint64_t index, Observation* observation)>;

struct FeedOptions {
  // Observations in a frame, fewer where max_frame_bytes asks for it. 1 to 65,535.
  uint32_t batch = 16;
  // The feed fails when nothing was settled for this long although something waits to be.
  int64_t stall_timeout_ns = 60 * kNanosPerSecond;
};

// Numbers of observations.
struct FeedCounts {
  uint64_t sent = 0;     // each counted once
  uint64_t settled = 0;  // up to the last ack: acked or refused for good
  uint64_t acked = 0;    // settled and not refused
  uint64_t retried = 0;  // sent once more, after a refusal for lack of room or a gap
  std::map<std::string, uint64_t> refused;     // for good, by the reason's name
  std::map<std::string, uint64_t> waited_for;  // naks that asked to go back, by the reason's name
};

// Streams observations over one session by go-back-N (dataplane/FORMAT.md, "observe, ack, nak").
//
// Observation i has the sequence base + 1 + i, where base is the session's last accepted sequence.
// Poll does, in this order:
//   1. Take in acks and naks. An ack settles all up to its sequence and brings credit. A nak that
//      consumed its number counts as refused for good. One that did not sets the next sequence to
//      send back to the expected one, after the time that it names. One that closes ends the feed.
//   2. Write frames for what was offered and is within the credit, oldest first. A frame is full,
//      or holds the last of what was offered, or goes out because nothing else is under way: so
//      credit that comes in drops does not end in frames of one observation. After a refusal for
//      lack of room one frame goes alone, until its first observation is settled: a server that is
//      still full is then not sent a whole window in vain.
//   3. Give the socket what it takes.
//
// Invariants: settled <= next to send <= ever sent <= offered (as counts of observations).
// Thread safety: none; one thread owns it.
class Feed {
 public:
  // For Offer: latency counts from when an observation is first written to the socket.
  static constexpr int64_t kSinceSent = INT64_MIN;

  // `connection` has said hello, with a session.
  Feed(Connection connection, ObservationSource source, FeedOptions options = {});

  // Lets the feed send `count` more. Their latency counts from `since_ns`, so that waiting in the
  // client for credit or for the socket counts too when it is the intended time of sending. A feed
  // is offered all with a time or all without.
  void Offer(uint64_t count, int64_t since_ns = kSinceSent);

  // One bounded step; never blocks. Returns whether another step may find work at once. Errors:
  // those of Connection::NextFrame; kUnavailable (closed by a nak or a close, stalled); kCorrupt
  // (the server settles what was not sent); kInvalidArgument (an observation fits in no frame).
  Result<bool> Poll(int64_t now_ns);

  bool AllSettled() const { return counts_.settled == offered_; }
  // When Poll has to be called although the socket is silent.
  int64_t NextWakeNs(int64_t now_ns) const;
  const FeedCounts& counts() const { return counts_; }
  const LatencyHistogram& ack_latency() const { return ack_latency_; }
  uint64_t observe_bytes_sent() const { return observe_bytes_; }
  Connection& connection() { return connection_; }

 private:
  struct Batch {
    uint64_t end = 0;  // index after its last observation
    int64_t since_ns = 0;
  };

  Result<void> TakeFrame(const Frame& frame, int64_t now_ns);
  Result<void> TakeAck(const Frame& frame, int64_t now_ns);
  Result<void> TakeNak(const Frame& frame, int64_t now_ns);
  Result<bool> WriteFrame(int64_t now_ns);
  void Settle(uint64_t settled, int64_t now_ns);
  uint64_t SequenceOf(uint64_t index) const { return base_ + 1 + index; }
  std::unexpected<Error> FailStalled() const;
  // `error`, with how much stays open.
  std::unexpected<Error> FailStream(Error error) const;

  // Constant after construction.
  Connection connection_;
  const ObservationSource source_;
  const FeedOptions options_;
  const uint64_t base_;

  uint64_t offered_ = 0;
  uint64_t next_ = 0;                     // index to send next
  uint64_t credit_ = 0;                   // highest sequence that may be sent
  std::set<uint64_t> refused_unsettled_;  // indices refused for good, not yet settled
  std::deque<Batch> latency_batches_;     // not settled, by rising end
  // The observation that was refused for lack of room, until it is settled.
  std::optional<uint64_t> probe_;
  int64_t resume_ns_ = INT64_MIN;    // nothing is sent before
  int64_t progress_ns_ = INT64_MIN;  // when something was settled last, or offered to an idle feed
  std::string last_wait_;            // the last nak that asked to wait, described
  uint64_t observe_bytes_ = 0;
  FeedCounts counts_;
  LatencyHistogram ack_latency_;
};

}  // namespace engram
