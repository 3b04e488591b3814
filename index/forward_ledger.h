#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "index/session_table.h"
#include "src/core/check.h"
#include "src/core/commit_stamp.h"
#include "src/core/ids.h"
#include "src/core/shard_port.h"

namespace engram {

// An observation that its home shard has taken and not answered yet: it is being logged, or other
// shards store it or retire what it supersedes, or the session's earlier ones are not answered.
struct Forward {
  enum class Step : uint8_t {
    kLog,      // waits until its record is as durable as its space asks for
    kStore,    // to the owner
    kRetire,   // to those that owned the id while the space had fewer partitions
    kLose,     // to the owner: one of them had a later stamp, or the same observation
    kDone,     // visible, to be answered after the session's earlier ones
    kAnswered  // the place is free once those before it are
  };
  Step step = Step::kDone;
  bool is_upsert = false;
  bool is_same_everywhere = false;  // suppress, restore: each shard does it where it has the id
  bool existed = false;
  bool is_elsewhere = false;   // an earlier owner has it, under the same stamp
  bool grows = false;          // counts for its space's quota until it is answered
  bool deletes = false;        // likewise for updates, which may need what it ends
  bool waits_to_send = false;  // in its target's line
  bool is_replayed = false;    // read from the log after a restart: nobody is answered
  ProducerId producer;
  ShardId owner;
  ShardId target;                // of the message that is out, or waits
  uint32_t space = 0;            // index in the SpaceCatalogue
  uint32_t next_partitions = 0;  // kRetire: the owner of the id while there were so many is next
  Session* session = nullptr;    // nullptr: it stands alone
  uint64_t next_in_session = 0;  // ticket; 0: none
  uint64_t next_in_line = 0;     // likewise
  uint64_t id_hash = 0;
  const ObserveRequest* request = nullptr;
  LogPosition block = 0;    // of the log, that its record is in, begins here
  LogPosition log_end = 0;  // its record ends here
  CommitStamp stamp = kNoStamp;
  CommitStamp later = kNoStamp;  // the latest one that another shard has of the id
  int64_t received_ns = 0;
  Completion completion;
};

// A shard's forwards, in the order of their stamps.
//
// A ticket names one. Those of a session are answered in the order in which they were added, those
// without a session as they are done. Messages to a shard that has enough of them under way wait in
// a line.
//
// Thread safety: the shard's alone. Takes no memory after construction.
// Invariants: tickets are given in rising order; [oldest, next) are in the table, and the oldest
// one is not done, so its stamp bounds what is visible (OldestStamp); a session's first and last
// forward are named in the session, and it is not evicted meanwhile.
class ForwardLedger {
 public:
  // `capacity` is rounded up to a power of two.
  ForwardLedger(uint32_t capacity, uint16_t shards);

  bool empty() const { return oldest_ == next_; }
  uint64_t size() const { return next_ - oldest_; }
  uint64_t room() const { return forwards_.size() - size(); }

  // There is room. `session` may be nullptr.
  uint64_t Add(Session* session);
  Forward& At(uint64_t ticket) {
    CHECK(ticket >= oldest_ && ticket < next_, "a ticket is of a forward under way");
    return forwards_[ticket & mask_];
  }
  // Not empty: no observation with this stamp or a later one is said to be visible.
  CommitStamp OldestStamp() const { return Oldest().stamp; }
  // Not empty.
  const Forward& Oldest() const { return forwards_[oldest_ & mask_]; }
  // All forwards that are not answered have tickets from here, and below next_ticket().
  uint64_t oldest_ticket() const { return oldest_; }
  uint64_t next_ticket() const { return next_; }

  // `ticket` is done; `answer` is called with each forward that may be answered now, in order.
  template <typename Answer>
  void Finish(uint64_t ticket, Answer&& answer) {
    Forward& done = At(ticket);
    CHECK(done.step < Forward::Step::kDone || done.session != nullptr, "a forward is done once");
    done.step = Forward::Step::kDone;
    if (done.session == nullptr) {
      answer(done);
      done.step = Forward::Step::kAnswered;
    } else {
      AnswerSession(done.session, answer);
    }
    while (oldest_ != next_ && forwards_[oldest_ & mask_].step == Forward::Step::kAnswered) {
      ++oldest_;
    }
  }

  // The line of messages to `shard`.
  void Line(ShardId shard, uint64_t ticket);
  // 0: nothing waits.
  uint64_t FirstInLine(ShardId shard) const { return lines_[shard.value()].first; }
  void LeaveLine(ShardId shard);

 private:
  template <typename Answer>
  void AnswerSession(Session* session, Answer&& answer) {
    while (session->first_forward != 0) {
      Forward& first = At(session->first_forward);
      if (first.step != Forward::Step::kDone) return;
      session->first_forward = first.next_in_session;
      if (session->first_forward == 0) session->last_forward = 0;
      answer(first);
      first.step = Forward::Step::kAnswered;
    }
  }

  struct TicketList {
    uint64_t first = 0;
    uint64_t last = 0;
  };

  std::vector<Forward> forwards_;
  const uint64_t mask_;
  uint64_t oldest_ = 1;
  uint64_t next_ = 1;
  std::vector<TicketList> lines_;  // by shard
};

}  // namespace engram
