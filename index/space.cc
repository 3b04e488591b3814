#include "index/space.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "src/core/check.h"
#include "src/core/hash.h"

namespace engram {

namespace {

constexpr float kInt8Magnitude = 128;
constexpr int kTombstonesAtOnce = 64;
// Without a graph: as many ended nodes as this share of the live ones are taken out of the list.
constexpr uint64_t kEndedShare = 8;

using Numbers = std::array<float, kMaxDimension>;

}  // namespace

Space::Space(std::string name, const SpaceOptions& options, ArenaHeap* heap, ReaderEpochs* epochs)
    : name_(std::move(name)),
      options_(options),
      heap_(heap),
      epochs_(epochs),
      nodes_(heap),
      stamps_(heap),
      has_end_(heap),
      fresh_(heap, epochs),
      graph_(heap, options.build),
      ids_(heap),
      attributes_(heap, options.filter_keys, options.hash_seed),
      times_(heap) {
  if (options.dimension != 0) FixDimension(options.dimension);
  if (options.ends_by_age) aged_.emplace(heap, options.homes);
}

Space::~Space() {
  CHECK(save_ == nullptr, "a save ends before its space");
  for (uint32_t node = 0; node < node_count(); ++node) FreeText(&nodes_[node]);
  if (superseded_ != nullptr) heap_->FreeArray(superseded_, kSupersededKept);
  DropCodes(walk_codes_.load(std::memory_order_relaxed));
  DropCodes(next_codes_);
  DropCodes(retired_codes_);
}

void Space::FixDimension(uint32_t dimension) {
  const bool codes_apart =
      options_.traversal != Traversal::kExact && options_.precision != Precision::kInt8;
  code_format_.emplace(codes_apart ? Precision::kInt8 : options_.precision, options_.metric,
                       dimension);
  codes_.emplace(heap_, code_format_->row_bytes());
  if (codes_apart) {
    exact_format_.emplace(options_.precision, options_.metric, dimension);
    exact_.emplace(heap_, exact_format_->row_bytes());
  }
  dimension_.store(dimension, std::memory_order_release);
}

// ---------------------------------------------------------------------------------------------
// Storing

RefusalReason Space::DecodeInto(VectorDtype dtype, float scale, const std::byte* vector,
                                uint32_t dimension, float* numbers) const {
  DecodeVector(dtype, dimension, scale, vector, numbers);
  if (dtype == VectorDtype::kInt8 && !std::isfinite(kInt8Magnitude * scale) &&
      !std::all_of(numbers, numbers + dimension, [](float v) { return std::isfinite(v); })) {
    return RefusalReason::kNotFinite;
  }
  if (options_.metric == Metric::kCosine && !NormaliseInPlace(numbers, dimension)) {
    return RefusalReason::kZeroVector;
  }
  return RefusalReason::kNone;
}

RefusalReason Space::Judge(const ObservationRef& observation) const {
  if (dimension() != 0 && observation.dimension != dimension()) {
    return RefusalReason::kWrongDimension;
  }
  Numbers numbers;
  return DecodeInto(observation.dtype, observation.scale, observation.vector, observation.dimension,
                    numbers.data());
}

StoreOutcome Space::Upsert(const ObservationRef& observation, CommitStamp stamp,
                           bool several_homes) {
  if (dimension() != 0 && observation.dimension != dimension()) {
    return {.reason = RefusalReason::kWrongDimension};
  }
  Numbers numbers;
  const RefusalReason reason = DecodeInto(observation.dtype, observation.scale, observation.vector,
                                          observation.dimension, numbers.data());
  if (reason != RefusalReason::kNone) return {.reason = reason};
  if (dimension() == 0) FixDimension(observation.dimension);
  const uint64_t hash = HashOf(observation.id);
  const NodeId old = FindId(hash, observation.id);
  const bool existed = old != kNoNode && nodes_[old].state != NodeState::kTombstone;
  // It stands before a tombstone with its own stamp (see the class).
  if (old != kNoNode && ContentStamp(old) >= stamp + (existed ? 0 : 1)) {
    const NodeId late = StoreLate(observation, true, numbers.data(), hash, old, stamp);
    return {.existed = existed, .later = ContentStamp(old), .node = late};
  }

  const NodeId node = TakeNode();
  if (node == kNoNode) {
    memory_short_ = true;
    return {.reason = RefusalReason::kMemoryFull};
  }
  if (!WriteText(&nodes_[node], observation) || !FileNode(node, observation.attributes) ||
      !ReserveFresh() || (old == kNoNode && !ids_.Insert(hash, node))) {
    FreeNode(node);
    memory_short_ = true;
    return {.reason = RefusalReason::kMemoryFull};
  }
  code_format_->Encode(numbers.data(), codes_->Row(node));
  if (exact_) exact_format_->Encode(numbers.data(), exact_->Row(node));
  SetStamps(node, stamp, kOpenStamp);
  nodes_[node].state = NodeState::kUnlinked;
  fresh_.Append(node);
  if (aged_) aged_->Add(node, stamp);
  ++live_;
  ++unlinked_;
  if (old != kNoNode) {
    ids_.Replace(hash, old, node);
    Supersede(hash, old, stamp, several_homes);
  }
  Advance(stamp);
  if (unlinked_ > options_.graph_from) has_graph_ = true;
  return {.existed = existed, .node = node};
}

StoreOutcome Space::Delete(std::string_view id, CommitStamp stamp, bool several_homes) {
  return EndContent(id, stamp, several_homes, false);
}

StoreOutcome Space::Yield(std::string_view id, CommitStamp stamp) {
  return EndContent(id, stamp, true, true);
}

// `yields`: also what has the stamp itself, but for a tombstone.
StoreOutcome Space::EndContent(std::string_view id, CommitStamp stamp, bool several_homes,
                               bool yields) {
  const uint64_t hash = HashOf(id);
  const NodeId old = FindId(hash, id);
  const bool is_content = old != kNoNode && nodes_[old].state != NodeState::kTombstone;
  if (old != kNoNode && ContentStamp(old) >= stamp + (yields && is_content ? 1 : 0)) {
    ObservationRef id_alone;
    id_alone.id = id;
    StoreLate(id_alone, false, nullptr, hash, old, stamp);
    return {.existed = is_content, .later = ContentStamp(old)};
  }
  if (several_homes) {
    if (!MakeTombstone(hash, id, stamp, old)) return {.reason = RefusalReason::kMemoryFull};
  } else if (old != kNoNode) {
    ids_.Erase(hash, old);
  }
  if (old != kNoNode) Supersede(hash, old, stamp, several_homes);
  Advance(stamp);
  return {.existed = is_content};
}

// What a suppress that comes late would have hidden was replaced meanwhile: as a delete then. One
// that meets what was hidden or restored by a later stamp has come before that, and does nothing.
StoreOutcome Space::Suppress(std::string_view id, CommitStamp stamp, bool several_homes) {
  const uint64_t hash = HashOf(id);
  const NodeId old = FindId(hash, id);
  if (old == kNoNode) return {};
  const CommitStamp begin = Load(stamps_[old].begin);
  const CommitStamp later = begin >= stamp ? begin : kNoStamp;
  if (!IsLive(old)) return {.later = later};
  if (ContentStamp(old) >= stamp) return Delete(id, stamp, several_homes);
  if (later != kNoStamp) return {.later = later};

  const NodeId node = TakeNode();
  if (node == kNoNode || !CopyText(node, old) || !FileAs(node, old)) {
    if (node != kNoNode) FreeNode(node);
    memory_short_ = true;
    return {.reason = RefusalReason::kMemoryFull};
  }
  std::memcpy(codes_->Row(node), codes_->Row(old), codes_->row_bytes());
  if (exact_) std::memcpy(exact_->Row(node), exact_->Row(old), exact_->row_bytes());
  SetStamps(node, stamp, stamp);
  nodes_[node].state = NodeState::kHidden;
  ++hidden_;
  ids_.Replace(hash, old, node);
  if (aged_) aged_->Replace(old, node);
  EndVersion(old, stamp);
  if (save_ != nullptr && save_->IsAhead(old)) Save::Set(save_->suppressed, old);
  if (several_homes) NoteSuperseded(hash, old);
  Advance(stamp);
  return {.existed = true};
}

StoreOutcome Space::Restore(std::string_view id, CommitStamp stamp) {
  const NodeId node = FindId(HashOf(id), id);
  if (node == kNoNode) return {};
  const CommitStamp begin = Load(stamps_[node].begin);
  if (begin >= stamp) return {.later = begin};
  if (nodes_[node].state != NodeState::kHidden) return {};
  if (!ReserveFresh()) {
    memory_short_ = true;
    return {.reason = RefusalReason::kMemoryFull};
  }
  SetStamps(node, stamp, kOpenStamp);
  nodes_[node].state = NodeState::kUnlinked;
  fresh_.Append(node);
  --hidden_;
  ++live_;
  ++unlinked_;
  Advance(stamp);
  if (unlinked_ > options_.graph_from) has_graph_ = true;
  return {.existed = true};
}

// What takes its place in the id map has a later stamp than its content.
void Space::Supersede(uint64_t hash, NodeId old, CommitStamp stamp, bool several_homes) {
  const bool came_late = Load(stamps_[old].begin) > stamp;
  if (nodes_[old].state == NodeState::kHidden) {
    // It was suppressed or restored since, and so were, perhaps, versions of that content before.
    if (came_late) EndEarlier(hash, IdOf(old), stamp);
    --hidden_;
    FreeNode(old);  // No reader was ever led to it.
    return;
  }
  EndVersion(old, stamp);
  if (came_late) EndEarlier(hash, IdOf(old), stamp);
  if (several_homes) NoteSuperseded(hash, old);
}

// The remembered versions of contents with earlier stamps end there, also those that begin later.
void Space::EndEarlier(uint64_t hash, std::string_view id, CommitStamp stamp) {
  const uint64_t kept = std::min<uint64_t>(superseded_count_, kSupersededKept);
  for (uint64_t i = 0; i < kept; ++i) {
    const auto [other_hash, node] = superseded_[i];
    if (other_hash != hash || nodes_[node].state == NodeState::kFree || IsLive(node) ||
        IdOf(node) != id) {
      continue;
    }
    if (ContentStamp(node) < stamp && Load(stamps_[node].end) > stamp) {
      SetEnd(node, stamp);
    }
  }
}

void Space::NoteSuperseded(uint64_t hash, NodeId node) {
  if (superseded_ == nullptr) {
    superseded_ = heap_->AllocateArray<Superseded>(kSupersededKept);
    if (superseded_ == nullptr) return;  // Only a recall of a snapshot in the past could tell.
  }
  superseded_[superseded_count_++ % kSupersededKept] = {hash, node};
}

// What came after a later one, `latest`, had been stored. Nothing that lives changes; but a
// snapshot between the two stamps sees this one, and no longer what was there before it.
// 1. Among the versions of the id that are remembered: the one that lived at the stamp, and when
//    the next one, or a tombstone, follows.
// 2. The former ends here.
// 3. It is stored as a version that has ended; a delete as one that no snapshot sees, for what may
//    still come with an earlier stamp. Where memory is short it is left out: only a recall of such
//    a snapshot could tell.
NodeId Space::StoreLate(const ObservationRef& observation, bool is_upsert, const float* numbers,
                        uint64_t hash, NodeId latest, CommitStamp stamp) {
  CommitStamp next = ContentStamp(latest);
  if (next == stamp) return kNoNode;
  const uint64_t kept = std::min<uint64_t>(superseded_count_, kSupersededKept);
  for (uint64_t i = 0; i < kept; ++i) {
    const auto [other_hash, node] = superseded_[i];
    if (other_hash != hash || node == latest || nodes_[node].state == NodeState::kFree ||
        IdOf(node) != observation.id) {
      continue;
    }
    const CommitStamp content = ContentStamp(node);
    if (content == stamp) return kNoNode;
    if (content > stamp) {
      next = std::min(next, content);
    } else if (Load(stamps_[node].end) > stamp) {
      next = std::min(next, Load(stamps_[node].end));
      SetEnd(node, stamp);
    }
  }
  // Nothing but deletes so far, and no rows for a place in the list.
  if (dimension() == 0) return kNoNode;
  const NodeId node = TakeNode();
  if (node == kNoNode) return kNoNode;
  if (!WriteText(&nodes_[node], observation) || !FileNode(node, observation.attributes) ||
      !ReserveFresh()) {
    FreeNode(node);
    return kNoNode;
  }
  if (is_upsert) {
    code_format_->Encode(numbers, codes_->Row(node));
    if (exact_) exact_format_->Encode(numbers, exact_->Row(node));
  }
  SetStamps(node, stamp, is_upsert ? next : stamp);
  nodes_[node].state = NodeState::kEnded;
  fresh_.Append(node);
  ++retired_;
  NoteSuperseded(hash, node);
  Advance(stamp);
  return node;
}

bool Space::MakeTombstone(uint64_t hash, std::string_view id, CommitStamp stamp, NodeId old) {
  const NodeId node = TakeNode();
  if (node == kNoNode) return false;
  ObservationRef id_alone;
  id_alone.id = id;
  if (!WriteText(&nodes_[node], id_alone) || (old == kNoNode && !ids_.Insert(hash, node))) {
    FreeNode(node);
    return false;
  }
  if (old != kNoNode) ids_.Replace(hash, old, node);
  SetStamps(node, stamp, stamp);
  nodes_[node].state = NodeState::kTombstone;
  nodes_[node].next = kNoNode;
  (last_tombstone_ == kNoNode ? first_tombstone_ : nodes_[last_tombstone_].next) = node;
  last_tombstone_ = node;
  ++tombstones_;
  return true;
}

// Those that were superseded are in the queue still and no longer in the id map.
void Space::ForgetTombstones(CommitStamp complete) {
  if (save_ != nullptr) complete = std::min(complete, save_->hold);
  for (int i = 0; i < kTombstonesAtOnce && first_tombstone_ != kNoNode; ++i) {
    const NodeId node = first_tombstone_;
    if (Load(stamps_[node].begin) > complete) return;
    first_tombstone_ = nodes_[node].next;
    if (first_tombstone_ == kNoNode) last_tombstone_ = kNoNode;
    const uint64_t hash = HashOf(IdOf(node));
    if (FindId(hash, IdOf(node)) == node) ids_.Erase(hash, node);
    --tombstones_;
    FreeNode(node);  // No reader was ever led to it.
  }
}

// Ends at exactly the stamp at which what supersedes it begins, so that every snapshot has one of
// them. Within one shard's stamps that is after whatever a recall of now began with, so what it has
// seen stays visible to it. What was restored after that stamp is then seen by nobody any more.
void Space::EndVersion(NodeId node, CommitStamp stamp) {
  Node& stored = nodes_[node];
  if (stored.state == NodeState::kTombstone) return;
  if (aged_) aged_->Remove(node);
  SetEnd(node, stamp);
  --live_;
  ++retired_;
  switch (stored.state) {
    case NodeState::kUnlinked:
      --unlinked_;
      stored.state = NodeState::kEnded;
      return;
    case NodeState::kLinking:
      --unlinked_;
      stored.state = NodeState::kRetiredLinking;
      return;
    case NodeState::kLinked:
      ListRetired(node);
      return;
    case NodeState::kLifted:
      --unlinked_;
      --lifted_live_;
      stored.state = NodeState::kLiftedEnded;
      return;
    default:
      CHECK(false, "only a live node ends");
  }
}

void Space::ListRetired(NodeId node) {
  nodes_[node].state = NodeState::kRetired;
  nodes_[node].next = first_retired_;
  first_retired_ = node;
  ++retired_linked_;
}

// Without a graph nobody takes from the front of the list, so what has ended leaves it where a new
// run is begun.
bool Space::KeepsInList(NodeId node) const {
  return has_graph_ || nodes_[node].state != NodeState::kEnded || !IsPast(node);
}

bool Space::ReserveFresh() {
  return fresh_.Reserve([this](NodeId node) { return KeepsInList(node); },
                        [this](NodeId node) { PutInLine(node); });
}

// There are enough of them, or their memory is missed.
bool Space::WantsDrop() const {
  const uint64_t ended = fresh_.size() - unlinked_;
  return ended > 0 && (memory_short_ || sweeps_all_ || ended * kEndedShare >= unlinked_);
}

// Once all of them are past.
void Space::DropEnded() {
  if (!WantsDrop()) return;
  if (drop_end_ == kNoStamp) drop_end_ = latest_stamp();
  if (horizon() < drop_end_) return;
  const bool renewed = fresh_.Renew([this](NodeId node) { return KeepsInList(node); },
                                    [this](NodeId node) { PutInLine(node); });
  if (!renewed) return;
  drop_end_ = kNoStamp;
  memory_short_ = false;
}

void Space::Advance(CommitStamp stamp) {
  const CommitStamp latest = latest_stamp_.load(std::memory_order_relaxed);
  latest_stamp_.store(std::max(latest + 1, stamp), std::memory_order_release);
}

// A free node, or a new one with room in every table.
NodeId Space::TakeNode() {
  if (first_free_ != kNoNode) {
    const NodeId node = first_free_;
    // A node that was made before there was a dimension has no rows yet.
    if (!ReserveRows(size_t{node} + 1)) return kNoNode;
    first_free_ = nodes_[node].next;
    --free_nodes_;
    ++nodes_taken_;
    return node;
  }
  const uint32_t count = node_count_.load(std::memory_order_relaxed);
  const size_t wanted = size_t{count} + 1;
  if (!nodes_.Reserve(wanted) || !ReserveStamps(wanted) || !ReserveRows(wanted) ||
      (aged_ && !aged_->Reserve(wanted))) {
    return kNoNode;
  }
  node_count_.store(count + 1, std::memory_order_release);
  ++nodes_taken_;
  return count;
}

bool Space::ReserveRows(size_t nodes) {
  return (!codes_ || codes_->Reserve(nodes)) && (!exact_ || exact_->Reserve(nodes));
}

bool Space::ReserveStamps(size_t nodes) {
  return stamps_.Reserve(nodes) && has_end_.Reserve((nodes + kNodesInWord - 1) / kNodesInWord);
}

// Nobody else writes the word.
void Space::NoteEnd(NodeId node, bool has_end) {
  const std::atomic_ref<uint64_t> word(has_end_[node / kNodesInWord]);
  const uint64_t bit = uint64_t{1} << (node % kNodesInWord);
  const uint64_t before = word.load(std::memory_order_relaxed);
  const uint64_t after = has_end ? before | bit : before & ~bit;
  if (after != before) word.store(after, std::memory_order_relaxed);
}

// The bit first: who sees the end stamp, or a later latest_stamp(), sees the bit.
void Space::SetEnd(NodeId node, CommitStamp end) {
  NoteEnd(node, end != kOpenStamp);
  Store(&stamps_[node].end, end);
}

void Space::SetStamps(NodeId node, CommitStamp begin, CommitStamp end) {
  Store(&stamps_[node].begin, begin);
  SetEnd(node, end);
}

// Before any link leads to it: who comes upon it sees this.
void Space::NoteLinking(NodeId node) {
  const CommitStamp begin = Load(stamps_[node].begin);
  if (begin > linked_up_to_.load(std::memory_order_relaxed)) {
    linked_up_to_.store(begin, std::memory_order_release);
  }
}

void Space::FreeNode(NodeId node) {
  if (aged_) aged_->Remove(node);
  Unfile(node);
  FreeText(&nodes_[node]);
  nodes_[node].state = NodeState::kFree;
  nodes_[node].next = first_free_;
  first_free_ = node;
  ++free_nodes_;
}

bool Space::WriteText(Node* node, const ObservationRef& observation) {
  const bool keeps_payload = observation.record_bytes == 0 && !observation.payload.empty();
  const size_t bytes =
      observation.id.size() + (keeps_payload ? observation.payload.size() : size_t{0});
  node->text = heap_->Allocate(bytes);
  if (node->text == nullptr) return false;
  text_bytes_ += ArenaHeap::BlockBytes(bytes);
  std::memcpy(node->text, observation.id.data(), observation.id.size());
  if (keeps_payload) {
    std::memcpy(node->text + observation.id.size(), observation.payload.data(),
                observation.payload.size());
  }
  static_assert(kMaxIdBytes < size_t{1} << 15);
  node->id_bytes = static_cast<uint16_t>(observation.id.size());
  node->was_hidden = 0;
  node->payload_bytes = static_cast<uint32_t>(observation.payload.size()) & 0x1FFFF;
  node->record_words = observation.record_bytes / 8 & 0x7FFF;
  node->payload_kind = observation.payload_kind;
  node->origin = observation.origin;
  node->when_ns = observation.when_ns;
  node->confidence = observation.confidence;
  return true;
}

// With the stamp of its content, which the node's own no longer tells.
bool Space::CopyText(NodeId node, NodeId from) {
  const Node& source = nodes_[from];
  const CommitStamp content = ContentStamp(from);
  const size_t text_bytes = ContentBytes(source);
  const size_t bytes = text_bytes + sizeof(content);
  std::byte* text = heap_->Allocate(bytes);
  if (text == nullptr) return false;
  text_bytes_ += ArenaHeap::BlockBytes(bytes);
  std::memcpy(text, source.text, text_bytes);
  std::memcpy(text + text_bytes, &content, sizeof(content));
  Node& copy = nodes_[node];
  copy.text = text;
  copy.id_bytes = source.id_bytes;
  copy.was_hidden = 1;
  copy.payload_bytes = source.payload_bytes;
  copy.record_words = source.record_words;
  copy.payload_kind = source.payload_kind;
  copy.origin = source.origin;
  copy.when_ns = source.when_ns;
  copy.confidence = source.confidence;
  return true;
}

size_t Space::TextBytes(const Node& node) {
  return ContentBytes(node) + (node.was_hidden ? sizeof(CommitStamp) : 0);
}

// When what it holds was upserted, or deleted.
CommitStamp Space::ContentStamp(NodeId node) const {
  const Node& stored = nodes_[node];
  if (!stored.was_hidden) return Load(stamps_[node].begin);
  CommitStamp stamp;
  std::memcpy(&stamp, stored.text + ContentBytes(stored), sizeof(stamp));
  return stamp;
}

void Space::FreeText(Node* node) {
  if (node->text == nullptr) return;
  const size_t bytes = TextBytes(*node);
  heap_->Free(node->text, bytes);
  text_bytes_ -= ArenaHeap::BlockBytes(bytes);
  node->text = nullptr;
}

// ---------------------------------------------------------------------------------------------
// Reading

RefusalReason Space::PrepareQuery(VectorDtype dtype, uint32_t dimension, float scale,
                                  const std::byte* vector, const WalkCodes** codes,
                                  const QueryForms& forms) const {
  if (dimension != this->dimension()) return RefusalReason::kWrongDimension;
  Numbers numbers;
  const RefusalReason reason = DecodeInto(dtype, scale, vector, dimension, numbers.data());
  if (reason != RefusalReason::kNone) return reason;
  code_format_->Encode(numbers.data(), forms.code);
  if (exact_) exact_format_->Encode(numbers.data(), forms.exact);
  if (*codes != nullptr && (*codes)->IsFar(numbers.data())) *codes = nullptr;
  if (*codes != nullptr) (*codes)->format().EncodeQuery(numbers.data(), forms.walk);
  if (forms.signs != nullptr && waiting_count_ > 0) {
    *forms.signs_are_far = walk_codes()->IsFar(numbers.data());
    walk_codes()->format().Encode(numbers.data(), forms.signs);
    if (retired_codes_ != nullptr) {
      retired_codes_->format().Encode(numbers.data(), forms.signs_before);
    }
  }
  return RefusalReason::kNone;
}

StoredObservation Space::Get(NodeId node) const {
  const Node& stored = nodes_[node];
  return {.id = {reinterpret_cast<const char*>(stored.text), stored.id_bytes},
          .payload = {stored.text + stored.id_bytes, ContentBytes(stored) - stored.id_bytes},
          .payload_bytes = stored.payload_bytes,
          .payload_kind = stored.payload_kind,
          .was_hidden = stored.was_hidden != 0,
          .when_ns = stored.when_ns,
          .confidence = stored.confidence,
          .stamp = Load(stamps_[node].begin),
          .origin = std::atomic_ref<LogAddress>(const_cast<LogAddress&>(stored.origin))
                        .load(std::memory_order_relaxed),
          .record_bytes = uint32_t{stored.record_words} * 8};
}

bool Space::MoveOrigin(NodeId node, LogAddress from, LogAddress to) {
  if (node >= node_count()) return false;
  Node& stored = nodes_[node];
  if (stored.text == nullptr || stored.record_words == 0 || stored.origin != from) return false;
  std::atomic_ref<LogAddress>(stored.origin).store(to, std::memory_order_relaxed);
  return true;
}

void Space::GetVector(NodeId node, float* out) const {
  if (exact_) {
    exact_format_->Decode(exact_->Row(node), out);
  } else {
    code_format_->Decode(codes_->Row(node), out);
  }
}

float Space::ScoreOf(float distance) const {
  switch (options_.metric) {
    case Metric::kCosine:
      return 1 - distance;
    case Metric::kInnerProduct:
      return -distance;
    case Metric::kL2:
    case Metric::kUnspecified:
      break;
  }
  return distance;
}

NodeId Space::FindLive(std::string_view id) const {
  const NodeId node = FindId(HashOf(id), id);
  return node != kNoNode && IsLive(node) ? node : kNoNode;
}

std::optional<Space::Content> Space::ContentOf(NodeId node) const {
  const NodeState state = nodes_[node].state;
  const bool is_deleted = state == NodeState::kTombstone;
  if (!IsLive(node) && state != NodeState::kHidden && !is_deleted) return std::nullopt;
  if (FindId(HashOf(IdOf(node)), IdOf(node)) != node) return std::nullopt;
  return Content{.kind = is_deleted                    ? Content::Kind::kDeleted
                         : state == NodeState::kHidden ? Content::Kind::kHidden
                                                       : Content::Kind::kLive,
                 .stored = Get(node),
                 .stamp = ContentStamp(node)};
}

void Space::Scroll(uint64_t* cursor, size_t limit, std::vector<NodeId>* nodes) const {
  ids_.VisitFrom(cursor, limit, [&](NodeId node) {
    if (IsLive(node)) nodes->push_back(node);
  });
}

size_t Space::NodesInBytes(size_t bytes) const {
  return bytes / (code_format_ ? code_format_->row_bytes() : kCacheLineBytes);
}

MemoryByKind Space::memory() const {
  MemoryByKind memory{};
  const auto add = [&memory](MemoryKind kind, uint64_t bytes) {
    memory[static_cast<size_t>(kind)] += bytes;
  };
  for (const auto* rows : {&codes_, &exact_}) {
    if (*rows) add(MemoryKind::kRows, (*rows)->bytes());
  }
  const std::array<const WalkCodes*, 3> all_codes = {walk_codes(), next_codes_, retired_codes_};
  for (const WalkCodes* codes : all_codes) {
    if (codes != nullptr) add(MemoryKind::kCodes, codes->bytes());
  }
  add(MemoryKind::kLinks, graph_.bytes());
  if (lists_) add(MemoryKind::kLists, lists_->bytes());
  if (waiting_) add(MemoryKind::kWaiting, waiting_->bytes());
  add(MemoryKind::kWaiting, fresh_.bytes());
  add(MemoryKind::kRecords, nodes_.bytes());
  add(MemoryKind::kIds, ids_.bytes() + text_bytes_);
  add(MemoryKind::kStamps, stamps_.bytes() + has_end_.bytes() + (aged_ ? aged_->bytes() : 0));
  if (superseded_ != nullptr) {
    add(MemoryKind::kStamps, ArenaHeap::BlockBytes(kSupersededKept * sizeof(Superseded)));
  }
  add(MemoryKind::kFilters, attributes_.bytes() + times_.bytes());
  return memory;
}

uint64_t Space::HashOf(std::string_view id) const { return HashString(id, options_.hash_seed); }

NodeId Space::FindId(uint64_t hash, std::string_view id) const {
  return ids_.Find(hash, [&](NodeId node) { return IdOf(node) == id; });
}

std::string_view Space::IdOf(NodeId node) const {
  return {reinterpret_cast<const char*>(nodes_[node].text), nodes_[node].id_bytes};
}

}  // namespace engram
