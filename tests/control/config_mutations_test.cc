// The operator's file, damaged at random from a seed: the loader takes every text, and whatever is
// wrong with it is told with a line of that text and with what to write instead. A check of this
// kind stands here and not in tests/fuzz/ because toml++ and the loader are not part of the engine,
// which is all that the fuzz tree builds.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "src/control/config_loader.h"
#include "src/control/config_schema.h"
#include "src/core/hash.h"
#include "src/core/topology.h"

namespace engram {
namespace {

constexpr int kInputs = 60'000;

std::string Documentation() {
  const auto text = ReadConfigFile(ENGRAM_SOURCE_DIR "/config/engram.toml");
  EXPECT_TRUE(text.has_value());
  return text.value_or("");
}

// The file's lines without its comments, and the fields that stand behind a "#".
std::vector<std::string> LinesOf(const std::string& text) {
  std::vector<std::string> lines;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    std::string line = text.substr(at, end - at);
    at = end + 1;
    const bool field = line.find(" = ") != std::string::npos || line.starts_with("# [[");
    if (line.starts_with("# ") && field) line.erase(0, 2);
    if (!line.empty() && !line.starts_with("#")) lines.push_back(std::move(line));
  }
  return lines;
}

// Values and pieces of TOML that are wrong in many places, and right in some.
constexpr std::array<std::string_view, 34> kPieces = {"0",
                                                      "-1",
                                                      "1",
                                                      "255",
                                                      "65536",
                                                      "4294967296",
                                                      "9223372036854775807",
                                                      "9223372036854775808",
                                                      "1e308",
                                                      "nan",
                                                      "inf",
                                                      "-0.0",
                                                      "true",
                                                      "\"\"",
                                                      "\"f32\"",
                                                      "\"0-3\"",
                                                      "\"3-0\"",
                                                      "\"0-99999999\"",
                                                      "[0, 0]",
                                                      "[-1]",
                                                      "[\"a\", 1]",
                                                      "[]",
                                                      "[[1]]",
                                                      "{}",
                                                      "{ a = 1 }",
                                                      "1979-05-27T07:32:00Z",
                                                      "\"[::1]:50051\"",
                                                      "\"127.0.0.1:99999\"",
                                                      "\"\\u0000\"",
                                                      "'''",
                                                      "\"\"\"",
                                                      "=",
                                                      "[cores]",
                                                      "[[space]]"};

// "listen.tcp", "space.name" and so on.
std::set<std::string> FieldNames() {
  Config config;
  SpaceConfig space;
  std::set<std::string> names;
  for (const SchemaField& field : FieldsOf(&config)) names.insert(field.name());
  for (const SchemaField& field : FieldsOf(&space)) names.insert(field.name());
  return names;
}

class Damage {
 public:
  Damage(const std::vector<std::string>* lines, uint64_t seed) : lines_(*lines), random_(seed) {}

  std::string Text() {
    std::vector<std::string> text = lines_;
    // A small file reaches other checks than a whole one.
    if (random_.Below(2) == 0) {
      const size_t from = random_.Below(text.size());
      text.erase(text.begin(), text.begin() + static_cast<ptrdiff_t>(from));
      text.resize(1 + random_.Below(text.size()));
    }
    for (uint64_t left = 1 + random_.Below(4); left > 0; --left) Once(&text);
    std::string joined;
    for (const std::string& line : text) joined += line + "\n";
    for (uint64_t left = random_.Below(3); left > 0 && random_.Below(3) == 0; --left) {
      if (!joined.empty()) joined[random_.Below(joined.size())] = static_cast<char>(random_.Next());
    }
    if (random_.Below(8) == 0) joined.resize(random_.Below(joined.size() + 1));
    return joined;
  }

 private:
  void Once(std::vector<std::string>* text) {
    if (text->empty()) return;
    std::string& line = (*text)[random_.Below(text->size())];
    const std::string_view piece = kPieces[random_.Below(kPieces.size())];
    switch (random_.Below(7)) {
      case 0:  // another value
      case 1:
        line = line.substr(0, line.find('=')) + "= " + std::string(piece);
        break;
      case 2:  // once more
        text->insert(text->begin() + static_cast<ptrdiff_t>(random_.Below(text->size())), line);
        break;
      case 3:  // elsewhere
        std::swap(line, (*text)[random_.Below(text->size())]);
        break;
      case 4:  // not there
        line.clear();
        break;
      case 5:  // another name
        if (!line.empty()) line[random_.Below(line.size())] ^= 1;
        break;
      default:
        line.insert(random_.Below(line.size() + 1), piece);
    }
  }

  const std::vector<std::string>& lines_;
  SplitMix64 random_;
};

TEST(ConfigMutationsTest, EveryTextIsReadOrItsFaultsAreToldWithLinesAndRemedies) {
  const std::vector<std::string> lines = LinesOf(Documentation());
  ASSERT_GT(lines.size(), 40u);
  const std::array<Topology, 2> machines = {SyntheticTopology("pack:1 core:4 pu:1").value(),
                                            SyntheticTopology("pack:2 [numa] core:4 pu:2").value()};
  int sound = 0;
  std::set<std::string> not_faulted = FieldNames();
  for (uint64_t seed = 0; seed < kInputs; ++seed) {
    const std::string text = Damage(&lines, seed).Text();
    SCOPED_TRACE("seed " + std::to_string(seed) + "\n" + text);
    const Topology* machine = seed % 3 == 2 ? nullptr : &machines[seed % 3];
    ConfigReading reading = ReadConfig(text, "engram.toml", machine);
    const auto line_count = 1 + std::count(text.begin(), text.end(), '\n');
    for (const ConfigFault& fault : reading.faults) {
      ASSERT_GE(fault.line, 0) << fault.ToString("engram.toml");
      ASSERT_LE(fault.line, line_count) << fault.ToString("engram.toml");
      // What stands nowhere is what the machine does not have.
      ASSERT_TRUE(fault.line > 0 || fault.field.starts_with("cores"))
          << fault.ToString("engram.toml");
      not_faulted.erase(fault.field);
      // The parser says what it expected and what it saw.
      if (fault.message.starts_with("this is not TOML: ")) {
        ASSERT_GT(fault.message.size(), 30u);
        continue;
      }
      const size_t remedy = fault.message.rfind("; ");
      ASSERT_NE(remedy, std::string::npos) << fault.ToString("engram.toml");
      ASSERT_GT(fault.message.size(), remedy + 4) << fault.ToString("engram.toml");
    }
    if (!reading.faults.empty()) continue;
    ++sound;
    // What has no fault runs: the cores can be planned.
    if (machine != nullptr) {
      ASSERT_TRUE(PlanCores(*machine, &reading.config).has_value());
      ASSERT_FALSE(reading.config.shard_cpus.empty());
    }
  }
  // The damage is neither too great nor too small, and reaches every field that there is.
  EXPECT_GT(sound, kInputs / 50);
  EXPECT_LT(sound, kInputs / 2);
  EXPECT_EQ(not_faulted, std::set<std::string>());
}

}  // namespace
}  // namespace engram
