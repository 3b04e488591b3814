#include "dataplane/frame_assembler.h"

#include <gtest/gtest.h>

#include <memory>
#include <random>

#include "tests/dataplane/wire.h"

namespace engram {
namespace {

constexpr size_t kBlock = PartialBlockPool::kBlockBytes;

PartialBlockPool MakePool(size_t blocks) {
  auto pool = PartialBlockPool::Create(blocks, HugePagePolicy::kOff);
  EXPECT_TRUE(pool.has_value());
  return *std::move(pool);
}

size_t BlocksFor(size_t bytes) { return (bytes + kBlock - 1) / kBlock; }

// An assembler with its pool, and what came out of it.
struct Assembly {
  explicit Assembly(size_t blocks) : pool(MakePool(blocks)), total(pool.free_blocks()) {}
  FrameAssembler::Outcome Feed(std::span<const std::byte> bytes) {
    // A copy of the exact size, so that ASan sees a read beyond it.
    const auto exact = std::make_unique<std::byte[]>(bytes.size());
    std::memcpy(exact.get(), bytes.data(), bytes.size());
    auto outcome =
        assembler.Feed(std::span<const std::byte>(exact.get(), bytes.size()), &pool, scratch,
                       [&](const FrameHeader& header, std::span<const std::byte> frame) {
                         EXPECT_EQ(frame.size(), 32 + header.length);
                         gathered += frame.data() == scratch.data() ? 1 : 0;
                         frames.emplace_back(frame.begin(), frame.end());
                         return frames.size() != stop_after;
                       });
    // `rest` points into the copy; what it says is kept as a count.
    rest = outcome.rest.size();
    outcome.rest = {};
    return outcome;
  }
  size_t held() const { return total - pool.free_blocks(); }

  PartialBlockPool pool;
  size_t total;
  std::vector<std::byte> scratch = std::vector<std::byte>(32 + 1'048'576);
  FrameAssembler assembler;
  std::vector<WireBytes> frames;
  size_t gathered = 0;
  size_t stop_after = SIZE_MAX;
  size_t rest = 0;
};

WireBytes RandomFrame(std::mt19937_64& random, size_t body_bytes) {
  WireBytes body(body_bytes);
  for (std::byte& byte : body) byte = static_cast<std::byte>(random());
  return MakeFrame(
      static_cast<uint8_t>(random()),
      {.flags = static_cast<uint16_t>(random()), .session = random(), .sequence = random()}, body);
}
WireBytes Joined(std::span<const WireBytes> frames) {
  WireBytes stream;
  for (const WireBytes& frame : frames) stream.insert(stream.end(), frame.begin(), frame.end());
  return stream;
}

TEST(PartialBlockPoolTest, HandsOutEachBlockOnce) {
  PartialBlockPool pool = MakePool(5);
  std::vector<uint32_t> blocks;
  for (int i = 0; i < 5; ++i) {
    blocks.push_back(pool.Acquire());
    ASSERT_NE(blocks.back(), PartialBlockPool::kNoBlock);
    EXPECT_EQ(pool.NextOf(blocks.back()), PartialBlockPool::kNoBlock);
    std::memset(pool.At(blocks.back()), i + 1, kBlock);
  }
  EXPECT_EQ(pool.Acquire(), PartialBlockPool::kNoBlock);
  EXPECT_EQ(pool.free_blocks(), 0u);
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(pool.At(blocks[i])[0], static_cast<std::byte>(i + 1));
    EXPECT_EQ(pool.At(blocks[i])[kBlock - 1], static_cast<std::byte>(i + 1));
    pool.Release(blocks[i]);
  }
  EXPECT_EQ(pool.free_blocks(), 5u);
}

TEST(FrameAssemblerTest, WholeFramesAreHandedOverInPlace) {
  std::mt19937_64 random(1);
  const std::vector<WireBytes> frames{RandomFrame(random, 0), RandomFrame(random, 5000),
                                      RandomFrame(random, 1)};
  Assembly assembly(1);
  EXPECT_EQ(assembly.Feed(Joined(frames)).reason, RefusalReason::kNone);
  EXPECT_EQ(assembly.frames, frames);
  EXPECT_EQ(assembly.gathered, 0u);
  EXPECT_EQ(assembly.held(), 0u);
}

TEST(FrameAssemblerTest, CutAtEveryPlaceGivesTheSameFrames) {
  std::mt19937_64 random(2);
  const std::vector<WireBytes> frames{RandomFrame(random, 0), RandomFrame(random, 7),
                                      RandomFrame(random, 100), RandomFrame(random, 0),
                                      RandomFrame(random, 33)};
  const WireBytes stream = Joined(frames);
  Assembly assembly(4);
  for (size_t cut = 0; cut <= stream.size(); ++cut) {
    assembly.frames.clear();
    ASSERT_EQ(assembly.Feed(std::span(stream).first(cut)).reason, RefusalReason::kNone);
    // Only what is unfinished is held.
    size_t begun = cut;
    for (const WireBytes& frame : frames) {
      if (begun < frame.size()) break;
      begun -= frame.size();
    }
    ASSERT_EQ(assembly.assembler.pending_bytes(), begun) << cut;
    ASSERT_EQ(assembly.held(), BlocksFor(begun)) << cut;
    ASSERT_EQ(assembly.Feed(std::span(stream).subspan(cut)).reason, RefusalReason::kNone);
    ASSERT_EQ(assembly.frames, frames) << cut;
    ASSERT_EQ(assembly.held(), 0u);
  }
}

TEST(FrameAssemblerTest, CutIntoSingleBytes) {
  std::mt19937_64 random(3);
  const std::vector<WireBytes> frames{RandomFrame(random, 0), RandomFrame(random, kBlock),
                                      RandomFrame(random, kBlock - 32),
                                      RandomFrame(random, kBlock - 31)};
  Assembly assembly(3);
  for (const std::byte byte : Joined(frames)) {
    ASSERT_EQ(assembly.Feed(std::span(&byte, 1)).reason, RefusalReason::kNone);
    ASSERT_EQ(assembly.held(), BlocksFor(assembly.assembler.pending_bytes()));
  }
  EXPECT_EQ(assembly.frames, frames);
  EXPECT_EQ(assembly.held(), 0u);
}

TEST(FrameAssemblerTest, CutAtRandomPlacesGivesTheSameFrames) {
  std::mt19937_64 random(4);
  Assembly assembly(300);
  for (int round = 0; round < 60; ++round) {
    std::vector<WireBytes> frames;
    for (size_t i = 0; i < 12; ++i) {
      const size_t most = random() % 3 == 0 ? 3 * kBlock : 200;
      frames.push_back(RandomFrame(random, random() % most));
    }
    const WireBytes stream = Joined(frames);
    assembly.frames.clear();
    const size_t most_piece = 1 + random() % (random() % 2 == 0 ? 100 : 2 * kBlock);
    for (size_t at = 0; at < stream.size();) {
      const size_t piece = std::min(stream.size() - at, 1 + random() % most_piece);
      ASSERT_EQ(assembly.Feed(std::span(stream).subspan(at, piece)).reason, RefusalReason::kNone);
      ASSERT_EQ(assembly.held(), BlocksFor(assembly.assembler.pending_bytes()));
      at += piece;
    }
    ASSERT_EQ(assembly.frames, frames);
    ASSERT_EQ(assembly.held(), 0u);
  }
}

TEST(FrameAssemblerTest, TheGreatestFrameFitsTheScratchBuffer) {
  std::mt19937_64 random(5);
  const std::vector<WireBytes> frames{RandomFrame(random, 1'048'576)};
  Assembly assembly(257);
  EXPECT_EQ(assembly.Feed(std::span(frames[0]).first(31)).reason, RefusalReason::kNone);
  EXPECT_EQ(assembly.Feed(std::span(frames[0]).subspan(31)).reason, RefusalReason::kNone);
  EXPECT_EQ(assembly.frames, frames);
  EXPECT_EQ(assembly.gathered, 1u);
  EXPECT_EQ(assembly.held(), 0u);
}

TEST(FrameAssemblerTest, ASpentPoolTakesNothingAndMayBeTriedAgain) {
  std::mt19937_64 random(6);
  const std::vector<WireBytes> frames{RandomFrame(random, 40),
                                      RandomFrame(random, 3 * kBlock - 32)};
  const WireBytes stream = Joined(frames);
  // The cut frame's beginning does not fit, whether it starts here or goes on.
  for (const size_t first : {size_t{0}, size_t{72}, size_t{80}, size_t{72 + kBlock}}) {
    Assembly assembly(3);
    ASSERT_EQ(assembly.Feed(std::span(stream).first(first)).reason, RefusalReason::kNone);
    std::vector<uint32_t> taken;
    while (assembly.pool.free_blocks() > 0) taken.push_back(assembly.pool.Acquire());
    const size_t cut = stream.size() - 100;
    const size_t pending = assembly.assembler.pending_bytes();
    EXPECT_EQ(assembly.Feed(std::span(stream).subspan(first, cut - first)).reason,
              RefusalReason::kPartialFrameLimit);
    // Exactly what is not in `rest` was taken.
    const size_t consumed = cut - first - assembly.rest;
    EXPECT_EQ(assembly.assembler.pending_bytes(), first == 0 ? 0 : pending + consumed);
    for (const uint32_t block : taken) assembly.pool.Release(block);
    EXPECT_EQ(assembly.Feed(std::span(stream).subspan(first + consumed)).reason,
              RefusalReason::kNone);
    EXPECT_EQ(assembly.frames, frames) << first;
    EXPECT_EQ(assembly.held(), 0u);
  }
}

TEST(FrameAssemblerTest, AFrameLargerThanThePoolIsRefusedWhole) {
  std::mt19937_64 random(7);
  const WireBytes frame = RandomFrame(random, 2 * kBlock);
  Assembly assembly(2);
  EXPECT_EQ(assembly.Feed(std::span(frame).first(2 * kBlock)).reason, RefusalReason::kNone);
  EXPECT_EQ(assembly.Feed(std::span(frame).subspan(2 * kBlock)).reason,
            RefusalReason::kPartialFrameLimit);
  EXPECT_EQ(assembly.held(), 2u);
  assembly.assembler.Clear(&assembly.pool);
  EXPECT_EQ(assembly.held(), 0u);
  EXPECT_EQ(assembly.assembler.pending_bytes(), 0u);
}

TEST(FrameAssemblerTest, HeaderFaultsAreFoundInPlaceAndGathered) {
  const WireBytes good = MakeFrame(kWirePing, {.sequence = 9});
  struct Fault {
    size_t offset;
    uint64_t value;
    RefusalReason reason;
  };
  for (const Fault& fault :
       {Fault{0, 'X', RefusalReason::kBadMagic}, Fault{4, 2, RefusalReason::kBadVersion},
        Fault{11, 0xFF, RefusalReason::kFrameTooLong}}) {
    WireBytes bad = good;
    SetWireNumber(bad, fault.offset, 1, fault.value);
    const WireBytes stream = Joined(std::vector<WireBytes>{good, bad, good});
    for (size_t cut = 0; cut <= stream.size(); ++cut) {
      Assembly assembly(2);
      RefusalReason reason = assembly.Feed(std::span(stream).first(cut)).reason;
      if (reason == RefusalReason::kNone) {
        // The fault is named as soon as the header is whole, and not before.
        EXPECT_LT(cut, good.size() + 32);
        reason = assembly.Feed(std::span(stream).subspan(cut)).reason;
      }
      EXPECT_EQ(reason, fault.reason) << cut;
      EXPECT_EQ(assembly.frames.size(), 1u);
      assembly.assembler.Clear(&assembly.pool);
      EXPECT_EQ(assembly.held(), 0u);
    }
  }
}

TEST(FrameAssemblerTest, AHeaderOfFourGibibytesTakesNoMemory) {
  WireBytes header = MakeFrame(kWireObserve, {});
  SetWireNumber(header, 8, 4, 0xFFFFFFFF);
  Assembly assembly(2);
  EXPECT_EQ(assembly.Feed(std::span(header).first(20)).reason, RefusalReason::kNone);
  EXPECT_EQ(assembly.Feed(std::span(header).subspan(20)).reason, RefusalReason::kFrameTooLong);
  EXPECT_EQ(assembly.held(), 1u);
}

TEST(FrameAssemblerTest, StopsWhereItIsTold) {
  const WireBytes frame = MakeFrame(kWirePing, {});
  const WireBytes stream = Joined(std::vector<WireBytes>{frame, frame, frame});
  for (const size_t cut : {size_t{0}, size_t{40}}) {  // the second frame in place, then gathered
    Assembly assembly(1);
    assembly.stop_after = 2;
    assembly.Feed(std::span(stream).first(cut));
    EXPECT_EQ(assembly.Feed(std::span(stream).subspan(cut)).reason, RefusalReason::kNone);
    EXPECT_EQ(assembly.frames.size(), 2u);
    EXPECT_EQ(assembly.held(), 0u);
  }
}

}  // namespace
}  // namespace engram
