#include "src/core/attributes.h"

#include <algorithm>
#include <cstring>

namespace engram {

namespace {

constexpr size_t kAttributeHeaderBytes = 2;
constexpr size_t kClauseHeaderBytes = 4;
constexpr size_t kTimesBytes = 2 * sizeof(int64_t);

// The first `count` bytes of *bytes, which it has, and what is left behind them.
std::string_view TakeText(std::span<const std::byte>* bytes, size_t count) {
  const std::string_view text(reinterpret_cast<const char*>(bytes->data()), count);
  *bytes = bytes->subspan(count);
  return text;
}

uint8_t ByteAt(std::span<const std::byte> bytes, size_t place) {
  return std::to_integer<uint8_t>(bytes[place]);
}

bool IsSound(std::string_view key, std::string_view value) {
  return key.size() <= kMaxAttributeKeyBytes && value.size() <= kMaxAttributeValueBytes &&
         (!key.empty() || !value.empty());
}

// Whether *bytes begins with a sound value for `key`, which is taken off.
bool PassValue(std::string_view key, std::span<const std::byte>* bytes) {
  if (bytes->empty()) return false;
  const size_t length = ByteAt(*bytes, 0);
  if (bytes->size() < 1 + length) return false;
  *bytes = bytes->subspan(1);
  return IsSound(key, TakeText(bytes, length));
}

}  // namespace

bool IsBuiltInFilterKey(std::string_view key) {
  return key == kTagKey || key == kWhoKey || key == kWhereKey || key == kMemoryTypeKey;
}

bool IsValidFilterKey(std::string_view key) {
  return !key.empty() && key.size() <= kMaxAttributeKeyBytes &&
         std::ranges::all_of(key, [](char c) { return c > ' ' && c <= '~' && c != '='; });
}

RefusalReason CheckAttributes(std::span<const std::byte> bytes) {
  if (bytes.size() > kMaxAttributesBytes) return RefusalReason::kBadAttributes;
  for (size_t count = 0; !bytes.empty(); ++count) {
    if (count == kMaxAttributes || bytes.size() < kAttributeHeaderBytes) {
      return RefusalReason::kBadAttributes;
    }
    const size_t key_bytes = ByteAt(bytes, 0);
    const size_t value_bytes = ByteAt(bytes, 1);
    bytes = bytes.subspan(kAttributeHeaderBytes);
    if (bytes.size() < key_bytes + value_bytes) return RefusalReason::kBadAttributes;
    const std::string_view key = TakeText(&bytes, key_bytes);
    if (!IsSound(key, TakeText(&bytes, value_bytes))) return RefusalReason::kBadAttributes;
  }
  return RefusalReason::kNone;
}

bool AttributeReader::Next(Attribute* attribute) {
  if (left_.empty()) return false;
  const size_t key_bytes = ByteAt(left_, 0);
  const size_t value_bytes = ByteAt(left_, 1);
  left_ = left_.subspan(kAttributeHeaderBytes);
  attribute->key = TakeText(&left_, key_bytes);
  attribute->value = TakeText(&left_, value_bytes);
  return true;
}

bool AppendAttribute(std::string_view key, std::string_view value, std::string* bytes) {
  if (!IsSound(key, value)) return false;
  const size_t before = bytes->size();
  bytes->push_back(static_cast<char>(key.size()));
  bytes->push_back(static_cast<char>(value.size()));
  bytes->append(key);
  bytes->append(value);
  if (CheckAttributes(std::as_bytes(std::span<const char>(*bytes))) == RefusalReason::kNone) {
    return true;
  }
  bytes->resize(before);
  return false;
}

RefusalReason CheckFilter(std::span<const std::byte> bytes) {
  if (bytes.empty()) return RefusalReason::kNone;
  if (bytes.size() < kTimesBytes || bytes.size() > kMaxFilterBytes) {
    return RefusalReason::kBadFilter;
  }
  bytes = bytes.subspan(kTimesBytes);
  size_t values = 0;
  for (size_t clauses = 0; !bytes.empty(); ++clauses) {
    if (clauses == kMaxFilterClauses || bytes.size() < kClauseHeaderBytes) {
      return RefusalReason::kBadFilter;
    }
    const uint8_t flags = ByteAt(bytes, 0);
    const size_t key_bytes = ByteAt(bytes, 1);
    const size_t count = ByteAt(bytes, 2);
    values += count;
    if (flags > kClauseExcludes || count == 0 || values > kMaxFilterValues) {
      return RefusalReason::kBadFilter;
    }
    bytes = bytes.subspan(kClauseHeaderBytes);
    if (bytes.size() < key_bytes) return RefusalReason::kBadFilter;
    const std::string_view key = TakeText(&bytes, key_bytes);
    for (size_t i = 0; i < count; ++i) {
      if (!PassValue(key, &bytes)) return RefusalReason::kBadFilter;
    }
  }
  return RefusalReason::kNone;
}

FilterReader::FilterReader(std::span<const std::byte> bytes) : left_(bytes) {
  if (bytes.empty()) return;
  std::memcpy(&times_.begin_ns, bytes.data(), sizeof(int64_t));
  std::memcpy(&times_.end_ns, bytes.data() + sizeof(int64_t), sizeof(int64_t));
  left_ = bytes.subspan(kTimesBytes);
}

bool FilterReader::Next(FilterClause* clause) {
  if (left_.empty()) return false;
  clause->excludes = (ByteAt(left_, 0) & kClauseExcludes) != 0;
  const size_t key_bytes = ByteAt(left_, 1);
  clause->count = ByteAt(left_, 2);
  left_ = left_.subspan(kClauseHeaderBytes);
  clause->key = TakeText(&left_, key_bytes);
  size_t bytes = 0;
  for (size_t i = 0; i < clause->count; ++i) bytes += 1 + size_t{ByteAt(left_, bytes)};
  clause->values = left_.first(bytes);
  left_ = left_.subspan(bytes);
  return true;
}

bool FilterValueReader::Next(std::string_view* value) {
  if (left_.empty()) return false;
  const size_t length = ByteAt(left_, 0);
  left_ = left_.subspan(1);
  *value = TakeText(&left_, length);
  return true;
}

bool FilterWriter::Require(std::string_view key, std::span<const std::string_view> any_of) {
  return Append(0, key, any_of);
}

bool FilterWriter::Exclude(std::string_view key, std::span<const std::string_view> none_of) {
  return Append(kClauseExcludes, key, none_of);
}

bool FilterWriter::Append(uint8_t flags, std::string_view key,
                          std::span<const std::string_view> values) {
  if (clause_count_ == kMaxFilterClauses || values.empty() ||
      value_count_ + values.size() > kMaxFilterValues) {
    return false;
  }
  std::string clause = {static_cast<char>(flags), static_cast<char>(key.size()),
                        static_cast<char>(values.size()), '\0'};
  clause.append(key);
  for (const std::string_view value : values) {
    if (!IsSound(key, value)) return false;
    clause.push_back(static_cast<char>(value.size()));
    clause.append(value);
  }
  if (kTimesBytes + clauses_.size() + clause.size() > kMaxFilterBytes) return false;
  clauses_ += clause;
  ++clause_count_;
  value_count_ += values.size();
  return true;
}

std::string FilterWriter::Bytes() const { return empty() ? std::string() : BytesOfAny(); }

std::string FilterWriter::BytesOfAny() const {
  std::string bytes;
  bytes.resize(kTimesBytes);
  std::memcpy(bytes.data(), &times_.begin_ns, sizeof(int64_t));
  std::memcpy(bytes.data() + sizeof(int64_t), &times_.end_ns, sizeof(int64_t));
  return bytes + clauses_;
}

}  // namespace engram
