#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tests/engramctl/scripted_peer.h"
#include "tools/clients/cpp/resuming_feed.h"

// A resuming feed, and a server that remembers over connections.

namespace engram {

inline constexpr int64_t kRetryForNs = 10 * kNanosPerSecond;

// A server of one session, which can be cut off within any byte of what it answers, and which
// remembers over connections what the test wants it to.
class ModelServer {
 public:
  // A connection to it.
  Connection Accept() {
    peers_.push_back(std::make_unique<ScriptedPeer>());
    broken_ = false;
    return peers_.back()->Client();
  }
  ScriptedPeer& peer() { return *peers_.back(); }

  void BreakAfter(size_t answer_bytes) { bytes_left_ = answer_bytes; }
  void Break() {
    peer().Close();
    broken_ = true;
  }
  bool broken() const { return broken_; }
  // Loses what it had taken after `sequence`.
  void RollBackTo(uint64_t sequence) {
    last_ = sequence;
    stored_.erase(stored_.upper_bound(sequence), stored_.end());
  }

  // Answers what has arrived.
  void Serve() {
    while (!broken_) {
      const auto frame = peer().NextFrame();
      if (!frame) return;
      if (frame->header.type == FrameType::kHello) {
        sessions_asked_.push_back(frame->header.session);
        HelloAckBody body;
        body.dimension = 2;
        body.metric = Metric::kCosine;
        body.credit = last_ + credit_;
        body.max_frame_bytes = kMaxFrameBodyBytes;
        body.max_recalls = 4;
        Answer(FrameType::kHelloAck, last_, ScriptedPeer::ToBytes(BytesOf(body)));
      } else if (frame->header.type == FrameType::kObserve) {
        Take(*frame);
      }
    }
  }

  std::vector<std::string> StoredIds() const {
    std::vector<std::string> ids;
    for (const auto& [sequence, id] : stored_) ids.push_back(id);
    return ids;
  }
  uint64_t last() const { return last_; }
  size_t answer_bytes() const { return answer_bytes_; }
  const std::vector<uint64_t>& sessions_asked() const { return sessions_asked_; }

  uint64_t credit_ = 6;              // beyond the last settled one
  std::string refused_id_;           // can never be taken
  uint64_t taken_max_ = UINT64_MAX;  // what comes after is refused for now

 private:
  void Answer(FrameType type, uint64_t sequence, const Bytes& body) {
    if (broken_) return;
    Bytes bytes = ScriptedPeer::Framed(type, 0, sequence, body);
    const bool cut = bytes_left_ <= bytes.size();
    if (cut) bytes.resize(bytes_left_);
    bytes_left_ -= bytes.size();
    answer_bytes_ += bytes.size();
    if (!bytes.empty()) peer().SendRaw(bytes);
    if (cut) {
      Break();
      bytes_left_ = SIZE_MAX;
    }
  }

  void RefuseForNow() {
    const NakBody nak = {.reason = RefusalReason::kQuotaObservations,
                         .refused_type = FrameType::kObserve,
                         .retry_after_ms = 1'000,
                         .expected = last_ + 1};
    Answer(FrameType::kNak, last_ + 1, ScriptedPeer::ToBytes(BytesOf(nak)));
    Answer(FrameType::kAck, last_,
           ScriptedPeer::ToBytes(BytesOf(AckBody{.credit = last_ + credit_})));
  }

  void Take(const PeerFrame& frame) {
    std::vector<PeerRecord> records;
    ScriptedPeer::TakeRecordsOf(frame, records);
    for (const PeerRecord& record : records) {
      if (record.sequence <= last_) continue;
      if (last_ == taken_max_) return RefuseForNow();
      ASSERT_EQ(record.sequence, last_ + 1) << "a gap";
      ++last_;
      if (record.id != refused_id_) {
        stored_[last_] = record.id;
        continue;
      }
      NakBody nak = {.reason = RefusalReason::kBadId, .flags = kNakFlagConsumed};
      nak.refused_type = FrameType::kObserve;
      Answer(FrameType::kNak, last_, ScriptedPeer::ToBytes(BytesOf(nak)));
    }
    Answer(FrameType::kAck, last_,
           ScriptedPeer::ToBytes(BytesOf(AckBody{.credit = last_ + credit_})));
  }

  std::deque<std::unique_ptr<ScriptedPeer>> peers_;
  bool broken_ = false;
  size_t bytes_left_ = SIZE_MAX;
  size_t answer_bytes_ = 0;
  uint64_t last_ = 0;
  std::map<uint64_t, std::string> stored_;  // by sequence
  std::vector<uint64_t> sessions_asked_;
};

// A feed to a ModelServer.
class Link {
 public:
  explicit Link(SimulatedClock* clock, RetryOptions retry = {.retry_for_ns = kRetryForNs},
                FeedOptions options = {.batch = 2})
      : clock_(clock), retry_(retry), options_(options) {}

  void Start() {
    Connection connection = server_.Accept();
    ASSERT_TRUE(connection.SendHello({}).has_value());
    ASSERT_TRUE(connection.PollHello().has_value());
    server_.Serve();
    const auto answered = connection.PollHello();
    ASSERT_TRUE(answered.has_value() && *answered);
    feed_.emplace(
        std::move(connection), HelloOptions{.space = "s"},
        [this](uint64_t index, Observation* observation) {
          id_ = "row" + std::to_string(index);
          observation->id = id_;
          observation->dimension = 2;
          observation->vector = std::as_bytes(std::span<const float>(vector_));
        },
        options_, [this](uint64_t attempt) { return Connect(attempt); }, retry_);
  }

  // A poll at the clock's time, then the server's turn. The error, or "".
  std::string Step() {
    const auto polled = feed_->Poll(clock_->MonotonicNs());
    if (!polled) return polled.error().message;
    if (feed_->fd() >= 0) server_.Serve();
    return "";
  }
  // Steps until everything is settled or an error, going from wake to wake.
  std::string Drive() {
    for (int turn = 0; turn < 10'000 && !feed_->AllSettled(); ++turn) {
      if (std::string error = Step(); !error.empty()) return error;
      Wait();
    }
    return feed_->AllSettled() ? "" : "no end";
  }
  // Breaks the connection and lets the feed see it.
  void BreakAndNotice() {
    server_.Break();
    // What was answered before is read first.
    for (int i = 0; i < 2 && feed_->Streaming(); ++i) {
      ASSERT_EQ(Step(), "");
    }
    ASSERT_FALSE(feed_->Streaming());
  }
  // Until an answer may be there, or until the next attempt.
  void Wait() {
    const int64_t now_ns = clock_->MonotonicNs();
    clock_->AdvanceNs(feed_->fd() >= 0 ? 1'000 : feed_->NextWakeNs(now_ns) - now_ns);
  }
  std::string WaitAndStep() {
    Wait();
    return Step();
  }

  const FeedCounts& counts() const { return feed_->feed().counts(); }

  SimulatedClock* const clock_;
  ModelServer server_;
  bool listening_ = true;
  std::vector<uint64_t> attempts_;
  std::optional<ResumingFeed> feed_;

 private:
  Result<Connection> Connect(uint64_t attempt) {
    attempts_.push_back(attempt);
    if (!listening_) return Fail(ErrorCode::kUnavailable, "refused");
    return server_.Accept();
  }

  const RetryOptions retry_;
  const FeedOptions options_;
  std::string id_;
  const std::array<float, 2> vector_ = {1, 2};
};

inline std::vector<std::string> Rows(uint64_t count, const std::string& without = "") {
  std::vector<std::string> ids;
  for (uint64_t i = 0; i < count; ++i) {
    std::string id = "row" + std::to_string(i);
    if (id != without) ids.push_back(std::move(id));
  }
  return ids;
}

class ResumingFeedTest : public testing::Test {
 protected:
  void Start() { link_.Start(); }
  SimulatedClock clock_;
  Link link_{&clock_};
};

// Cuts ------------------------------------------------------------------------------------------

}  // namespace engram
