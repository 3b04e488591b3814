#pragma once

#include <cstddef>
#include <cstdint>
#include <expected>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "engram/v1/service.pb.h"
#include "src/control/call_faults.h"
#include "src/control/gateway_call.h"
#include "src/core/counters.h"

// Engram's calls and streams: Ask... checks a request and makes the question of it that the gateway
// core or a stream's session takes, Tell... makes the response of the answer. No transport here.

namespace engram {

// What a question's views point into, where that is not the request.
struct CallText {
  std::string id;
  std::string attributes;
  std::string payload;
  std::string filter;
};

// What is done to a recall's hits after the index found them.
struct RecallLimits {
  bool is_compared = true;  // else what a filter matches is as similar as can be
  float least_similarity = 0;
  bool has_least_similarity = false;
  float least_confidence = 0;
  bool with_metadata = false;
  // What was stored after this moment, in nanoseconds since 1970, is marked as recent.
  int64_t recent_from_unix_ns = INT64_MAX;
};

// What was told of a recall so far.
struct RecallTold {
  int found = 0;  // by the index
  int told = 0;   // of these, what passed the limits
  double activation_sum = 0;
};

// What the confidence of a memory that came during a recall is multiplied with.
inline constexpr float kRecentConfidence = 0.9F;

// The space of a call: what the request says, else what the metadata x-memory-space says (empty: it
// is not there), else `default`.
std::expected<SpaceName, CallError> SpaceOfCall(std::string_view request,
                                                std::string_view metadata);

// Each fills in all of `question` but space and deadline. The request, `text` and `question` live
// as long as the call. `now_unix_ns` is when the request was received, `filter_keys` are those of
// the space.
Asked AskRemember(const v1::RememberRequest& request, int64_t now_unix_ns,
                  std::span<const std::string> filter_keys, CallText* text,
                  GatewayQuestion* question);
// Of a stream. `text` may be used again and again.
Asked AskEpisode(const v1::Episode& episode, int64_t now_unix_ns, CallText* text,
                 GatewayQuestion* question);
Asked AskStreamingRecall(const v1::StreamingRecallRequest& request, int64_t now_unix_ns,
                         std::span<const std::string> filter_keys, CallText* text,
                         RecallLimits* limits, GatewayQuestion* question);
Asked AskRecall(const v1::RecallRequest& request, std::span<const std::string> filter_keys,
                CallText* text, RecallLimits* limits, GatewayQuestion* question);
Asked AskForget(const v1::ForgetRequest& request, GatewayQuestion* question);
Asked AskIntrospect(const v1::IntrospectRequest& request, GatewayQuestion* question);

// Each takes an answer without a refusal.
void TellRemember(const GatewayQuestion& question, const GatewayAnswer& answer,
                  v1::RememberResponse* response);
void TellRecall(const GatewayQuestion& question, const GatewayAnswer& answer,
                const RecallLimits& limits, int64_t took_ns, v1::RecallResponse* response);
// Adds what of `hits` (as HitReader reads them) passes the limits.
void TellHits(Metric metric, std::span<const std::byte> hits, const RecallLimits& limits,
              RecallTold* told, google::protobuf::RepeatedPtrField<v1::Memory>* memories);
void TellMetadata(const RecallTold& told, int64_t took_ns, v1::RecallMetadata* metadata);
void TellForget(const GatewayQuestion& question, const GatewayAnswer& answer,
                v1::ForgetResponse* response);
void TellIntrospect(const v1::IntrospectRequest& request, const GatewayQuestion& question,
                    const GatewayAnswer& answer, const CounterCatalogue& counters,
                    v1::IntrospectResponse* response);

// What a refusal means for this question, for a person. `vector_field` is the name of the field
// that the question's vector came from.
std::string RefusalMessage(const GatewayQuestion& question, const GatewayAnswer& answer,
                           std::string_view vector_field);

}  // namespace engram
