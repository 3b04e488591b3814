#include "tools/engramctl/recall_filter.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <map>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "src/core/attributes.h"
#include "src/core/clock.h"
#include "tools/clients/cpp/engram_client.h"

namespace engram {

namespace {

constexpr std::string_view kTagName = "tag";
constexpr int64_t kMostSeconds = INT64_MAX / kNanosPerSecond - 1;
constexpr size_t kNanoDigits = 9;

// Takes parts off a text; once one was missing, nothing is `sound` any more.
class TextReader {
 public:
  explicit TextReader(std::string_view text) : left_(text) {}
  bool sound() const { return sound_; }
  bool ended() const { return left_.empty(); }

  // A number of exactly `digits`.
  int Number(size_t digits) {
    int number = 0;
    const std::string_view text = left_.substr(0, digits);
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (text.size() != digits || error != std::errc() || end != text.data() + digits ||
        number < 0) {
      sound_ = false;
    }
    left_.remove_prefix(text.size());
    return number;
  }
  // One of `letters`, which is taken; 0 where there is another.
  char Any(std::string_view letters) {
    if (left_.empty() || letters.find(left_[0]) == std::string_view::npos) return 0;
    const char taken = left_[0];
    left_.remove_prefix(1);
    return taken;
  }
  void Expect(std::string_view letters) { sound_ = Any(letters) != 0 && sound_; }
  // Nanoseconds of what follows a point, if one does.
  int64_t Fraction() {
    if (Any(".") == 0) return 0;
    int64_t nanos = 0;
    size_t digits = 0;
    for (; !left_.empty() && left_[0] >= '0' && left_[0] <= '9'; ++digits) {
      if (digits < kNanoDigits) nanos = nanos * 10 + (left_[0] - '0');
      left_.remove_prefix(1);
    }
    if (digits == 0) sound_ = false;
    for (; digits < kNanoDigits; ++digits) nanos *= 10;
    return nanos;
  }

 private:
  std::string_view left_;
  bool sound_ = true;
};

// Nothing where it does not fit.
std::optional<int64_t> NanosOf(int64_t seconds, int64_t nanos) {
  if (seconds > kMostSeconds || seconds < -kMostSeconds) return std::nullopt;
  return seconds * kNanosPerSecond + nanos;
}

std::optional<int64_t> ParseSeconds(std::string_view text) {
  const bool negative = text.starts_with('-');
  if (negative) text.remove_prefix(1);
  const std::string_view whole = text.substr(0, text.find('.'));
  int64_t seconds = 0;
  const auto [end, error] = std::from_chars(whole.data(), whole.data() + whole.size(), seconds);
  if (whole.empty() || whole[0] == '-' || error != std::errc() ||
      end != whole.data() + whole.size()) {
    return std::nullopt;
  }
  TextReader rest(text.substr(whole.size()));
  const int64_t nanos = rest.Fraction();
  if (!rest.sound() || !rest.ended()) return std::nullopt;
  const auto time = NanosOf(seconds, nanos);
  return time && negative ? std::optional(-*time) : time;
}

// RFC 3339, or its date alone.
std::optional<int64_t> ParseDate(std::string_view text) {
  TextReader reader(text);
  const int year = reader.Number(4);
  reader.Expect("-");
  const auto month = static_cast<unsigned>(reader.Number(2));
  reader.Expect("-");
  const auto day = static_cast<unsigned>(reader.Number(2));
  if (!reader.sound()) return std::nullopt;
  const std::chrono::year_month_day date{std::chrono::year(year), std::chrono::month(month),
                                         std::chrono::day(day)};
  if (!date.ok()) return std::nullopt;
  int64_t seconds = std::chrono::sys_days(date).time_since_epoch().count() * int64_t{86'400};
  if (reader.ended()) return NanosOf(seconds, 0);
  reader.Expect("Tt ");
  const int hour = reader.Number(2);
  reader.Expect(":");
  const int minute = reader.Number(2);
  reader.Expect(":");
  const int second = reader.Number(2);
  const int64_t nanos = reader.Fraction();
  seconds += hour * 3'600 + minute * 60 + second;
  int offset_minutes = 0;
  if (const char sign = reader.Any("Zz+-"); sign == '+' || sign == '-') {
    const int hours = reader.Number(2);
    reader.Expect(":");
    const int minutes = reader.Number(2);
    if (hours > 23 || minutes > 59) return std::nullopt;
    offset_minutes = (hours * 60 + minutes) * (sign == '+' ? 1 : -1);
  } else if (sign == 0) {
    return std::nullopt;
  }
  if (!reader.sound() || !reader.ended() || hour > 23 || minute > 59 || second > 60) {
    return std::nullopt;
  }
  return NanosOf(seconds - offset_minutes * 60, nanos);
}

// Values by key, in the order in which the keys came.
class Conditions {
 public:
  void Add(std::string_view condition) {
    const size_t equals = condition.find('=');
    const std::string_view name = condition.substr(0, equals);
    const std::string key(name == kTagName ? kTagKey : name);
    const auto [place, is_new] = places_.try_emplace(key, lists_.size());
    if (is_new) lists_.push_back({key, {}});
    lists_[place->second].second.push_back(condition.substr(equals + 1));
  }
  const std::vector<std::pair<std::string, std::vector<std::string_view>>>& lists() const {
    return lists_;
  }

 private:
  std::map<std::string, size_t> places_;
  std::vector<std::pair<std::string, std::vector<std::string_view>>> lists_;
};

}  // namespace

Result<int64_t> ParseTime(std::string_view text) {
  auto time = ParseDate(text);
  if (!time) time = ParseSeconds(text);
  if (time) return *time;
  return Fail(ErrorCode::kInvalidArgument,
              "'" + Printable(text) +
                  "' is no time of the years 1678 to 2261; write one like 2024-05-01T12:30:00Z, "
                  "2024-05-01, or seconds since 1970");
}

Result<void> CheckCondition(std::string_view text) {
  const size_t equals = text.find('=');
  const auto fail = [&](const std::string& what) {
    return Fail(ErrorCode::kInvalidArgument, "'" + Printable(text) + "' " + what);
  };
  if (equals == std::string_view::npos || equals == 0) {
    return fail("is no KEY=VALUE; write one like source=docs or tag=red");
  }
  const std::string_view key = text.substr(0, equals);
  const std::string_view value = text.substr(equals + 1);
  if (!IsValidFilterKey(key)) {
    return fail("has no key before '='; write up to 64 printable characters without spaces");
  }
  if (value.size() > kMaxAttributeValueBytes) {
    return fail("has a value of " + std::to_string(value.size()) + " bytes; write at most 255");
  }
  if (key == kTagName && value.empty()) return fail("names no tag; write one like tag=red");
  return {};
}

Result<std::string> FilterBytes(const FilterOptions& options) {
  TimeRange times;
  for (const auto& [text, bound] :
       {std::pair(&options.since, &times.begin_ns), std::pair(&options.until, &times.end_ns)}) {
    if (text->empty()) continue;
    const Result<int64_t> time = ParseTime(*text);
    if (!time) return std::unexpected(time.error());
    *bound = *time;
  }
  if (times.begin_ns >= times.end_ns) {
    return Fail(ErrorCode::kInvalidArgument,
                "--until is not after --since; what is at --until is not found any more");
  }
  Conditions required;
  Conditions excluded;
  for (const std::string& text : options.conditions) {
    const bool excludes = text.starts_with('!');
    const std::string_view condition = std::string_view(text).substr(excludes ? 1 : 0);
    if (auto sound = CheckCondition(condition); !sound) return std::unexpected(sound.error());
    (excludes ? excluded : required).Add(condition);
  }
  for (const std::string& text : options.exclusions) {
    if (auto sound = CheckCondition(text); !sound) return std::unexpected(sound.error());
    excluded.Add(text);
  }
  FilterWriter writer;
  writer.SetTimes(times);
  bool fits = true;
  for (const auto& [key, values] : required.lists()) fits = fits && writer.Require(key, values);
  for (const auto& [key, values] : excluded.lists()) fits = fits && writer.Exclude(key, values);
  if (!fits) {
    return Fail(ErrorCode::kInvalidArgument,
                "the filter is too large: at most 16 keys with 64 values in 4096 bytes");
  }
  return writer.Bytes();
}

}  // namespace engram
