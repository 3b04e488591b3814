#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "index/attribute_index.h"
#include "index/space.h"
#include "src/core/ids.h"
#include "src/core/refusal_reason.h"

namespace engram {

// One recall's filter over the nodes of one space. What it says of a set of attributes is kept, as
// most nodes have one that came before.
//
// Thread safety: the shard core's alone; good until the space changes.
class NodeFilter {
 public:
  // As Space::CompileFilter. `space` outlives it.
  RefusalReason Begin(const Space* space, std::span<const std::byte> filter) {
    space_ = space;
    verdicts_.fill(0);
    return space->CompileFilter(filter, &compiled_);
  }

  const CompiledFilter& compiled() const { return compiled_; }
  bool has_clauses() const { return compiled_.clause_count > 0; }
  bool has_times() const { return !compiled_.times.is_all(); }
  bool MeetsClauses(NodeId node) const {
    const AttributeIndex& attributes = space_->attributes();
    const AttributeIndex::SetId set = attributes.SetOf(node);
    uint64_t& kept = verdicts_[set % kVerdicts];
    const uint64_t key = (uint64_t{set} + 1) << 1;
    if ((kept & ~uint64_t{1}) != key) {
      kept = key | static_cast<uint64_t>(attributes.Matches(set, compiled_));
    }
    return (kept & 1) != 0;
  }
  bool IsInTime(NodeId node) const { return compiled_.times.Has(space_->WhenOf(node)); }
  bool Matches(NodeId node) const {
    return (!has_clauses() || MeetsClauses(node)) && (!has_times() || IsInTime(node));
  }
  // Asks for what Matches reads of these nodes.
  void Prefetch(std::span<const NodeId> nodes) const {
    const AttributeIndex& attributes = space_->attributes();
    if (has_times()) {
      for (const NodeId node : nodes) space_->PrefetchWhen(node);
    }
    if (!has_clauses() || attributes.nodes() == 0) return;
    for (const NodeId node : nodes) attributes.PrefetchSet(node);
    if (attributes.sets() <= kVerdicts) return;
    for (const NodeId node : nodes) attributes.PrefetchRecord(attributes.SetOf(node));
    for (const NodeId node : nodes) attributes.PrefetchMembers(attributes.SetOf(node));
  }

 private:
  static constexpr size_t kVerdicts = 512;

  const Space* space_ = nullptr;
  CompiledFilter compiled_;
  // By set: it and one more, and in the lowest bit what the clauses say. 0: nothing yet.
  mutable std::array<uint64_t, kVerdicts> verdicts_;
};

}  // namespace engram
