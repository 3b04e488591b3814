#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "tests/index/shard_rig.h"

// What the programs of durable_program.h know of what they have sent: what was acknowledged, what
// may have happened, and what an id may so hold.

namespace engram {

inline constexpr size_t kDimension = 4;
inline constexpr uint64_t kNever = UINT64_MAX;

enum class Status : uint8_t {
  kPending,  // it was not taken, and is going to be sent again
  kOut,      // under way
  kCertain,  // acknowledged, or a resumed session says that it was taken
  kMaybe,    // without a session, under way in a crash
  kDead,     // it was not taken, and never will be
};

struct Operation {
  ObservationOp op = ObservationOp::kUpsert;
  uint64_t number = 0;
  size_t space = 0;
  size_t id = 0;
  std::string payload{};
  std::vector<float> vector{};
  bool invalid = false;  // uses up its number
  RefusalReason skip_reason = RefusalReason::kNone;
  size_t client = 0;
  Sequence sequence = 0;
  Status status = Status::kPending;
  int outstanding = 0;
  bool acked = false;
  uint64_t sent_at = 0;
  uint64_t acked_at = kNever;
};

// What an id holds: nothing, or a payload, which may be hidden.
struct Content {
  std::string payload;
  bool hidden = false;
  auto operator<=>(const Content&) const = default;
  bool is_live() const { return !payload.empty() && !hidden; }
};

struct IdState {
  // One operation after the other, suppress and restore among them; else
  // upserts and deletes of several clients meet.
  bool in_turn = false;
  Content base;
  std::vector<Operation*> operations;  // since then
};

struct ModelSpace {
  std::string name;
  SpaceSettings settings;
  std::vector<IdState> ids;
  std::map<std::string, std::vector<float>> vectors;  // by payload
};

struct Client {
  bool in_session = true;
  size_t space = 0;
  RigSession session;
  bool attached = false;
  std::vector<Operation*> operations;  // by sequence - 1
  Sequence settled = 0;
  Sequence next = 1;
  Sequence floor = 0;    // a resume must not say less,
  Sequence durable = 0;  // whatever happens
  bool goes_back = false;
  uint64_t wait_until = 0;
  std::vector<Operation*> out;  // without a session; in the order of their numbers
};

std::string IdText(size_t space, size_t id);
std::string Describe(const Operation& operation);
// Of a payload, whose number stands before its colon.
std::string Brief(const std::string& payload);

bool Happened(const Operation& operation);
bool MayHaveHappened(const Operation& operation);
// `later` was taken after `earlier`, for sure.
bool IsAfter(const Operation& later, const Operation& earlier);

Content Apply(const Operation& operation, Content content);
std::set<Content> PossibleContents(const IdState& id);

// Times that an operation of the client's is under way.
size_t CountOut(const Client& client);

}  // namespace engram
