#include "src/control/config_loader.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <memory>
#include <utility>

#include <toml++/toml.h>

#include "src/control/config_schema.h"

namespace engram {

namespace {

constexpr int kMaxNumber = 4095;  // of a processor or socket
constexpr size_t kShownBytes = 60;

// The number of letters to add, drop or change that makes `b` of `a`.
size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t changed = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, changed});
    }
  }
  return row[b.size()];
}

// The known name that was probably meant; empty when none is near.
std::string Nearest(std::string_view name, const std::vector<std::string_view>& known) {
  size_t best = std::max<size_t>(2, name.size() / 3) + 1;
  std::string nearest;
  for (const std::string_view candidate : known) {
    const size_t distance = EditDistance(name, candidate);
    if (distance < best && distance < candidate.size()) {
      best = distance;
      nearest = candidate;
    }
  }
  return nearest;
}

std::string Join(const std::vector<std::string_view>& names, std::string_view last = ", ") {
  std::string joined;
  for (size_t i = 0; i < names.size(); ++i) {
    if (i > 0) joined.append(i + 1 == names.size() ? last : ", ");
    joined.append(names[i]);
  }
  return joined;
}

// A value as the operator wrote it, more or less.
std::string Shown(const toml::node& node) {
  std::string text;
  if (const auto* string = node.as_string()) {
    text = TomlQuoted(string->get());
  } else if (const auto* array = node.as_array()) {
    for (const toml::node& item : *array) text += (text.empty() ? "" : ", ") + Shown(item);
    text = "[" + text + "]";
  } else if (const auto* integer = node.as_integer()) {
    text = std::to_string(integer->get());
  } else if (const auto* real = node.as_floating_point()) {
    char digits[32];
    text.assign(digits, std::to_chars(digits, digits + sizeof(digits), real->get()).ptr);
    if (text.find_first_not_of("-0123456789") == std::string::npos) text += ".0";
  } else if (const auto* boolean = node.as_boolean()) {
    text = boolean->get() ? "true" : "false";
  } else {
    text = node.is_table() ? "a section" : "a date or time";
  }
  if (text.size() > kShownBytes) {
    size_t end = kShownBytes;
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
    text = text.substr(0, end) + "…";
  }
  return text;
}

int LineOf(const toml::node& node) { return static_cast<int>(node.source().begin.line); }

// "0-2, 8" as numbers; nothing when it is not that.
std::optional<std::vector<int>> ParseRanges(std::string_view text) {
  std::vector<int> numbers;
  const char* at = text.data();
  const char* const end = at + text.size();
  const auto skip = [&] {
    while (at != end && *at == ' ') ++at;
  };
  const auto number = [&]() -> int {
    skip();
    int value = -1;
    const auto [next, error] = std::from_chars(at, end, value);
    if (error != std::errc() || value < 0 || value > kMaxNumber) return -1;
    at = next;
    skip();
    return value;
  };
  while (true) {
    const int first = number();
    int last = first;
    if (at != end && *at == '-') {
      ++at;
      last = number();
    }
    if (first < 0 || last < first) return std::nullopt;
    for (int i = first; i <= last; ++i) numbers.push_back(i);
    if (at == end) return numbers;
    if (*at++ != ',') return std::nullopt;
  }
}

// Puts the value of a node into a field. Answers what is wrong with it and what to write; empty
// when nothing is.
struct FieldReader {
  const toml::node& node;

  std::string operator()(const IntegerField& field) const {
    const std::string wanted = "write a whole number from " + std::to_string(field.min) + " to " +
                               std::to_string(field.max);
    const auto value = node.value_exact<int64_t>();
    if (!value) return Shown(node) + " is no whole number; " + wanted;
    if (*value < field.min || *value > field.max) {
      return Shown(node) + " is out of range; " + wanted;
    }
    field.set(*value);
    return {};
  }

  std::string operator()(const RealField& field) const {
    double value = 0;
    if (const auto* real = node.as_floating_point()) {
      value = real->get();
    } else if (const auto* integer = node.as_integer()) {
      value = static_cast<double>(integer->get());
    } else {
      return Shown(node) + " is no number; " + Wanted(field);
    }
    if (!(value >= field.min && value <= field.max)) {
      return Shown(node) + " is out of range; " + Wanted(field);
    }
    *field.value = value;
    return {};
  }
  static std::string Wanted(const RealField& field) {
    char text[64];
    std::snprintf(text, sizeof(text), "write a number from %g to %g", field.min, field.max);
    return text;
  }

  std::string operator()(const SwitchField& field) const {
    const auto* value = node.as_boolean();
    if (value == nullptr) return Shown(node) + " is no switch; write true or false";
    *field.value = value->get();
    return {};
  }

  std::string operator()(const ChoiceField& field) const {
    std::vector<std::string> quoted;
    for (const std::string_view name : field.names) quoted.push_back(TomlQuoted(name));
    const std::string wanted = "write " + Join({quoted.begin(), quoted.end()}, " or ");
    const auto* value = node.as_string();
    if (value == nullptr) return Shown(node) + " is no text in quotes; " + wanted;
    const auto found = std::ranges::find(field.names, std::string_view(value->get()));
    if (found == field.names.end()) return Shown(node) + " is not known; " + wanted;
    field.set(static_cast<size_t>(found - field.names.begin()));
    return {};
  }

  std::string operator()(const TextField& field) const {
    const auto* value = node.as_string();
    if (value == nullptr) return Shown(node) + " is no text; write it in quotes";
    if (std::string fault = field.fault(value->get()); !fault.empty()) return fault;
    *field.value = value->get();
    return {};
  }

  static std::string ReadEndpoint(const toml::node& node, Endpoint* out) {
    const auto* value = node.as_string();
    if (value == nullptr) {
      return Shown(node) + " is no address in quotes; write one like \"127.0.0.1:7654\"";
    }
    auto endpoint = ParseEndpoint(value->get());
    if (!endpoint) return endpoint.error().message;
    *out = *std::move(endpoint);
    return {};
  }

  std::string operator()(const EndpointField& field) const {
    if (const auto* value = node.as_string(); value != nullptr && value->get().empty()) {
      field.value->reset();
      return {};
    }
    Endpoint endpoint;
    if (std::string fault = ReadEndpoint(node, &endpoint); !fault.empty()) return fault;
    *field.value = std::move(endpoint);
    return {};
  }

  std::string operator()(const EndpointListField& field) const {
    std::vector<Endpoint> endpoints;
    std::string fault;
    const auto read = [&](const toml::node& item) {
      Endpoint endpoint;
      if (fault.empty()) fault = ReadEndpoint(item, &endpoint);
      endpoints.push_back(std::move(endpoint));
    };
    if (const auto* array = node.as_array()) {
      for (const toml::node& item : *array) read(item);
    } else {
      read(node);
    }
    if (fault.empty() && endpoints.empty()) fault = "[] is no address; write at least one";
    if (fault.empty()) *field.value = std::move(endpoints);
    return fault;
  }

  std::string operator()(const NumberListField& field) const {
    std::optional<std::vector<int>> numbers;
    if (const auto* text = node.as_string()) {
      numbers = ParseRanges(text->get());
    } else if (const auto* array = node.as_array()) {
      numbers.emplace();
      for (const toml::node& item : *array) {
        const auto number = item.value_exact<int64_t>();
        if (!number || *number < 0 || *number > kMaxNumber) {
          numbers.reset();
          break;
        }
        numbers->push_back(static_cast<int>(*number));
      }
    }
    if (!numbers) {
      return Shown(node) + " is no list of numbers from 0 to " + std::to_string(kMaxNumber) +
             "; write one like [0, 1, 2] or \"0-2\"";
    }
    *field.value = *std::move(numbers);
    return {};
  }

  std::string operator()(const NameListField& field) const {
    const auto* array = node.as_array();
    std::vector<std::string> names;
    bool sound = array != nullptr;
    if (sound) {
      for (const toml::node& item : *array) {
        const auto* name = item.as_string();
        sound = sound && name != nullptr;
        if (sound) names.push_back(name->get());
      }
    }
    if (!sound) return Shown(node) + " is no list of texts; write one like [\"lang\", \"topic\"]";
    *field.value = std::move(names);
    return {};
  }
};

// Walks one file and gathers every fault.
class Reader {
 public:
  Reader(const toml::table& root, ConfigReading* reading)
      : root_(root), reading_(*reading), fields_(FieldsOf(&reading->config)) {
    SpaceConfig none;
    for (const SchemaField& field : FieldsOf(&none)) space_keys_.push_back(field.key);
    for (const SchemaField& field : fields_) {
      if (sections_.empty() || sections_.back() != field.section) {
        sections_.push_back(field.section);
      }
    }
  }

  void Read() {
    for (const auto& [name, node] : root_) {
      if (name.str() == "space") continue;  // After [index], whose values it takes over.
      if (std::ranges::find(sections_, name.str()) == sections_.end()) {
        UnknownSection(name, node);
      } else if (const toml::table* table = node.as_table(); table != nullptr) {
        NoteLine(std::string(name.str()), name);
        ReadSection(name.str(), *table);
      } else {
        Fault(LineOf(node), std::string(name.str()),
              Shown(node) + " stands where a section is expected; write [" +
                  std::string(name.str()) + "] and the fields below it");
      }
    }
    if (const toml::node* node = root_.get("space")) ReadSpaces(*node);
  }

 private:
  void Fault(int line, std::string field, std::string message) {
    reading_.faults.push_back({line, std::move(field), std::move(message)});
  }
  void NoteLine(std::string field, const toml::key& key) {
    reading_.config.source.lines[std::move(field)] = static_cast<int>(key.source().begin.line);
  }

  std::vector<std::string_view> KeysOf(std::string_view section) const {
    std::vector<std::string_view> keys;
    for (const SchemaField& field : fields_) {
      if (field.section == section) keys.push_back(field.key);
    }
    return keys;
  }

  // The sections that have this key, as "[limits]".
  std::string SectionsWith(std::string_view key) const {
    std::string found;
    for (const SchemaField& field : fields_) {
      if (field.key != key) continue;
      found += (found.empty() ? "[" : " or [") + std::string(field.section) + "]";
    }
    if (std::ranges::find(space_keys_, key) != space_keys_.end()) {
      found += found.empty() ? "[[space]]" : " or [[space]]";
    }
    return found;
  }

  void UnknownSection(const toml::key& name, const toml::node& node) {
    const std::string text(name.str());
    const int line = static_cast<int>(name.source().begin.line);
    if (const std::string home = SectionsWith(text); !node.is_table() && !home.empty()) {
      Fault(line, text, "stands outside of its section; move it below " + home);
      return;
    }
    std::vector<std::string_view> known = sections_;
    known.push_back("space");
    const std::string nearest = Nearest(text, known);
    const std::string what = node.is_table() ? "unknown section" : "unknown field, in no section";
    if (nearest.empty()) {
      Fault(line, text, what + "; there are " + Join(known, " and "));
    } else {
      Fault(line, text,
            what + "; did you mean " + (nearest == "space" ? "[[space]]" : "[" + nearest + "]") +
                "?");
    }
  }

  void UnknownKey(std::string_view section, const toml::key& key,
                  const std::vector<std::string_view>& known) {
    const std::string text(key.str());
    const std::string nearest = Nearest(text, known);
    const std::string home = SectionsWith(text);
    std::string remedy;
    if (!home.empty()) {
      remedy = "it belongs below " + home;
    } else if (!nearest.empty()) {
      remedy = "did you mean " + nearest + "?";
    } else {
      remedy = "here go " + Join(known, " and ");
    }
    Fault(static_cast<int>(key.source().begin.line), std::string(section) + "." + text,
          "unknown field; " + remedy);
  }

  void ReadField(const SchemaField& field, const toml::node& node) {
    if (std::string fault = std::visit(FieldReader{node}, field.value); !fault.empty()) {
      Fault(LineOf(node), field.name(), std::move(fault));
    }
  }

  void ReadSection(std::string_view section, const toml::table& table) {
    for (const auto& [key, node] : table) {
      const auto field = std::ranges::find_if(fields_, [&](const SchemaField& candidate) {
        return candidate.section == section && candidate.key == key.str();
      });
      if (field == fields_.end()) {
        UnknownKey(section, key, KeysOf(section));
      } else {
        NoteLine(field->name(), key);
        ReadField(*field, node);
      }
    }
  }

  void ReadSpaces(const toml::node& node) {
    const toml::array* array = node.as_array();
    if (array == nullptr) {
      Fault(LineOf(node), "space",
            Shown(node) +
                " stands where a list of spaces is expected; write [[space]], with two "
                "brackets, once for each");
      return;
    }
    for (const toml::node& item : *array) {
      const toml::table* table = item.as_table();
      if (table == nullptr) {
        Fault(LineOf(item), "space",
              Shown(item) + " is no space; write [[space]] and name = \"…\"");
        continue;
      }
      ReadSpace(*table);
    }
  }

  void ReadSpace(const toml::table& table) {
    const std::string at = "space[" + std::to_string(reading_.config.spaces.size()) + "]";
    reading_.config.source.lines[at] = LineOf(table);
    SpaceConfig space;
    space.precision = reading_.config.index.precision;
    space.partitions = reading_.config.index.partitions;
    space.ttl_s = reading_.config.ttl_s;
    space.filter_keys = reading_.config.index.filter_keys;
    const std::vector<SchemaField> fields = FieldsOf(&space);
    for (const auto& [key, node] : table) {
      const auto field = std::ranges::find(fields, key.str(), &SchemaField::key);
      if (field == fields.end()) {
        UnknownKey("space", key, space_keys_);
      } else {
        NoteLine(at + "." + std::string(key.str()), key);
        ReadField(*field, node);
      }
    }
    if (!table.contains("name")) {
      Fault(LineOf(table), "space.name", "a space needs a name; write name = \"films\", say");
    }
    reading_.config.spaces.push_back(std::move(space));
  }

  const toml::table& root_;
  ConfigReading& reading_;
  const std::vector<SchemaField> fields_;
  std::vector<std::string_view> sections_;
  std::vector<std::string_view> space_keys_;
};

}  // namespace

ConfigReading ReadConfig(std::string_view text, const std::string& name, const Topology* topology) {
  ConfigReading reading;
  reading.config.source.name = name;
  // Debian's toml++ reports a syntax error by exception; it ends here.
  try {
    const toml::table root = toml::parse(text, name);
    Reader(root, &reading).Read();
  } catch (const toml::parse_error& error) {
    reading.faults.push_back({static_cast<int>(error.source().begin.line), "",
                              "this is not TOML: " + std::string(error.description())});
    return reading;
  }
  for (ConfigFault& fault : CheckConfig(reading.config, topology)) {
    reading.faults.push_back(std::move(fault));
  }
  std::ranges::stable_sort(reading.faults, {}, &ConfigFault::line);
  return reading;
}

Result<Config> ParseConfig(std::string_view text, const std::string& name,
                           const Topology* topology) {
  ConfigReading reading = ReadConfig(text, name, topology);
  if (!reading.faults.empty()) {
    return Fail(ErrorCode::kInvalidArgument, JoinFaults(std::move(reading.faults), name));
  }
  return std::move(reading.config);
}

Result<Config> LoadConfig(const std::string& path) {
  auto text = ReadConfigFile(path);
  if (!text) return std::unexpected(text.error());
  auto topology = DiscoverTopology();
  if (!topology) return std::unexpected(topology.error());
  return ParseConfig(*text, path, &*topology);
}

Result<std::string> ReadConfigFile(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"),
                                                             std::fclose);
  std::string text;
  char block[4096];
  while (file != nullptr) {
    const size_t bytes = std::fread(block, 1, sizeof(block), file.get());
    text.append(block, bytes);
    if (bytes < sizeof(block)) break;
  }
  if (file == nullptr || std::ferror(file.get()) != 0) {
    return Fail(ErrorCode::kNotFound,
                path + ": cannot read the configuration; name a file that exists");
  }
  return text;
}

}  // namespace engram
