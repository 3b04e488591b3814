#include "tests/sim/sim_client.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace engram {

namespace {

void AppendBytes(std::vector<std::byte>* to, std::span<const std::byte> bytes) {
  to->insert(to->end(), bytes.begin(), bytes.end());
}

}  // namespace

SimClient::SimClient(SimulatedNetwork* network, const SimClientOptions& options)
    : network_(network),
      options_(options),
      random_(options.seed),
      handle_(network->ClientConnect()) {
  for (uint32_t i = 0; i < options.observations; ++i) {
    Observation observation;
    observation.id = options.id_prefix + std::to_string(i);
    for (uint16_t d = 0; d < options.dimension; ++d) {
      observation.vector.push_back(static_cast<float>(random_.Below(2001)) / 1000 - 1);
    }
    if (random_.Below(100) < options.invalid_percent) {
      if (random_.Below(2) == 0) {
        observation.vector[0] = std::numeric_limits<float>::quiet_NaN();
        observation.fault = RefusalReason::kNotFinite;
      } else {
        observation.vector.push_back(1);
        observation.fault = RefusalReason::kWrongDimension;
      }
    }
    observations_.push_back(observation);
  }
  // The first one fixes the space's dimension.
  if (!observations_.empty() && observations_[0].fault != RefusalReason::kNone) {
    observations_[0].vector.assign(options.dimension, 1.0f);
    observations_[0].fault = RefusalReason::kNone;
  }
  SendHello();
}

void SimClient::Violation(const std::string& what) {
  violations_.push_back("client " + std::to_string(handle_) + ": " + what);
}

bool SimClient::done() const {
  return greeted_ && settled_ == observations_.size() && recalls_.empty();
}

void SimClient::Step() {
  AppendBytes(&incoming_, network_->ClientReceive(handle_));
  while (TakeFrame()) {
  }
  SendObservations();
  FlushOutgoing();
}

void SimClient::FlushOutgoing() {
  const size_t taken = network_->ClientSend(handle_, outgoing_);
  outgoing_.erase(outgoing_.begin(), outgoing_.begin() + static_cast<ptrdiff_t>(taken));
}

void SimClient::SendFrame(FrameHeader header, const std::vector<std::byte>& body) {
  header.session = session_;
  const std::span<const std::byte> parts[] = {body};
  SealFrame(&header, parts);
  AppendBytes(&outgoing_, BytesOf(header));
  AppendBytes(&outgoing_, body);
}

void SimClient::SendHello() {
  std::vector<std::byte> body;
  HelloBody hello;
  hello.metric = options_.metric;
  hello.priority = options_.priority;
  hello.space_bytes = static_cast<uint8_t>(options_.space.size());
  AppendBytes(&body, BytesOf(hello));
  AppendBytes(&body, BytesOf(std::string_view(options_.space)));
  SendFrame({.type = FrameType::kHello}, body);
}

// Frames of 1 to 8 observations, as far as credit goes. The first observation goes alone, so that
// the space's dimension is known before others come.
void SimClient::SendObservations() {
  while (greeted_ && outgoing_.empty() && next_ <= observations_.size()) {
    uint64_t allowed = options_.honours_credit ? credit_ : observations_.size();
    if (settled_ == 0) allowed = std::min<uint64_t>(allowed, 1);
    if (next_ > allowed) return;
    const uint64_t count =
        std::min({1 + random_.Below(8), allowed + 1 - next_, observations_.size() + 1 - next_});
    std::vector<std::byte> body;
    AppendBytes(&body, BytesOf(ObserveBody{.count = static_cast<uint16_t>(count)}));
    for (uint64_t i = 0; i < count; ++i) {
      const Observation& observation = observations_[next_ - 1 + i];
      RecordHeader record;
      record.dtype = VectorDtype::kF32;
      record.dimension = static_cast<uint16_t>(observation.vector.size());
      record.id_bytes = static_cast<uint16_t>(observation.id.size());
      record.record_bytes = static_cast<uint32_t>(
          RecordBytes(observation.vector.size() * 4, observation.id.size(), 0));
      const size_t begin = body.size();
      AppendBytes(&body, BytesOf(record));
      AppendBytes(&body, std::as_bytes(std::span(observation.vector)));
      AppendBytes(&body, BytesOf(std::string_view(observation.id)));
      body.resize(begin + record.record_bytes);
    }
    SendFrame({.type = FrameType::kObserve, .sequence = next_}, body);
    next_ += count;
    FlushOutgoing();
  }
}

void SimClient::SendRecall(uint64_t sequence) {
  const Observation& observation = observations_[sequence - 1];
  RecallBody recall;
  recall.k = 3;
  recall.dimension = options_.dimension;
  recall.dtype = VectorDtype::kF32;
  std::vector<std::byte> body;
  AppendBytes(&body, BytesOf(recall));
  AppendBytes(&body, std::as_bytes(std::span(observation.vector)));
  recalls_[next_recall_] = sequence;
  SendFrame({.type = FrameType::kRecall, .sequence = next_recall_}, body);
  ++next_recall_;
}

bool SimClient::TakeFrame() {
  if (incoming_.size() < kFrameHeaderBytes) return false;
  FrameHeader header;
  if (CheckFrameHeader(incoming_.data(), &header) != RefusalReason::kNone) {
    Violation("a frame with a bad header");
    incoming_.clear();
    return false;
  }
  const size_t frame_bytes = kFrameHeaderBytes + header.length;
  if (incoming_.size() < frame_bytes) return false;
  const std::vector<std::byte> frame(incoming_.begin(),
                                     incoming_.begin() + static_cast<ptrdiff_t>(frame_bytes));
  incoming_.erase(incoming_.begin(), incoming_.begin() + static_cast<ptrdiff_t>(frame_bytes));
  if (CheckFrameCrc(header, frame) != RefusalReason::kNone) Violation("a frame with a bad CRC");
  digest_ = MixBits(digest_ ^ header.crc);
  const std::span<const std::byte> body = std::span(frame).subspan(kFrameHeaderBytes);
  switch (header.type) {
    case FrameType::kHelloAck:
      greeted_ = true;
      session_ = header.session;
      credit_ = LoadAs<HelloAckBody>(body.data()).credit;
      return true;
    case FrameType::kAck:
      TakeAck(header, body);
      return true;
    case FrameType::kNak:
      TakeNak(header, body);
      return true;
    case FrameType::kResult:
      TakeResult(header, body);
      return true;
    default:
      Violation("a frame of type " + std::to_string(static_cast<int>(header.type)));
      return true;
  }
}

void SimClient::TakeAck(const FrameHeader& header, std::span<const std::byte> body) {
  if (header.sequence < settled_) Violation("an ack that falls");
  if (header.sequence >= next_) Violation("an ack of what was not sent");
  const uint64_t credit = LoadAs<AckBody>(body.data()).credit;
  if (credit < credit_) Violation("credit that falls");
  credit_ = credit;
  while (settled_ < header.sequence) Settle(settled_ + 1);
}

// An acked observation is stored, unless its refusal came before the ack.
void SimClient::Settle(uint64_t sequence) {
  settled_ = sequence;
  const Observation& observation = observations_[sequence - 1];
  if (consumed_.erase(sequence) > 0) return;
  if (observation.fault != RefusalReason::kNone) Violation("acked what is invalid");
  stored_[observation.id] = observation.vector;
  if (random_.Below(100) < options_.recall_percent) SendRecall(sequence);
}

void SimClient::TakeNak(const FrameHeader& header, std::span<const std::byte> body) {
  const auto nak = LoadAs<NakBody>(body.data());
  ++refusals_[nak.reason];
  if (nak.refused_type == FrameType::kRecall) {
    const auto known = recalls_.find(header.sequence);
    if (known == recalls_.end() || nak.retry_after_ms == 0) {
      Violation("a recall was refused for good");
      return;
    }
    const uint64_t sequence = known->second;
    recalls_.erase(known);
    SendRecall(sequence);
    return;
  }
  if ((nak.flags & kNakFlagConsumed) != 0) {
    if (header.sequence == 0 || header.sequence > observations_.size() ||
        observations_[header.sequence - 1].fault != nak.reason) {
      Violation("refused for another reason than its fault");
    }
    consumed_.insert(header.sequence);
    return;
  }
  if ((nak.flags & kNakFlagClosing) != 0) {
    Violation("closed: " + std::string(DescribeRefusal(nak.reason).name));
    return;
  }
  // Lack of room, or a gap behind one: go back to what is expected.
  if (nak.expected <= settled_) Violation("sent back behind what was acked");
  if (nak.reason != RefusalReason::kSequenceGap && nak.retry_after_ms == 0) {
    Violation("a refusal for lack of room without retry_after");
  }
  next_ = nak.expected;
  ++rollbacks_;
}

void SimClient::TakeResult(const FrameHeader& header, std::span<const std::byte> body) {
  const auto known = recalls_.find(header.sequence);
  if (known == recalls_.end()) {
    Violation("a result that nobody asked for");
    return;
  }
  const auto result = LoadAs<ResultBody>(body.data());
  const std::byte* next = body.data() + sizeof(ResultBody);
  float last_score = std::numeric_limits<float>::infinity();
  for (uint16_t i = 0; i < result.count; ++i) {
    const auto hit = LoadAs<HitHeader>(next);
    const std::byte* id_at = next + sizeof(HitHeader) + hit.vector_dimension * sizeof(float);
    const std::string id(reinterpret_cast<const char*>(id_at), hit.id_bytes);
    const float order = options_.metric == Metric::kL2 ? -hit.score : hit.score;
    if (order > last_score) Violation("hits out of order");
    last_score = order;
    if (hits_seen_[header.sequence] == 0 && options_.metric != Metric::kInnerProduct &&
        id != observations_[known->second - 1].id) {
      Violation("an acked observation is not the first hit of its own vector");
    }
    ++hits_seen_[header.sequence];
    next += hit.hit_bytes;
  }
  if ((header.flags & kFrameFlagMore) != 0) return;
  if (hits_seen_[header.sequence] == 0) Violation("no hit after an ack");
  recalls_.erase(known);
  ++recalls_answered_;
}

}  // namespace engram
