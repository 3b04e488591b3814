#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dataplane/frame_format.h"
#include "src/core/memory_kinds.h"
#include "src/core/observation.h"
#include "src/core/refusal_reason.h"
#include "src/core/result.h"
#include "src/core/unique_fd.h"

// The C++ client of the native frames (dataplane/FORMAT.md): a connection, and on it recalls and
// introspection. Observations are streamed by Feed (tools/clients/cpp/feed.h), and over broken
// connections by ResumingFeed (tools/clients/cpp/resuming_feed.h).
//
// Error codes say what can be done: kUnavailable may pass when it is tried again on a new
// connection (no route, refused, closed, timeout, a limit reached, the server is stopping);
// kNotFound is a session (session_expired) or space (unknown_space) that the server does not know;
// kAlreadyExists is a
// session that another connection took over (fenced); kInvalidArgument and kCorrupt stay.

namespace engram {

inline constexpr std::string_view kDefaultAddress = "127.0.0.1:7654";

struct Address {
  std::string host;
  std::string port;
  std::string ToString() const;
};

// "HOST:PORT", where an IPv6 host stands in brackets. Errors: kInvalidArgument.
Result<Address> ParseAddress(std::string_view text);

struct HelloOptions {
  std::string space = {};  // empty: default
  uint32_t dimension = 0;
  Metric metric = Metric::kUnspecified;
  Priority priority = Priority::kNormal;
  uint64_t session = 0;     // 0: a new one
  bool no_session = false;  // the connection only recalls and introspects
};

// What hello_ack said.
struct HelloAnswer {
  uint64_t session = 0;
  uint64_t last_sequence = 0;  // the session's last accepted sequence
  uint32_t dimension = 0;      // 0: the space has none yet
  Metric metric = Metric::kUnspecified;
  uint64_t credit = 0;
  uint32_t max_frame_bytes = kMaxFrameBodyBytes;
  uint32_t max_recalls = 1;
  bool attributes = false;    // it takes attributes and filters
  bool wide_recalls = false;  // it takes bounds, recalls of all spaces, and of the latest
};

// A checked frame. `body` stays valid until the connection's next Receive.
struct Frame {
  FrameHeader header;
  std::span<const std::byte> body;
};

// A refusal in the server's own words, safe to print.
struct Refusal {
  RefusalReason reason = RefusalReason::kNone;
  FrameType refused_type = FrameType::kObserve;
  uint8_t flags = 0;
  uint32_t retry_after_ms = 0;
  uint64_t sequence = 0;  // of the refused observation, or the id of the refused request
  uint64_t expected = 0;
  std::string text;

  bool consumed() const { return (flags & kNakFlagConsumed) != 0; }
  bool closing() const { return (flags & kNakFlagClosing) != 0; }
  // "name: what it means and what to do (the server's own text)".
  std::string Describe() const;
};

// Errors: kCorrupt where the body is not a nak.
Result<Refusal> ParseNak(const Frame& frame);

// Copy of `text` in which bytes that a terminal would act on are replaced by '?'.
std::string Printable(std::string_view text);

// One stream of frames. Nothing but Connect, Await..., Hello, Ping and Close blocks, and those take
// a timeout.
//
// How to drive one without blocking: Append frames, Flush, wait with poll(2) for fd() to be
// readable, or writable while PendingBytes() > 0, then Receive and NextFrame until that gives
// nothing.
//
// Thread safety: none; one thread owns it.
class Connection {
 public:
  // Resolves and connects. Errors: kUnavailable; the message says what to look at.
  static Result<Connection> Connect(const Address& address, int64_t timeout_ns);
  // Begins to connect and does not wait: frames can be appended at once, and Flush or Receive tell
  // whether it came to nothing. A host with several addresses gets them in turn: attempt 0 takes
  // the first. A host's name is looked up, which may block; numbers are not. Errors: kUnavailable.
  static Result<Connection> StartConnect(const Address& address, uint64_t attempt);
  // Takes over a connected stream socket and makes it nonblocking.
  static Connection Adopt(UniqueFd fd);
  // Closes the socket. Nothing but hello() and PendingBytes() may be called afterwards.
  void Abandon();

  // Says hello and awaits the answer. Errors: kUnavailable (no answer in time, closed, refused for
  // now), kCorrupt (not frames), kNotFound (session_expired), kInvalidArgument (refused; the
  // message has the reason's name and text).
  Result<void> Hello(const HelloOptions& options, int64_t timeout_ns);
  // The same in steps that do not block: SendHello once, then PollHello whenever the socket may be
  // ready, until it says true: the answer is there. Errors: as Hello, but for the timeout.
  Result<void> SendHello(const HelloOptions& options);
  Result<bool> PollHello();
  const HelloAnswer& hello() const { return hello_; }

  // A frame is written where it is sent from: BeginFrame, Append what belongs to its body,
  // EndFrame.
  void BeginFrame(FrameType type, uint16_t flags, uint64_t sequence);
  void Append(std::span<const std::byte> bytes);
  void AppendZeros(size_t count);
  // Overwrites body bytes that were appended before.
  void Patch(size_t body_offset, std::span<const std::byte> bytes);
  size_t BodyBytes() const;
  void EndFrame();
  void SendFrame(FrameType type, uint16_t flags, uint64_t sequence,
                 std::span<const std::byte> body);

  // Gives the kernel what it takes. A peer that went away is not reported here but by NextFrame, so
  // that the nak that it sent before is read first.
  Result<void> Flush();
  // Reads what has arrived, a bounded amount. Frames given out before are invalid afterwards.
  Result<void> Receive();
  // The next whole frame, or nothing. Answers the server's pings itself. Errors: kCorrupt (the
  // bytes break the grammar), kUnavailable (the server closed the connection).
  Result<std::optional<Frame>> NextFrame();

  // Flush, Receive and wait until a frame is there. Errors: as NextFrame; kUnavailable (timeout).
  Result<Frame> AwaitFrame(int64_t deadline_ns);
  // Round trip of a ping in nanoseconds.
  Result<int64_t> Ping(int64_t timeout_ns);
  // What CheckUnrelatedFrame says of a frame of this connection, and what hello had asked for where
  // that is what the server refuses.
  Result<void> CheckUnrelated(const Frame& frame) const;
  // Says close and awaits the server's, passing over what else arrives.
  Result<void> Close(int64_t timeout_ns);
  // Sends a ping when nothing was sent for long enough that the server might end the connection.
  void KeepAlive(int64_t now_ns);

  int fd() const { return fd_.get(); }
  size_t PendingBytes() const { return out_.size() - out_head_; }
  uint64_t bytes_sent() const { return bytes_sent_; }

 private:
  explicit Connection(UniqueFd fd) : fd_(std::move(fd)) {}

  // What hello asked for that the server refuses for this reason, or what may have become of it;
  // empty for other reasons.
  std::string Explain(RefusalReason reason) const;
  // Whether `frame` was the answer to hello; then it is noted.
  Result<bool> TakeHelloAnswer(const Frame& frame);

  UniqueFd fd_;
  HelloOptions asked_;
  HelloAnswer hello_;

  std::vector<std::byte> out_;  // from out_head_ on: not sent yet
  size_t out_head_ = 0;
  size_t frame_start_ = 0;  // of the frame being built, in out_
  FrameHeader building_;
  bool write_ended_ = false;  // the peer reads no more
  uint64_t bytes_sent_ = 0;
  uint64_t keep_alive_bytes_ = 0;  // bytes_sent_ when KeepAlive last saw it change
  int64_t keep_alive_ns_ = 0;      // and when that was

  std::vector<std::byte> in_;  // [in_head_, in_tail_) was received and not given out
  size_t in_head_ = 0;
  size_t in_tail_ = 0;
  bool read_ended_ = false;
  uint64_t next_ping_ = 1;
};

// What Feed and RecallStream answer to a frame that is theirs neither: an Error that says why the
// stream ended (nak, close; codes as above), or nothing where the frame can be passed over (ping,
// unknown types).
Result<void> CheckUnrelatedFrame(const Frame& frame);

struct RecallQuery {
  // Empty, with a filter: the latest of what matches.
  std::span<const float> vector;
  uint32_t k = 10;
  uint32_t ef = 0;  // 0: the server's default
  bool with_payload = false;
  bool with_vector = false;
  bool at_snapshot = false;  // what lived at one stamp in all of the space's partitions
  // As FilterWriter writes it; empty: none. Only where hello granted attributes.
  std::string_view filter = {};
  // Only what is at least as near as this score, and what is near in all spaces of the same metric
  // and dimension. Only where hello granted wide recalls.
  std::optional<float> bound = {};
  bool across = false;
};

struct RecallHit {
  std::string id;
  std::string space;  // empty where one was recalled
  float score = 0;
  float confidence = 0;
  int64_t when_ns = 0;
  uint64_t stamp = 0;  // when it was taken: rises from each update of an id to the next
  PayloadKind payload_kind = PayloadKind::kOpaque;
  std::string payload;
  bool payload_omitted = false;  // it was asked for and did not fit in the answer
  std::vector<float> vector;     // empty where it was not asked for
};

struct RecallAnswer {
  uint64_t request = 0;
  Metric metric = Metric::kUnspecified;
  uint64_t snapshot = 0;  // the stamp at which the hits lived, where that was asked for
  int64_t first_ns = 0;   // when the first of it was there, on the monotonic clock
  // Nearest first. Of a long recall some come first, and then the others.
  std::vector<RecallHit> hits;
  std::optional<Refusal> refusal;  // then there are no hits
};

// Recalls on a connection, several under way at once. Answers may come in any order and in pieces.
class RecallStream {
 public:
  // `connection` has said hello and outlives this.
  explicit RecallStream(Connection* connection) : connection_(connection) {}

  size_t InFlight() const { return pending_.size(); }
  bool HasRoom() const { return pending_.size() < connection_->hello().max_recalls; }
  // Writes a recall into the connection's output and returns its request id. Asks HasRoom().
  uint64_t Send(const RecallQuery& query);
  // An answer that is complete in what was received, or nothing. Errors: as Connection::NextFrame;
  // kCorrupt for an answer that breaks the grammar or that nobody asked for.
  Result<std::optional<RecallAnswer>> NextAnswer();
  // Flush, Receive and wait until an answer is there.
  Result<RecallAnswer> AwaitAnswer(int64_t timeout_ns);

 private:
  struct Pending {
    uint32_t k = 0;
    RecallAnswer answer;
  };

  Connection* const connection_;
  std::map<uint64_t, Pending> pending_;  // by request id
  uint64_t next_request_ = 1;
};

// Where a scroll begins, or goes on.
struct ScrollPosition {
  uint16_t partition = 0;
  uint64_t cursor = 0;
};

struct ScrollPage {
  std::vector<RecallHit> hits = {};  // as a recall's, without scores; maybe none
  ScrollPosition next = {};
  uint16_t partitions = 0;  // that the space has now
  bool ended = false;
};

struct ScrollQuery {
  ScrollPosition from = {};
  uint16_t limit = kMaxScrollHits;  // 1 to kMaxScrollHits
  bool with_payload = false;
  bool with_vector = false;
};

// The next page of the live observations of the connection's space. Waits and asks again where the
// server has no room. Errors: as Connection::NextFrame; kInvalidArgument (refused); kNotFound (no
// such space); kCorrupt (grammar).
Result<ScrollPage> Scroll(Connection& connection, const ScrollQuery& query, int64_t timeout_ns);

// How a check of the connection's space in one shard goes on, and what it has come to.
struct SpaceCheck {
  uint16_t shard = 0;
  std::array<std::byte, kCheckStateBytes> state{};  // the server's
  CheckOutcome outcome = CheckOutcome::kMore;
  std::string text = {};  // kUnsound: what is wrong
};
// One slice, while the outcome is kMore. Errors: likewise.
Result<void> ContinueCheck(Connection& connection, SpaceCheck* check, int64_t timeout_ns);

// One space as one shard sees it.
struct SpaceInfo {
  SpaceRecord record;
  std::string name;
  MemoryByKind memory{};  // zeros where the server does not tell
};

// Errors: as Connection::NextFrame; kInvalidArgument (refused); kCorrupt (grammar, or no end).
Result<std::vector<SpaceInfo>> IntrospectSpaces(Connection& connection, int64_t timeout_ns);
// Lines of "core counter value".
Result<std::string> IntrospectStatus(Connection& connection, int64_t timeout_ns);
// Has something done to a whole space, and waits until it is, which may be long. Errors: as above;
// kUnavailable also when nothing came from the server for `timeout_ns`, above the 60 s after which
// it is asked for a sign of life.
Result<CommandDoneBody> CommandSpace(Connection& connection, SpaceCommand what,
                                     std::string_view space, int64_t timeout_ns);
// Asks for a checkpoint, which then begins; the counters checkpoints_completed and
// checkpoints_failed of the status tell how it ended.
Result<void> RequestCheckpoint(Connection& connection, int64_t timeout_ns);
// Asks that the files of the data directory stay as they are for kHoldNs, or that they need not any
// longer. Errors: likewise.
Result<void> HoldFiles(Connection& connection, bool hold, int64_t timeout_ns);

}  // namespace engram
