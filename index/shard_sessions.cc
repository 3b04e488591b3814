#include "index/shard_sessions.h"

#include <algorithm>

#include "src/core/check.h"

namespace engram {

ShardSessions::ShardSessions(uint32_t max_sessions, int64_t idle_timeout_ns, uint64_t seed,
                             ShardId home)
    : sessions_(max_sessions),
      home_(home),
      idle_timeout_ns_(idle_timeout_ns),
      id_secret_(MixBits(~seed)),
      random_(seed) {
  CHECK(max_sessions > 0 && max_sessions <= kMaxSessions, "session limit out of range");
  free_.reserve(max_sessions);
}

Session* ShardSessions::Open(uint32_t space, ProducerId producer, Origin origin, int64_t now_ns) {
  const uint32_t place = FreePlace(now_ns);
  if (place == sessions_.size()) return nullptr;
  Session& session = sessions_[place];
  session = Session();
  session.id = MakeSessionId(DrawRandom(), home_, place);
  session.space = space;
  session.producer = producer;
  session.origin = origin;
  session.last_active_ns = now_ns;
  ++size_;
  return &session;
}

// The generator's numbers alone would not do: from most bits of one its state follows, and with it
// every later id.
uint64_t ShardSessions::DrawRandom() { return MixBits(random_.Next() ^ id_secret_); }

Session* ShardSessions::Find(SessionId id) {
  if (id.value() == 0) return nullptr;
  return At(PlaceOfSession(id), id);
}

void ShardSessions::Detach(Session* session, int64_t now_ns) {
  session->origin = 0;
  session->last_active_ns = now_ns;
  if (session->last_sequence > 0) return;
  session->id = SessionId();
  free_.push_back(PlaceOf(*session));
  --size_;
}

// A place that was given up or never used; else that of the longest idle session without a
// connection; else the table's size.
uint32_t ShardSessions::FreePlace(int64_t now_ns) {
  if (!free_.empty()) {
    const uint32_t place = free_.back();
    free_.pop_back();
    return place;
  }
  if (used_ < sessions_.size()) return used_++;
  Session* oldest = nullptr;
  for (Session& session : sessions_) {
    if (session.id.value() == 0 || session.origin != 0 || session.first_forward != 0 ||
        now_ns - session.last_active_ns < idle_timeout_ns_) {
      continue;
    }
    if (oldest == nullptr || session.last_active_ns < oldest->last_active_ns) oldest = &session;
  }
  if (oldest == nullptr) return static_cast<uint32_t>(sessions_.size());
  oldest->id = SessionId();
  --size_;
  return PlaceOf(*oldest);
}

}  // namespace engram
