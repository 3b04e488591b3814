#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "dataplane/frame_format.h"

// Bodies of frames to views into them, in the receive buffer. Every length is checked against the
// body before it is used; what the numbers mean is the admission gate's business.

namespace engram {

// One observation of an observe frame. Points into the frame.
struct ObservationView {
  ObservationOp op = ObservationOp::kUpsert;
  VectorDtype dtype = VectorDtype::kNone;
  uint16_t dimension = 0;
  float scale = 1;
  float confidence = 1;
  int64_t when_ns = 0;
  const std::byte* vector = nullptr;  // VectorBytes(dtype, dimension) bytes, when those are valid
  std::string_view id;
  std::span<const std::byte> attributes;  // of a sound length; else not looked at
  std::span<const std::byte> payload;
  PayloadKind payload_kind = PayloadKind::kOpaque;  // the frame's
  // What is wrong with the record's numbers, if anything; the views above are empty then.
  RefusalReason fault = RefusalReason::kNone;
};

// Reads the records of an observe body in order.
class ObserveReader {
 public:
  // kBadFrame when any record does not fit the body, or its payloads are of a kind that is not
  // known; nothing of the frame is taken then.
  static RefusalReason Open(std::span<const std::byte> body, ObserveReader* reader);

  uint16_t remaining() const { return remaining_; }
  // Only while remaining() > 0.
  ObservationView Next();

 private:
  const std::byte* next_ = nullptr;
  uint16_t remaining_ = 0;
  PayloadKind payload_kind_ = PayloadKind::kOpaque;
};

struct HelloView {
  HelloBody body;
  std::string_view space;  // never empty: `default` when the client gave none
};
RefusalReason DecodeHello(std::span<const std::byte> body, HelloView* hello);

struct RecallView {
  RecallBody body;
  const std::byte* vector = nullptr;
  std::span<const std::byte> filter;  // sound (attributes.h); empty: none
  bool has_bound = false;
  float bound = 0;
  int64_t at_unix_ns = 0;  // the moment of the snapshot; 0: the latest, where one is asked for
};
// `flags` are the frame's. kBadFrame for a wrong length; kBadDtype, kWrongDimension or kBadRecall
// for wrong numbers, or a bound or a moment that is none; kBadFilter.
RefusalReason DecodeRecall(std::span<const std::byte> body, uint16_t flags, RecallView* recall);

// kBadFrame for a wrong length; kBadFlow for an action that is not known, or a rate that is none.
RefusalReason DecodeFlow(std::span<const std::byte> body, FlowRequestBody* flow);

// kBadFrame for a wrong length; kBadRecall for a limit that is out of bounds.
RefusalReason DecodeScroll(std::span<const std::byte> body, ScrollBody* scroll);

RefusalReason DecodeCheck(std::span<const std::byte> body, CheckBody* check);

RefusalReason DecodeIntrospect(std::span<const std::byte> body, IntrospectWhat* what);

struct CommandView {
  SpaceCommand what = SpaceCommand::kCompact;
  std::string_view space;
};
// kBadFrame for a wrong length or what is not known, kBadSpaceId for what is no name.
RefusalReason DecodeCommand(std::span<const std::byte> body, CommandView* command);

}  // namespace engram
