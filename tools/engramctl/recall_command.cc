#include <algorithm>
#include <charconv>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "src/core/clock.h"
#include "src/core/latency_histogram.h"
#include "tools/engramctl/commands.h"
#include "tools/engramctl/progress_bar.h"
#include "tools/engramctl/recall_filter.h"
#include "tools/engramctl/recall_quality.h"
#include "tools/engramctl/table.h"
#include "tools/engramctl/text_encoder.h"
#include "tools/engramctl/vector_file.h"

namespace engram {

namespace {

// The answers to one query, kept until the clock has stopped.
struct Answered {
  Metric metric = Metric::kUnspecified;
  std::vector<ReturnedRow> returned;
};

struct RecallRun {
  std::vector<Answered> answers;  // by query
  LatencyHistogram latency;
  LatencyHistogram first;  // until the first results are there
  double seconds = 0;
};

// The row that an id names: what follows `prefix`, in decimal. -1 for another id.
int64_t RowOfId(std::string_view id, std::string_view prefix) {
  if (!id.starts_with(prefix)) return -1;
  id.remove_prefix(prefix.size());
  int64_t row = 0;
  const auto [end, error] = std::from_chars(id.data(), id.data() + id.size(), row);
  return error == std::errc() && end == id.data() + id.size() ? row : -1;
}

// Sends queries, `concurrency` at a time, and takes the time of each.
class QueryRunner {
 public:
  QueryRunner(Connection* connection, const VectorFile& queries, const RecallOptions& options,
              std::string filter)
      : stream_(connection),
        queries_(queries),
        options_(options),
        filter_(std::move(filter)),
        concurrency_(std::min(options.concurrency, connection->hello().max_recalls)),
        vector_(queries.dimension()) {}

  // Sends `count` queries, from the first on and again from the first after the last.
  Result<void> Run(uint64_t count, RecallRun& run) {
    run.answers.resize(queries_.rows());
    ProgressBar bar("recall", count);
    const int64_t start_ns = clock_.MonotonicNs();
    uint64_t sent = 0;
    uint64_t answered = 0;
    while (answered < count) {
      for (; sent < count && stream_.InFlight() < concurrency_; ++sent) Send(sent);
      Result<RecallAnswer> answer = stream_.AwaitAnswer(kAnswerTimeoutNs);
      if (!answer) return std::unexpected(answer.error());
      const int64_t now_ns = clock_.MonotonicNs();
      if (auto taken = Take(*answer, now_ns, run); !taken) return taken;
      bar.Update(++answered, 0, now_ns);
    }
    run.seconds =
        static_cast<double>(clock_.MonotonicNs() - start_ns) / static_cast<double>(kNanosPerSecond);
    return {};
  }

 private:
  struct Sent {
    uint64_t query = 0;
    int64_t at_ns = 0;
  };

  void Send(uint64_t number) {
    const uint64_t query = number % queries_.rows();
    queries_.ReadRow(query, vector_);
    const int64_t at_ns = clock_.MonotonicNs();
    const uint64_t request = stream_.Send({.vector = vector_,
                                           .k = options_.k,
                                           .ef = options_.ef,
                                           .with_vector = options_.with_vector,
                                           .at_snapshot = options_.at_snapshot,
                                           .filter = filter_,
                                           .bound = options_.bound});
    sent_[request] = {query, at_ns};
  }

  Result<void> Take(const RecallAnswer& answer, int64_t now_ns, RecallRun& run) {
    if (answer.refusal) {
      return std::unexpected(RefusedRecall(*answer.refusal));
    }
    const auto found = sent_.find(answer.request);
    run.latency.Record(now_ns - found->second.at_ns);
    run.first.Record(answer.first_ns - found->second.at_ns);
    Answered& answered = run.answers[found->second.query];
    sent_.erase(found);
    answered.metric = answer.metric;
    answered.returned.clear();
    for (const RecallHit& hit : answer.hits) {
      answered.returned.push_back(
          {RowOfId(hit.id, options_.id_prefix), static_cast<double>(hit.score)});
    }
    return {};
  }

  SystemClock clock_;
  RecallStream stream_;
  const VectorFile& queries_;
  const RecallOptions& options_;
  const std::string filter_;
  const uint32_t concurrency_;
  std::vector<float> vector_;
  std::map<uint64_t, Sent> sent_;  // by request id
};

// The filter that was asked for; an error where the server does not know what the options ask for.
Result<std::string> FilterFor(const Connection& connection, const RecallOptions& options) {
  if ((options.bound || options.all_spaces || options.latest) && !connection.hello().wide_recalls) {
    return Fail(
        ErrorCode::kInvalidArgument,
        "this engramd does not know bounds, recalls of all spaces, or of the latest; update "
        "it, or recall without --within, --all-spaces and --latest");
  }
  Result<std::string> filter = FilterBytes(options.filter);
  if (filter && !filter->empty() && !connection.hello().attributes) {
    return Fail(ErrorCode::kInvalidArgument,
                "this engramd does not know filters; update it, or recall without --filter, "
                "--exclude, --since and --until");
  }
  if (filter && filter->empty() && options.latest) {
    return Fail(ErrorCode::kInvalidArgument,
                "--latest: of what? Give a --filter, --exclude, --since or --until");
  }
  return filter;
}

struct QualityInput {
  VectorFile queries;
  VectorFile truth;
  std::optional<VectorFile> base;
};

Result<QualityInput> OpenQualityInput(const RecallOptions& options) {
  Result<VectorFile> queries = VectorFile::Open(options.queries, options.count);
  if (!queries) return std::unexpected(queries.error());
  Result<VectorFile> truth = VectorFile::Open(options.groundtruth, options.count);
  if (!truth) return std::unexpected(truth.error());
  if (queries->type() == ElementType::kI32 || queries->dimension() > kMaxDimension) {
    return Fail(ErrorCode::kInvalidArgument,
                options.queries + ": is no file of vectors of at most 4096 float or byte numbers");
  }
  if (truth->type() != ElementType::kI32) {
    return Fail(ErrorCode::kInvalidArgument,
                options.groundtruth + ": ground truth is an .ivecs file, or .npy of <i4");
  }
  if (truth->rows() < queries->rows() || truth->dimension() < options.k) {
    return Fail(ErrorCode::kInvalidArgument, options.groundtruth + ": names " +
                                                 std::to_string(truth->dimension()) +
                                                 " neighbours of " + std::to_string(truth->rows()) +
                                                 " queries; " + std::to_string(options.k) + " of " +
                                                 std::to_string(queries->rows()) + " are needed");
  }
  QualityInput input{*std::move(queries), *std::move(truth), std::nullopt};
  if (!options.data.empty()) {
    Result<VectorFile> base = VectorFile::Open(options.data);
    if (!base) return std::unexpected(base.error());
    if (base->dimension() != input.queries.dimension()) {
      return Fail(ErrorCode::kInvalidArgument,
                  options.data + ": its vectors have another dimension than the queries");
    }
    input.base = *std::move(base);
  }
  return input;
}

// Replaces the returned scores by exact ones, and tells that of the k-th true neighbour.
Result<double> UseExactScores(const QualityInput& input, uint64_t query, int64_t kth_row,
                              Answered& answered) {
  const VectorFile& base = *input.base;
  std::vector<float> from(base.dimension());
  std::vector<float> to(base.dimension());
  input.queries.ReadRow(query, from);
  const auto score_of = [&](int64_t row) {
    base.ReadRow(static_cast<uint64_t>(row), to);
    return ExactScore(answered.metric, from, to);
  };
  const auto in_base = [&](int64_t row) {
    return row >= 0 && static_cast<uint64_t>(row) < base.rows();
  };
  if (!in_base(kth_row)) {
    return Fail(ErrorCode::kInvalidArgument, "the ground truth names row " +
                                                 std::to_string(kth_row) +
                                                 ", which is not in the --data file");
  }
  for (ReturnedRow& hit : answered.returned) {
    if (in_base(hit.row)) {
      hit.score = score_of(hit.row);
    } else {
      hit.row = -1;
    }
  }
  return score_of(kth_row);
}

// Recall@k over all queries.
Result<double> Quality(const QualityInput& input, uint32_t k, RecallRun& run) {
  uint64_t hits = 0;
  std::vector<int32_t> truth(input.truth.dimension());
  for (uint64_t query = 0; query < input.queries.rows(); ++query) {
    Answered& answered = run.answers[query];
    for (uint32_t i = 0; i < truth.size(); ++i) truth[i] = input.truth.IntegerAt(query, i);
    std::optional<double> kth_score;
    if (input.base) {
      const Result<double> exact = UseExactScores(input, query, truth[k - 1], answered);
      if (!exact) return exact;
      kth_score = *exact;
    }
    hits += CountHits(answered.returned, truth, k, answered.metric, kth_score);
  }
  return static_cast<double>(hits) / static_cast<double>(input.queries.rows() * k);
}

void PrintQuality(const ServerOptions& server, const RecallOptions& options, double quality,
                  const RecallRun& run) {
  const double queries = static_cast<double>(run.latency.Count());
  const double per_s = run.seconds > 0 ? queries / run.seconds : 0;
  const auto micros_of = [](const LatencyHistogram& latency, double quantile) {
    return Rounded(static_cast<double>(latency.QuantileNs(quantile)) / kNanosPerMicro, 1);
  };
  const auto micros = [&](double quantile) { return micros_of(run.latency, quantile); };
  if (!server.json) {
    std::printf("recall@%u %.4f  over %s queries, ef %s\n", options.k, quality,
                WithThousands(run.latency.Count()).c_str(),
                options.ef == 0 ? "default" : std::to_string(options.ef).c_str());
    std::printf("%s recalls/s, %u at a time  P50 %.0f us  P99 %.0f us  P99.9 %.0f us\n",
                WithThousands(static_cast<uint64_t>(per_s)).c_str(), options.concurrency,
                micros(0.5), micros(0.99), micros(0.999));
    if (options.k > kLongRecallFrom) {
      std::printf("the first results  P50 %.0f us  P99 %.0f us\n", micros_of(run.first, 0.5),
                  micros_of(run.first, 0.99));
    }
    return;
  }
  const nlohmann::json report = {
      {"recall_at_" + std::to_string(options.k), Rounded(quality, 6)},
      {"recalls_per_s", Rounded(per_s, 1)},
      {"p50_us", micros(0.5)},
      {"p99_us", micros(0.99)},
      {"p999_us", micros(0.999)},
      {"first_p50_us", micros_of(run.first, 0.5)},
      {"first_p99_us", micros_of(run.first, 0.99)},
      {"queries", run.latency.Count()},
      {"k", options.k},
      {"ef", options.ef},
      {"concurrency", options.concurrency},
      {"seconds", Rounded(run.seconds, 3)},
  };
  std::printf("%s\n", report.dump().c_str());
}

// Of the phrase; empty where none is asked for.
Result<std::vector<float>> VectorOf(const RecallOptions& options) {
  if (options.latest) return std::vector<float>();
  const Result<TextEncoder> encoder = TextEncoder::Load(options.encoder);
  if (!encoder) return std::unexpected(encoder.error());
  std::vector<float> vector(encoder->dimension());
  encoder->Encode(options.text, vector);
  if (encoder->Words(options.text).empty()) {
    return Fail(ErrorCode::kInvalidArgument,
                "the phrase '" + Printable(options.text) + "' has no word in it");
  }
  return vector;
}

// Payload as one line that is safe to print.
std::string LineOf(const RecallHit& hit) {
  if (hit.payload_omitted) return "(payload left out: the answer is full)";
  return Printable(hit.payload);
}

}  // namespace

int RunRecallQuality(const ServerOptions& server, const RecallOptions& options) {
  const Result<QualityInput> input = OpenQualityInput(options);
  if (!input) return ReportError(input.error());
  HelloOptions hello;
  hello.space = options.space;
  hello.dimension = input->queries.dimension();
  hello.no_session = true;
  auto connection = OpenConnection(server, hello);
  if (!connection) return connection.error();

  Result<std::string> filter = FilterFor(*connection, options);
  if (!filter) return ReportError(filter.error());
  QueryRunner runner(&*connection, input->queries, options, *std::move(filter));
  if (options.warmup > 0) {
    RecallRun unused;
    if (auto ran = runner.Run(options.warmup, unused); !ran)
      return ReportError(ran.error(), options.space);
  }
  RecallRun run;
  if (auto ran = runner.Run(input->queries.rows(), run); !ran)
    return ReportError(ran.error(), options.space);
  const Result<double> quality = Quality(*input, options.k, run);
  if (!quality) return ReportError(quality.error());
  PrintQuality(server, options, *quality, run);
  return kExitOk;
}

int RunRecallOnce(const ServerOptions& server, const RecallOptions& options) {
  const Result<std::vector<float>> vector = VectorOf(options);
  if (!vector) return ReportError(vector.error());
  auto connection = OpenReader(server, options.space);
  if (!connection) return connection.error();
  const Result<std::string> filter = FilterFor(*connection, options);
  if (!filter) return ReportError(filter.error());
  RecallStream stream(&*connection);
  stream.Send({.vector = *vector,
               .k = options.k,
               .ef = options.ef,
               .with_payload = true,
               .with_vector = options.with_vector,
               .at_snapshot = options.at_snapshot,
               .filter = *filter,
               .bound = options.bound,
               .across = options.all_spaces});
  const Result<RecallAnswer> answer = stream.AwaitAnswer(kAnswerTimeoutNs);
  if (!answer) return ReportError(answer.error());
  if (answer->refusal) {
    return ReportError(RefusedRecall(*answer->refusal), options.space);
  }

  if (server.json) {
    nlohmann::json neighbours = nlohmann::json::array();
    for (size_t i = 0; i < answer->hits.size(); ++i) {
      const RecallHit& hit = answer->hits[i];
      neighbours.push_back({{"rank", i + 1},
                            {"score", Rounded(static_cast<double>(hit.score), 6)},
                            {"id", hit.id},
                            {"stamp", hit.stamp},
                            {"text", hit.payload}});
      if (options.all_spaces) neighbours.back()["space"] = hit.space;
      if (options.with_vector) neighbours.back()["vector"] = hit.vector;
    }
    nlohmann::json report = {{"text", options.text}, {"neighbours", neighbours}};
    if (options.at_snapshot) report["snapshot"] = answer->snapshot;
    // A payload is any bytes; JSON is UTF-8.
    std::printf("%s\n",
                report.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
    return kExitOk;
  }
  std::vector<Table::Column> columns = {{"rank", Table::Align::kRight},
                                        {"score", Table::Align::kRight},
                                        {"id", Table::Align::kLeft},
                                        {"text", Table::Align::kLeft}};
  if (options.all_spaces) columns.insert(columns.begin() + 2, {"space", Table::Align::kLeft});
  Table table(std::move(columns));
  for (size_t i = 0; i < answer->hits.size(); ++i) {
    const RecallHit& hit = answer->hits[i];
    char score[32];
    std::snprintf(score, sizeof(score), "%.4f", static_cast<double>(hit.score));
    std::vector<std::string> row = {std::to_string(i + 1), score, Printable(hit.id), LineOf(hit)};
    if (options.all_spaces) row.insert(row.begin() + 2, hit.space);
    table.AddRow(std::move(row));
  }
  table.Print();
  return kExitOk;
}

}  // namespace engram
