#pragma once

#include <cstdint>
#include <vector>

#include "src/core/hash.h"
#include "src/core/ids.h"
#include "src/core/refusal_reason.h"
#include "src/core/session_id.h"
#include "src/core/shard_port.h"

namespace engram {

// One client's session at its home shard (DESIGN, principle 4).
struct Session {
  SessionId id;                   // 0: the place is free
  uint32_t space = 0;             // index of the space in the shard
  ProducerId producer;            // of the connection that holds it
  Origin origin = 0;              // that connection; 0: none, the session may be resumed
  Sequence last_sequence = 0;     // taken: stored, under way to its owner, or refused for good
  Sequence told_sequence = 0;     // of those, the last that was answered
  uint64_t granted_sequence = 0;  // the client may send up to this one
  int64_t last_active_ns = 0;
  // Tickets in the ForwardLedger; 0: all that was taken is answered.
  uint64_t first_forward = 0;
  uint64_t last_forward = 0;
};

// The sessions of a shard, in memory. A session's id names its place here (session_id.h), so
// finding one is one comparison; ids cannot be guessed, also not from other ids.
//
// Thread safety: the shard's alone. Takes no memory after construction.
// Invariants: at most `max_sessions`; attached sessions, and those with forwards under way, are
// never evicted.
class ShardSessions {
 public:
  static constexpr uint32_t kMaxSessions = kMaxSessionPlaces;

  // `seed` is secret and different at each start.
  ShardSessions(uint32_t max_sessions, int64_t idle_timeout_ns, uint64_t seed,
                ShardId home = ShardId(0));

  // A new session, attached. Where the table is full the longest idle one that has no connection
  // gives way. nullptr when there is none.
  Session* Open(uint32_t space, ProducerId producer, Origin origin, int64_t now_ns);
  // Its connection is gone. A session that took nothing is forgotten at once, as there is nothing
  // to resume.
  void Detach(Session* session, int64_t now_ns);
  // nullptr when `id` is not, or no longer, known.
  Session* Find(SessionId id);
  uint32_t PlaceOf(const Session& session) const {
    return static_cast<uint32_t>(&session - sessions_.data());
  }
  // The session at `place`, if it still is `id`.
  Session* At(uint32_t place, SessionId id) {
    if (place >= sessions_.size() || sessions_[place].id != id) return nullptr;
    return &sessions_[place];
  }

  // Sessions of `space` that have a connection.
  template <typename Visit>
  void ForEachAttached(uint32_t space, Visit&& visit) {
    for (uint32_t place = 0; place < used_; ++place) {
      Session& session = sessions_[place];
      if (session.id.value() != 0 && session.space == space && session.origin != 0) {
        visit(session);
      }
    }
  }

  uint32_t size() const { return size_; }

 private:
  uint32_t FreePlace(int64_t now_ns);
  uint64_t DrawRandom();

  std::vector<Session> sessions_;
  std::vector<uint32_t> free_;  // places given up
  uint32_t used_ = 0;           // places ever used
  uint32_t size_ = 0;
  const ShardId home_;
  const int64_t idle_timeout_ns_;
  const uint64_t id_secret_;
  SplitMix64 random_;
};

}  // namespace engram
