// The files in config/: engram.toml documents every field and says the built-in defaults, the
// example core maps are valid on the machines that they name. And what the writer writes is read
// back as the same.

#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "src/control/config_loader.h"
#include "src/control/config_schema.h"
#include "src/control/config_writer.h"
#include "src/core/topology.h"

namespace engram {
namespace {

const std::string kConfigDirectory = ENGRAM_SOURCE_DIR "/config/";

std::string Documentation() {
  const auto text = ReadConfigFile(kConfigDirectory + "engram.toml");
  EXPECT_TRUE(text.has_value());
  return text.value_or("");
}

// With every field that stands behind a "#".
std::string Uncommented() {
  return std::regex_replace(Documentation(), std::regex("(^|\n)# (\\w+ = |\\[\\[space\\]\\])"),
                            "$1$2");
}

Topology Machine(const std::string& description) { return SyntheticTopology(description).value(); }

std::map<std::string, std::string> ValuesOf(Config config) {
  std::map<std::string, std::string> values;
  for (const SchemaField& field : FieldsOf(&config)) {
    values[field.name()] = TomlValue(field).value_or("unset");
  }
  for (size_t i = 0; i < config.spaces.size(); ++i) {
    for (const SchemaField& field : FieldsOf(&config.spaces[i])) {
      values["space " + std::to_string(i) + " " + std::string(field.key)] =
          TomlValue(field).value_or("unset");
    }
  }
  return values;
}

TEST(EngramTomlTest, SaysTheBuiltInDefaults) {
  const Result<Config> read = ParseConfig(Documentation(), "engram.toml");
  ASSERT_TRUE(read.has_value()) << read.error().message;
  EXPECT_EQ(ValuesOf(*read), ValuesOf(Config()));
  EXPECT_EQ(FieldsNotHonoured(*read), std::vector<std::string>());
}

TEST(EngramTomlTest, EveryFieldBehindAHashIsKnownAndSaysItsDefaultWhereItHasOne) {
  const Topology machine = Machine("pack:1 core:3 pu:1");
  const ConfigReading read = ReadConfig(Uncommented(), "engram.toml", &machine);
  EXPECT_EQ(JoinFaults(read.faults, ""), "");
  Config as_read = read.config;
  Config by_default;
  const std::vector<SchemaField> fields = FieldsOf(&as_read);
  const std::vector<SchemaField> defaults = FieldsOf(&by_default);
  for (size_t i = 0; i < fields.size(); ++i) {
    const std::string name = fields[i].name();
    EXPECT_TRUE(read.config.source.lines.contains(name)) << name << " is not in engram.toml";
    if (fields[i].unset.empty()) {
      EXPECT_EQ(TomlValue(fields[i]), TomlValue(defaults[i])) << name;
    }
  }
  ASSERT_EQ(as_read.spaces.size(), 1u);
  SpaceConfig none;
  const std::vector<SchemaField> space = FieldsOf(&as_read.spaces[0]);
  const std::vector<SchemaField> space_defaults = FieldsOf(&none);
  for (size_t i = 0; i < space.size(); ++i) {
    const std::string key(space[i].key);
    EXPECT_TRUE(read.config.source.lines.contains("space[0]." + key)) << key;
    if (space[i].unset.empty() && key != "name") {
      EXPECT_EQ(TomlValue(space[i]), TomlValue(space_defaults[i])) << key;
    }
  }
}

// The comment lines above a field, joined, from one blank line or field to the next.
std::string CommentOf(const std::string& field, int line, const std::vector<std::string>& lines) {
  std::string comment;
  const auto is_field = [](const std::string& text) {
    return std::regex_search(text, std::regex("^(# )?\\w+ = "));
  };
  auto at = static_cast<size_t>(line) - 1;
  EXPECT_TRUE(is_field(lines[at])) << field;
  while (at > 0 && is_field(lines[at])) --at;
  for (; lines[at].starts_with("#") && !is_field(lines[at]); --at) {
    comment = lines[at].substr(1) + comment;
  }
  return comment;
}

TEST(EngramTomlTest, SaysWhatIsNotHonouredYetAndWhatHappensInstead) {
  std::vector<std::string> lines;
  const std::string text = Documentation();
  for (size_t at = 0; at < text.size(); at = text.find('\n', at) + 1) {
    lines.push_back(text.substr(at, text.find('\n', at) - at));
  }
  Config config = ReadConfig(Uncommented(), "engram.toml", nullptr).config;
  const auto check = [&](const SchemaField& field, int line) {
    const std::string comment = CommentOf(field.name(), line, lines);
    EXPECT_GT(comment.size(), 20u) << field.name() << " has no explanation";
    EXPECT_EQ(comment.find("Not honoured yet") != std::string::npos, !field.instead.empty())
        << field.name() << ": " << comment;
    EXPECT_NE(comment.find(field.instead), std::string::npos)
        << field.name() << " does not say: " << field.instead;
  };
  for (const SchemaField& field : FieldsOf(&config)) {
    check(field, config.source.lines.at(field.name()));
  }
  ASSERT_EQ(config.spaces.size(), 1u);
  for (const SchemaField& field : FieldsOf(&config.spaces[0])) {
    check(field, config.source.lines.at("space[0]." + std::string(field.key)));
  }
}

TEST(CoreMapFilesTest, AreValidOnTheMachinesThatTheyName) {
  std::set<std::string> machines;
  for (const auto& entry : std::filesystem::directory_iterator(kConfigDirectory + "core_maps")) {
    const std::string path = entry.path().string();
    SCOPED_TRACE(path);
    const auto text = ReadConfigFile(path);
    ASSERT_TRUE(text.has_value());
    std::smatch made_with;
    ASSERT_TRUE(std::regex_search(*text, made_with, std::regex("--synthetic \"(.+)\"")));
    const Topology machine = Machine(made_with[1]);
    machines.insert(made_with[1]);
    const ConfigReading read = ReadConfig(*text, path, &machine);
    EXPECT_EQ(JoinFaults(read.faults, ""), "");
    EXPECT_EQ(FieldsNotHonoured(read.config), std::vector<std::string>());
    // So that they stay what the tool suggests.
    EXPECT_TRUE(text->ends_with(CoreMapToml(PlanCoreMap(machine, {}), IdleStrategy::kHybrid)))
        << "make it again";
  }
  EXPECT_EQ(machines.size(), 4u);
}

TEST(ConfigWriterTest, WhatIsWrittenIsReadBackAsTheSame) {
  const Topology machine = Machine("pack:2 [numa] core:8 pu:2");
  const std::string kTexts[] = {"", Documentation(), R"(
[listen]
tcp = ["127.0.0.1:1", "[::1]:2"]
grpc = ""
http = ""
[data]
directory = "a \"quoted\"\tpath\\ of caf\u00e9"
[cores]
idle = "spin"
sockets = [1]
[memory]
limit_mib = 123456
[index]
alpha = 1.25
max_partitions = 2
[limits]
high_priority_ratio = 0.3
[[space]]
name = "films"
metric = "l2"
filter_keys = ["a", "b\"c"]
[[space]]
name = "talks"
dimension = 12
)"};
  for (const std::string& text : kTexts) {
    Result<Config> config = ParseConfig(text, "first", &machine);
    ASSERT_TRUE(config.has_value()) << config.error().message;
    const CorePlan plan = PlanCoreMap(machine, CoreRequestOf(*config));
    ASSERT_TRUE(PlanCores(machine, &*config).has_value());
    config->core_mode = plan.mode;
    for (const std::string& cores : {std::string(), CoreMapToml(plan, config->idle)}) {
      const std::string written = ConfigToml(*config, cores);
      const Result<Config> again = ParseConfig(written, "again", &machine);
      ASSERT_TRUE(again.has_value()) << again.error().message << "\n" << written;
      EXPECT_EQ(ValuesOf(*again), ValuesOf(*config)) << written;
      EXPECT_EQ(ConfigToml(*again, cores), written);
    }
  }
}

TEST(FieldsNotHonouredTest, NamesThoseThatWereChanged) {
  Config config;
  EXPECT_EQ(FieldsNotHonoured(config), std::vector<std::string>());
  config.limits.max_sessions = 5;  // honoured
  config.limits.recall_batch = 5;  // honoured
  config.limits.min_batch_size = 5;
  config.limits.overload_threshold = 0.95;
  config.grpc.reset();                                                                  // honoured
  config.spaces.push_back({.name = "films", .dimension = 3, .filter_keys = {"lang"}});  // honoured
  EXPECT_EQ(FieldsNotHonoured(config),
            (std::vector<std::string>{"limits.min_batch_size", "limits.overload_threshold"}));
}

}  // namespace
}  // namespace engram
