// Bytes of one connection, as far as the slots: frame assembler, checks, decoder, admission gate.
//
// 1. The input is a stream of frames with one byte before it, which says how the stream is cut.
// 2. The stream goes through the assembler cut and uncut; both must give the same frames.
// 3. Each frame gets the right checksum, so that the fuzzer need not guess it, and is decoded.
// Every
//    buffer has exactly the size that its user was told, so that ASan sees each byte beyond.
//
// The mutator knows the grammar: it repairs what it broke on most of its turns, appends sound
// frames, and writes numbers at the edge of what is allowed where the lengths and counts are.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <vector>

#include "dataplane/admission_gate.h"
#include "dataplane/decoder.h"
#include "dataplane/frame_assembler.h"
#include "dataplane/frame_format.h"
#include "src/core/attributes.h"
#include "src/core/check.h"
#include "src/core/hash.h"
#include "tests/dataplane/wire.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace engram {
namespace {

// Bytes in memory of exactly their size.
class Exact {
 public:
  explicit Exact(std::span<const std::byte> bytes)
      : size_(bytes.size()), bytes_(std::make_unique<std::byte[]>(bytes.size())) {
    if (size_ > 0) std::memcpy(bytes_.get(), bytes.data(), size_);
  }
  std::span<std::byte> get() const { return {bytes_.get(), size_}; }

 private:
  size_t size_;
  std::unique_ptr<std::byte[]> bytes_;
};

// A slot of exactly the size asked for.
class Slot {
 public:
  explicit Slot(size_t bytes)
      : bytes_(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64}))) {
    CHECK(bytes >= kRequestBodyOffset && bytes <= kMaxSlotBytes, "no slot is of that size");
  }
  ~Slot() { ::operator delete(bytes_, std::align_val_t{64}); }
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;
  std::byte* get() const { return bytes_; }

 private:
  std::byte* bytes_;
};

constexpr std::array<SpaceRules, 4> kRules{
    SpaceRules{.metric = Metric::kCosine, .dimension = 0},
    SpaceRules{.metric = Metric::kL2, .dimension = 2},
    SpaceRules{.metric = Metric::kInnerProduct, .dimension = 3},
    SpaceRules{.metric = Metric::kCosine, .dimension = 4096},
};

// What the shard does with a slot: reads every byte that the numbers name.
void ReadSlot(const std::byte* slot) {
  const auto* request = reinterpret_cast<const ObserveRequest*>(slot);
  const std::byte* at = slot + kRequestBodyOffset;
  std::vector<float> numbers(request->dimension);
  DecodeVector(request->dtype, request->dimension, request->scale, at, numbers.data());
  for (const float number : numbers) CHECK(number - number == 0, "a number is not finite");
  at += VectorBytes(request->dtype, request->dimension);
  const std::string text(reinterpret_cast<const char*>(at),
                         request->id_bytes + request->attribute_bytes + request->payload_bytes);
  CHECK(request->id_bytes > 0 && request->id_bytes <= kMaxIdBytes, "an id of no allowed length");
  CHECK(CheckAttributes({at + request->id_bytes, request->attribute_bytes}) == RefusalReason::kNone,
        "unsound attributes came in");
  CHECK(request->payload_kind <= PayloadKind::kMemory, "a kind of payload that is none");
  CHECK(request->confidence >= 0 && request->confidence <= 1, "a confidence beyond 0 to 1");
}

void DecodeObserve(std::span<const std::byte> body) {
  ObserveReader reader;
  if (ObserveReader::Open(body, &reader) != RefusalReason::kNone) return;
  while (reader.remaining() > 0) {
    const ObservationView view = reader.Next();
    for (const SpaceRules& rules : kRules) {
      const Slot slot(SlotBytesFor(view));
      const RefusalReason reason = AdmitObservation(view, rules, slot.get());
      const auto* request = reinterpret_cast<const ObserveRequest*>(slot.get());
      CHECK(request->skip_reason == reason, "the slot says why");
      if (reason == RefusalReason::kNone) {
        CHECK(rules.dimension == 0 || view.op == ObservationOp::kDelete ||
                  view.dimension == rules.dimension,
              "a wrong dimension came in");
        ReadSlot(slot.get());
      } else {
        CHECK(request->op == ObservationOp::kSkip, "what is refused is a skip");
        CHECK(DescribeRefusal(reason).effect == RefusalEffect::kConsumes,
              "an invalid observation consumes its number");
      }
    }
  }
}

void DecodeFrame(const WireBytes& frame) {
  const Exact exact(frame);
  SealWire(exact.get());
  FrameHeader header;
  CHECK(CheckFrameHeader(exact.get().data(), &header) == RefusalReason::kNone, "checked before");
  CHECK(CheckFrameCrc(header, exact.get()) == RefusalReason::kNone, "a sealed frame is sound");
  const Exact body_only(exact.get().subspan(kFrameHeaderBytes));
  const std::span<const std::byte> body = body_only.get();
  switch (header.type) {
    case FrameType::kHello: {
      HelloView hello;
      if (DecodeHello(body, &hello) == RefusalReason::kNone) {
        CHECK(IsValidSpaceName(hello.space), "a space's name is checked");
      }
      break;
    }
    case FrameType::kRecall: {
      RecallView recall;
      if (DecodeRecall(body, header.flags, &recall) != RefusalReason::kNone) break;
      for (const SpaceRules& rules : kRules) {
        const Slot slot(SlotBytesFor(recall));
        if (AdmitRecall(recall, rules, slot.get()) != RefusalReason::kNone) continue;
        const auto* request = reinterpret_cast<const RecallRequest*>(slot.get());
        const std::byte* filter =
            slot.get() + kRequestBodyOffset + VectorBytes(request->dtype, request->dimension);
        CHECK(CheckFilter({filter, request->filter_bytes}) == RefusalReason::kNone,
              "an unsound filter came in");
      }
      break;
    }
    case FrameType::kScroll: {
      ScrollBody scroll;
      if (DecodeScroll(body, &scroll) != RefusalReason::kNone) break;
      CHECK(scroll.limit > 0 && scroll.limit <= kMaxScrollHits, "a page is bounded");
      break;
    }
    case FrameType::kCheck: {
      CheckBody check;
      (void)DecodeCheck(body, &check);
      break;
    }
    case FrameType::kIntrospect: {
      IntrospectWhat what{};
      (void)DecodeIntrospect(body, &what);
      break;
    }
    default:
      // Whatever it says it is: most inputs shall reach the largest part.
      DecodeObserve(body);
  }
}

struct Frames {
  std::vector<WireBytes> frames;
  RefusalReason reason = RefusalReason::kNone;
};

// Feeds the stream in pieces of 1 to `most_piece` bytes.
Frames Assemble(std::span<const std::byte> stream, size_t most_piece, uint64_t seed) {
  static std::vector<std::byte> scratch(kFrameHeaderBytes + kMaxFrameBodyBytes);
  static PartialBlockPool pool = *PartialBlockPool::Create(300, HugePagePolicy::kOff);
  const size_t free_before = pool.free_blocks();
  SplitMix64 random(seed);
  FrameAssembler assembler;
  Frames result;
  for (size_t at = 0; at < stream.size() && result.reason == RefusalReason::kNone;) {
    const size_t piece = std::min<size_t>(stream.size() - at, 1 + random.Below(most_piece));
    const Exact exact(stream.subspan(at, piece));
    at += piece;
    const auto outcome =
        assembler.Feed(exact.get(), &pool, scratch, [&](const FrameHeader& header, auto frame) {
          CHECK(frame.size() == kFrameHeaderBytes + header.length, "a frame is whole");
          result.frames.emplace_back(frame.begin(), frame.end());
          return true;
        });
    result.reason = outcome.reason;
  }
  assembler.Clear(&pool);
  CHECK(pool.free_blocks() == free_before, "every block is given back");
  return result;
}

std::string SomeAttributes(SplitMix64& random) {
  std::string bytes;
  for (size_t i = random.Below(4); i > 0; --i) {
    AppendAttribute(std::string(random.Below(7), 'k'), std::string(random.Below(9), 'v'), &bytes);
  }
  return bytes;
}

WireBytes SoundRecall(SplitMix64& random, std::span<const float> vector) {
  WireRecall recall = F32Recall(vector);
  if (random.Below(2) == 0) return RecallBytes(random.Next(), recall);
  FilterWriter writer;
  writer.SetTimes({.begin_ns = static_cast<int64_t>(random.Below(9))});
  const std::vector<std::string_view> values(random.Below(4), "value");
  writer.Require("source", values);
  writer.Exclude(kTagKey, values);
  recall.filter = writer.Bytes();
  return RecallBytes(random.Next(), recall, 8);
}

// A sound frame of any type.
WireBytes SoundFrame(SplitMix64& random) {
  const std::array<float, 3> vector{1, 2, 3};
  switch (random.Below(5)) {
    case 0:
      return HelloBytes({.dimension = 3, .space = "a-space"});
    case 1:
      return SoundRecall(random, vector);
    case 2:
      return IntrospectBytes(1, 1);
    default: {
      std::vector<WireRecord> records;
      const size_t count = 1 + random.Below(3);
      for (size_t i = 0; i < count; ++i) {
        WireRecord record = random.Below(4) == 0
                                ? DeleteRecord("gone")
                                : F32Record(std::string(1 + random.Below(9), 'i'),
                                            std::span(vector).first(1 + random.Below(3)),
                                            std::string(random.Below(20), 'p'));
        if (record.op == 1 && random.Below(3) == 0) {
          const size_t element_bytes = random.Below(2) == 0 ? 2 : 1;
          record.dtype = static_cast<uint8_t>(element_bytes == 1 ? 4 : 2 + random.Below(2));
          record.vector.resize(record.dimension * element_bytes);
        }
        if (record.op == 1) record.attributes = SomeAttributes(random);
        records.push_back(record);
      }
      return ObserveBytes(7, 1, records, static_cast<uint8_t>(random.Below(4)));
    }
  }
}

constexpr std::array<uint64_t, 20> kEdges{
    0,    1,    2,    3,      31,     32,     33,      255,        256,        257,
    4095, 4096, 4097, 65'535, 65'536, 65'537, 1 << 20, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF};

// Makes the stream a row of frames again: magic, version, and the last length.
void Repair(std::span<std::byte> stream) {
  for (size_t at = 0; at + kFrameHeaderBytes <= stream.size();) {
    const std::span<std::byte> rest = stream.subspan(at);
    SetWireNumber(rest, 0, 4, kFrameMagic);
    SetWireNumber(rest, 4, 1, kFrameVersion);
    const size_t room = rest.size() - kFrameHeaderBytes;
    const size_t length = WireNumber(rest, 8, 4);
    if (length > room) SetWireNumber(rest, 8, 4, room);
    at += kFrameHeaderBytes + std::min(length, room);
  }
}

// Writes a number at the edge of something over a length, a count or any other place of a frame.
void WriteEdge(std::span<std::byte> stream, SplitMix64& random) {
  if (stream.size() < 36) return;
  // Offsets in a first observe frame whose numbers are lengths or counts.
  constexpr std::array<std::array<size_t, 2>, 10> kFields{
      {{8, 4}, {32, 2}, {34, 1}, {36, 4}, {40, 1}, {41, 1}, {42, 2}, {44, 2}, {46, 2}, {48, 4}}};
  const auto& field = kFields[random.Below(kFields.size())];
  size_t offset = field[0];
  if (random.Below(3) == 0) offset = random.Below(stream.size());
  if (offset + field[1] > stream.size()) return;
  uint64_t value = kEdges[random.Below(kEdges.size())];
  if (random.Below(2) == 0) {
    value = WireNumber(stream, offset, field[1]) + random.Below(17) - 8;
  }
  SetWireNumber(stream, offset, field[1], value);
}

size_t Mutate(uint8_t* data, size_t size, size_t max_size, uint32_t seed) {
  SplitMix64 random(seed);
  const auto append = [&] {
    const WireBytes frame = SoundFrame(random);
    if (size == 0) data[size++] = static_cast<uint8_t>(random.Next());
    if (size + frame.size() > max_size) return;
    std::memcpy(data + size, frame.data(), frame.size());
    size += frame.size();
  };
  if (size < 1 + kFrameHeaderBytes || random.Below(12) == 0) {
    append();
    return size;
  }
  const auto stream = [&] { return std::as_writable_bytes(std::span(data + 1, size - 1)); };
  if (random.Below(3) == 0) {
    WriteEdge(stream(), random);
    return size;
  }
  size = std::max<size_t>(LLVMFuzzerMutate(data, size, max_size), 1);
  if (random.Below(4) != 0) Repair(stream());
  return size;
}

void Run(std::span<const std::byte> input) {
  if (input.empty()) return;
  const uint64_t seed = WireNumber(input, 0, 1);
  const std::span<const std::byte> stream = input.subspan(1);
  const Frames whole = Assemble(stream, SIZE_MAX, seed);
  const Frames cut = Assemble(stream, 1 + seed % 64, seed);
  CHECK(whole.frames == cut.frames, "cuts do not change the frames");
  CHECK(whole.reason == cut.reason, "cuts do not change the verdict");
  for (const WireBytes& frame : whole.frames) DecodeFrame(frame);
}

}  // namespace
}  // namespace engram

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  engram::Run(std::as_bytes(std::span(data, size)));
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned int seed) {
  return engram::Mutate(data, size, max_size, seed);
}
