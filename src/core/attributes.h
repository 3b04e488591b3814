#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>

#include "src/core/refusal_reason.h"

// What recalls filter by: the attributes of an observation, and a filter over them. Both travel
// and are stored as the bytes below (dataplane/FORMAT.md, index/log/FORMAT.md), all little-endian:
//
//   attributes := attribute*
//   attribute  := key_bytes:u8 value_bytes:u8 key value                    key_bytes 0: a tag
//   filter     := begin_ns:i64 end_ns:i64 clause*
//   clause     := flags:u8 key_bytes:u8 count:u8 zero:u8 key value{count}
//   value      := value_bytes:u8 text
//
// An observation may have several values under one key. A tag has 1 byte at least, other values may
// be empty. A filter holds for an observation whose `when` is within [begin_ns, end_ns) and for
// which every clause holds: it has any of the values under that key, or, with flag 1, none of them.

namespace engram {

inline constexpr size_t kMaxAttributesBytes = 4'096;  // of one observation
inline constexpr size_t kMaxAttributes = 64;          // likewise
inline constexpr size_t kMaxAttributeKeyBytes = 64;
inline constexpr size_t kMaxAttributeValueBytes = 255;
inline constexpr size_t kMaxFilterBytes = 4'096;
inline constexpr size_t kMaxFilterClauses = 16;
inline constexpr size_t kMaxFilterValues = 64;  // of all clauses together
// That a space declares, beside those that every space has.
inline constexpr size_t kMaxFilterKeys = 16;

// Keys that every space has. Tags have the empty one.
inline constexpr std::string_view kTagKey;
inline constexpr std::string_view kWhoKey = "who";
inline constexpr std::string_view kWhereKey = "where_location";
inline constexpr std::string_view kMemoryTypeKey = "memory_type";

bool IsBuiltInFilterKey(std::string_view key);
// 1 to kMaxAttributeKeyBytes of printable ASCII without `=`.
bool IsValidFilterKey(std::string_view key);

struct Attribute {
  std::string_view key;
  std::string_view value;
};

// kNone or kBadAttributes. What has passed may be read with AttributeReader.
RefusalReason CheckAttributes(std::span<const std::byte> bytes);

class AttributeReader {
 public:
  explicit AttributeReader(std::span<const std::byte> bytes) : left_(bytes) {}
  // False when that was all.
  bool Next(Attribute* attribute);

 private:
  std::span<const std::byte> left_;
};

// Appends one attribute. False, and nothing has changed, where a length is out of bounds or the
// whole would be.
bool AppendAttribute(std::string_view key, std::string_view value, std::string* bytes);

inline constexpr int64_t kFilterFromStart = std::numeric_limits<int64_t>::min();
inline constexpr int64_t kFilterToEnd = std::numeric_limits<int64_t>::max();

// [begin_ns, end_ns), but that kFilterToEnd is no bound at all.
struct TimeRange {
  int64_t begin_ns = kFilterFromStart;
  int64_t end_ns = kFilterToEnd;

  bool is_all() const { return begin_ns == kFilterFromStart && end_ns == kFilterToEnd; }
  bool Has(int64_t when_ns) const {
    return when_ns >= begin_ns && (when_ns < end_ns || end_ns == kFilterToEnd);
  }
};

inline constexpr uint8_t kClauseExcludes = 1;

// One clause as it lies in a filter.
struct FilterClause {
  bool excludes = false;
  uint8_t count = 0;  // of values, at least 1
  std::string_view key;
  std::span<const std::byte> values;
};

// kNone or kBadFilter. What has passed may be read with FilterReader. No bytes: no filter.
RefusalReason CheckFilter(std::span<const std::byte> bytes);

class FilterReader {
 public:
  explicit FilterReader(std::span<const std::byte> bytes);
  const TimeRange& times() const { return times_; }
  // False when that was all.
  bool Next(FilterClause* clause);

 private:
  TimeRange times_;
  std::span<const std::byte> left_;
};

// The values of a clause.
class FilterValueReader {
 public:
  explicit FilterValueReader(const FilterClause& clause) : left_(clause.values) {}
  bool Next(std::string_view* value);

 private:
  std::span<const std::byte> left_;
};

// Builds a filter, for clients.
class FilterWriter {
 public:
  void SetTimes(const TimeRange& times) { times_ = times; }
  // False, and nothing has changed, where a length is out of bounds or the whole would be.
  bool Require(std::string_view key, std::span<const std::string_view> any_of);
  bool Exclude(std::string_view key, std::span<const std::string_view> none_of);
  bool empty() const { return clauses_.empty() && times_.is_all(); }
  // Nothing where it is empty.
  std::string Bytes() const;
  // Also where it is empty: a filter then that all match.
  std::string BytesOfAny() const;

 private:
  bool Append(uint8_t flags, std::string_view key, std::span<const std::string_view> values);

  TimeRange times_;
  std::string clauses_;
  size_t clause_count_ = 0;
  size_t value_count_ = 0;
};

}  // namespace engram
