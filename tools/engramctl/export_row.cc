#include "tools/engramctl/export_row.h"

#include <array>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "src/core/hash.h"

namespace engram {

namespace {

// Bytes of the UTF-8 sequence at the front of `bytes`, which is not empty; 0 where there is none.
size_t SequenceBytes(std::string_view bytes, uint32_t* code_point) {
  const auto at = [&](size_t i) { return static_cast<uint8_t>(bytes[i]); };
  const uint8_t first = at(0);
  if (first < 0x80) {
    *code_point = first;
    return 1;
  }
  const size_t count = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || bytes.size() < count) return 0;
  uint32_t value = first & (0xFF >> (count + 1));
  for (size_t i = 1; i < count; ++i) {
    if ((at(i) & 0xC0) != 0x80) return 0;
    value = value << 6 | (at(i) & 0x3F);
  }
  constexpr std::array<uint32_t, 5> kLeast{0, 0, 0x80, 0x800, 0x10000};
  const bool is_surrogate = value >= 0xD800 && value < 0xE000;
  if (value < kLeast[count] || value > 0x10FFFF || is_surrogate) return 0;
  *code_point = value;
  return count;
}

// The shortest digits that come back as the same float32, also where the reader takes a double.
void AppendNumber(float value, std::string* to) {
  std::array<char, 32> text;
  char* end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  double as_read = 0;
  std::from_chars(text.data(), end, as_read);
  if (static_cast<float>(as_read) != value) {
    end =
        std::to_chars(text.data(), text.data() + text.size(), value, std::chars_format::general, 9)
            .ptr;
  }
  to->append(text.data(), end);
  // An integer has no sign of zero.
  if (value == 0 && std::signbit(value)) to->append(".0");
}

void AppendText(std::string_view name, std::string_view bytes, std::string* to) {
  to->push_back('"');
  to->append(name);
  if (IsPlainText(bytes)) {
    to->append("\":").append(nlohmann::json(bytes).dump());
  } else {
    to->append("_base64\":\"").append(Base64(bytes)).push_back('"');
  }
}

}  // namespace

bool IsPlainText(std::string_view bytes) {
  while (!bytes.empty()) {
    uint32_t code_point = 0;
    const size_t used = SequenceBytes(bytes, &code_point);
    if (used == 0) return false;
    const bool is_space = code_point == '\t' || code_point == '\n' || code_point == '\r';
    if (code_point < 0x20 && !is_space) return false;
    if (code_point >= 0x7F && code_point < 0xA0) return false;
    bytes.remove_prefix(used);
  }
  return true;
}

std::string Base64(std::string_view bytes) {
  constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  text.reserve((bytes.size() + 2) / 3 * 4);
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t count = std::min<size_t>(3, bytes.size() - i);
    uint32_t word = 0;
    for (size_t j = 0; j < 3; ++j) {
      word = word << 8 | (j < count ? static_cast<uint8_t>(bytes[i + j]) : 0);
    }
    for (size_t j = 0; j < 4; ++j) {
      text.push_back(j <= count ? kDigits[word >> (18 - 6 * j) & 63] : '=');
    }
  }
  return text;
}

std::string JsonLineOf(const RecallHit& hit) {
  std::string line = "{";
  line.reserve(256 + 12 * hit.vector.size() + 2 * hit.payload.size());
  AppendText("id", hit.id, &line);
  line.append(",\"vector\":[");
  for (size_t i = 0; i < hit.vector.size(); ++i) {
    if (i > 0) line.push_back(',');
    AppendNumber(hit.vector[i], &line);
  }
  line.append("],\"when_ns\":").append(std::to_string(hit.when_ns));
  line.append(",\"confidence\":");
  AppendNumber(hit.confidence, &line);
  line.append(",\"stamp\":").append(std::to_string(hit.stamp)).push_back(',');
  AppendText("payload", hit.payload, &line);
  if (hit.payload_kind != PayloadKind::kOpaque) {
    line.append(",\"payload_kind\":")
        .append(std::to_string(static_cast<unsigned>(hit.payload_kind)));
  }
  line.push_back('}');
  return line;
}

std::string IdLineOf(std::string_view id) {
  if (IsPlainText(id)) return nlohmann::json(id).dump();
  return "{\"id_base64\":\"" + Base64(id) + "\"}";
}

SeenIds::SeenIds() : places_(1'024) {}

bool SeenIds::Add(std::string_view id) {
  // The lowest bit keeps it from being nothing.
  const Key key{HashString(id, 1) | 1, HashString(id, 2)};
  size_t place = PlaceOf(key);
  if (places_[place] == key) return false;
  if ((size_ + 1) * 4 > places_.size() * 3) {
    Grow();
    place = PlaceOf(key);
  }
  places_[place] = key;
  ++size_;
  return true;
}

size_t SeenIds::PlaceOf(const Key& key) const {
  const size_t mask = places_.size() - 1;
  size_t place = key.second & mask;
  while (places_[place] != Key{} && places_[place] != key) place = (place + 1) & mask;
  return place;
}

void SeenIds::Grow() {
  std::vector<Key> before(places_.size() * 2);
  std::swap(before, places_);
  for (const Key& key : before) {
    if (key != Key{}) places_[PlaceOf(key)] = key;
  }
}

}  // namespace engram
