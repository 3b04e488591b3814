#include "src/control/config_writer.h"

#include <string_view>
#include <vector>

#include "src/control/config_schema.h"

namespace engram {

namespace {

std::string FieldLine(const SchemaField& field) {
  const auto value = TomlValue(field);
  const std::string key(field.key);
  std::string line =
      value ? key + " = " + *value : "# " + key + ": unset, " + std::string(field.unset);
  if (value && !field.instead.empty()) line += "  # not honoured yet";
  return line + "\n";
}

}  // namespace

std::string ConfigToml(const Config& config, const std::string& cores) {
  Config copy = config;
  std::string text;
  std::string_view section;
  for (const SchemaField& field : FieldsOf(&copy)) {
    const bool replaced = field.section == "cores" && !cores.empty();
    if (field.section != section) {
      section = field.section;
      if (!text.empty()) text += "\n";
      text += replaced ? cores : "[" + std::string(section) + "]\n";
    }
    // A core map's reasons stand for all of them but the sockets, which the operator chose.
    if (!replaced || (field.key == "sockets" && !copy.sockets.empty())) text += FieldLine(field);
  }
  for (SpaceConfig& space : copy.spaces) {
    text += "\n[[space]]\n";
    for (const SchemaField& field : FieldsOf(&space)) text += FieldLine(field);
  }
  return text;
}

}  // namespace engram
