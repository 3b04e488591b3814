#include "tools/clients/cpp/feed.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "src/core/check.h"

namespace engram {

namespace {

// Frames are written ahead of the socket by this much at most: enough to keep it busy, little to
// send in vain after a refusal.
constexpr size_t kAheadBytesMax = size_t{256} << 10;
// A server that names no time to wait is not asked again at once.
constexpr int64_t kRetryAfterMinNs = kNanosPerMilli;
// A longer one would be a mistake; the stall timeout judges whether it goes on.
constexpr int64_t kRetryAfterMaxNs = 10 * kNanosPerSecond;

}  // namespace

uint64_t FeedCounts::RefusedTotal() const {
  uint64_t total = 0;
  for (const auto& [reason, count] : refused) total += count;
  return total;
}

std::string FeedCounts::Describe(uint64_t total) const {
  return std::to_string(acked) + " acked, " + std::to_string(RefusedTotal()) +
         " refused for good, " + std::to_string(sent - settled) + " sent and not settled, " +
         std::to_string(total - sent) + " not sent";
}

Feed::Feed(Connection connection, ObservationSource source, FeedOptions options)
    : source_(std::move(source)),
      options_(options),
      connection_(std::move(connection)),
      base_(options.base.value_or(connection_.hello().last_sequence)),
      credit_(connection_.hello().credit) {
  CHECK(options_.batch >= 1 && options_.batch <= UINT16_MAX, "a frame has 1 to 65,535 records");
  CHECK(base_ <= connection_.hello().last_sequence, "a feed goes on with what the session took");
  offered_ = connection_.hello().last_sequence - base_;
  next_ = timed_ = offered_;
  counts_.sent = counts_.settled = counts_.acked = counts_.resumed_ahead = offered_;
}

void Feed::Offer(uint64_t count, int64_t since_ns) {
  if (AllSettled()) progress_ns_ = INT64_MIN;
  offered_ += count;
  if (since_ns != kSinceSent) latency_batches_.push_back({offered_, since_ns});
}

Result<bool> Feed::Poll(int64_t now_ns) {
  if (progress_ns_ == INT64_MIN) progress_ns_ = now_ns;
  // 1. Acks and naks.
  if (auto received = connection_.Receive(); !received) return std::unexpected(received.error());
  bool worked = false;
  for (;;) {
    const Result<std::optional<Frame>> frame = connection_.NextFrame();
    if (!frame) return std::unexpected(frame.error());
    if (!frame->has_value()) break;
    worked = true;
    if (auto taken = TakeFrame(**frame, now_ns); !taken) return std::unexpected(taken.error());
  }
  if (!AllSettled() && now_ns - progress_ns_ >= options_.stall_timeout_ns) return FailStalled();

  // 2. Frames.
  if (now_ns >= resume_ns_) {
    while (connection_.PendingBytes() < kAheadBytesMax) {
      const Result<bool> written = WriteFrame(now_ns);
      if (!written) return std::unexpected(written.error());
      if (!*written) break;
      worked = true;
    }
  }
  connection_.KeepAlive(now_ns);

  // 3. The socket.
  if (auto flushed = connection_.Flush(); !flushed) return std::unexpected(flushed.error());
  return worked && connection_.PendingBytes() == 0;
}

Result<void> Feed::Resume(Connection connection, int64_t now_ns) {
  const HelloAnswer& hello = connection.hello();
  // 1. Which session, and how far it is.
  if (hello.session != connection_.hello().session) {
    CHECK(SessionIsEmpty(), "a session of which something was settled is not replaced");
    base_ = hello.last_sequence;
  }
  if (hello.last_sequence > base_ + counts_.sent) {
    return Fail(ErrorCode::kCorrupt,
                "the server resumes at sequence " + std::to_string(hello.last_sequence) +
                    ", but the last one sent is " + std::to_string(base_ + counts_.sent));
  }
  if (hello.last_sequence < base_) {
    return Fail(ErrorCode::kNotFound,
                "the server has lost sequences " + std::to_string(hello.last_sequence + 1) +
                    " to " + std::to_string(base_) + " of the session, which are not this feed's");
  }
  credit_ = hello.credit;
  const uint64_t settled = hello.last_sequence - base_;
  connection_ = std::move(connection);
  ++counts_.resumes;

  // 2. What the server has beyond the last ack, or no longer has.
  if (settled >= counts_.settled) {
    counts_.resumed_ahead += settled - counts_.settled;
    Settle(settled, now_ns);
    ForgetRefusalsFrom(settled);
  } else {
    const uint64_t lost = counts_.settled - settled;
    const auto refused =
        std::distance(refused_.lower_bound(settled), refused_.lower_bound(counts_.settled));
    counts_.rolled_back += lost;
    counts_.acked -= lost - static_cast<uint64_t>(refused);
    counts_.settled = settled;
    ForgetRefusalsFrom(settled);
  }

  // 3. From there on again, whatever the last connection had said.
  next_ = settled;
  probe_.reset();
  resume_ns_ = INT64_MIN;
  last_wait_.clear();
  progress_ns_ = now_ns;
  return {};
}

// They are sent again, and refused again.
void Feed::ForgetRefusalsFrom(uint64_t index) {
  const auto first = refused_.lower_bound(index);
  for (auto entry = first; entry != refused_.end(); ++entry) {
    const auto count = counts_.refused.find(entry->second);
    if (--count->second == 0) counts_.refused.erase(count);
  }
  refused_.erase(first, refused_.end());
}

Result<void> Feed::TakeFrame(const Frame& frame, int64_t now_ns) {
  switch (frame.header.type) {
    case FrameType::kAck:
      return TakeAck(frame, now_ns);
    case FrameType::kNak:
      return TakeNak(frame, now_ns);
    default:
      return connection_.CheckUnrelated(frame);
  }
}

Result<void> Feed::TakeAck(const Frame& frame, int64_t now_ns) {
  if (frame.body.size() < sizeof(AckBody)) {
    return Fail(ErrorCode::kCorrupt, "an ack from the server is too short");
  }
  const uint64_t sequence = frame.header.sequence;
  if (sequence > base_ + counts_.sent) {
    return Fail(ErrorCode::kCorrupt, "the server acks sequence " + std::to_string(sequence) +
                                         ", but the last one sent is " +
                                         std::to_string(base_ + counts_.sent));
  }
  const auto ack = LoadAs<AckBody>(frame.body.data());
  credit_ = ack.credit;
  if (sequence > base_ + counts_.settled) Settle(sequence - base_, now_ns);
  return {};
}

void Feed::Settle(uint64_t settled, int64_t now_ns) {
  while (timed_ < settled) {
    CHECK(!latency_batches_.empty(), "what was sent has a time from which its latency counts");
    const Batch& batch = latency_batches_.front();
    const uint64_t end = std::min(settled, batch.end);
    for (; timed_ < end; ++timed_) ack_latency_.Record(now_ns - batch.since_ns);
    if (end == batch.end) latency_batches_.pop_front();
  }
  const auto refused =
      std::distance(refused_.lower_bound(counts_.settled), refused_.lower_bound(settled));
  counts_.acked += settled - counts_.settled - static_cast<uint64_t>(refused);
  counts_.settled = settled;
  last_wait_.clear();
  if (probe_ && settled > *probe_) probe_.reset();
  // The server may have settled what a refusal had made us want to send again.
  next_ = std::max(next_, settled);
  progress_ns_ = now_ns;
}

Result<void> Feed::TakeNak(const Frame& frame, int64_t now_ns) {
  const Result<Refusal> refusal = ParseNak(frame);
  if (!refusal) return std::unexpected(refusal.error());
  if (refusal->closing() || refusal->refused_type != FrameType::kObserve) {
    return connection_.CheckUnrelated(frame);
  }
  const std::string name(DescribeRefusal(refusal->reason).name);

  if (refusal->consumed()) {
    const uint64_t sequence = refusal->sequence;
    if (sequence <= base_ || sequence > base_ + counts_.sent) {
      return Fail(ErrorCode::kCorrupt, "the server refuses sequence " + std::to_string(sequence) +
                                           ", which was not sent");
    }
    const uint64_t index = sequence - base_ - 1;
    // Sent twice after a go-back, it may be refused twice.
    if (!refused_.emplace(index, name).second) return {};
    // Where the ack came first it was taken for a store.
    if (index < counts_.settled) --counts_.acked;
    ++counts_.refused[name];
    progress_ns_ = now_ns;
    return {};
  }

  const uint64_t sent_end = base_ + counts_.sent + 1;
  if (refusal->expected > sent_end) {
    return Fail(ErrorCode::kCorrupt,
                "the server expects sequence " + std::to_string(refusal->expected) +
                    " next, but the last one sent is " + std::to_string(sent_end - 1));
  }
  // What is settled is not sent again, whatever a nak says that crossed an ack.
  const uint64_t expected = std::max(refusal->expected, SequenceOf(counts_.settled));
  next_ = expected - base_ - 1;
  ++counts_.waited_for[name];
  last_wait_ = refusal->Describe();
  // A gap is mended by sending at once; for lack of room the server names a time.
  if (DescribeRefusal(refusal->reason).effect == RefusalEffect::kWaits ||
      refusal->retry_after_ms > 0) {
    const int64_t wait_ns = std::clamp(int64_t{refusal->retry_after_ms} * kNanosPerMilli,
                                       kRetryAfterMinNs, kRetryAfterMaxNs);
    resume_ns_ = std::max(resume_ns_, now_ns + wait_ns);
    probe_ = next_;
  }
  return {};
}

Result<bool> Feed::WriteFrame(int64_t now_ns) {
  if (probe_ && next_ > *probe_) return false;
  const uint64_t last_allowed = credit_ > base_ ? credit_ - base_ : 0;  // as a count
  const uint64_t wanted = std::min<uint64_t>(options_.batch, offered_ - next_);
  const uint64_t allowed = last_allowed > next_ ? std::min(wanted, last_allowed - next_) : 0;
  const bool nothing_under_way = next_ == counts_.settled;
  if (allowed == 0 || (allowed < wanted && !nothing_under_way)) return false;

  const uint32_t body_bytes_max = connection_.hello().max_frame_bytes;
  connection_.BeginFrame(FrameType::kObserve, 0, SequenceOf(next_));
  ObserveBody body;
  connection_.Append(BytesOf(body));
  uint64_t index = next_;
  for (; index < next_ + allowed; ++index) {
    Observation observation;
    source_(index, &observation);
    if (!connection_.hello().attributes) observation.attributes = {};
    const size_t record_bytes =
        RecordBytes(observation.vector.size(), observation.id.size(), observation.payload.size(),
                    observation.attributes.size());
    const size_t start = connection_.BodyBytes();
    if (start + record_bytes > body_bytes_max) {
      if (index > next_) break;
      return Fail(ErrorCode::kInvalidArgument, "observation " + std::to_string(index) + " needs " +
                                                   std::to_string(record_bytes) +
                                                   " bytes; the server takes frames of " +
                                                   std::to_string(body_bytes_max));
    }
    RecordHeader header;
    header.record_bytes = static_cast<uint32_t>(record_bytes);
    header.op = observation.op;
    header.dtype = observation.dtype;
    header.dimension = static_cast<uint16_t>(observation.dimension);
    header.id_bytes = static_cast<uint16_t>(observation.id.size());
    header.attribute_bytes = static_cast<uint16_t>(observation.attributes.size());
    header.payload_bytes = static_cast<uint32_t>(observation.payload.size());
    header.scale = observation.scale;
    header.confidence = observation.confidence;
    header.when_ns = observation.when_ns;
    CHECK(observation.id.size() <= UINT16_MAX && observation.dimension <= UINT16_MAX &&
              observation.attributes.size() <= UINT16_MAX &&
              observation.vector.size() == VectorBytes(header.dtype, observation.dimension),
          "an observation's fields fit in its record");
    connection_.Append(BytesOf(header));
    connection_.Append(observation.vector);
    connection_.Append(BytesOf(observation.id));
    connection_.Append(BytesOf(observation.attributes));
    connection_.Append(BytesOf(observation.payload));
    connection_.AppendZeros(start + record_bytes - connection_.BodyBytes());
    ++body.count;
  }
  connection_.Patch(0, BytesOf(body));
  observe_bytes_ += kFrameHeaderBytes + connection_.BodyBytes();
  connection_.EndFrame();

  counts_.retried += std::min(index, counts_.sent) - next_;
  next_ = index;
  if (next_ > counts_.sent) {
    counts_.sent = next_;
    // Offered without a time of their own: these count from now.
    if (latency_batches_.empty() || next_ > latency_batches_.back().end) {
      latency_batches_.push_back({next_, now_ns});
    }
  }
  return true;
}

int64_t Feed::NextWakeNs(int64_t now_ns) const {
  int64_t wake_ns = now_ns + kNanosPerSecond;
  if (resume_ns_ > now_ns) wake_ns = std::min(wake_ns, resume_ns_);
  return wake_ns;
}

std::unexpected<Error> Feed::FailStalled() const {
  std::string message = "nothing was settled for " +
                        std::to_string(options_.stall_timeout_ns / kNanosPerSecond) + " s";
  if (!last_wait_.empty()) message += "; the server's last refusal was " + last_wait_;
  return Fail(ErrorCode::kUnavailable, std::move(message));
}

}  // namespace engram
