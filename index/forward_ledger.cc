#include "index/forward_ledger.h"

#include <bit>

namespace engram {

ForwardLedger::ForwardLedger(uint32_t capacity, uint16_t shards)
    : forwards_(std::bit_ceil(capacity)), mask_(forwards_.size() - 1), lines_(shards) {
  CHECK(capacity > 0, "a ledger has room");
}

uint64_t ForwardLedger::Add(Session* session) {
  CHECK(room() > 0, "the caller looks for room first");
  const uint64_t ticket = next_++;
  Forward& forward = forwards_[ticket & mask_];
  forward = Forward();
  forward.session = session;
  if (session == nullptr) return ticket;
  if (session->last_forward == 0) {
    session->first_forward = ticket;
  } else {
    At(session->last_forward).next_in_session = ticket;
  }
  session->last_forward = ticket;
  return ticket;
}

void ForwardLedger::Line(ShardId shard, uint64_t ticket) {
  TicketList& line = lines_[shard.value()];
  Forward& forward = At(ticket);
  CHECK(!forward.waits_to_send, "a forward waits for one shard at a time");
  forward.waits_to_send = true;
  forward.next_in_line = 0;
  (line.first == 0 ? line.first : At(line.last).next_in_line) = ticket;
  line.last = ticket;
}

void ForwardLedger::LeaveLine(ShardId shard) {
  TicketList& line = lines_[shard.value()];
  Forward& first = At(line.first);
  first.waits_to_send = false;
  line.first = first.next_in_line;
  if (line.first == 0) line.last = 0;
}

}  // namespace engram
