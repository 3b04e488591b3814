#pragma once

#include <cstddef>
#include <cstdint>
#include <expected>
#include <optional>
#include <vector>

#include "src/core/hash.h"
#include "src/core/huge_page_arena.h"
#include "src/core/ids.h"
#include "src/core/refusal_reason.h"
#include "src/core/result.h"
#include "src/core/session_id.h"
#include "src/core/shard_port.h"

namespace engram {

// One client's session at its home shard (DESIGN, principle 4), while it is active.
struct Session {
  SessionId id;                   // 0: the place is free
  uint32_t space = 0;             // index of the space in the shard
  ProducerId producer;            // of the connection that holds it
  Origin origin = 0;              // that connection; 0: none, the session may be resumed
  Sequence last_sequence = 0;     // taken: stored, under way to its owner, or refused for good
  Sequence told_sequence = 0;     // of those, the last that was answered
  uint64_t granted_sequence = 0;  // the client may send up to this one
  int64_t last_active_ns = 0;     // monotonic; written by the table (Touch)
  // Tickets in the ForwardLedger; 0: all that was taken is answered.
  uint64_t first_forward = 0;
  uint64_t last_forward = 0;
};

struct SessionTableOptions {
  uint32_t max_sessions = 10'000;    // active, 1 to kMaxSessionPlaces
  uint32_t max_dormant = 1'000'000;  // at least 1
  int64_t idle_timeout_ns = 0;       // without a connection for so long: may become dormant
  int64_t keep_ns = 0;               // inactive for so long: forgotten
  int64_t unix_ns = 0;               // the wall clock now
  uint64_t seed = 0;                 // secret and different at each start
  ShardId home;
};

// The sessions of a shard, in two tiers.
//
// 1. Active: at most `max_sessions`, a Session each, at a place that does not change while it is
//    active. Producers name the place, so that the next observation is found with one comparison
//    (At).
// 2. Dormant: those that had no connection for `idle_timeout_ns`, at most `max_dormant`, for
//    `keep_ns` of the wall clock from when they were last active. Only what a resume needs is
//    kept. Where there are too many, one that was active longest ago is forgotten (to within a
//    thousandth of keep_ns).
//
// A session that is known has one record (32 bytes, see Record), in both tiers the same, and a hash
// finds it by id. The place inside an id says nothing about where its session is: sessions of
// several shards come together here when the number of shards has changed. A session that has taken
// nothing is forgotten with its connection, as there is nothing to resume.
//
// Times: `now_ns` is monotonic and `unix_ns` the wall clock, of the same moment. A dormant session
// keeps the second in which it was last active, rounded up: it is never forgotten too early.
//
// Memory: max_sessions * (sizeof(Session) + 8) + (max_sessions + max_dormant) * 32 bytes and a hash
// of 6 to 12 bytes for each of these, as address space at construction; what is never used stays
// with the kernel.
//
// Thread safety: the shard's alone. Takes no memory after construction.
// Invariants: a session with a connection, or with forwards under way, stays active; a record stays
// where it is while its session is known, whatever the tier; no id is there twice.
class SessionTable {
 public:
  explicit SessionTable(const SessionTableOptions& options);

  // A new session, attached. Where no place is free, the longest idle one becomes dormant for it.
  // nullptr where none is idle long enough.
  Session* Open(uint32_t space, ProducerId producer, Origin origin, int64_t now_ns,
                int64_t unix_ns);
  // The space of a session that may be resumed.
  std::optional<uint32_t> SpaceOf(SessionId id, int64_t unix_ns) const;
  // An active session as it is, or a dormant one made active: with no connection, and all that it
  // took answered. kSessionExpired: not, or no longer, known; kSessionLimit: no place is free.
  std::expected<Session*, RefusalReason> Resume(SessionId id, int64_t now_ns, int64_t unix_ns);
  // The connection that holds it from now on; `origin` is not 0.
  void Attach(Session* session, ProducerId producer, Origin origin, int64_t now_ns);
  // Its connection is gone. A session that took nothing is forgotten at once.
  void Detach(Session* session, int64_t now_ns);
  // It does something now.
  void Touch(Session* session, int64_t now_ns) {
    session->last_active_ns = now_ns;
    if (session->origin == 0) MoveToNewest(session);
  }

  // The active session of this id; nullptr when there is none.
  Session* Find(SessionId id);
  uint32_t PlaceOf(const Session& session) const {
    return static_cast<uint32_t>(&session - sessions_.data());
  }
  // The session at `place`, if it still is `id`.
  Session* At(uint32_t place, SessionId id) {
    if (place >= sessions_.size() || sessions_[place].id != id) return nullptr;
    return &sessions_[place];
  }

  // Active sessions of `space` that have a connection.
  template <typename Visitor>
  void ForEachAttached(uint32_t space, Visitor&& visit) {
    for (uint32_t place = 0; place < used_places_; ++place) {
      Session& session = sessions_[place];
      if (session.id.value() != 0 && session.space == space && session.origin != 0) {
        visit(session);
      }
    }
  }

  // For recovery: the session had taken `last_sequence` at that time. Makes it known, as a dormant
  // one, or raises what is known of it; lowers nothing. Without an id or a sequence there is
  // nothing to restore.
  void Restore(SessionId id, uint32_t space, Sequence last_sequence, int64_t last_active_unix_ns);

  // For checkpoints: calls `visit(id, space, last_sequence, last_active_unix_ns)` for the sessions
  // that have taken something, both tiers, from *cursor (at first 0) on, looking at no more than
  // `limit` records. *cursor is then where to go on, or 0 when that was the last part. Returns how
  // many were visited. A session that is known throughout is visited once, also if it changes the
  // tier between two parts, as its record stays where it is; one that comes or goes meanwhile is
  // visited once or not at all. With a connection a session is active now, whenever it last took
  // something. `visit` may look at the table, and changes nothing in it.
  template <typename Visitor>
  size_t Visit(uint64_t* cursor, size_t limit, Visitor&& visit) const {
    size_t visited = 0;
    const uint32_t end = EndOfPart(cursor, limit);
    for (uint32_t record = static_cast<uint32_t>(*cursor); record < end; ++record) {
      const Sequence last_sequence = LastSequenceOf(record);
      if (last_sequence == 0) continue;
      visit(records_[record].id, uint32_t{records_[record].space}, last_sequence,
            LastActiveUnixNs(record));
      ++visited;
    }
    *cursor = end < next_record_ ? end : 0;
    return visited;
  }

  // Makes idle sessions dormant and forgets expired ones, `max_steps` at most. True when nothing of
  // this is left to do now. Due a hundred times in keep_ns at least, for ages to be told apart.
  bool Sweep(int64_t now_ns, int64_t unix_ns, size_t max_steps);

  // Forgets the sessions of a space that was dropped, in parts as Visit; returns how many. Those
  // that have a connection or forwards under way stay: end these first.
  size_t ForgetSpace(uint32_t space, uint64_t* cursor, size_t limit);

  uint32_t size() const { return size_; }  // active ones
  uint32_t dormant() const { return dormant_; }
  // Address space taken at construction for a session of each tier, on average.
  double bytes_per_active() const;
  double bytes_per_dormant() const;

  // Slow.
  Result<void> CheckInvariants() const;

 private:
  // All zero: free.
  struct Record {
    SessionId id;
    uint64_t last_sequence = 0;  // dormant; while active the place of the Session
    uint32_t space : 31 = 0;
    uint32_t is_active : 1 = 0;
    uint32_t last_active_s = 0;  // dormant: in seconds since 1970, rounded up
    // Neighbours in a ring of records: the active ones without a connection, or the dormant ones of
    // an age. `newer` is also the next free record.
    uint32_t newer = 0;
    uint32_t older = 0;
  };
  static_assert(sizeof(Record) == 32);

  // Ages are told apart by a thousandth of keep_ns; some more for a clock that was set back, or
  // forth since the last sweep.
  static constexpr uint32_t kAgesKept = 1'000;
  static constexpr uint32_t kAges = 1'024;
  // Record 0 is none; the heads of the rings come next.
  static constexpr uint32_t kIdleRing = 1;
  static constexpr uint32_t kFirstAgeRing = 2;
  static constexpr uint32_t kFirstRecord = kFirstAgeRing + kAges;

  uint32_t FindRecord(SessionId id) const;
  size_t SlotOf(SessionId id) const { return id.value() * 0x9E3779B97F4A7C15 >> index_shift_; }
  Result<void> CheckRing(uint32_t ring, std::vector<bool>* linked) const;
  uint32_t AddRecord(SessionId id, uint32_t space);
  void RemoveRecord(uint32_t record);
  void Link(uint32_t ring, uint32_t record);
  void Unlink(uint32_t record);
  void MoveToNewest(Session* session);
  uint32_t AgeRing(uint32_t last_active_s) const;

  uint32_t TakePlace(int64_t now_ns);
  Session* Occupy(uint32_t place, uint32_t record);
  void GiveUpPlace(Session* session);
  Session* SessionOf(uint32_t record) { return &sessions_[records_[record].last_sequence]; }
  const Session& SessionOf(uint32_t record) const {
    return sessions_[records_[record].last_sequence];
  }
  bool RetireOneIdle(int64_t now_ns);
  void KeepDormant(uint32_t record, Sequence last_sequence, uint32_t last_active_s);
  void ForgetDormant(uint32_t record);
  void ForgetOldestDormant();
  bool HasExpired(uint32_t record, int64_t unix_ns) const;
  bool ForgetExpired(int64_t unix_ns, size_t max_steps);
  Sequence LastSequenceOf(uint32_t record) const;
  int64_t LastActiveUnixNs(uint32_t record) const;
  uint32_t EndOfPart(uint64_t* cursor, size_t limit) const;
  void NoteTime(int64_t now_ns, int64_t unix_ns);
  uint64_t DrawRandom();

  // Constant after construction.
  const SessionTableOptions options_;
  const uint32_t age_s_;  // of a ring
  const uint32_t record_limit_;
  const size_t index_mask_;
  const unsigned index_shift_;
  const uint64_t id_secret_;

  std::vector<Session> sessions_;      // by place
  std::vector<uint32_t> record_of_;    // by place
  std::vector<uint32_t> free_places_;  // given up
  uint32_t used_places_ = 0;           // ever used
  HugePageArena arena_;                // of the next two
  Record* const records_;
  uint32_t* const index_;  // open addressing by SlotOf, linear; record, 0: none
  uint32_t next_record_ = kFirstRecord;
  uint32_t free_record_ = 0;
  uint32_t size_ = 0;
  uint32_t dormant_ = 0;
  uint64_t oldest_age_ = 0;  // of the rings, in units of age_s_ since 1970
  int64_t unix_ns_ = 0;      // when the time was last told
  int64_t wall_offset_ns_ = 0;
  SplitMix64 random_;
};

}  // namespace engram
