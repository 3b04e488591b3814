#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dataplane/frame_format.h"
#include "src/control/gateway_call.h"
#include "src/core/ids.h"
#include "src/core/session_id.h"
#include "src/core/stream_network.h"

namespace engram {

// How a client begins its stream.
struct StreamOpening {
  SpaceName space{};
  SessionId session{};      // 0: a new one
  bool has_session = true;  // else the stream only recalls
  bool goes_back = false;   // it knows go-back-N; else every refusal uses its number up
  bool cumulative = false;  // one ack may stand for several
  bool hears_flow = true;   // of pressure, beyond what its own actions are answered with
  Priority priority = Priority::kNormal;
  uint32_t client_buffer = 0;  // observations without an ack that it keeps; 0: any number
};

// What a stream tells its client. Views are valid until the next event is taken.
struct StreamEvent {
  enum class Kind : uint8_t {
    kOpened,         // sequence: the last that the session has settled
    kAcked,          // sequence; first: where the ack stands for several, the first of them
    kRefused,        // sequence, reason, text
    kFlow,           // flow
    kFlowRefused,    // reason, text
    kHits,           // request, hits
    kRecallRefused,  // request, reason, text
    kClosed,         // sequence: the last that the session has settled
    kEnded,          // reason, text: the stream cannot go on; the last event
  };
  Kind kind = Kind::kClosed;
  bool is_consumed = false;  // kRefused: the number is used up
  bool is_last = false;      // kHits: no more of them follow
  RefusalReason reason = RefusalReason::kNone;
  uint32_t retry_after_ms = 0;
  Sequence sequence = 0;
  Sequence first = 0;
  Sequence expected = 0;  // kRefused: the number that is taken next
  uint64_t request = 0;
  std::string_view id{};    // kAcked, kRefused: of the observation; empty where it is not known
  std::string_view text{};  // for a person: what was wrong and what to do
  FlowBody flow{};
  Metric metric = Metric::kUnspecified;
  CommitStamp snapshot = kNoStamp;
  std::span<const std::byte> hits{};  // as HitReader reads them
};

// One client's stream, whatever its transport: what it asks becomes native frames (FORMAT.md) in a
// pipe to the ingress core of streams, and that core's frames become events (design 0021).
//
// 1. Open; kOpened or kEnded follows. Until then nothing else is asked.
// 2. Observe and RefuseObservation give each observation in turn to the pipe; Flush ends a message.
//    What the stream itself can answer (a gap, a repeat) makes an event and no frame.
// 3. Next hands out the events, acks and refusals in the order of the numbers.
// 4. Close; kClosed follows once all is settled. Or Abandon, at any time.
//
// Thread safety: one thread at a time; who moves it to another sees to the order.
// Invariants: told_ <= settled_ < next_; asked_ has one place for each number from told_ + 1 to
// next_ - 1; no more numbers are under way than credit, or one, and the client's buffer allow.
class SessionStream {
 public:
  enum class Taken : uint8_t {
    kTaken,
    kNoRoom,  // ask again after the next StreamClient::OnReady, or after an event
  };

  // `pipe` is closed by Abandon, or by the destructor.
  explicit SessionStream(StreamPipe* pipe) : pipe_(pipe) {}
  ~SessionStream() { Abandon(); }
  SessionStream(const SessionStream&) = delete;
  SessionStream& operator=(const SessionStream&) = delete;

  // Once, first.
  void Open(const StreamOpening& opening);
  bool is_open() const { return is_open_; }
  // Of the session, once it is open.
  SessionId session() const { return session_; }
  const SpaceName& space() const { return opening_.space; }
  const StreamOpening& opening() const { return opening_; }
  // Observations that may be under way now.
  uint64_t room() const;

  // `question` is of kind kObserve.
  [[nodiscard]] Taken Observe(Sequence sequence, const GatewayQuestion& question);
  // An observation that was found wrong before it came here: its number is used up, and `why`,
  // which names the field, is what the client is told.
  [[nodiscard]] Taken RefuseObservation(Sequence sequence, std::string why);
  // What was observed goes out. Called at the end of each message.
  [[nodiscard]] Taken Flush();

  // `question` is of kind kRecall, `request` the caller's number for it.
  [[nodiscard]] Taken Recall(uint64_t request, const GatewayQuestion& question);
  [[nodiscard]] Taken Flow(const FlowRequestBody& action);
  // Nothing more is asked.
  [[nodiscard]] Taken Close();
  // The pipe is given back. There are no more events.
  void Abandon();

  // Nothing where there is none now.
  std::optional<StreamEvent> Next();

 private:
  // An observation whose ack or refusal was not told yet.
  struct Asked {
    std::string id{};
    std::string fault{};  // that was found before it was sent
    RefusalReason reason = RefusalReason::kNone;
    uint32_t retry_after_ms = 0;
  };
  // What the stream answers by itself.
  struct OwnAnswer {
    StreamEvent event;
    std::string text;
    std::string id{};
  };

  static constexpr size_t kFrameTargetBytes = size_t{48} << 10;
  static constexpr uint16_t kFrameRecordsMax = 64;
  static constexpr size_t kOwnAnswersMax = 64;

  // The numbers of observations.
  enum class Turn : uint8_t { kNow, kAnswered, kNoRoom };
  Turn TurnOf(Sequence sequence);
  Asked* BeginAsked(Sequence sequence);
  Asked& AskedOf(Sequence sequence) { return asked_[sequence % asked_.size()]; }
  void AnswerGap(Sequence sequence);

  // Frames out.
  bool PrepareFrame(PayloadKind kind, size_t record_bytes);
  std::byte* AddRecord(const RecordHeader& record);
  bool WriteFrame(FrameHeader header, std::span<const std::byte> body);

  // Frames in.
  bool TakeFrame();
  void ReleaseFrame();
  void SeeFrame();
  void SeeHelloAck();
  void SeeNak();
  void SeeObservationNak(const NakBody& nak, std::string_view text);
  void SeeResult();
  std::optional<StreamEvent> TellSettled();
  std::span<const std::byte> body() const { return frame_.subspan(kFrameHeaderBytes); }

  StreamPipe* pipe_;
  StreamOpening opening_;
  SessionId session_;
  bool is_open_ = false;
  bool has_closed_ = false;    // Close was asked
  bool has_ended_ = false;     // the last event was made
  bool gap_was_told_ = false;  // of a client that goes back: silent until next_ comes
  uint32_t flows_ = 0;         // actions of the client that are not answered yet
  uint32_t max_recalls_ = 0;
  uint32_t recalls_ = 0;      // under way
  uint64_t credit_ = 0;       // the highest number that may be sent
  Sequence next_ = 1;         // the number that is taken next
  Sequence settled_ = 0;      // all up to it are answered
  Sequence told_ = 0;         // and of these the client was told
  std::vector<Asked> asked_;  // by number, a power of two of them
  std::deque<OwnAnswer> own_;
  std::optional<OwnAnswer> refused_;  // of the number next_; not told yet

  std::vector<std::byte> out_;  // body of the observe frame that is made
  uint16_t out_records_ = 0;
  Sequence out_first_ = 0;
  PayloadKind out_kind_ = PayloadKind::kOpaque;

  std::vector<std::byte> gathered_;  // a frame that does not lie in one piece
  FrameHeader header_;
  std::span<const std::byte> frame_;  // that is looked at
  size_t frame_in_pipe_ = 0;          // of its bytes, those that Consume is due for
  std::optional<StreamEvent> seen_;   // of that frame
  std::string text_;                  // of the event that was handed out
  std::string id_;                    // likewise
};

}  // namespace engram
