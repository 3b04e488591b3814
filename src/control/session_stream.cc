#include "src/control/session_stream.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "src/core/check.h"

namespace engram {

namespace {

// What of an observation a refusal is about, as its API calls it.
std::string_view FieldOf(RefusalReason reason) {
  switch (reason) {
    case RefusalReason::kWrongDimension:
    case RefusalReason::kNotFinite:
    case RefusalReason::kZeroVector:
    case RefusalReason::kBadDtype:
    case RefusalReason::kBadScale:
      return "episode.embedding: ";
    case RefusalReason::kBadId:
      return "episode.id: ";
    case RefusalReason::kBadConfidence:
      return "episode.encoding_confidence: ";
    case RefusalReason::kPayloadTooLarge:
    case RefusalReason::kBadAttributes:
      return "episode: ";
    default:
      return "";
  }
}

}  // namespace

void SessionStream::Open(const StreamOpening& opening) {
  opening_ = opening;
  HelloBody hello;
  hello.features = kFeatureAttributes | kFeatureWideRecalls | kFeatureSnapshotTime | kFeatureFlow;
  if (!opening.has_session) hello.features |= kFeatureNoSession;
  if (!opening.goes_back) hello.features |= kFeatureNeverGoesBack;
  hello.priority = opening.priority;
  const std::string_view space = opening_.space.view();
  hello.space_bytes = static_cast<uint8_t>(space.size());
  std::array<std::byte, sizeof(hello) + kMaxSpaceNameBytes> body;
  std::memcpy(body.data(), &hello, sizeof(hello));
  std::memcpy(body.data() + sizeof(hello), space.data(), space.size());
  session_ = opening.session;
  const bool written =
      WriteFrame({.type = FrameType::kHello}, std::span(body).first(sizeof(hello) + space.size()));
  CHECK(written, "a new pipe has room for hello");
}

// Where nothing is under way one may be sent without credit: the shard then says why there is none.
uint64_t SessionStream::room() const {
  const uint64_t under_way = next_ - 1 - settled_;
  const uint64_t most = opening_.client_buffer == 0 ? UINT64_MAX : opening_.client_buffer;
  if (under_way >= most) return 0;
  const uint64_t granted = next_ > credit_ ? 0 : credit_ - next_ + 1;
  return std::min(under_way == 0 ? std::max<uint64_t>(granted, 1) : granted, most - under_way);
}

// ---- The numbers of observations ----

// Whether the observation with this number is to be sent.
SessionStream::Turn SessionStream::TurnOf(Sequence sequence) {
  if (sequence == next_) {
    if (room() == 0) return Turn::kNoRoom;
    gap_was_told_ = false;
    return Turn::kNow;
  }
  // Under way: its ack is still to come.
  if (sequence > settled_ && sequence < next_) return Turn::kAnswered;
  if (own_.size() >= kOwnAnswersMax) return Turn::kNoRoom;
  if (sequence > next_ || sequence == 0) {
    AnswerGap(sequence);
  } else {
    own_.push_back(
        {{.kind = StreamEvent::Kind::kAcked, .sequence = sequence, .first = sequence}, {}});
  }
  return Turn::kAnswered;
}

// Who goes back hears of one gap once; what is sent behind it is passed over until next_ comes.
void SessionStream::AnswerGap(Sequence sequence) {
  if (opening_.goes_back && std::exchange(gap_was_told_, true)) return;
  const std::string expected = std::to_string(next_);
  own_.push_back({{.kind = StreamEvent::Kind::kRefused,
                   .reason = RefusalReason::kSequenceGap,
                   .sequence = sequence,
                   .expected = next_},
                  "sequence_number: " + std::to_string(sequence) + "; expected " + expected +
                      ": send that number next"});
}

// Its place among those that are under way.
SessionStream::Asked* SessionStream::BeginAsked(Sequence sequence) {
  const size_t under_way = next_ - told_;
  if (under_way > asked_.size()) {
    std::vector<Asked> larger(std::bit_ceil(std::max<size_t>(under_way, 16)));
    for (Sequence s = told_ + 1; s < next_; ++s) {
      larger[s % larger.size()] = std::move(AskedOf(s));
    }
    asked_ = std::move(larger);
  }
  next_ = sequence + 1;
  Asked& asked = AskedOf(sequence);
  asked.id.clear();
  asked.fault.clear();
  asked.reason = RefusalReason::kNone;
  return &asked;
}

// ---- Frames out ----

SessionStream::Taken SessionStream::Observe(Sequence sequence, const GatewayQuestion& question) {
  const Turn turn = TurnOf(sequence);
  if (turn != Turn::kNow) return turn == Turn::kNoRoom ? Taken::kNoRoom : Taken::kTaken;
  RecordHeader record;
  record.op = question.op;
  record.dtype = question.vector.dtype;
  record.dimension = static_cast<uint16_t>(question.vector.dimension);
  record.id_bytes = static_cast<uint16_t>(question.id.size());
  record.attribute_bytes = static_cast<uint16_t>(question.attributes.size());
  record.payload_bytes = static_cast<uint32_t>(question.payload.size());
  record.scale = question.vector.scale;
  record.confidence = question.confidence;
  record.when_ns = question.when_ns;
  const size_t vector_bytes = VectorBytes(record.dtype, record.dimension);
  record.record_bytes = static_cast<uint32_t>(
      RecordBytes(vector_bytes, record.id_bytes, record.payload_bytes, record.attribute_bytes));
  if (!PrepareFrame(question.payload_kind, record.record_bytes)) return Taken::kNoRoom;
  std::byte* at = AddRecord(record);
  const auto add = [&at](const void* bytes, size_t size) {
    if (size > 0) std::memcpy(at, bytes, size);
    at += size;
  };
  add(question.vector.bytes, vector_bytes);
  add(question.id.data(), question.id.size());
  add(question.attributes.data(), question.attributes.size());
  add(question.payload.data(), question.payload.size());
  Asked* asked = BeginAsked(sequence);
  if (!opening_.cumulative) asked->id = question.id;
  return Taken::kTaken;
}

SessionStream::Taken SessionStream::RefuseObservation(Sequence sequence, std::string why) {
  const Turn turn = TurnOf(sequence);
  if (turn != Turn::kNow) return turn == Turn::kNoRoom ? Taken::kNoRoom : Taken::kTaken;
  RecordHeader record;
  record.record_bytes = sizeof(record);
  record.op = ObservationOp::kSkip;
  if (!PrepareFrame(out_kind_, sizeof(record))) return Taken::kNoRoom;
  AddRecord(record);
  BeginAsked(sequence)->fault = std::move(why);
  return Taken::kTaken;
}

// Room for one more record in the frame that is made; false where that has to go out first and
// cannot.
bool SessionStream::PrepareFrame(PayloadKind kind, size_t record_bytes) {
  const bool fits = out_records_ == 0 || (out_kind_ == kind && out_first_ + out_records_ == next_ &&
                                          out_records_ < kFrameRecordsMax &&
                                          out_.size() + record_bytes <= kFrameTargetBytes);
  if (!fits && Flush() == Taken::kNoRoom) return false;
  if (out_records_ == 0) {
    out_first_ = next_;
    out_kind_ = kind;
    out_.resize(sizeof(ObserveBody));
  }
  return true;
}

// Returns where what follows the header goes.
std::byte* SessionStream::AddRecord(const RecordHeader& record) {
  const size_t at = out_.size();
  out_.resize(at + record.record_bytes);
  std::memcpy(out_.data() + at, &record, sizeof(record));
  ++out_records_;
  return out_.data() + at + sizeof(record);
}

SessionStream::Taken SessionStream::Flush() {
  if (out_records_ == 0) return Taken::kTaken;
  const ObserveBody body{.count = out_records_, .payload_kind = out_kind_};
  std::memcpy(out_.data(), &body, sizeof(body));
  const FrameHeader header{.type = FrameType::kObserve, .sequence = out_first_};
  if (!WriteFrame(header, out_)) return Taken::kNoRoom;
  out_records_ = 0;
  out_.clear();
  return Taken::kTaken;
}

SessionStream::Taken SessionStream::Recall(uint64_t request, const GatewayQuestion& question) {
  if (recalls_ >= max_recalls_ || Flush() == Taken::kNoRoom) return Taken::kNoRoom;
  FrameHeader header{.type = FrameType::kRecall, .sequence = request};
  if (question.with_payload) header.flags |= kFrameFlagWithPayload;
  if (question.with_vector) header.flags |= kFrameFlagWithVector;
  if (question.snapshot_isolation) header.flags |= kFrameFlagSnapshot;
  if (question.across) header.flags |= kFrameFlagAcross;
  if (!question.filter.empty()) header.flags |= kFrameFlagFiltered;
  const RecallBody body{.k = question.k,
                        .ef = question.ef,
                        .dimension = static_cast<uint16_t>(question.vector.dimension),
                        .dtype = question.vector.dtype,
                        .scale = question.vector.scale};
  std::vector<std::byte> bytes;
  const auto add = [&bytes](std::span<const std::byte> part) {
    bytes.insert(bytes.end(), part.begin(), part.end());
  };
  add(BytesOf(body));
  add({question.vector.bytes, VectorBytes(question.vector.dtype, question.vector.dimension)});
  if (question.snapshot_unix_ns != 0) {
    header.flags |= kFrameFlagAtTime;
    add(BytesOf(question.snapshot_unix_ns));
  }
  if (!question.filter.empty()) {
    const auto filter_bytes = static_cast<uint16_t>(question.filter.size());
    add(BytesOf(filter_bytes));
    add(BytesOf(question.filter));
  }
  if (!WriteFrame(header, bytes)) return Taken::kNoRoom;
  ++recalls_;
  return Taken::kTaken;
}

SessionStream::Taken SessionStream::Flow(const FlowRequestBody& action) {
  if (Flush() == Taken::kNoRoom) return Taken::kNoRoom;
  if (!WriteFrame({.type = FrameType::kFlow}, BytesOf(action))) return Taken::kNoRoom;
  ++flows_;
  return Taken::kTaken;
}

SessionStream::Taken SessionStream::Close() {
  if (Flush() == Taken::kNoRoom) return Taken::kNoRoom;
  if (!WriteFrame({.type = FrameType::kClose}, {})) return Taken::kNoRoom;
  has_closed_ = true;
  return Taken::kTaken;
}

void SessionStream::Abandon() {
  if (pipe_ == nullptr) return;
  ReleaseFrame();
  std::exchange(pipe_, nullptr)->Close();
}

// False: there is no room now, and OnReady tells when there is. What is written into a pipe that
// has ended goes nowhere: kEnded tells.
bool SessionStream::WriteFrame(FrameHeader header, std::span<const std::byte> body) {
  header.session = session_.value();
  const std::array<std::span<const std::byte>, 1> parts{body};
  SealFrame(&header, parts);
  const std::array<std::span<const std::byte>, 2> frame{BytesOf(header), body};
  while (!pipe_->Write(frame)) {
    if (pipe_->ended()) return true;
    if (pipe_->AwaitRoom(kFrameHeaderBytes + body.size())) return false;
  }
  return true;
}

// ---- Frames in ----

// The next whole frame, where it lies in one piece without a copy.
bool SessionStream::TakeFrame() {
  for (;;) {
    const std::span<const std::byte> bytes = pipe_->Peek();
    if (bytes.empty()) return false;
    if (gathered_.empty() && bytes.size() >= kFrameHeaderBytes) {
      header_ = LoadAs<FrameHeader>(bytes.data());
      const size_t frame_bytes = kFrameHeaderBytes + header_.length;
      if (bytes.size() >= frame_bytes) {
        frame_ = bytes.first(frame_bytes);
        frame_in_pipe_ = frame_bytes;
        return true;
      }
    }
    size_t wanted = kFrameHeaderBytes;
    if (gathered_.size() >= kFrameHeaderBytes) {
      header_ = LoadAs<FrameHeader>(gathered_.data());
      wanted += header_.length;
    }
    const size_t missing = wanted - gathered_.size();
    const auto piece = bytes.first(std::min(missing, bytes.size()));
    gathered_.insert(gathered_.end(), piece.begin(), piece.end());
    pipe_->Consume(piece.size());
    if (gathered_.size() < kFrameHeaderBytes) continue;
    header_ = LoadAs<FrameHeader>(gathered_.data());
    if (gathered_.size() == kFrameHeaderBytes + header_.length) {
      frame_ = gathered_;
      return true;
    }
  }
}

void SessionStream::ReleaseFrame() {
  if (frame_in_pipe_ > 0) pipe_->Consume(std::exchange(frame_in_pipe_, 0));
  if (!frame_.empty() && frame_.data() == gathered_.data()) gathered_.clear();
  frame_ = {};
}

std::optional<StreamEvent> SessionStream::Next() {
  if (pipe_ == nullptr) return std::nullopt;
  for (;;) {
    if (!own_.empty()) {
      text_ = std::move(own_.front().text);
      StreamEvent event = own_.front().event;
      own_.pop_front();
      event.text = text_;
      return event;
    }
    if (auto event = TellSettled()) return event;
    if (refused_ && told_ + 1 == refused_->event.sequence) {
      text_ = std::move(refused_->text);
      id_ = std::move(refused_->id);
      StreamEvent event = refused_->event;
      event.text = text_;
      event.id = id_;
      refused_.reset();
      return event;
    }
    if (seen_) return std::exchange(seen_, std::nullopt);
    ReleaseFrame();
    if (TakeFrame()) {
      SeeFrame();
      continue;
    }
    if (has_ended_ || !pipe_->ended()) return std::nullopt;
    has_ended_ = true;
    const RefusalReason reason = RefusalReason::kShuttingDown;
    return StreamEvent{
        .kind = StreamEvent::Kind::kEnded, .reason = reason, .text = DescribeRefusal(reason).text};
  }
}

// The next one of what is settled, in the order of the numbers.
std::optional<StreamEvent> SessionStream::TellSettled() {
  if (told_ == settled_) return std::nullopt;
  const Sequence first = told_ + 1;
  Asked& asked = AskedOf(first);
  StreamEvent event{.kind = StreamEvent::Kind::kAcked, .sequence = first, .first = first};
  event.id = asked.id;
  told_ = first;
  if (asked.reason != RefusalReason::kNone) {
    event.kind = StreamEvent::Kind::kRefused;
    event.is_consumed = true;
    event.reason = asked.reason;
    event.retry_after_ms = asked.retry_after_ms;
    event.expected = first + 1;
    event.text = asked.fault;
    return event;
  }
  while (opening_.cumulative && told_ < settled_ &&
         AskedOf(told_ + 1).reason == RefusalReason::kNone) {
    ++told_;
  }
  event.sequence = told_;
  return event;
}

void SessionStream::SeeFrame() {
  switch (header_.type) {
    case FrameType::kHelloAck:
      SeeHelloAck();
      break;
    case FrameType::kAck:
      settled_ = std::max(settled_, header_.sequence);
      credit_ = std::max(credit_, LoadAs<AckBody>(body().data()).credit);
      break;
    case FrameType::kNak:
      SeeNak();
      break;
    case FrameType::kResult:
      SeeResult();
      break;
    case FrameType::kFlow:
      if (flows_ > 0) {
        --flows_;
      } else if (!opening_.hears_flow) {
        break;
      }
      seen_ = StreamEvent{.kind = StreamEvent::Kind::kFlow, .sequence = header_.sequence};
      seen_->flow = LoadAs<FlowBody>(body().data());
      break;
    case FrameType::kClose:
      has_ended_ = true;
      seen_ = StreamEvent{.kind = StreamEvent::Kind::kClosed, .sequence = header_.sequence};
      if (has_closed_) break;
      seen_->kind = StreamEvent::Kind::kEnded;
      seen_->reason = RefusalReason::kShuttingDown;
      seen_->text = DescribeRefusal(seen_->reason).text;
      break;
    default:
      break;
  }
}

void SessionStream::SeeHelloAck() {
  const auto ack = LoadAs<HelloAckBody>(body().data());
  is_open_ = true;
  session_ = SessionId(header_.session);
  max_recalls_ = ack.max_recalls;
  credit_ = ack.credit;
  settled_ = header_.sequence;
  told_ = settled_;
  next_ = settled_ + 1;
  seen_ = StreamEvent{.kind = StreamEvent::Kind::kOpened, .sequence = settled_};
}

void SessionStream::SeeNak() {
  const auto nak = LoadAs<NakBody>(body().data());
  const std::string_view text(reinterpret_cast<const char*>(body().data() + sizeof(nak)),
                              nak.text_bytes);
  if ((nak.flags & kNakFlagClosing) != 0) {
    has_ended_ = true;
    seen_ = StreamEvent{.kind = StreamEvent::Kind::kEnded,
                        .reason = nak.reason,
                        .retry_after_ms = nak.retry_after_ms,
                        .sequence = header_.sequence,
                        .text = text};
  } else if (nak.refused_type == FrameType::kObserve) {
    SeeObservationNak(nak, text);
  } else if (nak.refused_type == FrameType::kRecall) {
    --recalls_;
    seen_ = StreamEvent{.kind = StreamEvent::Kind::kRecallRefused,
                        .reason = nak.reason,
                        .retry_after_ms = nak.retry_after_ms,
                        .request = header_.sequence,
                        .text = text};
  } else if (nak.refused_type == FrameType::kFlow) {
    --flows_;
    seen_ =
        StreamEvent{.kind = StreamEvent::Kind::kFlowRefused, .reason = nak.reason, .text = text};
  }
}

// Told in its turn. Where the number is not used up, what was sent behind it was passed over.
void SessionStream::SeeObservationNak(const NakBody& nak, std::string_view text) {
  const Sequence sequence = header_.sequence;
  if (sequence <= told_ || sequence >= next_) return;
  Asked& asked = AskedOf(sequence);
  if (asked.fault.empty()) asked.fault.append(FieldOf(nak.reason)).append(text);
  if ((nak.flags & kNakFlagConsumed) != 0) {
    asked.reason = nak.reason;
    asked.retry_after_ms = nak.retry_after_ms;
    return;
  }
  next_ = sequence;
  gap_was_told_ = true;
  out_records_ = 0;
  refused_ = {{.kind = StreamEvent::Kind::kRefused,
               .reason = nak.reason,
               .retry_after_ms = nak.retry_after_ms,
               .sequence = sequence,
               .expected = sequence},
              asked.fault,
              asked.id};
}

void SessionStream::SeeResult() {
  const auto result = LoadAs<ResultBody>(body().data());
  seen_ = StreamEvent{.kind = StreamEvent::Kind::kHits,
                      .is_last = (header_.flags & kFrameFlagMore) == 0,
                      .request = header_.sequence,
                      .metric = result.metric,
                      .snapshot = result.snapshot,
                      .hits = body().subspan(sizeof(result))};
  if (seen_->is_last) --recalls_;
}

}  // namespace engram
