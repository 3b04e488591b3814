#pragma once

#include <cstdint>
#include <string>

#include <grpcpp/support/status.h>

#include "src/core/refusal_reason.h"

namespace engram {

// The status code that a refusal is told with.
grpc::StatusCode StatusCodeOf(RefusalReason reason);

// With google.rpc.RetryInfo.
grpc::Status StatusWithRetry(grpc::StatusCode code, const std::string& message,
                             uint32_t retry_after_ms);

// RESOURCE_EXHAUSTED with google.rpc.RetryInfo.
grpc::Status BusyStatus(const std::string& message, uint32_t retry_after_ms);

// The status of a refused call: with RetryInfo where calling again later helps.
grpc::Status RefusalStatus(RefusalReason reason, const std::string& message,
                           uint32_t retry_after_ms);

}  // namespace engram
