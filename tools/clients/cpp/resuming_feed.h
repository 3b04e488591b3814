#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "src/core/hash.h"
#include "src/core/result.h"
#include "tools/clients/cpp/engram_client.h"
#include "tools/clients/cpp/feed.h"

namespace engram {

// How long to wait before the next attempt: from `min_ns` doubling to `max_ns`, and of each such
// time a random part between its half and all of it, so that many clients of a server that comes
// back do not come at once.
class Backoff {
 public:
  Backoff(int64_t min_ns, int64_t max_ns, uint64_t seed);

  // The next time to wait; rises from call to call until Reset.
  int64_t NextNs();
  void Reset() { step_ns_ = min_ns_; }

 private:
  const int64_t min_ns_;
  const int64_t max_ns_;
  int64_t step_ns_;
  SplitMix64 random_;
};

struct RetryOptions {
  // Gives up when something waits to be settled, or a connection is missing, and nothing was
  // settled for this long; the last attempt begins then. 0: the first error ends it, and the feed's
  // stall timeout is the bound.
  int64_t retry_for_ns = 0;
  int64_t backoff_min_ns = 10 * kNanosPerMilli;
  int64_t backoff_max_ns = kNanosPerSecond;
  // For connecting and hello together; at most retry_for_ns counts.
  int64_t greet_timeout_ns = 10 * kNanosPerSecond;
  uint64_t jitter_seed = 0;  // another one in each process
};

// Begins attempt number `attempt`, counted from 0 over all outages, and does not wait:
// Connection::StartConnect with the server's address, or a socket of the owner's.
using Connector = std::function<Result<Connection>(uint64_t attempt)>;

// A Feed that outlives its connections: each observation is settled once, in order, although the
// connection breaks or the server is killed and started again.
//
// Poll is in one of these states:
//   1. Streaming: polls the feed. When that ends with an error that may pass (kUnavailable: closed,
//      reset, refused for now, stalled) the socket is closed and it goes to 2. Any other error,
//      such as fenced or a broken frame, is final.
//   2. Waiting, by exponential back-off with jitter. Then an attempt begins.
//   3. Greeting: the connection is made and hello said with the session's id. hello_ack takes it
//      back to 1 by Feed::Resume; an error that may pass, or no answer in time, back to 2.
// Time without progress counts from when something waits to be settled, or from the first error on,
// whether the connection is broken, the server refuses all that is sent or says nothing. Whatever
// is settled, by an ack or by a hello_ack, begins it anew and resets the back-off. While it is
// connected with nothing to settle none passes.
//
// session_expired is final: what is not settled would need a new session, which is for the owner to
// decide, as repeats are not recognised there. Only where nothing of the
// session was ever settled a new one is begun (sessions_begun_anew): a server keeps no session of
// which it took nothing, and so does not know it after a crash.
//
// The owner sleeps: until fd() is readable, or writable while WantsToWrite(), or NextWakeNs. fd()
// changes with each connection, and is -1 while there is none.
//
// Thread safety: none; one thread owns it.
class ResumingFeed {
 public:
  // `connection` is the first one and has said `hello`, whose session is not read here. The source
  // and `feed_options` are those of Feed. Without a connector it never reconnects.
  ResumingFeed(Connection connection, HelloOptions hello, ObservationSource source,
               FeedOptions feed_options, Connector connector, RetryOptions options);

  // As Feed::Offer.
  void Offer(uint64_t count, int64_t since_ns = Feed::kSinceSent) { feed_.Offer(count, since_ns); }

  // One bounded step; never blocks, but for what the connector does. Returns whether another step
  // may find work at once. Errors are final: those of Feed::Poll and Connection::PollHello that do
  // not pass; kUnavailable once the time without progress is over. feed().counts() says what became
  // of the observations.
  Result<bool> Poll(int64_t now_ns);

  bool AllSettled() const { return feed_.AllSettled(); }
  int64_t NextWakeNs(int64_t now_ns) const;
  int fd() const;
  bool WantsToWrite() const;

  // Whether the feed has a connection that has said hello.
  bool Streaming() const { return state_ == State::kStreaming; }
  Feed& feed() { return feed_; }
  const Feed& feed() const { return feed_; }
  uint64_t attempts() const { return attempts_; }
  uint64_t sessions_begun_anew() const { return sessions_begun_anew_; }

 private:
  enum class State { kStreaming, kWaiting, kGreeting };

  Result<bool> PollFeed(int64_t now_ns);
  Result<bool> Begin(int64_t now_ns);
  Result<bool> PollGreeting(int64_t now_ns);
  Result<bool> WaitAfter(const Error& error, int64_t now_ns);
  void NoteProgress();
  int64_t GiveUpNs() const;
  std::unexpected<Error> GiveUp(const std::string& why) const;

  const Connector connector_;
  const RetryOptions options_;
  Feed feed_;
  HelloOptions hello_;
  State state_ = State::kStreaming;
  Backoff backoff_;
  std::optional<Connection> next_;   // while greeting
  int64_t wake_ns_ = 0;              // end of waiting, or of greeting
  std::optional<int64_t> quiet_ns_;  // when the time without progress began
  uint64_t settled_seen_;
  uint64_t attempts_ = 0;
  uint64_t sessions_begun_anew_ = 0;
};

}  // namespace engram
