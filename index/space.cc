#include "index/space.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "src/core/check.h"
#include "src/core/hash.h"

namespace engram {

namespace {

constexpr float kInt8Magnitude = 128;

}  // namespace

Space::Space(std::string name, Metric metric, uint32_t dimension, ArenaHeap* heap,
             const HnswBuildParams& build_params, uint64_t hash_seed)
    : name_(std::move(name)),
      metric_(metric),
      heap_(heap),
      hash_seed_(hash_seed),
      distance_(DistanceFunction(metric)),
      dimension_(0),
      nodes_(heap),
      unlinked_(heap),
      ids_(heap),
      graph_(heap, build_params) {
  if (dimension != 0) FixDimension(dimension);
}

Space::~Space() {
  for (uint32_t node = 0; node < node_count_; ++node) FreeText(&nodes_[node]);
}

RefusalReason Space::Upsert(const ObservationRef& observation) {
  const bool first = dimension_ == 0;
  if (first) FixDimension(observation.dimension);
  const RefusalReason reason = UpsertHere(observation);
  if (first && reason != RefusalReason::kNone) ForgetDimension();
  return reason;
}

RefusalReason Space::UpsertHere(const ObservationRef& observation) {
  if (observation.dimension != dimension_) return RefusalReason::kWrongDimension;
  const NodeId node = TakeNode();
  if (node == kNoNode) return RefusalReason::kMemoryFull;
  RefusalReason reason =
      WriteRow(observation.dtype, observation.scale, observation.vector, vectors_->Row(node));
  const uint64_t hash = HashOf(observation.id);
  const NodeId old = FindId(hash, observation.id);
  if (reason == RefusalReason::kNone) {
    const bool stored =
        WriteText(&nodes_[node], observation) && (old != kNoNode || ids_.Insert(hash, node));
    if (!stored) reason = RefusalReason::kMemoryFull;
  }
  if (reason != RefusalReason::kNone) {
    FreeText(&nodes_[node]);
    GiveNode(node);
    return reason;
  }
  if (old != kNoNode) {
    ids_.Replace(hash, old, node);
    Retire(old);
  }
  ListUnlinked(node);
  ++live_;
  if (unlinked_count_ > kGraphFrom) has_graph_ = true;
  return RefusalReason::kNone;
}

bool Space::Delete(std::string_view id) {
  const uint64_t hash = HashOf(id);
  const NodeId node = FindId(hash, id);
  if (node == kNoNode) return false;
  ids_.Erase(hash, node);
  Retire(node);
  return true;
}

RefusalReason Space::PrepareQuery(VectorDtype dtype, uint32_t dimension, float scale,
                                  const std::byte* vector, float* row) const {
  if (dimension != dimension_) return RefusalReason::kWrongDimension;
  std::fill_n(row + dimension_, padded_dimension() - dimension_, 0.0f);
  return WriteRow(dtype, scale, vector, row);
}

RefusalReason Space::WriteRow(VectorDtype dtype, float scale, const std::byte* vector,
                              float* row) const {
  DecodeVector(dtype, dimension_, scale, vector, row);
  if (dtype == VectorDtype::kInt8 && !std::isfinite(kInt8Magnitude * scale) &&
      !std::all_of(row, row + dimension_, [](float value) { return std::isfinite(value); })) {
    return RefusalReason::kNotFinite;
  }
  if (metric_ == Metric::kCosine && !NormaliseInPlace(row, dimension_)) {
    return RefusalReason::kZeroVector;
  }
  return RefusalReason::kNone;
}

StoredObservation Space::Get(NodeId node) const {
  const Node& stored = nodes_[node];
  return {.id = IdOf(node),
          .payload = {stored.text + stored.id_bytes, stored.payload_bytes},
          .when_ns = stored.when_ns,
          .confidence = stored.confidence};
}

float Space::ScoreOf(float distance) const {
  switch (metric_) {
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

NodeId Space::NextToLink() const {
  return has_graph_ && unlinked_count_ > 0 ? unlinked_[0] : kNoNode;
}

bool Space::BeginLinking(HnswLinker* linker, NodeId node) {
  CHECK(nodes_[node].state == NodeState::kUnlinked, "only a new node is linked");
  if (!linker->Begin(&graph_, vectors(), distance_, node)) return false;
  nodes_[node].state = NodeState::kLinking;
  return true;
}

void Space::FinishLinking(NodeId node) {
  if (nodes_[node].state == NodeState::kRetiredLinking) {
    nodes_[node].state = NodeState::kRetired;
    return;
  }
  CHECK(nodes_[node].state == NodeState::kLinking, "the node was being linked");
  UnlistUnlinked(node);
  nodes_[node].state = NodeState::kLinked;
}

size_t Space::NodesInBytes(size_t bytes) const {
  return bytes / (std::max<size_t>(padded_dimension(), 1) * sizeof(float));
}

uint64_t Space::resident_bytes() const {
  const uint64_t row_bytes = padded_dimension() * sizeof(float);
  const uint64_t links_bytes =
      has_graph_ ? graph_.capacity() * graph_.MaxDegree(0) * sizeof(NodeId) : 0;
  return (vectors_ ? vectors_->capacity() * row_bytes : 0) + links_bytes +
         nodes_.capacity() * sizeof(Node) + unlinked_.capacity() * sizeof(NodeId) +
         ids_.size() * 12 + text_bytes_;
}

void Space::FixDimension(uint32_t dimension) {
  dimension_ = dimension;
  vectors_.emplace(heap_, dimension);
}

// The first observation was refused: the next one may bring another dimension. Rows go with it, so
// nodes are counted from 0 again.
void Space::ForgetDimension() {
  CHECK(live_ == 0 && retired_ == 0, "nothing is stored yet");
  dimension_ = 0;
  vectors_.reset();
  node_count_ = 0;
  first_free_ = kNoNode;
}

// A free node, or a new one with room in every table.
NodeId Space::TakeNode() {
  if (first_free_ != kNoNode) {
    const NodeId node = first_free_;
    first_free_ = nodes_[node].place;
    return node;
  }
  const size_t wanted = size_t{node_count_} + 1;
  if (!nodes_.Reserve(wanted) || !unlinked_.Reserve(wanted) || !vectors_->Reserve(wanted)) {
    return kNoNode;
  }
  return node_count_++;
}

void Space::GiveNode(NodeId node) {
  nodes_[node].state = NodeState::kFree;
  nodes_[node].place = first_free_;
  first_free_ = node;
}

bool Space::WriteText(Node* node, const ObservationRef& observation) {
  const size_t bytes = observation.id.size() + observation.payload.size();
  node->text = heap_->Allocate(bytes);
  if (node->text == nullptr) return false;
  text_bytes_ += ArenaHeap::BlockBytes(bytes);
  std::memcpy(node->text, observation.id.data(), observation.id.size());
  if (!observation.payload.empty()) {
    std::memcpy(node->text + observation.id.size(), observation.payload.data(),
                observation.payload.size());
  }
  node->id_bytes = static_cast<uint16_t>(observation.id.size());
  node->payload_bytes = static_cast<uint32_t>(observation.payload.size());
  node->when_ns = observation.when_ns;
  node->confidence = observation.confidence;
  return true;
}

void Space::FreeText(Node* node) {
  if (node->text == nullptr) return;
  const size_t bytes = size_t{node->id_bytes} + node->payload_bytes;
  heap_->Free(node->text, bytes);
  text_bytes_ -= ArenaHeap::BlockBytes(bytes);
  node->text = nullptr;
}

// Out of every result at once. What the graph knows stays in it until it is rebuilt.
void Space::Retire(NodeId node) {
  --live_;
  FreeText(&nodes_[node]);
  switch (nodes_[node].state) {
    case NodeState::kUnlinked:
      UnlistUnlinked(node);
      GiveNode(node);
      return;
    case NodeState::kLinking:
      UnlistUnlinked(node);
      nodes_[node].state = NodeState::kRetiredLinking;
      break;
    case NodeState::kLinked:
      nodes_[node].state = NodeState::kRetired;
      break;
    case NodeState::kFree:
    case NodeState::kRetired:
    case NodeState::kRetiredLinking:
      CHECK(false, "only a live node is retired");
  }
  ++retired_;
}

void Space::ListUnlinked(NodeId node) {
  nodes_[node].state = NodeState::kUnlinked;
  nodes_[node].place = static_cast<uint32_t>(unlinked_count_);
  unlinked_[unlinked_count_++] = node;
}

void Space::UnlistUnlinked(NodeId node) {
  const uint32_t place = nodes_[node].place;
  const NodeId last = unlinked_[--unlinked_count_];
  unlinked_[place] = last;
  nodes_[last].place = place;
}

uint64_t Space::HashOf(std::string_view id) const { return HashString(id, hash_seed_); }

NodeId Space::FindId(uint64_t hash, std::string_view id) const {
  return ids_.Find(hash, [&](NodeId node) { return IdOf(node) == id; });
}

std::string_view Space::IdOf(NodeId node) const {
  return {reinterpret_cast<const char*>(nodes_[node].text), nodes_[node].id_bytes};
}

Result<void> Space::CheckInvariants() const {
  const auto fail = [&](const std::string& what, uint64_t node) {
    return Fail(ErrorCode::kCorrupt,
                "space " + name_ + ": " + what + " (node " + std::to_string(node) + ")");
  };
  uint64_t live = 0;
  uint64_t unlinked = 0;
  uint64_t retired = 0;
  for (uint32_t node = 0; node < node_count_; ++node) {
    const Node& stored = nodes_[node];
    const bool listed = stored.state == NodeState::kUnlinked || stored.state == NodeState::kLinking;
    if (listed || stored.state == NodeState::kLinked) {
      ++live;
      if (FindId(HashOf(IdOf(node)), IdOf(node)) != node) return fail("id not in the map", node);
    }
    if (listed) {
      ++unlinked;
      if (stored.place >= unlinked_count_ || unlinked_[stored.place] != node) {
        return fail("unlinked but not listed", node);
      }
    }
    const bool linked_once =
        stored.state == NodeState::kLinked || stored.state == NodeState::kRetired;
    if (linked_once != graph_.IsLinked(node)) return fail("graph and node disagree", node);
    if (stored.state == NodeState::kRetired || stored.state == NodeState::kRetiredLinking) {
      ++retired;
    }
  }
  if (live != live_ || live != ids_.size()) return fail("live count is off", live);
  if (unlinked != unlinked_count_) return fail("unlinked count is off", unlinked);
  if (retired != retired_) return fail("retired count is off", retired);
  return graph_.CheckInvariants();
}

}  // namespace engram
