#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "src/control/config.h"

// Every field of the configuration file, once: its name, its bounds, where it goes. Reading,
// writing and looking for fields that nothing honours all go over this list.

namespace engram {

struct IntegerField {
  std::function<int64_t()> get;
  std::function<void(int64_t)> set;
  int64_t min;
  int64_t max;
};
struct RealField {
  double* value;
  double min;
  double max;
};
struct SwitchField {
  bool* value;
};
struct ChoiceField {
  std::vector<std::string_view> names;
  std::function<size_t()> get;  // place in names; names.size(): unset
  std::function<void(size_t)> set;
};
struct TextField {
  std::string* value;
  // What is wrong with a text and what to write; empty: nothing.
  std::function<std::string(const std::string&)> fault;
};
// One address, or "" for none.
struct EndpointField {
  std::optional<Endpoint>* value;
};
// One address or a list of them.
struct EndpointListField {
  std::vector<Endpoint>* value;
};
// Numbers, [0, 1, 2], or as Linux writes processors, "0-2, 8".
struct NumberListField {
  std::vector<int>* value;
};
struct NameListField {
  std::vector<std::string>* value;
};

struct SchemaField {
  std::string_view section;  // "listen", "space" for the entries of [[space]]
  std::string_view key;
  std::variant<IntegerField, RealField, SwitchField, ChoiceField, TextField, EndpointField,
               EndpointListField, NumberListField, NameListField>
      value;
  // What happens instead, where this version does not honour the field yet; empty: it does.
  std::string_view instead = {};
  // What holds while the field has no value, for which 0 or an empty list stands; empty: it always
  // has one.
  std::string_view unset = {};

  std::string name() const { return std::string(section) + "." + std::string(key); }
};

// Over the members of `config`, [[space]] apart. `config` outlives the list.
std::vector<SchemaField> FieldsOf(Config* config);
// The same of one entry of [[space]].
std::vector<SchemaField> FieldsOf(SpaceConfig* space);

// The value in TOML, or nothing where it is unset.
std::optional<std::string> TomlValue(const SchemaField& field);

// A text in TOML's quotes.
std::string TomlQuoted(std::string_view text);

}  // namespace engram
