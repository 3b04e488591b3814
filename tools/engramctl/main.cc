// engramctl, the operator's tool: parses the command line and calls the command.

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdlib>
#include <string>
#include <string_view>

#include "tools/engramctl/commands.h"
#include "tools/engramctl/recall_filter.h"

namespace engram {

namespace {

constexpr uint32_t kConnectionsMax = 1'000;
constexpr uint32_t kConcurrencyMax = 10'000;
constexpr uint64_t kRateMax = 1'000'000'000;
constexpr uint64_t kRetryForMaxS = 7 * 24 * 3'600;  // a server keeps a session for 7 days

const char* const kFooter =
    "Exit codes: 0 done, 1 failed or something was refused for good, 2 wrong usage, 3 cannot "
    "connect.";

// One of the names that --dtype takes.
VectorDtype DtypeOfName(std::string_view name) {
  for (const VectorDtype dtype : {VectorDtype::kF32, VectorDtype::kF16, VectorDtype::kBf16}) {
    if (DtypeName(dtype) == name) return dtype;
  }
  return VectorDtype::kInt8;
}

void AddServerOptions(CLI::App* command, ServerOptions& server) {
  command
      ->add_option("--address", server.address,
                   "HOST:PORT of engramd's feed listener; default: ENGRAM_ADDRESS where it is set")
      ->capture_default_str();
  command->add_flag("--json", server.json, "Print one line of JSON for programs");
}

CLI::Validator SpaceName() {
  return CLI::Validator(
      [](std::string& name) {
        return IsValidSpaceName(name)
                   ? std::string()
                   : "'" + Printable(name) + "': a space's name is 1 to 64 of [a-z0-9_-]";
      },
      "NAME");
}

// CLI::PositiveNumber names its upper bound, which has 309 digits.
CLI::Validator AtLeastOne() {
  return CLI::Validator(
      [](std::string& text) {
        uint64_t number = 0;
        const char* const end = text.data() + text.size();
        const auto [stop, error] = std::from_chars(text.data(), end, number);
        return error == std::errc() && stop == end && number > 0
                   ? std::string()
                   : "'" + Printable(text) + "' is no whole number from 1 on";
      },
      "NUMBER");
}

void AddSpaceOption(CLI::App* command, std::string& space, const char* absent = "default") {
  command
      ->add_option("--space", space,
                   std::string("Name of the space, 1 to 64 of [a-z0-9_-]; default: ") + absent)
      ->check(SpaceName());
}

CLI::App* AddLoad(CLI::App& app, ServerOptions& server, LoadOptions& options) {
  CLI::App* load = app.add_subcommand("load", "Stream a file of vectors into a space");
  AddServerOptions(load, server);
  AddSpaceOption(load, options.space);
  load->add_option("--data", options.data, ".fvecs, .bvecs or .npy; ids are the row numbers")
      ->required();
  load->add_option_function<std::string>(
          "--metric", [&options](const std::string& name) { options.metric = MetricOfName(name); },
          "Of a new space; default: what the space has, else cosine")
      ->check(CLI::IsMember({"cosine", "ip", "l2"}));
  load->add_option(
          "--rate", options.rate,
          "Observations/s, sent by the clock whatever the server does; latency then counts "
          "from the intended time. Default: as fast as the server gives credit")
      ->check(CLI::Range(uint64_t{1}, kRateMax));
  load->add_option("--batch", options.batch, "Observations in a frame")
      ->check(CLI::Range(1u, 65'535u))
      ->capture_default_str();
  load->add_option("--count", options.count, "Only the first rows of the file")
      ->check(AtLeastOne());
  load->add_option("--connections", options.connections, "Sessions to deal the rows to")
      ->check(CLI::Range(1u, kConnectionsMax))
      ->capture_default_str();
  load->add_option_function<std::string>(
          "--dtype", [&options](const std::string& name) { options.dtype = DtypeOfName(name); },
          "How vectors travel; default: as in the file, unsigned bytes as f32")
      ->check(CLI::IsMember({"f32", "f16", "bf16", "int8"}));
  load->add_option("--texts", options.texts, ".tsv or .tsv.gz (or lines): payload of each row");
  load->add_option("--attributes", options.attributes,
                   "Columns of a .tsv of texts that recalls may filter by; or none")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(CLI::IsMember({"source", "category", "key", "none"}))
      ->capture_default_str();
  load->add_option("--id-prefix", options.id_prefix, "Goes before the row number in ids");
  load->add_option_function<std::string>(
          "--priority",
          [&options](const std::string& name) {
            options.priority = name == "high" ? Priority::kHigh : Priority::kNormal;
          },
          "Of the sessions; default: normal")
      ->check(CLI::IsMember({"normal", "high"}));
  load->add_flag(
      "--wait-linked", options.wait_linked,
      "Then wait until the graph holds all, and report linked_s, counted from the start");
  CLI::Option* retry_for =
      load->add_option(
              "--retry-for", options.retry_for_s,
              "Seconds to go on trying to connect, with back-off from 10 ms to 1 s, and to wait "
              "for "
              "a server that takes nothing; without it 60. Alone: a connection that breaks ends it")
          ->check(CLI::Range(uint64_t{1}, kRetryForMaxS));
  load->add_flag("--resume", options.resume,
                 "When a connection breaks, or the server stops or is killed, connect again and go "
                 "on in the same session, so that each row is acked once. Gives up after "
                 "--retry-for seconds in which nothing was acked. A server that comes back with "
                 "less than it had acked (durability interval or memory) gets that again; the "
                 "report says rolled_back")
      ->needs(retry_for);
  load->add_option("--session", options.sessions,
                   "ID[,ID...] of the sessions of a load that ended early, as it printed them, to "
                   "go on with them; give the same --data, --batch and --connections again")
      ->delimiter(',')
      ->excludes(load->get_option("--rate"));
  return load;
}

// Says what is wrong with an option's text.
template <typename Parse>
CLI::Validator ParsesBy(const Parse& parse, const char* name) {
  return CLI::Validator(
      [parse](const std::string& text) {
        const auto parsed = parse(text);
        return parsed ? std::string() : parsed.error().message;
      },
      name);
}

void AddFilterOptions(CLI::App* recall, FilterOptions& options) {
  const auto condition = [](std::string_view text) {
    return CheckCondition(text.starts_with('!') ? text.substr(1) : text);
  };
  recall
      ->add_option("--filter", options.conditions,
                   "KEY=VALUE: only what has that; a key given twice: any of its values. Keys are "
                   "tag, who, where_location, memory_type, and the space's filter_keys (source and "
                   "category unless configured). !KEY=VALUE: only what has not")
      ->allow_extra_args(false)
      ->check(ParsesBy(condition, "KEY=VALUE"));
  recall->add_option("--exclude", options.exclusions, "KEY=VALUE, as --filter '!KEY=VALUE'")
      ->allow_extra_args(false)
      ->check(ParsesBy(CheckCondition, "KEY=VALUE"));
  recall
      ->add_option("--since", options.since,
                   "Only what is from then on: 2024-05-01T12:30:00Z, 2024-05-01, or seconds since "
                   "1970")
      ->check(ParsesBy(ParseTime, "TIME"));
  recall->add_option("--until", options.until, "Only what is before then")
      ->check(ParsesBy(ParseTime, "TIME"));
}

CLI::App* AddRecall(CLI::App& app, ServerOptions& server, RecallOptions& options) {
  CLI::App* recall = app.add_subcommand(
      "recall", "Measure recall@k and speed of queries, or find the neighbours of a phrase");
  AddServerOptions(recall, server);
  AddSpaceOption(recall, options.space);
  CLI::Option* queries = recall->add_option("--queries", options.queries, ".fvecs, .bvecs or .npy");
  CLI::Option* truth = recall->add_option("--groundtruth", options.groundtruth,
                                          ".ivecs with the true neighbours, nearest first");
  CLI::Option* text = recall->add_option("--text", options.text, "A phrase instead of queries");
  CLI::Option* encoder =
      recall->add_option("--encoder", options.encoder, "Directory of the model that encodes it");
  CLI::Option* latest = recall->add_flag(
      "--latest", options.latest, "Instead of queries: the latest of what the filter matches");
  latest->excludes(queries)->excludes(text);
  queries->needs(truth)->excludes(text);
  truth->needs(queries);
  text->needs(encoder);
  encoder->needs(text);
  recall->add_option("-k,--k", options.k, "Neighbours asked for")
      ->check(CLI::Range(1u, kMaxRecallResults))
      ->capture_default_str();
  recall->add_option("--ef", options.ef, "Candidates kept while searching; default: the server's")
      ->check(CLI::Range(1u, kMaxEf));
  AddFilterOptions(recall, options.filter);
  recall->add_option("--within", options.bound,
                     "Only what is as near as this score: a cosine or inner product of at least "
                     "it, a squared L2 distance of at most it");
  recall
      ->add_flag("--all-spaces", options.all_spaces,
                 "Recall all spaces that have the metric and dimension of --space")
      ->excludes(queries);
  recall->add_flag("--snapshot", options.at_snapshot,
                   "Recall what lived at one moment in all partitions of the space");
  recall->add_flag("--with-vector", options.with_vector, "Have the vectors returned too");
  recall
      ->add_option("--data", options.data,
                   "Base vectors: ties with the k-th true neighbour are then found by exact scores")
      ->needs(queries);
  recall->add_option("--id-prefix", options.id_prefix, "As given to load")->needs(queries);
  recall->add_option("--count", options.count, "Only the first queries")->check(AtLeastOne());
  recall->add_option("--concurrency", options.concurrency, "Recalls under way at once")
      ->check(CLI::Range(1u, kConcurrencyMax))
      ->capture_default_str();
  recall->add_option("--warmup", options.warmup, "Queries sent before the clock starts")
      ->check(CLI::Range(uint64_t{0}, kRateMax));
  return recall;
}

void AddSyntheticOption(CLI::App* command, std::string& synthetic) {
  command->add_option("--synthetic", synthetic,
                      "Another machine, in hwloc's words: \"pack:2 [numa] l3:1 core:16 pu:2\"");
}

// `config check` and `config show`.
CLI::App* AddConfig(CLI::App& app, ConfigOptions& options) {
  CLI::App* config = app.add_subcommand("config", "Check a configuration file, or show all of it");
  config->require_subcommand(1);
  CLI::App* check = config->add_subcommand("check", "Say everything that is wrong with a file");
  check->add_option("file", options.file, "The TOML file")->required();
  CLI::App* show = config->add_subcommand(
      "show", "Print what engramd would run with: every field, and the core map it would choose");
  show->add_option("file", options.file, "The TOML file; default: the built-in defaults");
  show->callback([&options] { options.show = true; });
  for (CLI::App* command : {check, show}) {
    AddSyntheticOption(command, options.synthetic);
    command->add_flag("--json", options.json, "Print one line of JSON for programs");
  }
  return config;
}

CLI::App* AddTopology(CLI::App& app, TopologyOptions& options) {
  CLI::App* topology = app.add_subcommand("topology", "Draw the machine, or suggest a core map");
  topology->add_flag("--suggest", options.suggest,
                     "Also print the section [cores] for it, with the reasons");
  AddSyntheticOption(topology, options.synthetic);
  topology->add_flag("--json", options.json, "Print one line of JSON for programs");
  return topology;
}

// `log dump` and `log verify`.
CLI::App* AddLog(CLI::App& app, LogOptions& options) {
  CLI::App* log = app.add_subcommand("log", "Look into the logs of a data directory");
  log->require_subcommand(1);
  CLI::App* dump = log->add_subcommand("dump", "Print a line for each record");
  CLI::App* verify = log->add_subcommand(
      "verify", "Check every byte; exit code 1 and the places where something is damaged");
  for (CLI::App* command : {dump, verify}) {
    command->add_option("dir", options.directory, "The data directory, or the folder of one log")
        ->required();
    command->add_flag("--json", options.json, "Print JSON for programs: a line a record, or one");
  }
  dump->add_option("--from", options.from, "SEGMENT:OFFSET, as printed; default: all");
  AddSpaceOption(dump, options.space, "all");
  dump->add_flag("--vectors", options.vectors, "Also the numbers of the vectors");
  return log;
}

// `quarantine list` and `quarantine dump`.
CLI::App* AddQuarantine(CLI::App& app, QuarantineOptions& options) {
  CLI::App* quarantine = app.add_subcommand(
      "quarantine", "Records that are kept out of the replay because they crashed it twice");
  quarantine->require_subcommand(1);
  CLI::App* list = quarantine->add_subcommand("list", "A line for each");
  CLI::App* dump = quarantine->add_subcommand("dump", "All that they hold, as JSON, a line each");
  dump->footer("An id or payload that is no plain text is under id_base64 or payload_base64.");
  for (CLI::App* command : {list, dump}) {
    command->add_option("dir", options.directory, "The data directory")->required();
  }
  list->add_flag("--json", options.json, "Print JSON for programs: a line a record");
  dump->add_option("--file", options.file, "Only this one of its files");
  dump->callback([&options] { options.whole = true; });
  return quarantine;
}

CLI::App* AddBackup(CLI::App& app, ServerOptions& server, BackupOptions& options) {
  CLI::App* backup = app.add_subcommand(
      "backup", "Copy all that a running engramd on this machine has, and verify the copy");
  AddServerOptions(backup, server);
  backup->add_option("dir", options.directory, "Where to; not there yet, or empty")->required();
  backup->add_option("--data", options.data, "engramd's data directory; default: as it says");
  backup->footer(
      "While it copies, for as long as that takes, engramd makes no checkpoint and frees\n"
      "nothing of its logs. One backup of a daemon is made at a time.");
  return backup;
}

CLI::App* AddRestore(CLI::App& app, ServerOptions& server, RestoreOptions& options) {
  CLI::App* restore = app.add_subcommand(
      "restore", "Make a data directory of a backup, once all of it is verified");
  restore->footer(
      "It is made beside DIR, as DIR.restoring, and takes its place in one step: DIR is no\n"
      "link and no mount point.");
  restore->add_option("backup", options.backup, "What `engramctl backup` made")->required();
  restore->add_option("dir", options.directory, "The data directory; not there yet, or empty")
      ->required();
  restore->add_flag("--json", server.json, "Print one line of JSON for programs");
  return restore;
}

CLI::App* AddExport(CLI::App& app, ServerOptions& server, ExportOptions& options) {
  CLI::App* command =
      app.add_subcommand("export", "Write all live observations of a space, while it serves");
  AddServerOptions(command, server);
  command->add_option("space", options.space, "Name of the space")->required()->check(SpaceName());
  command
      ->add_option_function<std::string>(
          "--format",
          [&options](const std::string& name) {
            options.format = name == "fvecs" ? ExportFormat::kFvecs : ExportFormat::kJsonl;
          },
          "jsonl: id, vector, when_ns, confidence, stamp, payload; bytes that are no text as "
          "id_base64, payload_base64. fvecs: the vectors, and their ids in FILE.ids")
      ->check(CLI::IsMember({"jsonl", "fvecs"}))
      ->required();
  command->add_option("--output", options.output,
                      "The file, under that name once it is whole; default: standard output");
  return command;
}

CLI::App* AddVerify(CLI::App& app, ServerOptions& server, VerifyOptions& options) {
  CLI::App* verify = app.add_subcommand(
      "verify", "Check a running engramd: invariants, and a sample of observations and recalls");
  AddServerOptions(verify, server);
  verify->add_option("space", options.space, "Only this space")->check(SpaceName());
  verify->add_option("--sample", options.sample, "Observations of each space that are recalled")
      ->check(CLI::Range(1u, 10'000u))
      ->capture_default_str();
  verify
      ->add_option("--exact-limit", options.exact_limit,
                   "Observations of a space up to which recall@10 is compared with exact answers, "
                   "for which all its vectors are read")
      ->capture_default_str();
  verify->add_option("--least-recall", options.least_recall, "recall@10 below it is a failure")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  verify->add_option("--seed", options.seed, "Draws the sample; default: another one each time");
  return verify;
}

// A command that only asks the server.
CLI::App* AddPlain(CLI::App& app, ServerOptions& server, const char* name, const char* text) {
  CLI::App* command = app.add_subcommand(name, text);
  AddServerOptions(command, server);
  return command;
}

// A command to one space.
CLI::App* AddSpaceCommand(CLI::App& app, ServerOptions& server, SpaceCommandOptions& options,
                          const char* name, const char* text) {
  CLI::App* command = AddPlain(app, server, name, text);
  command->add_option("space", options.space, "The space's name")->required()->check(SpaceName());
  return command;
}

CLI::App* AddCompact(CLI::App& app, ServerOptions& server, SpaceCommandOptions& options) {
  return AddSpaceCommand(app, server, options, "compact",
                         "Sweep out now what a space's updates and deletes have left behind");
}

CLI::App* AddRebuild(CLI::App& app, ServerOptions& server, SpaceCommandOptions& options) {
  return AddSpaceCommand(app, server, options, "rebuild",
                         "Link all of a space anew while it serves, as index.ef_construction says "
                         "now; rebuild_left in the status counts down");
}

CLI::App* AddDrop(CLI::App& app, ServerOptions& server, SpaceCommandOptions& options) {
  CLI::App* drop =
      AddSpaceCommand(app, server, options, "drop",
                      "Remove a space and all that it holds; its name may be used again at once");
  drop->add_flag("--yes", options.yes, "Do not ask for the name again");
  return drop;
}

void CheckAsksSomething(const RecallOptions& options) {
  if (!options.queries.empty() || !options.text.empty() || options.latest) return;
  throw CLI::RequiredError(
      "recall: --queries with --groundtruth, --text with --encoder, or --latest with a filter,");
}

int Run(int argc, char** argv) {
  CLI::App app("engramctl: the operator's tool of engramd", "engramctl");
  app.require_subcommand(1);
  app.footer(kFooter);
  ServerOptions server;
  // Not by CLI11's envname: it would give the environment's value to the options of the commands
  // that were not called, which share this field, and so overrule the one that was.
  if (const char* address = std::getenv("ENGRAM_ADDRESS"); address != nullptr && *address != 0) {
    server.address = address;
  }

  LoadOptions load_options;
  const CLI::App* load = AddLoad(app, server, load_options);
  RecallOptions recall_options;
  const CLI::App* recall = AddRecall(app, server, recall_options);

  const CLI::App* status = AddPlain(app, server, "status", "Counters of every core");
  const CLI::App* spaces = AddPlain(app, server, "spaces", "What each space holds");
  const CLI::App* ping = AddPlain(app, server, "ping", "Time of a round trip");

  const CLI::App* checkpoint =
      AddPlain(app, server, "checkpoint",
               "Have all shards saved, so that a restart reads the log from here");

  SpaceCommandOptions space_options;
  const CLI::App* compact = AddCompact(app, server, space_options);
  const CLI::App* rebuild = AddRebuild(app, server, space_options);
  const CLI::App* drop = AddDrop(app, server, space_options);

  EncodeOptions encode_options;
  CLI::App* encode = app.add_subcommand("encode", "Turn texts into an .fvecs file");
  encode->add_option("--encoder", encode_options.encoder, "Directory of the model")->required();
  encode->add_option("--texts", encode_options.texts, ".tsv, .tsv.gz, or - for lines")->required();
  encode->add_option("--out", encode_options.out, "The .fvecs file to write")->required();

  PutOptions put_options;
  CLI::App* put = app.add_subcommand("put", "Store one phrase");
  AddServerOptions(put, server);
  AddSpaceOption(put, put_options.space);
  put->add_option("--id", put_options.id, "Its id, 1 to 256 bytes")->required();
  put->add_option("--text", put_options.text, "The phrase, which becomes its payload")->required();
  put->add_option("--encoder", put_options.encoder, "Directory of the model")->required();

  DeleteOptions delete_options;
  CLI::App* remove = app.add_subcommand("delete", "Remove observations by id");
  AddServerOptions(remove, server);
  AddSpaceOption(remove, delete_options.space);
  remove->add_option("ids", delete_options.ids, "Ids")->required();

  ConfigOptions config_options;
  const CLI::App* config = AddConfig(app, config_options);
  TopologyOptions topology_options;
  const CLI::App* topology = AddTopology(app, topology_options);
  LogOptions log_options;
  const CLI::App* log = AddLog(app, log_options);
  QuarantineOptions quarantine_options;
  const CLI::App* quarantine = AddQuarantine(app, quarantine_options);
  BackupOptions backup_options;
  const CLI::App* backup = AddBackup(app, server, backup_options);
  RestoreOptions restore_options;
  const CLI::App* restore = AddRestore(app, server, restore_options);
  ExportOptions export_options;
  const CLI::App* export_command = AddExport(app, server, export_options);
  VerifyOptions verify_options;
  const CLI::App* verify = AddVerify(app, server, verify_options);
  try {
    app.parse(argc, argv);
    if (recall->parsed()) CheckAsksSomething(recall_options);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kExitOk : kExitUsage;
  }

  if (load->parsed()) return RunLoad(server, load_options);
  if (recall->parsed()) {
    return recall_options.queries.empty() ? RunRecallOnce(server, recall_options)
                                          : RunRecallQuality(server, recall_options);
  }
  if (status->parsed()) return RunStatus(server);
  if (spaces->parsed()) return RunSpaces(server);
  if (ping->parsed()) return RunPing(server);
  if (checkpoint->parsed()) return RunCheckpoint(server);
  if (compact->parsed()) return RunCompact(server, space_options);
  if (rebuild->parsed()) return RunRebuild(server, space_options);
  if (drop->parsed()) return RunDrop(server, space_options);
  if (quarantine->parsed()) return RunQuarantine(quarantine_options);
  if (export_command->parsed()) return RunExport(server, export_options);
  if (verify->parsed()) return RunVerify(server, verify_options);
  if (backup->parsed()) return RunBackup(server, backup_options);
  if (restore->parsed()) return RunRestore(server, restore_options);
  if (encode->parsed()) return RunEncode(encode_options);
  if (put->parsed()) return RunPut(server, put_options);
  if (config->parsed()) return RunConfig(config_options);
  if (topology->parsed()) return RunTopology(topology_options);
  if (log->parsed()) {
    return log->got_subcommand("dump") ? RunLogDump(log_options) : RunLogVerify(log_options);
  }
  return RunDelete(server, delete_options);
}

}  // namespace

}  // namespace engram

int main(int argc, char** argv) { return engram::Run(argc, argv); }
