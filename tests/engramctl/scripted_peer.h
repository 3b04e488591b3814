#pragma once

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dataplane/frame_format.h"
#include "src/core/check.h"
#include "tools/clients/cpp/engram_client.h"

namespace engram {

using Bytes = std::vector<std::byte>;

inline void AppendBytes(Bytes& to, std::span<const std::byte> bytes) {
  to.insert(to.end(), bytes.begin(), bytes.end());
}

// A frame as the peer received it.
struct PeerFrame {
  FrameHeader header;
  Bytes body;
};

// An observation record of an observe frame.
struct PeerRecord {
  uint64_t sequence = 0;
  RecordHeader header;
  Bytes vector;
  std::string id;
  std::string attributes;
  std::string payload;
};

// The server's end of a socket pair, in the hands of the test: it reads what the client has sent
// and answers whatever the test wants, also nonsense. Both ends live in one thread; the kernel's
// buffers hold what is under way.
class ScriptedPeer {
 public:
  static constexpr uint64_t kSession = 77;
  uint32_t features = 0;  // that it grants

  ScriptedPeer() {
    int fds[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0, "socketpair works");
    client_ = UniqueFd(fds[0]);
    server_ = UniqueFd(fds[1]);
    CHECK(fcntl(fds[1], F_SETFL, O_NONBLOCK) == 0, "the socket can be made nonblocking");
  }

  // The client's end, once.
  Connection Client() { return Connection::Adopt(std::move(client_)); }

  void SendRaw(std::span<const std::byte> bytes) {
    const ssize_t sent = send(server_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    CHECK(sent == static_cast<ssize_t>(bytes.size()), "the kernel's buffer holds a test's answers");
  }
  void Send(FrameType type, uint16_t flags, uint64_t sequence, const Bytes& body) {
    SendRaw(Framed(type, flags, sequence, body));
  }
  static Bytes Framed(FrameType type, uint16_t flags, uint64_t sequence, const Bytes& body) {
    FrameHeader header;
    header.type = type;
    header.flags = flags;
    header.session = kSession;
    header.sequence = sequence;
    SealFrame(&header, {{std::span<const std::byte>(body)}});
    Bytes frame;
    AppendBytes(frame, BytesOf(header));
    AppendBytes(frame, body);
    return frame;
  }

  void SendHelloAck(uint64_t last_sequence, uint64_t credit,
                    uint32_t max_frame_bytes = kMaxFrameBodyBytes, uint32_t max_recalls = 4) {
    HelloAckBody body;
    body.features = features;
    body.dimension = 2;
    body.metric = Metric::kCosine;
    body.credit = credit;
    body.max_frame_bytes = max_frame_bytes;
    body.max_recalls = max_recalls;
    Send(FrameType::kHelloAck, 0, last_sequence, ToBytes(BytesOf(body)));
  }
  void SendAck(uint64_t sequence, uint64_t credit) {
    Send(FrameType::kAck, 0, sequence, ToBytes(BytesOf(AckBody{.credit = credit})));
  }
  void SendNak(const NakBody& nak, uint64_t sequence, std::string_view text = "") {
    NakBody body = nak;
    body.text_bytes = static_cast<uint16_t>(text.size());
    Bytes bytes = ToBytes(BytesOf(body));
    AppendBytes(bytes, BytesOf(text));
    Send(FrameType::kNak, 0, sequence, bytes);
  }
  void Close() { server_ = UniqueFd(); }

  // Reads what has arrived; the next whole frame, or nothing.
  std::optional<PeerFrame> NextFrame() {
    std::byte chunk[65'536];
    for (;;) {
      const ssize_t got = recv(server_.get(), chunk, sizeof(chunk), 0);
      if (got <= 0) break;
      AppendBytes(in_, {chunk, static_cast<size_t>(got)});
    }
    if (in_.size() < kFrameHeaderBytes) return std::nullopt;
    PeerFrame frame;
    CHECK(CheckFrameHeader(in_.data(), &frame.header) == RefusalReason::kNone,
          "the client sends good headers");
    const size_t frame_bytes = kFrameHeaderBytes + frame.header.length;
    if (in_.size() < frame_bytes) return std::nullopt;
    CHECK(CheckFrameCrc(frame.header, std::span<const std::byte>(in_).first(frame_bytes)) ==
              RefusalReason::kNone,
          "the client seals its frames");
    frame.body.assign(in_.begin() + kFrameHeaderBytes,
                      in_.begin() + static_cast<ptrdiff_t>(frame_bytes));
    in_.erase(in_.begin(), in_.begin() + static_cast<ptrdiff_t>(frame_bytes));
    return frame;
  }

  // Records of all observe frames that have arrived, in order; other frames are passed over.
  std::vector<PeerRecord> TakeRecords() {
    std::vector<PeerRecord> records;
    while (const auto frame = NextFrame()) {
      if (frame->header.type == FrameType::kObserve) TakeRecordsOf(*frame, records);
    }
    return records;
  }

  static void TakeRecordsOf(const PeerFrame& frame, std::vector<PeerRecord>& records) {
    const auto body = LoadAs<ObserveBody>(frame.body.data());
    size_t at = sizeof(ObserveBody);
    for (uint16_t i = 0; i < body.count; ++i) {
      PeerRecord record;
      record.sequence = frame.header.sequence + i;
      record.header = LoadAs<RecordHeader>(frame.body.data() + at);
      const size_t vector_bytes = VectorBytes(record.header.dtype, record.header.dimension);
      CHECK(record.header.record_bytes == RecordBytes(vector_bytes, record.header.id_bytes,
                                                      record.header.payload_bytes,
                                                      record.header.attribute_bytes),
            "a record's length is that of its parts, padded");
      const std::byte* part = frame.body.data() + at + sizeof(RecordHeader);
      record.vector.assign(part, part + vector_bytes);
      part += vector_bytes;
      record.id.assign(reinterpret_cast<const char*>(part), record.header.id_bytes);
      part += record.header.id_bytes;
      record.attributes.assign(reinterpret_cast<const char*>(part), record.header.attribute_bytes);
      part += record.header.attribute_bytes;
      record.payload.assign(reinterpret_cast<const char*>(part), record.header.payload_bytes);
      at += record.header.record_bytes;
      records.push_back(std::move(record));
    }
    CHECK(at == frame.body.size(), "records fill their frame");
  }

  static Bytes ToBytes(std::span<const std::byte> bytes) { return {bytes.begin(), bytes.end()}; }

 private:
  UniqueFd client_;
  UniqueFd server_;
  Bytes in_;
};

}  // namespace engram
