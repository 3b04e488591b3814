#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "dataplane/frame_format.h"
#include "engram/v1/service.pb.h"
#include "src/control/memory_calls.h"
#include "src/core/ids.h"
#include "src/core/observation.h"

// What a client's JSON asks, on a stream over WebSocket or in the body of a call over HTTP. No
// transport here.

namespace engram {

inline constexpr size_t kMaxJsonBytes = size_t{4} << 20;  // of one text
inline constexpr int kMaxJsonNesting = 32;
inline constexpr size_t kMaxRequestIdBytes = 256;

enum class JsonType : uint8_t {
  kUnknown,  // no `type`, or none that there is: type_text
  kInit,
  kObservation,
  kFlowControl,
  kRecall,
  kClose,
};

// What stood in one text. Used again and again, as its strings and lists keep their memory.
struct JsonRequest {
  JsonType type = JsonType::kUnknown;
  std::string type_text;  // its beginning, where it is long
  // What is wrong with the first field that is; the others were read all the same.
  std::string fault;
  std::string space;    // memory_space_id
  std::string session;  // session_id; of init resume_session_id
  std::optional<Sequence> sequence;
  v1::Episode episode;
  v1::StreamInit init;
  std::optional<FlowAction> action;
  FlowActionBody flow;     // but for its action
  std::string request_id;  // as JSON; empty: there is none
  // Of a recall. Its cue is what `vector` and the filter make of it (AskJsonRecall).
  v1::StreamingRecallRequest recall;
  float similarity_threshold = 0;
  bool has_vector = false;
  // Of a space, in a call over HTTP.
  std::string id;
  Metric metric = Metric::kUnspecified;
  uint16_t dimension = 0;

  void Clear();
};

// Reads texts. One reader does for all that a thread reads: nothing of a text stays in it.
class JsonReader {
 public:
  // What may be read behind a text, whatever it is.
  static constexpr size_t kPaddingBytes = 64;

  // What the object is that a text consists of.
  enum class Form : uint8_t {
    kMessage,  // of a stream, or a recall or space of a call: its episode is in `episode`
    kEpisode,  // an episode, with memory_space_id beside its fields
  };

  JsonReader();
  ~JsonReader();
  JsonReader(const JsonReader&) = delete;
  JsonReader& operator=(const JsonReader&) = delete;

  // Why the text is no JSON, with the place where that is known; nothing where it is, and then
  // request->fault says what of it is wrong. Fields that are not known are passed over, and those
  // that are null; of a field that is there twice the last one counts. `text` is followed by
  // kPaddingBytes that may be read.
  std::optional<std::string> Read(std::string_view text, Form form, JsonRequest* request);

 private:
  class Parser;
  const std::unique_ptr<Parser> parser_;
};

// As AskStreamingRecall, of what a client asked as JSON; faults name its fields. `request` lives as
// long as the question.
Asked AskJsonRecall(JsonRequest* request, int64_t now_unix_ns,
                    std::span<const std::string> filter_keys, CallText* text, RecallLimits* limits,
                    GatewayQuestion* question);

}  // namespace engram
