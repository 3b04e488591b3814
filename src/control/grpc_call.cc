#include "src/control/grpc_call.h"

#include <algorithm>

#include "src/control/grpc_status.h"

namespace engram {

namespace {

constexpr uint32_t kRecoveryRetryMs = 1'000;
// A deadline further away than this is none.
constexpr auto kLongestDeadline = std::chrono::hours(24 * 365);

}  // namespace

grpc::Status RecoveringStatus(const CallContext& context) {
  return StatusWithRetry(StatusCodeOf(RefusalReason::kRecovering),
                         "recovering: " + context.recovering(), kRecoveryRetryMs);
}

int64_t DeadlineNs(const grpc::CallbackServerContext& context, int64_t now_ns) {
  const auto now = std::chrono::system_clock::now();
  const auto deadline = context.deadline();
  if (deadline > now + kLongestDeadline) return 0;
  const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - now).count();
  return std::max<int64_t>(now_ns + left, 1);
}

std::expected<std::string_view, CallError> SpaceOfMetadata(
    const grpc::CallbackServerContext& context) {
  std::string_view name;
  const auto [begin, end] = context.client_metadata().equal_range("x-memory-space");
  for (auto entry = begin; entry != end; ++entry) {
    const std::string_view value(entry->second.data(), entry->second.size());
    if (value.empty()) continue;
    if (!name.empty() && value != name) {
      return std::unexpected(
          CallError{"x-memory-space: given twice with different values; "
                    "expected one space"});
    }
    name = value;
  }
  return name;
}

grpc::Status StatusOf(const CallError& error) {
  return {grpc::StatusCode::INVALID_ARGUMENT, error.message};
}

}  // namespace engram
