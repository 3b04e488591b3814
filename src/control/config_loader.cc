#include "src/control/config_loader.h"

#include <fstream>
#include <functional>
#include <initializer_list>
#include <limits>
#include <set>
#include <sstream>
#include <utility>

#include <toml++/toml.h>

#include "src/core/observation.h"

namespace engram {

namespace {

// Walks one file and gathers every fault.
class Reader {
 public:
  Reader(const toml::table& root, std::string name) : root_(root), name_(std::move(name)) {}

  void Text(std::string_view section, std::string_view key,
            const std::function<std::string(const std::string&)>& take) {
    const toml::node* node = Find(section, key);
    if (node == nullptr) return;
    if (const auto value = node->value_exact<std::string>()) {
      if (const std::string fault = take(*value); !fault.empty()) Fault(*node, section, key, fault);
    } else {
      Fault(*node, section, key, "expected a string, in quotes");
    }
  }

  template <typename T>
  void Number(std::string_view section, std::string_view key, int64_t min, int64_t max, T* out) {
    const toml::node* node = Find(section, key);
    if (node == nullptr) return;
    const auto value = node->value_exact<int64_t>();
    if (!value || *value < min || *value > max) {
      Fault(*node, section, key,
            "expected a whole number from " + std::to_string(min) + " to " + std::to_string(max));
      return;
    }
    *out = static_cast<T>(*value);
  }

  void Cpus(std::string_view section, std::string_view key, std::vector<int>* out) {
    const toml::node* node = Find(section, key);
    if (node == nullptr) return;
    const toml::array* array = node->as_array();
    std::set<int64_t> seen;
    bool sound = array != nullptr && !array->empty();
    if (sound) {
      for (const toml::node& item : *array) {
        const auto cpu = item.value_exact<int64_t>();
        sound = sound && cpu && *cpu >= 0 && *cpu < 4096 && seen.insert(*cpu).second;
        if (sound) out->push_back(static_cast<int>(*cpu));
      }
    }
    if (!sound) Fault(*node, section, key, "expected a list of different processors, like [0, 1]");
  }

  // One of `choices`.
  template <typename T>
  void Choice(std::string_view section, std::string_view key,
              std::initializer_list<std::pair<std::string_view, T>> choices, T* out) {
    Text(section, key, [&](const std::string& value) {
      std::string names;
      for (const auto& [choice, meaning] : choices) {
        if (choice == value) {
          *out = meaning;
          return std::string();
        }
        if (!names.empty()) names += ", ";
        names.append("\"").append(choice).append("\"");
      }
      return "\"" + value + "\" is not one of " + names;
    });
  }

  // After all fields were asked for: what nobody asked for is a fault.
  std::string Finish() {
    for (const auto& [section, node] : root_) {
      const toml::table* table = node.as_table();
      if (table == nullptr || !sections_.contains(std::string(section.str()))) {
        faults_ += Place(node) + std::string(section.str()) + ": unknown " +
                   (table == nullptr ? "key" : "section") + "; known sections: " + Join(sections_) +
                   "\n";
        continue;
      }
      for (const auto& [key, value] : *table) {
        const std::string path = std::string(section.str()) + "." + std::string(key.str());
        if (known_.contains(path)) continue;
        faults_ +=
            Place(value) + path + ": unknown key; config/engram.toml lists those there are\n";
      }
    }
    return faults_;
  }

 private:
  const toml::node* Find(std::string_view section, std::string_view key) {
    sections_.insert(std::string(section));
    known_.insert(std::string(section) + "." + std::string(key));
    return root_[section][key].node();
  }
  std::string Place(const toml::node& node) const {
    return name_ + ":" + std::to_string(node.source().begin.line) + ": ";
  }
  void Fault(const toml::node& node, std::string_view section, std::string_view key,
             const std::string& fault) {
    faults_ += Place(node) + std::string(section) + "." + std::string(key) + ": " + fault + "\n";
  }
  static std::string Join(const std::set<std::string>& names) {
    std::string joined;
    for (const std::string& name : names) {
      if (!joined.empty()) joined += ", ";
      joined += name;
    }
    return joined;
  }

  const toml::table& root_;
  std::string name_;
  std::set<std::string> sections_;
  std::set<std::string> known_;
  std::string faults_;
};

Result<Config> ReadTable(const toml::table& root, const std::string& name) {
  Config config;
  Reader reader(root, name);
  reader.Text("listen", "tcp", [&](const std::string& value) {
    auto endpoint = ParseEndpoint(value);
    if (!endpoint) return endpoint.error().message;
    config.listen = {*std::move(endpoint)};
    return std::string();
  });
  reader.Number("listen", "max_connections", 1, 1'000'000, &config.max_connections);
  reader.Choice<NetworkBackend>("listen", "backend",
                                {{"auto", NetworkBackend::kAuto},
                                 {"io_uring", NetworkBackend::kUring},
                                 {"posix", NetworkBackend::kPosix}},
                                &config.network_backend);
  reader.Text("data", "directory", [&](const std::string& value) {
    if (value.empty()) return std::string("expected a path");
    config.data_directory = value;
    return std::string();
  });
  reader.Cpus("cores", "ingress", &config.ingress_cpus);
  reader.Cpus("cores", "shard", &config.shard_cpus);
  reader.Cpus("cores", "control", &config.control_cpus);
  reader.Choice<IdleStrategy>("cores", "idle",
                              {{"spin", IdleStrategy::kSpin},
                               {"hybrid", IdleStrategy::kHybrid},
                               {"sleep", IdleStrategy::kSleep}},
                              &config.idle);
  reader.Choice<HugePagePolicy>("memory", "huge_pages",
                                {{"auto", HugePagePolicy::kAuto}, {"off", HugePagePolicy::kOff}},
                                &config.huge_pages);
  reader.Number("memory", "limit_mib", 64, int64_t{1} << 30, &config.memory_limit_mib);
  reader.Number("index", "default_ef", 1, kMaxEf, &config.default_ef);
  reader.Number("index", "m", 2, 64, &config.hnsw_m);
  reader.Number("index", "ef_construction", 1, kMaxEf, &config.hnsw_ef_construction);
  if (std::string faults = reader.Finish(); !faults.empty()) {
    faults.pop_back();
    return Fail(ErrorCode::kInvalidArgument, std::move(faults));
  }
  return config;
}

}  // namespace

Result<Config> ParseConfig(std::string_view text, const std::string& name) {
  // Debian's toml++ reports a syntax error by exception; it ends here.
  try {
    return ReadTable(toml::parse(text, name), name);
  } catch (const toml::parse_error& error) {
    return Fail(ErrorCode::kInvalidArgument, name + ":" +
                                                 std::to_string(error.source().begin.line) + ": " +
                                                 std::string(error.description()));
  }
}

Result<Config> LoadConfig(const std::string& path) {
  std::ifstream file(path);
  if (!file) {
    return Fail(ErrorCode::kNotFound,
                path + ": cannot read the configuration; name a file that exists");
  }
  std::ostringstream text;
  text << file.rdbuf();
  return ParseConfig(text.str(), path);
}

}  // namespace engram
