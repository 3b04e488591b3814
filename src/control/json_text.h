#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include <google/protobuf/timestamp.pb.h>

// JSON as the HTTP gateway writes it, and times as JSON has them.

namespace engram {

// A time of RFC 3339 with up to nine digits behind the second's point; nothing for any other text.
// A leap second is the second after it.
std::optional<google::protobuf::Timestamp> ReadTime(std::string_view text);
// In UTC, with as many threes of digits behind the point as it needs.
std::string TimeText(int64_t unix_ns);

// Appends JSON to a text. Objects and lists are opened and closed by the caller, in turn; commas
// are the writer's. What is no UTF-8 becomes U+FFFD, a number that is not finite null.
class JsonWriter {
 public:
  explicit JsonWriter(std::string* text) : text_(text) {}

  void OpenObject() { Open('{'); }
  void OpenObject(std::string_view key) { Key(key).Open('{'); }
  void CloseObject() { Close('}'); }
  void OpenList(std::string_view key) { Key(key).Open('['); }
  void CloseList() { Close(']'); }

  void Text(std::string_view key, std::string_view value) { Key(key).Text(value); }
  void TextIfSet(std::string_view key, std::string_view value) {
    if (!value.empty()) Text(key, value);
  }
  void Integer(std::string_view key, uint64_t value);
  void Number(std::string_view key, float value) { Key(key).Number(value); }
  void Flag(std::string_view key, bool value);
  void Time(std::string_view key, int64_t unix_ns) { Text(key, TimeText(unix_ns)); }
  // `json` as it is.
  void Raw(std::string_view key, std::string_view json);
  void Base64(std::string_view key, std::string_view bytes);
  void Numbers(std::string_view key, std::span<const float> values);

  // Within a list.
  void Text(std::string_view value);
  void Number(float value);

 private:
  JsonWriter& Key(std::string_view key);
  void Comma() {
    if (needs_comma_) text_->push_back(',');
    needs_comma_ = true;
  }
  void Open(char mark);
  void Close(char mark);
  void Quote(std::string_view value);

  std::string* const text_;
  bool needs_comma_ = false;
};

}  // namespace engram
