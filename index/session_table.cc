#include "index/session_table.h"

#include <algorithm>
#include <bit>
#include <string>
#include <utility>

#include "src/core/check.h"
#include "src/core/clock.h"

namespace engram {

namespace {

// Zeroed. What is not touched stays with the kernel, so a large limit costs nothing until it is
// used.
HugePageArena Reserve(size_t bytes) {
  auto arena = HugePageArena::Create({.reserve_bytes = bytes, .huge_pages = HugePagePolicy::kOff});
  CHECK(arena.has_value(), "no address space for the table of sessions; lower its limits");
  return *std::move(arena);
}

uint32_t SecondsRoundedUp(int64_t unix_ns) {
  const int64_t seconds = (std::max(unix_ns, int64_t{0}) + kNanosPerSecond - 1) / kNanosPerSecond;
  return static_cast<uint32_t>(std::min(seconds, int64_t{UINT32_MAX}));
}

std::unexpected<Error> Unsound(uint32_t record, const std::string& what) {
  return Fail(ErrorCode::kInternal, "session record " + std::to_string(record) + ": " + what);
}

}  // namespace

SessionTable::SessionTable(const SessionTableOptions& options)
    : options_(options),
      age_s_(static_cast<uint32_t>(
          std::clamp<int64_t>(options.keep_ns / kNanosPerSecond / kAgesKept, 1, UINT32_MAX))),
      record_limit_(kFirstRecord + options.max_sessions + options.max_dormant + 1),
      index_mask_(std::bit_ceil(uint64_t{record_limit_} * 3 / 2) - 1),
      index_shift_(64 - static_cast<unsigned>(std::popcount(index_mask_))),
      id_secret_(MixBits(~options.seed)),
      sessions_(options.max_sessions),
      record_of_(options.max_sessions),
      arena_(Reserve(record_limit_ * sizeof(Record) + (index_mask_ + 1) * sizeof(uint32_t))),
      records_(reinterpret_cast<Record*>(
          arena_.Allocate(record_limit_ * sizeof(Record), sizeof(Record)))),
      index_(reinterpret_cast<uint32_t*>(
          arena_.Allocate((index_mask_ + 1) * sizeof(uint32_t), sizeof(uint32_t)))),
      random_(options.seed) {
  CHECK(options.max_sessions > 0 && options.max_sessions <= kMaxSessionPlaces,
        "session limit out of range");
  CHECK(options.max_dormant > 0 && options.max_dormant < 1u << 31, "session limit out of range");
  CHECK(options.keep_ns >= 0 && options.idle_timeout_ns >= 0, "a time is not negative");
  free_places_.reserve(options.max_sessions);
  for (uint32_t ring = kIdleRing; ring < kFirstRecord; ++ring) {
    records_[ring].newer = ring;
    records_[ring].older = ring;
  }
  oldest_age_ = static_cast<uint64_t>(std::max(options.unix_ns - options.keep_ns, int64_t{0})) /
                kNanosPerSecond / age_s_;
  unix_ns_ = options.unix_ns;
}

// ---------------------------------------------------------------------------------------------
// Active sessions

Session* SessionTable::Open(uint32_t space, ProducerId producer, Origin origin, int64_t now_ns,
                            int64_t unix_ns) {
  NoteTime(now_ns, unix_ns);
  const uint32_t place = TakePlace(now_ns);
  if (place == sessions_.size()) return nullptr;
  SessionId id;
  do {
    id = MakeSessionId(DrawRandom(), options_.home, place);
  } while (FindRecord(id) != 0);
  Session* session = Occupy(place, AddRecord(id, space));
  session->producer = producer;
  session->origin = origin;
  session->last_active_ns = now_ns;
  return session;
}

// The generator's numbers alone would not do: from most bits of one its state follows, and with it
// every later id.
uint64_t SessionTable::DrawRandom() { return MixBits(random_.Next() ^ id_secret_); }

std::optional<uint32_t> SessionTable::SpaceOf(SessionId id, int64_t unix_ns) const {
  const uint32_t record = FindRecord(id);
  if (record == 0 || HasExpired(record, unix_ns)) return std::nullopt;
  return uint32_t{records_[record].space};
}

std::expected<Session*, RefusalReason> SessionTable::Resume(SessionId id, int64_t now_ns,
                                                            int64_t unix_ns) {
  NoteTime(now_ns, unix_ns);
  const uint32_t record = FindRecord(id);
  if (record == 0) return std::unexpected(RefusalReason::kSessionExpired);
  if (records_[record].is_active) return SessionOf(record);
  if (HasExpired(record, unix_ns)) {
    ForgetDormant(record);
    return std::unexpected(RefusalReason::kSessionExpired);
  }
  // What becomes dormant for it must not push it out.
  Unlink(record);
  --dormant_;
  const uint32_t place = TakePlace(now_ns);
  if (place == sessions_.size()) {
    Link(AgeRing(records_[record].last_active_s), record);
    ++dormant_;
    return std::unexpected(RefusalReason::kSessionLimit);
  }
  const Sequence last_sequence = records_[record].last_sequence;
  Session* session = Occupy(place, record);
  session->last_sequence = last_sequence;
  session->told_sequence = last_sequence;
  session->granted_sequence = last_sequence;
  session->last_active_ns = now_ns;
  Link(kIdleRing, record);
  return session;
}

void SessionTable::Attach(Session* session, ProducerId producer, Origin origin, int64_t now_ns) {
  CHECK(origin != 0, "a connection has a number");
  if (session->origin == 0) Unlink(record_of_[PlaceOf(*session)]);
  session->producer = producer;
  session->origin = origin;
  session->last_active_ns = now_ns;
}

void SessionTable::Detach(Session* session, int64_t now_ns) {
  CHECK(session->origin != 0, "it has a connection");
  const uint32_t record = record_of_[PlaceOf(*session)];
  session->origin = 0;
  session->last_active_ns = now_ns;
  if (session->last_sequence > 0) {
    Link(kIdleRing, record);
    return;
  }
  GiveUpPlace(session);
  RemoveRecord(record);
}

Session* SessionTable::Find(SessionId id) {
  const uint32_t record = FindRecord(id);
  return record != 0 && records_[record].is_active ? SessionOf(record) : nullptr;
}

void SessionTable::MoveToNewest(Session* session) {
  const uint32_t record = record_of_[PlaceOf(*session)];
  Unlink(record);
  Link(kIdleRing, record);
}

// A place that was given up or never used; else that of the longest idle session; else the number
// of places.
uint32_t SessionTable::TakePlace(int64_t now_ns) {
  if (free_places_.empty() && used_places_ < sessions_.size()) return used_places_++;
  if (free_places_.empty() && !RetireOneIdle(now_ns)) {
    return static_cast<uint32_t>(sessions_.size());
  }
  const uint32_t place = free_places_.back();
  free_places_.pop_back();
  return place;
}

Session* SessionTable::Occupy(uint32_t place, uint32_t record) {
  Session& session = sessions_[place];
  session = Session();
  session.id = records_[record].id;
  session.space = records_[record].space;
  records_[record].is_active = 1;
  records_[record].last_sequence = place;
  record_of_[place] = record;
  ++size_;
  return &session;
}

void SessionTable::GiveUpPlace(Session* session) {
  session->id = SessionId();
  free_places_.push_back(PlaceOf(*session));
  --size_;
}

// ---------------------------------------------------------------------------------------------
// Dormant sessions

// The ring is in the order of last_active_ns. Those with forwards under way are passed over: there
// are only ever a few so old.
bool SessionTable::RetireOneIdle(int64_t now_ns) {
  for (uint32_t record = records_[kIdleRing].newer; record != kIdleRing;
       record = records_[record].newer) {
    Session* session = SessionOf(record);
    if (now_ns - session->last_active_ns < options_.idle_timeout_ns) return false;
    if (session->first_forward != 0) continue;
    const Sequence last_sequence = session->last_sequence;
    const uint32_t last_active_s = SecondsRoundedUp(LastActiveUnixNs(record));
    Unlink(record);
    GiveUpPlace(session);
    KeepDormant(record, last_sequence, last_active_s);
    return true;
  }
  return false;
}

void SessionTable::KeepDormant(uint32_t record, Sequence last_sequence, uint32_t last_active_s) {
  records_[record].is_active = 0;
  records_[record].last_sequence = last_sequence;
  records_[record].last_active_s = last_active_s;
  Link(AgeRing(last_active_s), record);
  if (++dormant_ > options_.max_dormant) ForgetOldestDormant();
}

void SessionTable::ForgetDormant(uint32_t record) {
  Unlink(record);
  RemoveRecord(record);
  --dormant_;
}

void SessionTable::ForgetOldestDormant() {
  uint64_t age = oldest_age_;
  uint32_t ring;
  do {
    ring = kFirstAgeRing + age++ % kAges;
  } while (records_[ring].newer == ring);
  ForgetDormant(records_[ring].newer);
}

void SessionTable::Restore(SessionId id, uint32_t space, Sequence last_sequence,
                           int64_t last_active_unix_ns) {
  if (id.value() == 0 || last_sequence == 0) return;
  const uint32_t last_active_s = SecondsRoundedUp(last_active_unix_ns);
  const uint32_t known = FindRecord(id);
  if (known == 0) {
    KeepDormant(AddRecord(id, space), last_sequence, last_active_s);
    return;
  }
  Record& record = records_[known];
  if (record.is_active) {
    Session* session = SessionOf(known);
    session->last_sequence = std::max(session->last_sequence, last_sequence);
    session->told_sequence = std::max(session->told_sequence, last_sequence);
    return;
  }
  record.last_sequence = std::max(record.last_sequence, last_sequence);
  record.last_active_s = std::max(record.last_active_s, last_active_s);
  Unlink(known);
  Link(AgeRing(record.last_active_s), known);
}

bool SessionTable::HasExpired(uint32_t record, int64_t unix_ns) const {
  return !records_[record].is_active &&
         unix_ns - int64_t{records_[record].last_active_s} * kNanosPerSecond >= options_.keep_ns;
}

// Rings end to end: those of ages that have expired as a whole. What had no ring of its own when it
// was linked may still be younger.
bool SessionTable::ForgetExpired(int64_t unix_ns, size_t max_steps) {
  const uint64_t kept_age =
      static_cast<uint64_t>(std::max(unix_ns - options_.keep_ns, int64_t{0})) / kNanosPerSecond /
      age_s_;
  if (dormant_ == 0) oldest_age_ = std::max(oldest_age_, kept_age);
  for (; oldest_age_ < kept_age; --max_steps) {
    if (max_steps == 0) return false;
    const uint32_t ring = kFirstAgeRing + oldest_age_ % kAges;
    const uint32_t record = records_[ring].newer;
    if (record == ring) {
      ++oldest_age_;
    } else if (HasExpired(record, unix_ns)) {
      ForgetDormant(record);
    } else {
      Unlink(record);
      Link(AgeRing(records_[record].last_active_s), record);
    }
  }
  return true;
}

bool SessionTable::Sweep(int64_t now_ns, int64_t unix_ns, size_t max_steps) {
  NoteTime(now_ns, unix_ns);
  for (; max_steps > 0 && RetireOneIdle(now_ns); --max_steps) {
  }
  return max_steps > 0 && ForgetExpired(unix_ns, max_steps);
}

size_t SessionTable::ForgetSpace(uint32_t space, uint64_t* cursor, size_t limit) {
  size_t forgotten = 0;
  const uint32_t end = EndOfPart(cursor, limit);
  for (auto record = static_cast<uint32_t>(*cursor); record < end; ++record) {
    if (records_[record].id.value() == 0 || records_[record].space != space) continue;
    if (!records_[record].is_active) {
      ForgetDormant(record);
    } else {
      Session* session = SessionOf(record);
      if (session->origin != 0 || session->first_forward != 0) continue;
      Unlink(record);
      GiveUpPlace(session);
      RemoveRecord(record);
    }
    ++forgotten;
  }
  *cursor = end < next_record_ ? end : 0;
  return forgotten;
}

// Of a walk over the records.
uint32_t SessionTable::EndOfPart(uint64_t* cursor, size_t limit) const {
  CHECK(limit > 0, "a part gets somewhere");
  if (*cursor == 0) *cursor = kFirstRecord;
  return static_cast<uint32_t>(std::min<uint64_t>(next_record_, *cursor + limit));
}

// 0: took nothing, or the record is free.
Sequence SessionTable::LastSequenceOf(uint32_t record) const {
  const Record& known = records_[record];
  return known.is_active ? SessionOf(record).last_sequence : known.last_sequence;
}

int64_t SessionTable::LastActiveUnixNs(uint32_t record) const {
  const Record& known = records_[record];
  if (!known.is_active) return int64_t{known.last_active_s} * kNanosPerSecond;
  const Session& session = SessionOf(record);
  return session.origin != 0 ? unix_ns_ : wall_offset_ns_ + session.last_active_ns;
}

void SessionTable::NoteTime(int64_t now_ns, int64_t unix_ns) {
  unix_ns_ = unix_ns;
  wall_offset_ns_ = unix_ns - now_ns;
}

// ---------------------------------------------------------------------------------------------
// Records, rings and the index

uint32_t SessionTable::FindRecord(SessionId id) const {
  if (id.value() == 0) return 0;
  for (size_t slot = SlotOf(id);; slot = (slot + 1) & index_mask_) {
    const uint32_t record = index_[slot];
    if (record == 0 || records_[record].id == id) return record;
  }
}

// There is room: the limits of the tiers see to it.
uint32_t SessionTable::AddRecord(SessionId id, uint32_t space) {
  uint32_t record = free_record_;
  if (record != 0) {
    free_record_ = records_[record].newer;
  } else {
    CHECK(next_record_ < record_limit_, "a record for each session of both tiers");
    record = next_record_++;
  }
  records_[record] = Record();
  records_[record].id = id;
  records_[record].space = space;
  size_t slot = SlotOf(id);
  while (index_[slot] != 0) slot = (slot + 1) & index_mask_;
  index_[slot] = record;
  return record;
}

// Closes the gap in the index: what stands after it, and belongs before it, moves into it (Knuth,
// volume 3, algorithm 6.4 R).
void SessionTable::RemoveRecord(uint32_t record) {
  size_t gap = SlotOf(records_[record].id);
  while (index_[gap] != record) gap = (gap + 1) & index_mask_;
  for (size_t slot = (gap + 1) & index_mask_; index_[slot] != 0; slot = (slot + 1) & index_mask_) {
    const size_t home = SlotOf(records_[index_[slot]].id);
    if (((slot - home) & index_mask_) < ((slot - gap) & index_mask_)) continue;
    index_[gap] = index_[slot];
    gap = slot;
  }
  index_[gap] = 0;
  records_[record] = Record();
  records_[record].newer = free_record_;
  free_record_ = record;
}

// As the newest.
void SessionTable::Link(uint32_t ring, uint32_t record) {
  const uint32_t newest = records_[ring].older;
  records_[record].older = newest;
  records_[record].newer = ring;
  records_[newest].newer = record;
  records_[ring].older = record;
}

void SessionTable::Unlink(uint32_t record) {
  records_[records_[record].older].newer = records_[record].newer;
  records_[records_[record].newer].older = records_[record].older;
}

// What is older or younger than all rings goes to the first or the last.
uint32_t SessionTable::AgeRing(uint32_t last_active_s) const {
  const uint64_t age =
      std::clamp<uint64_t>(last_active_s / age_s_, oldest_age_, oldest_age_ + kAges - 1);
  return kFirstAgeRing + static_cast<uint32_t>(age % kAges);
}

double SessionTable::bytes_per_active() const {
  return sizeof(Session) + 2 * sizeof(uint32_t) + bytes_per_dormant();
}

double SessionTable::bytes_per_dormant() const {
  return sizeof(Record) +
         static_cast<double>((index_mask_ + 1) * sizeof(uint32_t)) / (record_limit_ - kFirstRecord);
}

// 1. Each record that is in use is found by its id, so no id is there twice.
// 2. Each one in a ring is there once and where it belongs.
// 3. What is in no ring has a connection, and the counts agree.
Result<void> SessionTable::CheckInvariants() const {
  std::vector<bool> linked(next_record_);
  for (uint32_t ring = kIdleRing; ring < kFirstRecord; ++ring) {
    if (auto sound = CheckRing(ring, &linked); !sound) return sound;
  }
  uint32_t active = 0;
  uint32_t dormant = 0;
  for (uint32_t record = kFirstRecord; record < next_record_; ++record) {
    const Record& known = records_[record];
    if (known.id.value() == 0) {
      if (linked[record]) return Unsound(record, "free, and in a ring");
      continue;
    }
    if (FindRecord(known.id) != record) return Unsound(record, "not found by its id");
    ++(known.is_active ? active : dormant);
    if (!known.is_active) {
      if (!linked[record]) return Unsound(record, "dormant, and in no ring");
      continue;
    }
    const Session& session = SessionOf(record);
    if (session.id != known.id || session.space != known.space ||
        record_of_[PlaceOf(session)] != record) {
      return Unsound(record, "not that of its session");
    }
    if ((session.origin == 0) != linked[record])
      return Unsound(record, "idle, or in the ring of idle");
  }
  const auto slots = static_cast<uint32_t>(
      index_mask_ + 1 - static_cast<size_t>(std::count(index_, index_ + index_mask_ + 1, 0u)));
  if (active != size_ || dormant != dormant_ || slots != active + dormant ||
      size_ + free_places_.size() != used_places_ || dormant_ > options_.max_dormant) {
    return Unsound(0, "the counts do not agree");
  }
  return {};
}

Result<void> SessionTable::CheckRing(uint32_t ring, std::vector<bool>* linked) const {
  uint32_t before = ring;
  for (uint32_t record = records_[ring].newer; record != ring; record = records_[record].newer) {
    if (record < kFirstRecord || record >= next_record_ || (*linked)[record]) {
      return Unsound(record, "in a ring that is not one");
    }
    (*linked)[record] = true;
    if (records_[record].older != before) return Unsound(record, "its neighbour is another");
    if (records_[record].is_active != (ring == kIdleRing))
      return Unsound(record, "in a wrong ring");
    if (ring == kIdleRing && before != ring &&
        SessionOf(before).last_active_ns > SessionOf(record).last_active_ns) {
      return Unsound(record, "idle for longer than the one before");
    }
    before = record;
  }
  if (records_[ring].older != before) return Unsound(ring, "its neighbour is another");
  return {};
}

}  // namespace engram
