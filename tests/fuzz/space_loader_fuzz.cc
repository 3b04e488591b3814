// Saved spaces that anything happened to: the input is a program that edits a sound one. Each
// operation is a byte, then what it reads: numbers at the edge of what is allowed over the fields
// of headers, nodes, lists and rows; records and extents lost, doubled, moved, of another length.
// Then, unless the program says no, lengths, order, places, sums and checksums are put right again,
// so that the fuzzer need not guess them.
//
// 1. The stream is loaded at once and, of half of the programs, in pieces and through a file. All
//    must say the same.
// 2. What is loaded without an error must be sound, saved and loaded again give the same bytes, and
//    answer a recall.
// 3. Then it is stored to, linked and swept, and must still be sound.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "index/checkpoint/checkpoint_file.h"
#include "index/checkpoint/space_extent.h"
#include "index/checkpoint/space_loader.h"
#include "index/checkpoint/space_saver.h"
#include "index/recall_job.h"
#include "index/space.h"
#include "src/core/check.h"
#include "src/core/huge_page_arena.h"
#include "tests/fuzz/fuzz_program.h"
#include "tests/index/log/log_builder.h"
#include "tests/index/space_checkpoint_rig.h"

namespace engram {
namespace {

constexpr size_t kOperationsMax = 48;
constexpr size_t kHeapBytes = size_t{32} << 20;
constexpr size_t kExtentsMax = 64;
constexpr uint32_t kDimension = 3;
constexpr size_t kHeader = sizeof(ExtentHeader);

constexpr std::array<uint64_t, 29> kEdges{0,
                                          1,
                                          2,
                                          4,
                                          8,
                                          40,
                                          64,
                                          255,
                                          kMaxIdBytes,
                                          kMaxIdBytes + 1,
                                          kMaxExtentSlots,
                                          kMaxExtentSlots + 1,
                                          kMaxPayloadBytes,
                                          kMaxPayloadBytes + 1,
                                          kMaxExtentBytes,
                                          0x7F7F'FFFF,
                                          0x7F80'0000,
                                          0x7FC0'0000,
                                          0x8000'0000,
                                          0xFFFF'FFFD,
                                          0xFFFF'FFFE,
                                          0xFFFF'FFFF,
                                          0x7FEF'FFFF'FFFF'FFFF,
                                          0x7FF0'0000'0000'0000,
                                          0x7FFF'FFFF'FFFF'FFFE,
                                          0x7FFF'FFFF'FFFF'FFFF,
                                          0x8000'0000'0000'0000,
                                          UINT64_MAX - 1,
                                          UINT64_MAX};

// Offset and bytes of a number.
using Field = std::pair<size_t, size_t>;
constexpr std::array<Field, 9> kHeaderFields{
    {{0, 4}, {4, 2}, {6, 1}, {8, 4}, {16, 8}, {24, 4}, {28, 4}, {32, 4}, {36, 4}}};
constexpr std::array<Field, 12> kSpaceFields{{{0, 8},
                                              {8, 4},
                                              {12, 4},
                                              {16, 4},
                                              {20, 4},
                                              {24, 2},
                                              {26, 2},
                                              {28, 1},
                                              {29, 1},
                                              {30, 1},
                                              {31, 1},
                                              {32, 2}}};
constexpr std::array<Field, 15> kNodeFields{{{0, 8},
                                             {8, 8},
                                             {16, 8},
                                             {24, 8},
                                             {32, 8},
                                             {40, 4},
                                             {44, 4},
                                             {48, 4},
                                             {52, 4},
                                             {56, 2},
                                             {58, 1},
                                             {59, 1},
                                             {60, 1},
                                             {61, 1},
                                             {62, 2}}};
constexpr std::array<Field, 4> kLinksFields{{{0, 4}, {4, 4}, {8, 4}, {12, 1}}};
constexpr std::array<Field, 5> kEndFields{{{0, 8}, {8, 8}, {16, 8}, {24, 4}, {28, 1}}};

// Of the spaces that are saved, and of those into which they are loaded: their place in the list
// and whether they end by age.
constexpr std::array<Form, 6> kForms{{{Metric::kL2, Precision::kF32, Traversal::kInt8},
                                      {Metric::kCosine, Precision::kF32, Traversal::kInt8},
                                      {Metric::kInnerProduct, Precision::kF32, Traversal::kExact},
                                      {Metric::kL2, Precision::kBf16, Traversal::kInt8},
                                      {Metric::kCosine, Precision::kBf16, Traversal::kExact},
                                      {Metric::kInnerProduct, Precision::kInt8, Traversal::kInt8}}};

SpaceOptions OptionsFor(const Form& form, bool ends_by_age) {
  SpaceOptions options = OptionsOf(form, kDimension, 5);
  options.build.M = 3;
  options.build.M0 = 5;
  options.graph_from = 0;
  options.ends_by_age = ends_by_age;
  return options;
}

ExtentHeader HeaderOf(const Bytes& extent) {
  ExtentHeader header;
  if (extent.size() >= kHeader) std::memcpy(&header, extent.data(), sizeof(header));
  return header;
}

void Append(const Bytes& bytes, Bytes* to) { to->insert(to->end(), bytes.begin(), bytes.end()); }

Bytes SaveInSlices(const Space& space, ArenaHeap* heap, size_t nodes) {
  // A save marks the space while it is under way and leaves it as it was.
  auto* saved = const_cast<Space*>(&space);
  SpaceSaver saver(heap);
  CHECK(saver.Begin(saved, 1), "there is memory for two bits a node");
  Bytes bytes;
  Bytes buffer(kMaxExtentBytes);
  while (!saver.done()) {
    CHECK(SaveStep(&saver, nodes, &buffer, &bytes) > 0, "an extent fits");
  }
  return bytes;
}

// The extents of a sound space: some of everything.
std::vector<Bytes> MakeSound(const Form& form, bool ends_by_age) {
  TestHeap memory(kHeapBytes);
  CheckpointRig rig(OptionsFor(form, ends_by_age), &memory);
  Fill(&rig, 30, kDimension, 6, 6);
  rig.in_log = true;
  SplitMix64 random(3);
  for (uint32_t i = 0; i < 4; ++i) {
    rig.Upsert("logged" + std::to_string(i), QuarterVector(&random, kDimension), 400 + i, "payload",
               true);
  }
  if (ends_by_age) rig.space.EvictOldest(500);
  const Bytes bytes = SaveInSlices(rig.space, &memory.heap, 9);
  std::vector<Bytes> extents;
  for (size_t at = 0; at < bytes.size();) {
    const auto size = PeekExtent(std::span(bytes).subspan(at));
    CHECK(size.has_value(), "what is saved is made of extents");
    extents.emplace_back(bytes.begin() + static_cast<ptrdiff_t>(at),
                         bytes.begin() + static_cast<ptrdiff_t>(at + *size));
    at += *size;
  }
  return extents;
}

const std::vector<Bytes>& Sound(size_t form, bool ends_by_age) {
  static const auto kSound = [] {
    std::array<std::vector<Bytes>, 2 * kForms.size()> all;
    for (size_t i = 0; i < all.size(); ++i) all[i] = MakeSound(kForms[i / 2], i % 2 != 0);
    return all;
  }();
  return kSound[2 * form + (ends_by_age ? 1 : 0)];
}

// Edits a saved space.
class Editor {
 public:
  Editor(FuzzProgram* program, const std::vector<Bytes>& extents)
      : program_(program), extents_(extents) {}

  Bytes Run() {
    const bool is_gentle = program_->Byte() % 4 != 0;
    const uint8_t repairs = program_->Byte();
    const size_t operations = program_->Byte() % kOperationsMax;
    for (size_t i = 0; i < operations && !program_->empty(); ++i) {
      const uint8_t operation = program_->Byte();
      is_gentle || operation >= 192 ? EditGently(operation % 8) : Edit(operation % 16);
    }
    Repair(repairs);
    Bytes stream;
    for (const Bytes& extent : extents_) Append(extent, &stream);
    if ((repairs & 0x80) != 0 && !stream.empty()) {
      stream[program_->Number() % stream.size()] ^= std::byte{1} << (program_->Byte() % 8);
    }
    if ((repairs & 0xC0) == 0xC0) stream.resize(program_->Number() % (stream.size() + 1));
    return stream;
  }

 private:
  // Where the records of an extent of nodes or links begin, and the end of the last one.
  static std::vector<size_t> Records(const Bytes& extent) {
    const ExtentHeader header = HeaderOf(extent);
    std::vector<size_t> records;
    if (header.kind != ExtentKind::kNodes && header.kind != ExtentKind::kLinks) return records;
    size_t at = kHeader;
    while (at < extent.size()) {
      size_t bytes = 0;
      if (header.kind == ExtentKind::kNodes) {
        SavedNode node;
        if (extent.size() - at < sizeof(node)) break;
        std::memcpy(&node, extent.data() + at, sizeof(node));
        bytes = node.saved_bytes;
      } else {
        SavedLinks links;
        if (extent.size() - at < sizeof(links)) break;
        std::memcpy(&links, extent.data() + at, sizeof(links));
        bytes = sizeof(links) + PadTo8(size_t{links.link_words} * sizeof(uint32_t));
      }
      if (bytes < sizeof(SavedLinks) || bytes > extent.size() - at) break;
      records.push_back(at);
      at += bytes;
    }
    if (!records.empty()) records.push_back(at);
    return records;
  }
  Bytes* Any() {
    return extents_.empty() ? nullptr : &extents_[program_->Byte() % extents_.size()];
  }
  Bytes* AnyOf(ExtentKind kind) {
    const uint8_t from = program_->Byte();
    for (size_t i = 0; i < extents_.size(); ++i) {
      Bytes* extent = &extents_[(from + i) % extents_.size()];
      if (HeaderOf(*extent).kind == kind) return extent;
    }
    return nullptr;
  }
  // Of an extent: begin and end of one of its records; nothing where it has none.
  Field AnyRecord(const Bytes* extent) {
    if (extent == nullptr) return {};
    const std::vector<size_t> records = Records(*extent);
    if (records.empty()) return {};
    const size_t i = program_->Byte() % (records.size() - 1);
    return {records[i], records[i + 1]};
  }

  // At the edge of something, a small one, or near to what is there.
  void SetNumber(Bytes* bytes, size_t at, size_t width) {
    if (bytes == nullptr || at + width > bytes->size()) return;
    const uint8_t choice = program_->Byte();
    uint64_t number = 0;
    std::memcpy(&number, bytes->data() + at, width);
    if (choice < kEdges.size()) {
      number = kEdges[choice];
    } else if (choice < 128) {
      number = choice - kEdges.size();
    } else {
      number += uint64_t{choice} - 192;
    }
    std::memcpy(bytes->data() + at, &number, width);
  }
  template <size_t kCount>
  void SetField(Bytes* bytes, size_t at, const std::array<Field, kCount>& fields) {
    const auto [offset, width] = fields[program_->Byte() % kCount];
    SetNumber(bytes, at + offset, width);
  }
  void SetCount(Bytes* extent, int more) {
    ExtentHeader header = HeaderOf(*extent);
    header.count += static_cast<uint32_t>(more);
    std::memcpy(extent->data(), &header, sizeof(header));
  }

  void Edit(int operation) {
    switch (operation) {
      case 0: {  // a number in a header
        SetField(Any(), 0, kHeaderFields);
        return;
      }
      case 1: {  // a number or a bit anywhere
        Bytes* extent = Any();
        if (extent == nullptr || extent->empty()) return;
        const size_t at = program_->Number() % extent->size();
        const uint8_t choice = program_->Byte();
        if (choice >= 128) (*extent)[at] ^= std::byte{1} << (choice % 8);
        if (choice < 128) SetNumber(extent, at, size_t{1} << choice % 4);
        return;
      }
      case 2:
        SetField(AnyOf(ExtentKind::kSpace), kHeader, kSpaceFields);
        return;
      case 3:
        SetField(AnyOf(ExtentKind::kEnd), kHeader, kEndFields);
        return;
      case 4:
      case 5:
      case 6: {  // a number of a node
        Bytes* extent = AnyOf(ExtentKind::kNodes);
        const auto [begin, end] = AnyRecord(extent);
        if (end != 0) SetField(extent, begin, kNodeFields);
        return;
      }
      case 7: {  // in what follows a node's numbers
        Bytes* extent = AnyOf(ExtentKind::kNodes);
        const auto [begin, end] = AnyRecord(extent);
        if (end < begin + sizeof(SavedNode) + 8) return;
        const size_t words = (end - begin - sizeof(SavedNode)) / 4;
        SetNumber(extent, begin + sizeof(SavedNode) + program_->Byte() % words * 4, 4);
        return;
      }
      case 8: {  // a number of a node's lists
        Bytes* extent = AnyOf(ExtentKind::kLinks);
        const auto [begin, end] = AnyRecord(extent);
        if (end != 0) SetField(extent, begin, kLinksFields);
        return;
      }
      case 9: {  // in the lists
        Bytes* extent = AnyOf(ExtentKind::kLinks);
        const auto [begin, end] = AnyRecord(extent);
        if (end < begin + sizeof(SavedLinks) + 8) return;
        const size_t words = (end - begin - sizeof(SavedLinks)) / 4;
        SetNumber(extent, begin + sizeof(SavedLinks) + program_->Byte() % words * 4, 4);
        return;
      }
      case 10:
        CopyNode();
        return;
      case 11:
        SpliceRecord();
        return;
      case 12: {  // another length
        Bytes* extent = Any();
        if (extent == nullptr) return;
        const int words = program_->Byte() % 32 - 16;
        const size_t bytes = extent->size() + static_cast<size_t>(words * 8 + 128);
        extent->resize(bytes < 128 + kHeader ? kHeader : bytes - 128);
        return;
      }
      case 13:
        MoveExtent();
        return;
      case 14: {  // the stamp of what was evicted
        Bytes* extent = AnyOf(ExtentKind::kEnd);
        if (extent == nullptr) return;
        extent->resize(kHeader + sizeof(EndExtent) + 8);
        SetNumber(extent, kHeader + sizeof(EndExtent), 8);
        return;
      }
      default: {  // an extent of no nodes, over many places
        const Bytes* like = AnyOf(ExtentKind::kNodes);
        if (like == nullptr || extents_.size() == kExtentsMax) return;
        Bytes extent(like->begin(), like->begin() + kHeader);
        ExtentHeader header = HeaderOf(extent);
        header.kind = program_->Byte() % 2 == 0 ? ExtentKind::kNodes : ExtentKind::kLinks;
        header.bytes = kHeader;
        header.count = 0;
        header.slots = program_->Below(kMaxExtentSlots + 2);
        std::memcpy(extent.data(), &header, sizeof(header));
        const size_t at = program_->Byte() % (extents_.size() + 1);
        extents_.insert(extents_.begin() + static_cast<ptrdiff_t>(at), extent);
      }
    }
  }

  // What a save of different moments may look like, so that it is loaded: other links, parents,
  // stamps and states, numbers of vectors, nodes with one id, and nodes or lists that are not
  // there.
  void EditGently(int operation) {
    const bool is_links = operation < 2 || operation == 6;
    Bytes* extent = AnyOf(is_links ? ExtentKind::kLinks : ExtentKind::kNodes);
    const auto [begin, end] = AnyRecord(extent);
    if (end == 0 || (!is_links && end < begin + sizeof(SavedNode))) return;
    switch (operation) {
      case 0:
        SetLink(extent, begin, end);
        return;
      case 1: {
        const uint8_t parent = program_->Byte();
        const uint32_t place = parent < 64 ? parent : kNoNode;
        std::memcpy(extent->data() + begin + offsetof(SavedLinks, parent), &place, sizeof(place));
        return;
      }
      case 2:
        SetState(extent, begin);
        return;
      case 3: {  // one that says that it is 8 bytes shorter, and is
        uint32_t saved_bytes = 0;
        std::memcpy(&saved_bytes, extent->data() + begin + offsetof(SavedNode, saved_bytes), 4);
        if (end < begin + sizeof(SavedNode) + 8) return;
        saved_bytes -= 8;
        std::memcpy(extent->data() + begin + offsetof(SavedNode, saved_bytes), &saved_bytes, 4);
        extent->erase(extent->begin() + static_cast<ptrdiff_t>(end - 8),
                      extent->begin() + static_cast<ptrdiff_t>(end));
        return;
      }
      case 4: {  // of codes
        const size_t at = begin + sizeof(SavedNode) + program_->Byte() % kDimension;
        if (at < end) (*extent)[at] = std::byte{program_->Byte()};
        return;
      }
      case 5:
        CopyNode();
        return;
      default:  // 6, 7
        extent->erase(extent->begin() + static_cast<ptrdiff_t>(begin),
                      extent->begin() + static_cast<ptrdiff_t>(end));
        SetCount(extent, -1);
    }
  }

  // To any node, or a hole.
  void SetLink(Bytes* extent, size_t begin, size_t end) {
    const uint8_t number = program_->Byte();
    const uint32_t target = number < 64 ? number : HnswGraph::kHole;
    const uint8_t level = program_->Byte() % 3;
    size_t at = begin + sizeof(SavedLinks);
    uint32_t places = 0;
    for (uint8_t i = 0; at + sizeof(places) <= end; ++i, at += (1 + size_t{places}) * 4) {
      std::memcpy(&places, extent->data() + at, sizeof(places));
      if (i < level) continue;
      if (places == 0 || places > (end - at) / 4 - 1) return;
      const size_t place = 1 + program_->Byte() % places;
      std::memcpy(extent->data() + at + place * 4, &target, sizeof(target));
      return;
    }
  }

  // Stamps and a state that fit each other.
  void SetState(Bytes* extent, size_t begin) {
    SavedNode node;
    std::memcpy(&node, extent->data() + begin, sizeof(node));
    if (node.state == SavedState::kTombstone || node.state == SavedState::kRetired) {
      node.begin = node.content = 100 + program_->Byte();
      node.end = node.begin + (node.state == SavedState::kRetired ? program_->Byte() : 0);
    } else {
      constexpr std::array<SavedState, 4> kStates{SavedState::kLive, SavedState::kHidden,
                                                  SavedState::kSuppressed, SavedState::kLive};
      node.state = kStates[program_->Byte() % 4];
      node.begin = 100 + program_->Byte();
      const uint8_t earlier = program_->Byte() % 16;
      const bool was_hidden = node.state == SavedState::kHidden || earlier > 12;
      node.flags = was_hidden ? kSavedWasHidden : 0;
      node.content = was_hidden ? node.begin - earlier : node.begin;  // 0 does not fit
      node.end = node.state == SavedState::kLive ? kOpenStamp : node.begin;
    }
    std::memcpy(extent->data() + begin, &node, sizeof(node));
  }

  // All of a node, or a part of it, over another one: several with one id, one stamp, one place.
  void CopyNode() {
    const Bytes* from = AnyOf(ExtentKind::kNodes);
    const auto [from_begin, from_end] = AnyRecord(from);
    Bytes* to = AnyOf(ExtentKind::kNodes);
    const auto [to_begin, to_end] = AnyRecord(to);
    if (from_end == 0 || to_end == 0) return;
    const Bytes record(from->begin() + static_cast<ptrdiff_t>(from_begin),
                       from->begin() + static_cast<ptrdiff_t>(from_end));
    const size_t first = program_->Byte() % 2 == 0 ? 0 : sizeof(SavedNode);
    SavedNode node;
    if (record.size() < sizeof(node) || to_end - to_begin < sizeof(node)) return;
    std::memcpy(&node, to->data() + to_begin, sizeof(node));
    const uint32_t place = node.node;
    if (first == 0) {
      Bytes changed(to->begin(), to->begin() + static_cast<ptrdiff_t>(to_begin));
      Append(record, &changed);
      changed.insert(changed.end(), to->begin() + static_cast<ptrdiff_t>(to_end), to->end());
      *to = std::move(changed);
      std::memcpy(to->data() + to_begin + offsetof(SavedNode, node), &place, sizeof(place));
    } else {
      const size_t bytes = std::min(record.size(), to_end - to_begin) - first;
      std::memcpy(to->data() + to_begin + first, record.data() + first, bytes);
    }
  }

  // A record that is lost, or comes to be in another place.
  void SpliceRecord() {
    const bool is_links = program_->Byte() % 2 != 0;
    const ExtentKind kind = is_links ? ExtentKind::kLinks : ExtentKind::kNodes;
    Bytes* from = AnyOf(kind);
    const auto [begin, end] = AnyRecord(from);
    if (end == 0) return;
    const auto at = [](Bytes* bytes, size_t offset) {
      return bytes->begin() + static_cast<ptrdiff_t>(offset);
    };
    const uint8_t choice = program_->Byte();
    if (choice % 4 == 0) {
      from->erase(at(from, begin), at(from, end));
      SetCount(from, -1);
      return;
    }
    Bytes record(at(from, begin), at(from, end));
    const size_t place = is_links ? offsetof(SavedLinks, node) : offsetof(SavedNode, node);
    SetNumber(&record, place, sizeof(uint32_t));
    Bytes* to = AnyOf(kind);
    const Field before = AnyRecord(to);
    if (before.second == 0) return;
    to->insert(at(to, choice % 4 == 1 ? before.first : before.second), record.begin(),
               record.end());
    SetCount(to, 1);
  }

  void MoveExtent() {
    if (extents_.empty()) return;
    const size_t from = program_->Byte() % extents_.size();
    const size_t to = program_->Byte() % extents_.size();
    switch (program_->Byte() % 4) {
      case 0:
        extents_.erase(extents_.begin() + static_cast<ptrdiff_t>(from));
        return;
      case 1:
        std::swap(extents_[from], extents_[to]);
        return;
      case 2:
        if (extents_.size() == kExtentsMax) return;
        extents_.insert(extents_.begin() + static_cast<ptrdiff_t>(to), Bytes(extents_[from]));
        return;
      default:  // nothing behind it
        extents_.resize(from);
    }
  }

  // A set bit leaves something as it is.
  void Repair(uint8_t leaves) {
    uint32_t ordinal = 0;
    uint64_t save = 0;
    std::array<uint32_t, 2> places{};
    std::array<uint64_t, 2> sums{};
    for (Bytes& extent : extents_) {
      if (extent.size() < kHeader) continue;
      ExtentHeader header = HeaderOf(extent);
      if ((leaves & 3) != 3) {
        header.magic = kExtentMagic;
        header.version = kExtentVersion;
        header.zero = 0;
        header.bytes = static_cast<uint32_t>(extent.size());
      }
      if (ordinal == 0) save = header.save;
      if ((leaves & 4) == 0) {
        header.ordinal = ordinal;
        header.save = save;
      }
      ++ordinal;
      if (header.kind == ExtentKind::kNodes || header.kind == ExtentKind::kLinks) {
        const size_t of = header.kind == ExtentKind::kNodes ? 0 : 1;
        if ((leaves & 8) == 0) header.first = places[of];
        places[of] = header.first + header.slots;
        sums[of] += header.count;
      }
      std::memcpy(extent.data(), &header, sizeof(header));
      if ((leaves & 16) == 0 && header.kind == ExtentKind::kEnd && extent.size() >= kHeader + 16) {
        std::memcpy(extent.data() + kHeader, sums.data(), sizeof(sums));
      }
    }
    for (Bytes& extent : extents_) {
      if ((leaves & 32) != 0 && HeaderOf(extent).kind == ExtentKind::kSpace &&
          extent.size() >= kHeader + sizeof(SpaceExtent)) {
        std::memcpy(extent.data() + kHeader + offsetof(SpaceExtent, node_count), &places[0],
                    sizeof(places[0]));
      }
      if ((leaves & 0xC7) != 0x47 && extent.size() >= kHeader) FixCrc(extent);
    }
  }

  FuzzProgram* program_;
  std::vector<Bytes> extents_;
};

// A space to load into.
struct Target {
  explicit Target(const SpaceOptions& options)
      : arena(Make()),
        heap(&arena),
        space("saved", options, &heap, &epochs),
        upkeep(&space, &heap, options.build) {}
  static HugePageArena Make() {
    auto made =
        HugePageArena::Create({.reserve_bytes = kHeapBytes, .huge_pages = HugePagePolicy::kOff});
    CHECK(made.has_value(), "address space for a small arena");
    return *std::move(made);
  }
  HugePageArena arena;
  ArenaHeap heap;
  ReaderEpochs epochs{1};
  Space space;
  SpaceUpkeep upkeep;
};

// In memory of exactly its size, so that ASan sees each byte beyond.
Result<void> TakeExact(SpaceLoader* loader, std::span<const std::byte> bytes) {
  const Bytes exact(bytes.begin(), bytes.end());
  return loader->Take(exact);
}

Result<void> LoadWhole(std::span<const std::byte> stream, Space* space) {
  SpaceLoader loader(space);
  if (Result<void> taken = TakeExact(&loader, stream); !taken) return taken;
  return loader.Finish();
}

// Some extents at a time, and where no extent is to be seen whatever is left.
Result<void> LoadInPieces(std::span<const std::byte> stream, size_t most_extents, Space* space) {
  SpaceLoader loader(space);
  SplitMix64 random(most_extents);
  for (std::span<const std::byte> left = stream; !left.empty();) {
    size_t bytes = 0;
    for (size_t n = 1 + random.Below(most_extents); n > 0 && bytes < left.size(); --n) {
      const auto size = PeekExtent(left.subspan(bytes));
      bytes = size ? std::min(left.size(), bytes + *size) : left.size();
    }
    if (Result<void> taken = TakeExact(&loader, left.first(bytes)); !taken) return taken;
    left = left.subspan(bytes);
  }
  return loader.Finish();
}

// As a shard does. `bytes`: as the manifest says.
Result<void> LoadFromFile(const LogFiles& files, uint64_t bytes, Space* space) {
  MemoryDisk disk(&files);
  SpaceLoader loader(space);
  Result<void> result;
  {
    CheckpointReader reader(&disk);
    result = reader.Open(files.begin()->first, bytes);
    while (result) {
      std::span<const std::byte> extent;
      const auto step = reader.Next(&extent);
      if (!step) {
        result = std::unexpected(step.error());
      } else if (*step == CheckpointReader::Step::kEnd) {
        result = loader.Finish();
        break;
      } else if (*step == CheckpointReader::Step::kExtent) {
        CHECK(reader.offset() + extent.size() <= bytes, "an extent lies in the file");
        result = loader.Take(extent);
      }
    }
  }
  CHECK(disk.open_files() == 0 && disk.in_flight() == 0, "everything is closed again");
  return result;
}

void ExpectSound(const Space& space) {
  const Result<void> sound = space.CheckInvariants();
  CHECK(sound.has_value(), "the space is sound");
}

void RecallFrom(const Target& target, ArenaHeap* heap) {
  const std::array<float, kDimension> query{1, -2, 0.5F};
  if (target.space.dimension() != kDimension) return;
  RecallJob job(heap);
  if (!job.Reserve(target.space.node_count())) return;
  RecallParams params;
  params.k = 20;
  params.with_payload = true;
  params.with_vector = true;
  const RecallAnswer answer = RunRecall(target.space, &job, query, params);
  CHECK(answer.reason == RefusalReason::kNone, "a recall is answered");
  CHECK(answer.hits.size() <= target.space.live(), "what is found lives");
  for (const Hit& hit : answer.hits) CHECK(!std::isnan(hit.score), "a score is a number");
}

// What a shard does with a space that it has loaded.
void WorkOn(Target* target, FuzzProgram* program) {
  Space& space = target->space;
  std::array<float, kMaxDimension> vector{1, 2, -3};
  CommitStamp stamp = space.latest_stamp();
  for (uint8_t n = program->Byte() % 8; n > 0 && stamp < kOpenStamp / 4; --n) {
    const std::string id = "id" + std::to_string(program->Byte() % 48);
    ++stamp;
    switch (program->Byte() % 4) {
      case 0: {
        vector[0] += 1;
        ObservationRef observation;
        observation.id = id;
        observation.dtype = VectorDtype::kF32;
        observation.dimension = space.dimension() != 0 ? space.dimension() : kDimension;
        observation.vector = reinterpret_cast<const std::byte*>(vector.data());
        (void)space.Upsert(observation, stamp, true);
        break;
      }
      case 1:
        (void)space.Delete(id, stamp, true);
        break;
      case 2:
        (void)space.Suppress(id, stamp, true);
        break;
      default:
        (void)space.Restore(id, stamp);
    }
  }
  target->upkeep.Run();
  space.SetHorizon(space.latest_stamp());
  target->upkeep.Run();
  space.ForgetTombstones(space.latest_stamp());
  ExpectSound(space);
}

// Loads it in other ways, which must say the same.
void CompareWays(const Bytes& stream, const SpaceOptions& options, size_t most_extents,
                 const Result<void>& loaded) {
  Target in_pieces(options);
  const Result<void> pieces = LoadInPieces(stream, most_extents, &in_pieces.space);
  CHECK(pieces.has_value() == loaded.has_value(), "pieces do not change the verdict");
  CHECK(loaded || pieces.error().message == loaded.error().message,
        "pieces do not change what is said");
  Target from_file(options);
  const LogFiles files{{CheckpointName(1), stream}};
  const Result<void> file = LoadFromFile(files, stream.size(), &from_file.space);
  CHECK(file.has_value() == loaded.has_value(), "a file does not change the verdict");
}

void Run(std::span<const uint8_t> input) {
  FuzzProgram program(input);
  const uint8_t choice = program.Byte();
  const size_t form = choice % kForms.size();
  const bool ends_by_age = (choice & 0x80) != 0;
  const uint8_t into = program.Byte();
  SpaceOptions options = OptionsFor(kForms[form], ends_by_age);
  // Into one that keeps its rows in another form, or has other lists, or is not settled.
  if ((into & 3) == 3) {
    const Form& other = kForms[(into >> 4) % kForms.size()];
    options.precision = other.precision;
    options.traversal = other.traversal;
  }
  if ((into & 12) == 12) options.build.M0 = 6;
  if ((into & 12) == 8) options.dimension = 0;

  const Bytes stream = Editor(&program, Sound(form, ends_by_age)).Run();
  Target target(options);
  const Result<void> loaded = LoadWhole(stream, &target.space);
  if (into >= 128) CompareWays(stream, options, 1 + into % 5, loaded);
  if (!loaded) return;
  ExpectSound(target.space);
  const Bytes again = SaveInSlices(target.space, &target.heap, 1 + into % 64);
  {
    Target other(options);
    CHECK(LoadWhole(again, &other.space).has_value(), "what was loaded is saved soundly");
    ExpectSound(other.space);
    CHECK(other.space.live() == target.space.live(), "all that lives is saved");
    CHECK(SaveInSlices(other.space, &other.heap, 1 + into % 64) == again,
          "what is saved comes back as it was");
    RecallFrom(other, &other.heap);
  }
  WorkOn(&target, &program);
}

}  // namespace
}  // namespace engram

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  // What the tests' own helpers expect holds here, too.
  GTEST_FLAG_SET(break_on_failure, true);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  engram::Run({data, size});
  return 0;
}
