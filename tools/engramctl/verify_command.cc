// `engramctl verify`: what a running daemon has, checked while it serves.
//
// 1. Invariants: each shard checks its part of the space, a slice for each question, so that it
//    serves between them. The counts are compared where nothing changed meanwhile.
// 2. Sample: observations from random places of the scroll's order (a hash of the ids) of a random
//    partition, with payload and vector as the log has them: a record that does not check out by
//    its CRC is named with file and offset. Each, recalled by its own vector, is found first, or as
//    near as the first.
// 3. recall@10 of the sample against the exact answers, which are computed here from a scroll of
//    all vectors: memory for the sample alone.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "src/core/clock.h"
#include "src/core/commit_stamp.h"
#include "src/core/hash.h"
#include "tools/engramctl/commands.h"
#include "tools/engramctl/recall_quality.h"

namespace engram {

namespace {

constexpr uint32_t kNeighbours = 10;
// Asked for beyond these, for what came after the exact answers were begun.
constexpr uint32_t kAsked = 2 * kNeighbours;
constexpr int kTries = 3;
constexpr double kTie = 1e-4;       // of scores that may have been made of rounded rows
constexpr double kExactTie = 1e-6;  // of others
constexpr size_t kProblemsShown = 20;

struct Sampled {
  ScrollPosition from = {};  // it comes soon after this
  RecallHit hit;
};

struct SpaceReport {
  std::string name;
  uint64_t observations = 0;
  uint32_t shards = 0;
  bool counts_compared = true;
  uint64_t sampled = 0;
  uint64_t found_first = 0;
  uint64_t tied = 0;
  uint64_t changed = 0;  // replaced or gone before they were recalled
  uint64_t payload_bytes = 0;
  std::optional<double> recall;
  uint64_t compared_with = 0;
  std::vector<std::string> problems;
};

double Slack(double a, double b, double tie) {
  return tie * std::max({std::fabs(a), std::fabs(b), 1e-30});
}

// How near `score` is, so that nearer is more.
double Nearness(Metric metric, double score) { return metric == Metric::kL2 ? -score : score; }

class SpaceVerifier {
 public:
  SpaceVerifier(Connection* connection, const VerifyOptions& options, SplitMix64* random,
                SpaceReport* report)
      : connection_(*connection), options_(options), random_(*random), report_(*report) {}

  Result<void> Run(const std::vector<uint16_t>& shards) {
    for (const uint16_t shard : shards) {
      if (auto checked = CheckShard(shard); !checked) return checked;
    }
    if (auto drawn = Draw(); !drawn) return drawn;
    if (sample_.empty()) return {};
    CommitStamp snapshot = kNoStamp;
    if (report_.observations <= options_.exact_limit) {
      const Result<CommitStamp> stamp = LatestStamp();
      if (!stamp) return std::unexpected(stamp.error());
      snapshot = *stamp;
      if (auto scanned = ScanExact(snapshot); !scanned) return scanned;
    }
    for (size_t i = 0; i < sample_.size(); ++i) {
      if (auto judged = Judge(i, snapshot); !judged) return judged;
    }
    if (questions_ > 0) {
      report_.recall = static_cast<double>(hits_) / static_cast<double>(questions_);
      report_.compared_with = scanned_;
      if (*report_.recall < options_.least_recall) {
        char text[96];
        std::snprintf(text, sizeof(text), "recall@10 is %.4f, less than %.4f", *report_.recall,
                      options_.least_recall);
        report_.problems.push_back(text);
      }
    }
    return {};
  }

 private:
  struct Exact {
    double nearness = 0;
    std::string id;
  };

  Result<void> CheckShard(uint16_t shard) {
    for (int i = 0; i < kTries; ++i) {
      SpaceCheck check{.shard = shard};
      while (check.outcome == CheckOutcome::kMore) {
        const Result<void> went = ContinueCheck(connection_, &check, kAnswerTimeoutNs);
        if (!went && went.error().code == ErrorCode::kNotFound) return {};
        if (!went) return went;
      }
      if (check.outcome == CheckOutcome::kUnsound) {
        report_.problems.push_back("shard " + std::to_string(shard) + ": " + Printable(check.text));
      }
      if (check.outcome != CheckOutcome::kChanged) return {};
    }
    report_.counts_compared = false;
    return {};
  }

  // 2.
  Result<void> Draw() {
    ScrollQuery query{.limit = 1, .with_payload = true, .with_vector = true};
    const bool takes_all = report_.observations <= options_.sample;
    if (takes_all) query.limit = kMaxScrollHits;
    std::set<std::string> drawn;
    uint16_t partitions = 1;
    for (uint64_t draws = 0; sample_.size() < options_.sample && draws < 4 * options_.sample;
         ++draws) {
      const Result<ScrollPage> page = Scroll(connection_, query, kAnswerTimeoutNs);
      if (!page && page.error().code == ErrorCode::kNotFound) return {};
      if (!page) return std::unexpected(page.error());
      partitions = page->partitions;
      for (const RecallHit& hit : page->hits) {
        if (!drawn.insert(hit.id).second) continue;
        ++report_.sampled;
        report_.payload_bytes += hit.payload.size();
        if (hit.payload_omitted || hit.vector.empty()) {
          if (auto named = NameUnreadable(hit); !named) return named;
        } else {
          sample_.push_back({.from = query.from, .hit = hit});
        }
      }
      if (takes_all) {
        if (page->ended) return {};
        query.from = page->next;
      } else {
        query.from = {.partition = static_cast<uint16_t>(random_.Below(partitions)),
                      .cursor = random_.Below(uint64_t{1} << 32)};
      }
    }
    return {};
  }

  // The core that answers this connection is the one that read the record just now.
  Result<void> NameUnreadable(const RecallHit& hit) {
    const Result<std::string> status = IntrospectStatus(connection_, kAnswerTimeoutNs);
    if (!status) return std::unexpected(status.error());
    constexpr std::string_view kName = "records unreadable_at ";
    const size_t at = status->find(kName);
    std::string place = "its place is in the daemon's log";
    if (at != std::string::npos) {
      const size_t begin = at + kName.size();
      place = "at " + Printable(status->substr(begin, status->find('\n', begin) - begin));
    }
    report_.problems.push_back("observation " + Printable(hit.id) +
                               ": its record cannot be read: " + place);
    return {};
  }

  // 3.
  Result<CommitStamp> LatestStamp() {
    const Result<RecallAnswer> answer =
        Recall({.vector = sample_[0].hit.vector, .k = 1, .at_snapshot = true});
    if (!answer) return std::unexpected(answer.error());
    return answer->snapshot;
  }

  Result<void> ScanExact(CommitStamp snapshot) {
    metric_ = connection_.hello().metric;
    exact_.resize(sample_.size());
    ScrollQuery query{.with_vector = true};
    for (bool ended = false; !ended;) {
      const Result<ScrollPage> page = Scroll(connection_, query, kAnswerTimeoutNs);
      if (!page) return std::unexpected(page.error());
      for (const RecallHit& hit : page->hits) {
        // Later ones alone come twice.
        if (hit.vector.empty() || hit.stamp > snapshot) continue;
        ++scanned_;
        for (size_t i = 0; i < sample_.size(); ++i) AddExact(i, hit);
      }
      query.from = page->next;
      ended = page->ended;
    }
    return {};
  }

  void AddExact(size_t query, const RecallHit& hit) {
    const std::vector<float>& vector = sample_[query].hit.vector;
    if (vector.size() != hit.vector.size()) return;
    const double nearness = Nearness(metric_, ExactScore(metric_, vector, hit.vector));
    std::vector<Exact>& nearest = exact_[query];
    if (nearest.size() == kNeighbours && nearness <= nearest.back().nearness) return;
    const auto place = std::ranges::find_if(
        nearest, [&](const Exact& other) { return nearness > other.nearness; });
    nearest.insert(place, {.nearness = nearness, .id = hit.id});
    if (nearest.size() > kNeighbours) nearest.pop_back();
  }

  Result<RecallAnswer> Recall(const RecallQuery& query) {
    RecallStream stream(&connection_);
    stream.Send(query);
    Result<RecallAnswer> answer = stream.AwaitAnswer(kAnswerTimeoutNs);
    if (answer && answer->refusal) {
      return std::unexpected(RefusedRecall(*answer->refusal));
    }
    return answer;
  }

  Result<void> Judge(size_t index, CommitStamp snapshot) {
    const Sampled& sampled = sample_[index];
    const Result<RecallAnswer> answer =
        Recall({.vector = sampled.hit.vector, .k = kAsked, .with_vector = true});
    if (!answer) return std::unexpected(answer.error());
    if (auto judged = JudgeSelf(sampled, *answer); !judged) return judged;
    if (exact_.empty() || exact_[index].empty()) return {};
    const std::vector<Exact>& nearest = exact_[index];
    std::set<std::string> among;
    for (const Exact& exact : nearest) among.insert(exact.id);
    const double farthest = nearest.back().nearness;
    uint32_t taken = 0;
    uint64_t hits = 0;
    for (const RecallHit& hit : answer->hits) {
      // What came later was not compared.
      if (hit.stamp > snapshot || hit.vector.size() != sampled.hit.vector.size()) continue;
      if (++taken > nearest.size()) break;
      const double nearness =
          Nearness(metric_, ExactScore(metric_, sampled.hit.vector, hit.vector));
      const bool is_hit =
          among.contains(hit.id) || nearness >= farthest - Slack(nearness, farthest, kExactTie);
      hits += static_cast<uint64_t>(is_hit);
    }
    questions_ += nearest.size();
    hits_ += hits;
    return {};
  }

  // Is it the first, or as near as the first?
  Result<void> JudgeSelf(const Sampled& sampled, const RecallAnswer& answer) {
    metric_ = answer.metric;
    const std::vector<float>& vector = sampled.hit.vector;
    const auto& hits = answer.hits;
    if (!hits.empty() && hits[0].id == sampled.hit.id) {
      ++report_.found_first;
      return {};
    }
    const auto itself = std::ranges::find(hits, sampled.hit.id, &RecallHit::id);
    if (itself != hits.end()) {
      const double first = static_cast<double>(hits[0].score);
      const double own = static_cast<double>(itself->score);
      // A longer vector may have a greater inner product.
      if (metric_ == Metric::kInnerProduct ||
          std::fabs(first - own) <= std::max(kTie, Slack(first, own, kTie))) {
        ++report_.tied;
        return {};
      }
    } else if (hits.size() == kAsked && hits.back().vector.size() == vector.size()) {
      // There may be more that are as near than were asked for.
      const double last = Nearness(metric_, ExactScore(metric_, vector, hits.back().vector));
      const double own = Nearness(metric_, ExactScore(metric_, vector, vector));
      if (last >= own - Slack(last, own, kExactTie)) {
        ++report_.tied;
        return {};
      }
    }
    const Result<bool> there = IsStillThere(sampled);
    if (!there) return std::unexpected(there.error());
    if (!*there) {
      ++report_.changed;
      return {};
    }
    report_.problems.push_back("observation " + Printable(sampled.hit.id) +
                               (itself != hits.end() ? " is not the first that is found by its own "
                                                       "vector"
                                                     : " is not found by its own vector"));
    return {};
  }

  // The same content. Few can have come before it since it was drawn.
  Result<bool> IsStillThere(const Sampled& sampled) {
    ScrollQuery query{.from = sampled.from, .limit = 256};
    for (int i = 0; i < kTries; ++i) {
      const Result<ScrollPage> page = Scroll(connection_, query, kAnswerTimeoutNs);
      if (!page) return std::unexpected(page.error());
      const auto found = std::ranges::find(page->hits, sampled.hit.id, &RecallHit::id);
      if (found != page->hits.end()) return found->stamp == sampled.hit.stamp;
      if (page->ended) break;
      query.from = page->next;
    }
    return false;
  }

  Connection& connection_;
  const VerifyOptions& options_;
  SplitMix64& random_;
  SpaceReport& report_;
  Metric metric_ = Metric::kCosine;
  std::vector<Sampled> sample_;
  std::vector<std::vector<Exact>> exact_;  // by place in the sample, nearest first
  uint64_t scanned_ = 0;
  uint64_t questions_ = 0;  // neighbours that there are to be found
  uint64_t hits_ = 0;
};

void PrintReport(const SpaceReport& report) {
  std::printf("%s: %llu observations, %u shard%s\n", report.name.c_str(),
              static_cast<unsigned long long>(report.observations), report.shards,
              report.shards == 1 ? "" : "s");
  std::printf("  invariants: %s\n", report.counts_compared
                                        ? "checked, counts included"
                                        : "checked; not the counts, as the space changed");
  std::printf(
      "  sample: %llu read with payload (%llu bytes), %llu found first by their own "
      "vector, %llu as near as the first, %llu changed meanwhile\n",
      static_cast<unsigned long long>(report.sampled),
      static_cast<unsigned long long>(report.payload_bytes),
      static_cast<unsigned long long>(report.found_first),
      static_cast<unsigned long long>(report.tied),
      static_cast<unsigned long long>(report.changed));
  if (report.recall) {
    std::printf("  recall@10: %.4f against exact answers, computed here from a scroll of %llu\n",
                *report.recall, static_cast<unsigned long long>(report.compared_with));
  } else {
    std::printf("  recall@10: not computed: more observations than --exact-limit, or none\n");
  }
  for (size_t i = 0; i < std::min(report.problems.size(), kProblemsShown); ++i) {
    std::printf("  WRONG: %s\n", report.problems[i].c_str());
  }
  if (report.problems.size() > kProblemsShown) {
    std::printf("  and %zu more\n", report.problems.size() - kProblemsShown);
  }
}

nlohmann::json JsonOf(const SpaceReport& report) {
  nlohmann::json json = {{"name", report.name},
                         {"observations", report.observations},
                         {"shards", report.shards},
                         {"counts_compared", report.counts_compared},
                         {"sampled", report.sampled},
                         {"payload_bytes", report.payload_bytes},
                         {"found_first", report.found_first},
                         {"tied", report.tied},
                         {"changed", report.changed},
                         {"problems", report.problems}};
  if (report.recall) {
    json["recall_at_10"] = Rounded(*report.recall, 6);
    json["exact_by"] = "engramctl, from a scroll";
    json["compared_with"] = report.compared_with;
  } else {
    json["recall_at_10"] = nullptr;
  }
  return json;
}

// Records that were read with one bit turned, and mended, since the daemon started.
std::string MendedAt(const std::string& status) {
  constexpr std::string_view kName = "records mended_at ";
  const size_t at = status.find(kName);
  if (at == std::string::npos) return {};
  const size_t begin = at + kName.size();
  return Printable(status.substr(begin, status.find('\n', begin) - begin));
}

}  // namespace

int RunVerify(const ServerOptions& server, const VerifyOptions& options) {
  auto connection = OpenReader(server, {});
  if (!connection) return connection.error();
  const auto spaces = IntrospectSpaces(*connection, kAnswerTimeoutNs);
  if (!spaces) return ReportError(spaces.error());
  struct Parts {
    uint64_t observations = 0;
    std::vector<uint16_t> shards;
  };
  std::map<std::string, Parts> parts;
  for (const SpaceInfo& info : *spaces) {
    if (!options.space.empty() && info.name != options.space) continue;
    parts[info.name].observations += info.record.observations;
    parts[info.name].shards.push_back(info.record.shard);
  }
  if (!options.space.empty() && parts.empty()) {
    return ReportError({ErrorCode::kNotFound, "there is no space " + options.space});
  }

  SplitMix64 random(options.seed != 0 ? options.seed
                                      : static_cast<uint64_t>(SystemClock().MonotonicNs()));
  std::vector<SpaceReport> reports;
  std::set<std::string> mended;
  for (const auto& [name, part] : parts) {
    auto reader = OpenReader(server, name);
    if (!reader) return reader.error();
    SpaceReport& report = reports.emplace_back();
    report.name = name;
    report.observations = part.observations;
    report.shards = static_cast<uint32_t>(part.shards.size());
    SpaceVerifier verifier(&*reader, options, &random, &report);
    if (auto done = verifier.Run(part.shards); !done) return ReportError(done.error());
    const auto status = IntrospectStatus(*reader, kAnswerTimeoutNs);
    if (!status) return ReportError(status.error());
    if (const std::string place = MendedAt(*status);
        !place.empty() && mended.insert(place).second) {
      report.problems.push_back("a flipped bit was mended as a record was read: at " + place);
    }
    if (!server.json) PrintReport(report);
  }
  const bool ok = std::ranges::all_of(
      reports, [](const SpaceReport& report) { return report.problems.empty(); });
  if (server.json) {
    nlohmann::json json = {{"ok", ok}, {"spaces", nlohmann::json::array()}};
    for (const SpaceReport& report : reports) json["spaces"].push_back(JsonOf(report));
    std::printf("%s\n",
                json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  } else {
    std::printf("%s\n", ok ? "Nothing is wrong." : "Something is wrong, see above.");
  }
  return ok ? kExitOk : kExitFailed;
}

}  // namespace engram
