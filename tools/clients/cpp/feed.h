#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
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
  // As AppendAttribute writes them. They stay behind where the server did not grant them in hello.
  std::string_view attributes;
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
  // Observation i has the sequence base + 1 + i. Without it base is what hello_ack said. A lower
  // one is for an owner whose first observations went over this session earlier, in another run:
  // those that hello_ack settles then count as offered, sent, acked and resumed_ahead from the
  // start.
  std::optional<uint64_t> base = {};
};

// Numbers of observations.
struct FeedCounts {
  uint64_t sent = 0;     // each counted once
  uint64_t settled = 0;  // up to the last ack: acked or refused for good
  uint64_t acked = 0;    // settled and not refused
  uint64_t retried = 0;  // sent once more, after a refusal for lack of room, a gap or a resume
  uint64_t resumes = 0;  // connections that went on with the session
  uint64_t resumed_ahead = 0;  // settled by a hello_ack: taken, but the ack was lost
  uint64_t rolled_back = 0;    // settled, then lost by the server, and to be sent again
  std::map<std::string, uint64_t> refused;     // for good, by the reason's name
  std::map<std::string, uint64_t> waited_for;  // naks that asked to go back, by the reason's name

  uint64_t RefusedTotal() const;
  // What became of `total` observations, of which some may not be sent: "3 acked, 1 refused for
  // good, 2 sent and not settled, 4 not sent". They add up to `total`.
  std::string Describe(uint64_t total) const;
};

// Streams observations over one session by go-back-N (dataplane/FORMAT.md, "observe, ack, nak"), on
// one connection after another. It does not connect by itself: see ResumingFeed.
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
// Resume goes on with a session whose connection has ended. hello_ack names the last sequence that
// the server has; from there on all is sent again.
//   - It is what was acked last: nothing else happens.
//   - It is later: what lies between was taken and the ack was lost. It is settled now. A refusal
//     for good that was lost likewise is not told again, so that one counts as acked.
//   - It is earlier, which durability `interval` and `memory` allow after a crash: what lies
//   between
//     is no longer settled, and is sent again.
//
// Invariants: settled <= next to send <= ever sent <= offered (as counts of observations). Each
// observation has one latency: from its time until it was settled first, an outage included.
// Thread safety: none; one thread owns it.
class Feed {
 public:
  // For Offer: latency counts from when an observation is first written to a socket.
  static constexpr int64_t kSinceSent = INT64_MIN;

  // `connection` has said hello, with a session.
  Feed(Connection connection, ObservationSource source, FeedOptions options = {});

  // Lets the feed send `count` more. Their latency counts from `since_ns`, so that waiting in the
  // client for credit or for the socket counts too when it is the intended time of sending. A feed
  // is offered all with a time or all without.
  void Offer(uint64_t count, int64_t since_ns = kSinceSent);

  // One bounded step; never blocks. Returns whether another step may find work at once. Errors:
  // those of Connection::NextFrame and CheckUnrelatedFrame; kUnavailable (stalled); kCorrupt (the
  // server settles what was not sent); kInvalidArgument (an observation fits in no frame). After an
  // error only Resume brings it back.
  Result<bool> Poll(int64_t now_ns);

  // Goes on over `connection`, which has said hello with this session; or with a new one, where
  // SessionIsEmpty(). Errors: kCorrupt (the server has more than was sent); kNotFound (it has lost
  // what the session took before this feed).
  Result<void> Resume(Connection connection, int64_t now_ns);
  // Nothing of the session was ever settled. A server forgets such a session.
  bool SessionIsEmpty() const { return base_ == 0 && timed_ == 0; }

  bool AllSettled() const { return counts_.settled == offered_; }
  // When Poll has to be called although the socket is silent.
  int64_t NextWakeNs(int64_t now_ns) const;
  const FeedCounts& counts() const { return counts_; }
  const LatencyHistogram& ack_latency() const { return ack_latency_; }
  uint64_t observe_bytes_sent() const { return observe_bytes_; }
  uint64_t unsettled() const { return offered_ - counts_.settled; }
  // The last nak that asked to go back, if nothing was settled since: what it says. Else empty.
  const std::string& last_wait() const { return last_wait_; }
  Connection& connection() { return connection_; }
  const Connection& connection() const { return connection_; }

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
  void ForgetRefusalsFrom(uint64_t index);
  uint64_t SequenceOf(uint64_t index) const { return base_ + 1 + index; }
  std::unexpected<Error> FailStalled() const;

  const ObservationSource source_;
  const FeedOptions options_;

  Connection connection_;
  uint64_t base_;  // changes with the session alone
  uint64_t offered_ = 0;
  uint64_t next_ = 0;                        // index to send next
  uint64_t timed_ = 0;                       // up to this index latencies are recorded
  uint64_t credit_ = 0;                      // highest sequence that may be sent
  std::map<uint64_t, std::string> refused_;  // reasons of what is refused for good, by index
  std::deque<Batch> latency_batches_;        // from timed_ on, by rising end
  // The observation that was refused for lack of room, until it is settled.
  std::optional<uint64_t> probe_;
  int64_t resume_ns_ = INT64_MIN;    // nothing is sent before
  int64_t progress_ns_ = INT64_MIN;  // when something was settled last, or offered to an idle feed
  std::string last_wait_;
  uint64_t observe_bytes_ = 0;
  FeedCounts counts_;
  LatencyHistogram ack_latency_;
};

}  // namespace engram
