#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "dataplane/decoder.h"
#include "src/core/attributes.h"
#include "src/core/shard_port.h"

// Between decoding and routing: says what may enter, and makes the one copy into a slot.

namespace engram {

// Largest request: header, a 4,096-d f32 vector, id, attributes and payload.
inline constexpr size_t kMaxSlotBytes =
    (kRequestBodyOffset + kMaxDimension * sizeof(float) + kMaxIdBytes + kMaxAttributesBytes +
     kMaxPayloadBytes + 63) /
    64 * 64;

// What the connection knows of its space.
struct SpaceRules {
  Metric metric = Metric::kUnspecified;
  uint16_t dimension = 0;  // 0: not known yet, the shard decides
};

// Bytes of slot that `view` takes.
size_t SlotBytesFor(const ObservationView& view);
size_t SlotBytesFor(const RecallView& recall);

// Copies `view` into the slot at `slot` and checks it on the way. Where it may not enter, the slot
// becomes a kSkip that carries the reason, so that the shard settles its sequence number in order.
// Session, sequence and origin are the caller's to fill in. Returns the reason (kNone: it may
// enter).
RefusalReason AdmitObservation(const ObservationView& view, const SpaceRules& rules,
                               std::byte* slot);

// Copies a recall into the slot at `slot`. The reason it is refused for, if any.
RefusalReason AdmitRecall(const RecallView& view, const SpaceRules& rules, std::byte* slot);

}  // namespace engram
