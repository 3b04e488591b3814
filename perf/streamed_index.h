#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "perf/live_tags.h"
#include "perf/vector_set.h"

namespace engram {

// An index as streaming_runbook and streaming_schedule drive it: observations come in by tag, some
// replace or delete what the tag had, and recalls come between them.
//
// Thread safety: one thread's alone.
class StreamedIndex {
 public:
  StreamedIndex() = default;
  StreamedIndex(const StreamedIndex&) = delete;
  StreamedIndex& operator=(const StreamedIndex&) = delete;
  virtual ~StreamedIndex() = default;

  // Takes one observation; its vector is a row of `base`. False, and nothing is taken, where there
  // is no room before the next Poll.
  virtual bool Send(const Mutation& mutation, const VectorSet& base) = 0;
  // Observations that were sent and that recalls see.
  virtual uint64_t visible() const = 0;
  // Asks for the `k` nearest of a query. One at a time. False as with Send.
  virtual bool Ask(const VectorSet& queries, size_t query, uint32_t k, uint32_t ef) = 0;
  // Once what was asked is answered: the tags, at most k, in any order.
  virtual bool TakeAnswer(std::vector<int64_t>* tags) = 0;
  // A bounded round of work.
  virtual void Poll() = 0;
  // Goes on until all that is done in the background is done.
  virtual void Rest() = 0;

  // What is done in the background: observations that wait to be linked, and places whose
  // observations have ended.
  struct Waiting {
    uint64_t unlinked = 0;
    uint64_t retired = 0;
    uint64_t linked_ever = 0;  // by the background work
  };
  virtual Waiting waiting() const { return {}; }
  // Stops the clock of an index that has one, while this thread does something else.
  virtual void StopClock() {}
  virtual void StartClock() {}
  // Ends the program where the index finds that it is not sound.
  virtual void CheckSound() const {}
};

}  // namespace engram
