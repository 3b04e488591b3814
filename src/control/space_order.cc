#include "src/control/space_order.h"

#include <array>
#include <cstring>
#include <string_view>
#include <utility>

#include "src/core/check.h"

namespace engram {

SpaceOrder::~SpaceOrder() {
  if (pipe_ != nullptr) pipe_->Close();
}

void SpaceOrder::Begin(StreamPipe* pipe) {
  pipe_ = pipe;
  SendHello();
}

void SpaceOrder::SendHello() {
  HelloBody hello;
  std::string_view name;
  if (what_ == What::kCreate) {
    name = space_.view();
    hello.metric = metric_;
    hello.dimension = dimension_;
  } else {
    // The command names its space; the connection needs none.
    hello.features = kFeatureNoSession;
  }
  hello.space_bytes = static_cast<uint8_t>(name.size());
  std::vector<std::byte> body(sizeof(hello) + name.size());
  std::memcpy(body.data(), &hello, sizeof(hello));
  std::memcpy(body.data() + sizeof(hello), name.data(), name.size());
  Send({.type = FrameType::kHello}, body);
}

void SpaceOrder::SendCommand() {
  const std::string_view name = space_.view();
  const CommandBody command{.what = SpaceCommand::kDrop,
                            .space_bytes = static_cast<uint8_t>(name.size())};
  std::vector<std::byte> body(sizeof(command) + name.size());
  std::memcpy(body.data(), &command, sizeof(command));
  std::memcpy(body.data() + sizeof(command), name.data(), name.size());
  Send({.type = FrameType::kCommand, .sequence = 1}, body);
}

void SpaceOrder::SendSkip() {
  RecordHeader record;
  record.record_bytes = sizeof(record);
  record.op = ObservationOp::kSkip;
  const ObserveBody observe{.count = 1};
  std::array<std::byte, sizeof(observe) + sizeof(record)> body;
  std::memcpy(body.data(), &observe, sizeof(observe));
  std::memcpy(body.data() + sizeof(observe), &record, sizeof(record));
  Send({.type = FrameType::kObserve, .sequence = 1}, body);
}

void SpaceOrder::Send(FrameHeader header, std::span<const std::byte> body) {
  header.session = session_;
  const std::array<std::span<const std::byte>, 1> parts{body};
  SealFrame(&header, parts);
  const std::array<std::span<const std::byte>, 2> frame{BytesOf(header), body};
  const bool written = pipe_->Write(frame);
  CHECK(written || pipe_->ended(), "a new pipe has room for a few frames");
}

std::optional<SpaceOutcome> SpaceOrder::Look() {
  for (;;) {
    while (came_.size() >= kFrameHeaderBytes) {
      const auto header = LoadAs<FrameHeader>(came_.data());
      const size_t frame_bytes = kFrameHeaderBytes + header.length;
      if (came_.size() < frame_bytes) break;
      const auto body = std::span(came_).subspan(kFrameHeaderBytes, header.length);
      if (auto outcome = See(header, body)) return outcome;
      came_.erase(came_.begin(), came_.begin() + static_cast<ptrdiff_t>(frame_bytes));
    }
    const std::span<const std::byte> bytes = pipe_->Peek();
    if (bytes.empty()) break;
    came_.insert(came_.end(), bytes.begin(), bytes.end());
    pipe_->Consume(bytes.size());
  }
  if (!pipe_->ended()) return std::nullopt;
  const RefusalReason reason = RefusalReason::kShuttingDown;
  return SpaceOutcome{.reason = reason, .text = std::string(DescribeRefusal(reason).text)};
}

std::optional<SpaceOutcome> SpaceOrder::See(const FrameHeader& header,
                                            std::span<const std::byte> body) {
  switch (header.type) {
    case FrameType::kHelloAck: {
      if (what_ == What::kDrop) {
        SendCommand();
        return std::nullopt;
      }
      const auto ack = LoadAs<HelloAckBody>(body.data());
      outcome_.metric = ack.metric;
      outcome_.dimension = ack.dimension;
      session_ = header.session;
      SendSkip();
      return std::nullopt;
    }
    case FrameType::kAck:
      // The number is settled, and with it that there is such a space.
      if (header.sequence == 0) return std::nullopt;
      return std::exchange(outcome_, {});
    case FrameType::kCommandDone:
      return SpaceOutcome{.observations = LoadAs<CommandDoneBody>(body.data()).observations};
    case FrameType::kNak: {
      const auto nak = LoadAs<NakBody>(body.data());
      // The number that is meant to be used up.
      if ((nak.flags & kNakFlagConsumed) != 0) return std::nullopt;
      const auto* text = reinterpret_cast<const char*>(body.data() + sizeof(nak));
      return SpaceOutcome{.reason = nak.reason,
                          .retry_after_ms = nak.retry_after_ms,
                          .text = std::string(text, nak.text_bytes)};
    }
    default:
      return std::nullopt;
  }
}

}  // namespace engram
