#include "src/control/grpc_status.h"

#include "engram/v1/error_details.pb.h"

namespace engram {

namespace {

bool HelpsToWait(RefusalReason reason) {
  return HasEffect(reason, RefusalEffect::kWaits) || reason == RefusalReason::kBusy;
}

}  // namespace

grpc::StatusCode StatusCodeOf(RefusalReason reason) {
  switch (reason) {
    case RefusalReason::kNone:
      return grpc::StatusCode::OK;
    case RefusalReason::kDeadlinePassed:
      return grpc::StatusCode::DEADLINE_EXCEEDED;
    case RefusalReason::kCancelled:
      return grpc::StatusCode::CANCELLED;
    case RefusalReason::kUnknownSpace:
      return grpc::StatusCode::NOT_FOUND;
    case RefusalReason::kSpaceLimit:
    case RefusalReason::kSessionLimit:
    case RefusalReason::kConnectionLimit:
    case RefusalReason::kSlowReader:
      return grpc::StatusCode::RESOURCE_EXHAUSTED;
    case RefusalReason::kSessionExpired:
      return grpc::StatusCode::NOT_FOUND;
    case RefusalReason::kFenced:
      return grpc::StatusCode::ABORTED;
    case RefusalReason::kIdleTimeout:
      return grpc::StatusCode::DEADLINE_EXCEEDED;
    case RefusalReason::kShuttingDown:
    case RefusalReason::kRecovering:
      return grpc::StatusCode::UNAVAILABLE;
    case RefusalReason::kSnapshotTooOld:
      return grpc::StatusCode::OUT_OF_RANGE;
    case RefusalReason::kBadRecall:
    case RefusalReason::kBadFilter:
    case RefusalReason::kUnknownFilterKey:
    case RefusalReason::kBadSpaceId:
    case RefusalReason::kSessionSpaceMismatch:
    case RefusalReason::kMetricMismatch:
    case RefusalReason::kDimensionMismatch:
      return grpc::StatusCode::INVALID_ARGUMENT;
    default:
      break;
  }
  if (HelpsToWait(reason)) return grpc::StatusCode::RESOURCE_EXHAUSTED;
  if (HasEffect(reason, RefusalEffect::kConsumes)) return grpc::StatusCode::INVALID_ARGUMENT;
  return grpc::StatusCode::INTERNAL;
}

grpc::Status BusyStatus(const std::string& message, uint32_t retry_after_ms) {
  return StatusWithRetry(grpc::StatusCode::RESOURCE_EXHAUSTED, message, retry_after_ms);
}

grpc::Status StatusWithRetry(grpc::StatusCode code, const std::string& message,
                             uint32_t retry_after_ms) {
  v1::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(retry_after_ms / 1000);
  retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(retry_after_ms % 1000) * 1'000'000);
  v1::RpcStatus details;
  details.set_code(code);
  details.set_message(message + "; call again in " + std::to_string(retry_after_ms) + " ms");
  google::protobuf::Any* any = details.add_details();
  any->set_type_url("type.googleapis.com/google.rpc.RetryInfo");
  any->set_value(retry.SerializeAsString());
  return {code, details.message(), details.SerializeAsString()};
}

grpc::Status RefusalStatus(RefusalReason reason, const std::string& message,
                           uint32_t retry_after_ms) {
  if (HelpsToWait(reason)) return BusyStatus(message, retry_after_ms);
  return {StatusCodeOf(reason), message};
}

}  // namespace engram
