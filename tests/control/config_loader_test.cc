#include "src/control/config_loader.h"

#include <gtest/gtest.h>

#include <ostream>
#include <string>
#include <vector>

#include "src/core/topology.h"

namespace engram {
namespace {

const Topology& FourCores() {
  static const Topology topology = SyntheticTopology("pack:1 core:4 pu:1").value();
  return topology;
}

const Topology& TwoSockets() {
  static const Topology topology = SyntheticTopology("pack:2 [numa] core:4 pu:1").value();
  return topology;
}

std::string FaultsOf(const std::string& text, const Topology* topology = &FourCores()) {
  return JoinFaults(ReadConfig(text, "engram.toml", topology).faults, "engram.toml");
}

struct Wrong {
  const char* name;
  const char* text;
  const char* faults;
};
void PrintTo(const Wrong& wrong, std::ostream* out) { *out << wrong.name; }

class WrongFileTest : public testing::TestWithParam<Wrong> {};

TEST_P(WrongFileTest, SaysExactlyThis) { EXPECT_EQ(FaultsOf(GetParam().text), GetParam().faults); }

constexpr Wrong kWrongFiles[] = {
    {"UnknownKey", "[listen]\ntpc = \"127.0.0.1:0\"\n",
     "engram.toml:2: listen.tpc: unknown field; did you mean tcp?"},
    {"UnknownKeyLikeNone", "[data]\nsize = 1\n",
     "engram.toml:2: data.size: unknown field; here go directory, backend, durability, "
     "segment_mib, flush_interval_ms, checkpoint_mib, session_keep_days and ttl_s"},
    {"KeyOfAnotherSection", "[listen]\nmax_connections = 5\n",
     "engram.toml:2: listen.max_connections: unknown field; it belongs below [limits]"},
    {"KeyOfTwoSections", "[limits]\nprecision = \"f32\"\n",
     "engram.toml:2: limits.precision: unknown field; it belongs below [index] or [[space]]"},
    {"KeyInNoSection", "max_spaces = 5\n",
     "engram.toml:1: max_spaces: stands outside of its section; move it below [limits]"},
    {"UnknownKeyInNoSection", "wings = 2\n",
     "engram.toml:1: wings: unknown field, in no section; there are listen, data, cores, memory, "
     "index, limits and space"},
    {"UnknownSection", "[core]\n", "engram.toml:1: core: unknown section; did you mean [cores]?"},
    {"UnknownSectionLikeNone", "\n[observability]\nx = 1\n",
     "engram.toml:2: observability: unknown section; there are listen, data, cores, memory, index, "
     "limits and space"},
    {"SpacesWithAnS", "[[spaces]]\nname = \"a\"\n",
     "engram.toml:1: spaces: unknown field, in no section; did you mean [[space]]?"},
    {"SectionThatIsAValue", "listen = 5\n",
     "engram.toml:1: listen: 5 stands where a section is expected; write [listen] and the fields "
     "below it"},
    {"NoToml", "[data]\ndirectory = \n",
     "engram.toml:2: this is not TOML: Error while parsing key-value pair: expected value, saw "
     "'\\n'"},
    {"KeyTwice", "[index]\nm = 4\nm = 5\n",
     "engram.toml:3: this is not TOML: Error while parsing key-value pair: cannot redefine "
     "existing "
     "integer 'm'"},

    {"TextForNumber", "[index]\nm = \"many\"\n",
     "engram.toml:2: index.m: \"many\" is no whole number; write a whole number from 2 to 64"},
    {"RealForWhole", "[index]\nm = 16.0\n",
     "engram.toml:2: index.m: 16.0 is no whole number; write a whole number from 2 to 64"},
    {"OutOfRange", "[limits]\nmax_sessions = -1\n",
     "engram.toml:2: limits.max_sessions: -1 is out of range; write a whole number from 1 to "
     "10000000"},
    {"RealOutOfRange", "[index]\nalpha = 0.5\n",
     "engram.toml:2: index.alpha: 0.5 is out of range; write a number from 1 to 2"},
    {"RealThatIsNone", "[index]\nalpha = nan\n",
     "engram.toml:2: index.alpha: nan is out of range; write a number from 1 to 2"},
    {"TextForReal", "[index]\nalpha = \"1\"\n",
     "engram.toml:2: index.alpha: \"1\" is no number; write a number from 1 to 2"},
    {"NumberForSwitch", "[index]\nkeep_pruned = 1\n",
     "engram.toml:2: index.keep_pruned: 1 is no switch; write true or false"},
    {"UnknownChoice", "[cores]\nidle = \"snooze\"\n",
     "engram.toml:2: cores.idle: \"snooze\" is not known; write \"spin\", \"hybrid\" or \"sleep\""},
    {"NumberForChoice", "[index]\nprecision = 8\n",
     "engram.toml:2: index.precision: 8 is no text in quotes; write \"f32\", \"bf16\" or \"int8\""},
    {"NumberForPath", "[data]\ndirectory = 7\n",
     "engram.toml:2: data.directory: 7 is no text; write it in quotes"},
    {"EmptyPath", "[data]\ndirectory = \"\"\n",
     "engram.toml:2: data.directory: \"\" is no path; write one like \"./engram-data\""},
    {"DateForNumber", "[memory]\nlimit_mib = 2026-01-01\n",
     "engram.toml:2: memory.limit_mib: a date or time is no whole number; write a whole number "
     "from 64 to 1073741824"},

    {"PortForAddress", "[listen]\ntcp = 7654\n",
     "engram.toml:2: listen.tcp: 7654 is no address in quotes; write one like \"127.0.0.1:7654\""},
    {"NoAddress", "[listen]\ntcp = []\n",
     "engram.toml:2: listen.tcp: [] is no address; write at least one"},
    {"SameAddressTwice", "[listen]\ntcp = [\"127.0.0.1:1\", \"0.0.0.0:1\"]\n",
     "engram.toml:2: listen.tcp: \"127.0.0.1:1\" and \"0.0.0.0:1\" cannot both be listened on; "
     "take one out or change its port"},
    {"GrpcOnTheSamePort", "[listen]\ntcp = \"0.0.0.0:50051\"\n",
     "engram.toml:2: listen.tcp: \"127.0.0.1:50051\" of listen.grpc clashes with "
     "\"0.0.0.0:50051\" of listen.tcp; give one of them another port"},
    {"GrpcOnBothFamilies", "[listen]\ntcp = \"127.0.0.1:9\"\ngrpc = \"[::]:9\"\n",
     "engram.toml:3: listen.grpc: \"[::]:9\" of listen.grpc clashes with \"127.0.0.1:9\" of "
     "listen.tcp; give one of them another port"},

    {"NumberForCpus", "[cores]\ningress = 0\n",
     "engram.toml:2: cores.ingress: 0 is no list of numbers from 0 to 4095; write one like [0, 1, "
     "2] or \"0-2\""},
    {"NegativeCpu", "[cores]\nshard = [1, -1]\n",
     "engram.toml:2: cores.shard: [1, -1] is no list of numbers from 0 to 4095; write one like "
     "[0, 1, 2] or \"0-2\""},
    {"RangeBackwards", "[cores]\nshard = \"3-1\"\n",
     "engram.toml:2: cores.shard: \"3-1\" is no list of numbers from 0 to 4095; write one like "
     "[0, 1, 2] or \"0-2\""},
    {"CpuTwice", "[cores]\nshard = [2, 3, 2]\n",
     "engram.toml:2: cores.shard: processor 2 is listed twice; list it once"},
    {"CpuNotThere", "[cores]\n\ncontrol = [4]\n",
     "engram.toml:3: cores.control: processor 4 is not in this machine; choose from 0-3"},
    {"PipelinedOnOneCpu", "[cores]\nmode = \"pipelined\"\ningress = [1]\nshard = [1, 2]\n",
     "engram.toml:2: cores.mode: \"pipelined\" keeps ingress and shards apart, but both run on 1; "
     "take it out of one list, or write \"run_to_completion\""},
    {"ControlOnASpinner", "[cores]\nidle = \"spin\"\ncontrol = [1]\ningress = [1]\n",
     "engram.toml:3: cores.control: processor 1 also is an ingress core, which spins and leaves "
     "control no time; give control another processor, or set cores.idle = \"hybrid\""},
    {"RecallOnAShard", "[cores]\nshard = [2]\nrecall = [2]\n",
     "engram.toml:3: cores.recall: processor 2 also is a shard core, which answers recalls anyway; "
     "take it out of one list"},
    {"SocketNotThere", "[cores]\nsockets = [1]\n",
     "engram.toml:2: cores.sockets: socket 1 has no processor that this process may use; choose "
     "from 0"},

    {"ThresholdsThatFall", "[limits]\noverload_threshold = 0.7\n",
     "engram.toml:2: limits.overload_threshold: batch_growth_threshold = 0.5, "
     "backpressure_threshold = 0.8, overload_threshold = 0.7 do not rise; write each above the one "
     "before, like 0.5, 0.8, 0.9"},
    {"BatchesTheWrongWay", "[limits]\nmax_batch_size = 5\n",
     "engram.toml:2: limits.max_batch_size: limits.min_batch_size = 10 is more than "
     "limits.max_batch_size = 5; lower the first or raise the second"},
    {"QueueAboveAll", "[limits]\nqueue_capacity = 200_000\n",
     "engram.toml:2: limits.queue_capacity: limits.queue_capacity = 200000 is more than "
     "limits.global_queue_capacity = 100000; lower the first or raise the second"},
    {"PartitionsAboveShards", "[index]\npartitions = 3\n",
     "engram.toml:2: index.partitions: 3 partitions need as many shards, and there are 2; write at "
     "most 2, or give cores.shard more processors"},
    {"PartitionsAboveTheirBound", "[index]\npartitions = 2\nmax_partitions = 1\n",
     "engram.toml:2: index.partitions: 2 is more than index.max_partitions = 1; write at most "
     "that, or raise index.max_partitions"},
    {"MaxPartitionsAboveShards", "[index]\nmax_partitions = 9\n",
     "engram.toml:2: index.max_partitions: 9 partitions need as many shards, and there are 2; "
     "write at most 2, or give cores.shard more processors"},

    {"QuotaBelowTheShards",
     "[[space]]\nname = \"a\"\nquota_observations = 1\nquota_when_full = \"evict_oldest\"\n",
     "engram.toml:3: space.quota_observations: 1 is less than the 2 partitions that the space may "
     "grow to, and with quota_when_full = \"evict_oldest\" each keeps one at least; write at least "
     "2, or set index.max_partitions to at most 1"},

    {"OneBracket", "[space]\nname = \"films\"\n",
     "engram.toml:1: space: a section stands where a list of spaces is expected; write [[space]], "
     "with two brackets, once for each"},
    {"SpaceThatIsANumber", "space = [1]\n",
     "engram.toml:1: space: 1 is no space; write [[space]] and name = \"…\""},
    {"SpaceWithoutName", "[[space]]\ndimension = 3\n",
     "engram.toml:1: space.name: a space needs a name; write name = \"films\", say"},
    {"BadSpaceName", "[[space]]\nname = \"Great Films\"\n",
     "engram.toml:2: space.name: \"Great Films\" is no name of a space; write 1 to 64 of a-z, 0-9, "
     "_ and -"},
    {"SpaceTwice", "[[space]]\nname = \"a\"\n[[space]]\nname = \"b\"\n[[space]]\nname = \"a\"\n",
     "engram.toml:6: space.name: \"a\" is the space of line 2 already; choose another name"},
    {"NoDimension", "[[space]]\nname = \"a\"\ndimension = 0\n",
     "engram.toml:3: space.dimension: 0 is out of range; write a whole number from 1 to 4096"},
    {"DimensionTooLarge", "[[space]]\nname = \"a\"\ndimension = 4097\n",
     "engram.toml:3: space.dimension: 4097 is out of range; write a whole number from 1 to 4096"},
    {"SpacePartitions", "[[space]]\nname = \"a\"\npartitions = 4\n",
     "engram.toml:3: space.partitions: 4 partitions need as many shards, and there are 2; write at "
     "most 2, or give cores.shard more processors"},
    {"SpaceKey", "[[space]]\nname = \"a\"\ndims = 4\n",
     "engram.toml:3: space.dims: unknown field; here go name, dimension, metric, precision, "
     "partitions, durability, ttl_s, quota_observations, quota_mib, "
     "quota_when_full and filter_keys"},
    {"IndexFilterKey", "[index]\nfilter_keys = [\"lang\", \"a=b\"]\n[[space]]\nname = \"a\"\n",
     "engram.toml:2: index.filter_keys: \"a=b\" is no key; write 1 to 64 printable ASCII "
     "characters without spaces and '='"},
    {"FilterKeyOfEverySpace", "[[space]]\nname = \"a\"\nfilter_keys = [\"who\"]\n",
     "engram.toml:3: space.filter_keys: \"who\" is a key of every space; take it out"},
    {"TooManyFilterKeys",
     "[index]\nfilter_keys = [\"a\", \"b\", \"c\", \"d\", \"e\", \"f\", \"g\", \"h\", \"i\", "
     "\"j\", \"k\", \"l\", \"m\", \"n\", \"o\", \"p\", \"q\"]\n",
     "engram.toml:2: index.filter_keys: 17 keys are more than 16; each is kept in memory: list "
     "fewer"},
    {"FilterKeyTwice", "[[space]]\nname = \"a\"\nfilter_keys = [\"lang\", \"lang\"]\n",
     "engram.toml:3: space.filter_keys: \"lang\" is listed twice; list it once"},
    {"FilterKeyEmpty", "[[space]]\nname = \"a\"\nfilter_keys = [\"\"]\n",
     "engram.toml:3: space.filter_keys: \"\" is no key; write 1 to 64 printable ASCII "
     "characters without spaces and '='"},
    {"FilterKeysThatAreNumbers", "[[space]]\nname = \"a\"\nfilter_keys = [1]\n",
     "engram.toml:3: space.filter_keys: [1] is no list of texts; write one like [\"lang\", "
     "\"topic\"]"},
    {"MoreSpacesThanAllowed",
     "[limits]\nmax_spaces = 1\n[[space]]\nname = \"a\"\n[[space]]\nname = \"b\"\n",
     "engram.toml:2: limits.max_spaces: 1 is fewer than the 2 [[space]] entries; raise it"},
};

INSTANTIATE_TEST_SUITE_P(Files, WrongFileTest, testing::ValuesIn(kWrongFiles),
                         [](const testing::TestParamInfo<Wrong>& wrong) {
                           return wrong.param.name;
                         });

TEST(ConfigLoaderTest, AllFaultsAreSaidAtOnceInTheOrderOfTheFile) {
  EXPECT_EQ(
      FaultsOf("[[space]]\n"
               "name = \"Films\"\n"
               "[limits]\n"
               "min_batch_size = 600\n"
               "[cores]\n"
               "shard = [9, 9]\n"
               "[listen]\n"
               "tcp = \"here\"\n"
               "backend = 4\n"
               "[clouds]\n"),
      "engram.toml:2: space.name: \"Films\" is no name of a space; write 1 to 64 of a-z, "
      "0-9, _ and -\n"
      "engram.toml:4: limits.min_batch_size: limits.min_batch_size = 600 is more than "
      "limits.max_batch_size = 500; lower the first or raise the second\n"
      "engram.toml:6: cores.shard: processor 9 is listed twice; list it once\n"
      "engram.toml:6: cores.shard: processor 9 is not in this machine; choose from 0-3\n"
      "engram.toml:8: listen.tcp: address \"here\": the port is missing; expected ADDRESS:PORT, "
      "for example 127.0.0.1:7654 or [::1]:7654\n"
      "engram.toml:9: listen.backend: 4 is no text in quotes; write \"auto\", \"io_uring\" "
      "or \"posix\"\n"
      "engram.toml:10: clouds: unknown section; there are listen, data, cores, memory, "
      "index, limits and space");
}

TEST(ConfigLoaderTest, AShardFarFromEveryIngress) {
  EXPECT_EQ(FaultsOf("[cores]\ningress = [1]\nshard = [2, 6]\n", &TwoSockets()),
            "engram.toml:3: cores.shard: processor 6 is on NUMA node 1, far from every ingress "
            "core (node 0); make one of 4-7 an ingress core, or choose from node 0");
}

// Without a machine the lists are still checked against each other.
TEST(ConfigLoaderTest, WithoutAMachineOnlyWhatNeedsNone) {
  EXPECT_EQ(FaultsOf("[cores]\nshard = [4000]\n[index]\npartitions = 200\n", nullptr),
            "engram.toml:4: index.partitions: 200 partitions need as many shards, and there is 1; "
            "write at most 1, or give cores.shard more processors");
  EXPECT_EQ(FaultsOf("[index]\npartitions = 200\n", nullptr), "");
}

TEST(ConfigLoaderTest, AFileThatCannotBeRead) {
  for (const char* path : {"/nonexistent/engram.toml", "/"}) {
    const Result<Config> config = LoadConfig(path);
    ASSERT_FALSE(config.has_value());
    EXPECT_EQ(config.error().code, ErrorCode::kNotFound);
    EXPECT_EQ(config.error().message,
              std::string(path) + ": cannot read the configuration; name a file that exists");
  }
}

TEST(ConfigLoaderTest, ValuesArriveWhereTheyBelong) {
  const Result<Config> read = ParseConfig(R"(
[listen]
tcp = ["127.0.0.1:1", "[::1]:2"]
grpc = ""
http = ""
backend = "posix"
[data]
directory = "/srv/\u00e9"
[cores]
mode = "pipelined"
idle = "spin"
sockets = [0]
control = [0]
ingress = "1"
shard = "2 - 3"
[memory]
huge_pages = "off"
limit_mib = 64
[index]
alpha = 2
extend_candidates = true
keep_pruned = false
precision = "bf16"
traversal = "exact"
partitions = 2
grow_partition_at = 0
filter_keys = ["author"]
[limits]
high_priority_ratio = 0.25
idle_timeout_s = 7
[[space]]
name = "films"
dimension = 768
metric = "ip"
durability = "interval"
ttl_s = 86_400
quota_observations = 1_000_000
quota_mib = 2_048
quota_when_full = "evict_oldest"
filter_keys = ["lang"]
[[space]]
name = "talks"
precision = "int8"
partitions = 1
)",
                                          "engram.toml", &FourCores());
  ASSERT_TRUE(read.has_value()) << read.error().message;
  ASSERT_EQ(read->listen.size(), 2u);
  EXPECT_EQ(read->listen[1].ToString(), "[::1]:2");
  EXPECT_FALSE(read->grpc.has_value());
  EXPECT_EQ(read->network_backend, NetworkBackend::kPosix);
  EXPECT_EQ(read->data_directory, "/srv/\xc3\xa9");
  EXPECT_EQ(read->core_mode, CoreMode::kPipelined);
  EXPECT_EQ(read->idle, IdleStrategy::kSpin);
  EXPECT_EQ(read->sockets, std::vector<int>{0});
  EXPECT_EQ(read->control_cpus, std::vector<int>{0});
  EXPECT_EQ(read->ingress_cpus, std::vector<int>{1});
  EXPECT_EQ(read->shard_cpus, (std::vector<int>{2, 3}));
  EXPECT_EQ(read->huge_pages, HugePagePolicy::kOff);
  EXPECT_EQ(read->memory_limit_mib, 64u);
  EXPECT_EQ(read->index.alpha, 2.0);
  EXPECT_TRUE(read->index.extend_candidates);
  EXPECT_FALSE(read->index.keep_pruned);
  EXPECT_EQ(read->index.precision, Precision::kBf16);
  EXPECT_EQ(read->index.traversal, Traversal::kExact);
  EXPECT_EQ(read->index.grow_partition_at, 0u);
  EXPECT_EQ(read->limits.high_priority_ratio, 0.25);
  EXPECT_EQ(read->limits.idle_timeout_s, 7u);
  ASSERT_EQ(read->spaces.size(), 2u);
  const SpaceConfig& films = read->spaces[0];
  EXPECT_EQ(films.name, "films");
  EXPECT_EQ(films.dimension, 768u);
  EXPECT_EQ(films.metric, Metric::kInnerProduct);
  EXPECT_EQ(films.precision, Precision::kBf16) << "from [index]";
  EXPECT_EQ(films.partitions, 2u) << "from [index]";
  EXPECT_EQ(films.durability, Durability::kInterval);
  EXPECT_EQ(films.ttl_s, 86'400u);
  EXPECT_EQ(films.quota_observations, 1'000'000u);
  EXPECT_EQ(films.quota_mib, 2'048u);
  EXPECT_EQ(films.quota_when_full, WhenFull::kEvictOldest);
  EXPECT_EQ(films.filter_keys, std::vector<std::string>{"lang"});
  EXPECT_EQ(read->spaces[1].filter_keys, std::vector<std::string>{"author"}) << "from [index]";
  EXPECT_EQ(read->spaces[1].precision, Precision::kInt8);
  EXPECT_EQ(read->spaces[1].partitions, 1u);
  EXPECT_EQ(read->spaces[1].dimension, 0u);
}

// [index] may stand below the spaces that take over its values.
TEST(ConfigLoaderTest, TheOrderOfSectionsDoesNotMatter) {
  const Result<Config> read = ParseConfig(
      "[[space]]\nname = \"a\"\n[index]\nprecision = \"int8\"\n", "engram.toml", &FourCores());
  ASSERT_TRUE(read.has_value()) << read.error().message;
  EXPECT_EQ(read->spaces[0].precision, Precision::kInt8);
}

TEST(ConfigLoaderTest, PlanCoresNamesTheLinesToo) {
  Result<Config> read = ParseConfig("[cores]\nshard = [7]\n", "engram.toml");
  ASSERT_TRUE(read.has_value()) << read.error().message;
  const Result<void> planned = PlanCores(FourCores(), &*read);
  ASSERT_FALSE(planned.has_value());
  EXPECT_EQ(planned.error().message,
            "engram.toml:2: cores.shard: processor 7 is not in this machine; choose from 0-3");
}

}  // namespace
}  // namespace engram
