#include "tools/clients/cpp/engram_client.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <memory>
#include <system_error>

#include "src/core/attributes.h"
#include "src/core/check.h"
#include "src/core/clock.h"
#include "tools/clients/cpp/client_support.h"

namespace engram {

namespace {

constexpr size_t kReceiveBytes = size_t{256} << 10;
constexpr size_t kPrintedTextBytesMax = 512;

std::string ErrnoText(int errno_value) { return std::generic_category().message(errno_value); }

std::unexpected<Error> FailConnect(const Address& address, const std::string& why) {
  return Fail(ErrorCode::kUnavailable, "cannot connect to " + address.ToString() + ": " + why);
}

std::string ExplainConnectErrno(int errno_value) {
  std::string text = ErrnoText(errno_value);
  if (errno_value == ECONNREFUSED) text += "; is engramd running?";
  return text;
}

void MakeNonblocking(int fd) {
  const int flags = fcntl(fd, F_GETFL);
  CHECK(flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0, "fd is an open socket");
}

// `what` failed with `errno_value`. What comes of the network may pass.
std::unexpected<Error> FailSocket(const std::string& what, int errno_value) {
  switch (errno_value) {
    case ECONNREFUSED:
    case ECONNABORTED:
    case ECONNRESET:
    case EPIPE:
    case ETIMEDOUT:
    case EHOSTDOWN:
    case EHOSTUNREACH:
    case ENETDOWN:
    case ENETRESET:
    case ENETUNREACH:
      return Fail(ErrorCode::kUnavailable, what + ": " + ExplainConnectErrno(errno_value));
    default:
      return FailErrno(what, errno_value);
  }
}

using AddressList = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

// At least one entry.
Result<AddressList> Resolve(const Address& address) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* raw = nullptr;
  const int resolved = getaddrinfo(address.host.c_str(), address.port.c_str(), &hints, &raw);
  if (resolved != 0) {
    return FailConnect(address, std::string(gai_strerror(resolved)) + "; check the host's name");
  }
  if (raw == nullptr) return FailConnect(address, "the host has no address");
  return AddressList(raw, &freeaddrinfo);
}

// A socket that connects to `entry`, or has. Gives 0, EINPROGRESS or what went wrong.
int BeginConnect(const addrinfo& entry, UniqueFd* fd) {
  *fd = UniqueFd(socket(entry.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (fd->get() < 0) return errno;
  // Requests are small and are waited for; Nagle's algorithm would hold them back.
  const int on = 1;
  setsockopt(fd->get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  return connect(fd->get(), entry.ai_addr, entry.ai_addrlen) == 0 ? 0 : errno;
}

// What a refusal that ends the connection comes to. Reasons that this version does not know may
// pass.
ErrorCode CodeOfClosing(RefusalReason reason) {
  switch (reason) {
    case RefusalReason::kSessionExpired:
      return ErrorCode::kNotFound;
    case RefusalReason::kFenced:
      return ErrorCode::kAlreadyExists;
    case RefusalReason::kBadMagic:
    case RefusalReason::kBadVersion:
    case RefusalReason::kBadType:
    case RefusalReason::kFrameTooLong:
    case RefusalReason::kBadCrc:
    case RefusalReason::kBadFrame:
    case RefusalReason::kHelloRequired:
    case RefusalReason::kHelloRepeated:
    case RefusalReason::kBadSpaceId:
    case RefusalReason::kMetricMismatch:
    case RefusalReason::kDimensionMismatch:
    case RefusalReason::kSessionSpaceMismatch:
      return ErrorCode::kInvalidArgument;
    default:
      return ErrorCode::kUnavailable;
  }
}

}  // namespace

int64_t NowNs() { return SystemClock().MonotonicNs(); }

bool WaitFor(int fd, short events, int64_t deadline_ns) {
  for (;;) {
    const int64_t left_ns = deadline_ns - NowNs();
    if (left_ns <= 0) return false;
    const timespec timeout = {.tv_sec = left_ns / kNanosPerSecond,
                              .tv_nsec = left_ns % kNanosPerSecond};
    pollfd entry = {.fd = fd, .events = events, .revents = 0};
    const int ready = ppoll(&entry, 1, &timeout, nullptr);
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) return true;  // what is wrong shows in the next call
  }
}

std::unexpected<Error> FailGrammar(const std::string& what) {
  return Fail(ErrorCode::kCorrupt, "the server's answer breaks the frame grammar: " + what +
                                       "; do engramctl and engramd come from the same release?");
}

std::string Address::ToString() const {
  return (host.find(':') == std::string::npos ? host : '[' + host + ']') + ':' + port;
}

Result<Address> ParseAddress(std::string_view text) {
  const auto fail = [&] {
    return Fail(ErrorCode::kInvalidArgument, "address '" + std::string(text) +
                                                 "' is not HOST:PORT, such as " +
                                                 std::string(kDefaultAddress) + " or [::1]:7654");
  };
  const size_t colon = text.rfind(':');
  if (colon == std::string_view::npos) return fail();
  std::string_view host = text.substr(0, colon);
  const std::string_view port = text.substr(colon + 1);
  if (host.starts_with('[') && host.ends_with(']')) {
    host = host.substr(1, host.size() - 2);
  } else if (host.find(':') != std::string_view::npos) {
    return fail();
  }
  uint16_t number = 0;
  const auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), number);
  if (host.empty() || error != std::errc() || end != port.data() + port.size() || number == 0) {
    return fail();
  }
  return Address{std::string(host), std::string(port)};
}

std::string Printable(std::string_view text) {
  std::string safe(text);
  for (size_t i = 0; i < safe.size(); ++i) {
    const auto byte = static_cast<unsigned char>(safe[i]);
    if (byte < 0x20 || byte == 0x7f) safe[i] = '?';
    // The C1 controls U+0080 to U+009F, which terminals act on too, are 0xC2 0x80 to 0xC2 0x9F.
    if (byte == 0xc2 && i + 1 < safe.size() && static_cast<unsigned char>(safe[i + 1]) < 0xa0) {
      safe[i] = '?';
      safe[++i] = '?';
    }
  }
  return safe;
}

std::string Refusal::Describe() const {
  const RefusalInfo info = DescribeRefusal(reason);
  std::string description(info.name);
  if (info.name == "unknown") {
    description += ' ' + std::to_string(static_cast<unsigned>(reason));
  }
  description += ": " + std::string(info.text);
  if (!text.empty() && text != info.text) description += " (" + text + ')';
  return description;
}

Result<Refusal> ParseNak(const Frame& frame) {
  if (frame.body.size() < sizeof(NakBody)) return FailGrammar("a nak is too short");
  const auto body = LoadAs<NakBody>(frame.body.data());
  const auto text = frame.body.subspan(sizeof(NakBody));
  if (text.size() < body.text_bytes) return FailGrammar("a nak's text is longer than its frame");
  Refusal refusal;
  refusal.reason = body.reason;
  refusal.refused_type = body.refused_type;
  refusal.flags = body.flags;
  refusal.retry_after_ms = body.retry_after_ms;
  refusal.sequence = frame.header.sequence;
  refusal.expected = body.expected;
  refusal.text = Printable({reinterpret_cast<const char*>(text.data()),
                            std::min<size_t>(body.text_bytes, kPrintedTextBytesMax)});
  return refusal;
}

Result<void> CheckUnrelatedFrame(const Frame& frame) {
  switch (frame.header.type) {
    case FrameType::kNak: {
      const Result<Refusal> refusal = ParseNak(frame);
      if (!refusal) return std::unexpected(refusal.error());
      const ErrorCode code = refusal->reason == RefusalReason::kUnknownSpace
                                 ? ErrorCode::kNotFound
                                 : ErrorCode::kInvalidArgument;
      return Fail(refusal->closing() ? CodeOfClosing(refusal->reason) : code,
                  (refusal->closing() ? "the server ended the connection: " : "refused: ") +
                      refusal->Describe());
    }
    case FrameType::kClose:
      return Fail(ErrorCode::kUnavailable,
                  "the server closed the connection: it is stopping; try again later");
    default:
      return {};
  }
}

// Connection: connecting and the handshake ------------------------------------------------------

Result<Connection> Connection::Connect(const Address& address, int64_t timeout_ns) {
  const int64_t deadline_ns = NowNs() + timeout_ns;
  const Result<AddressList> list = Resolve(address);
  if (!list) return std::unexpected(list.error());
  std::string why;
  for (const addrinfo* entry = list->get(); entry != nullptr; entry = entry->ai_next) {
    UniqueFd fd;
    int error = BeginConnect(*entry, &fd);
    if (error == EINPROGRESS) {
      if (!WaitFor(fd.get(), POLLOUT, deadline_ns)) {
        why = "no answer within " + std::to_string(timeout_ns / kNanosPerMilli) +
              " ms; check the address and the firewall";
        continue;
      }
      socklen_t size = sizeof(error);
      if (getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size) != 0) error = errno;
    }
    if (error != 0) {
      why = ExplainConnectErrno(error);
      continue;
    }
    return Adopt(std::move(fd));
  }
  return FailConnect(address, why);
}

Result<Connection> Connection::StartConnect(const Address& address, uint64_t attempt) {
  const Result<AddressList> list = Resolve(address);
  if (!list) return std::unexpected(list.error());
  uint64_t count = 0;
  for (const addrinfo* entry = list->get(); entry != nullptr; entry = entry->ai_next) ++count;
  const addrinfo* entry = list->get();
  for (uint64_t skipped = attempt % count; skipped > 0; --skipped) entry = entry->ai_next;
  UniqueFd fd;
  const int error = BeginConnect(*entry, &fd);
  if (error != 0 && error != EINPROGRESS) return FailConnect(address, ExplainConnectErrno(error));
  return Adopt(std::move(fd));
}

void Connection::Abandon() {
  fd_ = UniqueFd();
  out_.clear();
  out_head_ = 0;
}

Connection Connection::Adopt(UniqueFd fd) {
  MakeNonblocking(fd.get());
  return Connection(std::move(fd));
}

Result<void> Connection::Hello(const HelloOptions& options, int64_t timeout_ns) {
  const int64_t deadline_ns = NowNs() + timeout_ns;
  if (auto sent = SendHello(options); !sent) return sent;
  for (;;) {
    const Result<Frame> frame = AwaitFrame(deadline_ns);
    if (!frame) return std::unexpected(frame.error());
    const Result<bool> answered = TakeHelloAnswer(*frame);
    if (!answered) return std::unexpected(answered.error());
    if (*answered) return {};
  }
}

Result<bool> Connection::PollHello() {
  if (auto flushed = Flush(); !flushed) return std::unexpected(flushed.error());
  if (auto received = Receive(); !received) return std::unexpected(received.error());
  for (;;) {
    const Result<std::optional<Frame>> frame = NextFrame();
    if (!frame) return std::unexpected(frame.error());
    if (!frame->has_value()) return false;
    const Result<bool> answered = TakeHelloAnswer(**frame);
    if (!answered || *answered) return answered;
  }
}

Result<void> Connection::SendHello(const HelloOptions& options) {
  if (options.space.size() > kMaxSpaceNameBytes || options.dimension > kMaxDimension) {
    return Fail(ErrorCode::kInvalidArgument,
                "a space's name has at most 64 characters and a dimension is at most 4096");
  }
  HelloBody body;
  body.features =
      kFeatureAttributes | kFeatureWideRecalls | (options.no_session ? kFeatureNoSession : 0);
  body.dimension = static_cast<uint16_t>(options.dimension);
  body.metric = options.metric;
  body.priority = options.priority;
  body.space_bytes = static_cast<uint8_t>(options.space.size());
  asked_ = options;
  hello_.session = options.session;
  BeginFrame(FrameType::kHello, 0, 0);
  Append(BytesOf(body));
  Append(BytesOf(std::string_view(options.space)));
  EndFrame();
  return {};
}

std::string Connection::Explain(RefusalReason reason) const {
  const std::string space = asked_.space.empty() ? "default" : Printable(asked_.space);
  const char* const remedy = "; `engramctl spaces` says what the space has";
  if (reason == RefusalReason::kMetricMismatch) {
    return "; asked for was " + std::string(MetricName(asked_.metric)) + " in space " + space +
           remedy;
  }
  if (reason == RefusalReason::kDimensionMismatch) {
    return "; asked for was dimension " + std::to_string(asked_.dimension) + " in space " + space +
           remedy;
  }
  if (reason == RefusalReason::kSessionExpired) {
    return "; space " + space +
           " may have been dropped, the session may have expired (session_keep_days, 7 unless "
           "configured), or this server runs on another data directory";
  }
  return "";
}

Result<void> Connection::CheckUnrelated(const Frame& frame) const {
  Result<void> passed = CheckUnrelatedFrame(frame);
  if (passed || frame.header.type != FrameType::kNak) return passed;
  if (const auto nak = ParseNak(frame)) passed.error().message += Explain(nak->reason);
  return passed;
}

Result<bool> Connection::TakeHelloAnswer(const Frame& frame) {
  // While nothing listens, TCP may connect a socket to itself, when the port is one that the kernel
  // gives to clients.
  if (frame.header.type == FrameType::kHello) {
    return Fail(ErrorCode::kUnavailable,
                "the connection leads back to its own end; is engramd "
                "running?");
  }
  if (frame.header.type != FrameType::kHelloAck) {
    if (auto passed = CheckUnrelated(frame); !passed) return std::unexpected(passed.error());
    return false;
  }
  if (frame.body.size() < sizeof(HelloAckBody)) return FailGrammar("hello_ack is too short");
  const auto answer = LoadAs<HelloAckBody>(frame.body.data());
  hello_.session = frame.header.session;
  hello_.last_sequence = frame.header.sequence;
  hello_.dimension = answer.dimension;
  hello_.metric = answer.metric;
  hello_.credit = answer.credit;
  hello_.max_frame_bytes = std::min(answer.max_frame_bytes, kMaxFrameBodyBytes);
  hello_.max_recalls = std::max<uint32_t>(answer.max_recalls, 1);
  hello_.attributes = (answer.features & kFeatureAttributes) != 0;
  hello_.wide_recalls = (answer.features & kFeatureWideRecalls) != 0;
  return true;
}

// Connection: writing ---------------------------------------------------------------------------

void Connection::BeginFrame(FrameType type, uint16_t flags, uint64_t sequence) {
  building_ = FrameHeader{};
  building_.type = type;
  building_.flags = flags;
  building_.session = hello_.session;
  building_.sequence = sequence;
  // What is sent already makes room before the buffer would grow.
  if (out_head_ == out_.size()) {
    out_.clear();
    out_head_ = 0;
  } else if (out_head_ > out_.size() / 2) {
    out_.erase(out_.begin(), out_.begin() + static_cast<ptrdiff_t>(out_head_));
    out_head_ = 0;
  }
  frame_start_ = out_.size();
  out_.resize(frame_start_ + kFrameHeaderBytes);
}

void Connection::Append(std::span<const std::byte> bytes) {
  out_.insert(out_.end(), bytes.begin(), bytes.end());
}

void Connection::AppendZeros(size_t count) { out_.resize(out_.size() + count); }

void Connection::Patch(size_t body_offset, std::span<const std::byte> bytes) {
  CHECK(body_offset + bytes.size() <= BodyBytes(), "only what was appended can be patched");
  std::ranges::copy(
      bytes, out_.begin() + static_cast<ptrdiff_t>(frame_start_ + kFrameHeaderBytes + body_offset));
}

size_t Connection::BodyBytes() const { return out_.size() - frame_start_ - kFrameHeaderBytes; }

void Connection::EndFrame() {
  const auto body = std::span<const std::byte>(out_).subspan(frame_start_ + kFrameHeaderBytes);
  CHECK(body.size() <= kMaxFrameBodyBytes, "a frame's body is at most 1 MiB");
  SealFrame(&building_, {{body}});
  std::memcpy(out_.data() + frame_start_, &building_, kFrameHeaderBytes);
}

void Connection::SendFrame(FrameType type, uint16_t flags, uint64_t sequence,
                           std::span<const std::byte> body) {
  BeginFrame(type, flags, sequence);
  Append(body);
  EndFrame();
}

Result<void> Connection::Flush() {
  while (out_head_ < out_.size()) {
    if (write_ended_) {
      out_head_ = out_.size();
      return {};
    }
    const ssize_t sent =
        send(fd_.get(), out_.data() + out_head_, out_.size() - out_head_, MSG_NOSIGNAL);
    if (sent >= 0) {
      out_head_ += static_cast<size_t>(sent);
      bytes_sent_ += static_cast<uint64_t>(sent);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return {};
    } else if (errno == EPIPE || errno == ECONNRESET) {
      write_ended_ = true;
    } else if (errno != EINTR) {
      return FailSocket("sending to the server", errno);
    }
  }
  return {};
}

// Connection: reading ---------------------------------------------------------------------------

Result<void> Connection::Receive() {
  // 1. Move what was not given out to the front; make room for a whole frame of the largest size
  //    only once such a frame is on its way.
  if (in_head_ > 0) {
    std::memmove(in_.data(), in_.data() + in_head_, in_tail_ - in_head_);
    in_tail_ -= in_head_;
    in_head_ = 0;
  }
  if (in_.size() - in_tail_ < kReceiveBytes) in_.resize(in_tail_ + kReceiveBytes);
  // 2. Read once.
  for (;;) {
    const ssize_t got = recv(fd_.get(), in_.data() + in_tail_, in_.size() - in_tail_, 0);
    if (got > 0) {
      in_tail_ += static_cast<size_t>(got);
    } else if (got == 0 || errno == ECONNRESET) {
      read_ended_ = true;
    } else if (errno == EINTR) {
      continue;
    } else if (errno != EAGAIN && errno != EWOULDBLOCK) {
      return FailSocket("receiving from the server", errno);
    }
    return {};
  }
}

Result<std::optional<Frame>> Connection::NextFrame() {
  for (;;) {
    const size_t available = in_tail_ - in_head_;
    Frame frame;
    size_t frame_bytes = kFrameHeaderBytes;
    if (available >= kFrameHeaderBytes) {
      const RefusalReason reason = CheckFrameHeader(in_.data() + in_head_, &frame.header);
      if (reason != RefusalReason::kNone) {
        return Fail(ErrorCode::kCorrupt,
                    "what the server sends is not native frames of version 1: " +
                        std::string(DescribeRefusal(reason).text) +
                        "; is this the address of engramd's feed listener?");
      }
      frame_bytes += frame.header.length;
    }
    if (available < frame_bytes) {
      if (!read_ended_) return std::nullopt;
      return Fail(ErrorCode::kUnavailable, available == 0
                                               ? "the server closed the connection"
                                               : "the server closed the connection in mid-frame");
    }
    const std::span<const std::byte> whole(in_.data() + in_head_, frame_bytes);
    if (CheckFrameCrc(frame.header, whole) != RefusalReason::kNone) {
      return Fail(ErrorCode::kCorrupt,
                  "a frame from the server fails its CRC32C; the connection cannot be trusted");
    }
    in_head_ += frame_bytes;
    frame.body = whole.subspan(kFrameHeaderBytes);
    if (frame.header.type == FrameType::kPing && (frame.header.flags & kFrameFlagPingAnswer) == 0) {
      SendFrame(FrameType::kPing, kFrameFlagPingAnswer, frame.header.sequence, {});
      continue;
    }
    return frame;
  }
}

Result<Frame> Connection::AwaitFrame(int64_t deadline_ns) {
  for (;;) {
    if (auto flushed = Flush(); !flushed) return std::unexpected(flushed.error());
    const Result<std::optional<Frame>> frame = NextFrame();
    if (!frame) return std::unexpected(frame.error());
    if (frame->has_value()) return **frame;
    const short events = PendingBytes() > 0 ? POLLIN | POLLOUT : POLLIN;
    if (!WaitFor(fd(), events, deadline_ns)) {
      return Fail(ErrorCode::kUnavailable, "the server did not answer in time");
    }
    if (auto received = Receive(); !received) return std::unexpected(received.error());
  }
}

Result<int64_t> Connection::Ping(int64_t timeout_ns) {
  const int64_t start_ns = NowNs();
  const uint64_t number = next_ping_++;
  SendFrame(FrameType::kPing, 0, number, {});
  for (;;) {
    const Result<Frame> frame = AwaitFrame(start_ns + timeout_ns);
    if (!frame) return std::unexpected(frame.error());
    if (frame->header.type == FrameType::kPing && frame->header.sequence == number) {
      return NowNs() - start_ns;
    }
    if (auto passed = CheckUnrelatedFrame(*frame); !passed) return std::unexpected(passed.error());
  }
}

Result<void> Connection::Close(int64_t timeout_ns) {
  const int64_t deadline_ns = NowNs() + timeout_ns;
  SendFrame(FrameType::kClose, 0, 0, {});
  for (;;) {
    const Result<Frame> frame = AwaitFrame(deadline_ns);
    if (!frame) return std::unexpected(frame.error());
    if (frame->header.type == FrameType::kClose) return {};
  }
}

void Connection::KeepAlive(int64_t now_ns) {
  if (bytes_sent_ != keep_alive_bytes_) {
    keep_alive_bytes_ = bytes_sent_;
    keep_alive_ns_ = now_ns;
  }
  if (PendingBytes() > 0 || now_ns - keep_alive_ns_ < kKeepAliveNs) return;
  keep_alive_ns_ = now_ns;
  SendFrame(FrameType::kPing, 0, next_ping_++, {});
}

// RecallStream ----------------------------------------------------------------------------------

Result<void> AddHits(std::span<const std::byte> body, uint32_t k, RecallAnswer& answer) {
  if (body.size() < sizeof(ResultBody)) return FailGrammar("a result is too short");
  const auto result = LoadAs<ResultBody>(body.data());
  answer.metric = result.metric;
  answer.snapshot = result.snapshot;
  std::span<const std::byte> rest = body.subspan(sizeof(ResultBody));
  for (uint32_t i = 0; i < result.count; ++i) {
    if (answer.hits.size() >= k) return FailGrammar("a result has more hits than were asked for");
    if (rest.size() < sizeof(HitHeader)) return FailGrammar("a result ends within a hit");
    const auto header = LoadAs<HitHeader>(rest.data());
    const size_t vector_bytes = header.vector_dimension * sizeof(float);
    if (header.hit_bytes > rest.size() || header.hit_bytes < UsedHitBytes(header)) {
      return FailGrammar("a hit's length does not hold what it says");
    }
    const std::byte* vector = rest.data() + sizeof(HitHeader);
    const auto* text = reinterpret_cast<const char*>(vector + vector_bytes);
    RecallHit hit;
    hit.vector.resize(header.vector_dimension);
    if (vector_bytes > 0) std::memcpy(hit.vector.data(), vector, vector_bytes);
    hit.id.assign(text, header.id_bytes);
    hit.score = header.score;
    hit.confidence = header.confidence;
    hit.when_ns = header.when_ns;
    hit.stamp = header.stamp;
    hit.payload_kind = header.payload_kind;
    text += header.id_bytes;
    hit.space.assign(text, header.space_bytes);
    hit.payload.assign(text + header.space_bytes, header.payload_bytes);
    hit.payload_omitted = (header.flags & kHitPayloadOmitted) != 0;
    answer.hits.push_back(std::move(hit));
    rest = rest.subspan(header.hit_bytes);
  }
  return {};
}

uint64_t RecallStream::Send(const RecallQuery& query) {
  CHECK(HasRoom(), "no more recalls are sent than the server takes at once");
  CHECK(query.vector.size() <= kMaxDimension, "a vector has at most 4096 numbers");
  CHECK(query.filter.empty() || connection_->hello().attributes, "the server knows filters");
  CHECK(query.filter.size() <= kMaxFilterBytes, "a filter has at most 4096 bytes");
  CHECK(
      (!query.bound && !query.across && !query.vector.empty()) || connection_->hello().wide_recalls,
      "the server knows bounds, recalls of all spaces, and of the latest");
  const uint64_t request = next_request_++;
  RecallBody body;
  body.k = query.k;
  body.ef = query.ef;
  body.dimension = static_cast<uint16_t>(query.vector.size());
  body.dtype = query.vector.empty() ? VectorDtype::kNone : VectorDtype::kF32;
  const int flags = (query.with_payload ? kFrameFlagWithPayload : 0) |
                    (query.with_vector ? kFrameFlagWithVector : 0) |
                    (query.at_snapshot ? kFrameFlagSnapshot : 0) |
                    (query.filter.empty() ? 0 : kFrameFlagFiltered) |
                    (query.bound ? kFrameFlagBounded : 0) | (query.across ? kFrameFlagAcross : 0);
  connection_->BeginFrame(FrameType::kRecall, static_cast<uint16_t>(flags), request);
  connection_->Append(BytesOf(body));
  connection_->Append(std::as_bytes(query.vector));
  if (query.bound) connection_->Append(BytesOf(*query.bound));
  if (!query.filter.empty()) {
    const auto filter_bytes = static_cast<uint16_t>(query.filter.size());
    connection_->Append(BytesOf(filter_bytes));
    connection_->Append(BytesOf(query.filter));
  }
  connection_->EndFrame();
  Pending& pending = pending_[request];
  pending.k = query.k;
  pending.answer.request = request;
  return request;
}

Result<std::optional<RecallAnswer>> RecallStream::NextAnswer() {
  for (;;) {
    const Result<std::optional<Frame>> next = connection_->NextFrame();
    if (!next) return std::unexpected(next.error());
    if (!next->has_value()) return std::nullopt;
    const Frame& frame = **next;
    const auto found = pending_.find(frame.header.sequence);

    if (frame.header.type == FrameType::kResult) {
      if (found == pending_.end()) return FailGrammar("a result answers no recall");
      Pending& pending = found->second;
      if (pending.answer.first_ns == 0) pending.answer.first_ns = NowNs();
      if (auto added = AddHits(frame.body, pending.k, pending.answer); !added) {
        return std::unexpected(added.error());
      }
      if ((frame.header.flags & kFrameFlagMore) != 0) continue;
    } else if (frame.header.type == FrameType::kNak) {
      Result<Refusal> refusal = ParseNak(frame);
      if (!refusal) return std::unexpected(refusal.error());
      if (refusal->closing() || refusal->refused_type != FrameType::kRecall ||
          found == pending_.end()) {
        return std::unexpected(CheckUnrelatedFrame(frame).error());
      }
      found->second.answer.hits.clear();
      found->second.answer.refusal = *std::move(refusal);
    } else {
      if (auto passed = CheckUnrelatedFrame(frame); !passed) {
        return std::unexpected(passed.error());
      }
      continue;
    }
    RecallAnswer answer = std::move(found->second.answer);
    pending_.erase(found);
    return answer;
  }
}

Result<RecallAnswer> RecallStream::AwaitAnswer(int64_t timeout_ns) {
  const int64_t deadline_ns = NowNs() + timeout_ns;
  for (;;) {
    if (auto flushed = connection_->Flush(); !flushed) return std::unexpected(flushed.error());
    Result<std::optional<RecallAnswer>> answer = NextAnswer();
    if (!answer) return std::unexpected(answer.error());
    if (answer->has_value()) return **std::move(answer);
    const short events = connection_->PendingBytes() > 0 ? POLLIN | POLLOUT : POLLIN;
    if (!WaitFor(connection_->fd(), events, deadline_ns)) {
      return Fail(ErrorCode::kUnavailable, "the server did not answer a recall in time");
    }
    if (auto received = connection_->Receive(); !received) {
      return std::unexpected(received.error());
    }
  }
}

}  // namespace engram
