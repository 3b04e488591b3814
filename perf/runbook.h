#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/result.h"

namespace engram {

// Numbers from `first` to before `end`.
struct RunbookRange {
  uint64_t first = 0;
  uint64_t end = 0;
  uint64_t size() const { return end - first; }
  bool operator==(const RunbookRange&) const = default;
};

// One step of a streaming runbook. A vector has an id, its row in the set. What is in the index has
// a tag: the id of the vector that it was inserted with, which stays when the vector is replaced.
struct RunbookStep {
  enum class Operation : uint8_t { kInsert, kSearch, kDelete, kReplace };
  Operation operation = Operation::kSearch;
  RunbookRange tags;  // all but kSearch
  RunbookRange ids;   // kReplace: what the tags are from now on, one by one
  uint32_t line = 0;  // in the file
};

// A sequence of steps for one set of vectors: the runbooks of big-ann-benchmarks' streaming track
// (its neurips23/streaming/README.md says what the operations mean).
struct Runbook {
  std::string file;  // for messages
  std::string part;  // of the file: the set that it was written for
  std::vector<RunbookStep> steps;

  // One more than the highest id or tag.
  uint64_t ids() const;
};

// Reads the part `part` of a runbook's text, the first one where that is empty. `file` is for
// messages alone.
//
// The text is YAML, of which the runbooks need little: names of parts in the first column; below
// each, by two blanks, max_pts, gt_url and the steps by their numbers from 1 on; below each step,
// by four blanks, its operation and the ends of its ranges; comments. Anything else is an error, as
// a step that is passed over would give a wrong figure. Errors: kInvalidArgument, naming file and
// line.
Result<Runbook> ParseRunbook(std::string_view text, const std::string& file,
                             std::string_view part = {});
// The same of a file. Errors: kNotFound besides.
Result<Runbook> LoadRunbook(const std::string& path, std::string_view part = {});

// The runbook for `count` vectors, fewer or more than it was written for, up to 2^32 - 1: each end
// of a range is moved in proportion and rounded down, so that ranges that touched, lay within each
// other or apart still do. Steps whose ranges become empty stay. Where the two ranges of a replace
// come out unequal both get the shorter length.
Runbook ScaledTo(const Runbook& runbook, uint64_t count);

}  // namespace engram
