// Spaces that are loaded from bytes that are not what was saved.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "index/checkpoint/space_extent.h"
#include "index/checkpoint/space_saver.h"
#include "index/recall_job.h"
#include "src/core/hash.h"
#include "src/core/reader_epochs.h"
#include "tests/index/space_checkpoint_rig.h"
#include "tests/sim/program_seeds.h"

namespace engram {
namespace {

constexpr uint64_t kMutations = UsualSeeds(15'000, 1'500);

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

class SpaceCheckpointDamageTest : public testing::Test {
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
    CheckpointRig original(Options(), &memory_);
    Fill(&original, count, 3, 6, more);
    SpaceSaver saver(&memory_.heap);
    EXPECT_TRUE(saver.Begin(&original.space, 1));
    Bytes bytes;
    Bytes buffer(kMaxExtentBytes);
    while (!saver.done()) {
      SaveStep(&saver, slice, &buffer, &bytes);
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

TEST_F(SpaceCheckpointDamageTest, EveryFlippedBitIsNoticed) {
  Bytes bytes = SaveOf(10, 4, 2);
  ASSERT_TRUE(LoadResult(bytes).has_value());
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    ASSERT_NO_FATAL_FAILURE(ExpectRefused(bytes, "bit " + std::to_string(bit)));
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
  }
  ASSERT_TRUE(LoadResult(bytes).has_value());
}

TEST_F(SpaceCheckpointDamageTest, FlippedBitsOfALargeSaveAreNoticed) {
  Bytes bytes = SaveOf(1'500, 64);
  SplitMix64 random(12);
  for (int i = 0; i < 200; ++i) {
    const size_t bit = random.Below(bytes.size() * 8);
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    ASSERT_NO_FATAL_FAILURE(ExpectRefused(bytes, "bit " + std::to_string(bit)));
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
  }
}

TEST_F(SpaceCheckpointDamageTest, EveryCutIsNoticed) {
  const Bytes bytes = SaveOf(10, 4, 2);
  for (size_t size = 0; size < bytes.size(); ++size) {
    ASSERT_NO_FATAL_FAILURE(
        ExpectRefused(std::span(bytes).first(size), std::to_string(size) + " bytes"));
  }
  Bytes longer = bytes;
  longer.resize(bytes.size() + 8);
  ASSERT_NO_FATAL_FAILURE(ExpectRefused(longer, "bytes behind the end"));
}

TEST_F(SpaceCheckpointDamageTest, MissingRepeatedAndForeignExtentsAreNoticed) {
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

TEST_F(SpaceCheckpointDamageTest, AnErrorNamesTheOffset) {
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
    CheckpointRig loaded(options_, memory_);
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

TEST_F(SpaceCheckpointDamageTest, WhateverPassesIsASoundSpace) {
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
TEST_F(SpaceCheckpointDamageTest, NumbersThatAreNoneAreRefused) {
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

}  // namespace
}  // namespace engram
