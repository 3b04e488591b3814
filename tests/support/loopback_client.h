#pragma once

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dataplane/frame_format.h"
#include "src/core/hash.h"

namespace engram {

// Frames over a socket of this machine that never waits, driven by the same thread as the
// appliance: one session in the space that a hello without a name gets, observations and recalls
// with random vectors.
class LoopbackClient {
 public:
  LoopbackClient(uint16_t port, uint16_t dimension, size_t payload_bytes)
      : dimension_(dimension),
        payload_(payload_bytes, 'p'),
        fd_(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address));
    incoming_.resize(size_t{4} << 20);
    HelloBody hello;
    hello.metric = Metric::kL2;
    Queue({.type = FrameType::kHello}, BytesOf(hello));
  }
  LoopbackClient(const LoopbackClient&) = delete;
  LoopbackClient& operator=(const LoopbackClient&) = delete;
  ~LoopbackClient() { close(fd_); }

  // Observations `first`, first + 1, ...: the number is in the id, and is the sequence.
  void QueueObserve(uint64_t first, size_t count) {
    std::vector<std::byte> body;
    const auto append = [&](std::span<const std::byte> bytes) {
      body.insert(body.end(), bytes.begin(), bytes.end());
    };
    append(BytesOf(ObserveBody{.count = static_cast<uint16_t>(count)}));
    for (size_t i = 0; i < count; ++i) {
      const std::string id = "id" + std::to_string(first + i);
      const std::vector<float> vector = RandomVector();
      RecordHeader record;
      record.dtype = VectorDtype::kF32;
      record.dimension = dimension_;
      record.id_bytes = static_cast<uint16_t>(id.size());
      record.payload_bytes = static_cast<uint32_t>(payload_.size());
      record.record_bytes = static_cast<uint32_t>(
          RecordBytes(dimension_ * sizeof(float), id.size(), payload_.size()));
      const size_t begin = body.size();
      append(BytesOf(record));
      append(std::as_bytes(std::span(vector)));
      append(BytesOf(std::string_view(id)));
      append(BytesOf(std::string_view(payload_)));
      body.resize(begin + record.record_bytes);
    }
    Queue({.type = FrameType::kObserve, .session = session, .sequence = first}, body);
  }
  void QueueRecall(uint32_t k, uint16_t flags) {
    RecallBody recall;
    recall.k = k;
    recall.dimension = dimension_;
    recall.dtype = VectorDtype::kF32;
    const std::vector<float> vector = RandomVector();
    std::vector<std::byte> body(sizeof(recall) + dimension_ * sizeof(float));
    std::memcpy(body.data(), &recall, sizeof(recall));
    std::memcpy(body.data() + sizeof(recall), vector.data(), dimension_ * sizeof(float));
    Queue({.type = FrameType::kRecall, .flags = flags, .sequence = ++recalls}, body);
  }

  // Sends and receives what goes without waiting. `take` gets each frame's header and body.
  template <typename Take>
  void Step(Take&& take) {
    if (sent_ < outgoing_.size()) {
      const ssize_t n = send(fd_, outgoing_.data() + sent_, outgoing_.size() - sent_, MSG_NOSIGNAL);
      if (n > 0) sent_ += static_cast<size_t>(n);
      if (sent_ == outgoing_.size()) {
        outgoing_.clear();
        sent_ = 0;
      }
    }
    const ssize_t n = recv(fd_, incoming_.data() + filled_, incoming_.size() - filled_, 0);
    if (n > 0) filled_ += static_cast<size_t>(n);
    size_t at = 0;
    while (filled_ - at >= kFrameHeaderBytes) {
      const auto header = LoadAs<FrameHeader>(incoming_.data() + at);
      const size_t bytes = kFrameHeaderBytes + header.length;
      if (filled_ - at < bytes) break;
      if (header.type == FrameType::kHelloAck) session = header.session;
      if (header.type == FrameType::kAck) acked = header.sequence;
      if (header.type == FrameType::kResult && (header.flags & kFrameFlagMore) == 0) ++results;
      if (header.type == FrameType::kNak) ++naks;
      take(header,
           std::span<const std::byte>(incoming_.data() + at + kFrameHeaderBytes, header.length));
      at += bytes;
    }
    std::memmove(incoming_.data(), incoming_.data() + at, filled_ - at);
    filled_ -= at;
  }

  uint64_t session = 0;  // 0: the hello is not answered yet
  uint64_t acked = 0;    // the last sequence that was
  uint64_t recalls = 0;  // that were queued
  uint64_t results = 0;  // of these, answered in full
  uint64_t naks = 0;

 private:
  void Queue(FrameHeader header, std::span<const std::byte> body) {
    const std::span<const std::byte> parts[] = {body};
    SealFrame(&header, parts);
    const auto bytes = BytesOf(header);
    outgoing_.insert(outgoing_.end(), bytes.begin(), bytes.end());
    outgoing_.insert(outgoing_.end(), body.begin(), body.end());
  }
  std::vector<float> RandomVector() {
    std::vector<float> vector(dimension_);
    for (float& number : vector) number = static_cast<float>(random_.Below(1000)) / 1000;
    return vector;
  }

  const uint16_t dimension_;
  const std::string payload_;
  const int fd_;
  SplitMix64 random_{1};
  std::vector<std::byte> outgoing_;
  size_t sent_ = 0;
  std::vector<std::byte> incoming_;
  size_t filled_ = 0;
};

}  // namespace engram
