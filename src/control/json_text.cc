#include "src/control/json_text.h"

#include <array>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>

#include "src/control/memory_codec.h"

namespace engram {

namespace {

constexpr int64_t kNanosPerSecond = 1'000'000'000;
constexpr std::string_view kNotText = "\xEF\xBF\xBD";  // U+FFFD

// Reads a text from its beginning.
class TimeReader {
 public:
  explicit TimeReader(std::string_view text) : left_(text) {}

  bool empty() const { return left_.empty(); }
  char first() const { return left_.empty() ? '\0' : left_.front(); }
  bool Take(std::string_view any_of) {
    if (left_.empty() || any_of.find(left_.front()) == std::string_view::npos) return false;
    left_.remove_prefix(1);
    return true;
  }
  // Exactly so many digits, for a number within [least, most].
  bool Digits(size_t count, int least, int most, int* number) {
    if (left_.size() < count) return false;
    *number = 0;
    for (size_t i = 0; i < count; ++i) {
      const char digit = left_[i];
      if (digit < '0' || digit > '9') return false;
      *number = *number * 10 + (digit - '0');
    }
    left_.remove_prefix(count);
    return *number >= least && *number <= most;
  }
  // 1 to 9 digits behind the point.
  bool Fraction(int* nanos) {
    int digits = 0;
    for (; first() >= '0' && first() <= '9'; left_.remove_prefix(1)) {
      if (++digits > 9) return false;
      *nanos = *nanos * 10 + (first() - '0');
    }
    if (digits == 0) return false;
    for (; digits < 9; ++digits) *nanos *= 10;
    return true;
  }

 private:
  std::string_view left_;
};

}  // namespace

std::optional<google::protobuf::Timestamp> ReadTime(std::string_view text) {
  TimeReader reader(text);
  int year = 0;
  int month = 0;
  int day = 0;
  int hour = 0;
  int minute = 0;
  int second = 0;
  int nanos = 0;
  const bool has_date = reader.Digits(4, 0, 9'999, &year) && reader.Take("-") &&
                        reader.Digits(2, 1, 12, &month) && reader.Take("-") &&
                        reader.Digits(2, 1, 31, &day);
  const bool has_time = has_date && reader.Take("Tt ") && reader.Digits(2, 0, 23, &hour) &&
                        reader.Take(":") && reader.Digits(2, 0, 59, &minute) && reader.Take(":") &&
                        reader.Digits(2, 0, 60, &second);
  if (!has_time || (reader.Take(".") && !reader.Fraction(&nanos))) return std::nullopt;
  int offset_minutes = 0;
  if (!reader.Take("Zz")) {
    const int sign = reader.first() == '-' ? -1 : 1;
    int hours = 0;
    int minutes = 0;
    if (!reader.Take("+-") || !reader.Digits(2, 0, 23, &hours) || !reader.Take(":") ||
        !reader.Digits(2, 0, 59, &minutes)) {
      return std::nullopt;
    }
    offset_minutes = sign * (hours * 60 + minutes);
  }
  const std::chrono::year_month_day date{std::chrono::year(year),
                                         std::chrono::month(static_cast<unsigned>(month)),
                                         std::chrono::day(static_cast<unsigned>(day))};
  if (!reader.empty() || !date.ok()) return std::nullopt;
  const int64_t days = std::chrono::sys_days(date).time_since_epoch().count();
  google::protobuf::Timestamp time;
  time.set_seconds(((days * 24 + hour) * 60 + minute - offset_minutes) * 60 + second);
  time.set_nanos(nanos);
  return time;
}

std::string TimeText(int64_t unix_ns) {
  const google::protobuf::Timestamp time = ToTimestamp(unix_ns);
  const std::chrono::sys_seconds seconds{std::chrono::seconds(time.seconds())};
  const auto days = std::chrono::floor<std::chrono::days>(seconds);
  const std::chrono::year_month_day date(days);
  const auto of_day = (seconds - days).count();
  std::array<char, 48> text{};
  const int size =
      std::snprintf(text.data(), text.size(), "%04d-%02u-%02uT%02d:%02d:%02d",
                    static_cast<int>(date.year()), static_cast<unsigned>(date.month()),
                    static_cast<unsigned>(date.day()), static_cast<int>(of_day / 3'600),
                    static_cast<int>(of_day / 60 % 60), static_cast<int>(of_day % 60));
  std::string written(text.data(), static_cast<size_t>(size));
  if (time.nanos() != 0) {
    const int fraction = std::snprintf(text.data(), text.size(), ".%09d", time.nanos());
    std::string_view digits(text.data(), static_cast<size_t>(fraction));
    while (digits.ends_with("000")) digits.remove_suffix(3);
    written.append(digits);
  }
  return written + "Z";
}

JsonWriter& JsonWriter::Key(std::string_view key) {
  Comma();
  Quote(key);
  text_->push_back(':');
  needs_comma_ = false;
  return *this;
}

void JsonWriter::Open(char mark) {
  Comma();
  text_->push_back(mark);
  needs_comma_ = false;
}

void JsonWriter::Close(char mark) {
  text_->push_back(mark);
  needs_comma_ = true;
}

void JsonWriter::Integer(std::string_view key, uint64_t value) { Raw(key, std::to_string(value)); }

void JsonWriter::Flag(std::string_view key, bool value) { Raw(key, value ? "true" : "false"); }

void JsonWriter::Raw(std::string_view key, std::string_view json) {
  Key(key).Comma();
  text_->append(json);
}

void JsonWriter::Base64(std::string_view key, std::string_view bytes) {
  static constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const std::string_view part = bytes.substr(i, 3);
    uint32_t bits = 0;
    for (size_t b = 0; b < 3; ++b) {
      bits = bits << 8 | (b < part.size() ? static_cast<uint8_t>(part[b]) : 0U);
    }
    for (size_t d = 0; d < 4; ++d) {
      text.push_back(d <= part.size() ? kDigits[bits >> (18 - 6 * d) & 63] : '=');
    }
  }
  Text(key, text);
}

void JsonWriter::Numbers(std::string_view key, std::span<const float> values) {
  OpenList(key);
  for (const float value : values) Number(value);
  CloseList();
}

void JsonWriter::Text(std::string_view value) {
  Comma();
  Quote(value);
}

void JsonWriter::Number(float value) {
  Comma();
  if (!std::isfinite(value)) {
    text_->append("null");
    return;
  }
  std::array<char, 24> digits;
  const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr;
  text_->append(digits.data(), end);
}

// RFC 8259, 7: quotes, backslashes and what is below a space are escaped.
void JsonWriter::Quote(std::string_view value) {
  text_->push_back('"');
  while (!value.empty()) {
    const std::string_view good = value.substr(0, Utf8Prefix(value));
    size_t plain = 0;
    for (size_t i = 0; i < good.size(); ++i) {
      const auto byte = static_cast<uint8_t>(good[i]);
      if (byte >= 0x20 && byte != '"' && byte != '\\') continue;
      text_->append(good.substr(plain, i - plain));
      plain = i + 1;
      if (byte == '"' || byte == '\\') {
        text_->push_back('\\');
        text_->push_back(good[i]);
      } else if (byte == '\n') {
        text_->append("\\n");
      } else {
        std::array<char, 8> escape{};
        std::snprintf(escape.data(), escape.size(), "\\u%04x", byte);
        text_->append(escape.data());
      }
    }
    text_->append(good.substr(plain));
    value.remove_prefix(good.size());
    if (value.empty()) break;
    text_->append(kNotText);
    value.remove_prefix(1);
  }
  text_->push_back('"');
}

}  // namespace engram
