#include "index/checkpoint/space_loader.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "index/distance.h"
#include "src/core/check.h"
#include "src/core/commit_stamp.h"
#include "src/core/crc32c.h"

namespace engram {

namespace {

// Stamps are nanoseconds of an int64.
constexpr CommitStamp kMaxStamp = static_cast<CommitStamp>(INT64_MAX);

std::unexpected<Error> CorruptAt(uint64_t offset, std::string_view what) {
  return Fail(ErrorCode::kCorrupt,
              "saved space, offset " + std::to_string(offset) + ": " + std::string(what));
}

bool IsZero(const std::byte* bytes, size_t count) {
  return std::all_of(bytes, bytes + count, [](std::byte b) { return b == std::byte{0}; });
}

ExtentHeader HeaderOf(std::span<const std::byte> extent) {
  ExtentHeader header;
  std::memcpy(&header, extent.data(), sizeof(header));
  return header;
}

// Bounds and checksum of the extent at the front of `bytes`, and that this build reads it.
Result<ExtentHeader> CheckExtent(std::span<const std::byte> bytes, uint64_t offset) {
  if (bytes.size() < sizeof(ExtentHeader)) return CorruptAt(offset, "ends inside a header");
  const ExtentHeader header = HeaderOf(bytes);
  if (header.magic != kExtentMagic) return CorruptAt(offset, "is no extent (magic)");
  if (header.bytes < sizeof(header) || header.bytes > kMaxExtentBytes || header.bytes % 8 != 0) {
    return CorruptAt(offset, "extent of " + std::to_string(header.bytes) + " bytes");
  }
  if (header.bytes > bytes.size()) return CorruptAt(offset, "ends inside an extent");
  const std::span<const std::byte> extent = bytes.first(header.bytes);
  constexpr size_t kBehindCrc = kExtentCrcOffset + sizeof(header.crc);
  const uint32_t crc = Crc32c(extent.subspan(kBehindCrc), Crc32c(extent.first(kExtentCrcOffset)));
  if (crc != header.crc) return CorruptAt(offset, "checksum is wrong");
  if (header.version < kOldestExtentVersion || header.version > kExtentVersion) {
    return Fail(ErrorCode::kInvalidArgument,
                "saved space: format version " + std::to_string(header.version) +
                    ", this build reads versions " + std::to_string(kOldestExtentVersion) + " to " +
                    std::to_string(kExtentVersion));
  }
  if (header.zero != 0) return CorruptAt(offset, "header's padding is not zero");
  return header;
}

// The 8 bytes hold lanes of floats, or of bf16: whether one is infinite or no number shows in the
// lane's highest bit.
constexpr uint64_t kF32Exponents = 0x7F8000007F800000;
constexpr uint64_t kF32Carry = 0x0080000000800000;
constexpr uint64_t kF32Tops = 0x8000000080000000;
constexpr uint64_t kBf16Exponents = 0x7F807F807F807F80;
constexpr uint64_t kBf16Carry = 0x0080008000800080;
constexpr uint64_t kBf16Tops = 0x8000800080008000;

bool IsFinite(const std::byte* row, size_t bytes, uint64_t exponents, uint64_t carry,
              uint64_t tops) {
  uint64_t found = 0;
  for (size_t at = 0; at < bytes; at += sizeof(uint64_t)) {
    uint64_t word;
    std::memcpy(&word, row + at, sizeof(word));
    found |= (word & exponents) + carry;
  }
  return (found & tops) == 0;
}

// The distances of a row that is sound are numbers.
bool IsSoundRow(const VectorFormat& format, const std::byte* row) {
  const size_t dimension = format.dimension();
  const size_t row_bytes = format.row_bytes();
  switch (format.precision()) {
    case Precision::kF32:
      return IsFinite(row, row_bytes, kF32Exponents, kF32Carry, kF32Tops) &&
             IsZero(row + dimension * sizeof(float), row_bytes - dimension * sizeof(float));
    case Precision::kBf16:
      return IsFinite(row, row_bytes, kBf16Exponents, kBf16Carry, kBf16Tops) &&
             IsZero(row + dimension * sizeof(uint16_t), row_bytes - dimension * sizeof(uint16_t));
    case Precision::kInt8: {
      SavedTrailer trailer;
      std::memcpy(&trailer, row + format.padded_dimension(), sizeof(trailer));
      constexpr double kMostSquares = 128.0 * 128.0 * kMaxDimension;
      return trailer.scale >= 0 && trailer.scale <= double{FLT_MAX} && trailer.squared_norm >= 0 &&
             trailer.squared_norm <= trailer.scale * trailer.scale * kMostSquares &&
             IsZero(row + dimension, format.padded_dimension() - dimension);
    }
    case Precision::kUnspecified:
      break;
  }
  return false;
}

// Of a row that is sound.
void CopyRow(const VectorFormat& format, const std::byte* row, std::byte* to) {
  std::memcpy(to, row, format.row_bytes());
  if (format.precision() != Precision::kInt8) return;
  SavedTrailer saved;
  std::memcpy(&saved, row + format.padded_dimension(), sizeof(saved));
  const double unit = saved.scale * saved.scale;
  const double squares = unit > 0 ? std::round(saved.squared_norm / unit) : 0;
  const Int8Trailer trailer = {
      .scale = saved.scale, .sum = saved.sum, .squares = static_cast<int32_t>(squares)};
  std::memcpy(to + format.padded_dimension(), &trailer, sizeof(trailer));
}

}  // namespace

Result<size_t> PeekExtent(std::span<const std::byte> bytes) {
  if (bytes.size() < sizeof(ExtentHeader)) return CorruptAt(0, "ends inside a header");
  const ExtentHeader header = HeaderOf(bytes);
  if (header.magic != kExtentMagic) return CorruptAt(0, "is no extent (magic)");
  if (header.bytes < sizeof(header) || header.bytes > kMaxExtentBytes || header.bytes % 8 != 0) {
    return CorruptAt(0, "extent of " + std::to_string(header.bytes) + " bytes");
  }
  return header.bytes;
}

namespace {

Result<void> CheckSpace(const SpaceExtent& body, uint64_t offset) {
  const auto within = [](auto value, auto least, auto most) {
    return value >= least && value <= most;
  };
  if (!within(body.metric, Metric::kCosine, Metric::kL2)) return CorruptAt(offset, "metric");
  if (!within(body.precision, Precision::kF32, Precision::kInt8)) {
    return CorruptAt(offset, "precision");
  }
  if (!within(body.traversal, kSavedInt8Traversal, kSavedExactTraversal)) {
    return CorruptAt(offset, "traversal");
  }
  if (body.dimension > kMaxDimension) return CorruptAt(offset, "dimension");
  if (!within(body.M, 2, int{HnswGraph::kMaxM}) ||
      !within(body.M0, std::max<int>(body.M, 3), int{HnswGraph::kMaxM0})) {
    return CorruptAt(offset, "M or M0");
  }
  if (body.latest_stamp > kMaxStamp) return CorruptAt(offset, "latest stamp");
  if (body.node_count >= HnswGraph::kHole) return CorruptAt(offset, "number of nodes");
  if (body.name_bytes > kMaxSpaceNameBytes) return CorruptAt(offset, "length of the name");
  if ((body.flags & ~kSavedPayload) != 0 ||
      !IsZero(reinterpret_cast<const std::byte*>(body.zero), 6)) {
    return CorruptAt(offset, "padding is not zero");
  }
  return {};
}

// Which rows a space with these settings has, and of which form.
std::pair<std::optional<VectorFormat>, std::optional<VectorFormat>> FormatsOf(
    const SavedSpace& saved) {
  std::pair<std::optional<VectorFormat>, std::optional<VectorFormat>> formats;
  if (saved.dimension == 0) return formats;
  const bool codes_apart =
      saved.traversal != Traversal::kExact && saved.precision != Precision::kInt8;
  formats.first.emplace(codes_apart ? Precision::kInt8 : saved.precision, saved.metric,
                        saved.dimension);
  if (codes_apart) formats.second.emplace(saved.precision, saved.metric, saved.dimension);
  return formats;
}

Result<SavedSpace> ParseSpace(const ExtentHeader& header, std::span<const std::byte> extent,
                              uint64_t offset) {
  if (header.kind != ExtentKind::kSpace) return CorruptAt(offset, "does not begin with a space");
  if (header.ordinal != 0 || header.first != 0 || header.slots != 0 || header.count != 0) {
    return CorruptAt(offset, "header of a space has numbers");
  }
  SpaceExtent body;
  constexpr size_t kFixed = sizeof(header) + sizeof(body);
  if (extent.size() < kFixed) return CorruptAt(offset, "space is too short");
  std::memcpy(&body, extent.data() + sizeof(header), sizeof(body));
  if (Result<void> sound = CheckSpace(body, offset); !sound) return std::unexpected(sound.error());
  if (extent.size() != kFixed + PadTo8(body.name_bytes) ||
      !IsZero(extent.data() + kFixed + body.name_bytes, extent.size() - kFixed - body.name_bytes)) {
    return CorruptAt(offset, "name or its padding");
  }
  SavedSpace saved;
  saved.name.assign(reinterpret_cast<const char*>(extent.data()) + kFixed, body.name_bytes);
  saved.metric = body.metric;
  saved.precision = body.precision;
  saved.traversal = body.traversal == kSavedInt8Traversal ? Traversal::kInt8 : Traversal::kExact;
  saved.dimension = body.dimension;
  saved.M = body.M;
  saved.M0 = body.M0;
  saved.node_count = body.node_count;
  saved.code_row_bytes = body.code_row_bytes;
  saved.exact_row_bytes = body.exact_row_bytes;
  saved.latest_stamp = body.latest_stamp;
  saved.hold = header.save;
  saved.has_payload = (body.flags & kSavedPayload) != 0;
  const auto [code, exact] = FormatsOf(saved);
  if (saved.code_row_bytes != (code ? SavedRowBytes(code->row_bytes()) : 0) ||
      saved.exact_row_bytes != (exact ? SavedRowBytes(exact->row_bytes()) : 0)) {
    return CorruptAt(offset, "bytes of a row do not fit the dimension");
  }
  return saved;
}

}  // namespace

Result<SavedSpace> ReadSpaceExtent(std::span<const std::byte> bytes) {
  const Result<ExtentHeader> header = CheckExtent(bytes, 0);
  if (!header) return std::unexpected(header.error());
  return ParseSpace(*header, bytes.first(header->bytes), 0);
}

SpaceLoader::SpaceLoader(Space* space) : space_(space), graph_(&space->graph_) {
  CHECK(space->node_count() == 0 && space->latest_stamp() == kNoStamp, "the space is empty");
}

std::unexpected<Error> SpaceLoader::Corrupt(std::string_view what) const {
  return CorruptAt(offset_, what);
}

std::unexpected<Error> SpaceLoader::MemoryFull() const {
  return Fail(ErrorCode::kResourceExhausted,
              "space " + space_->name() + ": its shard's memory is full before all of its " +
                  std::to_string(saved_.node_count) +
                  " nodes are loaded; give the shards more (memory)");
}

// ---------------------------------------------------------------------------------------------
// Taking

Result<void> SpaceLoader::Take(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const uint64_t begin = offset_;
    const Result<ExtentHeader> header = CheckExtent(bytes, begin);
    Result<void> taken;
    if (header) {
      taken = TakeExtent(bytes.first(header->bytes));
    } else {
      taken = std::unexpected(header.error());
    }
    if (!taken) {
      phase_ = Phase::kFailed;
      return taken;
    }
    offset_ = begin + header->bytes;
    bytes = bytes.subspan(header->bytes);
  }
  return {};
}

Result<void> SpaceLoader::TakeExtent(std::span<const std::byte> extent) {
  const ExtentHeader header = HeaderOf(extent);
  if (phase_ == Phase::kSpace) return TakeSpace(extent);
  if (phase_ != Phase::kLinks && phase_ != Phase::kNodes) {
    return Corrupt("an extent behind the end");
  }
  if (header.save != saved_.hold) return Corrupt("an extent of another save");
  if (header.ordinal != ordinal_) return Corrupt("an extent is missing, or out of order");
  ++ordinal_;
  if (phase_ == Phase::kLinks && header.kind != ExtentKind::kLinks) {
    if (next_slot_ != 0 && next_slot_ != saved_.node_count) return Corrupt("links are missing");
    next_slot_ = 0;
    phase_ = Phase::kNodes;
  }
  switch (header.kind) {
    case ExtentKind::kLinks:
      if (phase_ == Phase::kLinks) return TakeLinks(header, extent);
      break;
    case ExtentKind::kNodes:
      return TakeNodes(header, extent);
    case ExtentKind::kEnd:
      return TakeEnd(header, extent.subspan(sizeof(header)));
    case ExtentKind::kSpace:
      break;
  }
  return Corrupt("kind of extent");
}

// 1.
Result<void> SpaceLoader::TakeSpace(std::span<const std::byte> extent) {
  Result<SavedSpace> saved = ParseSpace(HeaderOf(extent), extent, offset_);
  if (!saved) return std::unexpected(saved.error());
  saved_ = *std::move(saved);
  if (Result<void> same = CompareSpace(); !same) return same;
  std::tie(saved_code_, saved_exact_) = FormatsOf(saved_);
  if (saved_.dimension != 0 && space_->dimension() == 0) space_->FixDimension(saved_.dimension);
  loads_graph_ =
      saved_.M == space_->graph_.MaxDegree(1) && saved_.M0 == space_->graph_.MaxDegree(0);
  latest_ = saved_.latest_stamp;
  ordinal_ = 1;
  phase_ = Phase::kLinks;
  return {};
}

Result<void> SpaceLoader::CompareSpace() const {
  const std::string whose = "saved space " + saved_.name + ": ";
  if (saved_.name != space_->name()) {
    return Fail(ErrorCode::kInvalidArgument, whose + "is not space " + space_->name());
  }
  if (saved_.metric != space_->metric()) {
    return Fail(ErrorCode::kInvalidArgument,
                whose + "its metric is " + std::string(MetricName(saved_.metric)) +
                    ", which cannot become " + std::string(MetricName(space_->metric())));
  }
  if (saved_.dimension != 0 && space_->dimension() != 0 &&
      saved_.dimension != space_->dimension()) {
    return Fail(ErrorCode::kInvalidArgument, whose + "its dimension is " +
                                                 std::to_string(saved_.dimension) + ", not " +
                                                 std::to_string(space_->dimension()));
  }
  return {};
}

Result<void> SpaceLoader::CheckSlots(const ExtentHeader& header) const {
  if (header.first != next_slot_) return Corrupt("nodes are missing");
  if (saved_.dimension == 0 && header.kind == ExtentKind::kLinks) {
    return Corrupt("links without a dimension");
  }
  if (header.slots == 0 || header.slots > kMaxExtentSlots || header.count > header.slots ||
      header.slots > saved_.node_count - next_slot_) {
    return Corrupt("numbers of nodes and places");
  }
  return {};
}

// 2.
Result<void> SpaceLoader::TakeLinks(const ExtentHeader& header, std::span<const std::byte> extent) {
  if (Result<void> sound = CheckSlots(header); !sound) return sound;
  const uint32_t end = next_slot_ + header.slots;
  const uint64_t begin = offset_;
  size_t at = sizeof(header);
  for (uint32_t i = 0; i < header.count; ++i) {
    offset_ = begin + at;
    SavedLinks saved;
    if (extent.size() - at < sizeof(saved)) return Corrupt("lists are cut off");
    std::memcpy(&saved, extent.data() + at, sizeof(saved));
    if (saved.node < next_slot_ || saved.node >= end) return Corrupt("a node's place");
    if (saved.level > HnswGraph::kMaxLevel || saved.link_words == 0 ||
        saved.link_words > (saved.level + 1U) * (1 + HnswGraph::kMaxM0)) {
      return Corrupt("level or number of links");
    }
    const size_t bytes = sizeof(saved) + PadTo8(saved.link_words * sizeof(uint32_t));
    if (bytes > extent.size() - at) return Corrupt("lists are cut off");
    const std::byte* words = extent.data() + at + sizeof(saved);
    if (Result<void> sound = CheckLinks(saved, words); !sound) return sound;
    if (loads_graph_ && !LoadLinks(saved, words)) return MemoryFull();
    next_slot_ = saved.node + 1;
    at += bytes;
  }
  offset_ = begin + at;
  if (at != extent.size()) return Corrupt("bytes behind the last lists");
  next_slot_ = end;
  linked_nodes_ += header.count;
  return {};
}

Result<void> SpaceLoader::TakeNodes(const ExtentHeader& header, std::span<const std::byte> extent) {
  if (Result<void> sound = CheckSlots(header); !sound) return sound;
  const uint32_t end = next_slot_ + header.slots;
  if (!space_->nodes_.Reserve(end) || !space_->ReserveStamps(end)) return MemoryFull();
  space_->node_count_.store(end, std::memory_order_release);
  const uint64_t begin = offset_;
  size_t at = sizeof(header);
  for (uint32_t i = 0; i < header.count; ++i) {
    offset_ = begin + at;
    SavedNode saved;
    if (extent.size() - at < sizeof(saved)) return Corrupt("a node is cut off");
    std::memcpy(&saved, extent.data() + at, sizeof(saved));
    if (saved.saved_bytes > extent.size() - at) return Corrupt("a node is cut off");
    const std::byte* const body = extent.data() + at + sizeof(saved);
    if (Result<void> sound = CheckRecord(saved, header, body); !sound) return sound;
    if (Result<void> taken = TakeNode(saved, body); !taken) {
      return taken;
    }
    next_slot_ = saved.node + 1;
    at += saved.saved_bytes;
  }
  offset_ = begin + at;
  if (at != extent.size()) return Corrupt("bytes behind the last node");
  next_slot_ = end;

  nodes_ += header.count;
  return {};
}

Result<void> SpaceLoader::TakeEnd(const ExtentHeader& header, std::span<const std::byte> body) {
  EndExtent end;
  CommitStamp evicted = kNoStamp;
  if (body.size() != sizeof(end) && body.size() != sizeof(end) + sizeof(evicted)) {
    return Corrupt("length of the end");
  }
  std::memcpy(&end, body.data(), sizeof(end));
  if (body.size() > sizeof(end)) {
    std::memcpy(&evicted, body.data() + sizeof(end), sizeof(evicted));
    if (evicted == kNoStamp || evicted > kMaxStamp) return Corrupt("stamp of what was evicted");
  }
  if (header.first != 0 || header.slots != 0 || header.count != 0 || end.has_graph > 1 ||
      !IsZero(reinterpret_cast<const std::byte*>(end.zero), sizeof(end.zero))) {
    return Corrupt("padding of the end is not zero");
  }
  if (next_slot_ != saved_.node_count || end.nodes != nodes_ || end.linked != linked_nodes_) {
    return Corrupt("nodes are missing at the end");
  }
  if (end.latest_stamp > kMaxStamp) return Corrupt("latest stamp");
  latest_ = std::max(latest_, end.latest_stamp);
  entry_point_ = end.entry_point;
  has_graph_ = end.has_graph != 0;
  if (space_->options_.ends_by_age) space_->evicted_up_to_ = evicted;
  phase_ = Phase::kComplete;
  return {};
}

// ---------------------------------------------------------------------------------------------
// One node

size_t SpaceLoader::RowBytes(const SavedNode& saved) const {
  return saved.state == SavedState::kTombstone ? 0 : saved_.code_row_bytes + saved_.exact_row_bytes;
}

// Of what follows the text: its length, and what it has room for.
Result<std::span<const std::byte>> SpaceLoader::AttributesIn(const SavedNode& saved,
                                                             const std::byte* body) const {
  const size_t before = RowBytes(saved) + PadTo8(saved.text_bytes());
  const size_t all = saved.saved_bytes - sizeof(saved);
  uint16_t bytes = 0;
  if (before + sizeof(bytes) > all) return Corrupt("attributes of a node are cut off");
  std::memcpy(&bytes, body + before, sizeof(bytes));
  const size_t end = before + sizeof(bytes) + bytes;
  if (bytes == 0 || before + PadTo8(sizeof(bytes) + bytes) != all) {
    return Corrupt("length of a node");
  }
  const std::span<const std::byte> attributes(body + before + sizeof(bytes), bytes);
  if (CheckAttributes(attributes) != RefusalReason::kNone || !IsZero(body + end, all - end)) {
    return Corrupt("attributes of a node");
  }
  return attributes;
}

// All of its numbers, and so that its parts are as long as it is.
Result<void> SpaceLoader::CheckRecord(const SavedNode& saved, const ExtentHeader& header,
                                      const std::byte* body) const {
  if (saved.node < next_slot_ || saved.node - header.first >= header.slots) {
    return Corrupt("a node's place");
  }
  if (saved.zero != 0) return Corrupt("padding of a node is not zero");
  if (saved.id_bytes > kMaxIdBytes || saved.payload_bytes > kMaxPayloadBytes) {
    return Corrupt("length of an id or a payload");
  }

  if (saved.payload_kind > PayloadKind::kMemory) return Corrupt("kind of payload");
  if (Result<void> sound = CheckOrigin(saved); !sound) return sound;
  if ((saved.flags & kSavedAttributes) != 0) {
    if (header.version < kVersionWithAttributes || saved.saved_bytes < sizeof(saved)) {
      return Corrupt("flags of a node");
    }
    if (const auto attributes = AttributesIn(saved, body); !attributes) {
      return std::unexpected(attributes.error());
    }
  } else if (saved.saved_bytes != sizeof(saved) + RowBytes(saved) + PadTo8(saved.text_bytes())) {
    return Corrupt("length of a node");
  }
  if (Result<void> sound = CheckKind(saved); !sound) return sound;
  return CheckStamps(saved);
}

Result<void> SpaceLoader::CheckOrigin(const SavedNode& saved) const {
  if ((saved.origin == kNoLogAddress) != (saved.record_words == 0)) {
    return Corrupt("a record without a place or a length");
  }
  if (saved.record_words == 0) return {};
  const size_t least =
      LogRecordBytes(space_->name().size(), 0, saved.id_bytes, saved.payload_bytes);
  if (size_t{saved.record_words} * 8 < least ||
      size_t{saved.record_words} * 8 > kMaxLogRecordBytes) {
    return Corrupt("length of a record");
  }
  return {};
}

Result<void> SpaceLoader::CheckKind(const SavedNode& saved) const {
  const bool was_hidden = (saved.flags & kSavedWasHidden) != 0;
  const bool has_attributes = (saved.flags & kSavedAttributes) != 0;
  if ((saved.flags & ~(kSavedWasHidden | kSavedAttributes)) != 0) return Corrupt("flags of a node");
  bool fits = false;
  switch (saved.state) {
    case SavedState::kLive:
    case SavedState::kSuppressed:
      fits = true;
      break;
    case SavedState::kHidden:
      fits = was_hidden;
      break;
    case SavedState::kTombstone:
      fits = !was_hidden && !has_attributes && saved.payload_bytes == 0 && saved.record_words == 0;
      break;
    case SavedState::kRetired:
      fits = !was_hidden && !has_attributes && saved.id_bytes == 0 && saved.payload_bytes == 0 &&
             saved.record_words == 0;
      break;
  }
  if (!fits) return Corrupt("state and flags of a node");
  if (saved.state != SavedState::kTombstone && saved_.dimension == 0) {
    return Corrupt("a vector without a dimension");
  }

  return {};
}

Result<void> SpaceLoader::CheckStamps(const SavedNode& saved) const {
  const bool was_hidden = (saved.flags & kSavedWasHidden) != 0;
  const bool is_open = saved.state == SavedState::kLive;
  if (saved.begin == kNoStamp || saved.begin > kMaxStamp) return Corrupt("begin stamp");
  if (is_open ? saved.end != kOpenStamp : saved.end > kMaxStamp) return Corrupt("end stamp");
  const bool no_life = saved.state == SavedState::kHidden || saved.state == SavedState::kTombstone;
  if (no_life && saved.end != saved.begin) return Corrupt("end stamp");
  if (was_hidden ? saved.content >= saved.begin : saved.content != saved.begin) {
    return Corrupt("content stamp");
  }
  return {};
}

Result<void> SpaceLoader::CheckLinks(const SavedLinks& saved, const std::byte* words) const {
  const size_t count = saved.link_words;
  const auto word_at = [words](size_t at) {
    uint32_t word;
    std::memcpy(&word, words + at * sizeof(word), sizeof(word));
    return word;
  };
  size_t at = 0;
  for (uint32_t level = 0; level <= saved.level; ++level) {
    if (at >= count) return Corrupt("a list of links is missing");
    const uint32_t places = word_at(at++);
    if (places > (level == 0 ? saved_.M0 : saved_.M) || places > count - at) {
      return Corrupt("length of a list of links");
    }
    for (const size_t end = at + places; at < end; ++at) {
      if (word_at(at) == kNoNode) return Corrupt("a list of links ends early");
    }
  }
  if (at != count) return Corrupt("lists of links");
  if ((count % 2 != 0 && word_at(count) != 0) ||
      !IsZero(reinterpret_cast<const std::byte*>(saved.zero), sizeof(saved.zero))) {
    return Corrupt("padding of links is not zero");
  }
  return {};
}

// 3.
Result<void> SpaceLoader::TakeNode(const SavedNode& saved, const std::byte* body) {
  const std::byte* text = body + RowBytes(saved);
  const size_t text_bytes = saved.text_bytes();
  if (!IsZero(text + text_bytes, PadTo8(text_bytes) - text_bytes)) {
    return Corrupt("padding of a text is not zero");
  }
  const bool in_graph = graph_.Has(saved.node);
  latest_ = std::max(latest_, saved.begin);
  if (saved.end != kOpenStamp) latest_ = std::max(latest_, saved.end);
  if (saved.state == SavedState::kRetired && !in_graph) return {};

  const NodeId node = saved.node;
  if (saved.state != SavedState::kTombstone) {
    if (!space_->ReserveRows(size_t{node} + 1)) return MemoryFull();
    if (Result<void> loaded = LoadRows(node, body); !loaded) return loaded;
  }

  const bool is_open = saved.state == SavedState::kLive || saved.state == SavedState::kSuppressed;
  space_->SetStamps(node, saved.begin, is_open ? kOpenStamp : saved.end);
  if (saved.state == SavedState::kRetired) {
    space_->nodes_[node].state = Space::NodeState::kRetired;
    return {};
  }
  if (!LoadText(saved, text)) return MemoryFull();
  if (saved.state != SavedState::kTombstone) {
    std::span<const std::byte> attributes;
    if ((saved.flags & kSavedAttributes) != 0) attributes = *AttributesIn(saved, body);
    if (!space_->FileNode(node, attributes)) return MemoryFull();
  }
  Space::NodeState& state = space_->nodes_[node].state;
  if (is_open) {
    state = in_graph ? Space::NodeState::kLinked : Space::NodeState::kUnlinked;
  } else {
    state = saved.state == SavedState::kHidden ? Space::NodeState::kHidden
                                               : Space::NodeState::kTombstone;
  }
  return Stand(node) ? Result<void>() : MemoryFull();
}

Result<void> SpaceLoader::LoadRows(NodeId node, const std::byte* rows) {
  if (!IsSoundRow(*saved_code_, rows) ||
      (saved_exact_ && !IsSoundRow(*saved_exact_, rows + saved_.code_row_bytes))) {
    return Corrupt("a vector's numbers");
  }
  if (!LoadRow(*space_->code_format_, rows, space_->codes_->Row(node)) ||
      (space_->exact_ && !LoadRow(*space_->exact_format_, rows, space_->exact_->Row(node)))) {
    return Corrupt("a zero vector under cosine");
  }
  return {};
}

// The row of this form, or one that is encoded from the best one. False where that is zero under
// cosine.
bool SpaceLoader::LoadRow(const VectorFormat& format, const std::byte* rows, std::byte* to) {
  const std::byte* best = saved_exact_ ? rows + saved_.code_row_bytes : rows;
  const VectorFormat& best_format = saved_exact_ ? *saved_exact_ : *saved_code_;
  if (format.precision() == best_format.precision()) {
    CopyRow(format, best, to);
  } else if (format.precision() == saved_code_->precision()) {
    CopyRow(format, rows, to);
  } else {
    best_format.Decode(best, numbers_.data());
    if (format.metric() == Metric::kCosine && best_format.precision() != Precision::kF32 &&
        !NormaliseInPlace(numbers_.data(), format.dimension())) {
      return false;
    }
    format.Encode(numbers_.data(), to);
  }
  return true;
}

bool SpaceLoader::LoadText(const SavedNode& saved, const std::byte* text) {
  const bool was_hidden = (saved.flags & kSavedWasHidden) != 0;
  const size_t text_bytes = saved.text_bytes();
  const size_t bytes = text_bytes + (was_hidden ? sizeof(saved.content) : 0);
  std::byte* to = space_->heap_->Allocate(bytes);
  if (to == nullptr) return false;
  space_->text_bytes_ += ArenaHeap::BlockBytes(bytes);
  std::memcpy(to, text, text_bytes);
  if (was_hidden) std::memcpy(to + text_bytes, &saved.content, sizeof(saved.content));
  Space::Node& node = space_->nodes_[saved.node];
  node.text = to;
  node.when_ns = saved.when_ns;
  node.origin = saved.origin;
  node.confidence = saved.confidence;
  node.payload_bytes = saved.payload_bytes & 0x1FFFF;
  node.record_words = saved.record_words & 0x7FFF;
  node.id_bytes = saved.id_bytes & 0x7FFF;
  node.was_hidden = was_hidden ? 1 : 0;
  node.payload_kind = saved.payload_kind;
  return true;
}

bool SpaceLoader::LoadLinks(const SavedLinks& saved, const std::byte* words) {
  if (!graph_.Add(saved.node, saved.level, saved.parent)) return false;
  std::array<NodeId, HnswGraph::kMaxM0> places;
  for (uint32_t level = 0; level <= saved.level; ++level) {
    uint32_t count;
    std::memcpy(&count, words, sizeof(count));
    std::memcpy(places.data(), words + sizeof(count), count * sizeof(NodeId));
    graph_.SetLinks(saved.node, level, {places.data(), count});
    words += (1 + size_t{count}) * sizeof(uint32_t);
  }
  return true;
}

// Makes the node the one that stands for its id, or ends it. False when the heap is spent.
bool SpaceLoader::Stand(NodeId node) {
  const std::string_view id = space_->IdOf(node);
  const uint64_t hash = space_->HashOf(id);
  const NodeId other = space_->FindId(hash, id);
  if (other == kNoNode) return space_->ids_.Insert(hash, node);
  // An observation stands before a tombstone with its own stamp, as in Space::Upsert.
  const auto rank_of = [this](NodeId of) {
    return std::tuple(space_->ContentStamp(of), Space::Load(space_->stamps_[of].begin),
                      space_->nodes_[of].state != Space::NodeState::kTombstone);
  };
  if (rank_of(node) > rank_of(other)) {
    space_->ids_.Replace(hash, other, node);
    EndNode(other, Space::Load(space_->stamps_[node].begin));
  } else {
    EndNode(node, Space::Load(space_->stamps_[other].begin));
  }
  return true;
}

// A tombstone that does not stand stays in its queue.
void SpaceLoader::EndNode(NodeId node, CommitStamp stamp) {
  Space::Node& stored = space_->nodes_[node];
  if (stored.state == Space::NodeState::kTombstone) return;
  ++ended_duplicates_;
  space_->SetEnd(node, stamp);
  space_->FreeText(&stored);
  stored.id_bytes = 0;
  stored.payload_bytes = 0;
  stored.record_words = 0;
  stored.was_hidden = 0;
  stored.state = stored.state == Space::NodeState::kLinked ? Space::NodeState::kRetired
                                                           : Space::NodeState::kFree;
}

// ---------------------------------------------------------------------------------------------
// 4.

Result<void> SpaceLoader::Finish() {
  if (phase_ != Phase::kComplete) {
    return phase_ == Phase::kFailed ? Corrupt("could not be taken") : Corrupt("the end is missing");
  }
  phase_ = Phase::kFailed;
  LeaveLinksWithoutNode();
  SearchTarget target;
  if (saved_.dimension != 0) target = space_->TargetFor(nullptr);
  for (const NodeId node : graph_.Finish(target, entry_point_)) {
    Space::NodeState& state = space_->nodes_[node].state;
    state =
        state == Space::NodeState::kLinked ? Space::NodeState::kUnlinked : Space::NodeState::kFree;
  }
  SettleNodes();
  ListTombstones();
  space_->has_graph_ = has_graph_ || space_->graph_.linked_count() > 0 ||
                       space_->unlinked_ > space_->options_.graph_from;
  space_->linked_up_to_.store(latest_, std::memory_order_release);
  space_->latest_stamp_.store(latest_, std::memory_order_release);
  space_->SetHorizon(latest_);
  if (!ListUnlinked() || !space_->QueueByAge()) return MemoryFull();
  space_->loaded_up_to_ = latest_;
  // Some may have been saved before they were evicted.
  while (space_->oldest_content() <= space_->evicted_up_to_) space_->EndOldest(latest_);
  phase_ = Phase::kFinished;
  return {};
}

// Lists of nodes that have come to nothing, or to something that is in no graph.
void SpaceLoader::LeaveLinksWithoutNode() {
  for (NodeId node = 0; node < graph_.end(); ++node) {
    if (!graph_.Has(node)) continue;
    const Space::NodeState state = space_->nodes_[node].state;
    if (state != Space::NodeState::kLinked && state != Space::NodeState::kRetired) {
      graph_.Remove(node);
    }
  }
}

// Counts, and the lists in which order does not matter. From the last place down, so that the
// first one is free first.
void SpaceLoader::SettleNodes() {
  Space& space = *space_;
  for (NodeId node = saved_.node_count; node-- > 0;) {
    switch (space.nodes_[node].state) {
      case Space::NodeState::kFree:
        space.FreeNode(node);
        break;
      case Space::NodeState::kUnlinked:
        ++space.unlinked_;
        ++space.live_;
        break;
      case Space::NodeState::kLinked:
        ++space.live_;
        break;
      case Space::NodeState::kRetired:
        ++space.retired_;
        space.ListRetired(node);
        break;
      case Space::NodeState::kHidden:
        ++space.hidden_;
        break;
      case Space::NodeState::kTombstone:
        ++space.tombstones_;
        break;
      default:
        CHECK(false, "a node is loaded in no other state");
    }
  }
}

bool SpaceLoader::ListUnlinked() {
  std::vector<std::pair<CommitStamp, NodeId>> unlinked;
  unlinked.reserve(space_->unlinked_);
  for (NodeId node = 0; node < saved_.node_count; ++node) {
    if (space_->nodes_[node].state != Space::NodeState::kUnlinked) continue;
    unlinked.emplace_back(Space::Load(space_->stamps_[node].begin), node);
  }
  std::sort(unlinked.begin(), unlinked.end());
  for (const auto& [stamp, node] : unlinked) {
    if (!space_->ReserveFresh()) return false;
    space_->fresh_.Append(node);
  }
  return true;
}

void SpaceLoader::ListTombstones() {
  std::vector<std::pair<CommitStamp, NodeId>> tombstones;
  tombstones.reserve(space_->tombstones_);
  for (NodeId node = 0; node < saved_.node_count; ++node) {
    if (space_->nodes_[node].state != Space::NodeState::kTombstone) continue;
    tombstones.emplace_back(Space::Load(space_->stamps_[node].begin), node);
  }
  std::sort(tombstones.begin(), tombstones.end());
  NodeId next = kNoNode;
  for (auto entry = tombstones.rbegin(); entry != tombstones.rend(); ++entry) {
    space_->nodes_[entry->second].next = next;
    next = entry->second;
  }
  space_->first_tombstone_ = next;
  space_->last_tombstone_ = tombstones.empty() ? kNoNode : tombstones.back().second;
}

}  // namespace engram
