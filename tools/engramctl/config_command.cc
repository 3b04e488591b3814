#include <cstdio>
#include <nlohmann/json.hpp>
#include <utility>

#include "src/control/config_loader.h"
#include "src/control/config_schema.h"
#include "src/control/config_writer.h"
#include "src/control/core_map.h"
#include "tools/engramctl/commands.h"

namespace engram {

namespace {

nlohmann::json FaultJson(const ConfigFault& fault) {
  nlohmann::json json = {{"message", fault.message}};
  if (fault.line > 0) json["line"] = fault.line;
  if (!fault.field.empty()) json["field"] = fault.field;
  return json;
}

// The value of a field, null where it is unset.
struct JsonValue {
  const SchemaField& field;

  nlohmann::json operator()(const IntegerField& f) const { return f.get(); }
  nlohmann::json operator()(const RealField& f) const { return *f.value; }
  nlohmann::json operator()(const SwitchField& f) const { return *f.value; }
  nlohmann::json operator()(const ChoiceField& f) const { return f.names[f.get()]; }
  nlohmann::json operator()(const TextField& f) const { return *f.value; }
  nlohmann::json operator()(const EndpointField& f) const {
    return f.value->has_value() ? (*f.value)->ToString() : "";
  }
  nlohmann::json operator()(const EndpointListField& f) const {
    nlohmann::json list = nlohmann::json::array();
    for (const Endpoint& endpoint : *f.value) list.push_back(endpoint.ToString());
    return list;
  }
  nlohmann::json operator()(const NumberListField& f) const { return *f.value; }
  nlohmann::json operator()(const NameListField& f) const { return *f.value; }
};

nlohmann::json FieldJson(const SchemaField& field) {
  if (!TomlValue(field)) return nullptr;
  return std::visit(JsonValue{field}, field.value);
}

nlohmann::json ConfigJson(const Config& config) {
  Config copy = config;
  nlohmann::json json;
  for (const SchemaField& field : FieldsOf(&copy)) {
    json[std::string(field.section)][std::string(field.key)] = FieldJson(field);
  }
  json["space"] = nlohmann::json::array();
  for (SpaceConfig& space : copy.spaces) {
    nlohmann::json entry;
    for (const SchemaField& field : FieldsOf(&space)) {
      entry[std::string(field.key)] = FieldJson(field);
    }
    json["space"].push_back(std::move(entry));
  }
  json["not_honoured_yet"] = FieldsNotHonoured(config);
  return json;
}

// The file as read for a machine; the built-in defaults where no file is named.
Result<ConfigReading> ReadFor(const ConfigOptions& options, const Topology& topology) {
  std::string text;
  if (!options.file.empty()) {
    auto read = ReadConfigFile(options.file);
    if (!read) return std::unexpected(read.error());
    text = *std::move(read);
  }
  return ReadConfig(text, options.file, &topology);
}

int ReportFaults(const ConfigReading& reading, const ConfigOptions& options) {
  if (options.json) {
    nlohmann::json json = {{"ok", false}, {"file", options.file}};
    for (const ConfigFault& fault : reading.faults) json["faults"].push_back(FaultJson(fault));
    std::printf("%s\n",
                json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  }
  std::fprintf(stderr, "%s\n", JoinFaults(reading.faults, options.file).c_str());
  return kExitFailed;
}

int Check(const Config& config, const ConfigOptions& options) {
  const std::vector<std::string> ignored = FieldsNotHonoured(config);
  if (options.json) {
    const nlohmann::json json = {
        {"ok", true}, {"file", options.file}, {"not_honoured_yet", ignored}};
    std::printf("%s\n", json.dump().c_str());
    return kExitOk;
  }
  std::printf("%s: no faults\n", options.file.c_str());
  for (const std::string& field : ignored) {
    std::printf("%s: %s is set, but not honoured yet\n", options.file.c_str(), field.c_str());
  }
  return kExitOk;
}

int Show(Config config, const Topology& topology, const ConfigOptions& options) {
  const CorePlan plan = PlanCoreMap(topology, CoreRequestOf(config));
  if (auto planned = PlanCores(topology, &config); !planned) return ReportError(planned.error());
  config.core_mode = plan.mode;
  if (options.json) {
    std::printf("%s\n", ConfigJson(config).dump().c_str());
  } else {
    std::printf("%s", ConfigToml(config, CoreMapToml(plan, config.idle)).c_str());
  }
  return kExitOk;
}

}  // namespace

int RunConfig(const ConfigOptions& options) {
  const auto topology = TopologyOf(options.synthetic);
  if (!topology) return ReportError(topology.error());
  auto reading = ReadFor(options, *topology);
  if (!reading) return ReportError(reading.error());
  if (!reading->faults.empty()) return ReportFaults(*reading, options);
  return options.show ? Show(std::move(reading->config), *topology, options)
                      : Check(reading->config, options);
}

}  // namespace engram
