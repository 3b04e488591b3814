#include "src/control/memory_filter.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <string_view>
#include <vector>

#include "src/core/attributes.h"

namespace engram {

namespace {

// Nothing for MEMORY_TYPE_UNSPECIFIED and what is no type.
std::string_view NameOf(v1::MemoryType type) {
  switch (type) {
    case v1::MEMORY_TYPE_EPISODIC:
      return "episodic";
    case v1::MEMORY_TYPE_SEMANTIC:
      return "semantic";
    case v1::MEMORY_TYPE_PROCEDURAL:
      return "procedural";
    case v1::MEMORY_TYPE_WORKING:
      return "working";
    default:
      return {};
  }
}

std::string ItemOf(const std::string& field, int i) {
  return field + "[" + std::to_string(i) + "]";
}

Asked CheckValue(std::string_view value, const std::string& field) {
  if (value.size() <= kMaxAttributeValueBytes) return {};
  return Invalid(field + ": " + std::to_string(value.size()) +
                 " bytes; expected up to 255, as recalls filter by it");
}

// Adds attributes until one is wrong.
class AttributeList {
 public:
  explicit AttributeList(std::string* bytes) : bytes_(bytes) { bytes_->clear(); }

  void Add(std::string_view key, std::string_view value, const std::string& field) {
    if (!asked_ || (key.empty() && value.empty())) return;
    asked_ = CheckValue(value, field);
    if (!asked_ || AppendAttribute(key, value, bytes_)) return;
    asked_ = Invalid(field +
                     ": one more than recalls can filter by; expected up to 64 values of "
                     "tags, who, where_location, memory_type and filter keys, in 4096 "
                     "bytes with their keys");
  }
  void AddIfSet(std::string_view key, std::string_view value, const std::string& field) {
    if (!value.empty()) Add(key, value, field);
  }
  Asked asked() const { return asked_; }

 private:
  std::string* const bytes_;
  Asked asked_;
};

std::string KeysText(std::span<const std::string> filter_keys) {
  std::string text(kWhoKey);
  for (const std::string_view key : {kWhereKey, kMemoryTypeKey}) text.append(", ").append(key);
  for (const std::string& key : filter_keys) text.append(", ").append(key);
  return text;
}

// Builds a filter until something of it is wrong. Each condition narrows what is found.
class FilterBuilder {
 public:
  explicit FilterBuilder(std::span<const std::string> filter_keys) : filter_keys_(filter_keys) {}

  void Within(bool has_start, const google::protobuf::Timestamp& start, bool has_end,
              const google::protobuf::Timestamp& end, const std::string& field) {
    if (!asked_) return;
    const auto from = CheckTime(has_start, start, kFilterFromStart, field + ".time_start");
    const auto to = CheckTime(has_end, end, kFilterToEnd, field + ".time_end");
    if (!from || !to) {
      asked_ = std::unexpected(!from ? from.error() : to.error());
      return;
    }
    if (has_start && has_end && *from >= *to) {
      asked_ = Invalid(field + ".time_end: not after " + field +
                       ".time_start; expected a later time (it is not part of the range)");
      return;
    }
    times_.begin_ns = std::max(times_.begin_ns, *from);
    times_.end_ns = std::min(times_.end_ns, *to);
    writer_.SetTimes(times_);
  }

  // One value that must be there, or must not.
  void Match(std::string_view key, std::string_view value, bool excludes,
             const std::string& field) {
    const std::array<std::string_view, 1> values = {value};
    MatchAny(key, values, excludes, field);
  }

  void MatchAny(std::string_view key, std::span<const std::string_view> values, bool excludes,
                const std::string& field) {
    for (const std::string_view value : values) {
      if (asked_) asked_ = CheckValue(value, field);
      if (asked_ && key == kTagKey && value.empty()) {
        asked_ = Invalid(field + ": empty; expected a tag of 1 to 255 bytes");
      }
    }
    if (!asked_) return;
    if (excludes ? writer_.Exclude(key, values) : writer_.Require(key, values)) return;
    asked_ = Invalid(field +
                     ": one more than a filter can hold; expected up to 16 conditions (each tag "
                     "and participant is one) with 64 values, in 4096 bytes");
  }

  void CheckKey(std::string_view key, const std::string& field) {
    if (!asked_ || (!key.empty() && IsBuiltInFilterKey(key)) ||
        std::ranges::find(filter_keys_, key) != filter_keys_.end()) {
      return;
    }
    asked_ = Invalid(field + ": " + Quoted(key) + "; the space filters by " +
                     KeysText(filter_keys_) + "; list it in filter_keys of the configuration");
  }

  void Fail(std::string message) {
    if (asked_) asked_ = Invalid(std::move(message));
  }
  Asked asked() const { return asked_; }
  std::string Bytes() const { return writer_.Bytes(); }
  std::string BytesOfAny() const { return writer_.BytesOfAny(); }

 private:
  const std::span<const std::string> filter_keys_;
  Asked asked_;
  TimeRange times_;
  FilterWriter writer_;
};

void AddMetadata(const v1::MetadataCondition& condition, const std::string& field,
                 FilterBuilder* builder) {
  builder->CheckKey(condition.key(), field + ".key");
  if (condition.values_size() == 0) {
    builder->Fail(field + ".values: empty; expected 1 to 64 values, any of which may match");
    return;
  }
  const std::vector<std::string_view> values(condition.values().begin(), condition.values().end());
  builder->MatchAny(condition.key(), values, condition.exclude(), field + ".values");
}

void AddFilter(const v1::Filter& filter, FilterBuilder* builder) {
  builder->Within(filter.has_time_start(), filter.time_start(), filter.has_time_end(),
                  filter.time_end(), "filter");
  for (int i = 0; i < filter.required_tags_size(); ++i) {
    builder->Match(kTagKey, filter.required_tags(i), false, ItemOf("filter.required_tags", i));
  }
  if (filter.excluded_tags_size() > 0) {
    const std::vector<std::string_view> tags(filter.excluded_tags().begin(),
                                             filter.excluded_tags().end());
    builder->MatchAny(kTagKey, tags, true, "filter.excluded_tags");
  }
  for (int i = 0; i < filter.metadata_size(); ++i) {
    AddMetadata(filter.metadata(i), ItemOf("filter.metadata", i), builder);
  }
  std::vector<std::string_view> types;
  for (int i = 0; i < filter.memory_types_size(); ++i) {
    types.push_back(NameOf(filter.memory_types(i)));
    if (!types.back().empty()) continue;
    builder->Fail(ItemOf("filter.memory_types", i) + ": " + std::to_string(filter.memory_types(i)) +
                  "; expected a MemoryType, 1 to 4");
  }
  if (!types.empty()) builder->MatchAny(kMemoryTypeKey, types, false, "filter.memory_types");
}

void AddContext(const v1::ContextCue& context, const std::string& field, FilterBuilder* builder) {
  builder->Within(context.has_time_start(), context.time_start(), context.has_time_end(),
                  context.time_end(), field);
  if (!context.location().empty()) {
    builder->Match(kWhereKey, context.location(), false, field + ".location");
  }
  for (int i = 0; i < context.participants_size(); ++i) {
    builder->Match(kWhoKey, context.participants(i), false, ItemOf(field + ".participants", i));
  }
}

template <typename Request>
Asked FilterOfRequest(const Request& request, std::span<const std::string> filter_keys,
                      std::string* bytes) {
  FilterBuilder builder(filter_keys);
  if (request.has_filter()) AddFilter(request.filter(), &builder);
  if (request.has_context()) AddContext(request.context(), "context", &builder);
  const bool by_context = request.cue().has_context();
  if (by_context) AddContext(request.cue().context(), "cue.context", &builder);
  *bytes = by_context ? builder.BytesOfAny() : builder.Bytes();
  return builder.asked();
}

}  // namespace

Asked AttributesOf(const v1::Episode& episode, std::string* bytes) {
  AttributeList list(bytes);
  list.Add(kMemoryTypeKey, NameOf(v1::MEMORY_TYPE_EPISODIC), "episode");
  list.AddIfSet(kWhereKey, episode.where_location(), "episode.where_location");
  for (int i = 0; i < episode.who_size(); ++i) {
    list.AddIfSet(kWhoKey, episode.who(i), ItemOf("episode.who", i));
  }
  return list.asked();
}

Asked AttributesOf(const v1::Memory& memory, std::span<const std::string> filter_keys,
                   std::string* bytes) {
  AttributeList list(bytes);
  list.AddIfSet(kMemoryTypeKey, NameOf(memory.memory_type()), "memory.memory_type");
  for (int i = 0; i < memory.tags_size(); ++i) {
    list.Add(kTagKey, memory.tags(i), ItemOf("memory.tags", i));
  }
  for (const std::string& key : filter_keys) {
    const auto entry = memory.metadata().find(key);
    if (entry == memory.metadata().end()) continue;
    list.Add(key, entry->second, "memory.metadata[" + Quoted(key) + "]");
  }
  return list.asked();
}

Asked FilterOf(const v1::RecallRequest& request, std::span<const std::string> filter_keys,
               std::string* bytes) {
  return FilterOfRequest(request, filter_keys, bytes);
}

Asked FilterOf(const v1::StreamingRecallRequest& request, std::span<const std::string> filter_keys,
               std::string* bytes) {
  return FilterOfRequest(request, filter_keys, bytes);
}

}  // namespace engram
