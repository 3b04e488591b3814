#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "index/checkpoint/space_extent.h"
#include "index/checkpoint/space_loader.h"
#include "index/checkpoint/space_saver.h"
#include "index/space.h"
#include "src/core/commit_stamp.h"
#include "src/core/crc32c.h"
#include "src/core/hash.h"
#include "src/core/reader_epochs.h"
#include "tests/index/space_testing.h"
#include "tests/index/space_upkeep.h"

// Spaces that are saved and loaded.

namespace engram {

using Bytes = std::vector<std::byte>;

inline HnswBuildParams SmallBuild() {
  HnswBuildParams build;
  build.M = 6;
  build.M0 = 12;
  build.ef_construction = 30;
  return build;
}

// A space with all that works on it.
struct CheckpointRig {
  CheckpointRig(const SpaceOptions& options, TestHeap* memory, const std::string& name = "saved")
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
    const std::string attributes = with_attributes ? AttributesAt(stamp) : "";
    observation.attributes = BytesOf(attributes);
    if (in_log) {
      observation.origin = stamp * 8;
      observation.record_bytes = static_cast<uint32_t>(
          LogRecordBytes(space.name().size(), vector.size_bytes(), id.size(), payload.size()));
    }
    return space.Upsert(observation, stamp, several_homes);
  }
  // Some have none, some are alike.
  static std::string AttributesAt(CommitStamp stamp) {
    std::string attributes;
    const auto add = [&attributes](std::string_view key, CommitStamp value) {
      EXPECT_TRUE(AppendAttribute(key, std::to_string(value), &attributes));
    };
    if (stamp % 3 != 0) add("", stamp % 5);
    if (stamp % 4 == 0) add("who", stamp);
    return attributes;
  }
  std::string AttributesOf(NodeId node) const {
    std::string attributes(space.attributes().AttributeBytes(node), '\0');
    space.attributes().WriteAttributes(node, reinterpret_cast<std::byte*>(attributes.data()));
    return attributes;
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

  bool in_log = false;          // what is upserted
  bool with_attributes = true;  // likewise
  ReaderEpochs epochs{1};
  Space space;
  SpaceUpkeep upkeep;
};

// One step with the room of `buffer`; appends what it writes, and says how many bytes those are.
inline size_t SaveStep(SpaceSaver* saver, size_t nodes, Bytes* buffer, Bytes* to) {
  const size_t written = saver->Step(*buffer, nodes);
  to->insert(to->end(), buffer->begin(), buffer->begin() + static_cast<ptrdiff_t>(written));
  return written;
}

// The rest of a save, in one go.
inline void SaveRest(SpaceSaver* saver, Bytes* to) {
  Bytes buffer(kMaxExtentBytes);
  while (!saver->done()) {
    ASSERT_GT(SaveStep(saver, 64, &buffer, to), 0u) << "an extent fits in the largest one's room";
  }
}

inline Bytes Save(CheckpointRig* rig, TestHeap* memory, CommitStamp hold = 1) {
  SpaceSaver saver(&memory->heap);
  Bytes bytes;
  EXPECT_TRUE(saver.Begin(&rig->space, hold));
  SaveRest(&saver, &bytes);
  return bytes;
}

inline Result<void> Load(std::span<const std::byte> bytes, Space* space) {
  SpaceLoader loader(space);
  if (Result<void> taken = loader.Take(bytes); !taken) return taken;
  return loader.Finish();
}

inline void LoadAll(std::span<const std::byte> bytes, Space* space) {
  const Result<void> loaded = Load(bytes, space);
  ASSERT_TRUE(loaded.has_value()) << loaded.error().message;
  const Result<void> sound = space->CheckInvariants();
  ASSERT_TRUE(sound.has_value()) << sound.error().message;
}

inline std::vector<size_t> ExtentStarts(std::span<const std::byte> bytes) {
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

inline void FixCrc(std::span<std::byte> extent) {
  const uint32_t crc = Crc32c(extent.subspan(16), Crc32c(extent.first(kExtentCrcOffset)));
  std::memcpy(extent.data() + kExtentCrcOffset, &crc, sizeof(crc));
}

struct Form {
  Metric metric;
  Precision precision;
  Traversal traversal;
};
inline constexpr Form kL2Form{Metric::kL2, Precision::kF32, Traversal::kInt8};

inline SpaceOptions OptionsOf(const Form& form, uint32_t dimension, uint64_t hash_seed) {
  SpaceOptions options = TestSpaceOptions(form.metric, dimension, SmallBuild(), hash_seed);
  options.precision = form.precision;
  options.traversal = form.traversal;
  options.graph_from = 100;
  return options;
}

// Some of everything: linked, unlinked, retired, hidden, restored, free places, tombstones.
inline void Fill(CheckpointRig* rig, uint32_t count, uint32_t dimension, uint64_t seed,
                 uint32_t more = 20) {
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

// Of a log that is replayed over what was loaded.
struct LoggedOp {
  enum class Kind { kUpsert, kDelete, kSuppress, kRestore };
  Kind kind = Kind::kUpsert;
  std::string id;
  CommitStamp stamp = 0;
  std::vector<float> vector = {};
  std::string payload = {};
};

}  // namespace engram
