#pragma once

#include <cstddef>
#include <cstdint>

#include "perf/vector_set.h"

namespace engram {

// An index as index_vs_peers measures it: empty at first, then given the same rows in the same
// order as the others. The row number is the id.
//
// Thread safety: one thread's alone.
class ComparedIndex {
 public:
  ComparedIndex() = default;
  ComparedIndex(const ComparedIndex&) = delete;
  ComparedIndex& operator=(const ComparedIndex&) = delete;
  virtual ~ComparedIndex() = default;

  // Inserts rows `first` to `last` - 1 and links them as far as the index links anything yet.
  virtual void Insert(const VectorSet& base, size_t first, size_t last) = 0;
  // Rows that are in the graph with all their links.
  virtual size_t linked() const = 0;
  // Recalls the `k` nearest of queries `first` to `last` - 1, one query after the other: k rows
  // each to `rows`, in any order, -1 where there are fewer.
  virtual void Recall(const VectorSet& queries, size_t first, size_t last, uint32_t k, uint32_t ef,
                      int64_t* rows) = 0;
  // Memory of vectors, links, ids and lookup, in bytes. 0 where it is not known.
  virtual uint64_t bytes() const = 0;
  // Distances evaluated by inserts so far, estimates included. 0 where they are not counted.
  virtual uint64_t distances() const { return 0; }
};

}  // namespace engram
