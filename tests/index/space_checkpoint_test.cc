// Spaces that are saved and loaded at rest, in slices of any size.

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "index/checkpoint/space_extent.h"
#include "index/checkpoint/space_loader.h"
#include "index/checkpoint/space_saver.h"
#include "index/recall_job.h"
#include "src/core/hash.h"
#include "tests/index/space_checkpoint_rig.h"
#include "tests/support/allocation_counter.h"

namespace engram {
namespace {

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
    CheckpointRig original(OptionsOf(form, kDimension, 1), &memory);
    Fill(&original, 900, kDimension, 5);
    ASSERT_GT(original.space.linked(), 500u);
    ASSERT_GT(original.space.unlinked_count(), 20u);
    ASSERT_GT(original.space.hidden(), 10u);
    ASSERT_GT(original.space.tombstones(), 10u);
    ASSERT_GT(original.space.retired(), 10u);
    const Bytes bytes = Save(&original, &memory);

    CheckpointRig loaded(OptionsOf(form, 0, 2), &memory);
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
  SpaceOptions options = OptionsOf(kL2Form, 4, 1);
  options.graph_from = 0;
  SplitMix64 random(2);
  int tried = 0;
  for (uint64_t seed = 1; tried < 5; ++seed) {
    options.build.seed = seed;
    CheckpointRig original(options, &memory);
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
    CheckpointRig loaded(options, &memory);
    ASSERT_NO_FATAL_FAILURE(LoadAll(Save(&original, &memory), &loaded.space));
    EXPECT_EQ(loaded.space.TargetFor(nullptr).graph->entry_point(), graph.entry_point());
  }
}

TEST(SpaceCheckpointTest, KeepsEverythingOfAnObservation) {
  TestHeap memory(size_t{64} << 20);
  CheckpointRig original(OptionsOf(kL2Form, 4, 1), &memory);
  const std::vector<float> vector{1, 2, 3, 4};
  const std::string long_id(kMaxIdBytes, 'i');
  original.Upsert(long_id, vector, 50, std::string(kMaxPayloadBytes, 'x'));
  original.Upsert("hidden", vector, 51, "gone");
  original.space.Suppress("hidden", 60, true);
  CheckpointRig loaded(OptionsOf(kL2Form, 4, 3), &memory);
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
  CheckpointRig bare(OptionsOf(kL2Form, 4, 3), &memory);
  ASSERT_NO_FATAL_FAILURE(LoadAll(bytes, &bare.space));
  EXPECT_EQ(bare.PayloadOf(bare.space.FindLive(long_id)), "");
}

TEST(SpaceCheckpointTest, PayloadsInALogStayThere) {
  TestHeap memory(size_t{64} << 20);
  CheckpointRig original(OptionsOf(kL2Form, 4, 1), &memory);
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
  CheckpointRig loaded(OptionsOf(kL2Form, 4, 3), &memory);
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
    CheckpointRig original(
        OptionsOf({Metric::kCosine, Precision::kF32, Traversal::kInt8}, dimension, 1), &memory);
    Bytes bytes = Save(&original, &memory);
    CheckpointRig loaded(OptionsOf({Metric::kCosine, Precision::kF32, Traversal::kInt8}, 0, 1),
                         &memory);
    ASSERT_NO_FATAL_FAILURE(LoadAll(bytes, &loaded.space));
    EXPECT_EQ(loaded.space.dimension(), dimension);
    EXPECT_EQ(loaded.space.live(), 0u);
  }
  // Tombstones come before there is a dimension, and vectors while it is saved.
  CheckpointRig original(OptionsOf(kL2Form, 0, 1), &memory);
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
  CheckpointRig loaded(OptionsOf(kL2Form, 0, 1), &memory);
  ASSERT_NO_FATAL_FAILURE(LoadAll(bytes, &loaded.space));
  EXPECT_EQ(loaded.space.dimension(), 0u);
  EXPECT_EQ(loaded.space.tombstones(), 1u);
  EXPECT_EQ(loaded.space.live(), 0u);
}

TEST(SpaceCheckpointTest, RowsOfAnotherFormAreEncodedAgain) {
  TestHeap memory(size_t{256} << 20);
  constexpr uint32_t kDimension = 12;
  constexpr uint32_t kNodes = 300;
  const auto fill = [&](CheckpointRig* rig) {
    SplitMix64 random(4);
    for (uint32_t i = 0; i < kNodes; ++i) {
      rig->Upsert("id" + std::to_string(i), QuarterVector(&random, kDimension), 10 + i);
    }
    rig->Settle();
  };
  const std::vector<Form> forms = AllForms();
  for (const Form& from : forms) {
    CheckpointRig original(OptionsOf(from, kDimension, 1), &memory);
    fill(&original);
    const Bytes bytes = Save(&original, &memory);
    for (const Form& to : forms) {
      if (to.metric != from.metric) continue;
      CheckpointRig loaded(OptionsOf(to, kDimension, 2), &memory);
      ASSERT_NO_FATAL_FAILURE(LoadAll(bytes, &loaded.space));
      EXPECT_EQ(loaded.space.linked(), kNodes) << "links need no rows";
      if (from.precision != Precision::kF32) continue;
      // As if it had been stored so, where nothing was lost.
      CheckpointRig direct(OptionsOf(to, kDimension, 2), &memory);
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
  CheckpointRig original(OptionsOf(kL2Form, 8, 1), &memory);
  Fill(&original, 400, 8, 9);
  const Bytes bytes = Save(&original, &memory);
  for (const auto& [M, M0] : {std::pair(6u, 14u), std::pair(5u, 12u)}) {
    SpaceOptions options = OptionsOf(kL2Form, 8, 1);
    options.build.M = M;
    options.build.M0 = M0;
    CheckpointRig loaded(options, &memory);
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
  CheckpointRig original(OptionsOf(kL2Form, 4, 1), &memory);
  const Bytes bytes = Save(&original, &memory);
  const auto code_of = [&](const SpaceOptions& options, const std::string& name) {
    CheckpointRig rig(options, &memory, name);
    const Result<void> loaded = Load(bytes, &rig.space);
    EXPECT_FALSE(loaded.has_value());
    return loaded.has_value() ? ErrorCode::kInternal : loaded.error().code;
  };
  EXPECT_EQ(code_of(OptionsOf(kL2Form, 4, 1), "other"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of(OptionsOf(kL2Form, 5, 1), "saved"), ErrorCode::kInvalidArgument);
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
  CheckpointRig original(OptionsOf(kL2Form, 4, 1), &memory);
  Bytes bytes = Save(&original, &memory);
  bytes[4] = std::byte{kExtentVersion + 1};
  FixCrc(std::span(bytes).first(*PeekExtent(bytes)));
  CheckpointRig loaded(OptionsOf(kL2Form, 4, 1), &memory);
  const Result<void> result = Load(bytes, &loaded.space);
  ASSERT_FALSE(result.has_value());
  EXPECT_EQ(result.error().code, ErrorCode::kInvalidArgument);
  EXPECT_NE(result.error().message.find("versions 2 to 3"), std::string::npos);
}

// In as many ways as they can be there.
TEST(SpaceCheckpointTest, AttributesComeBackWithTheirObservations) {
  TestHeap memory(size_t{32} << 20);
  const SpaceOptions options = OptionsOf(kL2Form, 3, 5);
  CheckpointRig rig(options, &memory);
  for (CommitStamp stamp = 1; stamp <= 300; ++stamp) {
    const std::vector<float> vector = {static_cast<float>(stamp), 1, 2};
    rig.Upsert("id" + std::to_string(stamp), vector, stamp, "payload");
  }
  rig.space.Suppress("id8", 301, false);
  rig.space.Suppress("id16", 302, false);
  rig.space.Restore("id16", 303);
  rig.space.Delete("id20", 304, false);
  const Bytes saved = Save(&rig, &memory);
  CheckpointRig loaded(options, &memory);
  ASSERT_NO_FATAL_FAILURE(LoadAll(saved, &loaded.space));
  EXPECT_EQ(loaded.space.Restore("id8", 305).existed, true);
  for (CommitStamp stamp = 1; stamp <= 300; ++stamp) {
    const NodeId node = loaded.space.FindLive("id" + std::to_string(stamp));
    ASSERT_EQ(node == kNoNode, stamp == 20);
    if (node == kNoNode) continue;
    EXPECT_EQ(loaded.AttributesOf(node), CheckpointRig::AttributesAt(stamp)) << stamp;
    EXPECT_TRUE(loaded.space.times().Has(node, static_cast<int64_t>(stamp) * 7)) << stamp;
  }
}

TEST(SpaceCheckpointTest, TheVersionBeforeAttributesIsReadAndHasNone) {
  TestHeap memory(size_t{32} << 20);
  const SpaceOptions options = OptionsOf(kL2Form, 3, 5);
  for (const bool with_attributes : {false, true}) {
    CheckpointRig rig(options, &memory);
    rig.with_attributes = with_attributes;
    for (CommitStamp stamp = 1; stamp <= 200; ++stamp) {
      const std::vector<float> vector = {static_cast<float>(stamp), 1, 2};
      rig.Upsert("id" + std::to_string(stamp), vector, stamp, "payload");
    }
    Bytes saved = Save(&rig, &memory);
    for (const size_t start : ExtentStarts(saved)) {
      const std::span<std::byte> rest = std::span(saved).subspan(start);
      saved[start + 4] = std::byte{kOldestExtentVersion};
      FixCrc(rest.first(*PeekExtent(rest)));
    }
    CheckpointRig loaded(options, &memory);
    const Result<void> read = Load(saved, &loaded.space);
    EXPECT_EQ(read.has_value(), !with_attributes);
    if (with_attributes) {
      EXPECT_EQ(read.error().code, ErrorCode::kCorrupt);
    } else {
      EXPECT_EQ(loaded.space.live(), 200u);
      EXPECT_EQ(loaded.space.attributes().nodes(), 0u);
    }
  }
}

TEST(SpaceCheckpointTest, FullMemoryIsAnError) {
  TestHeap memory(size_t{64} << 20);
  CheckpointRig original(OptionsOf(kL2Form, 8, 1), &memory);
  Fill(&original, 600, 8, 9);
  const Bytes bytes = Save(&original, &memory);
  TestHeap enough(size_t{8} << 20);
  {
    CheckpointRig loaded(OptionsOf(kL2Form, 8, 1), &enough);
    ASSERT_NO_FATAL_FAILURE(LoadAll(bytes, &loaded.space));
  }
  const size_t needed = enough.arena.used_bytes();
  for (size_t room = 0; room < needed; room += needed / 41) {
    TestHeap little(size_t{8} << 20);
    CheckpointRig loaded(OptionsOf(kL2Form, 8, 1), &little);
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
  CheckpointRig original(OptionsOf(kL2Form, 8, 1), &memory);
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
    CheckpointRig loaded(OptionsOf(kL2Form, 8, 1), &memory);
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
  CheckpointRig original(OptionsOf(kL2Form, 2, 1), &memory);
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
  CheckpointRig loaded(OptionsOf(kL2Form, 2, 1), &memory);
  ASSERT_NO_FATAL_FAILURE(LoadAll(bytes, &loaded.space));
  EXPECT_EQ(loaded.space.live(), 7u);
  EXPECT_EQ(loaded.space.hidden(), 1u);
}

}  // namespace
}  // namespace engram
