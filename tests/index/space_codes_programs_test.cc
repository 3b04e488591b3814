// Random programs over a space that learns codes and links in batches: upserts, updates, deletes,
// suppresses and restores between any two slices of learning, encoding, recoding, linking and
// sweeping, with recalls that are under way meanwhile, against an exact model. They are to
// space_programs_test what some hundred nodes are to a dozen: batches take many slices, lists are
// split, codes are learned again as the vectors move.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/coded_space_rig.h"
#include "tests/sim/program_seeds.h"

namespace engram {
namespace {

constexpr uint32_t kWholeEf = 4'000;  // more than there are nodes

struct Seen {
  uint64_t linking_ended = 0;
  uint64_t suppressed = 0;
  uint64_t restored = 0;
  uint64_t encoding = 0;
  uint64_t recoding = 0;
  uint64_t renewed = 0;
  uint64_t withdrawn = 0;
  uint64_t between_ended = 0;
  uint64_t splits = 0;
  uint64_t waiting = 0;
  uint64_t waiting_recoding = 0;
  uint64_t waiting_withdrawn = 0;
  uint64_t wanted = 0;
  uint64_t missed = 0;
};

class Program {
 public:
  Program(uint64_t seed, Seen* seen)
      : random_(seed), seen_(seen), rig_(DrawSetup()), other_job_(&rig_.other_memory.heap) {}

  void Run() {
    ids_ = 100 + random_.Below(500);
    const uint64_t steps = 200 + random_.Below(400);
    for (uint64_t step = 0; step < steps; ++step) {
      ASSERT_NO_FATAL_FAILURE(Step()) << "step " << step;
      Look();
      if (random_.Below(IsChangingCodes() ? 3 : 12) == 0) {
        ASSERT_NO_FATAL_FAILURE(rig_.ExpectSound()) << "step " << step;
        ASSERT_EQ(rig_.space.hidden(), hidden_.size());
      }
    }
    while (under_way_) {
      ASSERT_NO_FATAL_FAILURE(StepRecall());
    }
    ASSERT_NO_FATAL_FAILURE(rig_.Settle());
    ASSERT_NO_FATAL_FAILURE(rig_.ExpectAllThere());
    ASSERT_NO_FATAL_FAILURE(RecallAtOnce());
  }

 private:
  using Vectors = std::map<uint64_t, std::vector<float>>;
  // What lives, and of that what is not linked.
  struct Moment {
    Vectors vectors;
    std::set<uint64_t> unlinked;
  };
  struct UnderWay {
    std::vector<float> query;
    uint32_t k;
    uint32_t slice;
    Moment moment;  // when it began
    bool is_ready = false;
    std::vector<Hit> hits;
  };

  CodedSpaceRig::Setup DrawSetup() {
    constexpr Metric kMetrics[] = {Metric::kCosine, Metric::kInnerProduct, Metric::kL2};
    CodedSpaceRig::Setup setup;
    setup.metric = kMetrics[random_.Below(3)];
    setup.dimension = static_cast<uint32_t>(65 + random_.Below(40));
    setup.graph_from = static_cast<uint32_t>(random_.Below(80));
    setup.list_from = static_cast<uint32_t>(random_.Below(60));
    setup.build = {.M = static_cast<uint32_t>(3 + random_.Below(6)),
                   .M0 = static_cast<uint32_t>(8 + random_.Below(10)),
                   .ef_construction = static_cast<uint32_t>(4 + random_.Below(30)),
                   .seed = random_.Next()};
    return setup;
  }
  // Of where the vectors are at this time; some are copies.
  std::vector<float> DrawVector() {
    if (!rig_.vectors.empty() && random_.Below(8) == 0) return AnyStored()->second;
    std::vector<float> vector = QuarterVector(&random_, rig_.space.dimension());
    for (size_t i = 0; i < vector.size(); ++i) vector[i] = vector[i] / narrow_ + Centre(i);
    return vector;
  }
  float Centre(size_t i) const {
    return static_cast<float>(static_cast<int>(MixBits(place_ * 1'000 + i) % 49) - 24) * far_;
  }
  Vectors::const_iterator AnyStored() {
    return std::next(rig_.vectors.begin(),
                     static_cast<ptrdiff_t>(random_.Below(rig_.vectors.size())));
  }

  void Step() {
    const uint64_t what = random_.Below(100);
    if (what < 2) {
      place_ = random_.Below(4);
      far_ = static_cast<float>(random_.Below(3));
      narrow_ = random_.Below(3) == 0 ? 4.0F : 1.0F;
    } else if (what < 8) {
      ASSERT_NO_FATAL_FAILURE(StoreSome(1 + random_.Below(120)));
    } else if (what < 24) {
      ASSERT_NO_FATAL_FAILURE(StoreSome(1));
    } else if (what < 34) {
      EndSome(1);
    } else if (what < 36) {
      EndSome(1 + random_.Below(1 + rig_.vectors.size() / 3));
    } else if (what < 42) {
      ASSERT_NO_FATAL_FAILURE(Suppress());
    } else if (what < 48) {
      ASSERT_NO_FATAL_FAILURE(Restore());
    } else if (what < 54) {
      const uint64_t times = 1 + random_.Below(10);
      for (uint64_t i = 0; i < times && rig_.space.WantsListing(); ++i) {
        ASSERT_GT(rig_.space.ListSome(), 0u);
      }
    } else if (what < 74) {
      const auto slice =
          static_cast<uint32_t>(1 + random_.Below(random_.Below(3) == 0 ? 20'000 : 500));
      const uint64_t times = 1 + random_.Below(60);
      for (uint64_t i = 0; i < times && !(IsChangingCodes() && random_.Below(4) == 0); ++i) {
        rig_.upkeep.Step(slice);
        Look();
      }
    } else if (what < 76) {
      rig_.space.SetHorizon(rig_.stamp);
      rig_.upkeep.Run();
    } else if (what < 82) {
      rig_.space.SetHorizon(rig_.stamp - std::min(rig_.stamp, random_.Below(60)));
    } else if (what < 88) {
      ASSERT_NO_FATAL_FAILURE(RecallAtOnce());
    } else {
      const uint64_t times = 1 + random_.Below(8);
      for (uint64_t i = 0; i < times; ++i) {
        ASSERT_NO_FATAL_FAILURE(StepRecall());
      }
    }
  }

  void StoreSome(uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) {
      const uint64_t id = random_.Below(ids_);
      hidden_.erase(id);
      ASSERT_NO_FATAL_FAILURE(rig_.Store(id, DrawVector()));
    }
  }
  void EndSome(uint64_t count) {
    for (; count > 0 && !rig_.vectors.empty(); --count) rig_.Remove(AnyStored()->first);
  }
  void Suppress() {
    if (rig_.vectors.empty()) return;
    const uint64_t id = AnyStored()->first;
    ASSERT_TRUE(rig_.space.Suppress(std::to_string(id), ++rig_.stamp, false).existed);
    hidden_.insert(rig_.vectors.extract(id));
    seen_->suppressed += static_cast<uint64_t>(IsLinkingABatch());
  }
  void Restore() {
    if (hidden_.empty()) return;
    const auto chosen =
        std::next(hidden_.begin(), static_cast<ptrdiff_t>(random_.Below(hidden_.size())));
    ASSERT_TRUE(rig_.space.Restore(std::to_string(chosen->first), ++rig_.stamp).existed);
    rig_.vectors.insert(hidden_.extract(chosen));
    seen_->restored += static_cast<uint64_t>(IsLinkingABatch());
  }

  bool IsLinkingABatch() const {
    return rig_.upkeep.linker().active() && rig_.space.LinksInBatches();
  }
  bool IsChangingCodes() const {
    return SpaceTestPeer::IsEncoding(rig_.space) || SpaceTestPeer::IsRecoding(rig_.space);
  }
  // What the programs come to.
  void Look() {
    const Space& space = rig_.space;
    if (IsLinkingABatch()) {
      seen_->linking_ended +=
          static_cast<uint64_t>(SpaceTestPeer::CountEndedWhileLinking(space) > 0);
    } else {
      seen_->between_ended +=
          static_cast<uint64_t>(space.LinksInBatches() && space.ended_listed() > 0);
    }
    seen_->encoding += static_cast<uint64_t>(SpaceTestPeer::IsEncoding(space));
    seen_->recoding += static_cast<uint64_t>(SpaceTestPeer::IsRecoding(space));
    const WalkCodes* const codes = space.walk_codes();
    if (codes != codes_ && codes_ != nullptr) {
      ++(codes == nullptr ? seen_->withdrawn : seen_->renewed);
      seen_->waiting_withdrawn += static_cast<uint64_t>(codes == nullptr && waited_);
    }
    waited_ = space.waiting() > 0;
    seen_->waiting += static_cast<uint64_t>(waited_);
    seen_->waiting_recoding += static_cast<uint64_t>(waited_ && SpaceTestPeer::IsRecoding(space));
    codes_ = codes;
    seen_->splits += static_cast<uint64_t>(SpaceTestPeer::CountLists(space) > 1);
  }

  // Nothing but what lived when it began, each once, with its own score, the nearest first; and the
  // nearest ones that were not linked yet, as these are scanned. Codes may mislead a walk past a
  // linked one, but seldom.
  void ExpectNearest(const Moment& moment, const std::vector<float>& query,
                     const std::vector<Hit>& hits, size_t k) {
    const Metric metric = rig_.space.metric();
    const auto distance_of = [&](const std::vector<float>& vector) {
      const double score = ExactScore(metric, vector, query);
      return metric == Metric::kL2 ? score : -score;
    };
    ASSERT_EQ(hits.size(), std::min(k, moment.vectors.size()));
    std::set<uint64_t> seen;
    double farthest = -HUGE_VAL;
    for (const Hit& hit : hits) {
      const uint64_t id = std::stoull(hit.id);
      const auto found = moment.vectors.find(id);
      ASSERT_TRUE(found != moment.vectors.end()) << id << " is not there";
      ASSERT_TRUE(seen.insert(id).second) << id << " came twice";
      const double distance = distance_of(found->second);
      const double slack = 1e-5 + 1e-5 * std::abs(distance);
      ASSERT_NEAR(metric == Metric::kL2 ? hit.score : -hit.score, distance, slack) << id;
      ASSERT_GE(distance, farthest - slack) << id << " comes too late";
      farthest = std::max(farthest, distance);
    }
    for (const auto& [id, vector] : moment.vectors) {
      const double distance = distance_of(vector);
      if (distance >= farthest - 1e-5 - 1e-5 * std::abs(farthest) || seen.contains(id)) continue;
      ASSERT_FALSE(moment.unlinked.contains(id)) << id << " was scanned and is missing";
      ++seen_->missed;
    }
    seen_->wanted += hits.size();
  }
  Moment Now() const {
    Moment moment{.vectors = rig_.vectors, .unlinked = {}};
    for (const auto& [id, vector] : moment.vectors) {
      if (!rig_.space.IsLinked(rig_.space.FindLive(std::to_string(id)))) moment.unlinked.insert(id);
    }
    return moment;
  }
  void RecallAtOnce() {
    const std::vector<float> query = DrawVector();
    const auto k = static_cast<uint32_t>(1 + random_.Below(30));
    const RecallAnswer answer =
        RunRecall(rig_.space, &rig_.job, query,
                  {.k = k, .ef = kWholeEf, .slice = static_cast<uint32_t>(1 + random_.Below(99))});
    ASSERT_EQ(answer.reason, RefusalReason::kNone);
    ASSERT_NO_FATAL_FAILURE(ExpectNearest(Now(), query, answer.hits, k));
  }
  // By another core: begun, searched and answered between the shard's operations.
  void StepRecall() {
    if (!under_way_) {
      under_way_ = UnderWay{.query = DrawVector(),
                            .k = static_cast<uint32_t>(1 + random_.Below(30)),
                            .slice = static_cast<uint32_t>(1 + random_.Below(150)),
                            .moment = Now(),
                            .hits = {}};
      rig_.epochs.Enter(0);
      RecallRequest request;
      request.dtype = VectorDtype::kF32;
      request.dimension = static_cast<uint16_t>(under_way_->query.size());
      request.k = under_way_->k;
      request.ef = kWholeEf;
      ASSERT_EQ(other_job_.Begin(rig_.space, request,
                                 reinterpret_cast<const std::byte*>(under_way_->query.data()), 1),
                RefusalReason::kNone);
      return;
    }
    if (!under_way_->is_ready) {
      under_way_->is_ready = other_job_.Search(under_way_->slice);
      return;
    }
    std::vector<std::byte> slot(other_job_.NextBatchBytes(4'096));
    const bool is_last = other_job_.EmitBatch(slot);
    ReadBatch(slot.data(), &under_way_->hits);
    if (!is_last) return;
    rig_.epochs.Leave(0);
    const UnderWay done = *std::exchange(under_way_, std::nullopt);
    ASSERT_NO_FATAL_FAILURE(ExpectNearest(done.moment, done.query, done.hits, done.k))
        << "a recall under way";
  }

  SplitMix64 random_;
  Seen* seen_;
  CodedSpaceRig rig_;
  RecallJob other_job_;
  Vectors hidden_;
  uint64_t ids_ = 0;
  uint64_t place_ = 0;
  float far_ = 0;
  float narrow_ = 1;
  std::optional<UnderWay> under_way_;
  const WalkCodes* codes_ = nullptr;
  bool waited_ = false;
};

TEST(SpaceCodesProgramsTest, RandomPrograms) {
  Seen seen;
  const Seeds seeds = Seeds::FromPrefix("SPACE_CODES", UsualSeeds(40, 4));
  seeds.ForEach([&](uint64_t seed) { Program(seed, &seen).Run(); });
  ExpectAllHappened({{"ended while linking", seen.linking_ended},
                     {"suppressed while linking", seen.suppressed},
                     {"restored while linking", seen.restored},
                     {"ended ones in the list", seen.between_ended},
                     {"encoding", seen.encoding},
                     {"recoding", seen.recoding},
                     {"codes renewed", seen.renewed},
                     {"codes withdrawn", seen.withdrawn},
                     {"several lists", seen.splits},
                     {"waiting in lists", seen.waiting},
                     {"waiting while codes are replaced", seen.waiting_recoding},
                     {"waiting when codes are withdrawn", seen.waiting_withdrawn},
                     {"hits", seen.wanted}},
                    !seeds.alone && seeds.count >= 40);
  EXPECT_LE(seen.missed, 5 + seen.wanted / 1'000);
}

}  // namespace
}  // namespace engram
