// Spaces that are saved and loaded: at rest, under change, and from bytes that are not what was
// saved.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "index/checkpoint/space_extent.h"
#include "index/checkpoint/space_loader.h"
#include "index/checkpoint/space_saver.h"
#include "index/recall_job.h"
#include "index/space.h"
#include "src/core/commit_stamp.h"
#include "src/core/crc32c.h"
#include "src/core/hash.h"
#include "src/core/reader_epochs.h"
#include "tests/index/space_testing.h"
#include "tests/index/space_upkeep.h"
#include "tests/support/allocation_counter.h"

namespace engram {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint64_t kPrograms = 600;
constexpr uint64_t kMutations = 1'500;
#else
constexpr uint64_t kPrograms = 6'000;
constexpr uint64_t kMutations = 15'000;
#endif

using Bytes = std::vector<std::byte>;

HnswBuildParams SmallBuild() {
  HnswBuildParams build;
  build.M = 6;
  build.M0 = 12;
  build.ef_construction = 30;
  return build;
}

// A space with all that works on it.
struct Rig {
  Rig(const SpaceOptions& options, TestHeap* memory, const std::string& name = "saved")
      : space(name, options, &memory->heap, &epochs),
        upkeep(&space, &memory->heap, options.build) {}

  StoreOutcome Upsert(const std::string& id, std::span<const float> vector, CommitStamp stamp,
                      const std::string& payload = "", bool several_homes = false) {
    ObservationRef observation;
    observation.id = id;
    observation.payload = BytesOf(payload);
    observation.payload_kind = PayloadKind::kMemory;
    observation.dtype = VectorDtype::kF32;
    observation.dimension = static_cast<uint32_t>(vector.size());
    observation.vector = reinterpret_cast<const std::byte*>(vector.data());
    observation.when_ns = static_cast<int64_t>(stamp) * 7;
    observation.confidence = 0.25F;
    if (in_log) {
      observation.origin = stamp * 8;
      observation.record_bytes = static_cast<uint32_t>(
          LogRecordBytes(space.name().size(), vector.size_bytes(), id.size(), payload.size()));
    }
    return space.Upsert(observation, stamp, several_homes);
  }
  // Nobody asks for the past: what has ended may be taken out.
  void Settle() {
    space.SetHorizon(space.latest_stamp());
    upkeep.Run();
  }
  std::string PayloadOf(NodeId node) const {
    const std::span<const std::byte> payload = space.Get(node).payload;
    return {reinterpret_cast<const char*>(payload.data()), payload.size()};
  }

  bool in_log = false;  // what is upserted
  ReaderEpochs epochs{1};
  Space space;
  SpaceUpkeep upkeep;
};

// The rest of a save, in one go.
void SaveRest(SpaceSaver* saver, Bytes* to) {
  Bytes buffer(kMaxExtentBytes);
  while (!saver->done()) {
    const size_t bytes = saver->Step(buffer, 64);
    ASSERT_GT(bytes, 0u) << "an extent fits in the largest one's room";
    to->insert(to->end(), buffer.begin(), buffer.begin() + static_cast<ptrdiff_t>(bytes));
  }
}

Bytes Save(Rig* rig, TestHeap* memory, CommitStamp hold = 1) {
  SpaceSaver saver(&memory->heap);
  Bytes bytes;
  EXPECT_TRUE(saver.Begin(&rig->space, hold));
  SaveRest(&saver, &bytes);
  return bytes;
}

Result<void> Load(std::span<const std::byte> bytes, Space* space) {
  SpaceLoader loader(space);
  if (Result<void> taken = loader.Take(bytes); !taken) return taken;
  return loader.Finish();
}

void LoadAll(std::span<const std::byte> bytes, Space* space) {
  const Result<void> loaded = Load(bytes, space);
  ASSERT_TRUE(loaded.has_value()) << loaded.error().message;
  const Result<void> sound = space->CheckInvariants();
  ASSERT_TRUE(sound.has_value()) << sound.error().message;
}

std::vector<size_t> ExtentStarts(std::span<const std::byte> bytes) {
  std::vector<size_t> starts;
  for (size_t at = 0; at < bytes.size();) {
    starts.push_back(at);
    const Result<size_t> size = PeekExtent(bytes.subspan(at));
    EXPECT_TRUE(size.has_value());
    if (!size) break;
    at += *size;
  }
  return starts;
}

void FixCrc(std::span<std::byte> extent) {
  const uint32_t crc = Crc32c(extent.subspan(16), Crc32c(extent.first(kExtentCrcOffset)));
  std::memcpy(extent.data() + kExtentCrcOffset, &crc, sizeof(crc));
}

// Where the lists of nodes lie in a stream.
std::vector<size_t> LinksStarts(std::span<const std::byte> bytes) {
  std::vector<size_t> lists;
  for (const size_t start : ExtentStarts(bytes)) {
    ExtentHeader header;
    std::memcpy(&header, bytes.data() + start, sizeof(header));
    if (header.kind != ExtentKind::kLinks) continue;
    size_t at = start + sizeof(header);
    for (uint32_t i = 0; i < header.count; ++i) {
      SavedLinks saved;
      std::memcpy(&saved, bytes.data() + at, sizeof(saved));
      lists.push_back(at);
      at += sizeof(saved) + PadTo8(saved.link_words * sizeof(uint32_t));
    }
  }
  return lists;
}

// Where the records of nodes lie in a stream.
std::vector<size_t> NodeStarts(std::span<const std::byte> bytes) {
  std::vector<size_t> nodes;
  for (const size_t start : ExtentStarts(bytes)) {
    ExtentHeader header;
    std::memcpy(&header, bytes.data() + start, sizeof(header));
    if (header.kind != ExtentKind::kNodes) continue;
    size_t at = start + sizeof(header);
    for (uint32_t i = 0; i < header.count; ++i) {
      SavedNode saved;
      std::memcpy(&saved, bytes.data() + at, sizeof(saved));
      nodes.push_back(at);
      at += saved.saved_bytes;
    }
  }
  return nodes;
}

// ---------------------------------------------------------------------------------------------
// At rest

struct Form {
  Metric metric;
  Precision precision;
  Traversal traversal;
};

std::vector<Form> AllForms() {
  std::vector<Form> forms;
  for (const Metric metric : {Metric::kCosine, Metric::kInnerProduct, Metric::kL2}) {
    for (const Precision precision : {Precision::kF32, Precision::kBf16, Precision::kInt8}) {
      for (const Traversal traversal : {Traversal::kInt8, Traversal::kExact}) {
        forms.push_back({metric, precision, traversal});
      }
    }
  }
  return forms;
}

SpaceOptions OptionsOf(const Form& form, uint32_t dimension, uint64_t hash_seed) {
  SpaceOptions options = TestSpaceOptions(form.metric, dimension, SmallBuild(), hash_seed);
  options.precision = form.precision;
  options.traversal = form.traversal;
  options.graph_from = 100;
  return options;
}

// Some of everything: linked, unlinked, retired, hidden, restored, free places, tombstones.
void Fill(Rig* rig, uint32_t count, uint32_t dimension, uint64_t seed, uint32_t more = 20) {
  SplitMix64 random(seed);
  CommitStamp stamp = 100;
  const auto store = [&](uint32_t number) {
    const std::vector<float> vector = QuarterVector(&random, dimension);
    rig->Upsert("id" + std::to_string(number), vector, ++stamp,
                std::string(number % 50, 'p') + std::to_string(number), true);
  };
  const auto id_of = [&](uint32_t number) { return "id" + std::to_string(number); };
  for (uint32_t i = 0; i < count; ++i) store(i);
  rig->Settle();
  for (uint32_t i = 0; i < count; i += 9) store(i);
  for (uint32_t i = 3; i < count; i += 17) rig->space.Delete(id_of(i), ++stamp, true);
  rig->Settle();
  for (uint32_t i = 5; i < count; i += 19) rig->space.Suppress(id_of(i), ++stamp, true);
  for (uint32_t i = 5; i < count; i += 38) rig->space.Restore(id_of(i), ++stamp);
  rig->upkeep.Run();
  for (uint32_t i = 7; i < count; i += 23) store(i);
  for (uint32_t i = count; i < count + more; ++i) store(i);
}

struct Answer {
  std::vector<Hit> hits;
  bool operator==(const Answer&) const = default;
};

Answer Ask(const Space& space, RecallJob* job, std::span<const float> query, uint32_t ef) {
  RecallAnswer answer =
      RunRecall(space, job, query, {.k = 10, .ef = ef, .with_payload = true, .with_vector = true});
  EXPECT_EQ(answer.reason, RefusalReason::kNone);
  return {std::move(answer.hits)};
}

TEST(SpaceCheckpointTest, WhatIsSavedAtRestComesBackAsItWas) {
  TestHeap memory(size_t{256} << 20);
  TestHeap scratch(size_t{64} << 20);
  RecallJob job(&scratch.heap);
  constexpr uint32_t kDimension = 20;
  for (const Form& form : AllForms()) {
    SCOPED_TRACE(std::string(MetricName(form.metric)) + " " +
                 std::string(PrecisionName(form.precision)) +
                 (form.traversal == Traversal::kInt8 ? " int8" : " exact"));
    Rig original(OptionsOf(form, kDimension, 1), &memory);
    Fill(&original, 900, kDimension, 5);
    ASSERT_GT(original.space.linked(), 500u);
    ASSERT_GT(original.space.unlinked_count(), 20u);
    ASSERT_GT(original.space.hidden(), 10u);
    ASSERT_GT(original.space.tombstones(), 10u);
    ASSERT_GT(original.space.retired(), 10u);
    const Bytes bytes = Save(&original, &memory);

    Rig loaded(OptionsOf(form, 0, 2), &memory);
    SpaceLoader loader(&loaded.space);
    ASSERT_TRUE(loader.Take(bytes).has_value());
    ASSERT_TRUE(loader.is_complete());
    const Result<void> finished = loader.Finish();
    ASSERT_TRUE(finished.has_value()) << finished.error().message;
    ASSERT_TRUE(loaded.space.CheckInvariants().has_value());
    EXPECT_EQ(loader.graph().dropped_links(), 0u);
    EXPECT_EQ(loader.graph().joined_groups(), 0u);
    EXPECT_EQ(loader.ended_duplicates(), 0u);
    EXPECT_EQ(loaded.space.live(), original.space.live());
    EXPECT_EQ(loaded.space.linked(), original.space.linked());
    EXPECT_EQ(loaded.space.unlinked_count(), original.space.unlinked_count());
    EXPECT_EQ(loaded.space.hidden(), original.space.hidden());
    EXPECT_EQ(loaded.space.tombstones(), original.space.tombstones());
    EXPECT_EQ(loaded.space.node_count(), original.space.node_count());
    EXPECT_EQ(loaded.space.has_graph(), original.space.has_graph());
    EXPECT_EQ(loaded.space.latest_stamp(), original.space.latest_stamp());
    EXPECT_EQ(loaded.space.horizon(), original.space.latest_stamp());

    // Every byte: rows, links with their holes, levels, parents, stamps, texts.
    EXPECT_TRUE(Save(&loaded, &memory) == bytes);
    SplitMix64 random(77);
    for (int i = 0; i < 60; ++i) {
      const std::vector<float> query = QuarterVector(&random, kDimension);
      const uint32_t ef = 10 + static_cast<uint32_t>(random.Below(60));
      ASSERT_TRUE(Ask(original.space, &job, query, ef) == Ask(loaded.space, &job, query, ef));
    }
    // It goes on.
    loaded.Settle();
    ASSERT_TRUE(loaded.space.CheckInvariants().has_value());
    EXPECT_EQ(loaded.space.unlinked_count(), 0u);
    EXPECT_EQ(loaded.space.retired(), 0u);
  }
}

// Of several nodes with the top level the one where searches began is not the first one.
TEST(SpaceCheckpointTest, TheEntryPointIsTheSameOne) {
  TestHeap memory(size_t{64} << 20);
  SpaceOptions options = OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 4, 1);
  options.graph_from = 0;
  SplitMix64 random(2);
  int tried = 0;
  for (uint64_t seed = 1; tried < 5; ++seed) {
    options.build.seed = seed;
    Rig original(options, &memory);
    CommitStamp stamp = 100;
    for (int i = 0; i < 60; ++i) {
      original.Upsert("id" + std::to_string(i), QuarterVector(&random, 4), ++stamp);
    }
    original.Settle();
    const HnswGraph& graph = *original.space.TargetFor(nullptr).graph;
    const NodeId first = graph.entry_point();
    // Another one takes its place, and a new node the free one, with the same level.
    original.space.Delete(original.space.Get(first).id, ++stamp, false);
    original.Settle();
    const uint32_t level = graph.top_level();
    original.Upsert("new", QuarterVector(&random, 4), ++stamp);
    original.Settle();
    if (graph.entry_point() == first || graph.Level(first) != level) continue;
    ASSERT_LT(first, graph.entry_point());
    ++tried;
    Rig loaded(options, &memory);
    ASSERT_NO_FATAL_FAILURE(LoadAll(Save(&original, &memory), &loaded.space));
    EXPECT_EQ(loaded.space.TargetFor(nullptr).graph->entry_point(), graph.entry_point());
  }
}

TEST(SpaceCheckpointTest, KeepsEverythingOfAnObservation) {
  TestHeap memory(size_t{64} << 20);
  Rig original(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 4, 1), &memory);
  const std::vector<float> vector{1, 2, 3, 4};
  const std::string long_id(kMaxIdBytes, 'i');
  original.Upsert(long_id, vector, 50, std::string(kMaxPayloadBytes, 'x'));
  original.Upsert("hidden", vector, 51, "gone");
  original.space.Suppress("hidden", 60, true);
  Rig loaded(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 4, 3), &memory);
  ASSERT_NO_FATAL_FAILURE(LoadAll(Save(&original, &memory), &loaded.space));
  const NodeId node = loaded.space.FindLive(long_id);
  ASSERT_NE(node, kNoNode);
  const StoredObservation stored = loaded.space.Get(node);
  EXPECT_EQ(loaded.PayloadOf(node), std::string(kMaxPayloadBytes, 'x'));
  EXPECT_EQ(stored.payload_kind, PayloadKind::kMemory);
  EXPECT_EQ(stored.when_ns, 350);
  EXPECT_EQ(stored.confidence, 0.25F);
  EXPECT_EQ(stored.origin, kNoLogAddress);
  EXPECT_EQ(stored.record_bytes, 0u);
  EXPECT_EQ(stored.stamp, 50u);
  // What is hidden keeps the stamp of its content: an upsert before the suppress supersedes it.
  EXPECT_EQ(loaded.Upsert("hidden", vector, 50).later, 51u);
  EXPECT_TRUE(loaded.space.Restore("hidden", 70).existed);
  const NodeId restored = loaded.space.FindLive("hidden");
  ASSERT_NE(restored, kNoNode);
  EXPECT_EQ(loaded.PayloadOf(restored), "gone");

  // Without payloads.
  SpaceSaver saver(&memory.heap);
  Bytes bytes;
  ASSERT_TRUE(saver.Begin(&original.space, 1, {.with_payload = false}));
  SaveRest(&saver, &bytes);
  EXPECT_LT(bytes.size(), size_t{8} << 10);
  EXPECT_FALSE(ReadSpaceExtent(bytes)->has_payload);
  Rig bare(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 4, 3), &memory);
  ASSERT_NO_FATAL_FAILURE(LoadAll(bytes, &bare.space));
  EXPECT_EQ(bare.PayloadOf(bare.space.FindLive(long_id)), "");
}

TEST(SpaceCheckpointTest, PayloadsInALogStayThere) {
  TestHeap memory(size_t{64} << 20);
  Rig original(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 4, 1), &memory);
  original.in_log = true;
  const std::vector<float> vector{1, 2, 3, 4};
  const std::string payload(kMaxPayloadBytes, 'x');
  const uint64_t before = original.space.resident_bytes();
  original.Upsert("large", vector, 50, payload);
  original.Upsert("hidden", vector, 51, payload);
  original.space.Suppress("hidden", 60, true);
  EXPECT_LT(original.space.resident_bytes() - before, size_t{64} << 10);
  const Bytes bytes = Save(&original, &memory);
  EXPECT_LT(bytes.size(), size_t{8} << 10);
  Rig loaded(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 4, 3), &memory);
  ASSERT_NO_FATAL_FAILURE(LoadAll(bytes, &loaded.space));
  EXPECT_TRUE(loaded.space.Restore("hidden", 70).existed);
  for (const auto& [id, address] :
       {std::pair<std::string, LogAddress>{"large", 400}, {"hidden", 408}}) {
    const StoredObservation stored = loaded.space.Get(loaded.space.FindLive(id));
    EXPECT_EQ(stored.id, id);
    EXPECT_EQ(stored.origin, address);
    EXPECT_EQ(stored.record_bytes, LogRecordBytes(5, 16, id.size(), payload.size()));
    EXPECT_EQ(stored.payload_bytes, payload.size());
    EXPECT_TRUE(stored.payload.empty());
    EXPECT_EQ(stored.was_hidden, id == "hidden");
  }
  // What is taken over to another place is asked for there.
  const NodeId node = loaded.space.FindLive("large");
  EXPECT_FALSE(loaded.space.MoveOrigin(node, 408, 800)) << "it was never there";
  EXPECT_TRUE(loaded.space.MoveOrigin(node, 400, 800));
  EXPECT_EQ(loaded.space.Get(node).origin, 800u);
  EXPECT_FALSE(loaded.space.MoveOrigin(node, 400, 1'600));
  EXPECT_FALSE(loaded.space.MoveOrigin(1'000'000, 400, 1'600));
}

TEST(SpaceCheckpointTest, EmptySpacesComeBack) {
  TestHeap memory(size_t{16} << 20);
  for (const uint32_t dimension : {0u, 5u}) {
    Rig original(OptionsOf({Metric::kCosine, Precision::kF32, Traversal::kInt8}, dimension, 1),
                 &memory);
    Bytes bytes = Save(&original, &memory);
    Rig loaded(OptionsOf({Metric::kCosine, Precision::kF32, Traversal::kInt8}, 0, 1), &memory);
    ASSERT_NO_FATAL_FAILURE(LoadAll(bytes, &loaded.space));
    EXPECT_EQ(loaded.space.dimension(), dimension);
    EXPECT_EQ(loaded.space.live(), 0u);
  }
  // Tombstones come before there is a dimension, and vectors while it is saved.
  Rig original(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 0, 1), &memory);
  original.space.Delete("a", 10, true);
  original.space.Delete("b", 11, true);
  SpaceSaver saver(&memory.heap);
  ASSERT_TRUE(saver.Begin(&original.space, 10));
  original.space.ForgetTombstones(11);
  EXPECT_EQ(original.space.tombstones(), 1u) << "b is held";
  const std::vector<float> vector{1, 2};
  original.Upsert("c", vector, 12);
  Bytes bytes;
  SaveRest(&saver, &bytes);
  Rig loaded(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 0, 1), &memory);
  ASSERT_NO_FATAL_FAILURE(LoadAll(bytes, &loaded.space));
  EXPECT_EQ(loaded.space.dimension(), 0u);
  EXPECT_EQ(loaded.space.tombstones(), 1u);
  EXPECT_EQ(loaded.space.live(), 0u);
}

TEST(SpaceCheckpointTest, RowsOfAnotherFormAreEncodedAgain) {
  TestHeap memory(size_t{256} << 20);
  constexpr uint32_t kDimension = 12;
  constexpr uint32_t kNodes = 300;
  const auto fill = [&](Rig* rig) {
    SplitMix64 random(4);
    for (uint32_t i = 0; i < kNodes; ++i) {
      rig->Upsert("id" + std::to_string(i), QuarterVector(&random, kDimension), 10 + i);
    }
    rig->Settle();
  };
  const std::vector<Form> forms = AllForms();
  for (const Form& from : forms) {
    Rig original(OptionsOf(from, kDimension, 1), &memory);
    fill(&original);
    const Bytes bytes = Save(&original, &memory);
    for (const Form& to : forms) {
      if (to.metric != from.metric) continue;
      Rig loaded(OptionsOf(to, kDimension, 2), &memory);
      ASSERT_NO_FATAL_FAILURE(LoadAll(bytes, &loaded.space));
      EXPECT_EQ(loaded.space.linked(), kNodes) << "links need no rows";
      if (from.precision != Precision::kF32) continue;
      // As if it had been stored so, where nothing was lost.
      Rig direct(OptionsOf(to, kDimension, 2), &memory);
      fill(&direct);
      for (NodeId node = 0; node < kNodes; ++node) {
        std::array<float, kDimension> a{};
        std::array<float, kDimension> b{};
        loaded.space.GetVector(node, a.data());
        direct.space.GetVector(node, b.data());
        ASSERT_EQ(a, b);
      }
    }
  }
}

TEST(SpaceCheckpointTest, WithAnotherMNodesAreLinkedAnew) {
  TestHeap memory(size_t{64} << 20);
  Rig original(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 8, 1), &memory);
  Fill(&original, 400, 8, 9);
  const Bytes bytes = Save(&original, &memory);
  for (const auto& [M, M0] : {std::pair(6u, 14u), std::pair(5u, 12u)}) {
    SpaceOptions options = OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 8, 1);
    options.build.M = M;
    options.build.M0 = M0;
    Rig loaded(options, &memory);
    ASSERT_NO_FATAL_FAILURE(LoadAll(bytes, &loaded.space));
    EXPECT_EQ(loaded.space.linked(), 0u);
    EXPECT_EQ(loaded.space.retired(), 0u);
    EXPECT_EQ(loaded.space.live(), original.space.live());
    loaded.Settle();
    EXPECT_EQ(loaded.space.linked(), original.space.live());
    ASSERT_TRUE(loaded.space.CheckInvariants().has_value());
  }
}

TEST(SpaceCheckpointTest, AnotherSpaceIsRefused) {
  TestHeap memory(size_t{64} << 20);
  const Form form{Metric::kL2, Precision::kF32, Traversal::kInt8};
  Rig original(OptionsOf(form, 4, 1), &memory);
  const Bytes bytes = Save(&original, &memory);
  const auto code_of = [&](const SpaceOptions& options, const std::string& name) {
    Rig rig(options, &memory, name);
    const Result<void> loaded = Load(bytes, &rig.space);
    EXPECT_FALSE(loaded.has_value());
    return loaded.has_value() ? ErrorCode::kInternal : loaded.error().code;
  };
  EXPECT_EQ(code_of(OptionsOf(form, 4, 1), "other"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of(OptionsOf(form, 5, 1), "saved"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of(OptionsOf({Metric::kCosine, Precision::kF32, Traversal::kInt8}, 4, 1), "saved"),
            ErrorCode::kInvalidArgument);

  const Result<SavedSpace> saved = ReadSpaceExtent(bytes);
  ASSERT_TRUE(saved.has_value());
  EXPECT_EQ(saved->name, "saved");
  EXPECT_EQ(saved->metric, Metric::kL2);
  EXPECT_EQ(saved->precision, Precision::kF32);
  EXPECT_EQ(saved->dimension, 4u);
  EXPECT_EQ(saved->M, 6u);
  EXPECT_EQ(saved->M0, 12u);
  EXPECT_EQ(saved->hold, 1u);
}

TEST(SpaceCheckpointTest, AnotherFormatVersionIsNamed) {
  TestHeap memory(size_t{16} << 20);
  Rig original(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 4, 1), &memory);
  Bytes bytes = Save(&original, &memory);
  bytes[4] = std::byte{kExtentVersion + 1};
  FixCrc(std::span(bytes).first(*PeekExtent(bytes)));
  Rig loaded(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 4, 1), &memory);
  const Result<void> result = Load(bytes, &loaded.space);
  ASSERT_FALSE(result.has_value());
  EXPECT_EQ(result.error().code, ErrorCode::kInvalidArgument);
  EXPECT_NE(result.error().message.find("version 3"), std::string::npos);
}

TEST(SpaceCheckpointTest, FullMemoryIsAnError) {
  TestHeap memory(size_t{64} << 20);
  Rig original(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 8, 1), &memory);
  Fill(&original, 600, 8, 9);
  const Bytes bytes = Save(&original, &memory);
  TestHeap enough(size_t{8} << 20);
  {
    Rig loaded(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 8, 1), &enough);
    ASSERT_NO_FATAL_FAILURE(LoadAll(bytes, &loaded.space));
  }
  const size_t needed = enough.arena.used_bytes();
  for (size_t room = 0; room < needed; room += needed / 41) {
    TestHeap little(size_t{8} << 20);
    Rig loaded(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 8, 1), &little);
    little.LeaveOnly(room);
    const Result<void> result = Load(bytes, &loaded.space);
    if (result.has_value()) {
      ASSERT_TRUE(loaded.space.CheckInvariants().has_value());
    } else {
      ASSERT_EQ(result.error().code, ErrorCode::kResourceExhausted) << result.error().message;
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Slices

TEST(SpaceCheckpointTest, SlicesAreBoundedAndTakeNoMemory) {
  TestHeap memory(size_t{64} << 20);
  Rig original(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 8, 1), &memory);
  Fill(&original, 600, 8, 9);
  const Bytes whole = Save(&original, &memory);
  Bytes buffer(kMaxExtentBytes);
  SplitMix64 random(3);
  size_t refusals = 0;
  for (int turn = 0; turn < 30; ++turn) {
    SpaceSaver saver(&memory.heap);
    ASSERT_TRUE(saver.Begin(&original.space, 1));
    Bytes bytes;
    bytes.reserve(whole.size() * 4);
    const size_t heap_bytes = memory.heap.live_bytes();
    const uint64_t allocations = AllocationCount();
    while (!saver.done()) {
      ASSERT_TRUE(saver.active());
      const uint64_t before = saver.nodes();
      const size_t nodes = 1 + random.Below(40);
      const size_t room = random.Below(3) == 0 ? random.Below(3'000) : buffer.size();
      const size_t written = saver.Step(std::span(buffer).first(room), nodes);
      ASSERT_LE(written, room);
      ASSERT_LE(saver.nodes() - before, nodes);
      refusals += static_cast<size_t>(written == 0);
      if (written == 0) {
        ASSERT_LT(room, buffer.size());
      }
      if (!saver.done()) {
        ASSERT_EQ(memory.heap.live_bytes(), heap_bytes);
      }
      bytes.insert(bytes.end(), buffer.begin(), buffer.begin() + static_cast<ptrdiff_t>(written));
    }
    if (AllocationsAreCounted()) {
      ASSERT_EQ(AllocationCount(), allocations);
    }
    ASSERT_FALSE(saver.active());
    for (const size_t start : ExtentStarts(bytes)) {
      ASSERT_LE(*PeekExtent(std::span(bytes).subspan(start)), kMaxExtentBytes);
    }
    Rig loaded(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 8, 1), &memory);
    // An extent at a time, as from a file.
    SpaceLoader loader(&loaded.space);
    for (std::span<const std::byte> rest = bytes; !rest.empty();) {
      const size_t size = *PeekExtent(rest);
      ASSERT_TRUE(loader.Take(rest.first(size)).has_value());
      rest = rest.subspan(size);
    }
    ASSERT_TRUE(loader.Finish().has_value());
    ASSERT_TRUE(Save(&loaded, &memory) == whole);
  }
  EXPECT_GT(refusals, 0u);
}

TEST(SpaceCheckpointTest, AnAbortedSaveLeavesNothing) {
  TestHeap memory(size_t{16} << 20);
  Rig original(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 2, 1), &memory);
  const std::vector<float> vector{1, 2};
  for (int i = 0; i < 8; ++i) original.Upsert(std::to_string(i), vector, 10 + i);
  const size_t before = memory.heap.live_bytes();
  SpaceSaver saver(&memory.heap);
  ASSERT_TRUE(saver.Begin(&original.space, 1));
  Bytes buffer(kMaxExtentBytes);
  ASSERT_GT(saver.Step(buffer, 3), 0u);
  saver.Abort();
  EXPECT_FALSE(saver.active());
  EXPECT_FALSE(saver.done());
  EXPECT_EQ(memory.heap.live_bytes(), before);
  original.space.Suppress("7", 100, false);
  original.Settle();
  EXPECT_EQ(original.space.retired(), 0u) << "nothing is held for it";
  Bytes bytes;
  ASSERT_TRUE(saver.Begin(&original.space, 1));
  SaveRest(&saver, &bytes);
  Rig loaded(OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 2, 1), &memory);
  ASSERT_NO_FATAL_FAILURE(LoadAll(bytes, &loaded.space));
  EXPECT_EQ(loaded.space.live(), 7u);
  EXPECT_EQ(loaded.space.hidden(), 1u);
}

// ---------------------------------------------------------------------------------------------
// Under change: one hazard each

// With a graph and without.
class HazardTest : public testing::TestWithParam<uint32_t> {
 protected:
  SpaceOptions Options(uint64_t seed) const {
    SpaceOptions options = OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, 2, seed);
    options.graph_from = GetParam();
    return options;
  }
  void Upsert(Rig* rig, const std::string& id, float x, CommitStamp stamp) {
    const std::vector<float> vector{x, 1};
    ASSERT_EQ(rig->Upsert(id, vector, stamp, id + std::to_string(stamp), true).reason,
              RefusalReason::kNone);
  }
  // Places 0 to 7, each with an id; place 0 is free then.
  void Fill(Rig* rig) {
    for (uint32_t i = 0; i < 8; ++i) {
      ASSERT_NO_FATAL_FAILURE(Upsert(rig, "id" + std::to_string(i), static_cast<float>(i), 10 + i));
    }
    rig->space.Delete("id0", 30, false);
    rig->Settle();
    ASSERT_EQ(rig->space.retired(), 0u);
    ASSERT_EQ(rig->space.node_count(), 8u);
  }
  void Step(SpaceSaver* saver, size_t nodes) {
    const size_t written = saver->Step(buffer_, nodes);
    bytes_.insert(bytes_.end(), buffer_.begin(), buffer_.begin() + static_cast<ptrdiff_t>(written));
  }
  static float FirstOf(const Rig& rig, const std::string& id) {
    std::array<float, 2> vector{};
    const NodeId node = rig.space.FindLive(id);
    EXPECT_NE(node, kNoNode);
    if (node != kNoNode) rig.space.GetVector(node, vector.data());
    return vector[0];
  }

  TestHeap memory_{size_t{64} << 20};
  Bytes buffer_ = Bytes(kMaxExtentBytes);
  Bytes bytes_;
};

TEST_P(HazardTest, AnIdThatMovedIsThereTwice) {
  Rig original(Options(1), &memory_);
  SpaceSaver saver(&memory_.heap);
  ASSERT_NO_FATAL_FAILURE(Fill(&original));
  original.space.Delete("id6", 29, false);
  original.Settle();
  ASSERT_TRUE(saver.Begin(&original.space, 30));
  Step(&saver, 3);  // Places 0 to 2 at most.
  // id1 has been saved at its place; its update gets that of id6.
  ASSERT_NO_FATAL_FAILURE(Upsert(&original, "id1", 101, 42));
  SaveRest(&saver, &bytes_);
  Rig loaded(Options(2), &memory_);
  SpaceLoader loader(&loaded.space);
  ASSERT_TRUE(loader.Take(bytes_).has_value());
  ASSERT_TRUE(loader.Finish().has_value());
  ASSERT_TRUE(loaded.space.CheckInvariants().has_value());
  EXPECT_EQ(loader.ended_duplicates(), 1u);
  EXPECT_EQ(FirstOf(loaded, "id1"), 101);
}

TEST_P(HazardTest, ASuppressMovesWhatIsStillToBeSavedToWhereTheSaveHasBeen) {
  for (const bool restored : {false, true}) {
    SCOPED_TRACE(restored);
    Rig original(Options(1), &memory_);
    SpaceSaver saver(&memory_.heap);
    bytes_.clear();
    ASSERT_NO_FATAL_FAILURE(Fill(&original));
    ASSERT_TRUE(saver.Begin(&original.space, 30));
    Step(&saver, 3);
    ASSERT_TRUE(original.space.Suppress("id7", 40, true).existed);  // To place 0.
    if (restored) {
      ASSERT_TRUE(original.space.Restore("id7", 41).existed);
    }
    // All that may be given back is, and its place is used again.
    original.Settle();
    for (int i = 0; i < 3; ++i) {
      ASSERT_NO_FATAL_FAILURE(Upsert(&original, "new" + std::to_string(i), 7, 50 + i));
    }
    SaveRest(&saver, &bytes_);
    original.Settle();
    EXPECT_EQ(original.space.retired(), 0u) << "what was kept is given back";
    ASSERT_TRUE(original.space.CheckInvariants().has_value());

    Rig loaded(Options(2), &memory_);
    ASSERT_NO_FATAL_FAILURE(LoadAll(bytes_, &loaded.space));
    EXPECT_EQ(FirstOf(loaded, "id7"), 7) << "as before the suppress, which is replayed";
    loaded.space.Suppress("id7", 40, true);
    EXPECT_EQ(loaded.space.FindLive("id7"), kNoNode);
    if (restored) {
      ASSERT_TRUE(loaded.space.Restore("id7", 41).existed);
      EXPECT_EQ(FirstOf(loaded, "id7"), 7);
      EXPECT_EQ(loaded.PayloadOf(loaded.space.FindLive("id7")), "id717");
    }
    ASSERT_TRUE(loaded.space.CheckInvariants().has_value());
  }
}

TEST_P(HazardTest, OfACopyAndItsOriginalTheOneThatBeganLastStands) {
  Rig original(Options(1), &memory_);
  SpaceSaver saver(&memory_.heap);
  ASSERT_NO_FATAL_FAILURE(Fill(&original));
  ASSERT_TRUE(saver.Begin(&original.space, 30));
  ASSERT_TRUE(original.space.Suppress("id7", 40, true).existed);  // Both are still to come.
  SaveRest(&saver, &bytes_);
  Rig loaded(Options(2), &memory_);
  ASSERT_NO_FATAL_FAILURE(LoadAll(bytes_, &loaded.space));
  EXPECT_EQ(loaded.space.FindLive("id7"), kNoNode);
  EXPECT_EQ(loaded.space.hidden(), 1u);
  EXPECT_FALSE(loaded.space.Suppress("id7", 40, true).existed);
  EXPECT_TRUE(loaded.space.Restore("id7", 41).existed);
  EXPECT_EQ(FirstOf(loaded, "id7"), 7);
}

TEST_P(HazardTest, TheLatestContentStandsNotTheLatestBeginning) {
  Rig original(Options(1), &memory_);
  SpaceSaver saver(&memory_.heap);
  ASSERT_NO_FATAL_FAILURE(Fill(&original));
  ASSERT_TRUE(original.space.Suppress("id1", 40, true).existed);  // To place 0.
  ASSERT_TRUE(original.space.Restore("id1", 41).existed);
  original.Settle();
  original.space.Delete("id6", 42, false);
  original.Settle();
  ASSERT_TRUE(saver.Begin(&original.space, 30));
  Step(&saver, 3);
  // Another home's upsert comes late, for id6's place. It has not met the suppress.
  ASSERT_NO_FATAL_FAILURE(Upsert(&original, "id1", 101, 35));
  ASSERT_EQ(FirstOf(original, "id1"), 101);
  SaveRest(&saver, &bytes_);
  Rig loaded(Options(2), &memory_);
  ASSERT_NO_FATAL_FAILURE(LoadAll(bytes_, &loaded.space));
  EXPECT_EQ(FirstOf(loaded, "id1"), 101);
}

TEST_P(HazardTest, WhatWasDeletedBeforeTheSaveStaysDeleted) {
  // A delete with a stamp above `hold` that need not be replayed: another home was behind.
  Rig original(Options(1), &memory_);
  ASSERT_NO_FATAL_FAILURE(Fill(&original));
  original.space.Delete("id5", 60, false);
  ASSERT_EQ(original.space.retired(), 1u);
  Rig loaded(Options(2), &memory_);
  ASSERT_NO_FATAL_FAILURE(LoadAll(Save(&original, &memory_, /*hold=*/30), &loaded.space));
  EXPECT_EQ(loaded.space.FindLive("id5"), kNoNode);
  EXPECT_EQ(loaded.space.live(), 6u);
}

TEST_P(HazardTest, TombstonesStayForWhatIsReplayed) {
  Rig original(Options(1), &memory_);
  SpaceSaver saver(&memory_.heap);
  ASSERT_NO_FATAL_FAILURE(Fill(&original));
  original.space.Delete("id3", 50, true);
  ASSERT_TRUE(saver.Begin(&original.space, 45));
  // Another home's upsert was under way, is stored and answered: then all are complete.
  ASSERT_NO_FATAL_FAILURE(Upsert(&original, "id3", 77, 48));
  original.space.ForgetTombstones(60);
  SaveRest(&saver, &bytes_);
  EXPECT_TRUE(original.space.has_tombstones());
  original.space.ForgetTombstones(60);
  EXPECT_FALSE(original.space.has_tombstones()) << "once it has been saved";

  Rig loaded(Options(2), &memory_);
  ASSERT_NO_FATAL_FAILURE(LoadAll(bytes_, &loaded.space));
  EXPECT_EQ(loaded.space.tombstones(), 1u);
  ASSERT_NO_FATAL_FAILURE(Upsert(&loaded, "id3", 77, 48));
  EXPECT_EQ(loaded.space.FindLive("id3"), kNoNode);
  ASSERT_NO_FATAL_FAILURE(Upsert(&loaded, "id3", 78, 55));
  EXPECT_EQ(FirstOf(loaded, "id3"), 78);
  EXPECT_EQ(loaded.space.tombstones(), 1u) << "superseded, and still in line";
  loaded.space.ForgetTombstones(60);
  EXPECT_EQ(loaded.space.tombstones(), 0u);
  ASSERT_TRUE(loaded.space.CheckInvariants().has_value());
}

// Of an observation and a tombstone with its stamp, in whatever places they are.
TEST_P(HazardTest, AnObservationStandsBeforeATombstoneWithItsStamp) {
  for (const bool behind : {false, true}) {
    SCOPED_TRACE(behind);
    bytes_.clear();
    Rig original(Options(1), &memory_);
    ASSERT_NO_FATAL_FAILURE(Fill(&original));
    if (behind) {
      // The tombstone gets a new place, and the observation that of the version before.
      ASSERT_NO_FATAL_FAILURE(Upsert(&original, "id8", 8, 49));
      original.space.Delete("id3", 50, true);
      original.Settle();
    } else {
      original.space.Delete("id3", 50, true);
    }
    ASSERT_NO_FATAL_FAILURE(Upsert(&original, "id3", 77, 50));
    EXPECT_EQ(original.space.FindLive("id3") == 3, behind);
    ASSERT_EQ(original.space.tombstones(), 1u);
    SpaceSaver saver(&memory_.heap);
    ASSERT_TRUE(saver.Begin(&original.space, 45));
    SaveRest(&saver, &bytes_);
    Rig loaded(Options(2), &memory_);
    ASSERT_NO_FATAL_FAILURE(LoadAll(bytes_, &loaded.space));
    EXPECT_EQ(FirstOf(loaded, "id3"), 77);
    EXPECT_EQ(loaded.space.tombstones(), 1u);
  }
}

TEST_P(HazardTest, SnapshotsBeforeTheRestartAreRefused) {
  Rig original(Options(1), &memory_);
  ASSERT_NO_FATAL_FAILURE(Fill(&original));
  Rig loaded(Options(2), &memory_);
  ASSERT_NO_FATAL_FAILURE(LoadAll(Save(&original, &memory_), &loaded.space));
  RecallJob job(&memory_.heap);
  const std::vector<float> query{1, 1};
  const CommitStamp latest = loaded.space.latest_stamp();
  EXPECT_EQ(RunRecall(loaded.space, &job, query, {.k = 3, .snapshot = latest - 1}).reason,
            RefusalReason::kSnapshotTooOld);
  EXPECT_EQ(RunRecall(loaded.space, &job, query, {.k = 3, .snapshot = latest}).hits.size(), 3u);
}

INSTANTIATE_TEST_SUITE_P(GraphFrom, HazardTest, testing::Values(0U, 1'000U));

// ---------------------------------------------------------------------------------------------
// Bytes that are not what was saved

class DamageTest : public testing::Test {
 protected:
  static SpaceOptions Options() {
    SpaceOptions options = OptionsOf({Metric::kCosine, Precision::kF32, Traversal::kInt8}, 3, 1);
    options.build.M = 3;
    options.build.M0 = 5;
    options.graph_from = 0;
    return options;
  }
  // With upper levels, retired and hidden nodes, tombstones and holes.
  Bytes SaveOf(uint32_t count, size_t slice, uint32_t more = 20) {
    Rig original(Options(), &memory_);
    Fill(&original, count, 3, 6, more);
    SpaceSaver saver(&memory_.heap);
    EXPECT_TRUE(saver.Begin(&original.space, 1));
    Bytes bytes;
    Bytes buffer(kMaxExtentBytes);
    while (!saver.done()) {
      const size_t written = saver.Step(buffer, slice);
      bytes.insert(bytes.end(), buffer.begin(), buffer.begin() + static_cast<ptrdiff_t>(written));
    }
    return bytes;
  }
  Result<void> LoadResult(std::span<const std::byte> bytes) {
    ReaderEpochs epochs(1);
    Space loaded("saved", Options(), &memory_.heap, &epochs);
    return Load(bytes, &loaded);
  }
  // kCorrupt, or kInvalidArgument where it looks like something else.
  void ExpectRefused(std::span<const std::byte> bytes, const std::string& what) {
    const Result<void> result = LoadResult(bytes);
    ASSERT_FALSE(result.has_value()) << what;
    ASSERT_EQ(result.error().code, ErrorCode::kCorrupt) << what << ": " << result.error().message;
  }

  TestHeap memory_{size_t{64} << 20};
};

TEST_F(DamageTest, EveryFlippedBitIsNoticed) {
  Bytes bytes = SaveOf(10, 4, 2);
  ASSERT_TRUE(LoadResult(bytes).has_value());
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    ASSERT_NO_FATAL_FAILURE(ExpectRefused(bytes, "bit " + std::to_string(bit)));
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
  }
  ASSERT_TRUE(LoadResult(bytes).has_value());
}

TEST_F(DamageTest, FlippedBitsOfALargeSaveAreNoticed) {
  Bytes bytes = SaveOf(1'500, 64);
  SplitMix64 random(12);
  for (int i = 0; i < 200; ++i) {
    const size_t bit = random.Below(bytes.size() * 8);
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    ASSERT_NO_FATAL_FAILURE(ExpectRefused(bytes, "bit " + std::to_string(bit)));
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
  }
}

TEST_F(DamageTest, EveryCutIsNoticed) {
  const Bytes bytes = SaveOf(10, 4, 2);
  for (size_t size = 0; size < bytes.size(); ++size) {
    ASSERT_NO_FATAL_FAILURE(
        ExpectRefused(std::span(bytes).first(size), std::to_string(size) + " bytes"));
  }
  Bytes longer = bytes;
  longer.resize(bytes.size() + 8);
  ASSERT_NO_FATAL_FAILURE(ExpectRefused(longer, "bytes behind the end"));
}

TEST_F(DamageTest, MissingRepeatedAndForeignExtentsAreNoticed) {
  const Bytes bytes = SaveOf(60, 8);
  std::vector<size_t> starts = ExtentStarts(bytes);
  ASSERT_GT(starts.size(), 5u);
  starts.push_back(bytes.size());
  const auto extent = [&](size_t i) {
    return std::span(bytes).subspan(starts[i], starts[i + 1] - starts[i]);
  };
  for (size_t damaged = 0; damaged + 1 < starts.size(); ++damaged) {
    Bytes missing;
    Bytes twice;
    Bytes swapped;
    for (size_t i = 0; i + 1 < starts.size(); ++i) {
      const auto append = [&](Bytes* to, size_t which) {
        to->insert(to->end(), extent(which).begin(), extent(which).end());
      };
      if (i != damaged) append(&missing, i);
      append(&twice, i);
      if (i == damaged) append(&twice, i);
      const bool last = damaged + 2 == starts.size();
      const size_t other = last ? damaged - 1 : damaged + 1;
      append(&swapped, i == damaged ? other : i == other ? damaged : i);
    }
    ASSERT_NO_FATAL_FAILURE(ExpectRefused(missing, "without " + std::to_string(damaged)));
    ASSERT_NO_FATAL_FAILURE(ExpectRefused(twice, "twice " + std::to_string(damaged)));
    ASSERT_NO_FATAL_FAILURE(ExpectRefused(swapped, "swapped " + std::to_string(damaged)));
  }
  // One of an earlier save of the same space.
  Bytes foreign = bytes;
  foreign[starts[2] + offsetof(ExtentHeader, save)] ^= std::byte{4};
  FixCrc(std::span(foreign).subspan(starts[2], starts[3] - starts[2]));
  ASSERT_NO_FATAL_FAILURE(ExpectRefused(foreign, "of another save"));
}

TEST_F(DamageTest, AnErrorNamesTheOffset) {
  Bytes bytes = SaveOf(60, 8);
  const size_t node = NodeStarts(bytes)[20];
  bytes[node + offsetof(SavedNode, zero)] = std::byte{1};
  const std::vector<size_t> starts = ExtentStarts(bytes);
  const size_t start = *std::prev(std::upper_bound(starts.begin(), starts.end(), node));
  const std::string of_extent = "offset " + std::to_string(start) + ":";
  EXPECT_NE(LoadResult(bytes).error().message.find(of_extent), std::string::npos);
  FixCrc(std::span(bytes).subspan(start, *PeekExtent(std::span(bytes).subspan(start))));
  EXPECT_NE(LoadResult(bytes).error().message.find("offset " + std::to_string(node) + ":"),
            std::string::npos);
}

// Whatever passes is a sound space with which one can go on.
class Mutator {
 public:
  Mutator(const Bytes& bytes, TestHeap* memory, const SpaceOptions& options)
      : original_(bytes),
        nodes_(NodeStarts(bytes)),
        lists_(LinksStarts(bytes)),
        memory_(memory),
        options_(options) {}

  // True where it was loaded all the same.
  bool Run(uint64_t seed) {
    SplitMix64 random(seed);
    Bytes bytes = original_;
    const uint64_t changes = 1 + random.Below(random.Below(2) == 0 ? 2 : 60);
    for (uint64_t i = 0; i < changes; ++i) {
      if (random.Below(5) == 0) {
        ChangeAnywhere(&random, &bytes);
      } else if (random.Below(2) == 0) {
        ChangeLinks(&random, &bytes, lists_[random.Below(lists_.size())]);
      } else {
        ChangeNode(&random, &bytes, nodes_[random.Below(nodes_.size())]);
      }
    }
    for (size_t at = 0; at < bytes.size();) {
      const Result<size_t> size = PeekExtent(std::span(bytes).subspan(at));
      if (!size || *size > bytes.size() - at) break;
      FixCrc(std::span(bytes).subspan(at, *size));
      at += *size;
    }
    Rig loaded(options_, memory_);
    if (!Load(bytes, &loaded.space).has_value()) return false;
    const Result<void> sound = loaded.space.CheckInvariants();
    EXPECT_TRUE(sound.has_value()) << sound.error().message;
    if (!sound) return true;
    for (int i = 0; i < 300; ++i) loaded.upkeep.Step(50);
    loaded.Settle();
    EXPECT_TRUE(loaded.space.CheckInvariants().has_value());
    EXPECT_EQ(loaded.space.unlinked_count(), 0u);
    RecallJob job(&memory_->heap);
    RunRecall(loaded.space, &job, std::vector<float>{1, 2, 3}, {.k = 5});
    return true;
  }

 private:
  static void Put32(Bytes* bytes, size_t at, uint32_t value) {
    std::memcpy(bytes->data() + at, &value, sizeof(value));
  }
  // A number that means something in most places.
  static uint32_t Likely(SplitMix64* random) {
    switch (random->Below(8)) {
      case 0:
        return kNoNode;
      case 1:
        return HnswGraph::kHole;
      case 2:
        return static_cast<uint32_t>(random->Next());
      case 3:
        return static_cast<uint32_t>(1) << random->Below(32);
      default:
        return static_cast<uint32_t>(random->Below(70));
    }
  }
  static void ChangeAnywhere(SplitMix64* random, Bytes* bytes) {
    const size_t at = random->Below(bytes->size());
    if (random->Below(2) == 0) {
      (*bytes)[at] = static_cast<std::byte>(random->Next());
    } else {
      Put32(bytes, std::min(at / 4 * 4, bytes->size() - 4), Likely(random));
    }
  }
  void ChangeNode(SplitMix64* random, Bytes* bytes, size_t at) const {
    SavedNode saved;
    SavedNode shape;  // as it was: its lengths may have been changed
    std::memcpy(&saved, bytes->data() + at, sizeof(saved));
    std::memcpy(&shape, original_.data() + at, sizeof(shape));
    switch (random->Below(5)) {
      case 0:
        saved.state = static_cast<SavedState>(random->Below(7));
        break;
      case 1:
        saved.flags ^= static_cast<uint8_t>(1 + random->Below(4));
        break;
      case 2:
        saved.begin += random->Below(200) - 100;
        if ((saved.flags & kSavedWasHidden) == 0) saved.content = saved.begin;
        break;
      case 3:
        saved.state = SavedState::kSuppressed;
        saved.end = saved.begin + 1;
        break;
      default:
        (*bytes)[at + shape.saved_bytes - 8] = std::byte{'i'};  // of its id
        break;
    }
    std::memcpy(bytes->data() + at, &saved, sizeof(saved));
  }
  void ChangeLinks(SplitMix64* random, Bytes* bytes, size_t at) const {
    SavedLinks saved;
    SavedLinks shape;
    std::memcpy(&saved, bytes->data() + at, sizeof(saved));
    std::memcpy(&shape, original_.data() + at, sizeof(shape));
    if (random->Below(20) == 0) saved.level = static_cast<uint8_t>(random->Below(4));
    if (random->Below(3) == 0) saved.parent = Likely(random);
    std::memcpy(bytes->data() + at, &saved, sizeof(saved));
    if (random->Below(3) == 0) return;
    // Mostly a link, now and then a length.
    const uint64_t word = random->Below(20) == 0 ? 0 : random->Below(shape.link_words);
    Put32(bytes, at + sizeof(saved) + word * sizeof(uint32_t), Likely(random));
  }

  const Bytes& original_;
  const std::vector<size_t> nodes_;
  const std::vector<size_t> lists_;
  TestHeap* memory_;
  const SpaceOptions options_;
};

TEST_F(DamageTest, WhateverPassesIsASoundSpace) {
  const Bytes bytes = SaveOf(50, 16);
  const size_t before = memory_.heap.live_bytes();
  Mutator mutator(bytes, &memory_, Options());
  uint64_t loaded = 0;
  for (uint64_t seed = 1; seed <= kMutations; ++seed) {
    loaded += static_cast<uint64_t>(mutator.Run(seed));
    ASSERT_FALSE(HasFailure()) << "seed " << seed;
    ASSERT_EQ(memory_.heap.live_bytes(), before) << "seed " << seed;
  }
  EXPECT_GT(loaded, kMutations / 20) << "most links and parents may be anything";
  EXPECT_LT(loaded, kMutations);
}

// A number that is no number must not get into distances.
TEST_F(DamageTest, NumbersThatAreNoneAreRefused) {
  const float bad[] = {std::numeric_limits<float>::quiet_NaN(),
                       std::numeric_limits<float>::infinity(),
                       -std::numeric_limits<float>::infinity()};
  const Bytes bytes = SaveOf(24, 8);
  const size_t node = NodeStarts(bytes)[1];
  const size_t start = ExtentStarts(bytes)[1];
  const size_t size = *PeekExtent(std::span(bytes).subspan(start));
  const size_t code = node + sizeof(SavedNode);
  const size_t exact = code + ReadSpaceExtent(bytes)->code_row_bytes;
  for (const float value : bad) {
    for (size_t i = 0; i < 3; ++i) {
      Bytes damaged = bytes;
      std::memcpy(damaged.data() + exact + i * sizeof(float), &value, sizeof(value));
      FixCrc(std::span(damaged).subspan(start, size));
      ASSERT_NO_FATAL_FAILURE(ExpectRefused(damaged, std::to_string(value)));
    }
    Bytes damaged = bytes;
    const double scale = double{value};
    std::memcpy(damaged.data() + code + 64, &scale, sizeof(scale));
    FixCrc(std::span(damaged).subspan(start, size));
    ASSERT_NO_FATAL_FAILURE(ExpectRefused(damaged, "scale " + std::to_string(value)));
  }
  Bytes padded = bytes;
  padded[exact + 3 * sizeof(float)] = std::byte{1};
  FixCrc(std::span(padded).subspan(start, size));
  ASSERT_NO_FATAL_FAILURE(ExpectRefused(padded, "padding of a row"));
}

// ---------------------------------------------------------------------------------------------
// Under change: quality

struct Op {
  enum class Kind { kUpsert, kDelete, kSuppress, kRestore };
  Kind kind = Kind::kUpsert;
  std::string id;
  CommitStamp stamp = 0;
  std::vector<float> vector = {};
  std::string payload = {};
};

std::vector<float> NormalVector(SplitMix64* random, uint32_t dimension) {
  std::vector<float> vector(dimension);
  for (float& value : vector) {
    value = -6;
    for (int i = 0; i < 12; ++i) value += static_cast<float>(random->Below(1 << 20)) * 0x1p-20F;
  }
  return vector;
}

double RecallAt10(const Rig& rig, RecallJob* job, const SpaceModel& model,
                  const std::vector<std::vector<float>>& queries) {
  size_t found = 0;
  for (const std::vector<float>& query : queries) {
    const RecallAnswer answer = RunRecall(rig.space, job, query, {.k = 10, .ef = 40});
    found += model.CountTrue(answer.hits, query, 10);
  }
  return static_cast<double>(found) / (10.0 * static_cast<double>(queries.size()));
}

// Updates, deletes, linking and sweeps go on during the save and change a good part of it; what is
// loaded, replayed and linked finds as much as a graph that was built at once.
TEST(SpaceCheckpointQualityTest, AGraphOfDifferentMomentsIsAsGoodAsANewOne) {
  constexpr uint32_t kDimension = 16;
  TestHeap memory(size_t{256} << 20);
  RecallJob job(&memory.heap);
  for (const uint32_t count : {400u, 6'000u}) {
    SCOPED_TRACE(count);
    SpaceOptions options =
        OptionsOf({Metric::kL2, Precision::kF32, Traversal::kInt8}, kDimension, 1);
    options.build.M = 12;
    options.build.M0 = 24;
    options.build.ef_construction = 60;
    SplitMix64 random(count);
    SpaceModel model(Metric::kL2);
    Rig original(options, &memory);
    CommitStamp stamp = 100;
    std::vector<Op> replayed;
    const auto store = [&](uint32_t number, bool is_replayed) {
      Op op{.id = "id" + std::to_string(number),
            .stamp = ++stamp,
            .vector = NormalVector(&random, kDimension)};
      original.Upsert(op.id, op.vector, op.stamp);
      model.entries()[op.id].vector = op.vector;
      if (is_replayed) replayed.push_back(std::move(op));
    };
    for (uint32_t i = 0; i < count; ++i) store(i, false);
    original.Settle();

    SpaceSaver saver(&memory.heap);
    Bytes bytes;
    Bytes buffer(kMaxExtentBytes);
    ASSERT_TRUE(saver.Begin(&original.space, stamp));
    while (!saver.done()) {
      const size_t written = saver.Step(buffer, 8);
      bytes.insert(bytes.end(), buffer.begin(), buffer.begin() + static_cast<ptrdiff_t>(written));
      for (int i = 0; i < 4; ++i)
        store(static_cast<uint32_t>(random.Below(count + count / 8)), true);
      original.space.SetHorizon(original.space.latest_stamp());
      for (int i = 0; i < 40; ++i) original.upkeep.Step(300);
    }
    ASSERT_GT(original.upkeep.sweeps(), 1u);

    Rig loaded(options, &memory);
    SpaceLoader loader(&loaded.space);
    ASSERT_TRUE(loader.Take(bytes).has_value());
    ASSERT_TRUE(loader.Finish().has_value());
    ASSERT_TRUE(loaded.space.CheckInvariants().has_value());
    EXPECT_GT(loaded.space.linked(), count / 2) << "most are still linked";
    for (const Op& op : replayed) loaded.Upsert(op.id, op.vector, op.stamp);
    loaded.Settle();
    ASSERT_TRUE(loaded.space.CheckInvariants().has_value());
    ASSERT_EQ(loaded.space.live(), model.entries().size());
    ASSERT_EQ(loaded.space.unlinked_count(), 0u);

    Rig fresh(options, &memory);
    for (const auto& [id, entry] : model.entries()) fresh.Upsert(id, entry.vector, ++stamp);
    fresh.Settle();
    std::vector<std::vector<float>> queries;
    for (int i = 0; i < 300; ++i) queries.push_back(NormalVector(&random, kDimension));
    const double of_fresh = RecallAt10(fresh, &job, model, queries);
    const double of_loaded = RecallAt10(loaded, &job, model, queries);
    RecordProperty("recall_" + std::to_string(count),
                   std::to_string(of_loaded) + " of " + std::to_string(of_fresh));
    EXPECT_GE(of_loaded, of_fresh - 0.01);
  }
}

// ---------------------------------------------------------------------------------------------
// Under change: random programs

struct Workshop {
  TestHeap memory{size_t{64} << 20};
  TestHeap other_memory{size_t{64} << 20};
  RecallJob job{&other_memory.heap};
  uint64_t reopened = 0;
  uint64_t duplicates = 0;
  uint64_t joined = 0;
  uint64_t dropped_links = 0;
};

// One space, its operations, saves of it, and what they become after a fall.
class Program {
 public:
  Program(uint64_t seed, Workshop* shop)
      : random_(seed),
        shop_(shop),
        dimension_(static_cast<uint32_t>(1 + random_.Below(5))),
        several_homes_(random_.Below(2) == 0),
        options_(DrawOptions()),
        rig_(options_, &shop->memory, "program") {
    rig_.in_log = random_.Below(2) == 0;
  }

  void Run() {
    ids_ = 1 + random_.Below(random_.Below(3) == 0 ? 80 : 20);
    const int saves = static_cast<int>(1 + random_.Below(2));
    for (int i = 0; i < saves; ++i) {
      Change(20 + random_.Below(120));
      ASSERT_NO_FATAL_FAILURE(SaveUnderChange(/*abort=*/i + 1 < saves && random_.Below(2) == 0));
      // The next save's log begins later.
      if (i + 1 < saves) continue;
      ASSERT_NO_FATAL_FAILURE(Change(random_.Below(40)));
      ASSERT_NO_FATAL_FAILURE(FallAndRise());
    }
  }

 private:
  SpaceOptions DrawOptions() {
    constexpr Metric kMetrics[] = {Metric::kCosine, Metric::kInnerProduct, Metric::kL2};
    HnswBuildParams build;
    build.M = static_cast<uint32_t>(2 + random_.Below(3));
    build.M0 = static_cast<uint32_t>(std::max<uint64_t>(build.M, 3) + random_.Below(4));
    build.ef_construction = static_cast<uint32_t>(1 + random_.Below(12));
    build.seed = random_.Next();
    SpaceOptions options =
        TestSpaceOptions(kMetrics[random_.Below(3)], random_.Below(2) == 0 ? 0 : dimension_, build);
    options.traversal = random_.Below(2) == 0 ? Traversal::kInt8 : Traversal::kExact;
    if (options.metric != Metric::kCosine && random_.Below(3) == 0) {
      options.precision = Precision::kBf16;
    }
    options.graph_from = static_cast<uint32_t>(random_.Below(3) != 0 ? 0 : random_.Below(20));
    return options;
  }

  CommitStamp NextStamp() {
    if (several_homes_ && random_.Below(3) == 0 && last_ > complete_ + 1) {
      const CommitStamp stamp = complete_ + 1 + random_.Below(last_ - complete_);
      if (used_.insert(stamp).second) return stamp;
    }
    last_ += 1 + random_.Below(several_homes_ ? 4 : 2);
    used_.insert(last_);
    return last_;
  }
  uint64_t HomeOf(CommitStamp stamp) const { return several_homes_ ? stamp % kHomes : 0; }

  static void Apply(const Op& op, Rig* rig, bool several_homes) {
    StoreOutcome outcome;
    switch (op.kind) {
      case Op::Kind::kUpsert:
        outcome = rig->Upsert(op.id, op.vector, op.stamp, op.payload, several_homes);
        break;
      case Op::Kind::kDelete:
        outcome = rig->space.Delete(op.id, op.stamp, several_homes);
        break;
      case Op::Kind::kSuppress:
        outcome = rig->space.Suppress(op.id, op.stamp, several_homes);
        break;
      case Op::Kind::kRestore:
        outcome = rig->space.Restore(op.id, op.stamp);
        break;
    }
    ASSERT_EQ(outcome.reason, RefusalReason::kNone);
  }

  void Operate() {
    const uint64_t what = random_.Below(20);
    Op op;
    op.id = "id" + std::to_string(random_.Below(ids_));
    op.stamp = NextStamp();
    if (what < 9) {
      op.kind = Op::Kind::kUpsert;
      op.vector = QuarterVector(&random_, dimension_);
      op.payload = std::string(random_.Below(20), 'p') + std::to_string(op.stamp);
    } else if (what < 12) {
      op.kind = Op::Kind::kDelete;
    } else {
      op.kind = what < 16 ? Op::Kind::kSuppress : Op::Kind::kRestore;
    }
    ASSERT_NO_FATAL_FAILURE(Apply(op, &rig_, several_homes_));
    if (replay_from_.has_value()) {
      CommitStamp& from = (*replay_from_)[HomeOf(op.stamp)];
      from = std::min(from, op.stamp);
    }
    ops_.push_back(std::move(op));
  }

  void ChangeOnce() {
    if (random_.Below(30) == 0 && !rig_.space.is_rebuilding()) {
      rig_.space.BeginRebuild(1 + random_.Below(30));
    }
    const uint64_t what = random_.Below(100);
    if (what < 45) {
      ASSERT_NO_FATAL_FAILURE(Operate());
    } else if (what < 70) {
      rig_.upkeep.Step(static_cast<uint32_t>(1 + random_.Below(30)));
    } else if (what < 78) {
      for (int i = 0; i < 40; ++i) rig_.upkeep.Step(20);
    } else if (what < 88) {
      complete_ =
          std::max(complete_, last_ - std::min(last_, random_.Below(several_homes_ ? 20 : 1)));
      // The shard holds tombstones from the moment on at which a checkpoint notes its stamps.
      rig_.space.ForgetTombstones(hold_ == kNoStamp ? complete_ : std::min(complete_, hold_));
      if (save_active_) rig_.space.ForgetTombstones(complete_);
      rig_.space.SetHorizon(random_.Below(2) == 0 ? rig_.space.latest_stamp() : complete_);
    } else if (!rig_.upkeep.linker().active() && !rig_.upkeep.sweep().active()) {
      rig_.space.Reclaim(1 + random_.Below(30));
    }
  }
  void Change(uint64_t steps) {
    for (uint64_t i = 0; i < steps; ++i) {
      ASSERT_NO_FATAL_FAILURE(ChangeOnce());
    }
  }

  void SaveUnderChange(bool abort) {
    replay_from_.emplace();
    replay_from_->fill(kOpenStamp);
    hold_ = complete_;
    ASSERT_NO_FATAL_FAILURE(Change(random_.Below(2) == 0 ? 0 : random_.Below(40)));
    SpaceSaver saver(&shop_->memory.heap);
    ASSERT_TRUE(saver.Begin(&rig_.space, hold_));
    save_active_ = true;
    bytes_.clear();
    Bytes buffer(random_.Below(2) == 0 ? kMaxExtentBytes : 4'000);
    const uint64_t pace = 1 + random_.Below(30);
    for (uint64_t slices = 0; !saver.done(); ++slices) {
      if (abort && slices > 3) break;
      const size_t written = saver.Step(buffer, 1 + random_.Below(8));
      bytes_.insert(bytes_.end(), buffer.begin(), buffer.begin() + static_cast<ptrdiff_t>(written));
      ASSERT_NO_FATAL_FAILURE(Change(random_.Below(pace)));
      if (random_.Below(8) == 0) {
        const Result<void> sound = rig_.space.CheckInvariants();
        ASSERT_TRUE(sound.has_value()) << sound.error().message;
      }
    }
    saver.Abort();
    save_active_ = false;
    hold_ = kNoStamp;
  }

  // What is replayed, in the order of stamps, or any that keeps each home's.
  std::vector<const Op*> ToReplay(bool in_stamp_order) {
    std::array<std::vector<const Op*>, kHomes> homes;
    for (const Op& op : ops_) {
      const uint64_t home = HomeOf(op.stamp);
      if (op.stamp >= (*replay_from_)[home]) homes[home].push_back(&op);
    }
    const auto by_stamp = [](const Op* a, const Op* b) { return a->stamp < b->stamp; };
    std::vector<const Op*> order;
    for (auto& home : homes) {
      std::sort(home.begin(), home.end(), by_stamp);
      order.insert(order.end(), home.begin(), home.end());
    }
    if (in_stamp_order) {
      std::sort(order.begin(), order.end(), by_stamp);
      return order;
    }
    order.clear();
    std::array<size_t, kHomes> next{};
    for (;;) {
      std::vector<uint64_t> left;
      for (uint64_t home = 0; home < kHomes; ++home) {
        if (next[home] < homes[home].size()) left.push_back(home);
      }
      if (left.empty()) return order;
      const uint64_t home = left[random_.Below(left.size())];
      order.push_back(homes[home][next[home]++]);
    }
  }

  // By the order of the stamps alone.
  struct Expected {
    const Op* content = nullptr;  // nullptr: never stored, or deleted
    bool is_hidden = false;
  };
  std::map<std::string, Expected> ByStamps() const {
    std::vector<const Op*> order;
    for (const Op& op : ops_) order.push_back(&op);
    std::sort(order.begin(), order.end(),
              [](const Op* a, const Op* b) { return a->stamp < b->stamp; });
    std::map<std::string, Expected> expected;
    for (const Op* op : order) {
      Expected& of = expected[op->id];
      switch (op->kind) {
        case Op::Kind::kUpsert:
          of = {op, false};
          break;
        case Op::Kind::kDelete:
          of = {};
          break;
        case Op::Kind::kSuppress:
          of.is_hidden = of.content != nullptr;
          break;
        case Op::Kind::kRestore:
          of.is_hidden = false;
          break;
      }
    }
    return expected;
  }

  void FallAndRise() {
    SpaceOptions options = options_;
    options.hash_seed = random_.Next();
    Rig risen(options, &shop_->memory, "program");
    risen.in_log = rig_.in_log;
    SpaceLoader loader(&risen.space);
    const Result<void> taken = loader.Take(bytes_);
    ASSERT_TRUE(taken.has_value()) << taken.error().message;
    const Result<void> finished = loader.Finish();
    ASSERT_TRUE(finished.has_value()) << finished.error().message;
    ASSERT_NO_FATAL_FAILURE(ExpectSound(risen)) << "loaded";
    shop_->duplicates += loader.ended_duplicates();
    shop_->joined += loader.graph().joined_groups();
    shop_->dropped_links += loader.graph().dropped_links();

    const bool in_stamp_order = !several_homes_ || random_.Below(2) == 0;
    for (const Op* op : ToReplay(in_stamp_order)) {
      ASSERT_NO_FATAL_FAILURE(Apply(*op, &risen, several_homes_));
      if (random_.Below(4) == 0) risen.upkeep.Step(20);
    }
    ASSERT_NO_FATAL_FAILURE(ExpectSound(risen)) << "replayed";
    ASSERT_NO_FATAL_FAILURE(Compare(risen, in_stamp_order));
    risen.space.ForgetTombstones(last_);
    risen.Settle();
    ASSERT_NO_FATAL_FAILURE(ExpectSound(risen)) << "settled";
    if (risen.space.has_graph()) {
      ASSERT_EQ(risen.space.unlinked_count(), 0u);
    }
    ASSERT_NO_FATAL_FAILURE(RecallAll(risen));
  }

  static void ExpectSound(const Rig& rig) {
    const Result<void> sound = rig.space.CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
  }

  // Contents are those of the latest stamps. What arrived in another order than that of the stamps
  // may be hidden as it was, or as if it had come in order.
  void Compare(const Rig& risen, bool in_stamp_order) {
    uint64_t contents = 0;
    for (const auto& [id, expected] : ByStamps()) {
      const NodeId before = rig_.space.FindLive(id);
      const NodeId after = risen.space.FindLive(id);
      if (expected.content == nullptr) {
        ASSERT_EQ(before, kNoNode) << id;
        ASSERT_EQ(after, kNoNode) << id << " was deleted";
        continue;
      }
      ++contents;
      if (!several_homes_) {
        ASSERT_EQ(before == kNoNode, expected.is_hidden) << id;
      }
      const bool is_hidden = after == kNoNode;
      if (in_stamp_order) {
        ASSERT_TRUE(is_hidden == expected.is_hidden || is_hidden == (before == kNoNode))
            << id << (is_hidden ? " is hidden, or lost" : " is live");
      }
      if (is_hidden) continue;
      const StoredObservation stored = risen.space.Get(after);
      ASSERT_EQ(stored.origin, rig_.in_log ? expected.content->stamp * 8 : kNoLogAddress) << id;
      ASSERT_EQ(stored.payload_bytes, expected.content->payload.size()) << id;
      ASSERT_EQ(stored.when_ns, static_cast<int64_t>(expected.content->stamp) * 7);
      ASSERT_EQ(risen.PayloadOf(after), rig_.in_log ? "" : expected.content->payload) << id;
      if (before == kNoNode) continue;
      std::vector<float> a(dimension_);
      std::vector<float> b(dimension_);
      rig_.space.GetVector(before, a.data());
      risen.space.GetVector(after, b.data());
      ASSERT_EQ(a, b) << id;
    }
    ASSERT_EQ(risen.space.live() + risen.space.hidden(), contents) << "live and hidden ones";
  }

  // Each live one by its vector.
  void RecallAll(const Rig& risen) {
    SpaceModel model(options_.metric);
    for (const auto& [id, expected] : ByStamps()) {
      const NodeId node = risen.space.FindLive(id);
      if (node == kNoNode) continue;
      model.entries()[id] = {expected.content->vector, expected.content->payload,
                             risen.space.Get(node).when_ns, 0.25F};
    }
    for (const auto& [id, entry] : model.entries()) {
      const RecallAnswer answer = RunRecall(risen.space, &shop_->job, entry.vector,
                                            {.k = 3, .ef = 1'000, .with_payload = !rig_.in_log});
      ASSERT_NO_FATAL_FAILURE(
          model.ExpectExact(answer.hits, entry.vector, 3, /*with_payload=*/!rig_.in_log))
          << id;
    }
  }

  static constexpr uint64_t kHomes = 3;

  SplitMix64 random_;
  Workshop* shop_;
  const uint32_t dimension_;
  const bool several_homes_;
  const SpaceOptions options_;
  Rig rig_;
  uint64_t ids_ = 1;
  CommitStamp last_ = 100;
  CommitStamp complete_ = 1;
  std::set<CommitStamp> used_;
  std::vector<Op> ops_;
  // The checkpoint: by home, the stamp of the first that is replayed.
  std::optional<std::array<CommitStamp, kHomes>> replay_from_;
  CommitStamp hold_ = kNoStamp;
  bool save_active_ = false;
  Bytes bytes_;
};

// ENGRAM_PROGRAM names one seed to run again.
TEST(SpaceCheckpointProgramsTest, EveryProgramRisesAsItFell) {
  Workshop shop;
  if (const char* seed = std::getenv("ENGRAM_PROGRAM"); seed != nullptr) {
    Program(std::strtoull(seed, nullptr, 10), &shop).Run();
    return;
  }
  for (uint64_t seed = 1; seed <= kPrograms; ++seed) {
    ASSERT_NO_FATAL_FAILURE(Program(seed, &shop).Run()) << "ENGRAM_PROGRAM=" << seed;
    ASSERT_EQ(shop.memory.heap.live_bytes(), 0u) << "ENGRAM_PROGRAM=" << seed;
  }
  // The programs come to what they are for.
  EXPECT_GT(shop.duplicates, kPrograms / 10);
  EXPECT_GT(shop.joined, kPrograms / 10);
  EXPECT_GT(shop.dropped_links, kPrograms / 10);
}

}  // namespace
}  // namespace engram
