#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>

#include "src/control/json_request.h"
#include "src/control/memory_calls.h"
#include "src/control/session_stream.h"
#include "src/core/clock.h"
#include "src/core/space_catalogue.h"

namespace engram {

// What a session needs of its surroundings, which outlive it.
struct JsonSurroundings {
  Clock* clock;
  const SpaceCatalogue* spaces;
  JsonReader* reader;
  // The client's end of a pipe to the ingress core of streams; nullptr: too many are open.
  std::function<StreamPipe*()> connect;
};

// One client's stream over JSON: its texts become what a SessionStream is asked, and that one's
// events become texts (WIRE's messages). The transport hands texts in, one at a time, and takes
// texts out.
//
// What is wrong with a text is told on the stream, which goes on. Only what the ingress core ends
// the stream for ends it.
//
// Thread safety: one thread's alone.
// Invariants: at most kTextsAhead texts wait to be taken, and those of one more request; a request
// that has no room waits, and no other is taken meanwhile.
class JsonSession {
 public:
  // Why a stream ends, as RFC 6455 (7.4.1) and its registry number it.
  enum class Ending : uint16_t {
    kNormal = 1000,
    kGoingAway = 1001,
    kMixed = 1003,  // text and binary messages
    kRefused = 1008,
    kTryLater = 1013,
  };

  // `space`: what the transport says of it; empty: nothing.
  JsonSession(const JsonSurroundings& surroundings, std::string_view space)
      : around_(surroundings), call_space_(space) {}

  // Takes the next text: none waits for room in the pipe, or for texts to be taken out.
  bool takes() const { return !is_waiting_ && texts_.size() < kTextsAhead && !ending_; }
  // The last text is still needed, as what was made of it waits.
  bool is_waiting() const { return is_waiting_; }
  // A text came; JsonReader::kPaddingBytes follow it.
  void Take(std::string_view text);
  // After the pipe was ready, or a text was taken out.
  void TakeAgain();

  // Appends the next text to `text`; false where there is none now.
  bool Next(std::string* text);
  // Once all texts were taken out: the stream is over.
  std::optional<Ending> ending() const { return ending_; }
  void SayHeartbeat();
  // The appliance stops: where no stream was begun, it ends. One that was hears of it from the
  // ingress core, once it is settled.
  void GoAway();
  // Nobody listens any more.
  void Abandon() {
    if (stream_) stream_->Abandon();
  }

 private:
  using Taken = SessionStream::Taken;
  static constexpr size_t kTextsAhead = 8;
  // What is made of a text that is larger is not kept for the next one.
  static constexpr size_t kKeptBytes = size_t{64} << 10;

  // One recall that is under way.
  struct Recalled {
    std::string request_id{};  // as JSON
    RecallLimits limits{};
    RecallTold told{};
    int64_t began_ns = 0;
  };

  Taken TakeRequest();
  Taken TakeInit();
  std::string InitFault(StreamOpening* opening) const;
  Taken TakeObservation();
  Taken TakeFlow();
  Taken TakeRecall();
  Taken TakeClose();
  std::string StrayFault() const;

  void Tell(const StreamEvent& event);
  void TellHitsOf(const StreamEvent& event);
  void TellEnd(const StreamEvent& event);
  void SayError(std::string_view code, std::string_view message, bool of_request = false);
  // A text that is to be filled.
  std::string* Say() { return &texts_.emplace_back(); }

  const JsonSurroundings around_;
  const std::string call_space_;
  std::optional<SessionStream> stream_;  // from init on
  std::deque<std::string> texts_;
  std::optional<Ending> ending_;
  JsonRequest request_;
  bool is_waiting_ = false;  // request_
  bool is_large_ = false;    // it was made of a large text
  bool is_closing_ = false;  // close was sent on
  int64_t received_unix_ns_ = 0;
  CallText text_;
  std::string session_text_;  // once it is open
  Sequence last_ = 0;         // that was settled and told
  uint64_t recalls_asked_ = 0;
  std::unordered_map<uint64_t, Recalled> recalls_;  // by our own number
};

}  // namespace engram
