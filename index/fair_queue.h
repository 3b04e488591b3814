#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "src/core/ids.h"
#include "src/core/slot_slab.h"

namespace engram {

// The observations that wait for a shard, dealt out in turn: first between spaces, within a space
// between its sessions, and of a session in the order in which they came. So who sends ten times as
// much as others waits behind himself.
//
// Deficit round robin (Shreedhar & Varghese 1995) at two levels, with turns of a fixed number of
// observations, as these cost about the same each.
//
// Thread safety: the shard's alone. Takes no memory after construction, but for a space or session
// number above all earlier ones.
// Invariants: a space is in the ring of spaces while it has a session in its own ring, a session is
// in its space's ring while it has observations; size() is the number of all of them.
class FairQueue {
 public:
  // What waits: a slot of a producer.
  struct Item {
    ProducerId producer;
    SlotId slot = kNoSlot;
  };
  // Observations that a session, and a space, may give in one turn.
  static constexpr uint32_t kSessionTurn = 4;
  static constexpr uint32_t kSpaceTurn = 16;

  // At most `capacity` wait at a time.
  explicit FairQueue(uint32_t capacity);

  // `session` is any number that stands for the session, small since a table has it as an index;
  // its observations that wait are all of one space. size() is below the capacity.
  void Push(uint32_t space, uint32_t session, Item item);
  // The next one, nothing where none waits.
  std::optional<Item> Pop();

  uint32_t size() const { return size_; }
  uint32_t capacity() const { return static_cast<uint32_t>(places_.size()); }
  // Spaces that have observations waiting.
  uint32_t spaces() const { return active_spaces_; }
  // Observations of the space that wait.
  uint32_t WaitingOf(uint32_t space) const {
    return space < spaces_.size() ? spaces_[space].waiting : 0;
  }

 private:
  static constexpr uint32_t kNone = UINT32_MAX;

  struct Place {
    Item item;
    uint32_t next = kNone;  // of the session, or of the free places
  };
  struct Session {
    uint32_t first = kNone;  // place
    uint32_t last = kNone;
    uint32_t next = kNone;  // session in the space's ring
  };
  // `last` of a ring is who was served last: the next one is its `next`.
  struct Space {
    uint32_t last = kNone;  // session
    uint32_t next = kNone;  // space in the ring of spaces
    uint32_t waiting = 0;
    uint32_t session_left = 0;  // of the turn of the session that is served
  };

  std::vector<Place> places_;
  std::vector<Session> sessions_;
  std::vector<Space> spaces_;
  uint32_t free_place_ = 0;
  uint32_t last_space_ = kNone;
  uint32_t space_left_ = 0;  // of the turn of the space that is served
  uint32_t active_spaces_ = 0;
  uint32_t size_ = 0;
};

}  // namespace engram
