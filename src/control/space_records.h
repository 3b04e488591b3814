#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

#include "src/core/check.h"
#include "src/core/observation.h"

// The records of spaces that the shards answer an introspection with.

namespace engram {

// Of one space, or of several, over all shards.
struct SpaceSums {
  uint64_t observations = 0;
  uint64_t linked = 0;
  uint64_t unlinked = 0;
  uint64_t retired = 0;
  uint64_t resident_bytes = 0;
  uint16_t dimension = 0;
  uint16_t partitions = 0;
  Metric metric = Metric::kUnspecified;  // of the last one

  void Add(const SpaceRecord& record) {
    observations += record.observations;
    linked += record.linked;
    unlinked += record.unlinked;
    retired += record.retired;
    resident_bytes += record.resident_bytes;
    dimension = std::max(dimension, record.dimension);
    metric = record.metric;
    ++partitions;
  }
};

// Calls visit(record, name) with each.
template <typename Visit>
void ForEachSpaceRecord(std::span<const std::byte> records, Visit visit) {
  while (!records.empty()) {
    SpaceRecord record;
    CHECK(records.size() >= sizeof(record), "an answer is whole records");
    std::memcpy(&record, records.data(), sizeof(record));
    CHECK(record.record_bytes <= records.size() &&
              record.record_bytes >= sizeof(record) + record.name_bytes,
          "a record holds what its header says");
    visit(record, std::string_view(reinterpret_cast<const char*>(records.data()) + sizeof(record),
                                   record.name_bytes));
    records = records.subspan(record.record_bytes);
  }
}

}  // namespace engram
