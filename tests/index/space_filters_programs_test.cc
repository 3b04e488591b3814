// Random programs over a space that is recalled with filters: upserts, updates, deletes, suppresses
// and restores between slices of upkeep, saves and loads, while codes are learned and some wait in
// lists, against an exact model.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "index/checkpoint/space_loader.h"
#include "index/checkpoint/space_saver.h"
#include "src/core/attributes.h"
#include "src/core/hash.h"
#include "tests/index/coded_space_rig.h"
#include "tests/sim/program_seeds.h"

namespace engram {
namespace {

constexpr uint32_t kWholeEf = 4'000;    // more than there are nodes
constexpr uint32_t kLargestList = 512;  // ef with which a walk is filtered behind it

struct Entry {
  std::vector<float> vector;
  std::set<std::string> tags;
  std::string who;
  int64_t when_ns = 0;
};

struct Asked {
  std::string bytes;
  std::vector<std::string> any_of;
  std::vector<std::string> none_of;
  std::string who;
  TimeRange times;

  bool Matches(const Entry& entry) const {
    const auto has = [&entry](const std::string& tag) { return entry.tags.contains(tag); };
    return (any_of.empty() || std::ranges::any_of(any_of, has)) &&
           std::ranges::none_of(none_of, has) && (who.empty() || who == entry.who) &&
           times.Has(entry.when_ns);
  }
};

struct Seen {
  uint64_t asked = 0;
  uint64_t found = 0;
  uint64_t waiting = 0;
  uint64_t with_codes = 0;
  uint64_t partly_linked = 0;
  uint64_t learning = 0;
  uint64_t wanted = 0;  // exactly
  uint64_t missed = 0;  // of these
};

CodedSpaceRig::Setup DrawSetup(SplitMix64* random) {
  constexpr Metric kMetrics[] = {Metric::kCosine, Metric::kInnerProduct, Metric::kL2};
  CodedSpaceRig::Setup setup;
  setup.metric = kMetrics[random->Below(3)];
  // From 256 on recalls walk by codes.
  setup.dimension = static_cast<uint32_t>(random->Below(2) == 0 ? 260 : 65 + random->Below(40));
  setup.graph_from = static_cast<uint32_t>(random->Below(80));
  setup.list_from = static_cast<uint32_t>(random->Below(60));
  setup.build = {.M = 6, .M0 = 14, .ef_construction = 20, .seed = random->Next()};
  return setup;
}

class Program {
 public:
  Program(uint64_t seed, Seen* seen) : random_(seed), seen_(seen), rig_(DrawSetup(&random_)) {}

  void Run() {
    ids_ = 100 + random_.Below(900);
    for (int step = 0; step < 250; ++step) {
      ASSERT_NO_FATAL_FAILURE(Step()) << "step " << step;
    }
    ASSERT_NO_FATAL_FAILURE(ExpectSound(rig_.space));
    ASSERT_NO_FATAL_FAILURE(SaveAndLoad());
  }

 private:
  void Step() {
    const uint64_t what = random_.Below(20);
    if (what < 3) {
      for (uint64_t n = random_.Below(100); n > 0; --n) Store();
    } else if (what < 6) {
      Store();
    } else if (what < 8) {
      End();
    } else if (what < 9) {
      Hide();
    } else if (what < 14) {
      for (uint64_t n = random_.Below(60); n > 0; --n) rig_.upkeep.Step(200);
      if (rig_.space.WantsListing()) rig_.space.ListSome();
      rig_.space.SetHorizon(rig_.stamp);
    } else if (what < 15) {
      ASSERT_NO_FATAL_FAILURE(ExpectSound(rig_.space));
    } else {
      ASSERT_NO_FATAL_FAILURE(Recall(rig_.space, &rig_.job));
    }
  }

  void Store() {
    const std::string id = std::to_string(random_.Below(ids_));
    if (hidden_.contains(id)) return;
    Entry entry;
    entry.vector = QuarterVector(&random_, rig_.space.dimension());
    for (uint64_t n = random_.Below(4); n > 0; --n) entry.tags.insert(DrawTag());
    if (random_.Below(2) == 0) entry.who = std::to_string(random_.Below(300));
    entry.when_ns = static_cast<int64_t>(random_.Below(1'000));
    std::string attributes;
    for (const std::string& tag : entry.tags) {
      EXPECT_TRUE(AppendAttribute(kTagKey, tag, &attributes));
    }
    if (!entry.who.empty()) {
      EXPECT_TRUE(AppendAttribute(kWhoKey, entry.who, &attributes));
    }
    ObservationRef observation;
    observation.id = id;
    observation.dtype = VectorDtype::kF32;
    observation.dimension = rig_.space.dimension();
    observation.vector = reinterpret_cast<const std::byte*>(entry.vector.data());
    observation.when_ns = entry.when_ns;
    observation.attributes = BytesOf(attributes);
    ASSERT_EQ(rig_.space.Upsert(observation, ++rig_.stamp).reason, RefusalReason::kNone);
    live_[id] = entry;
  }
  std::string DrawTag() {
    // Half of them have the first ones, few the last.
    const uint64_t most = uint64_t{1} << (1 + random_.Below(6));
    return "tag" + std::to_string(random_.Below(most));
  }
  std::string AnyOf(const std::map<std::string, Entry>& entries) {
    return std::next(entries.begin(), static_cast<ptrdiff_t>(random_.Below(entries.size())))->first;
  }
  void End() {
    if (live_.empty()) return;
    const std::string id = AnyOf(live_);
    ASSERT_TRUE(rig_.space.Delete(id, ++rig_.stamp, random_.Below(2) == 0).existed);
    live_.erase(id);
  }
  void Hide() {
    if (!hidden_.empty() && random_.Below(2) == 0) {
      const std::string id = AnyOf(hidden_);
      ASSERT_TRUE(rig_.space.Restore(id, ++rig_.stamp).existed);
      live_.insert(hidden_.extract(id));
    } else if (!live_.empty()) {
      const std::string id = AnyOf(live_);
      ASSERT_TRUE(rig_.space.Suppress(id, ++rig_.stamp, false).existed);
      hidden_.insert(live_.extract(id));
    }
  }

  Asked DrawFilter() {
    Asked asked;
    FilterWriter writer;
    const auto add = [&](bool excludes, std::vector<std::string>* tags) {
      for (uint64_t n = 1 + random_.Below(3); n > 0; --n) tags->push_back(DrawTag());
      const std::vector<std::string_view> views(tags->begin(), tags->end());
      ASSERT_TRUE(excludes ? writer.Exclude(kTagKey, views) : writer.Require(kTagKey, views));
    };
    if (random_.Below(3) != 0) add(false, &asked.any_of);
    if (random_.Below(3) == 0) add(true, &asked.none_of);
    if (random_.Below(6) == 0) {
      asked.who = std::to_string(random_.Below(310));
      const std::string_view who = asked.who;
      EXPECT_TRUE(writer.Require(kWhoKey, {&who, 1}));
    }
    if (random_.Below(3) == 0) {
      asked.times.begin_ns = static_cast<int64_t>(random_.Below(1'000));
      if (random_.Below(3) != 0) {
        asked.times.end_ns = asked.times.begin_ns + static_cast<int64_t>(random_.Below(600));
      }
      writer.SetTimes(asked.times);
    }
    asked.bytes = writer.Bytes();
    return asked;
  }

  void Look() {
    ++seen_->asked;
    seen_->waiting += static_cast<uint64_t>(rig_.space.waiting() > 0);
    seen_->with_codes += static_cast<uint64_t>(rig_.space.recall_codes() != nullptr);
    seen_->partly_linked +=
        static_cast<uint64_t>(rig_.space.linked() > 0 && rig_.space.unlinked_count() > 0);
    seen_->learning += static_cast<uint64_t>(SpaceTestPeer::IsLearning(rig_.space));
  }

  // With an ef of all nodes it is exact; with others all that is found is right.
  void Recall(const Space& space, RecallJob* job) {
    Look();
    const Asked asked = DrawFilter();
    const std::vector<float> query = QuarterVector(&random_, rig_.space.dimension());
    const auto k = static_cast<uint32_t>(1 + random_.Below(20));
    const bool is_whole = random_.Below(2) == 0;
    const auto ef = static_cast<uint32_t>(is_whole ? kWholeEf : k + random_.Below(kLargestList));
    std::vector<double> distances;
    for (const auto& [id, entry] : live_) {
      if (asked.Matches(entry)) distances.push_back(DistanceTo(entry, query));
    }
    std::ranges::sort(distances);
    const RecallAnswer answer = RunRecall(space, job, query,
                                          {.k = k,
                                           .ef = ef,
                                           .slice = static_cast<uint32_t>(1 + random_.Below(400)),
                                           .filter = asked.bytes});
    ASSERT_EQ(answer.reason, RefusalReason::kNone);
    std::set<std::string> ids;
    for (const Hit& hit : answer.hits) {
      const auto found = live_.find(hit.id);
      ASSERT_TRUE(found != live_.end()) << hit.id << " is not there";
      ASSERT_TRUE(asked.Matches(found->second)) << hit.id << " does not match";
      ASSERT_TRUE(ids.insert(hit.id).second) << hit.id << " twice";
    }
    seen_->found += answer.hits.size();
    ASSERT_LE(answer.hits.size(), k);
    if (!is_whole) return;
    ASSERT_EQ(answer.hits.size(), std::min<size_t>(k, distances.size()));
    seen_->wanted += answer.hits.size();
    for (size_t i = 0; i < answer.hits.size(); ++i) {
      const double distance = DistanceTo(live_.at(answer.hits[i].id), query);
      const double tolerance = 1e-5 + 1e-5 * std::fabs(distance);
      seen_->missed += static_cast<uint64_t>(distance > distances[i] + tolerance);
    }
  }
  double DistanceTo(const Entry& entry, const std::vector<float>& query) const {
    const double score = ExactScore(rig_.space.metric(), entry.vector, query);
    return rig_.space.metric() == Metric::kL2 ? score : -score;
  }
  void ExpectSound(const Space& space) const {
    const Result<void> sound = space.CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
    ASSERT_EQ(space.live(), live_.size());
  }

  void SaveAndLoad() {
    SpaceSaver saver(&rig_.other_memory.heap);
    ASSERT_TRUE(saver.Begin(&rig_.space, 1));
    std::vector<std::byte> saved;
    std::vector<std::byte> buffer(kMaxExtentBytes);
    while (!saver.done()) {
      const size_t written = saver.Step(buffer, 64);
      saved.insert(saved.end(), buffer.begin(), buffer.begin() + static_cast<ptrdiff_t>(written));
    }
    TestHeap memory(size_t{64} << 20);
    ReaderEpochs epochs(1);
    SpaceOptions options = TestSpaceOptions(rig_.space.metric(), rig_.space.dimension(),
                                            {.M = 6, .M0 = 14, .ef_construction = 20});
    options.traversal = Traversal::kRabitq;
    Space loaded("coded", options, &memory.heap, &epochs);
    SpaceLoader loader(&loaded);
    ASSERT_TRUE(loader.Take(saved).has_value());
    ASSERT_TRUE(loader.Finish().has_value());
    ASSERT_NO_FATAL_FAILURE(ExpectSound(loaded));
    for (int n = 0; n < 10; ++n) ASSERT_NO_FATAL_FAILURE(Recall(loaded, &rig_.job));
  }

  SplitMix64 random_;
  Seen* seen_;
  CodedSpaceRig rig_;
  uint64_t ids_ = 0;
  std::map<std::string, Entry> live_;
  std::map<std::string, Entry> hidden_;
};

TEST(SpaceFiltersProgramsTest, RandomPrograms) {
  Seen seen;
  const Seeds seeds = Seeds::FromPrefix("SPACE_FILTERS", UsualSeeds(40, 4));
  seeds.ForEach([&](uint64_t seed) { Program(seed, &seen).Run(); });
  ExpectAllHappened({{"asked", seen.asked},
                     {"found", seen.found},
                     {"waiting in lists", seen.waiting},
                     {"with codes", seen.with_codes},
                     {"partly linked", seen.partly_linked},
                     {"codes are learned", seen.learning},
                     {"hits", seen.wanted}},
                    !seeds.alone && seeds.count >= 40);
  // Estimates may be wrong by more than is allowed for.
  EXPECT_LE(seen.missed, 5 + seen.wanted / 1'000);
}

}  // namespace
}  // namespace engram
