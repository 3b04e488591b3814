#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include <google/protobuf/repeated_field.h>

#include "engram/v1/service.pb.h"
#include "src/control/session_stream.h"
#include "src/core/commit_stamp.h"
#include "src/core/ids.h"
#include "src/core/refusal_reason.h"

// What clients are told as JSON, on a stream over WebSocket or as the answer to a call over HTTP.
// Each function appends one object to `text`; `session` is the session's id as text.

namespace engram {

// The version of the streams' own rules, beyond Engram's.
inline constexpr uint32_t kStreamProtocolVersion = 1;

// What is not about an observation.
struct JsonError {
  std::string_view code;
  std::string_view message;
  std::string_view session = {};
  std::string_view request_id = {};  // as JSON
  uint32_t retry_after_ms = 0;
};
void TellJsonError(const JsonError& error, std::string* text);

// `room`: observations that may be under way.
void TellJsonOpened(std::string_view session, const StreamEvent& event, uint64_t room,
                    std::string* text);
// Of kAcked and kRefused.
void TellJsonAck(std::string_view session, const StreamEvent& event, int64_t now_unix_ns,
                 std::string* text);
// Why the ack said that an observation was rejected.
void TellJsonRefusal(std::string_view session, const StreamEvent& event, std::string* text);
void TellJsonFlow(std::string_view session, const StreamEvent& event, std::string* text);
void TellJsonClosed(std::string_view session, Sequence last, std::string* text);
void TellJsonHeartbeat(std::string_view session, int64_t now_unix_ns, std::string* text);

// What a recall found.
struct JsonResults {
  bool is_message = true;            // with `type`
  std::string_view request_id = {};  // as JSON; empty: it is left out
  bool more_results = false;
  CommitStamp snapshot = kNoStamp;
  const v1::RecallMetadata* metadata = nullptr;
};
void TellJsonResults(const JsonResults& results,
                     const google::protobuf::RepeatedPtrField<v1::Memory>& memories,
                     std::string* text);

}  // namespace engram
