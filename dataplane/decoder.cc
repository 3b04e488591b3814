#include "dataplane/decoder.h"

#include <cmath>

#include "src/core/attributes.h"

namespace engram {

namespace {

constexpr std::string_view kDefaultSpace = "default";

bool IsVectorDtype(VectorDtype dtype) { return ElementBytes(dtype) != 0; }

// What is wrong with the record's numbers. The order is that of FORMAT.md's fields, so that a
// client is told of the first one.
RefusalReason FaultOf(const RecordHeader& record) {
  // Whoever sent it found it wrong.
  if (record.op == ObservationOp::kSkip) return RefusalReason::kBadField;
  const bool has_vector = record.op == ObservationOp::kUpsert;
  if (!has_vector && record.op != ObservationOp::kDelete) return RefusalReason::kBadOperation;
  if (has_vector) {
    if (!IsVectorDtype(record.dtype)) return RefusalReason::kBadDtype;
    if (record.dimension == 0 || record.dimension > kMaxDimension) {
      return RefusalReason::kWrongDimension;
    }
  } else {
    if (record.dtype != VectorDtype::kNone) return RefusalReason::kBadDtype;
    if (record.dimension != 0) return RefusalReason::kWrongDimension;
  }
  if (record.id_bytes == 0 || record.id_bytes > kMaxIdBytes) return RefusalReason::kBadId;
  if (record.attribute_bytes > (has_vector ? kMaxAttributesBytes : 0)) {
    return RefusalReason::kBadAttributes;
  }
  if (record.payload_bytes > (has_vector ? kMaxPayloadBytes : 0)) {
    return RefusalReason::kPayloadTooLarge;
  }
  return RefusalReason::kNone;
}

}  // namespace

RefusalReason ObserveReader::Open(std::span<const std::byte> body, ObserveReader* reader) {
  if (body.size() < sizeof(ObserveBody)) return RefusalReason::kBadFrame;
  const auto head = LoadAs<ObserveBody>(body.data());
  const uint16_t count = head.count;
  std::span<const std::byte> rest = body.subspan(sizeof(ObserveBody));
  reader->next_ = rest.data();
  reader->remaining_ = count;
  reader->payload_kind_ = head.payload_kind;
  if (count == 0 || head.payload_kind > PayloadKind::kMemory) return RefusalReason::kBadFrame;
  for (uint16_t i = 0; i < count; ++i) {
    if (rest.size() < sizeof(RecordHeader)) return RefusalReason::kBadFrame;
    const auto record = LoadAs<RecordHeader>(rest.data());
    if (record.record_bytes < sizeof(RecordHeader) || record.record_bytes > rest.size()) {
      return RefusalReason::kBadFrame;
    }
    // With sound numbers the record's length follows from them. With others it is only skipped.
    if (FaultOf(record) == RefusalReason::kNone &&
        record.record_bytes != RecordBytes(VectorBytes(record.dtype, record.dimension),
                                           record.id_bytes, record.payload_bytes,
                                           record.attribute_bytes)) {
      return RefusalReason::kBadFrame;
    }
    rest = rest.subspan(record.record_bytes);
  }
  return rest.empty() ? RefusalReason::kNone : RefusalReason::kBadFrame;
}

ObservationView ObserveReader::Next() {
  const auto record = LoadAs<RecordHeader>(next_);
  ObservationView view;
  view.op = record.op;
  view.dtype = record.dtype;
  view.dimension = record.dimension;
  view.scale = record.scale;
  view.confidence = record.confidence;
  view.when_ns = record.when_ns;
  view.payload_kind = payload_kind_;
  view.fault = FaultOf(record);
  if (view.fault == RefusalReason::kNone) {
    view.vector = next_ + sizeof(RecordHeader);
    const std::byte* id = view.vector + VectorBytes(record.dtype, record.dimension);
    view.id = {reinterpret_cast<const char*>(id), record.id_bytes};
    view.attributes = {id + record.id_bytes, record.attribute_bytes};
    view.payload = {id + record.id_bytes + record.attribute_bytes, record.payload_bytes};
  }
  next_ += record.record_bytes;
  --remaining_;
  return view;
}

RefusalReason DecodeHello(std::span<const std::byte> body, HelloView* hello) {
  if (body.size() < sizeof(HelloBody)) return RefusalReason::kBadFrame;
  hello->body = LoadAs<HelloBody>(body.data());
  const std::span<const std::byte> name = body.subspan(sizeof(HelloBody));
  if (name.size() != hello->body.space_bytes) return RefusalReason::kBadFrame;
  if (hello->body.metric > Metric::kL2 || hello->body.priority > Priority::kHigh) {
    return RefusalReason::kBadFrame;
  }
  if (hello->body.dimension > kMaxDimension) return RefusalReason::kDimensionMismatch;
  hello->space = name.empty()
                     ? kDefaultSpace
                     : std::string_view(reinterpret_cast<const char*>(name.data()), name.size());
  return IsValidSpaceName(hello->space) ? RefusalReason::kNone : RefusalReason::kBadSpaceId;
}

RefusalReason DecodeRecall(std::span<const std::byte> body, uint16_t flags, RecallView* recall) {
  if (body.size() < sizeof(RecallBody)) return RefusalReason::kBadFrame;
  recall->body = LoadAs<RecallBody>(body.data());
  const RecallBody& numbers = recall->body;
  // Without a vector it is the latest that the filter matches.
  const bool is_newest = numbers.dimension == 0 && numbers.dtype == VectorDtype::kNone &&
                         (flags & kFrameFlagFiltered) != 0;
  if (!is_newest && !IsVectorDtype(numbers.dtype)) return RefusalReason::kBadDtype;
  if ((numbers.dimension == 0 && !is_newest) || numbers.dimension > kMaxDimension) {
    return RefusalReason::kWrongDimension;
  }
  const size_t vector_end = sizeof(RecallBody) + VectorBytes(numbers.dtype, numbers.dimension);
  if (body.size() < vector_end) return RefusalReason::kBadFrame;
  std::span<const std::byte> rest = body.subspan(vector_end);
  recall->filter = {};
  recall->has_bound = (flags & kFrameFlagBounded) != 0;
  if (recall->has_bound) {
    if (rest.size() < sizeof(float)) return RefusalReason::kBadFrame;
    recall->bound = LoadAs<float>(rest.data());
    rest = rest.subspan(sizeof(float));
  }
  recall->at_unix_ns = 0;
  const bool at_time = (flags & kFrameFlagAtTime) != 0;
  if (at_time) {
    if (rest.size() < sizeof(int64_t)) return RefusalReason::kBadFrame;
    recall->at_unix_ns = LoadAs<int64_t>(rest.data());
    rest = rest.subspan(sizeof(int64_t));
  }
  if ((flags & kFrameFlagFiltered) != 0) {
    if (rest.size() < sizeof(uint16_t)) return RefusalReason::kBadFrame;
    const auto filter_bytes = LoadAs<uint16_t>(rest.data());
    rest = rest.subspan(sizeof(uint16_t));
    if (rest.size() < filter_bytes) return RefusalReason::kBadFrame;
    recall->filter = rest.first(filter_bytes);
    rest = rest.subspan(filter_bytes);
  }
  if (!rest.empty()) return RefusalReason::kBadFrame;
  if (numbers.k == 0 || numbers.k > kMaxRecallResults || numbers.ef > kMaxEf ||
      (recall->has_bound && std::isnan(recall->bound))) {
    return RefusalReason::kBadRecall;
  }
  if (at_time && (recall->at_unix_ns <= 0 || (flags & kFrameFlagSnapshot) == 0)) {
    return RefusalReason::kBadRecall;
  }
  if (is_newest &&
      (recall->filter.empty() || recall->has_bound || (flags & kFrameFlagAcross) != 0)) {
    return RefusalReason::kBadRecall;
  }
  recall->vector = body.data() + sizeof(RecallBody);
  return CheckFilter(recall->filter);
}

RefusalReason DecodeFlow(std::span<const std::byte> body, FlowRequestBody* flow) {
  if (body.size() != sizeof(FlowRequestBody)) return RefusalReason::kBadFrame;
  *flow = LoadAs<FlowRequestBody>(body.data());
  const bool known =
      flow->action >= FlowAction::kPause && flow->action <= FlowAction::kBufferStatus;
  const bool is_rate = std::isfinite(flow->preferred_rate) && flow->preferred_rate >= 0;
  return known && is_rate ? RefusalReason::kNone : RefusalReason::kBadFlow;
}

RefusalReason DecodeScroll(std::span<const std::byte> body, ScrollBody* scroll) {
  if (body.size() != sizeof(ScrollBody)) return RefusalReason::kBadFrame;
  *scroll = LoadAs<ScrollBody>(body.data());
  const bool in_bounds = scroll->limit > 0 && scroll->limit <= kMaxScrollHits;
  return in_bounds ? RefusalReason::kNone : RefusalReason::kBadRecall;
}

RefusalReason DecodeCheck(std::span<const std::byte> body, CheckBody* check) {
  if (body.size() != sizeof(CheckBody)) return RefusalReason::kBadFrame;
  *check = LoadAs<CheckBody>(body.data());
  return RefusalReason::kNone;
}

RefusalReason DecodeIntrospect(std::span<const std::byte> body, IntrospectWhat* what) {
  if (body.size() != sizeof(IntrospectBody)) return RefusalReason::kBadFrame;
  *what = LoadAs<IntrospectBody>(body.data()).what;
  const bool known = *what >= IntrospectWhat::kSpaces && *what <= IntrospectWhat::kRelease;
  return known ? RefusalReason::kNone : RefusalReason::kBadFrame;
}

RefusalReason DecodeCommand(std::span<const std::byte> body, CommandView* command) {
  if (body.size() < sizeof(CommandBody)) return RefusalReason::kBadFrame;
  const auto head = LoadAs<CommandBody>(body.data());
  const std::span<const std::byte> name = body.subspan(sizeof(CommandBody));
  if (name.size() != head.space_bytes) return RefusalReason::kBadFrame;
  if (head.what < SpaceCommand::kCompact || head.what > SpaceCommand::kRebuild) {
    return RefusalReason::kBadFrame;
  }
  command->what = head.what;
  command->space = {reinterpret_cast<const char*>(name.data()), name.size()};
  return IsValidSpaceName(command->space) ? RefusalReason::kNone : RefusalReason::kBadSpaceId;
}

}  // namespace engram
