#include "tests/sim/durable_model.h"

#include <algorithm>
#include <array>
#include <utility>

namespace engram {

std::string IdText(size_t space, size_t id) {
  std::string text = std::to_string(space);
  text += "-id";
  text += std::to_string(id);
  return text;
}

std::string Describe(const Operation& operation) {
  static constexpr std::array<const char*, 6> kNames{"?",    "upsert",   "delete",
                                                     "skip", "suppress", "restore"};
  return "#" + std::to_string(operation.number) + " client " + std::to_string(operation.client) +
         " seq " + std::to_string(operation.sequence) + " " +
         kNames[static_cast<size_t>(operation.op)] + (operation.invalid ? " (invalid)" : "") +
         " s" + std::to_string(operation.space) + "-id" + std::to_string(operation.id) +
         " payload " + std::to_string(operation.payload.size());
}

std::string Brief(const std::string& payload) {
  return payload.empty() ? "nothing" : payload.substr(0, payload.find(':'));
}

bool Happened(const Operation& operation) { return operation.status == Status::kCertain; }

bool MayHaveHappened(const Operation& operation) {
  return operation.status == Status::kCertain || operation.status == Status::kOut ||
         operation.status == Status::kMaybe;
}

bool IsAfter(const Operation& later, const Operation& earlier) {
  // Only operations of a session have such a number.
  if (later.client == earlier.client && later.sequence != 0 && earlier.sequence != 0) {
    return later.sequence > earlier.sequence;
  }
  return later.sent_at > earlier.acked_at;
}

Content Apply(const Operation& operation, Content content) {
  switch (operation.op) {
    case ObservationOp::kUpsert:
      return {operation.payload, false};
    case ObservationOp::kDelete:
      return {};
    case ObservationOp::kSuppress:
      if (!content.payload.empty()) content.hidden = true;
      return content;
    case ObservationOp::kRestore:
      content.hidden = false;
      return content;
    case ObservationOp::kSkip:
      break;
  }
  return content;
}

std::set<Content> PossibleContents(const IdState& id) {
  std::set<Content> possible;
  if (id.in_turn) {
    possible.insert(id.base);
    for (const Operation* operation : id.operations) {
      if (!MayHaveHappened(*operation)) continue;
      std::set<Content> after;
      for (const Content& content : possible) after.insert(Apply(*operation, content));
      if (!Happened(*operation)) after.insert(possible.begin(), possible.end());
      possible = std::move(after);
    }
    return possible;
  }
  const auto superseded = [&](const Operation* operation) {
    return std::ranges::any_of(id.operations, [&](const Operation* later) {
      return later != operation && Happened(*later) &&
             (operation == nullptr || IsAfter(*later, *operation));
    });
  };
  if (!superseded(nullptr)) possible.insert(id.base);
  for (const Operation* operation : id.operations) {
    if (MayHaveHappened(*operation) && !superseded(operation)) {
      possible.insert(Apply(*operation, {}));
    }
  }
  return possible;
}

size_t CountOut(const Client& client) {
  size_t out = 0;
  for (const Operation* operation : client.operations) {
    out += static_cast<size_t>(operation->outstanding);
  }
  return out;
}

}  // namespace engram
