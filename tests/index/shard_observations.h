#pragma once

#include <string>
#include <utility>
#include <vector>

#include "tests/index/shard_rig.h"

// What the tests of one shard send it.

namespace engram {

inline constexpr RefusalReason kNone = RefusalReason::kNone;

inline Observation Upsert(const std::string& id, std::vector<float> vector,
                          std::string payload = "") {
  return {.id = id, .vector = std::move(vector), .payload = std::move(payload)};
}
inline Observation Remove(const std::string& id) {
  return {.op = ObservationOp::kDelete, .id = id};
}
inline Observation Skip(RefusalReason reason) {
  return {.op = ObservationOp::kSkip, .skip_reason = reason};
}

}  // namespace engram
