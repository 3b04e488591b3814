#pragma once

#include <cstdint>

namespace engram {

// How the rows of a file are dealt to connections: in batches, round robin, so that batch j goes to
// connection j % connections and all of them are as far in the file at any time.
struct RowDealing {
  uint64_t rows = 0;
  uint32_t batch = 1;
  uint32_t connections = 1;

  uint64_t Batches() const { return (rows + batch - 1) / batch; }

  // Rows of batch `number`; the last one may be shorter.
  uint64_t RowsOfBatch(uint64_t number) const {
    const uint64_t first = number * batch;
    return rows - first < batch ? rows - first : batch;
  }

  // How many rows `connection` gets in all.
  uint64_t RowsOf(uint32_t connection) const {
    const uint64_t batches = Batches();
    if (connection >= batches) return 0;
    const uint64_t own = (batches - connection + connections - 1) / connections;
    const bool has_last = (batches - 1) % connections == connection;
    return has_last ? (own - 1) * batch + RowsOfBatch(batches - 1) : own * batch;
  }

  // The row that `connection` gets as its index-th, counted from 0.
  uint64_t RowAt(uint32_t connection, uint64_t index) const {
    return (index / batch * connections + connection) * batch + index % batch;
  }
};

}  // namespace engram
