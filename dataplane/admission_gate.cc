#include "dataplane/admission_gate.h"

#include <cstring>
#include <limits>
#include <new>

namespace engram {

namespace {

// The largest that keeps 128 * scale finite. Written so that NaN fails.
bool IsSoundScale(float scale) {
  return scale > 0 && scale <= std::numeric_limits<float>::max() / 128;
}

RefusalReason CheckNumbers(const ObservationView& view, const SpaceRules& rules) {
  if (view.fault != RefusalReason::kNone) return view.fault;
  // Written so that NaN fails.
  if (!(view.confidence >= 0 && view.confidence <= 1)) return RefusalReason::kBadConfidence;
  if (view.op != ObservationOp::kUpsert) return RefusalReason::kNone;
  if (rules.dimension != 0 && view.dimension != rules.dimension) {
    return RefusalReason::kWrongDimension;
  }
  if (view.dtype == VectorDtype::kInt8 && !IsSoundScale(view.scale)) {
    return RefusalReason::kBadScale;
  }
  return RefusalReason::kNone;
}

RefusalReason JudgeVector(VectorFinding finding, Metric metric) {
  if (finding == VectorFinding::kNotFinite) return RefusalReason::kNotFinite;
  if (finding == VectorFinding::kZero && metric == Metric::kCosine) {
    return RefusalReason::kZeroVector;
  }
  return RefusalReason::kNone;
}

}  // namespace

size_t SlotBytesFor(const ObservationView& view) {
  if (view.fault != RefusalReason::kNone) return kRequestBodyOffset;
  return kRequestBodyOffset + VectorBytes(view.dtype, view.dimension) + view.id.size() +
         view.attributes.size() + view.payload.size();
}

size_t SlotBytesFor(const RecallView& recall) {
  return kRequestBodyOffset + VectorBytes(recall.body.dtype, recall.body.dimension) +
         recall.filter.size();
}

RefusalReason AdmitObservation(const ObservationView& view, const SpaceRules& rules,
                               std::byte* slot) {
  auto* request = new (slot) ObserveRequest;
  request->dimension = view.dimension;
  RefusalReason reason = CheckNumbers(view, rules);
  if (reason == RefusalReason::kNone) {
    std::byte* body = slot + kRequestBodyOffset;
    if (view.op == ObservationOp::kUpsert) {
      reason = JudgeVector(CopyVector(view.dtype, view.dimension, view.vector, body), rules.metric);
      body += VectorBytes(view.dtype, view.dimension);
    }
    std::memcpy(body, view.id.data(), view.id.size());
    body += view.id.size();
    if (!view.attributes.empty()) {
      if (reason == RefusalReason::kNone) reason = CheckAttributes(view.attributes);
      std::memcpy(body, view.attributes.data(), view.attributes.size());
      body += view.attributes.size();
    }
    if (!view.payload.empty()) {
      std::memcpy(body, view.payload.data(), view.payload.size());
    }
  }
  if (reason != RefusalReason::kNone) {
    request->op = ObservationOp::kSkip;
    request->skip_reason = reason;
    return reason;
  }
  request->op = view.op;
  request->dtype = view.dtype;
  request->id_bytes = static_cast<uint16_t>(view.id.size());
  request->attribute_bytes = static_cast<uint16_t>(view.attributes.size());
  request->payload_bytes = static_cast<uint32_t>(view.payload.size());
  request->payload_kind = view.payload_kind;
  request->when_ns = view.when_ns;
  request->confidence = view.confidence;
  request->scale = view.scale;
  return RefusalReason::kNone;
}

RefusalReason AdmitRecall(const RecallView& view, const SpaceRules& rules, std::byte* slot) {
  const RecallBody& body = view.body;
  if (rules.dimension != 0 && body.dimension != 0 && body.dimension != rules.dimension) {
    return RefusalReason::kWrongDimension;
  }
  if (body.dtype == VectorDtype::kInt8 && !IsSoundScale(body.scale)) {
    return RefusalReason::kBadScale;
  }
  auto* request = new (slot) RecallRequest;
  std::byte* to = slot + kRequestBodyOffset;
  const VectorFinding finding = body.dimension == 0
                                    ? VectorFinding::kOrdinary
                                    : CopyVector(body.dtype, body.dimension, view.vector, to);
  if (!view.filter.empty()) {
    std::memcpy(to + VectorBytes(body.dtype, body.dimension), view.filter.data(),
                view.filter.size());
  }
  request->dtype = body.dtype;
  request->dimension = body.dimension;
  request->filter_bytes = static_cast<uint16_t>(view.filter.size());
  request->k = body.k;
  request->ef = body.ef;
  request->scale = body.scale;
  request->has_bound = view.has_bound;
  request->bound = view.bound;
  request->metric = rules.metric;
  return JudgeVector(finding, rules.metric);
}

}  // namespace engram
