#include <sys/prctl.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>
#include <vector>

#include "src/core/attributes.h"
#include "src/core/clock.h"
#include "src/core/latency_histogram.h"
#include "tools/clients/cpp/feed.h"
#include "tools/clients/cpp/resuming_feed.h"
#include "tools/clients/cpp/vector_encoding.h"
#include "tools/engramctl/commands.h"
#include "tools/engramctl/feed_loop.h"
#include "tools/engramctl/progress_bar.h"
#include "tools/engramctl/row_dealing.h"
#include "tools/engramctl/space_listing.h"
#include "tools/engramctl/table.h"
#include "tools/engramctl/text_file.h"
#include "tools/engramctl/vector_file.h"

namespace engram {

namespace {

constexpr int64_t kLinkedPollNs = 20 * kNanosPerMilli;
constexpr int64_t kLinkedStallNs = 60 * kNanosPerSecond;
constexpr int64_t kProgressNs = 100 * kNanosPerMilli;
constexpr int64_t kCloseTimeoutNs = 2 * kNanosPerSecond;
// An open loop has to wake on time; the kernel's default slack is 50 µs.
constexpr unsigned long kTimerSlackNs = 1'000;

// What a file's numbers travel as when nothing else is asked for.
VectorDtype DtypeOf(ElementType type) {
  switch (type) {
    case ElementType::kF16:
      return VectorDtype::kF16;
    case ElementType::kI8:
      return VectorDtype::kInt8;
    case ElementType::kF32:
    case ElementType::kU8:
    case ElementType::kI32:
      break;
  }
  return VectorDtype::kF32;
}

// Shows the rows of a file as observations. Rows that travel as they lie in the file are not
// copied.
class RowSource {
 public:
  RowSource(const VectorFile& file, VectorDtype dtype, const std::vector<TextRow>& texts,
            const std::vector<TextColumn>& columns, std::string id_prefix)
      : file_(file),
        dtype_(dtype),
        as_in_file_(file.type() != ElementType::kU8 && DtypeOf(file.type()) == dtype),
        texts_(texts),
        columns_(columns),
        id_prefix_(std::move(id_prefix)),
        numbers_(file.dimension()) {}

  void Show(uint64_t row, Observation* observation) {
    id_ = id_prefix_ + std::to_string(row);
    observation->id = id_;
    observation->dtype = dtype_;
    observation->dimension = file_.dimension();
    observation->when_ns = clock_.WallNs();
    if (!texts_.empty()) {
      observation->payload = texts_[row].text;
      attributes_.clear();
      // Their lengths were checked.
      for (const TextColumn& column : columns_) AddColumn(column, texts_[row]);
      observation->attributes = attributes_;
    }
    if (as_in_file_) {
      observation->vector = file_.RowBytes(row);
      return;
    }
    file_.ReadRow(row, numbers_);
    if (dtype_ == VectorDtype::kF32) {
      observation->vector = std::as_bytes(std::span<const float>(numbers_));
      return;
    }
    observation->scale = EncodeVector(dtype_, numbers_, encoded_);
    observation->vector = encoded_;
  }

 private:
  void AddColumn(const TextColumn& column, const TextRow& row) {
    const std::string& value = row.*column.value;
    if (!value.empty()) AppendAttribute(column.name, value, &attributes_);
  }

  const VectorFile& file_;
  const VectorDtype dtype_;
  const bool as_in_file_;
  const std::vector<TextRow>& texts_;       // empty, or one a row
  const std::vector<TextColumn>& columns_;  // that travel as attributes
  const std::string id_prefix_;
  SystemClock clock_;
  std::string id_;
  std::string attributes_;
  std::vector<float> numbers_;
  std::vector<std::byte> encoded_;
};

// As quarantine and log dump print them.
std::string SessionText(uint64_t session) {
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(session));
  return text;
}

// One a connection, all 0 where none was asked for.
Result<std::vector<uint64_t>> SessionsOf(const std::vector<std::string>& texts,
                                         uint32_t connections) {
  std::vector<uint64_t> sessions(connections, 0);
  if (texts.empty()) return sessions;
  if (texts.size() != connections) {
    return Fail(ErrorCode::kInvalidArgument, "--session names " + std::to_string(texts.size()) +
                                                 " sessions for " + std::to_string(connections) +
                                                 " connections; give one for each");
  }
  for (size_t i = 0; i < texts.size(); ++i) {
    const char* const end = texts[i].data() + texts[i].size();
    const auto [stop, error] = std::from_chars(texts[i].data(), end, sessions[i], 16);
    if (error != std::errc() || stop != end) {
      return Fail(ErrorCode::kInvalidArgument, "--session: '" + Printable(texts[i]) +
                                                   "' is no id of a session, which has up to 16 "
                                                   "hexadecimal digits");
    }
  }
  return sessions;
}

// What all connections did together.
struct LoadTotals {
  FeedCounts counts;
  LatencyHistogram ack_latency;
  uint64_t bytes = 0;
  uint64_t sessions_begun_anew = 0;
  uint64_t rows = 0;                  // that were to be sent
  std::vector<std::string> sessions;  // as --session takes them
};

void AddTotals(const ResumingFeed& resuming, LoadTotals& totals) {
  const Feed& feed = resuming.feed();
  const FeedCounts& counts = feed.counts();
  totals.counts.sent += counts.sent;
  totals.counts.settled += counts.settled;
  totals.counts.acked += counts.acked;
  totals.counts.retried += counts.retried;
  totals.counts.resumes += counts.resumes;
  totals.counts.resumed_ahead += counts.resumed_ahead;
  totals.counts.rolled_back += counts.rolled_back;
  totals.sessions_begun_anew += resuming.sessions_begun_anew();
  for (const auto& [reason, count] : counts.refused) totals.counts.refused[reason] += count;
  for (const auto& [reason, count] : counts.waited_for) totals.counts.waited_for[reason] += count;
  totals.ack_latency.Merge(feed.ack_latency());
  totals.bytes += feed.observe_bytes_sent();
  totals.sessions.push_back(feed.SessionIsEmpty() ? "0"
                                                  : SessionText(feed.connection().hello().session));
}

// Offers batches by the clock, at equal distances that do not depend on how the server keeps up.
class Pacer {
 public:
  Pacer(const RowDealing& dealing, uint64_t rate) : dealing_(dealing), rate_(rate) {}

  // Offers what is due, and returns when the next batch is.
  int64_t OfferDue(std::span<const std::unique_ptr<ResumingFeed>> feeds, int64_t start_ns,
                   int64_t now_ns) {
    for (; next_batch_ < dealing_.Batches(); ++next_batch_) {
      const int64_t due_ns = start_ns + OffsetNs(next_batch_);
      if (due_ns > now_ns) return due_ns;
      feeds[next_batch_ % feeds.size()]->Offer(dealing_.RowsOfBatch(next_batch_), due_ns);
    }
    return kNothingMore;
  }

 private:
  // Computed anew for each batch, so that no rounding adds up.
  int64_t OffsetNs(uint64_t batch) const {
    const double seconds = static_cast<double>(batch) * dealing_.batch / static_cast<double>(rate_);
    return static_cast<int64_t>(seconds * static_cast<double>(kNanosPerSecond));
  }

  const RowDealing dealing_;
  const uint64_t rate_;
  uint64_t next_batch_ = 0;
};

// Sends all rows and waits until they are settled.
Result<void> StreamRows(const LoadOptions& options, const RowDealing& dealing,
                        std::span<const std::unique_ptr<ResumingFeed>> feeds, int64_t start_ns) {
  ProgressBar bar("load", dealing.rows);
  Pacer pacer(dealing, options.rate);
  if (options.rate == 0) {
    // A session that is gone on with has some already.
    for (uint32_t i = 0; i < feeds.size(); ++i) {
      feeds[i]->Offer(dealing.RowsOf(i) - feeds[i]->feed().counts().settled);
    }
  } else {
    prctl(PR_SET_TIMERSLACK, kTimerSlackNs);
  }
  int64_t next_draw_ns = start_ns;
  const auto turn = [&](int64_t now_ns) {
    if (now_ns >= next_draw_ns) {
      next_draw_ns = now_ns + kProgressNs;
      uint64_t settled = 0;
      uint64_t acked = 0;
      for (const auto& feed : feeds) {
        settled += feed->feed().counts().settled;
        acked += feed->feed().counts().acked;
      }
      bar.Update(settled, settled - acked, now_ns);
    }
    return options.rate == 0 ? kNothingMore : pacer.OfferDue(feeds, start_ns, now_ns);
  };
  return DriveFeeds(feeds, turn, [&bar](const std::string& line) {
    bar.Clear();
    Say(line);
  });
}

// Waits until the background work of linking has nothing left to do in the space.
Result<void> AwaitLinked(Connection& reader, const std::string& space) {
  SystemClock clock;
  uint64_t last_unlinked = UINT64_MAX;
  int64_t progress_ns = clock.MonotonicNs();
  for (;;) {
    const Result<std::vector<SpaceInfo>> records = IntrospectSpaces(reader, kAnswerTimeoutNs);
    if (!records) return std::unexpected(records.error());
    const std::vector<SpaceSummary> spaces = MergeSpaces(*records);
    const auto found = std::ranges::find(spaces, space, &SpaceSummary::name);
    if (found == spaces.end() || found->LinkingDone()) return {};
    const int64_t now_ns = clock.MonotonicNs();
    if (found->unlinked < last_unlinked) {
      last_unlinked = found->unlinked;
      progress_ns = now_ns;
    } else if (now_ns - progress_ns > kLinkedStallNs) {
      return Fail(ErrorCode::kUnavailable, "space " + space + ": " +
                                               std::to_string(found->unlinked) +
                                               " observations stay unlinked; see engramctl status");
    }
    SleepUntil(now_ns + kLinkedPollNs);
  }
}

double Micros(int64_t duration_ns) {
  return Rounded(static_cast<double>(duration_ns) / kNanosPerMicro, 1);
}

nlohmann::json ReportOf(const LoadOptions& options, const LoadTotals& totals, double seconds,
                        std::optional<double> linked_s) {
  const FeedCounts& counts = totals.counts;
  const auto per_second = [&](uint64_t amount) {
    return Rounded(static_cast<double>(amount) / seconds, 1);
  };
  nlohmann::json report = {
      {"observations", totals.rows},
      {"observations_sent", counts.sent},
      {"observations_acked", counts.acked},
      {"not_settled", counts.sent - counts.settled},
      {"not_sent", totals.rows - counts.sent},
      {"sessions", totals.sessions},
      {"refused", nlohmann::json::object()},
      {"retried", counts.retried},
      {"waited_for", nlohmann::json::object()},
      {"reconnects", counts.resumes},
      {"resumed_ahead", counts.resumed_ahead},
      {"rolled_back", counts.rolled_back},
      {"sessions_begun_anew", totals.sessions_begun_anew},
      {"observations_per_s", per_second(counts.acked)},
      {"seconds", Rounded(seconds, 3)},
      {"ack_p50_us", Micros(totals.ack_latency.QuantileNs(0.5))},
      {"ack_p99_us", Micros(totals.ack_latency.QuantileNs(0.99))},
      {"ack_p999_us", Micros(totals.ack_latency.QuantileNs(0.999))},
      {"bytes_per_s", per_second(totals.bytes)},
      {"connections", options.connections},
      {"batch", options.batch},
  };
  for (const auto& [reason, count] : counts.refused) report["refused"][reason] = count;
  for (const auto& [reason, count] : counts.waited_for) report["waited_for"][reason] = count;
  if (options.rate > 0) report["rate"] = options.rate;
  if (linked_s) report["linked_s"] = Rounded(*linked_s, 3);
  return report;
}

void PrintForPeople(const LoadTotals& totals, double seconds, std::optional<double> linked_s) {
  const FeedCounts& counts = totals.counts;
  std::printf(
      "%s of %s observations acked in %.2f s: %s/s, %.1f MB/s\n",
      WithThousands(counts.acked).c_str(), WithThousands(totals.rows).c_str(), seconds,
      WithThousands(static_cast<uint64_t>(static_cast<double>(counts.acked) / seconds)).c_str(),
      static_cast<double>(totals.bytes) / seconds / 1e6);
  std::printf("ack latency  P50 %.0f us  P99 %.0f us  P99.9 %.0f us\n",
              Micros(totals.ack_latency.QuantileNs(0.5)),
              Micros(totals.ack_latency.QuantileNs(0.99)),
              Micros(totals.ack_latency.QuantileNs(0.999)));
  for (const auto& [reason, count] : counts.refused) {
    std::printf("refused      %s  %s\n", WithThousands(count).c_str(), reason.c_str());
  }
  if (counts.retried > 0) {
    std::printf("sent again   %s", WithThousands(counts.retried).c_str());
    if (!counts.waited_for.empty()) std::printf(", after refusals that asked to wait:");
    for (const auto& [reason, count] : counts.waited_for) {
      std::printf(" %s %s times", reason.c_str(), WithThousands(count).c_str());
    }
    std::printf("\n");
  }
  if (counts.resumes > 0) {
    std::printf(
        "reconnected  %s times: %s taken whose ack was lost, %s acked that the server lost\n",
        WithThousands(counts.resumes).c_str(), WithThousands(counts.resumed_ahead).c_str(),
        WithThousands(counts.rolled_back).c_str());
  }
  if (totals.sessions_begun_anew > 0) {
    std::printf(
        "new sessions %s: nothing of the old ones had been taken when their connections broke\n",
        WithThousands(totals.sessions_begun_anew).c_str());
  }
  if (linked_s) std::printf("linked       %.2f s after the first was sent\n", *linked_s);
}

// The rows, their texts and how they travel.
struct LoadInput {
  VectorFile file;
  std::vector<TextRow> texts;
  std::vector<TextColumn> columns;  // that recalls may filter by
  VectorDtype dtype;
};

// The columns that --attributes names, all of whose values fit an attribute.
Result<std::vector<TextColumn>> ColumnsOf(const LoadOptions& options,
                                          const std::vector<TextRow>& texts) {
  std::vector<TextColumn> columns;
  if (!HasTextColumns(options.texts)) return columns;
  for (const std::string& name : options.attributes) {
    if (const auto column = FindTextColumn(name)) columns.push_back(*column);
  }
  for (const TextColumn& column : columns) {
    const auto too_long = std::ranges::find_if(texts, [&](const TextRow& row) {
      return (row.*column.value).size() > kMaxAttributeValueBytes;
    });
    if (too_long == texts.end()) continue;
    return Fail(ErrorCode::kInvalidArgument,
                options.texts + ": line " + std::to_string(too_long - texts.begin() + 1) + ": " +
                    std::string(column.name) + " has " +
                    std::to_string(((*too_long).*column.value).size()) +
                    " bytes, and recalls filter by at most 255; name other columns by "
                    "--attributes, or none");
  }
  return columns;
}

Result<LoadInput> OpenInput(const LoadOptions& options) {
  Result<VectorFile> file = VectorFile::Open(options.data, options.count);
  if (!file) return std::unexpected(file.error());
  if (file->type() == ElementType::kI32 || file->dimension() > kMaxDimension) {
    return Fail(ErrorCode::kInvalidArgument,
                options.data + ": is no file of vectors of at most 4096 float or byte numbers");
  }
  if (options.id_prefix.size() + 20 > kMaxIdBytes) {
    return Fail(ErrorCode::kInvalidArgument,
                "--id-prefix leaves no room for a number in an id of "
                "256 bytes");
  }
  std::vector<TextRow> texts;
  if (!options.texts.empty()) {
    Result<std::vector<TextRow>> read = ReadTexts(options.texts);
    if (!read) return std::unexpected(read.error());
    texts = *std::move(read);
    if (texts.size() < file->rows()) {
      return Fail(ErrorCode::kInvalidArgument,
                  options.texts + ": has " + std::to_string(texts.size()) + " texts for " +
                      std::to_string(file->rows()) + " vectors; give one a row, or --count");
    }
  }
  Result<std::vector<TextColumn>> columns = ColumnsOf(options, texts);
  if (!columns) return std::unexpected(columns.error());
  const VectorDtype dtype =
      options.dtype == VectorDtype::kNone ? DtypeOf(file->type()) : options.dtype;
  return LoadInput{*std::move(file), std::move(texts), *std::move(columns), dtype};
}

// Connects and says hello; within --retry-for, again and again until it works. On failure says why
// and returns the exit code.
std::expected<Connection, int> OpenPatiently(const ServerOptions& server, const HelloOptions& hello,
                                             uint64_t retry_for_s, uint64_t seed) {
  if (retry_for_s == 0) return OpenConnection(server, hello);
  const Result<Address> address = ParseAddress(server.address);
  if (!address) {
    ReportError(address.error());
    return std::unexpected(kExitUsage);
  }
  SystemClock clock;
  const RetryOptions defaults;
  Backoff backoff(defaults.backoff_min_ns, defaults.backoff_max_ns, seed);
  const int64_t give_up_ns =
      clock.MonotonicNs() + static_cast<int64_t>(retry_for_s) * kNanosPerSecond;
  for (;;) {
    Result<Connection> connection = Connection::Connect(*address, defaults.greet_timeout_ns);
    int exit_code = kExitCannotConnect;
    Error error;
    if (!connection) {
      error = connection.error();
    } else if (const Result<void> greeted = connection->Hello(hello, kAnswerTimeoutNs); !greeted) {
      error = greeted.error();
      exit_code = kExitFailed;
    } else {
      return *std::move(connection);
    }
    const int64_t now_ns = clock.MonotonicNs();
    if (error.code != ErrorCode::kUnavailable || now_ns >= give_up_ns) {
      ReportError(error);
      return std::unexpected(exit_code);
    }
    SleepUntil(std::min(now_ns + backoff.NextNs(), give_up_ns));
  }
}

// One feed a connection, each with its share of the rows.
std::expected<std::vector<std::unique_ptr<ResumingFeed>>, int> OpenFeeds(
    const ServerOptions& server, const LoadOptions& options, HelloOptions hello,
    const RowDealing& dealing, RowSource& source) {
  const Result<std::vector<uint64_t>> sessions = SessionsOf(options.sessions, dealing.connections);
  if (!sessions) {
    ReportError(sessions.error());
    return std::unexpected(kExitUsage);
  }
  // Many loaders that lose one server shall not come back at the same moments.
  const auto seed = static_cast<uint64_t>(SystemClock().WallNs());
  std::vector<std::unique_ptr<ResumingFeed>> feeds;
  for (uint32_t i = 0; i < dealing.connections; ++i) {
    hello.session = (*sessions)[i];
    auto connection = OpenPatiently(server, hello, options.retry_for_s, seed + i);
    if (!connection) return std::unexpected(connection.error());
    FeedOptions feed_options{.batch = options.batch};
    if (hello.session != 0) {
      feed_options.base = 0;
      if (const uint64_t taken = connection->hello().last_sequence; taken > dealing.RowsOf(i)) {
        ReportError({ErrorCode::kInvalidArgument, "session " + SessionText(hello.session) +
                                                      " has more than the rows it would get here"});
        return std::unexpected(kExitFailed);
      }
    }
    RetryOptions retry;
    const int64_t retry_for_ns = static_cast<int64_t>(options.retry_for_s) * kNanosPerSecond;
    if (options.resume) {
      retry.retry_for_ns = retry_for_ns;
    } else if (retry_for_ns > 0) {
      feed_options.stall_timeout_ns = retry_for_ns;
    }
    retry.jitter_seed = seed + i;
    const Address address = *ParseAddress(server.address);
    feeds.push_back(std::make_unique<ResumingFeed>(
        *std::move(connection), hello,
        [&source, dealing, i](uint64_t index, Observation* observation) {
          source.Show(dealing.RowAt(i, index), observation);
        },
        feed_options,
        [address](uint64_t attempt) { return Connection::StartConnect(address, attempt); }, retry));
  }
  return feeds;
}

// Why the load ended early, what became of the rows, and how to go on.
int ReportUnfinished(const Error& error, const LoadTotals& totals) {
  ReportError(error);
  Say("of " + std::to_string(totals.rows) + " observations " + totals.counts.Describe(totals.rows));
  const bool unknown = error.code == ErrorCode::kNotFound;
  if (unknown || totals.counts.settled == totals.rows) return kExitFailed;
  std::string sessions;
  for (const std::string& session : totals.sessions) {
    sessions += (sessions.empty() ? "" : ",") + session;
  }
  Say("to go on while the server knows the sessions: the same load with --session " + sessions);
  return kExitFailed;
}

}  // namespace

int RunLoad(const ServerOptions& server, const LoadOptions& options) {
  const Result<LoadInput> input = OpenInput(options);
  if (!input) return ReportError(input.error());
  RowSource source(input->file, input->dtype, input->texts, input->columns, options.id_prefix);
  RowDealing dealing = {.rows = input->file.rows(), .batch = options.batch, .connections = 1};
  dealing.connections =
      static_cast<uint32_t>(std::min<uint64_t>(options.connections, dealing.Batches()));

  HelloOptions hello;
  hello.space = options.space;
  hello.dimension = input->file.dimension();
  hello.metric = options.metric;
  hello.priority = options.priority;
  const auto opened = OpenFeeds(server, options, hello, dealing, source);
  if (!opened) return opened.error();
  const std::vector<std::unique_ptr<ResumingFeed>>& feeds = *opened;
  if (!input->columns.empty() && !feeds[0]->feed().connection().hello().attributes) {
    Say("this engramd does not know attributes: recalls will not filter by what is loaded");
  }

  SystemClock clock;
  const auto seconds_since = [&](int64_t start_ns) {
    const int64_t passed_ns = std::max<int64_t>(1, clock.MonotonicNs() - start_ns);
    return static_cast<double>(passed_ns) / static_cast<double>(kNanosPerSecond);
  };
  const int64_t start_ns = clock.MonotonicNs();
  Result<void> done = StreamRows(options, dealing, feeds, start_ns);
  const double seconds = seconds_since(start_ns);
  LoadTotals totals;
  totals.rows = dealing.rows;
  for (const auto& feed : feeds) AddTotals(*feed, totals);

  std::optional<double> linked_s;
  if (done && options.wait_linked) {
    auto reader = OpenReader(server, options.space);
    if (!reader) return reader.error();
    done = AwaitLinked(*reader, options.space.empty() ? "default" : options.space);
    if (done) linked_s = seconds_since(start_ns);
  }
  // All is settled: what the server still says at the end changes nothing.
  if (done) {
    for (const auto& feed : feeds) {
      if (feed->Streaming()) (void)feed->feed().connection().Close(kCloseTimeoutNs);
    }
  }

  if (server.json) {
    std::printf("%s\n", ReportOf(options, totals, seconds, linked_s).dump().c_str());
  } else {
    PrintForPeople(totals, seconds, linked_s);
  }
  if (!done) return ReportUnfinished(done.error(), totals);
  return totals.counts.RefusedTotal() > 0 ? kExitFailed : kExitOk;
}

}  // namespace engram
