#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/core/attributes.h"

// The grammar of attributes.h written down a second time, a byte at a time and with plain numbers
// for the bounds: what the tests and the fuzzer compare the product's with.

namespace engram {

// The bytes in memory of exactly their size, so that ASan sees a read beyond them.
class Exact {
 public:
  explicit Exact(std::string_view bytes)
      : size_(bytes.size()), bytes_(std::make_unique<std::byte[]>(bytes.size())) {
    if (size_ > 0) std::memcpy(bytes_.get(), bytes.data(), size_);
  }
  std::span<const std::byte> get() const { return {bytes_.get(), size_}; }

 private:
  size_t size_;
  std::unique_ptr<std::byte[]> bytes_;
};

using ModelAttributes = std::vector<std::pair<std::string, std::string>>;

struct ModelClause {
  bool excludes = false;
  std::string key = {};
  std::vector<std::string> values = {};

  bool operator==(const ModelClause&) const = default;
};
struct ModelFilter {
  int64_t begin_ns = INT64_MIN;
  int64_t end_ns = INT64_MAX;
  std::vector<ModelClause> clauses = {};

  bool operator==(const ModelFilter&) const = default;
};

// Takes numbers and texts off bytes; once something was missing, nothing is `sound` any more.
class ModelReader {
 public:
  explicit ModelReader(std::string_view bytes) : left_(bytes) {}
  bool sound() const { return sound_; }
  bool empty() const { return left_.empty(); }
  uint64_t Number(size_t bytes) {
    const std::string text = Text(bytes);
    uint64_t number = 0;
    for (size_t i = text.size(); i-- > 0;) number = number << 8 | static_cast<uint8_t>(text[i]);
    return number;
  }
  std::string Text(size_t bytes) {
    if (bytes > left_.size()) {
      sound_ = false;
      left_ = {};
      return {};
    }
    std::string text(left_.substr(0, bytes));
    left_.remove_prefix(bytes);
    return text;
  }

 private:
  std::string_view left_;
  bool sound_ = true;
};

inline bool ModelIsSound(std::string_view key, std::string_view value) {
  return key.size() <= 64 && value.size() <= 255 && !(key.empty() && value.empty());
}

inline std::optional<ModelAttributes> ParseModelAttributes(std::string_view bytes) {
  if (bytes.size() > 4'096) return std::nullopt;
  ModelAttributes attributes;
  for (ModelReader reader(bytes); !reader.empty();) {
    const size_t key_bytes = reader.Number(1);
    const size_t value_bytes = reader.Number(1);
    std::string key = reader.Text(key_bytes);
    std::string value = reader.Text(value_bytes);
    if (!reader.sound() || !ModelIsSound(key, value)) return std::nullopt;
    attributes.emplace_back(std::move(key), std::move(value));
  }
  if (attributes.size() > 64) return std::nullopt;
  return attributes;
}

inline std::optional<ModelFilter> ParseModelFilter(std::string_view bytes) {
  ModelFilter filter;
  if (bytes.empty()) return filter;
  if (bytes.size() > 4'096) return std::nullopt;
  ModelReader reader(bytes);
  filter.begin_ns = static_cast<int64_t>(reader.Number(8));
  filter.end_ns = static_cast<int64_t>(reader.Number(8));
  if (!reader.sound()) return std::nullopt;
  size_t values = 0;
  while (!reader.empty()) {
    const uint64_t flags = reader.Number(1);
    const size_t key_bytes = reader.Number(1);
    const size_t count = reader.Number(1);
    reader.Number(1);
    ModelClause clause{.excludes = flags == 1, .key = reader.Text(key_bytes)};
    for (size_t i = 0; i < count && reader.sound(); ++i) {
      clause.values.push_back(reader.Text(reader.Number(1)));
      if (!ModelIsSound(clause.key, clause.values.back())) return std::nullopt;
    }
    if (!reader.sound() || flags > 1 || count == 0) return std::nullopt;
    values += count;
    filter.clauses.push_back(std::move(clause));
  }
  if (filter.clauses.size() > 16 || values > 64) return std::nullopt;
  return filter;
}

inline std::string WriteModelAttribute(std::string_view key, std::string_view value) {
  std::string bytes{static_cast<char>(key.size()), static_cast<char>(value.size())};
  return bytes.append(key).append(value);
}
inline std::string WriteModelClause(const ModelClause& clause) {
  std::string bytes{static_cast<char>(clause.excludes ? 1 : 0),
                    static_cast<char>(clause.key.size()), static_cast<char>(clause.values.size()),
                    '\0'};
  bytes += clause.key;
  for (const std::string& value : clause.values) {
    bytes.push_back(static_cast<char>(value.size()));
    bytes += value;
  }
  return bytes;
}
inline std::string WriteModelFilter(const ModelFilter& filter) {
  std::string bytes;
  for (const auto number :
       {static_cast<uint64_t>(filter.begin_ns), static_cast<uint64_t>(filter.end_ns)}) {
    for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>(number >> (8 * i)));
  }
  for (const ModelClause& clause : filter.clauses) bytes += WriteModelClause(clause);
  return bytes;
}

// What the product's readers say of bytes that have passed its checks.
inline ModelAttributes ReadAttributes(std::span<const std::byte> bytes) {
  ModelAttributes attributes;
  Attribute attribute;
  for (AttributeReader reader(bytes); reader.Next(&attribute);) {
    attributes.emplace_back(attribute.key, attribute.value);
  }
  return attributes;
}
inline ModelFilter ReadFilter(std::span<const std::byte> bytes) {
  FilterReader reader(bytes);
  ModelFilter filter{.begin_ns = reader.times().begin_ns, .end_ns = reader.times().end_ns};
  FilterClause clause;
  while (reader.Next(&clause)) {
    filter.clauses.push_back({.excludes = clause.excludes, .key = std::string(clause.key)});
    std::string_view value;
    for (FilterValueReader values(clause); values.Next(&value);) {
      filter.clauses.back().values.emplace_back(value);
    }
  }
  return filter;
}

}  // namespace engram
