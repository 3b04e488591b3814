#include "tools/clients/cpp/resuming_feed.h"

#include <algorithm>
#include <utility>

#include "src/core/check.h"

namespace engram {

Backoff::Backoff(int64_t min_ns, int64_t max_ns, uint64_t seed)
    : min_ns_(min_ns), max_ns_(max_ns), step_ns_(min_ns), random_(seed) {
  CHECK(min_ns > 0 && max_ns >= min_ns, "waiting takes time, and rises");
}

int64_t Backoff::NextNs() {
  const int64_t half_ns = step_ns_ / 2;
  const auto part = static_cast<int64_t>(random_.Below(static_cast<uint64_t>(half_ns) + 1));
  const int64_t wait_ns = step_ns_ - half_ns + part;
  step_ns_ = step_ns_ > max_ns_ / 2 ? max_ns_ : step_ns_ * 2;
  return wait_ns;
}

ResumingFeed::ResumingFeed(Connection connection, HelloOptions hello, ObservationSource source,
                           FeedOptions feed_options, Connector connector, RetryOptions options)
    : connector_(std::move(connector)),
      options_(options),
      feed_(std::move(connection), std::move(source), feed_options),
      hello_(std::move(hello)),
      backoff_(options.backoff_min_ns, options.backoff_max_ns, options.jitter_seed),
      settled_seen_(feed_.counts().settled) {
  hello_.session = feed_.connection().hello().session;
}

Result<bool> ResumingFeed::Poll(int64_t now_ns) {
  switch (state_) {
    case State::kStreaming:
      return PollFeed(now_ns);
    case State::kWaiting:
      if (now_ns < wake_ns_) return false;
      return Begin(now_ns);
    case State::kGreeting:
      break;
  }
  return PollGreeting(now_ns);
}

Result<bool> ResumingFeed::PollFeed(int64_t now_ns) {
  const Result<bool> worked = feed_.Poll(now_ns);
  // Acks may have come before the error.
  NoteProgress();
  if (!worked) return WaitAfter(worked.error(), now_ns);
  if (feed_.AllSettled()) {
    quiet_ns_.reset();
    return worked;
  }
  if (!quiet_ns_) quiet_ns_ = now_ns;
  if (now_ns < GiveUpNs()) return worked;
  return GiveUp(feed_.last_wait().empty() ? "the server does not answer" : feed_.last_wait());
}

Result<bool> ResumingFeed::Begin(int64_t now_ns) {
  Result<Connection> connection = connector_(attempts_++);
  if (!connection) return WaitAfter(connection.error(), now_ns);
  if (auto sent = connection->SendHello(hello_); !sent) return std::unexpected(sent.error());
  next_.emplace(*std::move(connection));
  state_ = State::kGreeting;
  wake_ns_ = now_ns + std::min(options_.greet_timeout_ns, options_.retry_for_ns);
  return PollGreeting(now_ns);
}

Result<bool> ResumingFeed::PollGreeting(int64_t now_ns) {
  const Result<bool> answered = next_->PollHello();
  if (!answered) {
    if (answered.error().code == ErrorCode::kNotFound && feed_.SessionIsEmpty() &&
        hello_.session != 0) {
      hello_.session = 0;
      ++sessions_begun_anew_;
      return WaitAfter({ErrorCode::kUnavailable, answered.error().message}, now_ns);
    }
    return WaitAfter(answered.error(), now_ns);
  }
  if (!*answered) {
    if (now_ns < wake_ns_) return false;
    return WaitAfter({ErrorCode::kUnavailable, "the server did not answer hello in time"}, now_ns);
  }
  if (hello_.session != 0 && next_->hello().session != hello_.session) {
    return Fail(ErrorCode::kCorrupt, "the server answers with another session than asked");
  }
  hello_.session = next_->hello().session;
  Connection connection = *std::move(next_);
  next_.reset();
  if (auto resumed = feed_.Resume(std::move(connection), now_ns); !resumed) {
    return std::unexpected(resumed.error());
  }
  state_ = State::kStreaming;
  NoteProgress();
  settled_seen_ = feed_.counts().settled;  // lower after a rollback
  return PollFeed(now_ns);
}

// What the error leads to: the next attempt, or the end.
Result<bool> ResumingFeed::WaitAfter(const Error& error, int64_t now_ns) {
  next_.reset();
  feed_.connection().Abandon();
  if (error.code != ErrorCode::kUnavailable || options_.retry_for_ns == 0 || !connector_) {
    return std::unexpected(error);
  }
  if (!quiet_ns_) quiet_ns_ = now_ns;
  if (now_ns >= GiveUpNs()) return GiveUp(error.message);
  state_ = State::kWaiting;
  wake_ns_ = std::min(now_ns + backoff_.NextNs(), GiveUpNs());
  return false;
}

void ResumingFeed::NoteProgress() {
  if (feed_.counts().settled <= settled_seen_) return;
  settled_seen_ = feed_.counts().settled;
  quiet_ns_.reset();
  backoff_.Reset();
}

int64_t ResumingFeed::GiveUpNs() const {
  if (options_.retry_for_ns == 0 || !quiet_ns_) return INT64_MAX;
  return *quiet_ns_ + options_.retry_for_ns;
}

std::unexpected<Error> ResumingFeed::GiveUp(const std::string& why) const {
  return Fail(ErrorCode::kUnavailable, "gave up after " +
                                           std::to_string(options_.retry_for_ns / kNanosPerSecond) +
                                           " s in which nothing was settled; at last: " + why);
}

int64_t ResumingFeed::NextWakeNs(int64_t now_ns) const {
  return state_ == State::kStreaming ? std::min(feed_.NextWakeNs(now_ns), GiveUpNs()) : wake_ns_;
}

int ResumingFeed::fd() const {
  if (state_ == State::kGreeting) return next_->fd();
  return state_ == State::kStreaming ? feed_.connection().fd() : -1;
}

bool ResumingFeed::WantsToWrite() const {
  if (state_ == State::kGreeting) return next_->PendingBytes() > 0;
  return state_ == State::kStreaming && feed_.connection().PendingBytes() > 0;
}

}  // namespace engram
