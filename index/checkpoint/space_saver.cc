#include "index/checkpoint/space_saver.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "index/hnsw_graph.h"
#include "index/hnsw_params.h"
#include "src/core/check.h"
#include "src/core/crc32c.h"

namespace engram {

namespace {

// In these units a slice's length is counted: about the time to copy what is to be saved.
constexpr uint64_t kNodeCost = 16;
constexpr uint64_t kLinksCost = 2;
constexpr uint64_t kSkipCost = 1;
constexpr size_t kPrefetchAhead = 4;

constexpr size_t kMaxRowsBytes =
    kMaxDimension * sizeof(float) + kMaxDimension + sizeof(SavedTrailer) + 2 * kCacheLineBytes;
static_assert(sizeof(ExtentHeader) + sizeof(SavedNode) + kMaxRowsBytes +
                      PadTo8(kMaxIdBytes + kMaxPayloadBytes) +
                      PadTo8(sizeof(uint16_t) + kMaxAttributesBytes) <=
                  kMaxExtentBytes,
              "every node fits in an extent");
constexpr size_t kMaxLinkWords =
    1 + HnswGraph::kMaxM0 + HnswGraph::kMaxLevel * (1 + HnswGraph::kMaxM);
static_assert(sizeof(ExtentHeader) + sizeof(SavedLinks) +
                      PadTo8(kMaxLinkWords * sizeof(uint32_t)) <=
                  kMaxExtentBytes,
              "the lists of every node fit in an extent");

// Copies `bytes` and pads them with zeros; returns where to go on.
std::byte* PutPadded(const std::byte* from, size_t bytes, std::byte* to) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  std::memset(to + bytes, 0, PadTo8(bytes) - bytes);
  return to + PadTo8(bytes);
}

std::byte* PutRow(const VectorFormat& format, const std::byte* row, std::byte* to) {
  const size_t bytes = SavedRowBytes(format.row_bytes());
  std::memcpy(to, row, format.row_bytes());
  std::memset(to + format.row_bytes(), 0, bytes - format.row_bytes());
  if (format.precision() == Precision::kInt8) {
    Int8Trailer trailer;
    std::memcpy(&trailer, row + format.padded_dimension(), sizeof(trailer));
    const SavedTrailer saved = {.scale = trailer.scale,
                                .squared_norm = trailer.squared_norm(),
                                .sum = trailer.sum,
                                .zero = {}};
    std::memcpy(to + format.padded_dimension(), &saved, sizeof(saved));
  }
  return to + bytes;
}

// Those of a list, up to its last link.
uint32_t PlacesOf(const HnswGraph& graph, NodeId node, uint32_t level) {
  const NodeId* links = graph.Links(node, level);
  return static_cast<uint32_t>(std::find(links, links + graph.MaxDegree(level), kNoNode) - links);
}

}  // namespace

bool SpaceSaver::Begin(Space* space, CommitStamp hold, const Options& options) {
  CHECK(!active(), "one save at a time");
  CHECK(space->save_ == nullptr, "a space has one save at a time");
  CHECK(space->name().size() <= kMaxSpaceNameBytes, "names of spaces are bounded");
  const auto places = static_cast<uint32_t>(space->node_count());
  if (!suppressed_.Reserve(places / 64 + 1) || !linked_.Reserve(places / 64 + 1)) {
    suppressed_.Release();
    linked_.Release();
    return false;
  }
  space_ = space;
  options_ = options;
  save_ = {.hold = hold, .next = 0, .end = places, .suppressed = &suppressed_, .linked = &linked_};
  space->save_ = &save_;
  dimension_ = space->dimension();
  phase_ = Phase::kSpace;
  done_ = false;
  next_links_ = 0;
  ordinal_ = 0;
  nodes_ = 0;
  linked_nodes_ = 0;
  return true;
}

void SpaceSaver::Abort() {
  if (!active()) return;
  space_->EndSave();
  space_ = nullptr;
  phase_ = Phase::kNone;
  suppressed_.Release();
  linked_.Release();
}

size_t SpaceSaver::Step(std::span<std::byte> to, size_t max_nodes) {
  CHECK(active(), "Begin comes before Step");
  uint64_t budget = max_nodes * kNodeCost;
  size_t used = 0;
  while (active() && budget > 0) {
    const size_t bytes = WriteExtent(to.subspan(used), &budget);
    if (bytes == 0) break;
    used += bytes;
  }
  return used;
}

size_t SpaceSaver::WriteExtent(std::span<std::byte> to, uint64_t* budget) {
  switch (phase_) {
    case Phase::kSpace:
      return WriteSpace(to);  // 1.
    case Phase::kLinks:
      return WriteLinks(to, budget);  // 2.
    case Phase::kNodes:
      return WriteNodes(to, budget);  // 3.
    case Phase::kEnd:
      return WriteEnd(to);  // 4.
    case Phase::kNone:
      break;
  }
  return 0;
}

// Completes an extent whose body is there.
size_t SpaceSaver::Seal(std::span<std::byte> extent, ExtentHeader header) {
  header.bytes = static_cast<uint32_t>(extent.size());
  header.save = save_.hold;
  header.ordinal = ordinal_++;
  std::memcpy(extent.data(), &header, sizeof(header));
  constexpr size_t kBehindCrc = kExtentCrcOffset + sizeof(header.crc);
  header.crc = Crc32c(extent.subspan(kBehindCrc), Crc32c(extent.first(kExtentCrcOffset)));
  std::memcpy(extent.data() + kExtentCrcOffset, &header.crc, sizeof(header.crc));
  return extent.size();
}

size_t SpaceSaver::WriteSpace(std::span<std::byte> to) {
  const Space& space = *space_;
  const std::string& name = space.name();
  const size_t bytes = sizeof(ExtentHeader) + sizeof(SpaceExtent) + PadTo8(name.size());
  if (to.size() < bytes) return 0;
  SpaceExtent body{};
  body.latest_stamp = space.latest_stamp();
  body.dimension = dimension_;
  body.node_count = save_.end;
  if (dimension_ != 0) {
    const auto saved_bytes = [](const VectorStore& rows) {
      return static_cast<uint32_t>(SavedRowBytes(rows.row_bytes()));
    };
    body.code_row_bytes = saved_bytes(*space.codes_);
    if (space.exact_) body.exact_row_bytes = saved_bytes(*space.exact_);
  }
  body.M = static_cast<uint16_t>(space.graph_.MaxDegree(1));
  body.M0 = static_cast<uint16_t>(space.graph_.MaxDegree(0));
  body.metric = space.metric();
  body.precision = space.options_.precision;
  body.traversal =
      space.options_.traversal == Traversal::kExact ? kSavedExactTraversal : kSavedInt8Traversal;
  body.flags = options_.with_payload ? kSavedPayload : uint8_t{0};
  body.name_bytes = static_cast<uint16_t>(name.size());
  std::memcpy(to.data() + sizeof(ExtentHeader), &body, sizeof(body));
  PutPadded(reinterpret_cast<const std::byte*>(name.data()), name.size(),
            to.data() + sizeof(ExtentHeader) + sizeof(body));
  phase_ = dimension_ == 0 ? Phase::kNodes : Phase::kLinks;
  if (save_.end == 0) phase_ = Phase::kEnd;
  return Seal(to.first(bytes), {.kind = ExtentKind::kSpace});
}

// One extent: the lists of as many nodes as fit, and as `*budget` lasts.
size_t SpaceSaver::WriteLinks(std::span<std::byte> to, uint64_t* budget) {
  const size_t room = std::min(to.size(), kMaxExtentBytes);
  if (room < sizeof(ExtentHeader)) return 0;
  const NodeId first = next_links_;
  const NodeId end = std::min(save_.end, first + kMaxExtentSlots);
  size_t used = sizeof(ExtentHeader);
  uint32_t count = 0;
  NodeId node = first;
  for (; node < end && *budget > 0; ++node) {
    SavedLinks saved;
    uint64_t cost = kSkipCost;
    if (DescribeLinks(node, &saved)) {
      const size_t bytes = sizeof(saved) + PadTo8(saved.link_words * sizeof(uint32_t));
      if (bytes > room - used) break;
      PutLinks(saved, to.data() + used);
      Space::Save::Set(&linked_, node);
      used += bytes;
      cost = kLinksCost;
      ++count;
    }
    *budget -= std::min(*budget, cost);
  }
  if (node == first) return 0;
  next_links_ = node;
  linked_nodes_ += count;
  if (node == save_.end) phase_ = Phase::kNodes;
  return Seal(to.first(used),
              {.kind = ExtentKind::kLinks, .first = first, .slots = node - first, .count = count});
}

// One extent: as many nodes as fit, and as `*budget` lasts.
size_t SpaceSaver::WriteNodes(std::span<std::byte> to, uint64_t* budget) {
  const size_t room = std::min(to.size(), kMaxExtentBytes);
  if (room < sizeof(ExtentHeader)) return 0;
  const NodeId first = save_.next;
  const NodeId end = std::min(save_.end, first + kMaxExtentSlots);
  size_t used = sizeof(ExtentHeader);
  uint32_t count = 0;
  NodeId node = first;
  for (; node < end && *budget > 0; ++node) {
    if (node + kPrefetchAhead < end) __builtin_prefetch(space_->nodes_[node + kPrefetchAhead].text);
    SavedNode saved;
    uint64_t cost = kSkipCost;
    if (DescribeNode(node, &saved)) {
      if (saved.saved_bytes > room - used) break;
      PutNode(saved, to.data() + used);
      if (options_.live != nullptr && saved.record_words != 0) {
        options_.live->Count(options_.space, node, saved.origin, uint32_t{saved.record_words} * 8);
      }
      used += saved.saved_bytes;
      cost = kNodeCost;
      ++count;
    }
    *budget -= std::min(*budget, cost);
  }
  if (node == first) return 0;
  save_.next = node;
  nodes_ += count;
  if (node == save_.end) phase_ = Phase::kEnd;
  return Seal(to.first(used),
              {.kind = ExtentKind::kNodes, .first = first, .slots = node - first, .count = count});
}

size_t SpaceSaver::WriteEnd(std::span<std::byte> to) {
  const CommitStamp evicted = space_->evicted_up_to_;
  const size_t body_bytes = sizeof(EndExtent) + (evicted != kNoStamp ? sizeof(evicted) : 0);
  const size_t all_bytes = sizeof(ExtentHeader) + body_bytes;
  if (to.size() < all_bytes) return 0;
  EndExtent body{};
  body.nodes = nodes_;
  body.linked = linked_nodes_;
  body.latest_stamp = space_->latest_stamp();
  body.entry_point = space_->graph_.entry_point();
  body.has_graph = static_cast<uint8_t>(space_->has_graph_);
  std::memcpy(to.data() + sizeof(ExtentHeader), &body, sizeof(body));
  if (evicted != kNoStamp) {
    std::memcpy(to.data() + sizeof(ExtentHeader) + sizeof(body), &evicted, sizeof(evicted));
  }
  const size_t bytes = Seal(to.first(all_bytes), {.kind = ExtentKind::kEnd});
  Abort();
  done_ = true;
  return bytes;
}

// False where the node is not in the graph, or not soundly yet. One that a sweep is taking out
// leads on to others until all lists are mended.
bool SpaceSaver::DescribeLinks(NodeId node, SavedLinks* saved) const {
  const Space::NodeState state = space_->nodes_[node].state;
  const bool is_leaving =
      space_->IsLifted(node) && space_->rebuild_.step != Space::Rebuild::Step::kForgetting;
  if (state != Space::NodeState::kLinked && state != Space::NodeState::kRetired &&
      state != Space::NodeState::kDoomed && !is_leaving) {
    return false;
  }
  const HnswGraph& graph = space_->graph_;
  *saved = SavedLinks{};
  saved->node = node;
  saved->parent = graph.Parent(node);
  saved->level = static_cast<uint8_t>(graph.Level(node));
  for (uint32_t level = 0; level <= saved->level; ++level) {
    saved->link_words += 1 + PlacesOf(graph, node, level);
  }
  return true;
}

void SpaceSaver::PutLinks(const SavedLinks& saved, std::byte* to) const {
  std::memcpy(to, &saved, sizeof(saved));
  to += sizeof(saved);
  std::byte* const end = to + PadTo8(saved.link_words * sizeof(uint32_t));
  const HnswGraph& graph = space_->graph_;
  for (uint32_t level = 0; level <= saved.level; ++level) {
    const uint32_t places = PlacesOf(graph, saved.node, level);
    std::memcpy(to, &places, sizeof(places));
    std::memcpy(to + sizeof(places), graph.Links(saved.node, level), places * sizeof(NodeId));
    to += (1 + size_t{places}) * sizeof(uint32_t);
  }
  std::memset(to, 0, static_cast<size_t>(end - to));
}

// False where there is nothing to save: the place is free, or what was there has ended and neither
// lists nor a content need it.
bool SpaceSaver::DescribeNode(NodeId node, SavedNode* saved) const {
  const Space& space = *space_;
  *saved = SavedNode{};
  switch (space.nodes_[node].state) {
    case Space::NodeState::kTombstone:
      saved->state = SavedState::kTombstone;
      break;
    case Space::NodeState::kHidden:
      saved->state = SavedState::kHidden;
      break;
    case Space::NodeState::kUnlinked:
    case Space::NodeState::kLinking:
    case Space::NodeState::kLinked:
    case Space::NodeState::kLifted:
      saved->state = SavedState::kLive;
      break;
    case Space::NodeState::kEnded:
    case Space::NodeState::kRetiredLinking:
    case Space::NodeState::kRetired:
    case Space::NodeState::kDoomed:
    case Space::NodeState::kWaiting:
    case Space::NodeState::kLiftedEnded:
      if (!save_.MustKeep(node)) return false;
      saved->state = save_.WasSuppressed(node) ? SavedState::kSuppressed : SavedState::kRetired;
      break;
    case Space::NodeState::kFree:
    case Space::NodeState::kCount:
      return false;
  }
  // Vectors that have come since the beginning are replayed.
  if (dimension_ == 0 && saved->state != SavedState::kTombstone) return false;
  saved->node = node;
  saved->begin = Space::Load(space.stamps_[node].begin);
  saved->end = Space::Load(space.stamps_[node].end);
  saved->content = saved->begin;
  if (saved->state != SavedState::kRetired) DescribeText(node, saved);
  saved->saved_bytes = static_cast<uint32_t>(sizeof(SavedNode) + RowBytes(*saved) +
                                             PadTo8(saved->text_bytes()) + AttributeRoom(*saved));
  return true;
}

void SpaceSaver::DescribeText(NodeId node, SavedNode* saved) const {
  const Space::Node& stored = space_->nodes_[node];
  saved->content = space_->ContentStamp(node);
  saved->when_ns = stored.when_ns;
  saved->origin = stored.origin;
  saved->confidence = stored.confidence;
  saved->id_bytes = stored.id_bytes;
  const bool keeps_length = options_.with_payload || stored.record_words != 0;
  saved->payload_bytes = keeps_length ? stored.payload_bytes : uint32_t{0};
  saved->record_words = stored.record_words;
  saved->payload_kind = stored.payload_kind;
  if (stored.was_hidden) saved->flags |= kSavedWasHidden;
  if (space_->attributes_.SetOf(node) != AttributeIndex::kNoAttributes) {
    saved->flags |= kSavedAttributes;
  }
}

size_t SpaceSaver::AttributeRoom(const SavedNode& saved) const {
  if ((saved.flags & kSavedAttributes) == 0) return 0;
  return PadTo8(sizeof(uint16_t) + space_->attributes_.AttributeBytes(saved.node));
}

size_t SpaceSaver::RowBytes(const SavedNode& saved) const {
  if (saved.state == SavedState::kTombstone) return 0;
  return SavedRowBytes(space_->codes_->row_bytes()) +
         (space_->exact_ ? SavedRowBytes(space_->exact_->row_bytes()) : 0);
}

void SpaceSaver::PutNode(const SavedNode& saved, std::byte* to) const {
  const Space& space = *space_;
  std::memcpy(to, &saved, sizeof(saved));
  to += sizeof(saved);
  if (saved.state != SavedState::kTombstone) {
    to = PutRow(*space.code_format_, space.codes_->Row(saved.node), to);
    if (space.exact_) to = PutRow(*space.exact_format_, space.exact_->Row(saved.node), to);
  }
  // The payload lies behind the id.
  to = PutPadded(space.nodes_[saved.node].text, saved.text_bytes(), to);
  if ((saved.flags & kSavedAttributes) == 0) return;
  const auto bytes = static_cast<uint16_t>(space.attributes_.AttributeBytes(saved.node));
  const size_t room = AttributeRoom(saved);
  std::memcpy(to, &bytes, sizeof(bytes));
  space.attributes_.WriteAttributes(saved.node, to + sizeof(bytes));
  std::memset(to + sizeof(bytes) + bytes, 0, room - sizeof(bytes) - bytes);
}

}  // namespace engram
