// Random programs over a space in one to four shards: every recall that begins after an observation
// was acknowledged sees it, or what came after it, whichever tier it is in by then (fresh, waiting
// in lists, linked) and whatever becomes of the codes that it is found by. What was deleted or
// superseded is not seen again.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/coded_space_rig.h"
#include "tests/index/latent_vector.h"
#include "tests/index/shard_observations.h"
#include "tests/index/shard_rig.h"
#include "tests/sim/program_seeds.h"

namespace engram {
namespace {

const std::string kSpace = "s";

// What the programs come to.
struct Seen {
  uint64_t recalls = 0;
  uint64_t of_fresh = 0;  // of a vector that is in this tier when it is asked for
  uint64_t of_waiting = 0;
  uint64_t of_linked = 0;
  uint64_t of_ended = 0;
  uint64_t of_updated = 0;  // while an update of it is under way
  uint64_t beside_waiting = 0;
  uint64_t waiting_encoding = 0;
  uint64_t waiting_recoding = 0;
  uint64_t of_waiting_recoding = 0;
  uint64_t encoding = 0;
  uint64_t recoding = 0;
  uint64_t releasing = 0;
  uint64_t walked_by_codes = 0;
  uint64_t at_snapshot = 0;
  uint64_t renewed = 0;
  uint64_t withdrawn = 0;
  uint64_t waiting_withdrawn = 0;
  uint64_t grown = 0;
  uint64_t moving = 0;  // excused, see IsMoving
};

// An id has one client while something of it is under way, so its operations have an order.
class Program {
 public:
  Program(uint64_t seed, Seen* seen)
      : random_(seed),
        seen_(seen),
        shards_(static_cast<uint16_t>(1 + random_.Below(4))),
        dimension_(static_cast<uint32_t>(random_.Below(4) == 0 ? Space::kLeastDimensionsWalked
                                                               : 65 + random_.Below(30))),
        rig_(DrawOptions(), kClients, 256, 16,
             {.shards = shards_,
              .partitions =
                  static_cast<uint16_t>(random_.Below(2) == 0 ? 1 : 1 + random_.Below(shards_)),
              .max_partitions = shards_}),
        entry_(rig_.MakeSpace(kSpace, random_.Below(3) == 0 ? Metric::kCosine : Metric::kL2)),
        parts_(shards_),
        theme_(static_cast<Theme>(random_.Below(3))) {
    ids_.resize((theme_ == Theme::kClouds ? 200 : 40) + random_.Below(200));
  }

  void Run() {
    const uint64_t steps = 1'000 + random_.Below(2'000);
    for (uint64_t step = 0; step < steps; ++step) {
      ASSERT_NO_FATAL_FAILURE(Step()) << "step " << step;
    }
    ASSERT_NO_FATAL_FAILURE(End());
  }

 private:
  static constexpr size_t kClients = 3;
  static constexpr size_t kMostRecalls = 6;
  static constexpr size_t kNoId = SIZE_MAX;
  enum class Theme : uint8_t { kSteady, kShifts, kClouds };

  struct Version {
    std::vector<float> vector;  // empty: a delete
    CommitStamp stamp = kNoStamp;
    uint16_t partitions = 1;  // when it was sent
  };
  struct Id {
    std::vector<Version> versions;
    size_t acked = 0;  // so many of them
    size_t client = 0;
    bool is_at_rest() const { return acked == versions.size(); }
  };
  struct Client {
    RigSession session;
    bool is_open = false;
    std::map<Sequence, size_t> sent;  // the ids of what is under way
  };
  struct UnderWay {
    std::vector<uint64_t> requests;
    std::vector<float> query;
    uint32_t k;
    CommitStamp snapshot;
    size_t id;                  // kNoId: of what has ended
    std::vector<size_t> acked;  // by id, when it was sent
  };
  // What was seen of a shard's part last.
  struct Part {
    const WalkCodes* codes = nullptr;
    bool waited = false;
  };

  ShardOptions DrawOptions() {
    ShardOptions options = ShardRig::SmallOptions();
    options.memory_limit_bytes = size_t{64} << 20;
    options.build = {.M = 8, .M0 = 16, .ef_construction = 40};
    options.graph_from = static_cast<uint32_t>(20 + random_.Below(60));
    options.list_from = static_cast<uint32_t>(random_.Below(30));
    options.grow_partition_at = random_.Below(3) == 0 ? 0 : 40 + random_.Below(60);
    options.link_batch = static_cast<uint32_t>(8 << random_.Below(6));
    options.link_wait_ns = kNanosPerMilli;
    options.snapshot_keep_ns = random_.Below(2) == 0 ? 0 : 5 * kNanosPerMilli;
    return options;
  }
  // Of where the vectors are at this time. Never one that was drawn before.
  std::vector<float> DrawVector() {
    std::vector<float> vector = LatentVector(++drawn_, dimension_, shift_);
    if (cloud_ == 0) return vector;
    const std::vector<float> centre = LatentVector(5, dimension_);
    for (uint32_t i = 0; i < dimension_; ++i) vector[i] = centre[i] + cloud_ * vector[i];
    return vector;
  }
  // What comes next: a flood or little, elsewhere, or so near each other that codes are of no use.
  void MoveOn() {
    is_flood_ = random_.Below(3) > 0;
    if (theme_ == Theme::kShifts) {
      constexpr float kShifts[] = {0, 1, -1, 20};
      shift_ = kShifts[random_.Below(4)];
    } else if (theme_ == Theme::kClouds) {
      cloud_ = random_.Below(6) == 0 ? 0 : 0.05F;
    }
  }

  void Step() {
    const uint64_t what = random_.Below(400);
    if (what < 1) {
      MoveOn();
    } else if (what < 60) {
      const uint64_t most = is_flood_ && random_.Below(3) == 0 ? 60 : 4;
      const size_t client = random_.Below(kClients);
      for (uint64_t i = random_.Below(most); i-- > 0;) Send(client, random_.Below(ids_.size()));
    } else if (what < 80) {
      RecallOf(random_.Below(ids_.size()));
    } else {
      const uint64_t most = is_flood_ ? 5 : 40;
      for (uint64_t i = 1 + random_.Below(most); i-- > 0;) {
        ASSERT_NO_FATAL_FAILURE(PollOne(random_.Below(shards_)));
        // There is seldom much time for recalls then.
        if (!IsReplacingCodes() || random_.Below(2) == 0) continue;
        RecallOf(AnyWaiting());
        return;
      }
    }
  }

  // ---- Observations ----

  void Send(size_t which, size_t id) {
    Client& client = clients_[which];
    Id& observed = ids_[id];
    if (!observed.is_at_rest() && observed.client != which) return;
    if (!client.is_open) {
      // A home holds a part, as the snapshots that recalls ask for are of those that do.
      const auto part = static_cast<uint16_t>(random_.Below(entry_->partitions()));
      const size_t home = entry_->ShardOf(part).value();
      client.session = rig_.Open(which, 100 + which, kSpace, {.shard = home});
      client.is_open = true;
      TakeAnswers();
    }
    if (client.session.next > client.session.credit_sequence || client.sent.size() >= 150) return;
    observed.client = which;
    Version version{.vector = {}, .partitions = entry_->partitions()};
    const std::string text = std::to_string(observed.versions.size());
    Observation observation = Remove(NameOf(id));
    const uint64_t what = random_.Below(8);
    if (what > 0) {
      // Sometimes it is only said anew.
      const bool is_kept = what < 3 && HasContent(observed);
      version.vector = is_kept ? observed.versions.back().vector : DrawVector();
      observation = Upsert(NameOf(id), version.vector, text);
    }
    rig_.PushObserve(client.session, client.session.next, observation);
    client.sent[client.session.next++] = id;
    observed.versions.push_back(std::move(version));
  }
  static bool HasContent(const Id& id) {
    return !id.versions.empty() && !id.versions.back().vector.empty();
  }
  static std::string NameOf(size_t id) { return "id" + std::to_string(id); }

  void PollOne(size_t shard) {
    rig_.clock.AdvanceNs(static_cast<int64_t>(50'000 + random_.Below(20'000)));
    rig_.PollShard(shard);
    ASSERT_NO_FATAL_FAILURE(Look(shard));
    TakeAnswers();
    ASSERT_NO_FATAL_FAILURE(TakeHits());
  }
  void TakeAnswers() {
    std::vector<size_t> acked_now;
    for (const auto& [producer, completion] : rig_.completions) {
      Client& client = clients_[producer];
      client.session.credit_sequence =
          std::max(client.session.credit_sequence, completion.credit_sequence);
      if (completion.kind != CompletionKind::kObserve) continue;
      ASSERT_EQ(completion.reason, kNone) << DescribeRefusal(completion.reason).name;
      const auto found = client.sent.find(completion.sequence);
      ASSERT_NE(found, client.sent.end());
      const size_t id = found->second;
      client.sent.erase(found);
      Id& acked = ids_[id];
      acked.versions[acked.acked].stamp = StampOf(id, acked.acked);
      ++acked.acked;
      acked_now.push_back(id);
    }
    rig_.completions.clear();
    for (const size_t id : acked_now) {
      if (random_.Below(4) == 0) RecallOf(id);
    }
  }
  // Of a version that lives; kNoStamp: it does not, or no longer.
  CommitStamp StampOf(size_t id, size_t version) const {
    for (const auto& shard : rig_.shards) {
      const Space* part = shard->FindSpace(kSpace);
      const NodeId node = part == nullptr ? kNoNode : part->FindLive(NameOf(id));
      if (node == kNoNode) continue;
      const StoredObservation stored = part->Get(node);
      const std::string text(reinterpret_cast<const char*>(stored.payload.data()),
                             stored.payload.size());
      if (text == std::to_string(version)) return stored.stamp;
    }
    return kNoStamp;
  }

  // ---- Recalls ----

  // Of the vector that the id has as far as was acknowledged, or of one that it had.
  void RecallOf(size_t id) {
    const Id& asked = ids_[id];
    if (under_way_.size() >= kMostRecalls || asked.acked == 0) return;
    const bool is_live = !asked.versions[asked.acked - 1].vector.empty();
    const bool of_latest = is_live && (asked.acked == 1 || random_.Below(5) > 0);
    size_t version = asked.acked - 1;
    if (!of_latest) {
      if (asked.acked == 1) return;
      version = asked.acked - 2;
    }
    if (asked.versions[version].vector.empty()) return;
    UnderWay recall{.requests = {},
                    .query = asked.versions[version].vector,
                    .k = static_cast<uint32_t>(1 + random_.Below(10)),
                    .snapshot = random_.Below(6) == 0 ? SnapshotNow() : kNoStamp,
                    .id = of_latest ? id : kNoId,
                    .acked = {}};
    for (const Id& each : ids_) recall.acked.push_back(each.acked);
    const size_t producer = random_.Below(kClients);
    for (uint16_t p = 0; p < entry_->partitions(); ++p) {
      recall.requests.push_back(rig_.PushRecall(
          producer, kSpace, recall.query,
          {.k = recall.k, .ef = 200, .with_payload = true, .snapshot = recall.snapshot},
          entry_->ShardOf(p).value()));
    }
    Count(recall);
    under_way_.push_back(std::move(recall));
  }
  CommitStamp SnapshotNow() const {
    CommitStamp snapshot = kOpenStamp;
    for (uint16_t p = 0; p < entry_->partitions(); ++p) {
      snapshot =
          std::min(snapshot, rig_.stamps->CompleteUpTo(entry_->ShardOf(p), rig_.clock.WallNs()));
    }
    return snapshot;
  }
  void TakeHits() {
    for (size_t i = 0; i < under_way_.size();) {
      const auto is_done = [&](uint64_t request) { return rig_.answers[request].done; };
      if (!std::ranges::all_of(under_way_[i].requests, is_done)) {
        ++i;
        continue;
      }
      const UnderWay done = std::move(under_way_[i]);
      under_way_.erase(under_way_.begin() + static_cast<ptrdiff_t>(i));
      ASSERT_NO_FATAL_FAILURE(Check(done));
      for (const uint64_t request : done.requests) rig_.answers.erase(request);
    }
  }

  // One hit an id, the later one, as RecallMerger does. False where the snapshot is no longer kept.
  bool Merge(const UnderWay& recall, std::map<size_t, Hit>* merged) {
    for (const uint64_t request : recall.requests) {
      const RigAnswer& answer = rig_.answers[request];
      if (answer.reason == RefusalReason::kSnapshotTooOld) return false;
      EXPECT_TRUE(answer.reason == kNone || answer.reason == RefusalReason::kUnknownSpace)
          << DescribeRefusal(answer.reason).name;
      for (const Hit& hit : answer.hits) {
        Hit& kept = (*merged)[std::stoull(hit.id.substr(2))];
        if (hit.stamp >= kept.stamp) kept = hit;
      }
    }
    return true;
  }
  void Check(const UnderWay& recall) {
    std::map<size_t, Hit> merged;
    if (!Merge(recall, &merged)) return;
    std::vector<std::pair<double, size_t>> order;  // by distance
    for (const auto& [id, hit] : merged) {
      ASSERT_NO_FATAL_FAILURE(CheckVersion(recall, id, hit));
      order.emplace_back(entry_->metric() == Metric::kL2 ? hit.score : -hit.score, id);
    }
    std::ranges::sort(order);
    if (recall.id == kNoId) return;
    const Id& asked = ids_[recall.id];
    const size_t version = recall.acked[recall.id] - 1;
    if (recall.snapshot != kNoStamp) {
      // What was acknowledged may be later.
      const CommitStamp stamp = asked.versions[version].stamp;
      if (stamp == kNoStamp || stamp > recall.snapshot) return;
    }
    if (IsMoving(recall, asked, version)) {
      ++seen_->moving;
      return;
    }
    bool has_stayed = true;
    for (size_t later = version + 1; later < asked.versions.size(); ++later) {
      has_stayed = has_stayed && asked.versions[later].vector == recall.query;
    }
    if (!has_stayed && recall.snapshot == kNoStamp) return;
    ASSERT_FALSE(order.empty()) << Describe(recall.id);
    ASSERT_EQ(order[0].second, recall.id)
        << "version " << version << " was acknowledged and is not seen"
        << (recall.snapshot == kNoStamp ? "" : " at a snapshot") << Describe(recall.id);
    ASSERT_NEAR(merged[recall.id].score, entry_->metric() == Metric::kL2 ? 0 : 1, 1e-4);
  }
  // Known (design record 9): the first update of an id that has another partition by now ends the
  // old version in one shard after it stored the new one in another, and a recall of now may come
  // to each at the wrong moment.
  bool IsMoving(const UnderWay& recall, const Id& id, size_t version) const {
    return recall.snapshot == kNoStamp && id.versions.size() > version + 1 &&
           entry_->partitions() > id.versions[version].partitions;
  }
  // A hit is of what was acknowledged last before the recall was sent, or of what came later; at a
  // snapshot it was there then.
  void CheckVersion(const UnderWay& recall, size_t which, const Hit& hit) {
    ASSERT_LT(which, ids_.size());
    const Id& id = ids_[which];
    const size_t version = std::stoull(hit.payload);
    ASSERT_LT(version, id.versions.size());
    ASSERT_FALSE(id.versions[version].vector.empty());
    const double score = ExactScore(entry_->metric(), id.versions[version].vector, recall.query);
    ASSERT_NEAR(hit.score, score, 1e-4 + 1e-4 * std::abs(score)) << "of another vector";
    if (recall.snapshot == kNoStamp) {
      ASSERT_GE(version + 1, recall.acked[which])
          << "version " << version << " is superseded or deleted" << Describe(which);
      return;
    }
    ASSERT_LE(hit.stamp, recall.snapshot);
    for (size_t later = version + 1; later < recall.acked[which]; ++later) {
      const CommitStamp stamp = id.versions[later].stamp;
      ASSERT_TRUE(stamp == kNoStamp || stamp > recall.snapshot)
          << "version " << version << " has ended before the snapshot" << Describe(which);
    }
  }

  std::string Describe(size_t which) const {
    const Id& id = ids_[which];
    std::string text = "; " + NameOf(which) + ", " + std::to_string(id.acked) + " of " +
                       std::to_string(id.versions.size()) + " acknowledged, the last " +
                       (HasContent(id) ? "an upsert" : "a delete") + ", " +
                       std::to_string(entry_->partitions()) + " partitions";
    for (const auto& shard : rig_.shards) {
      const Space* part = shard->FindSpace(kSpace);
      if (part == nullptr) continue;
      text += "; " + std::to_string(part->linked()) + " linked, " +
              std::to_string(part->unlinked_count()) + " not, " + std::to_string(part->waiting()) +
              " of the list wait";
      if (const NodeId node = part->FindLive(NameOf(which)); node != kNoNode) {
        text += part->IsLinked(node) ? ", it is linked" : ", it is not linked";
      }
    }
    return text;
  }

  // ---- What the programs come to ----

  bool IsReplacingCodes() const {
    return std::ranges::any_of(rig_.shards, [](const auto& shard) {
      const Space* part = shard->FindSpace(kSpace);
      return part != nullptr &&
             (SpaceTestPeer::IsRecoding(*part) || SpaceTestPeer::IsReleasing(*part));
    });
  }
  static bool IsWaiting(const Space& part, NodeId node) {
    const FreshList::Snapshot fresh = part.FreshNodes();
    for (uint64_t i = 0; i < part.waiting(); ++i) {
      if (fresh[i] == node) return true;
    }
    return false;
  }
  // Where codes are replaced, if there is one; else any id.
  size_t AnyWaiting() {
    const size_t first = random_.Below(ids_.size());
    for (size_t i = 0; i < ids_.size(); ++i) {
      const size_t id = (first + i) % ids_.size();
      for (const auto& shard : rig_.shards) {
        const Space* part = shard->FindSpace(kSpace);
        if (part == nullptr || !SpaceTestPeer::IsRecoding(*part)) continue;
        const NodeId node = part->FindLive(NameOf(id));
        if (node != kNoNode && IsWaiting(*part, node)) return id;
      }
    }
    return first;
  }
  void Look(size_t shard) {
    const Space* part = rig_.shards[shard]->FindSpace(kSpace);
    if (part == nullptr) return;
    Part& last = parts_[shard];
    const WalkCodes* const codes = part->walk_codes();
    if (codes != last.codes && last.codes != nullptr) {
      ++(codes == nullptr ? seen_->withdrawn : seen_->renewed);
      seen_->waiting_withdrawn += static_cast<uint64_t>(codes == nullptr && last.waited);
    }
    last = {.codes = codes, .waited = part->waiting() > 0};
    // While lists are so few that all are looked in, wrong codes are not seen from outside.
    if (SpaceTestPeer::IsRecoding(*part) || (codes != nullptr && random_.Below(500) == 0)) {
      ASSERT_EQ(SpaceTestPeer::CodesViolation(*part), "");
    }
  }
  void Count(const UnderWay& recall) {
    ++seen_->recalls;
    seen_->at_snapshot += static_cast<uint64_t>(recall.snapshot != kNoStamp);
    seen_->of_ended += static_cast<uint64_t>(recall.id == kNoId);
    seen_->of_updated += static_cast<uint64_t>(recall.id != kNoId && !ids_[recall.id].is_at_rest());
    for (uint16_t p = 0; p < entry_->partitions(); ++p) {
      const Space* part = rig_.shards[entry_->ShardOf(p).value()]->FindSpace(kSpace);
      if (part == nullptr) continue;
      const auto waits = static_cast<uint64_t>(part->waiting() > 0);
      const auto encodes = static_cast<uint64_t>(SpaceTestPeer::IsEncoding(*part));
      const auto recodes = static_cast<uint64_t>(SpaceTestPeer::IsRecoding(*part));
      seen_->beside_waiting += waits;
      seen_->encoding += encodes;
      seen_->recoding += recodes;
      seen_->releasing += static_cast<uint64_t>(SpaceTestPeer::IsReleasing(*part));
      seen_->waiting_encoding += waits & encodes;
      seen_->waiting_recoding += waits & recodes;
      seen_->walked_by_codes +=
          static_cast<uint64_t>(part->has_linked() && part->recall_codes() != nullptr);
      if (recall.id == kNoId) continue;
      const NodeId node = part->FindLive(NameOf(recall.id));
      if (node == kNoNode) continue;
      if (part->IsLinked(node)) {
        ++seen_->of_linked;
        continue;
      }
      const bool node_waits = IsWaiting(*part, node);
      ++(node_waits ? seen_->of_waiting : seen_->of_fresh);
      seen_->of_waiting_recoding += static_cast<uint64_t>(node_waits) & recodes;
    }
  }

  // All is answered and linked; then each id is what it was said to be last.
  void End() {
    for (int i = 0; i < 20'000 && !IsAtRest(); ++i) {
      for (size_t s = 0; s < shards_; ++s) {
        ASSERT_NO_FATAL_FAILURE(PollOne(s));
      }
    }
    ASSERT_TRUE(IsAtRest()) << "an observation or a recall is not answered";
    rig_.Settle();
    rig_.completions.clear();
    seen_->grown += static_cast<uint64_t>(rig_.counter(ShardCounter::kSpacesGrown) > 0);
    for (const auto& shard : rig_.shards) {
      const Result<void> sound = shard->CheckInvariants();
      ASSERT_TRUE(sound.has_value()) << sound.error().message;
      if (const Space* part = shard->FindSpace(kSpace); part != nullptr) {
        ASSERT_EQ(SpaceTestPeer::CodesViolation(*part), "");
      }
    }
    for (size_t id = 0; id < ids_.size(); ++id) {
      size_t places = 0;
      for (const auto& shard : rig_.shards) {
        const Space* part = shard->FindSpace(kSpace);
        places += static_cast<size_t>(part != nullptr && part->FindLive(NameOf(id)) != kNoNode);
      }
      ASSERT_EQ(places, HasContent(ids_[id]) ? 1u : 0u) << Describe(id);
      if (id % 8 != 0) continue;
      RecallOf(id);
      for (int i = 0; i < 1'000 && !under_way_.empty(); ++i) {
        for (size_t s = 0; s < shards_; ++s) {
          ASSERT_NO_FATAL_FAILURE(PollOne(s));
        }
      }
      ASSERT_TRUE(under_way_.empty());
    }
  }
  bool IsAtRest() const {
    return under_way_.empty() &&
           std::ranges::all_of(clients_, [](const Client& client) { return client.sent.empty(); });
  }

  SplitMix64 random_;
  Seen* seen_;
  const uint16_t shards_;
  const uint32_t dimension_;
  ShardRig rig_;
  SpaceEntry* const entry_;
  std::array<Client, kClients> clients_;
  std::vector<Id> ids_;
  std::vector<UnderWay> under_way_;
  std::vector<Part> parts_;  // by shard
  uint64_t drawn_ = 1'000;
  const Theme theme_;
  bool is_flood_ = true;
  float shift_ = 0;
  float cloud_ = 0;  // 0: none
};

TEST(ShardVisibilityProgramsTest, WhatIsAcknowledgedIsSeenInEveryTier) {
  Seen seen;
  const Seeds seeds = Seeds::FromPrefix("SHARD_VISIBILITY", UsualSeeds(40, 10));
  seeds.ForEach([&](uint64_t seed) { Program(seed, &seen).Run(); });
  ExpectAllHappened({{"recalls", seen.recalls},
                     {"of what is fresh", seen.of_fresh},
                     {"of what waits in lists", seen.of_waiting},
                     {"of what is linked", seen.of_linked},
                     {"of what has ended", seen.of_ended},
                     {"of what is updated meanwhile", seen.of_updated},
                     {"at a snapshot", seen.at_snapshot},
                     {"walking by codes", seen.walked_by_codes},
                     {"beside what waits", seen.beside_waiting},
                     {"while codes are learned", seen.encoding},
                     {"while codes are replaced", seen.recoding},
                     {"while lists go", seen.releasing},
                     {"beside what waits, codes learned", seen.waiting_encoding},
                     {"beside what waits, codes replaced", seen.waiting_recoding},
                     {"of what waits, codes replaced", seen.of_waiting_recoding},
                     {"codes renewed", seen.renewed},
                     {"codes withdrawn", seen.withdrawn},
                     {"codes withdrawn while some wait", seen.waiting_withdrawn},
                     {"grown", seen.grown}},
                    !seeds.alone && seeds.count >= 40);
  // Else hardly anything was looked at.
  EXPECT_LE(seen.moving, seen.recalls / 100);
}

}  // namespace
}  // namespace engram
