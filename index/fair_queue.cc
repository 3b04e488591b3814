#include "index/fair_queue.h"

#include "src/core/check.h"

namespace engram {

namespace {

// Puts `entry` at the end of the ring whose last one is *last.
template <typename Entry>
void Link(std::vector<Entry>& entries, uint32_t entry, uint32_t* last) {
  if (*last == UINT32_MAX) {
    entries[entry].next = entry;
  } else {
    entries[entry].next = entries[*last].next;
    entries[*last].next = entry;
  }
  *last = entry;
}

// Takes the one behind *last out.
template <typename Entry>
void UnlinkNext(std::vector<Entry>& entries, uint32_t* last) {
  const uint32_t gone = entries[*last].next;
  if (gone == *last) {
    *last = UINT32_MAX;
  } else {
    entries[*last].next = entries[gone].next;
  }
  entries[gone].next = UINT32_MAX;
}

}  // namespace

FairQueue::FairQueue(uint32_t capacity) : places_(capacity) {
  CHECK(capacity > 0, "something can wait");
  for (uint32_t i = 0; i < capacity; ++i) places_[i].next = i + 1 < capacity ? i + 1 : kNone;
}

void FairQueue::Push(uint32_t space, uint32_t session, Item item) {
  CHECK(free_place_ != kNone, "the queue has a place for each slot that may come");
  if (space >= spaces_.size()) spaces_.resize(size_t{space} + 1);
  if (session >= sessions_.size()) sessions_.resize(size_t{session} + 1);
  const uint32_t place = free_place_;
  free_place_ = places_[place].next;
  places_[place] = {.item = item, .next = kNone};
  Session& queue = sessions_[session];
  Space& owner = spaces_[space];
  if (queue.first == kNone) {
    queue.first = place;
    if (owner.last == kNone) {
      Link(spaces_, space, &last_space_);
      ++active_spaces_;
    }
    Link(sessions_, session, &owner.last);
  } else {
    places_[queue.last].next = place;
  }
  queue.last = place;
  ++owner.waiting;
  ++size_;
}

// Who is served stands behind the last one of its ring; a turn that is over makes it the last one.
std::optional<FairQueue::Item> FairQueue::Pop() {
  if (size_ == 0) return std::nullopt;
  const uint32_t space_number = spaces_[last_space_].next;
  Space& space = spaces_[space_number];
  const uint32_t session_number = sessions_[space.last].next;
  Session& session = sessions_[session_number];
  if (space_left_ == 0) space_left_ = kSpaceTurn;
  if (space.session_left == 0) space.session_left = kSessionTurn;

  const uint32_t place = session.first;
  const Item item = places_[place].item;
  session.first = places_[place].next;
  places_[place].next = free_place_;
  free_place_ = place;
  --space.waiting;
  --size_;
  --space_left_;
  --space.session_left;

  if (session.first == kNone) {
    session.last = kNone;
    UnlinkNext(sessions_, &space.last);
    space.session_left = 0;
  } else if (space.session_left == 0) {
    space.last = session_number;
  }
  if (space.last == kNone) {
    UnlinkNext(spaces_, &last_space_);
    --active_spaces_;
    space_left_ = 0;
  } else if (space_left_ == 0) {
    last_space_ = space_number;
  }
  return item;
}

}  // namespace engram
